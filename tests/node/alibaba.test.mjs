// Vercel's AI SDK with its provider for DashScope, with nothing but the base URL changed.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createAlibaba } from "@ai-sdk/alibaba";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { COLOURS, DASHSCOPE_URL, PERSON, WEATHER } from "./server.mjs";

const provider = createAlibaba({ baseURL: `${DASHSCOPE_URL}/compatible-mode/v1`, apiKey: "none" });
const base = { model: provider("qwen-plus"), temperature: 0, maxOutputTokens: 64, maxRetries: 0 };
const tools = {
  get_weather: tool({
    description: "Get the current weather of a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => `sunny in ${city}`,
  }),
};
const toolChoice = { type: "tool", toolName: "get_weather" };

test("generateText and streamText agree", async () => {
  const whole = await generateText({ ...base, prompt: COLOURS });
  assert.match(whole.text, /red/i);
  assert.equal(whole.finishReason, "stop");
  assert.equal(whole.response.modelId, "qwen-plus");
  assert.equal(whole.response.headers["x-served-model"], "qwen2.5-coder-0.5b-instruct");
  const stream = streamText({ ...base, prompt: COLOURS });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, whole.text);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
});

test("a tool is called, streamed or not, and its result comes back", async () => {
  const answer = await generateText({ ...base, tools, toolChoice, prompt: WEATHER });
  assert.match(answer.toolCalls[0].input.city, /Paris/);
  assert.match(answer.toolResults[0].output, /^sunny in /);
  const stream = streamText({ ...base, tools, toolChoice, prompt: WEATHER });
  const kinds = [];
  for await (const part of stream.fullStream) kinds.push(part.type);
  assert.ok(!kinds.includes("error"), kinds.join());
  assert.match((await stream.toolCalls)[0].input.city, /Paris/);
});

test("an agent takes twenty steps without trying one again", async () => {
  const answer = await generateText({
    ...base, tools, toolChoice, prompt: WEATHER, stopWhen: stepCountIs(20),
    providerOptions: { alibaba: { parallelToolCalls: false } },
  });
  assert.equal(answer.steps.length, 20);
  assert.ok(answer.steps.every((step) => step.toolResults.length === 1));
});

test("objects keep to their schema, and options of DashScope are taken", async () => {
  const schema = z.object({ name: z.string().max(20), age: z.number().int() });
  const answer = await generateObject({
    ...base, schema, prompt: PERSON, topK: 20,
    providerOptions: { alibaba: { enableThinking: false, thinkingBudget: 16 } },
  });
  assert.deepEqual(answer.object, { name: "Ada", age: 36 });
});

test("a marked prefix is kept", async () => {
  const rules = Array.from({ length: 90 }, (_, index) => `Rule ${index}: be kind.`).join(" ");
  const cached = { providerOptions: { alibaba: { cacheControl: { type: "ephemeral" } } } };
  const messages = [{ role: "system", content: rules, ...cached }, { role: "user", content: "Hi" }];
  await generateText({ ...base, messages });
  const { usage } = await generateText({ ...base, messages });
  assert.ok(usage.inputTokenDetails.cacheReadTokens > 400, JSON.stringify(usage));
});

test("a refusal says why", async () => {
  await assert.rejects(generateText({ ...base, topP: 9, prompt: "x" }), (error) =>
    error.statusCode === 400 && error.message.includes("top_p"));
  const unknown = { ...base, model: provider("nobody"), prompt: "x" };
  await assert.rejects(generateText(unknown), (error) =>
    error.statusCode === 404 && error.message.includes("nobody"));
});
