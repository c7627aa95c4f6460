"""The prompt in front of an answer (`echo`): its text, and where in it the text of each of its tokens begins.

Invariant: there is one entry for every token of the prompt, in order; programs that score texts count on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from meshnode.core.serving.request import Sampled
from meshnode.core.serving.text import Detokenizer, Vocabulary
from meshnode.io.http.choice import Spoken


class Echo(msgspec.Struct, frozen=True):
    """One prompt as an answer repeats it."""

    ids: tuple[int, ...]
    text: str
    offsets: tuple[int, ...]
    """Of each id, in characters of `text`."""

    def spoken(self, scores: Sequence[Sampled], first: int = 0, last: int | None = None) -> list[Spoken]:
        """Its tokens [first, last) with their log-probabilities, of which nothing precedes the first, so it has none.

        `scores`: of all its tokens from the second on.
        """
        told = [] if first else [Sampled(self.ids[0])]
        told += scores[max(0, first - 1) : None if last is None else last - 1]
        return list(map(Spoken, told, self.offsets[first:last]))


def echo_of(vocabulary: Vocabulary, ids: tuple[int, ...]) -> Echo:
    """A prompt as it was written: control tokens are spelled out, but for a first one, which the model adds itself."""
    detokenizer = Detokenizer()
    offsets: list[int] = []
    pieces: list[str] = []
    length = 0
    for at, token in enumerate(ids):
        offsets.append(length)
        added = at == 0 and token == vocabulary.bos
        pieces.append("" if added else detokenizer.feed(vocabulary.written(token)))
        length += len(pieces[-1])
    return Echo(ids, "".join(pieces) + detokenizer.finish(), tuple(offsets))
