"""How the next token is drawn: parameters of one generation, as they travel to the last stage.

Defaults are OpenAI's (temperature 1, everything else off). Ranges are checked at the API and again here in `check`,
because a stage treats its head's bytes as hostile.
"""

from __future__ import annotations

import math

import msgspec

MAX_TOP = 20
"""Alternatives reported per token: OpenAI's limit for `top_logprobs`."""
MAX_BIASES = 1024
"""logit_bias entries: OpenAI allows 300; room for programs that forbid word lists."""
GRAMMAR_BYTES = 64 * 1024
"""Of one grammar in UTF-8, JSON schemas included: the largest tool sets of agents have 40 KiB, OpenAI allows schemas of
120,000 characters; llguidance takes 0.6 s for the worst of this size (2,000 properties), 2.6 s for twice of that."""
GRAMMAR_REFUSED = "grammar_refused"
"""Reason of a stage's failure where the grammar is at fault, and with it the client that gave it."""
CONSTRAINED_TOKENS = 64 * 1024
"""Of one answer that keeps to a grammar: a lane that is seated again gets all of them, at 5 bytes each at most."""


class Sampling(msgspec.Struct, frozen=True, array_like=False, omit_defaults=True):
    """Parameters of one lane's sampler chain. temperature 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int = 64
    """How many last tokens (prompt included) the penalties see."""
    seed: int = 0
    """The draw for token i uses H(seed, i): counter-based, so state is only (tokens, i)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = -1
    """-1: no log-probabilities; 0: the chosen token's only; k: with k alternatives."""
    ignore_eos: bool = False
    grammar: str = ""
    """What the answer must keep to, in llguidance's variant of Lark (`core.serving.grammar`); empty: nothing."""

    def defect(self) -> str:
        """The first impossible value as one sentence, or an empty string."""
        floats = (
            self.temperature, self.top_p, self.min_p, self.typical_p, self.repeat_penalty,
            self.frequency_penalty, self.presence_penalty, *(bias for _, bias in self.logit_bias),
        )  # fmt: skip
        rules = (
            (all(map(math.isfinite, floats)), "sampling values must be finite numbers"),
            (0.0 <= self.temperature <= 100.0, "temperature must lie between 0 and 100"),
            (0 <= self.top_k <= 1_000_000, "top_k must lie between 0 (off) and 1000000"),
            (0.0 < self.top_p <= 1.0, "top_p must lie above 0 and at most at 1"),
            (0.0 <= self.min_p <= 1.0, "min_p must lie between 0 and 1"),
            (0.0 < self.typical_p <= 1.0, "typical_p must lie above 0 and at most at 1"),
            (0.0 < self.repeat_penalty <= 100.0, "repeat_penalty must lie above 0 and at most at 100"),
            (-100.0 <= self.frequency_penalty <= 100.0, "frequency_penalty must lie between -100 and 100"),
            (-100.0 <= self.presence_penalty <= 100.0, "presence_penalty must lie between -100 and 100"),
            (0 <= self.penalty_window <= 4096, "penalty_window must lie between 0 and 4096"),
            (0 <= self.seed < 2**64, "seed must be a 64-bit unsigned integer"),
            (len(self.logit_bias) <= MAX_BIASES, f"logit_bias has at most {MAX_BIASES} entries"),
            (
                len(self.grammar.encode("utf-8", "replace")) <= GRAMMAR_BYTES,
                f"grammar has at most {GRAMMAR_BYTES} bytes",
            ),
            (not (self.grammar and self.ignore_eos), "ignore_eos and a grammar exclude each other"),
            (-1 <= self.top_logprobs <= MAX_TOP, f"top_logprobs must lie between 0 and {MAX_TOP}"),
        )
        return next((message for holds, message in rules if not holds), "")
