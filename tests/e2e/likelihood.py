"""What one machine with plain llama.cpp says about the demonstration model's texts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager

import llama_cpp
import numpy as np

from meshnode.demo import MODEL


@contextmanager
def one_machine() -> Iterator[llama_cpp.Llama]:
    """The whole model in this process."""
    model = llama_cpp.Llama(str(MODEL), n_ctx=2048, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    with closing(model):
        yield model


def tokens(model: llama_cpp.Llama, text: str) -> list[int]:
    return model.tokenize(text.encode(), add_bos=False, special=True)


def log_likelihood(model: llama_cpp.Llama, prompt: str, answer: str) -> tuple[float, bool]:
    """Of `answer` after `prompt`, and whether greedy decoding gives it."""
    before, ids = (tokens(model, text) for text in (prompt, prompt + answer))
    assert ids[: len(before)] == before
    model.reset()
    model.eval(ids)
    total, greedy = 0.0, True
    for place in range(len(before), len(ids)):
        logits = np.asarray(model.scores[place - 1], dtype=np.float64)
        total += float(logits[ids[place]] - logits.max() - math.log(np.exp(logits - logits.max()).sum()))
        greedy = greedy and int(logits.argmax()) == ids[place]
    return total, greedy
