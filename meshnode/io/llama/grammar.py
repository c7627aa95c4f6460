"""Grammars that answers must keep to, by llguidance: which tokens may come next.

A grammar is text in llguidance's variant of Lark (core.serving.grammar); it comes from a client and is hostile. The
same limits hold where it is checked (the tokenizer's second process) and where it is used (the last stage), so that
what passed the check compiles in the stage too.

Invariant: an end token is allowed exactly where the grammar is complete, and always when nothing else is.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Event
from typing import Any, Final

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark
from numpy.typing import NDArray

from meshnode.core.serving.text import Vocabulary
from meshnode.errors import StageError
from meshnode.io.llama.stack import on_stack, thread_of
from meshnode.wire.sampling import GRAMMAR_REFUSED

STEP_FUEL: Final = 50_000
"""A quarter of llguidance's own: a bomb of nested counts, `((a{1000}){1000}){1000}`, took 0.8 s and 174 MB of a token
before it was given up, with this 0.1 to 0.2 s and 54 MB; the schemas of docs/protocols/serving.md need none of it."""
STATES: Final = 20_000
"""Of one lane's lexer, 2 kB each: 40 MB at most, a tenth of llguidance's own limit."""
STACK: Final = 128 * 1024 * 1024
"""Of the thread that compiles for a stage, as far as it is touched: 3,500 rules that name each other in turn, which fit
into 43 KB, took more than 8 MB."""
CHECK_STACK: Final = STACK // 2
WALK_STACK: Final = 1024 * 1024
"""No thread that computes has less, on any system."""
WALKS: Final = 4
WALK_TOKENS: Final = 16
"""Of each walk of a check: 64 masks of 0.3 ms, of 20 ms for the largest schemas."""
WAIT_S: Final = 10.0
"""For a grammar, by the thread that computes: the watch over a step of 60 s ends the process, and with it the run for
everybody. All four lanes of a usual run with the largest grammar take 3 s."""
KEPT: Final = 8
"""Compiled grammars: the choices of one request and the requests of one program share theirs."""
_MESSAGE_CHARACTERS: Final = 400
"""Of a refusal; llguidance adds the schema itself."""
_PLACE: Final = re.compile(r"^(?:at )?\d+\(\d+\): (?:failed to compile JSON schema: )?")
_ENDLESS: Final = "NoExtensionBias"
"""What llguidance says of rules that only name each other."""
_PATTERN: Final = "regex parse error:"
_UNFORCED: Final = '%llguidance {"no_forcing": true}\n'
"""Where only one text can follow, the model still chooses among the tokens that spell it; llguidance would cut that
text into tokens itself, for which it would need the model's own tokenizer."""
_SPECIAL: Final = b"\xff"
"""How llguidance tells a control token from the text that it is written as: no UTF-8 has this byte."""


class _Words:
    """What llguidance asks of a tokenizer. It is given no text to cut: answers are followed token by token."""

    bos_token_id = None

    def __init__(self, pieces: Sequence[bytes], markers: dict[int, bytes], end: int) -> None:
        self.eos_token_id = end
        self.tokens = [piece or _SPECIAL + markers.get(token, b"") for token, piece in enumerate(pieces)]
        self.special_token_ids = [token for token, piece in enumerate(pieces) if not piece]

    def __call__(self, text: bytes | str) -> list[int]:
        return []


def translated(gbnf: str) -> str:
    """llama.cpp's GBNF in llguidance's words. StageError for what is none."""
    try:
        return str(gbnf_to_lark(gbnf))
    except Exception as error:
        # The translator raises Exception itself; what else may be a defect of ours goes on.
        if type(error) is Exception or isinstance(error, GbnfToLarkError | ValueError | LookupError | RecursionError):
            raise StageError(GRAMMAR_REFUSED, f"it is no GBNF: {error}"[:_MESSAGE_CHARACTERS]) from None
        raise


class Grammars:
    """Grammars over one vocabulary. Not for several threads at once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Takes 0.3 s for 150,000 tokens. StageError for a model without a token that ends an answer."""
        self._end = sorted(vocabulary.end)
        if not self._end:
            raise StageError(GRAMMAR_REFUSED, "this model has no token that ends an answer")
        words = _Words(vocabulary.pieces, vocabulary.markers, self._end[0])
        self._tokenizer = LLTokenizer(TokenizerWrapper(words), eos_token=self._end)
        self._size = len(words.tokens)
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._limits = LLParserLimits(step_lexer_fuel=STEP_FUEL, max_lexer_states=STATES, verbose_errors=False)

    def check(self, grammar: str) -> None:
        """Compile it, and follow it a little way: too many choices show behind the first token, not before it.

        Both on smaller stacks than a stage has for them: what is too deep ends this process.
        """
        on_stack(CHECK_STACK, lambda: self._compiled(grammar))
        on_stack(WALK_STACK, lambda: self._walk(grammar))

    def _walk(self, grammar: str) -> None:
        for walk in range(WALKS):
            constraint = self.constrain(grammar)
            for step in range(WALK_TOKENS):
                allowed = constraint.allowed()
                token = int(allowed[(walk * 7919 + step * 104_729) % len(allowed)])
                if token in self._end:
                    break
                constraint.accept(token)

    def constrain(self, grammar: str, accepted: Sequence[int] = ()) -> Constraint:
        """An answer that began with `accepted`. StageError for a grammar that cannot be compiled, or an answer that
        could not begin so."""
        constraint = Constraint(self._compiled(grammar), self._size, self._end)
        for token in accepted:
            constraint.accept(token)
        return constraint

    def _compiled(self, grammar: str) -> Any:
        """A matcher of its own, at the beginning."""
        matcher = self._kept.pop(grammar, None)
        if matcher is None:
            matcher = LLMatcher(self._tokenizer, _UNFORCED + grammar, log_level=0, limits=self._limits)
            if matcher.is_error():
                raise StageError(GRAMMAR_REFUSED, _reason(matcher.get_error()))
        self._kept[grammar] = matcher
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return matcher.deep_copy()


class Constraint:
    """One answer and the grammar that it keeps to."""

    def __init__(self, matcher: Any, vocabulary: int, end: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._end = np.array(end, np.intp)

    def allowed(self) -> NDArray[np.intp]:
        """Ids of the tokens that may come next, ascending, never none. StageError when that cannot be told."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        ids = np.flatnonzero(np.unpackbits(mask, bitorder="little")[: self._vocabulary])
        if self._matcher.is_error():
            raise StageError(GRAMMAR_REFUSED, _reason(self._matcher.get_error()))
        if not len(ids):
            raise StageError(GRAMMAR_REFUSED, "it leads where nothing can follow")
        return ids

    def accept(self, token: int) -> None:
        """`token` was drawn. StageError for one that was not allowed."""
        if token not in self._end and not self._matcher.consume_token(token):
            said = self._matcher.get_error()
            raise StageError(GRAMMAR_REFUSED, _reason(said) if said else "a token came that it does not allow")


class GrammarThread:
    """Compiles for a stage, beside the thread that computes: that one waits when it needs the first mask, not before.

    Compiling takes a millisecond for an ordinary schema and 0.3 s for the largest, the table of tokens 0.5 s once.
    """

    def __init__(self, describe: Callable[[], Vocabulary]) -> None:
        self._describe = describe
        self._grammars: Grammars | None = None
        self._thread = thread_of(STACK, "stage-grammar")

    def constrain(self, grammar: str, accepted: Sequence[int]) -> AwaitedConstraint:
        """As Grammars.constrain; what that raises comes with the first mask."""
        left = Event()
        return AwaitedConstraint(self._thread.submit(self._constrain, grammar, accepted, left), left)

    def _constrain(self, grammar: str, accepted: Sequence[int], left: Event) -> Constraint:
        if self._grammars is None:
            self._grammars = Grammars(self._describe())
        constraint = self._grammars.constrain(grammar)
        for token in accepted:
            if left.is_set():
                raise StageError(GRAMMAR_REFUSED, "nobody waits for it")
            constraint.accept(token)
        return constraint


class AwaitedConstraint:
    """A Constraint that may still be compiled; not any more once nobody holds it.

    Clients that come and go would otherwise leave a line of grammars that nobody wants, behind which the thread that
    computes waits until the watch over it ends the process. As it is, there is one a lane at most.
    """

    def __init__(self, coming: Future[Constraint], left: Event) -> None:
        self._coming = coming
        self._left = left
        """Set once nobody wants it: 65,536 tokens of an ambiguous grammar are gone over again at up to 10 ms each."""

    def __del__(self) -> None:
        self._left.set()
        self._coming.cancel()

    def allowed(self) -> NDArray[np.intp]:
        """As of Constraint."""
        return self._made().allowed()

    def accept(self, token: int) -> None:
        """As of Constraint."""
        self._made().accept(token)

    def _made(self) -> Constraint:
        try:
            return self._coming.result(WAIT_S)
        except TimeoutError:
            self._left.set()
            raise StageError(GRAMMAR_REFUSED, f"the grammar was not ready within {WAIT_S:g} s") from None


def _reason(said: str) -> str:
    """The first line of what llguidance says; later ones repeat the grammar, but for what is wrong with a pattern.

    Places are left out: they are those of our own wording, not of the client's schema.
    """
    first, *more = said.strip().splitlines() or [""]
    if first == _ENDLESS:
        return "it describes no text that ever ends"
    first = _PLACE.sub("", first)
    if first.endswith(_PATTERN):
        first += "".join(line.removeprefix("error:") for line in more if line.startswith("error: "))
    return first[:_MESSAGE_CHARACTERS] or "it allows no answer"
