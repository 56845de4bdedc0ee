// What all tests of this folder share: the server that QWEN_SERVER_URL names, and a tool.
import assert from "node:assert/strict";

const url = process.env.QWEN_SERVER_URL;
assert(url, "QWEN_SERVER_URL must name a running server");
export const BASE_URL = `${url}/v1`;
export const DASHSCOPE_URL = url;
export const MODEL = "qwen2.5-coder-0.5b-instruct";
export const COLOURS = "Name three primary colours, separated by commas.";
export const WEATHER = "What is the weather in Paris?";
export const PERSON = "Ada is 36 years old.";
