"""Requests that this endpoint and llama.cpp's own server are both given, and where they may answer differently.

What is not in `AGREED` must be the same in every aspect of `answers.Seen`; what is there must differ in exactly the
aspects that it names, so that neither side changes unnoticed.
"""

from __future__ import annotations

from typing import Any, Final

from meshnode.demo import UNICODE_QUESTION
from tests.clients.contract import MODEL_ID, TOO_LONG

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
USAGE: Final = {"stream_options": {"include_usage": True}}
QUESTION: Final = {"role": "user", "content": "What is a stage?"}
WRITTEN: Final = "<|user|>What is a stage?<|end|><|assistant|>"

Request = tuple[str, dict[str, Any] | bytes]


def chat(*messages: Any, **more: Any) -> Request:
    return CHAT, {"model": MODEL_ID, "messages": list(messages) or [QUESTION], "temperature": 0, **more}


def complete(prompt: Any = "A stage is", **more: Any) -> Request:
    return COMPLETIONS, {"model": MODEL_ID, "prompt": prompt, "temperature": 0, "max_tokens": 8, **more}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


ANSWERED: Final[dict[str, Request]] = {
    "chat": chat(),
    "chat, max_tokens": chat(max_tokens=5),
    "chat, max_completion_tokens": chat(max_completion_tokens=5),
    "chat, max_tokens -1": chat(max_tokens=-1),
    "chat, stop": chat(stop="runs"),
    "chat, stop list": chat(stop=["no such text", "runs"]),
    "chat, stop within a token": chat(stop="proc"),
    "chat, nulls": chat(stop=None, max_tokens=None, n=None, seed=None, stream=None),
    "chat, unknown field": chat(no_such_field=1, max_tokens=2),
    "chat, a seed beyond 64 bits": chat(seed=2**70, max_tokens=4),
    "chat, a seed below -1": chat(seed=-5, max_tokens=4),
    "chat, penalties": chat(frequency_penalty=1.5, presence_penalty=1.5, max_tokens=20),
    "chat, repeat_penalty": chat(repeat_penalty=1.8, repeat_last_n=64, max_tokens=20),
    "chat, top_k 1 at a high temperature": chat(top_k=1, temperature=1.5),
    "chat, logit_bias": chat(logit_bias={"37": -100}, max_tokens=6),
    "chat, logit_bias as a list": chat(logit_bias=[[37, -100]], max_tokens=6),
    "chat, a forbidden token": chat(logit_bias=[[37, False]], max_tokens=6),
    "chat, top_p 0": chat(top_p=0, temperature=1),
    "chat, characters of several tokens": chat(user(UNICODE_QUESTION)),
    "chat, ignore_eos": chat(ignore_eos=True, max_tokens=60),
    "chat, stream_options without stream": chat(**USAGE, max_tokens=4),
    "chat, no tools": chat(tools=[]),
    "chat, response_format text": chat(response_format={"type": "text"}),
    "chat, n 2": chat(n=2, max_tokens=5),
    "chat, logprobs": chat(logprobs=True, top_logprobs=3),
    "chat, system": chat({"role": "system", "content": "Be brief."}, QUESTION),
    "chat, developer": chat({"role": "developer", "content": "Be brief."}, QUESTION),
    "chat, history": chat(user("What is a lane?"), {"role": "assistant", "content": "A seat."}, QUESTION),
    "chat, unknown role": chat({"role": "zebra", "content": "What is a stage?"}),
    "chat, content in parts": chat(user([{"type": "text", "text": "What is"}, {"type": "text", "text": "a stage?"}])),
    "chat, content null": chat(user(None), max_tokens=4),
    "chat, the same key twice": (
        CHAT,
        b'{"messages":[{"role":"user","content":"hi"}],"temperature":2,"temperature":0}',
    ),
    "chat, no model": (CHAT, {"messages": [QUESTION], "temperature": 0}),
    "chat, unknown model": chat(model="nothing"),
    "chat, ends with the assistant": chat(QUESTION, {"role": "assistant", "content": "A stage is a"}),
    "completion": complete(),
    "completion, max_tokens 1": complete(max_tokens=1),
    "completion, no max_tokens": (COMPLETIONS, {"prompt": "A stage is", "temperature": 0}),
    "completion, token ids": complete([35, 220, 1]),
    "completion, several prompts": complete(["A stage is", "A node is"]),
    "completion, several token prompts": complete([[35, 220], [36, 220]]),
    "completion, n 2": complete(n=2),
    "completion, special tokens in text": complete(WRITTEN, max_tokens=60),
    "completion, ignore_eos": complete(WRITTEN, max_tokens=60, ignore_eos=True),
    "completion, stop": complete(WRITTEN, max_tokens=60, stop=["runs", "slice"]),
    "completion, bytes of several characters": complete("Grüße 👋"),
    "completion, logprobs": complete(logprobs=2, max_tokens=4),
    "completion, echo": complete(echo=True),
    "completion, suffix": complete(suffix="x"),
    "completion, best_of": complete(best_of=2),
    "stream": chat(stream=True),
    "stream, usage": chat(stream=True, **USAGE),
    "stream, max_tokens": chat(stream=True, max_tokens=3),
    "stream, stop": chat(stream=True, stop="runs"),
    "stream, n 2": chat(stream=True, n=2, max_tokens=4),
    "stream, logprobs": chat(stream=True, logprobs=True, top_logprobs=1),
    "stream of a completion": complete(stream=True),
    "stream of a completion, usage": complete(stream=True, **USAGE),
    "stream of a completion, several prompts": complete(["A stage is", "A node is"], stream=True),
}

REFUSED: Final[dict[str, Request]] = {
    "too long": chat(user(TOO_LONG)),
    "too long, streamed": chat(user(TOO_LONG), stream=True),
    "too long a completion": complete(TOO_LONG),
    "no JSON": (CHAT, b'{"messages": ['),
    "nothing": (CHAT, b""),
    "an array": (CHAT, b"[]"),
    "a text": (CHAT, b'"x"'),
    "no UTF-8": (CHAT, b'{"messages":[{"role":"user","content":"\xff"}]}'),
    "half a surrogate": (CHAT, b'{"messages":[{"role":"user","content":"\\ud800"}]}'),
    "NaN": (CHAT, b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}'),
    "no messages": (CHAT, {"model": MODEL_ID}),
    "messages is a text": (CHAT, {"messages": "hi"}),
    "messages is empty": (CHAT, {"messages": []}),
    "message without role": chat({"content": "x"}),
    "message with an empty role": chat({"role": "", "content": "x"}, max_tokens=2),
    "message without content": chat({"role": "user"}, max_tokens=2),
    "content is a number": chat(user(5)),
    "content of an unknown type": chat(user([{"type": "zebra"}])),
    "content is an image": chat(user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}])),
    "model is a number": chat(model=5, max_tokens=2),
    "n 0": chat(n=0),
    "n 1000": chat(n=1000),
    "n is a text": chat(n="two"),
    "max_tokens -2": chat(max_tokens=-2),
    "max_tokens 0": chat(max_tokens=0),
    "max_tokens is a text": chat(max_tokens="5"),
    "max_tokens is a fraction": chat(max_tokens=5.5),
    "temperature is a text": chat(temperature="hot"),
    "temperature -1": chat(temperature=-1, max_tokens=2),
    "top_p 7": chat(top_p=7, max_tokens=2),
    "seed is a text": chat(seed="x"),
    "stop is a number": chat(stop=5, max_tokens=2),
    "stream is a text": chat(stream="yes"),
    "top_logprobs alone": chat(top_logprobs=3),
    "top_logprobs 21": chat(logprobs=True, top_logprobs=21, max_tokens=2),
    "top_logprobs -1": chat(logprobs=True, top_logprobs=-1, max_tokens=2),
    "logit_bias of no token": chat(logit_bias={"999999": 1}, max_tokens=2),
    "logit_bias of a word": chat(logit_bias={"x": 1}, max_tokens=2),
    "tools is a text": chat(tools="x"),
    "response_format unknown": chat(response_format={"type": "zebra"}),
    "a number beyond 64 bits for the template": chat(chat_template_kwargs={"number": 2**64}, max_tokens=2),
    "grammar that is none": chat(grammar="root ::= ("),
    "no prompt": (COMPLETIONS, {"model": MODEL_ID}),
    "prompt null": complete(None),
    "prompt is a number": complete(5),
    "prompt is an empty list": complete([]),
    "prompt is an empty text": complete(""),
    "prompt of no token": complete([999999]),
    "prompt of a negative token": complete([-1]),
    "prompt of tokens and texts": complete([35, "a", 36]),
}

_ONE = "OpenAI counts what all choices took; llama-server counts the first one only"
_STRICT = "a wrong value is refused with its name, as OpenAI does; llama-server takes it for another one or for none"
_NO_RETRY = "it is the client's fault and trying again mends nothing; llama-server says 500, upon which SDKs try again"
_NOT_DROPPED = "what is not done is refused; llama-server drops it and answers as if it had not been asked"
_BOUND = "OpenAI's bounds"
_STATUS = frozenset({"status"})
_USAGE = frozenset({"usage"})

AGREED: Final[dict[str, tuple[frozenset[str], str]]] = {
    "chat, n 2": (_USAGE, _ONE),
    "chat, logprobs": (frozenset({"tokens"}), "the end token says nothing; llama-server lists it, but not in a stream"),
    "chat, unknown model": (_STATUS, "a mesh serves several models; llama-server answers with the one it has"),
    "chat, ends with the assistant": (_USAGE, "as with OpenAI a new turn begins; llama-server continues that one"),
    "completion, no max_tokens": (
        frozenset({"choices", "usage"}),
        "OpenAI's default is 16, llama-server's the context",
    ),
    "completion, several prompts": (_USAGE, _ONE),
    "completion, several token prompts": (_USAGE, _ONE),
    "completion, n 2": (_USAGE, _ONE),
    "completion, echo": (frozenset({"choices"}), "llama-server ignores echo"),
    "completion, suffix": (_STATUS, _NOT_DROPPED),
    "completion, best_of": (_STATUS, _NOT_DROPPED),
    "stream of a completion, usage": (
        frozenset({"order", "usage"}),
        "OpenAI sends usage in a chunk of its own and only if asked; llama-server always in that of the finish",
    ),
    "messages is empty": (_STATUS, _STRICT),
    "message without role": (_STATUS, _NO_RETRY),
    "message with an empty role": (_STATUS, _STRICT),
    "content is an image": (_STATUS, _NO_RETRY),
    "tools is a text": (_STATUS, _NO_RETRY),
    "model is a number": (_STATUS, _STRICT),
    "max_tokens 0": (_STATUS, "llama-server makes one token"),
    "max_tokens is a fraction": (_STATUS, _STRICT),
    "temperature -1": (_STATUS, _BOUND),
    "top_p 7": (_STATUS, _BOUND),
    "stop is a number": (_STATUS, _STRICT),
    "top_logprobs 21": (_STATUS, _BOUND),
    "top_logprobs -1": (_STATUS, _BOUND),
    "logit_bias of no token": (_STATUS, _STRICT),
    "logit_bias of a word": (_STATUS, _STRICT),
    "a number beyond 64 bits for the template": (_STATUS, _STRICT),
    "prompt is an empty text": (_STATUS, "there is nothing to continue; llama-server answers with nothing"),
    "prompt of tokens and texts": (_STATUS, "not in OpenAI's API"),
}
