// The client in a page of Chromium, whose path is the first argument; more arguments are
// for Chromium.
'use strict';

const path = require('node:path');
const { load, serve } = require('./rpc.cjs');
const { chromium } = load('playwright-core');

async function main() {
  const browser = await chromium.launch({
    executablePath: process.argv[2],
    args: [
      '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
      '--disable-background-networking', '--disable-component-update', '--disable-sync',
      ...process.argv.slice(3),
    ],
  });
  const page = await browser.newPage();
  await page.addInitScript({ path: path.join(__dirname, 'client.js') });

  // The answer is the certificate of the page, null without TLS.
  const ops = { visit: async ({ url }) => (await page.goto(url)).securityDetails() };
  for (const op of ['open', 'next', 'echo', 'close', 'closed']) {
    ops[op] = (args) => page.evaluate(([name, given]) => client[name](given), [op, args]);
  }
  serve(ops, async () => {
    await browser.close();
    process.exit(0);
  });
}

main();
