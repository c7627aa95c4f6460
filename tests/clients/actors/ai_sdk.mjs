// The AI SDK with @ai-sdk/openai-compatible, as web applications use it. It has names of its own for what is asked.
import { createRequire } from "node:module";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import { serve } from "./protocol.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const provider = createOpenAICompatible({
  name: "meshnode",
  baseURL: process.env.BASE_URL,
  apiKey: process.env.API_KEY,
  includeUsage: true,
});

const named = (ask, model) => ({
  model,
  maxRetries: 0,
  ...(ask.messages ? { messages: ask.messages } : { prompt: ask.prompt }),
  temperature: ask.temperature,
  topP: ask.top_p,
  maxOutputTokens: ask.max_tokens,
  stopSequences: typeof ask.stop === "string" ? [ask.stop] : ask.stop,
  seed: ask.seed,
  // What the SDK has no name for goes to the server as it is.
  providerOptions: { meshnode: ask.extra_body ?? {} },
});
const chatting = (ask) => named(ask, provider(ask.model));
const completing = (ask) => named(ask, provider.completionModel(ask.model));
const counts = (usage) => ({
  prompt: usage.inputTokens ?? null,
  completion: usage.outputTokens ?? null,
  total: usage.totalTokens ?? null,
});

async function whole(settings) {
  const answer = await generateText(settings);
  const choice = { index: 0, role: "assistant", text: answer.text, finish: answer.finishReason, logprobs: null };
  return { id: answer.response.id, model: answer.response.modelId, choices: [choice], usage: counts(answer.usage) };
}

// The SDK reports an error of a stream as a part of it; its users learn of it in onError.
async function streamed(settings) {
  let failure;
  const answer = streamText({ ...settings, onError: ({ error }) => (failure = error) });
  const chunks = [];
  for await (const part of answer.fullStream) {
    if (part.type === "text-delta") chunks.push({ choices: [{ index: 0, text: part.text, finish: null }], usage: null });
    if (part.type === "finish") {
      const last = { index: 0, text: null, finish: part.finishReason };
      chunks.push({ choices: [last], usage: counts(part.totalUsage) });
    }
  }
  if (failure) throw failure;
  return chunks;
}

await serve({
  version: () =>
    ["ai", "@ai-sdk/openai-compatible"].map((name) => createRequire(import.meta.url)(`${name}/package.json`).version),
  chat: (ask) => whole(chatting(ask)),
  chat_stream: (ask) => streamed(chatting(ask)),
  completion: (ask) => whole(completing(ask)),
  completion_stream: (ask) => streamed(completing(ask)),

  together: (ask) =>
    Promise.all(
      ask.asks.map(async (each, number) =>
        number % 2 ? await streamText(chatting(each)).text : (await generateText(chatting(each))).text,
      ),
    ),

  async leave(ask) {
    const going = new AbortController();
    const answer = streamText({ ...chatting(ask), abortSignal: going.signal });
    for await (const text of answer.textStream) {
      going.abort();
      return text;
    }
    return null;
  },
});
