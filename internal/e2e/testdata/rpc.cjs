// Runs the operations that the parent asks for, one JSON object a line, until it
// closes standard input.
'use strict';

const { createRequire } = require('node:module');
const path = require('node:path');
const readline = require('node:readline');

// The packages are installed beside the module's own test data.
exports.load = createRequire(path.join(__dirname, '../../../testdata/node/'));

exports.serve = (ops, end = () => process.exit(0)) => {
  const reply = (answer) => process.stdout.write(JSON.stringify(answer) + '\n');
  const lines = readline.createInterface({ input: process.stdin });
  lines.on('line', async (line) => {
    const { id, op, args } = JSON.parse(line);
    try {
      reply({ id, result: (await ops[op](args)) ?? null });
    } catch (error) {
      reply({ id, error: `${op}: ${error.message}` });
    }
  });
  lines.on('close', end);
};
