// Vercel's AI SDK with its provider for servers like this one.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateObject, generateText, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { BASE_URL, COLOURS, MODEL, PERSON, WEATHER } from "./server.mjs";

const provider = createOpenAICompatible({
  name: "qwen", baseURL: BASE_URL, includeUsage: true, supportsStructuredOutputs: true,
});
const base = { model: provider(MODEL), temperature: 0, maxOutputTokens: 64, maxRetries: 0 };
const tools = {
  get_weather: tool({
    description: "Get the current weather of a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => `sunny in ${city}`,
  }),
};
const toolChoice = { type: "tool", toolName: "get_weather" };
const schema = z.object({ name: z.string().max(20), age: z.number().int() });

test("generateText and streamText agree", async () => {
  const whole = await generateText({ ...base, prompt: COLOURS });
  assert.match(whole.text, /red/i);
  assert.equal(whole.finishReason, "stop");
  const stream = streamText({ ...base, prompt: COLOURS });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, whole.text);
  assert.equal(await stream.finishReason, "stop");
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
});

test("a tool is called and its result comes back", async () => {
  const answer = await generateText({ ...base, tools, toolChoice, prompt: WEATHER });
  assert.equal(answer.finishReason, "tool-calls");
  assert.match(answer.toolCalls[0].input.city, /Paris/);
  assert.match(answer.toolResults[0].output, /^sunny in /);
  const next = await generateText({
    ...base, tools,
    messages: [{ role: "user", content: WEATHER }, ...answer.response.messages],
    toolChoice: "none",
  });
  assert.ok(next.text.length > 0);
});

test("arguments of a tool are streamed", async () => {
  const stream = streamText({ ...base, tools, toolChoice, prompt: WEATHER });
  const kinds = [];
  for await (const part of stream.fullStream) kinds.push(part.type);
  assert.ok(kinds.filter((kind) => kind === "tool-input-delta").length > 1, kinds.join());
  assert.ok(!kinds.includes("error"), kinds.join());
  assert.match((await stream.toolCalls)[0].input.city, /Paris/);
});

test("objects keep to their schema, streamed or not", async () => {
  const whole = await generateObject({ ...base, schema, prompt: PERSON });
  const stream = streamObject({ ...base, schema, prompt: PERSON });
  for await (const partial of stream.partialObjectStream) assert.equal(typeof partial, "object");
  assert.deepEqual(await stream.object, whole.object);
  const choice = await generateObject(
    { ...base, output: "enum", enum: ["yes", "no"], prompt: "Is water wet?" });
  assert.ok(["yes", "no"].includes(choice.object));
});

test("embedMany gives a vector for each text", async () => {
  const { embeddings } = await embedMany(
    { model: provider.textEmbeddingModel(MODEL), values: ["a", "b"], maxRetries: 0 });
  assert.equal(embeddings.length, 2);
  assert.equal(embeddings[0].length, embeddings[1].length);
});

test("a refusal says why", async () => {
  await assert.rejects(generateText({ ...base, temperature: 9, prompt: "x" }), (error) =>
    error.statusCode === 400 && error.message.includes("temperature"));
});
