// What the programs share: how they report, and what the models answer.
import assert from "node:assert/strict";

export const text = "A trace is the path of one request.";
export const question = "What is a trace?";
export const parameters = {
  type: "object", properties: { location: { type: "string" } }, required: ["location"], additionalProperties: false,
};
export const messages = [{ role: "user", content: question }];

export const passed = (check) => console.log(JSON.stringify({ check }));

/** The text that an iterator of pieces makes, with a sign that it came in several. */
export async function joined(pieces, read) {
  const found = [];
  for await (const piece of pieces) {
    const part = read(piece);
    if (part) found.push(part);
  }
  assert.ok(found.length > 1, "the answer came in one piece");
  return found.join("");
}
