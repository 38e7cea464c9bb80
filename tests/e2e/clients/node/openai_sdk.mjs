// OpenAI's library for JavaScript on each of its routes, in front of a real LiteLLM.
import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";
import { joined, messages, parameters, passed, question, text } from "./checks.mjs";

const model = "gpt-5.4";
const client = new OpenAI({ maxRetries: 0 });

// ---- Responses -----------------------------------------------------------------------------------------

const response = await client.responses.create({ model, input: question });
assert.equal(response.output_text, text);
assert.equal(response.status, "completed");
assert.equal(response.usage.total_tokens, 30);
assert.match(response._request_id, /^[0-9a-f]{32}$/);
passed("responses");

const events = [];
for await (const event of await client.responses.create({ model, input: question, stream: true })) events.push(event);
assert.deepEqual(events.map((event) => event.sequence_number), events.map((_, index) => index));
assert.equal(events[0].type, "response.created");
assert.equal(events.at(-1).type, "response.completed");
const deltas = events.filter((event) => event.type === "response.output_text.delta");
assert.ok(deltas.length > 1);
assert.equal(deltas.map((event) => event.delta).join(""), text);
assert.equal((await client.responses.stream({ model, input: question }).finalResponse()).output_text, text);
passed("responses stream");

const tools = [{ type: "function", name: "get_weather", parameters, strict: true }];
const called = await client.responses.create({ model, input: question, tools });
const call = called.output.find((item) => item.type === "function_call");
assert.deepEqual(JSON.parse(call.arguments), { location: "Bern" });
const output = { type: "function_call_output", call_id: call.call_id, output: "21 degrees" };
const told = await client.responses.create({ model, input: [output], tools, previous_response_id: called.id });
assert.equal(told.output_text, "The tool says: 21 degrees");
const streamedCall = await client.responses.stream({ model, input: question, tools }).finalResponse();
assert.deepEqual(JSON.parse(streamedCall.output.at(-1).arguments), { location: "Bern" });
passed("responses tools");

const person = {
  type: "json_schema", name: "person", strict: true, schema: {
    type: "object", properties: { name: { type: "string" }, age: { type: "integer" } },
    required: ["name", "age"], additionalProperties: false,
  },
};
const parsed = await client.responses.parse({ model, input: question, text: { format: person } });
assert.deepEqual(parsed.output_parsed, { name: "Ada", age: 36 });
passed("responses schema");

const thought = await client.responses.create({ model, input: question, reasoning: { effort: "low", summary: "auto" } });
assert.equal(thought.output[0].type, "reasoning");
assert.equal(thought.usage.output_tokens_details.reasoning_tokens, 5);
passed("responses reasoning");

const kept = await client.responses.retrieve(response.id);
assert.equal(kept.output_text ?? kept.output[0].content[0].text, text);
await client.responses.delete(response.id);
await assert.rejects(client.responses.retrieve(response.id), OpenAI.NotFoundError);
passed("responses kept");

// ---- Chat completions ----------------------------------------------------------------------------------

const chat = await client.chat.completions.create({ model, messages });
assert.equal(chat.choices[0].message.content, text);
assert.equal(chat.usage.total_tokens, 30);
passed("chat");

const pieces = await client.chat.completions.create({ model, messages, stream: true });
assert.equal(await joined(pieces, (piece) => piece.choices[0]?.delta.content), text);
passed("chat stream");

const functions = [{ type: "function", function: { name: "get_weather", parameters } }];
const first = await client.chat.completions.create({ model, messages, tools: functions });
assert.deepEqual(JSON.parse(first.choices[0].message.tool_calls[0].function.arguments), { location: "Bern" });
const runner = client.chat.completions.runTools({
  model, messages, stream: true, tools: [{
    type: "function", function: {
      name: "get_weather", parameters, parse: JSON.parse, function: ({ location }) => `Rain in ${location}`,
    },
  }],
});
assert.equal(await runner.finalContent(), "The tool says: Rain in Bern");
passed("chat tools");

// ---- The other routes ----------------------------------------------------------------------------------

const legacy = { model: "gpt-3.5-turbo-instruct", prompt: question };
assert.equal((await client.completions.create(legacy)).choices[0].text, text);
passed("completions");
const words = await client.completions.create({ ...legacy, stream: true });
assert.equal(await joined(words, (piece) => piece.choices[0]?.text), text);
passed("completions stream");

const embedded = await client.embeddings.create({ model: "text-embedding-3-small", input: ["a", "b"] });
assert.deepEqual(embedded.data.map((entry) => [...entry.embedding]), [[0.25, -0.5], [0.25, -0.5]]);
passed("embeddings");

const judged = await client.moderations.create({ model: "omni-moderation-latest", input: ["hello", "kill them"] });
assert.deepEqual(judged.results.map((result) => result.flagged), [false, true]);
passed("moderations");

const image = await client.images.generate({ model: "gpt-image-1", prompt: "A trace" });
const png = Buffer.from(image.data[0].b64_json, "base64");
assert.deepEqual([...png.subarray(0, 4)], [0x89, 0x50, 0x4e, 0x47]);
passed("images");

const speech = await client.audio.speech.create({ model: "tts-1", voice: "alloy", input: text });
assert.match(speech.headers.get("content-type"), /^audio\//);
const sound = Buffer.from(await speech.arrayBuffer());
assert.equal(sound.subarray(0, 3).toString(), "ID3");
assert.equal(sound.length, 4 + 256 * 64);
passed("speech");

const file = await toFile(Buffer.alloc(300_000, 7), "sound.mp3");
const heard = await client.audio.transcriptions.create({ model: "whisper-1", file });
assert.equal(heard.text, "I heard 300000 bytes.");
passed("transcriptions");

const names = [];
for await (const found of client.models.list()) names.push(found.id);
assert.ok(names.includes(model));
passed("models");

// ---- Errors --------------------------------------------------------------------------------------------

const failing = async (call, kind, status) => {
  await assert.rejects(call, (error) => error instanceof kind && error.status === status && !!error.requestID);
};
await failing(client.responses.create({ model: "nope", input: question }), OpenAI.BadRequestError, 400);
await failing(client.responses.create({ model: "nope", input: question, stream: true }), OpenAI.BadRequestError, 400);
await failing(client.responses.create({ model: "gpt-broken", input: question }), OpenAI.InternalServerError, 502);
await failing(client.responses.create({ model: "gpt-busy", input: question }), OpenAI.RateLimitError, 429);
await failing(client.images.generate({ model: "nope", prompt: "A trace" }), OpenAI.BadRequestError, 400);
await failing(
  new OpenAI({ apiKey: "wrong", maxRetries: 0 }).responses.create({ model, input: question }),
  OpenAI.AuthenticationError, 401,
);
passed("errors");
