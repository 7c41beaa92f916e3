// What the scripts that drive the demo's page have in common.
import { createRequire } from "node:module";
import { strict as assert } from "node:assert";
import path from "node:path";

export const [url, packages, screenshots, executablePath] = process.argv.slice(2);
const { chromium } = createRequire(path.join(packages, "package.json"))("playwright-core");

// drive calls script with n pages and with a list that gets what a browser has
// to complain about. If it fails, what the first page showed is kept.
export async function drive(n, script) {
	const browser = await chromium.launch({
		executablePath,
		args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
			"--disable-background-networking", "--disable-component-update", "--disable-sync",
			"--disable-background-timer-throttling", "--disable-renderer-backgrounding"],
	});
	const pages = [], trouble = [];
	try {
		for (let i = 0; i < n; i++) {
			const page = await browser.newPage({ viewport: { width: 1280, height: 800 }, colorScheme: "light" });
			page.setDefaultTimeout(15_000);
			page.on("pageerror", (error) => trouble.push(`script error: ${error}`));
			page.on("console", (message) => ["error", "warning"].includes(message.type()) && trouble.push(message.text()));
			page.on("request", (request) => /^(data:|blob:)/.test(request.url()) || request.url().startsWith(url + "/")
				|| trouble.push(`request to the outside: ${request.url()}`));
			pages.push(page);
		}
		await script(pages, trouble);
	} catch (error) {
		for (const [i, page] of pages.entries()) {
			await page.screenshot({ path: path.join(screenshots, `demo-failed-${i + 1}.png`) });
			console.error(`page ${i + 1} when it failed:\n${await page.locator("body").innerText()}\n`);
		}
		throw error;
	} finally {
		await browser.close();
	}
}

const looks = [
	["light", 1280, 800, "light"], ["dark", 1280, 800, "dark"],
	["phone-light", 390, 844, "light"], ["phone-dark", 390, 844, "dark"],
];

// shoot takes screenshots of every look that is wanted, and checks that nothing
// is cut off.
export async function shoot(page, name, wanted = /./) {
	for (const [look, width, height, colorScheme] of looks) {
		if (!wanted.test(look)) continue;
		await page.setViewportSize({ width, height });
		await page.emulateMedia({ colorScheme });
		await page.screenshot({ path: path.join(screenshots, `${name}-${look}.png`), fullPage: width < 800 });
		const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
		assert.ok(overflow <= 0, `${name}-${look}: the page is ${overflow} pixels too wide`);
	}
	await page.setViewportSize({ width: 1280, height: 800 });
	await page.emulateMedia({ colorScheme: "light" });
}
