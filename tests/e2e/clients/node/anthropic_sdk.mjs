// Anthropic's library for JavaScript, in front of a real LiteLLM.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { joined, messages, parameters, passed, text } from "./checks.mjs";

const model = "claude-sonnet-5-5";
const client = new Anthropic({ maxRetries: 0 });
const asked = { model, max_tokens: 1_000, messages };
const tools = [{ name: "get_weather", input_schema: parameters }];

const message = await client.messages.create(asked);
assert.deepEqual(message.content.map((block) => block.text), [text]);
assert.equal(message.stop_reason, "end_turn");
assert.deepEqual([message.usage.input_tokens, message.usage.output_tokens], [10, 20]);
assert.match(message._request_id, /^[0-9a-f]{32}$/);
passed("messages");

const names = [];
for await (const event of await client.messages.create({ ...asked, stream: true })) names.push(event.type);
assert.equal(names[0], "message_start");
assert.equal(names.at(-1), "message_stop");
const pieces = await client.messages.create({ ...asked, stream: true });
assert.equal(await joined(pieces, (event) => event.delta?.text), text);
assert.equal(await client.messages.stream(asked).finalText(), text);
passed("messages stream");

const called = await client.messages.create({ ...asked, tools });
assert.equal(called.stop_reason, "tool_use");
const use = called.content.find((block) => block.type === "tool_use");
assert.deepEqual(use.input, { location: "Bern" });
const streamed = await client.messages.stream({ ...asked, tools }).finalMessage();
assert.deepEqual(streamed.content.find((block) => block.type === "tool_use").input, { location: "Bern" });
const result = { type: "tool_result", tool_use_id: use.id, content: "21 degrees" };
const told = await client.messages.create({
  ...asked, tools,
  messages: [...messages, { role: "assistant", content: called.content }, { role: "user", content: [result] }],
});
assert.equal(told.content[0].text, "The tool says: 21 degrees");
passed("tools");

const thinking = { type: "enabled", budget_tokens: 1_024 };
const thought = await client.messages.stream({ ...asked, max_tokens: 2_000, thinking }).finalMessage();
assert.deepEqual(thought.content.map((block) => block.type), ["thinking", "text"]);
assert.ok(thought.content[0].signature);
passed("thinking");

const cached = await client.messages.create({
  ...asked, system: [{ type: "text", text: "Be short.", cache_control: { type: "ephemeral" } }],
});
assert.ok(cached.usage.cache_read_input_tokens > 0);
passed("prompt caching");

const counted = await client.messages.countTokens({ model, messages });
assert.ok(counted.input_tokens > 0);
passed("countTokens");

const failing = async (call, kind, status, type) => {
  await assert.rejects(call, (error) =>
    error instanceof kind && error.status === status && error.type === type && /^[0-9a-f]{32}$/.test(error.requestID));
};
await failing(client.messages.create({ ...asked, model: "nope" }), Anthropic.BadRequestError, 400, "invalid_request_error");
await failing(client.messages.create({ ...asked, model: "claude-broken" }), Anthropic.InternalServerError, 502, "api_error");
await failing(client.messages.create({ ...asked, model: "nope", stream: true }), Anthropic.BadRequestError, 400, "invalid_request_error");
await failing(
  new Anthropic({ apiKey: "wrong", maxRetries: 0 }).messages.create(asked),
  Anthropic.AuthenticationError, 401, "authentication_error",
);
passed("errors");
