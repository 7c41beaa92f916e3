// A backend written with ws. What a connection does is in the request's path and
// query; /report tells, when a connection has ended, what the backend saw of it.
'use strict';

const http = require('node:http');
const { load, serve } = require('./rpc.cjs');
const { WebSocketServer } = load('ws');

const reports = new Map(); // by the number in ?case=, a promise and its resolve

function reportOf(query) {
  const key = query.get('case');
  if (!reports.has(key)) {
    const report = {};
    report.promise = new Promise((resolve) => { report.resolve = resolve; });
    reports.set(key, report);
  }
  return reports.get(key);
}

const queryOf = (request) => new URL(request.url, 'http://backend').searchParams;
const list = (value) => (value ? value.split(',').map((item) => item.trim()) : []);

const server = http.createServer(async (request, response) => {
  response.setHeader('Connection', 'close');
  response.end(JSON.stringify(await reportOf(queryOf(request)).promise));
});

const handleProtocols = (offered, request) => queryOf(request).get('protocol') ?? false;
const acceptors = {
  plain: new WebSocketServer({ noServer: true, handleProtocols, perMessageDeflate: false }),
  compress: new WebSocketServer({ noServer: true, handleProtocols, perMessageDeflate: true }),
};

server.on('upgrade', (request, socket, head) => {
  const acceptor = queryOf(request).has('compress') ? acceptors.compress : acceptors.plain;
  acceptor.handleUpgrade(request, socket, head, (ws) => run(ws, request));
});

function run(ws, request) {
  const query = queryOf(request);
  const report = {
    offered: list(request.headers['sec-websocket-protocol']),
    offer: request.headers['sec-websocket-extensions'] ?? '',
    protocol: ws.protocol,
    pings: [],
    pongs: [],
  };
  ws.on('ping', (data) => report.pings.push(data.toString()));
  ws.on('pong', (data) => report.pongs.push(data.toString()));
  ws.on('error', (error) => { report.error = error.message; });
  ws.on('close', (code, reason) => {
    reportOf(query).resolve({ ...report, code, reason: reason.toString() });
  });
  switch (new URL(request.url, 'http://backend').pathname) {
    case '/echo':
      ws.on('message', (data, binary) => ws.send(data, { binary }));
      break;
    case '/fragments':
      ws.on('message', (data, binary) => fragments(ws, data, binary, query.get('cuts').split(',')));
      break;
    case '/greet':
      ws.send('hello');
      if (query.has('code')) ws.close(Number(query.get('code')), query.get('reason'));
      break;
    case '/close':
      if (query.get('code') === '1005') ws.close();
      else ws.close(Number(query.get('code')), query.get('reason'));
      break;
  }
}

// fragments sends a message cut at the given places, with an answered ping after
// every fragment but the last.
async function fragments(ws, data, binary, cuts) {
  let from = 0;
  for (const cut of cuts.map(Number)) {
    ws.send(data.subarray(from, cut), { binary, fin: false });
    await new Promise((resolve) => {
      ws.once('pong', resolve);
      ws.ping(`backend at ${cut}`);
    });
    from = cut;
  }
  ws.send(data.subarray(from), { binary, fin: true });
}

const listening = new Promise((resolve) => { server.listen(0, '127.0.0.1', resolve); });
serve({
  address: async () => {
    await listening;
    return `127.0.0.1:${server.address().port}`;
  },
});
