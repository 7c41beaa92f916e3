// A backend for the end-to-end tests, a process of its own, written with ws. Command
// line, behaviour and record are those of internal/e2e/backend, as far as it has them:
//
//	node backend.mjs -listen 127.0.0.1:21000 -name a -record a.jsonl -term-code 1001
//
// and echo=1 and stream=<bytes per second> in a request's query. ws answers pings. With
// "-compress true" it agrees to permessage-deflate, and with "-window-bits 9" it answers
// with server_max_window_bits, asked or not, and keeps to it.
import fs from 'node:fs';
import http from 'node:http';
import { WebSocketServer } from 'ws';

const closeTimeout = 5000; // after SIGTERM, for the peers' close frames
const streamInterval = 20;

const flags = { listen: '127.0.0.1:0', name: 'backend', record: '/dev/null', 'term-code': '1012', compress: 'false', 'window-bits': '0' };
for (let i = 2; i < process.argv.length; i += 2) {
  const name = process.argv[i].replace(/^-/, '');
  if (!(name in flags) || i + 1 === process.argv.length) throw new Error(`bad argument ${process.argv[i]}`);
  flags[name] = process.argv[i + 1];
}

// Writes are synchronous, one a line: a process that is killed has recorded all that
// it has done.
const file = fs.openSync(flags.record, 'a+');
function record(line) {
  const time = BigInt(Math.round((performance.timeOrigin + performance.now()) * 1000)) * 1000n;
  // A nanosecond count is more than a JavaScript number holds.
  const { event, ...more } = line;
  fs.writeSync(file, `{"time":${time},${JSON.stringify({ event, pid: process.pid, ...more }).slice(1)}\n`);
}

const size = fs.fstatSync(file).size;
if (size > 0) { // a line that was cut short by a kill stays one of its own
  const end = Buffer.alloc(1);
  fs.readSync(file, end, 0, 1, size - 1);
  if (end[0] !== 10) fs.writeSync(file, '\n');
}
record({ event: 'start' });

let last = 0; // number of the latest connection
let stopping = false;
const open = new Set();

const server = http.createServer((request, response) => response.writeHead(426).end());
const bits = Number(flags['window-bits']);
const perMessageDeflate = flags.compress === 'true' && { threshold: 0, ...(bits > 0 && { serverMaxWindowBits: bits }) };
const acceptor = new WebSocketServer({ server, perMessageDeflate, maxPayload: 0 });

acceptor.on('connection', (ws, request) => {
  const query = new URL(request.url, 'http://backend').searchParams;
  const about = { seq: ++last, conn: request.headers['holdfast-connection'] };
  record({ event: 'open', ...about, resume: request.headers['holdfast-resume'] });
  open.add(ws);
  ws.on('error', (error) => console.error(error.message));
  ws.on('message', (data, binary) => {
    if (binary) record({ event: 'binary', ...about, binary: data.toString('base64') });
    else record({ event: 'text', ...about, text: data.toString() });
    if (query.has('echo')) ws.send(data, { binary });
  });
  const rate = Number(query.get('stream') ?? 0);
  const timer = rate > 0 ? stream(ws, `${flags.name} ${about.seq}`, rate) : undefined;
  ws.on('close', (code) => {
    clearInterval(timer);
    record({ event: 'closed', ...about, code });
    open.delete(ws);
    exitIfDone();
  });
  if (stopping) goodbye(ws);
});

// stream sends messages "<backend> <seq> <n>", n from 0, filled up with dots to what
// the rate asks for by then. While the peer does not read, none is made.
function stream(ws, prefix, rate) {
  const began = performance.now();
  let sent = 0;
  let n = 0;
  return setInterval(() => {
    if (ws.bufferedAmount > 1 << 20) return;
    const due = Math.floor((rate * (performance.now() - began)) / 1000) - sent;
    const text = `${prefix} ${n}`;
    if (due < text.length || ws.readyState !== ws.OPEN) return;
    ws.send(text.padEnd(due, '.'));
    sent += due;
    n++;
  }, streamInterval);
}

// ws goes on emitting messages until the peer's close frame has come.
const goodbye = (ws) => ws.close(Number(flags['term-code']), `backend ${flags.name} is stopping`);

function exitIfDone() {
  if (stopping && open.size === 0) process.exit(0);
}

process.on('SIGTERM', () => {
  stopping = true;
  server.close();
  open.forEach(goodbye);
  setTimeout(() => process.exit(0), closeTimeout);
  exitIfDone();
});

// It does not outlive who started it.
process.stdin.on('end', () => process.exit(1)).resume();

const [, host, port] = /^(.*):(\d+)$/.exec(flags.listen);
server.listen(Number(port), host, () => console.log(`${host}:${server.address().port}`));
