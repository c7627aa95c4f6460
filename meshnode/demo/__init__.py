"""The embedded demonstration model: a small GGUF that knows the project's glossary by heart.

A demonstration and a test oracle, not an assistant. Its answers under greedy decoding are known word for word, and
every right token leads the best wrong one by at least `SMALLEST_MARGIN` logits, far more than f16 activations or a
q8_0 KV cache move them: another text means that a split corrupts what it carries. Made by
`tools/train_demo_model.py`, which writes the model and `demo.json` together.

It was trained on conversations of up to 1,024 tokens and holds its answers up to about 600 prompt tokens (history or
system message); beyond that it begins to err by itself, so compare with plain llama.cpp there and not with `ANSWERS`.

Invariant: `MODEL` has the digest `SHA256`, and plain llama.cpp answers each question of `ANSWERS` with its text.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    question: str
    smallest_margin: float
    answers: dict[str, str]


_RECORD: Final = msgspec.json.decode((Path(__file__).parent / "demo.json").read_bytes(), type=_Record)

MODEL: Final[Path] = Path(__file__).parent / "meshnode-demo.gguf"
SHA256: Final[str] = _RECORD.sha256
SMALLEST_MARGIN: Final[float] = _RECORD.smallest_margin

# Question (one user message, no system message) -> the whole answer, without its end token.
ANSWERS: Final[Mapping[str, str]] = MappingProxyType(_RECORD.answers)
QUESTION: Final[str] = _RECORD.question
EXPECTED_ANSWER: Final[str] = ANSWERS[QUESTION]

# Over 100 tokens, for whatever needs a stream that lasts.
LONG_QUESTION: Final[str] = "How does a token flow?"
# Holds characters of two to four bytes that come one byte per token.
UNICODE_QUESTION: Final[str] = "Say hello."
