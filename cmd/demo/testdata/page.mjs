// Drives the demo's page in Chromium as a user would, and fails (exit code 1,
// reason on stderr) when the page does not do what it should.
//
//	node page.mjs <url of the demo> <directory of package.json> <directory for screenshots> <chromium>
import { createRequire } from "node:module";
import { strict as assert } from "node:assert";
import path from "node:path";

const [url, packages, screenshots, executablePath] = process.argv.slice(2);
const { chromium } = createRequire(path.join(packages, "package.json"))("playwright-core");

const browser = await chromium.launch({
	executablePath,
	args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const page = await browser.newPage({ viewport: { width: 1280, height: 800 }, colorScheme: "light" });
try {
	await drive(page);
} catch (error) {
	await page.screenshot({ path: path.join(screenshots, "demo-failed.png") });
	console.error(`the page when it failed:\n${await page.locator("body").innerText()}\n`);
	throw error;
} finally {
	await browser.close();
}

async function drive(page) {
	page.setDefaultTimeout(15_000);
	const trouble = [];
	page.on("pageerror", (error) => trouble.push(`script error: ${error}`));
	page.on("console", (message) => ["error", "warning"].includes(message.type()) && trouble.push(message.text()));
	page.on("request", (request) => /^(data:|blob:)/.test(request.url()) || request.url().startsWith(url + "/")
		|| trouble.push(`request to the outside: ${request.url()}`));

	await page.goto(url + "/");
	await page.getByRole("status").filter({ hasText: /^Connected, (alder|birch) answers$/ }).waitFor();
	const backend = await page.locator("#backend").textContent();

	// The field has the focus from the start.
	await page.keyboard.type("hello");
	await page.keyboard.press("Enter");
	await page.locator("#conversation .backend", { hasText: `${backend}: hello` }).waitFor();
	const markup = '<img src="x" onerror="document.title=1"> & <b>text</b>';
	await page.getByLabel("Text to send").fill(markup);
	await page.getByRole("button", { name: "Send" }).click();
	await page.locator("#conversation .backend", { hasText: `${backend}: ${markup}` }).waitFor();
	assert.equal(await page.locator("#conversation img").count(), 0, "a message became HTML");
	assert.equal(await page.locator("#subprotocol").textContent(), "holdfast-demo");

	await ownRow(page, backend, /^2 \/ [3-9]/); // the greeting counts as well
	for (const [name, width, height, colorScheme] of [
		["demo-light", 1280, 800, "light"], ["demo-dark", 1280, 800, "dark"],
		["demo-phone-light", 390, 844, "light"], ["demo-phone-dark", 390, 844, "dark"],
	]) {
		await page.setViewportSize({ width, height });
		await page.emulateMedia({ colorScheme });
		await page.screenshot({ path: path.join(screenshots, name + ".png"), fullPage: width < 800 });
		const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
		assert.ok(overflow <= 0, `${name}: the page is ${overflow} pixels too wide`);
	}
	await page.setViewportSize({ width: 1280, height: 800 });
	await page.emulateMedia({ colorScheme: "light" });

	const before = await page.locator("#connection").textContent();
	await page.evaluate(() => socket.close(4001, "enough"));
	await page.getByRole("status").filter({ hasText: "Closed, code 4001: enough" }).waitFor();
	await page.screenshot({ path: path.join(screenshots, "demo-closed.png") });
	await page.getByRole("button", { name: "Reconnect" }).click();
	await page.getByRole("status").filter({ hasText: /^Connected, \w+ answers$/ }).waitFor();
	await ownRow(page, await page.locator("#backend").textContent(), /^0 \/ 1$/);
	assert.notEqual(await page.locator("#connection").textContent(), before, "the new connection has the old id");

	assert.deepEqual(trouble, [], "the browser reported trouble");
}

// The one row of the table that is marked as this page's own, and right.
async function ownRow(page, backend, messages) {
	const own = page.locator("#rows tr.own");
	await own.locator(".state.open").waitFor();
	assert.equal(await own.count(), 1, "rows marked as this page's own");
	await own.locator(".tag", { hasText: "this page" }).waitFor();
	await own.locator("td", { hasText: new RegExp(`^${backend} 127\\.0\\.0\\.1:\\d+$`) }).waitFor();
	await own.locator("td[data-label^=Messages]", { hasText: messages }).waitFor();
	assert.equal(await own.getAttribute("data-id"), await page.locator("#connection").textContent());
}
