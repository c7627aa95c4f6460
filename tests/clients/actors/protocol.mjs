// The JavaScript side of actor.py: reads asks, writes what was seen.
import { createInterface } from "node:readline";

export async function serve(deeds) {
  for await (const line of createInterface({ input: process.stdin })) {
    const asked = JSON.parse(line);
    let answer;
    try {
      answer = { saw: await deeds[asked.do](asked.ask) };
    } catch (error) {
      answer = { error: described(error) };
    }
    process.stdout.write(JSON.stringify(answer) + "\n");
  }
  process.exit(0);
}

// The classes by which a user would catch it, with what the libraries put on it. The AI SDK's users ask for its name.
function described(error) {
  const kinds = [error?.name];
  for (let kind = error?.constructor; kind?.name; kind = Object.getPrototypeOf(kind)) kinds.push(kind.name);
  return {
    kinds,
    status: error?.status ?? error?.statusCode ?? null,
    code: error?.code ?? error?.data?.error?.code ?? null,
    message: String(error?.message ?? error),
  };
}
