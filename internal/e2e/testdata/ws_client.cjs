// The client on top of ws.
'use strict';

const { load, serve } = require('./rpc.cjs');
const WebSocket = load('ws');
require('./client.js');

globalThis.newSocket = ({ url, protocols, compress }) => {
  const socket = new WebSocket(url, protocols, { perMessageDeflate: compress });
  // ws shows the names of extensions only, without their parameters.
  socket.on('upgrade', (response) => {
    socket.answered = response.headers['sec-websocket-extensions'] ?? '';
  });
  return socket;
};

// pong pings and waits for the answer, which is the very next pong.
function pong(socket, payload) {
  return new Promise((resolve, reject) => {
    socket.once('pong', (data) => {
      if (data.toString() === payload) resolve();
      else reject(new Error(`pong: got ${data}, want ${payload}`));
    });
    socket.once('close', () => reject(new Error(`closed before the pong to ${payload}`)));
    socket.ping(payload);
  });
}

// fragments sends a message cut at the given places. A ping follows every
// fragment but the last, and the next fragment is sent when it was answered.
async function fragments({ message, cuts }) {
  const socket = client.socket();
  const bytes = content(message);
  const binary = message.kind === 'binary';
  let from = 0;
  for (const cut of cuts) {
    socket.send(bytes.subarray(from, cut), { binary, fin: false });
    await pong(socket, `client at ${cut}`);
    from = cut;
  }
  socket.send(bytes.subarray(from), { binary, fin: true });
  return client.next();
}

serve({ ...client, fragments });
