// Vercel's AI SDK with OpenAI's provider as it comes, which speaks Responses, and with Anthropic's.
import assert from "node:assert/strict";
import { createAnthropic } from "@ai-sdk/anthropic";
import { openai } from "@ai-sdk/openai";
import {
  APICallError, embedMany, experimental_generateSpeech as generateSpeech, experimental_transcribe as transcribe,
  generateImage, generateText, Output, stepCountIs, streamText, tool,
} from "ai";
import { z } from "zod";
import { joined, passed, question, text } from "./checks.mjs";

// This provider wants the version in its base URL, where Anthropic's own library adds it.
const anthropic = createAnthropic({ baseURL: `${process.env.ANTHROPIC_BASE_URL}/v1` });
const weather = tool({
  inputSchema: z.object({ location: z.string() }),
  execute: async ({ location }) => `Rain in ${location}`,
});
const told = "The tool says: Rain in Bern";

const models = [openai("gpt-5.4"), anthropic("claude-sonnet-5-5")].map((model) => ({
  model, prompt: question, maxRetries: 0,
}));

for (const asked of models) {
  const answer = await generateText(asked);
  assert.equal(answer.text, text);
  assert.equal(answer.finishReason, "stop");
  assert.deepEqual([answer.usage.inputTokens, answer.usage.outputTokens], [10, 20]);
}
passed("generateText");

for (const asked of models) {
  const stream = streamText(asked);
  assert.equal(await joined(stream.textStream, (piece) => piece), text);
  assert.equal((await stream.usage).outputTokens, 20);
}
passed("streamText");

for (const asked of models) {
  const withTools = { ...asked, tools: { weather }, stopWhen: stepCountIs(3) };
  const looped = await generateText(withTools);
  assert.deepEqual(looped.steps[0].toolCalls.map((call) => call.input), [{ location: "Bern" }]);
  assert.equal(looped.text, told);
  const streamed = streamText(withTools);
  await streamed.consumeStream();
  assert.equal(await streamed.text, told);
}
passed("tools");

for (const asked of models) {
  const output = Output.object({ schema: z.object({ name: z.string(), age: z.number().int() }) });
  assert.deepEqual((await generateText({ ...asked, output })).output, { name: "Ada", age: 36 });
}
passed("object");

const chat = await generateText({ model: openai.chat("gpt-5.4"), prompt: question, maxRetries: 0 });
assert.equal(chat.text, text);
passed("chat");

const { embeddings } = await embedMany({ model: openai.embedding("text-embedding-3-small"), values: ["a", "b"] });
assert.deepEqual(embeddings, [[0.25, -0.5], [0.25, -0.5]]);
passed("embedMany");

const { image } = await generateImage({ model: openai.image("gpt-image-1"), prompt: "A trace", maxRetries: 0 });
assert.equal(image.mediaType, "image/png");
passed("generateImage");

const { audio } = await generateSpeech({ model: openai.speech("tts-1"), text, maxRetries: 0 });
assert.equal(audio.uint8Array.length, 4 + 256 * 64);
passed("generateSpeech");

const heard = await transcribe({
  model: openai.transcription("whisper-1"), audio: Buffer.alloc(300_000, 7), maxRetries: 0,
});
assert.equal(heard.text, "I heard 300000 bytes.");
passed("transcribe");

const failing = async (model, status, retried) => {
  await assert.rejects(
    generateText({ model, prompt: question, maxRetries: 0 }),
    (error) => APICallError.isInstance(error) && error.statusCode === status && error.isRetryable === retried
      && error.message.length > 0,
  );
};
await failing(openai("nope"), 400, false);
await failing(openai("gpt-broken"), 502, true);
await failing(anthropic("nope"), 400, false);
await failing(anthropic("claude-broken"), 502, true);
passed("errors");
