// OpenAI's own library for JavaScript, with nothing changed but base URL and key.
import assert from "node:assert/strict";
import OpenAI from "openai";

const messages = [{ role: "user", content: "What is a trace?" }];
const text = "A trace is the path of one request.";
const tools = [{
  type: "function",
  function: { name: "get_weather", parameters: { type: "object", properties: { location: { type: "string" } } } },
}];
const schema = { type: "json_schema", json_schema: { name: "person", schema: { type: "object" } } };
const client = new OpenAI({ maxRetries: 0 });
const passed = (check) => console.log(JSON.stringify({ check }));
const ask = (options) => client.chat.completions.create({ model: "demo", messages, ...options });

const answer = await ask({});
assert.equal(answer.choices[0].message.content, text);
assert.equal(answer.usage.total_tokens, 30);
assert.match(answer._request_id, /^[0-9a-f]{32}$/);
passed("chat");

let read = "";
for await (const piece of await ask({ stream: true })) read += piece.choices[0].delta.content ?? "";
assert.equal(read, text);
passed("stream");

const called = await ask({ tools });
assert.deepEqual(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments), { location: "Bern" });
const streamed = await client.chat.completions.stream({ model: "demo", messages, tools }).finalChatCompletion();
assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, '{"location": "Bern"}');
passed("tools");

const person = await ask({ response_format: schema });
assert.deepEqual(JSON.parse(person.choices[0].message.content), { name: "Ada", age: 36 });
passed("schema");

const vectors = await client.embeddings.create({
  model: "text-embedding-demo", input: ["a", "b"], encoding_format: "float",
});
assert.deepEqual(vectors.data.map((entry) => entry.embedding), [[0.25, -0.5], [0.25, -0.5]]);
passed("embeddings");

const names = [];
for await (const model of client.models.list()) names.push(model.id);
assert.ok(names.includes("demo"));
assert.equal((await client.models.retrieve("demo")).id, "demo");
passed("models");

const failing = async (call, kind, type) => {
  await assert.rejects(call, (error) => error instanceof kind && error.type === type && !!error.requestID);
  passed(kind.name);
};
await failing(ask({ model: "nope" }), OpenAI.BadRequestError, "BadRequestError");
await failing(ask({ model: "broken" }), OpenAI.InternalServerError, "UpstreamError");
await failing(ask({ model: "busy-once" }), OpenAI.RateLimitError, "RateLimitError");
await failing(ask({ messages: [] }), OpenAI.UnprocessableEntityError, "ValidationError");
await failing(client.models.retrieve("nope"), OpenAI.NotFoundError, "NotFoundError");
await failing(
  new OpenAI({ apiKey: "wrong", maxRetries: 0 }).models.list(), OpenAI.AuthenticationError, "AuthenticationError",
);

const started = performance.now();
const again = [{ role: "user", content: "Again, please." }];
await new OpenAI({ maxRetries: 1 }).chat.completions.create({ model: "busy-once", messages: again });
assert.ok(performance.now() - started >= 990, "Retry-After was not obeyed");
passed("Retry-After");

let half = "";
await assert.rejects(async () => {
  for await (const piece of await ask({ model: "breaks-off", stream: true })) half += piece.choices[0].delta.content;
}, (error) => error instanceof OpenAI.APIError && error.type === "UpstreamError");
assert.equal(half, "Half an ");
passed("error within a stream");
