// The official SDK for Node.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { BASE_URL, COLOURS, MODEL, PERSON, WEATHER } from "./server.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: "none", maxRetries: 0 });
const ask = (content, more = {}) => ({
  model: MODEL, temperature: 0, max_tokens: 32, messages: [{ role: "user", content }], ...more,
});
const tools = [{
  type: "function",
  function: {
    name: "get_weather",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
}];
const tool_choice = { type: "function", function: { name: "get_weather" } };

test("a stream says what the whole answer says", async () => {
  const whole = await client.chat.completions.create(ask(COLOURS));
  assert.match(whole.choices[0].message.content, /red/i);
  const stream = client.chat.completions.stream(
    ask(COLOURS, { stream_options: { include_usage: true } }));
  const folded = await stream.finalChatCompletion();
  assert.equal(folded.choices[0].message.content, whole.choices[0].message.content);
  assert.equal(folded.choices[0].finish_reason, whole.choices[0].finish_reason);
  assert.equal(folded.usage.completion_tokens, whole.usage.completion_tokens);
});

test("an answer is parsed into the schema", async () => {
  const schema = z.object({ name: z.string().max(20), age: z.number().int() });
  const response_format = zodResponseFormat(schema, "person");
  const answer = await client.chat.completions.parse(
    ask(PERSON, { response_format, max_tokens: 64 }));
  assert.deepEqual(schema.parse(answer.choices[0].message.parsed), answer.choices[0].message.parsed);
});

test("a named tool is called, streamed or not", async () => {
  const request = ask(WEATHER, { tools, tool_choice, max_tokens: 64 });
  const whole = await client.chat.completions.create(request);
  const folded = await client.chat.completions.stream(request).finalChatCompletion();
  for (const answer of [whole, folded]) {
    const [call] = answer.choices[0].message.tool_calls;
    assert.equal(call.function.name, "get_weather");
    assert.match(JSON.parse(call.function.arguments).city, /Paris/);
  }
});

test("models, embeddings and completions answer", async () => {
  const models = await client.models.list();
  assert.ok(models.data.some((model) => model.id === MODEL));
  // The SDK asks for base64 and decodes it.
  const embedding = await client.embeddings.create({ model: MODEL, input: ["a", "b"] });
  assert.equal(embedding.data.length, 2);
  assert.equal(typeof embedding.data[0].embedding[0], "number");
  const text = await client.completions.create(
    { model: MODEL, prompt: "def add(a, b):", max_tokens: 8, temperature: 0 });
  assert.ok(text.choices[0].text.length > 0);
});

test("errors have the classes that the SDK knows", async () => {
  await assert.rejects(client.chat.completions.create(ask("x", { temperature: 9 })), (error) =>
    error instanceof OpenAI.BadRequestError && error.param === "temperature" && !!error.requestID);
  await assert.rejects(client.chat.completions.create(ask("x", { model: "other" })), (error) =>
    error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
});
