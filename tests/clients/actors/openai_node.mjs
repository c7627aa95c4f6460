// openai-node. It is one client for synchronous and concurrent use.
import { createRequire } from "node:module";
import OpenAI from "openai";
import { serve } from "./protocol.mjs";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY, timeout: 60_000 });

// What the SDK has no name for is written among the other fields here; Python's has `extra_body` for it.
const flat = ({ extra_body = {}, ...ask }) => ({ ...ask, ...extra_body });
const counts = (usage) =>
  usage ? { prompt: usage.prompt_tokens, completion: usage.completion_tokens, total: usage.total_tokens } : null;
const tokens = (logprobs) =>
  logprobs?.content?.map((each) => ({
    token: each.token,
    logprob: each.logprob,
    bytes: each.bytes,
    top: each.top_logprobs.map((top) => ({ token: top.token, logprob: top.logprob })),
  })) ?? null;
const legacy = (choice) => ({
  index: choice.index,
  text: choice.text,
  finish: choice.finish_reason,
  logprobs: choice.logprobs ?? null,
});

function spoken(answer) {
  const choices = answer.choices.map((choice) => ({
    index: choice.index,
    role: choice.message.role,
    text: choice.message.content,
    finish: choice.finish_reason,
    logprobs: tokens(choice.logprobs),
  }));
  return { id: answer.id, model: answer.model, choices, usage: counts(answer.usage) };
}

async function pieces(ask) {
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...flat(ask), stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  return text;
}

await serve({
  version: () => createRequire(import.meta.url)("openai/package.json").version,

  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    return ids;
  },

  model: async (ask) => (await client.models.retrieve(ask.id)).id,

  chat: async (ask) => spoken(await client.chat.completions.create(flat(ask))),

  async chat_stream(ask) {
    const chunks = [];
    for await (const chunk of await client.chat.completions.create({ ...flat(ask), stream: true })) {
      const choices = chunk.choices.map((choice) => ({
        index: choice.index,
        role: choice.delta.role ?? null,
        text: choice.delta.content ?? null,
        finish: choice.finish_reason,
        logprobs: tokens(choice.logprobs),
      }));
      chunks.push({ id: chunk.id, created: chunk.created, model: chunk.model, choices, usage: counts(chunk.usage) });
    }
    return chunks;
  },

  // `.stream()`, which puts the whole answer together by itself and refuses chunks out of order.
  async chat_helper(ask) {
    const stream = client.chat.completions.stream(ask);
    const kinds = [];
    for (const kind of ["chunk", "content", "finalChatCompletion", "end"]) stream.on(kind, () => kinds.push(kind));
    return { whole: spoken(await stream.finalChatCompletion()), kinds };
  },

  async completion(ask) {
    const answer = await client.completions.create(flat(ask));
    return { choices: answer.choices.map(legacy), usage: counts(answer.usage) };
  },

  async completion_stream(ask) {
    const chunks = [];
    for await (const chunk of await client.completions.create({ ...ask, stream: true })) {
      chunks.push({ choices: chunk.choices.map(legacy), usage: counts(chunk.usage) });
    }
    return chunks;
  },

  // The newer route.
  async response(ask) {
    const answer = await client.responses.create(ask);
    const { input_tokens: prompt, output_tokens: completion, total_tokens: total } = answer.usage;
    return { text: answer.output_text, status: answer.status, usage: { prompt, completion, total } };
  },

  async response_stream(ask) {
    const stream = client.responses.stream(ask);
    const events = [];
    for await (const event of stream) events.push({ type: event.type, text: event.delta ?? null });
    return { events, text: (await stream.finalResponse()).output_text };
  },

  together: (ask) =>
    Promise.all(
      ask.asks.map(async (each, number) =>
        number % 2 ? pieces(each) : (await client.chat.completions.create(flat(each))).choices[0].message.content,
      ),
    ),

  async leave(ask) {
    // Leaving the loop aborts the request.
    for await (const chunk of await client.chat.completions.create({ ...flat(ask), stream: true })) {
      const text = chunk.choices[0]?.delta?.content;
      if (text) return text;
    }
    return null;
  },

  async impatient({ timeout, ...ask }) {
    return spoken(await client.chat.completions.create(flat(ask), { timeout: timeout * 1000, maxRetries: 0 }));
  },
});
