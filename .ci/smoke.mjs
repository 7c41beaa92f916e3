// Proves that a Caddy binary proxies WebSockets with the plugin in it:
//
//   node .ci/smoke.mjs path/to/caddy
//
// ws (from testdata/node) is the client and the backend, so that neither end
// is our own code.

import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { once } from 'node:events';
import { createRequire } from 'node:module';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

const { WebSocket, WebSocketServer } = createRequire(
	new URL('../testdata/node/package.json', import.meta.url),
)('ws');

const host = '127.0.0.1';
const deadline = AbortSignal.timeout(60_000);

// Free ports, all held until all are known, so that they differ.
async function freePorts(n) {
	const servers = Array.from({ length: n }, () => createServer().listen(0, host));
	await Promise.all(servers.map((s) => once(s, 'listening')));
	const ports = servers.map((s) => s.address().port);
	await Promise.all(servers.map((s) => new Promise((done) => s.close(done))));
	return ports;
}

async function echo(url, message) {
	const client = new WebSocket(url);
	client.on('error', () => {}); // once passes on what matters
	try {
		await once(client, 'open', { signal: deadline });
		client.send(message);
		const [data, binary] = await once(client, 'message', { signal: deadline });
		if (binary !== Buffer.isBuffer(message) || !data.equals(Buffer.from(message))) {
			throw new Error(`got another message back than the one of ${message.length} bytes`);
		}
		client.close(1000, 'done');
		const [code] = await once(client, 'close', { signal: deadline });
		if (code !== 1000) throw new Error(`got close code ${code}, want 1000`);
	} finally {
		client.terminate();
	}
}

const backend = new WebSocketServer({ host, port: 0 });
backend.on('connection', (ws) => ws.on('message', (data, isBinary) => ws.send(data, { binary: isBinary })));
await once(backend, 'listening');

const [admin, site] = await freePorts(2);
const dir = mkdtempSync(join(tmpdir(), 'holdfast-smoke-'));
const config = join(dir, 'Caddyfile');
writeFileSync(config, `{
	admin ${host}:${admin}
	persist_config off
}
http://${host}:${site} {
	websocket_proxy ${host}:${backend.address().port}
}
`);

let log = '';
let exited = false;
const caddy = spawn(resolve(process.argv[2]), ['run', '--config', config], {
	env: { ...process.env, HOME: dir, XDG_CONFIG_HOME: dir, XDG_DATA_HOME: dir },
	stdio: ['ignore', 'pipe', 'pipe'],
});
caddy.stdout.on('data', (data) => (log += data));
caddy.stderr.on('data', (data) => (log += data));
caddy.on('exit', () => (exited = true));
caddy.on('error', (err) => { // not even started
	exited = true;
	log += `${err.message}\n`;
});

try {
	const url = `ws://${host}:${site}/`;
	for (;;) {
		if (exited) throw new Error('Caddy ended instead of serving');
		try {
			await echo(url, 'hello');
			break;
		} catch (err) {
			if (err.code !== 'ECONNREFUSED') throw err;
			await sleep(50, undefined, { signal: deadline }); // still starting
		}
	}
	await echo(url, Buffer.alloc(1 << 20, 'x'));

	const exit = once(caddy, 'exit', { signal: deadline });
	caddy.kill('SIGTERM');
	const [code] = await exit;
	if (code !== 0) throw new Error(`Caddy exited with status ${code}, want 0`);
	console.log('smoke: a text and a binary message came back through websocket_proxy');
} catch (err) {
	console.error(`${log}smoke: ${err.stack}`);
	process.exitCode = 1;
} finally {
	if (!exited) caddy.kill('SIGKILL');
	for (const ws of backend.clients) ws.terminate();
	backend.close();
	rmSync(dir, { recursive: true, force: true });
}
