// A client of one WebSocket at a time, by the API that browsers have. It runs in
// a page, and in Node.js on top of ws; there newSocket is replaced.
'use strict';

globalThis.newSocket = ({ url, protocols }) => new WebSocket(url, protocols);

// content makes the bytes of a message, as the Go side does.
globalThis.content = ({ kind, size, plain }) => {
  const bytes = new Uint8Array(size);
  if (plain) {
    const words = new TextEncoder().encode('hold fast, ');
    for (let i = 0; i < size; i++) bytes[i] = words[i % words.length];
    return bytes;
  }
  let state = 1;
  for (let i = 0; i < size; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) | 0;
    const high = state >>> 24;
    bytes[i] = kind === 'binary' ? high : 97 + (high % 26);
  }
  if (kind === 'text') {
    for (let i = 4; i + 3 <= size; i += 7) bytes.set([0xe2, 0x82, 0xac], i); // €
  }
  return bytes;
};

globalThis.client = (() => {
  let socket;
  let inbox; // messages that nobody has asked for yet …
  let waiting; // … or who asks for one
  let ended; // promise of how the connection ended

  async function received(data) {
    const kind = typeof data === 'string' ? 'text' : 'binary';
    const bytes = kind === 'text' ? new TextEncoder().encode(data) : new Uint8Array(data);
    const sum = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
    return { kind, size: bytes.length, sum: [...sum].map((b) => b.toString(16).padStart(2, '0')).join('') };
  }

  function open(args) {
    socket?.close(); // nothing, unless a test has failed
    inbox = [];
    waiting = undefined;
    socket = newSocket(args);
    socket.binaryType = 'arraybuffer';
    socket.onmessage = ({ data }) => {
      if (waiting) waiting.resolve(data);
      else inbox.push(data);
      waiting = undefined;
    };
    let failure = '';
    socket.onerror = ({ message }) => { failure = message ?? ''; }; // onclose follows
    return new Promise((resolve, reject) => {
      ended = new Promise((end) => {
        socket.onclose = ({ code, reason, wasClean }) => {
          const error = new Error(`closed with ${code} ${reason}: ${failure}`);
          reject(error);
          if (waiting) waiting.reject(error);
          end({ code, reason, clean: wasClean });
        };
      });
      socket.onopen = () => {
        resolve({ protocol: socket.protocol, extensions: socket.answered ?? socket.extensions });
      };
    });
  }

  async function next() {
    const data = inbox.length > 0 ? inbox.shift() : await new Promise((resolve, reject) => {
      waiting = { resolve, reject };
    });
    return received(data);
  }

  function echo(message) {
    const bytes = content(message);
    socket.send(message.kind === 'text' ? new TextDecoder().decode(bytes) : bytes);
    return next();
  }

  function close({ code, reason }) {
    if (code === 1005) socket.close();
    else socket.close(code, reason);
    return ended;
  }

  return { open, next, echo, close, closed: () => ended, socket: () => socket };
})();
