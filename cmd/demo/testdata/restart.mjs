// Restarts, from two pages on which somebody types, the backends that they talk
// to, and fails (exit code 1, reason on stderr) when a page has noticed more of
// it than it should.
//
//	node restart.mjs <url of the demo> <directory of package.json> <directory for screenshots> <chromium>
import { strict as assert } from "node:assert";
import { drive, shoot, url } from "./browser.mjs";

await drive(2, async (pages, trouble) => {
	for (const page of pages) {
		await page.goto(url + "/");
		await page.getByRole("status").filter({ hasText: /^Connected, \w+ answers$/ }).waitFor();
		await page.evaluate(type);
	}
	const [page, other] = pages;
	const first = await page.locator("#backend").textContent();
	assert.notEqual(await other.locator("#backend").textContent(), first, "both pages talk to one backend");
	await Promise.all(pages.map((page) => answers(page, 20)));
	await shoot(page, "restart-before");

	// Each of them leaves for the other backend, where both are at the end.
	await restart(page, "Kill", 1);
	const second = await page.locator("#backend").textContent();
	assert.notEqual(second, first, "the backend that was killed answers");
	await page.locator("#resume", { hasText: /^attempt=\d+, replayed=\d+, cause=1006$/ }).waitFor();
	await Promise.all(pages.map((page) => answers(page, 20)));
	await restart(page, "Stop in order", 2);
	assert.equal(await page.locator("#backend").textContent(), first, "the backend that was stopped answers");
	await page.locator("#resume", { hasText: /^attempt=\d+, replayed=\d+, cause=1001$/ }).waitFor();
	await Promise.all(pages.map((page) => answers(page, 20)));

	// With no backend left, there is nothing but to wait.
	await page.getByLabel("Both backends").check();
	for (const [way, resumes, looks] of [["Kill", 3, /^(light|dark)$/], ["Stop in order", 4, /^phone/]]) {
		await restart(page, way, resumes, async () => {
			for (const page of pages) await page.getByRole("status").filter({ hasText: /^Held, no backend/ }).waitFor();
			assert.ok(await page.locator("#conversation .waiting").count() > 0, "no line is shown as waiting");
			await shoot(page, "restart-held", looks); // there is not time for all
		});
		await Promise.all(pages.map((page) => answers(page, 20)));
	}
	await shoot(page, "restart-after");

	for (const [i, page] of pages.entries()) {
		await page.evaluate(() => clearInterval(typing));
		await page.locator("#waiting", { hasText: /^0$/ }).waitFor();
		const seen = await page.evaluate(() => ({ ...report, same: report.socket === socket, open: socket.readyState === 1, socket: null }));
		const shown = Object.fromEntries(await page.locator("dd[id]").evaluateAll((list) => list.map((dd) => [dd.id, dd.textContent])));
		const what = `page ${i + 1}, ${JSON.stringify(shown)}`;
		console.log(what);
		assert.ok(seen.same && seen.open && seen.closes === 0, `${what}: the WebSocket did not stay`);
		assert.deepEqual(seen.order, Array.from(seen.order, (_, i) => i + 1), `${what}: answers are missing or out of order`);
		assert.deepEqual([shown.sent, shown.answered], Array(2).fill(seen.order.length.toLocaleString("en")), what);
		assert.equal(shown.lost, "0", what);
		assert.equal(shown.repeats, seen.repeats.toLocaleString("en"), what);
		assert.deepEqual(seen.unannounced, [], `${what}: repeats that no Holdfast-Resume has announced`);
		assert.ok(parseInt(shown.resumed, 10) >= (i === 0 ? 4 : 3), what);
	}
	assert.deepEqual(trouble, [], "the browser reported trouble");
});

// In the page: types a line every 50 ms, and keeps its own account.
function type() {
	window.report = { socket, closes: 0, order: [], repeats: 0, unannounced: [] };
	let allowed = 0;
	socket.addEventListener("close", () => report.closes++);
	socket.addEventListener("message", (event) => {
		const { resume, text } = JSON.parse(event.data), n = parseInt(text, 10);
		if (text === undefined) {
			allowed = Number(/replayed=(\d+)/.exec(resume)[1]);
			return;
		}
		if (n > report.order.length) {
			report.order.push(n);
		} else {
			report.repeats++;
			if (allowed <= 0) report.unannounced.push(n);
		}
		allowed--;
	});
	window.typing = setInterval(() => {
		$("text").value = "still there?";
		$("form").requestSubmit();
	}, 50);
}

// answers waits until the page has got n more answers.
async function answers(page, n) {
	const before = await page.evaluate(() => report.order.length);
	await page.waitForFunction((n) => report.order.length >= n, before + n);
}

// restart presses a button and waits until the backend is back and the page was
// resumed as often as it should; meanwhile is called before that.
async function restart(page, way, resumes, meanwhile = async () => {}) {
	const button = page.getByRole("group", { name: "Restart the backend this page talks to" }).getByRole("button", { name: way });
	await button.click();
	await page.locator("#kill[aria-disabled=true]").waitFor();
	await meanwhile();
	await page.locator("#kill[aria-disabled=false]").waitFor();
	await page.locator("#resumed", { hasText: resumes === 1 ? /^once$/ : new RegExp(`^${resumes} times$`) }).waitFor();
}
