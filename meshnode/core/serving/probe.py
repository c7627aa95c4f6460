"""The probe: 16 fixed tokens through every stage of a run, whole and in two chunks, before anybody is sent there.

It finds broken wiring (wrong cuts, wrong order, lost positions, another model's bytes, native code that computes
nonsense on one machine). It does not find a lying member.

Invariant: the tokens are a function of the vocabulary alone, so that runs of one model answer the same question.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import Final

import msgspec

from meshnode.core.serving.prefixes import Reuse
from meshnode.core.serving.request import Generation, Sampled
from meshnode.core.serving.text import Vocabulary
from meshnode.errors import StageError
from meshnode.wire.sampling import MAX_TOP, Sampling

TOKENS: Final = 16
"""Two chunks of eight: positions and the cache go from one microbatch into the next."""
TOP: Final = 5
"""Most likely tokens that are remembered of the first good run of a model."""
OVERLAP: Final = 4
"""So many of them are wanted of every later run."""
TIE: Final = 0.2
"""Of natural log-probability. What lies nearer together may change places: another cut moved the values of a random
model by up to 0.03 (rows travel as f16), other chunk sizes and kernels by up to 0.1; broken wiring by several."""


def probe_tokens(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Tokens with text of their own, spread over the vocabulary; a smaller one repeats itself."""
    pieces, end = vocabulary.pieces, vocabulary.end | vocabulary.markers.keys()
    chosen: list[int] = []
    for number in range(TOKENS):
        start = len(pieces) * number // TOKENS
        # Not a list: it is asked on the event loop, and a vocabulary has up to a million tokens.
        later = chain(range(start, len(pieces)), range(start))
        plain = (token for token in later if pieces[token] and token not in end and token not in chosen)
        chosen.append(next(plain, start))
    return tuple(chosen)


def probe_requests(name: str, tokens: tuple[int, ...]) -> tuple[Generation, Generation, Generation]:
    """The same question three times: as one chunk, with all but its last token on a lane that is to be cut or copied,
    and as two chunks. One token each, drawn greedily from untouched logits."""
    sampling = Sampling(temperature=0.0, top_logprobs=MAX_TOP)
    whole = Generation(f"{name}-whole", tokens, 1, sampling, owner=name)
    halves = Generation(f"{name}-halves", tokens, 1, sampling, chunk=TOKENS // 2)
    return whole, msgspec.structs.replace(whole, id=f"{name}-again"), halves


def reuse_of(whole: Sampled, again: Sampled) -> Reuse:
    """What the stages' memory lets be used again, by what they did and not by what they are called."""
    if not again.cached:
        return Reuse.WHOLE
    return Reuse.ANY if again.alternatives and _agree(whole, again) else Reuse.NONE


def judge(whole: Sampled, halves: Sampled) -> tuple[int, ...]:
    """The most likely tokens, most likely first. Raises StageError("probe_failed")."""
    for answer in (whole, halves):
        values = [each.logprob for each in answer.alternatives]
        if len(values) < 2 or not all(map(math.isfinite, values)):
            raise _failed("it gave no finite numbers")
        if max(values) == min(values):
            raise _failed("every token is as likely as any other")
    if not _agree(whole, halves):
        first, second = whole.alternatives[0].token, halves.alternatives[0].token
        raise _failed(f"token {first} comes of one chunk, token {second} of two")
    return tuple(each.token for each in whole.alternatives[:TOP])


def compare(whole: Sampled, recorded: tuple[int, ...], origin: str) -> None:
    """Refuse an answer with too little of what the first good run of the model gave. Raises StageError("probe_failed").

    `origin`: where that is kept, for people.
    """
    near = _near(whole, TOP)
    if sum(token in near for token in recorded) >= min(OVERLAP, len(recorded)):
        return
    now = tuple(each.token for each in whole.alternatives[:TOP])
    raise _failed(
        f"its most likely tokens are {_listed(now)}, those of the first good run of this model were {_listed(recorded)}"
        f" ({origin}; delete that file if that run was the wrong one)"
    )


def _agree(one: Sampled, other: Sampled) -> bool:
    first, second = one.alternatives[0].token, other.alternatives[0].token
    return first == second or (second in _near(one, 1) and first in _near(other, 1))


def _near(answer: Sampled, count: int) -> frozenset[int]:
    """The `count` most likely tokens, and those that are as good as these."""
    least = answer.alternatives[:count][-1].logprob - TIE
    return frozenset(each.token for each in answer.alternatives if each.logprob >= least)


def _listed(tokens: Iterable[int]) -> str:
    return ", ".join(map(str, tokens))


def _failed(why: str) -> StageError:
    return StageError("probe_failed", f"the probe failed: {why}")
