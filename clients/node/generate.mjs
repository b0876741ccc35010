// Two turns of one session: streams text as it comes, then prints what each turn cost.
//
//   node generate.mjs PROMPT SECOND_QUESTION [--file PATH] [--address HOST:PORT]
//                     [--max-tokens N] [--keep-ratio R] [--timeout SECONDS]
//
// Everything is read from the .proto files of this repository; nothing is generated.
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

import { describeError } from "./errors.mjs";

const PROTOS = fileURLToPath(new URL("../../protos", import.meta.url));
const USAGE = "usage: node generate.mjs PROMPT SECOND_QUESTION [--file PATH] [--address HOST:PORT]"
  + " [--max-tokens N] [--keep-ratio R] [--timeout SECONDS]";

const { InferenceService, SessionService } = grpc.loadPackageDefinition(
  protoLoader.loadSync(["chunkserve/v1/inference.proto", "chunkserve/v1/session.proto"], {
    includeDirs: [PROTOS],
    keepCase: true,
    longs: Number,
    enums: String,
    defaults: true,
    oneofs: true,
  }),
).chunkserve.v1;

/** Reads the command line; throws an Error that says what is wrong with it. */
function readArguments() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      address: { type: "string", default: process.env.CHUNKSERVE_ADDRESS ?? "127.0.0.1:50051" },
      file: { type: "string" },
      "max-tokens": { type: "string", default: "64" },
      "keep-ratio": { type: "string" },
      timeout: { type: "string", default: "600" },
    },
  });
  if (positionals.length !== 2) throw new Error("give a prompt and a second question");
  const document = values.file === undefined ? "" : `${readFileSync(values.file, "utf8")}\n\n`;
  return {
    address: values.address,
    turns: [document + positionals[0], positionals[1]],
    maxTokens: number(values["max-tokens"], "--max-tokens"),
    timeoutMs: 1000 * number(values.timeout, "--timeout"),
    compression:
      values["keep-ratio"] === undefined
        ? undefined
        : { keep_ratio: number(values["keep-ratio"], "--keep-ratio") },
  };
}

function number(text, name) {
  const value = Number(text);
  if (text.trim() === "" || Number.isNaN(value)) throw new Error(`${name}: ${text} is no number`);
  return value;
}

/** Calls a method that has one answer. */
function call(client, method, request, timeoutMs) {
  return new Promise((resolve, reject) => {
    client[method](request, { deadline: Date.now() + timeoutMs }, (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

/** Streams one turn to stdout; returns its first and its last event. */
async function ask(client, request, timeoutMs) {
  const stream = client.Generate(request, { deadline: Date.now() + timeoutMs });
  const cancel = () => stream.cancel();
  process.once("SIGINT", cancel);
  let promptInfo;
  let finish;
  try {
    for await (const response of stream) {
      if (response.event === "prompt_info") promptInfo = response.prompt_info;
      if (response.event === "delta") process.stdout.write(response.delta.text);
      if (response.event === "finish") finish = response.finish;
    }
  } finally {
    process.off("SIGINT", cancel);
    if (promptInfo) process.stdout.write("\n");
  }
  if (!finish) throw new Error("the answer ended without its last event");
  return { promptInfo, finish };
}

function printStats({ promptInfo, finish }) {
  const mib = (bytes) => Number((bytes / 2 ** 20).toFixed(2));
  console.table({
    "prompt tokens": promptInfo.num_prompt_tokens,
    "  reused": promptInfo.num_reused_tokens,
    "  prefilled": promptInfo.num_prefilled_tokens,
    "  kept": promptInfo.num_kept_tokens,
    "full KV, MiB": mib(promptInfo.full_kv_bytes),
    "stored KV, MiB": mib(promptInfo.stored_bytes),
    "prefill, ms": Math.round(promptInfo.prefill_ms),
    "first token, ms": Math.round(finish.first_token_ms),
    "generated tokens": finish.num_generated_tokens,
    "ended by": finish.reason,
  });
}

async function main({ address, turns, maxTokens, timeoutMs, compression }) {
  const credentials = grpc.credentials.createInsecure();
  const sessions = new SessionService(address, credentials);
  const inference = new InferenceService(address, credentials);
  try {
    const { session } = await call(sessions, "CreateSession", { compression }, timeoutMs);
    for (const content of turns) {
      const request = {
        session_id: session.session_id,
        chat: { messages: [{ role: "user", content }] },
        sampling: { max_tokens: maxTokens },
      };
      printStats(await ask(inference, request, timeoutMs));
    }
    await call(sessions, "DeleteSession", { session_id: session.session_id }, timeoutMs);
  } finally {
    sessions.close();
    inference.close();
  }
}

let args;
try {
  args = readArguments();
} catch (error) {
  console.error(`error: ${error.message}\n${USAGE}`);
  process.exit(2);
}
try {
  await main(args);
} catch (error) {
  const isInterrupt = error.code === grpc.status.CANCELLED && error.details === "Cancelled on client";
  if (!isInterrupt) console.error(`error: ${describeError(error)}`);
  process.exitCode = isInterrupt ? 130 : 1;
}
