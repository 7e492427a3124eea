// A chat with Node: only what is typed is sent.     npm install && node chat.js [HOST:PORT]
const { randomUUID } = require('node:crypto');
const path = require('node:path');
const readline = require('node:readline');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const proto = path.join(__dirname, '../../../rpc/continuo.proto'); // it imports nothing: take a copy with you
const definition = loader.loadSync(proto, { longs: Number, enums: String, defaults: true, oneofs: true });
const { Conversations } = grpc.loadPackageDefinition(definition).continuo.v1;

const client = new Conversations(process.argv[2] ?? 'localhost:50051', grpc.credentials.createInsecure());
const stream = client.converse();
let turnIsOver = () => {};

stream.on('data', ({ event, [event]: body }) => {
  if (event === 'opened') console.log(`${body.conversationId}, ${body.contextLeft} tokens left`);
  if (event === 'delta') process.stdout.write(body.text);
  if (event === 'turnDone') {
    console.log(`\n[${body.usage.cachedDeviceTokens} of ${body.usage.promptTokens} tokens were in memory]`);
  }
  if (event === 'turnFailed') console.log(`[${body.error.message}]`);
  if (event === 'error') console.log(`[${body.message}]`);
  if (['turnDone', 'turnFailed', 'error'].includes(event)) turnIsOver();
});
stream.on('error', ({ code, details }) => {
  console.error(`${grpc.status[code]}: ${details}`);
  process.exit(1);
});

async function main() {
  stream.write({ open: { system: 'Be brief.', sampling: { temperature: 0.7 } } });
  for await (const text of readline.createInterface({ input: process.stdin })) {
    stream.write({ turn: { turnId: randomUUID(), text } });
    await new Promise((resolve) => (turnIsOver = resolve));
  }
  stream.end(); // the conversation is kept: { resume: { conversationId } } goes on with it
}

main();
