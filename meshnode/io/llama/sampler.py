"""How the last stage draws a token from logits: one chain per lane, on numpy arrays.

Order as in llama.cpp (common_sampler): bias, penalties, grammar, top_k, typical_p, top_p, min_p, temperature, draw.
Log-probabilities are the log-softmax of the raw logits. llama.cpp's own samplers cannot be saved and draw from a
generator with hidden state; here the draw of token i is H(seed, i), so that (token ids, i) is the whole state and
another process continues with the same choices; a grammar is brought to where it stood by the ids that came before.

Invariant: the choice depends only on logits, parameters, the window of ids, the number i, and what the grammar allows.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from meshnode.errors import StageError
from meshnode.wire.activation import LaneSample
from meshnode.wire.sampling import Sampling

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

_HEADS: Final = (512, 8192)
"""Candidates sorted before all are: nucleus sampling of a trained model nearly always ends within the first few
hundred, and sorting 150,000 takes 14 ms where this takes 0.5."""


def uniform(seed: int, number: int) -> float:
    """H(seed, i) as 53 bits in [0, 1)."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + number.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class Constraint(Protocol):
    """What an answer must keep to (io.llama.grammar.Constraint)."""

    def allowed(self) -> Ids:
        """Ids that may come next, ascending, never none. StageError when that cannot be told."""

    def accept(self, token: int) -> None:
        """`token` was drawn. StageError for one that was not allowed."""


class LaneSampler:
    """One lane's chain. `window`: the last ids before the first draw; `generated`: how many draws came before."""

    def __init__(
        self,
        sampling: Sampling,
        vocabulary: int,
        window: Sequence[int] = (),
        generated: int = 0,
        constraint: Constraint | None = None,
    ) -> None:
        if any(not 0 <= token < vocabulary for token, _ in sampling.logit_bias):
            raise StageError("bad_sampling", "logit_bias names a token outside the vocabulary")
        self._sampling = sampling
        self._constraint = constraint
        self._generated = generated
        self._window: deque[int] = deque(window, maxlen=sampling.penalty_window)
        self._biased = np.array([token for token, _ in sampling.logit_bias], np.intp)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        self._penalised = (
            sampling.repeat_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0
        ) and sampling.penalty_window > 0

    def draw(self, lane: int, position: int, logits: Floats) -> LaneSample:
        """The next token from raw logits (vocabulary,), which are not changed; it is remembered."""
        adjusted = self._adjusted(logits)
        if self._constraint is not None:
            token = self._choose_allowed(adjusted, self._constraint)
        else:
            token = int(adjusted.argmax()) if self._sampling.temperature == 0 else self._choose(adjusted)
        self._generated += 1
        if self._penalised:
            self._window.append(token)
        if self._sampling.top_logprobs < 0:
            return LaneSample(lane, position, token)
        logprob, alternatives = log_probabilities(logits, token, self._sampling.top_logprobs)
        return LaneSample(lane, position, token, logprob, alternatives)

    def score(self, lane: int, position: int, logits: Floats, target: int) -> LaneSample:
        """How likely `target` is by raw logits (vocabulary,). Nothing is drawn, and nothing remembered."""
        if target >= len(logits):
            raise StageError("bad_rows", "a token outside the vocabulary was to be scored")
        return LaneSample(lane, position, target, *log_probabilities(logits, target, self._sampling.top_logprobs))

    def _choose_allowed(self, logits: Floats, constraint: Constraint) -> int:
        """Of the allowed tokens only, as if there were no others."""
        allowed = constraint.allowed()
        left = logits[allowed]
        token = int(allowed[left.argmax() if self._sampling.temperature == 0 else self._choose(left)])
        constraint.accept(token)
        return token

    def _adjusted(self, logits: Floats) -> Floats:
        if not self._penalised and not len(self._biased):
            return logits
        adjusted = logits.copy()
        # add.at: a token may be named twice.
        np.add.at(adjusted, self._biased, self._bias)
        if self._penalised and self._window:
            self._penalise(adjusted)
        return adjusted

    def _penalise(self, logits: Floats) -> None:
        counted = Counter(token for token in self._window if token < len(logits))
        tokens = np.fromiter(counted.keys(), np.intp, len(counted))
        counts = np.fromiter(counted.values(), np.float32, len(counted))
        values, sampling = logits[tokens], self._sampling
        values = np.where(values <= 0, values * sampling.repeat_penalty, values / sampling.repeat_penalty)
        logits[tokens] = values - counts * sampling.frequency_penalty - sampling.presence_penalty

    def _choose(self, logits: Floats) -> int:
        sampling = self._sampling
        tokens = self._filtered(logits)
        kept = (logits if tokens is None else logits[tokens]).astype(np.float64)
        kept -= kept.max()
        kept /= sampling.temperature
        weights = np.cumsum(np.exp(kept, out=kept), out=kept)
        target = uniform(sampling.seed, self._generated) * weights[-1]
        # In order of token id, not of probability: low bits of a logit cannot swap two neighbours.
        at = min(int(np.searchsorted(weights, target, side="right")), len(weights) - 1)
        return at if tokens is None else int(tokens[at])

    def _filtered(self, logits: Floats) -> Ids | None:
        """Ids that remain, ascending; None: all."""
        sampling, tokens = self._sampling, None
        if 0 < sampling.top_k < len(logits):
            tokens = np.argpartition(logits, len(logits) - sampling.top_k)[-sampling.top_k :]
            tokens.sort()
        if sampling.typical_p < 1.0:
            tokens = _subset(tokens, _typical(_of(logits, tokens), sampling.typical_p))
        if sampling.top_p < 1.0:
            tokens = _subset(tokens, _nucleus(_of(logits, tokens), sampling.top_p))
        if sampling.min_p > 0.0:
            left = _of(logits, tokens)
            tokens = _subset(tokens, np.flatnonzero(left >= left.max() + math.log(sampling.min_p)))
        return tokens


def _of(logits: Floats, tokens: Ids | None) -> Floats:
    return logits if tokens is None else logits[tokens]


def _subset(tokens: Ids | None, kept: Ids) -> Ids:
    return kept if tokens is None else tokens[kept]


def _softmax(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum(dtype=np.float64).astype(np.float32)


def _nucleus(logits: Floats, top_p: float) -> Ids:
    """Indices, ascending, of the fewest most likely whose probability reaches `top_p`; at least one."""
    probabilities = _softmax(logits)
    # Ties are cut in the order of the sort, which is the same for the same logits.
    for head in (*_HEADS, len(logits)):
        everything = head >= len(logits)
        order = np.arange(len(logits)) if everything else np.argpartition(logits, len(logits) - head)[-head:]
        order = order[np.argsort(-logits[order])]
        reached = np.cumsum(probabilities[order], dtype=np.float64) >= top_p
        if reached.any():
            return np.sort(order[: int(reached.argmax()) + 1])
    return np.arange(len(logits))


def _typical(logits: Floats, typical_p: float) -> Ids:
    """Indices, ascending, of those whose surprise is nearest to the entropy, until they reach `typical_p`."""
    probabilities = _softmax(logits).astype(np.float64)
    surprise = -np.log(np.maximum(probabilities, 1e-45))
    entropy = float((probabilities * surprise).sum())
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    reached = np.cumsum(probabilities[order]) > typical_p
    count = int(reached.argmax()) + 1 if reached.any() else len(order)
    return np.sort(order[:count])


def log_probabilities(logits: Floats, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Natural log-probability of `token` and the `top` most likely (id, log-probability), most likely first."""
    largest = float(logits.max())
    total = largest + math.log(float(np.exp(logits - np.float32(largest)).sum(dtype=np.float64)))
    # Rounding may leave a certain token a hair above 0, which the wire refuses.
    chosen = min(0.0, float(logits[token]) - total)
    if top <= 0:
        return chosen, ()
    if top == 1:  # What a prompt is usually scored with, row by row: half the time.
        return chosen, ((int(logits.argmax()), min(0.0, largest - total)),)
    top = min(top, len(logits))
    best = np.argpartition(logits, len(logits) - top)[-top:]
    best = best[np.argsort(-logits[best], kind="stable")]
    return chosen, tuple((int(t), min(0.0, float(logits[t]) - total)) for t in best)
