"""Seeded damage for codecs: flips, cuts, insertions, repeats."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

ROUNDS = 10_000
"""Mutated inputs per codec (issue 2)."""


def mutations(samples: Sequence[bytes], rounds: int = ROUNDS, seed: int = 1) -> Iterator[bytes]:
    """`rounds` damaged versions of `samples`, the same for the same seed."""
    draw = random.Random(seed)
    for _ in range(rounds):
        data = bytearray(draw.choice(samples))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data) + 1)
            match draw.randrange(5):
                case 0:
                    del data[at:]
                case 1:
                    data[at:at] = draw.randbytes(draw.randint(1, 8))
                case 2:
                    data += data[: draw.randint(0, 64)]
                case 3:
                    del data[at : at + draw.randint(1, 8)]
                case _:
                    if data:
                        data[at % len(data)] ^= 1 << draw.randrange(8)
        yield bytes(data)
