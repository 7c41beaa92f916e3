// Drives the demo's page in Chromium as a user would, and fails (exit code 1,
// reason on stderr) when the page does not do what it should.
//
//	node page.mjs <url of the demo> <directory of package.json> <directory for screenshots> <chromium>
import { strict as assert } from "node:assert";
import path from "node:path";
import { drive, screenshots, shoot, url } from "./browser.mjs";

await drive(1, async ([page], trouble) => {
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
	await shoot(page, "demo");

	const before = await page.locator("#connection").textContent();
	await page.evaluate(() => socket.close(4001, "enough"));
	await page.getByRole("status").filter({ hasText: "Closed, code 4001: enough" }).waitFor();
	await page.screenshot({ path: path.join(screenshots, "demo-closed.png") });
	await page.getByRole("button", { name: "Reconnect" }).click();
	await page.getByRole("status").filter({ hasText: /^Connected, \w+ answers$/ }).waitFor();
	await ownRow(page, await page.locator("#backend").textContent(), /^0 \/ 1$/);
	assert.notEqual(await page.locator("#connection").textContent(), before, "the new connection has the old id");

	assert.deepEqual(trouble, [], "the browser reported trouble");
});

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
