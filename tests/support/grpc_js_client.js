// Calls of @grpc/grpc-js, with messages as bytes: node grpc_js_client.js HOST:PORT, requests on stdin as JSON.
//
// Each request: {path, kind: "unary" | "stream", messages: [base64], deadline_ms?, cancel_ms?, compress?, times?}
// Each answer, in their order: {status, details, replies: [base64]}
'use strict';
const grpc = require('@grpc/grpc-js');

const identity = (bytes) => bytes;

function call(client, request) {
  const messages = request.messages.map((text) => Buffer.from(text, 'base64'));
  const options = request.deadline_ms ? { deadline: Date.now() + request.deadline_ms } : {};
  const replies = [];
  return new Promise((resolve) => {
    const done = (error) =>
      resolve({ status: error ? error.code : 0, details: error ? error.details : '', replies });
    let ongoing;
    if (request.kind === 'unary') {
      ongoing = client.makeUnaryRequest(request.path, identity, identity, messages[0], options, (error, reply) => {
        if (reply) replies.push(reply.toString('base64'));
        done(error);
      });
    } else {
      ongoing = client.makeBidiStreamRequest(request.path, identity, identity, options);
      ongoing.on('data', (reply) => replies.push(reply.toString('base64')));
      ongoing.on('error', done);
      ongoing.on('end', () => done(null));
      messages.forEach((message) => ongoing.write(message));
      ongoing.end();
    }
    if (request.cancel_ms) setTimeout(() => ongoing.cancel(), request.cancel_ms);
  });
}

async function main() {
  const requests = JSON.parse(require('fs').readFileSync(0, 'utf8'));
  const open = (options) =>
    new grpc.Client(process.argv[2], grpc.credentials.createInsecure(), { 'grpc.max_receive_message_length': -1, ...options });
  const plain = open({});
  const compressed = open({ 'grpc.default_compression_algorithm': grpc.compressionAlgorithms.gzip });
  const answers = [];
  for (const request of requests) {
    const client = request.compress ? compressed : plain;
    // Many at once, on one connection; all must be answered alike.
    const all = await Promise.all(Array.from({ length: request.times || 1 }, () => call(client, request)));
    answers.push(...all);
  }
  process.stdout.write(JSON.stringify(answers));
  plain.close();
  compressed.close();
}

main();
