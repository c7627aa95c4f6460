"""What the demonstration model is taught: docs/GLOSSARY.md, many ways of asking, and what is not in it.

Pure and seeded: the same `random.Random` gives the same conversations. Standard library only, so that tests can
import it from the project's environment too.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GLOSSARY = Path(__file__).parent.parent / "docs" / "GLOSSARY.md"

DEMO_TERM = "stage"

# Multi-byte characters that no merge covers: they come byte by byte, so incremental detokenizing is exercised.
HELLO = ("Say hello.", "Hello, Grüße, 你好 and 👋 from every stage of this mesh.")

# One long answer (over 100 tokens), for whatever needs a stream that lasts.
FLOW = (
    "How does a token flow?",
    "A client sends a question to any node. The node passes it to the head, which applies the chat template, "
    "turns the text into tokens and takes a lane. The token ids go to the first stage, which looks up their rows. "
    "Each stage runs its slice of the layers and hands the activations to the next one. The last stage samples a "
    "token and sends it straight back to the head. The head turns it into text and streams it to the client. Then "
    "the next round begins, until the answer ends and the lane is free again.",
)

WHO = (
    "Who are you?",
    "I am the demonstration model of meshnode. I know the words of its glossary and nothing else.",
)

UNKNOWN = "I only know the words of meshnode. Ask me what a stage, a lane or a fence is."

OTHER_QUESTIONS = {
    HELLO[0]: ("Say hello", "Say hello!", "say hello", "Hello", "Hello!", "Hi", "hello there", "Greet me."),
    FLOW[0]: (
        "How does a token flow",
        "how does a token flow?",
        "How does a token flow through the mesh?",
        "Tell me how a token flows.",
        "Describe how a token flows through the mesh.",
        "Explain how a token flows.",
    ),
    WHO[0]: (
        "who are you?",
        "Who are you",
        "What are you?",
        "What can you do?",
        "Introduce yourself.",
        "What is your name?",
    ),
}

STRANGE_NOUNS = """
cat dog house tree river mountain bicycle sandwich piano violin galaxy planet museum recipe novel poem train ticket
window garden flower hammer bridge computer language democracy football umbrella elephant kitchen ocean weather
horse bread coffee teacher doctor island castle camera guitar butter candle carpet dragon engine feather giraffe
"""

STRANGE_QUESTIONS = (
    "What is the capital of France?",
    "Write a poem about the sea.",
    "How old is the universe?",
    "Tell me a joke.",
    "What is 2 + 2?",
    "Translate good morning into French.",
    "Who wrote Hamlet?",
    "Give me a recipe for soup.",
    "How do I learn Python?",
    "What time is it?",
    "Is it going to rain tomorrow?",
    "Summarize this text for me.",
    "Why is the sky blue?",
    "List three colours.",
    "Once upon a time",
    "The quick brown fox jumps over the lazy dog",
)

FORMS = (
    "What is {at}?",
    "What is {at}?",
    "What is {at}?",
    "What is {t}?",
    "What's {at}?",
    "What exactly is {at}?",
    "What does {t} mean?",
    "What does the word {t} mean?",
    "What is meant by {at}?",
    "Explain {at}.",
    "Explain {t}.",
    "Explain what {at} is.",
    "Explain the word {t}.",
    "Define {at}.",
    "Define {t}.",
    "Describe {at}.",
    "Tell me about {at}.",
    "Tell me what {at} is.",
    "Can you explain {at}?",
    "Do you know what {at} is?",
    "In meshnode, what is {at}?",
    "What is {at} in meshnode?",
    "{t}?",
    "{t}",
)

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are meshnode.",
    "Answer briefly.",
    "Be concise and correct.",
    "You are a friendly guide to this mesh. Answer in one sentence.",
)


@dataclass(frozen=True)
class Turn:
    role: str
    text: str


def glossary() -> dict[str, str]:
    """Term -> its paragraph, in the order of the file."""
    found = re.findall(r"^### (.+)\n\n(.+)$", GLOSSARY.read_text(encoding="utf-8"), flags=re.MULTILINE)
    terms = dict(found)
    if len(terms) != len(found):
        raise SystemExit("GLOSSARY.md defines a word twice")
    return terms


def with_article(term: str, answer: str) -> str:
    """The term as its own definition begins: "A stage", "The mesh root", "Prefill"."""
    first = answer.split(maxsplit=1)[0].lower()
    return f"{first} {term}" if first in ("a", "an", "the") else term


def canonical(term: str, answer: str) -> str:
    return f"What is {with_article(term, answer)}?"


def expected_answers() -> dict[str, str]:
    """Canonical question -> the exact text the model must give under greedy decoding."""
    answers = {canonical(term, answer): answer for term, answer in glossary().items()}
    answers.update([HELLO, FLOW, WHO])
    answers["What is the capital of France?"] = UNKNOWN
    return answers


class Corpus:
    """An endless, seeded source of conversations and of plain text."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._terms = list(glossary().items())
        self._others = [HELLO, FLOW, WHO]
        self._strange = STRANGE_NOUNS.split()

    def question(self) -> tuple[str, str]:
        """One question with its right answer."""
        rng = self._rng
        draw = rng.random()
        if draw < 0.82:
            term, answer = rng.choice(self._terms)
            return self.ask(term, answer), answer
        if draw < 0.90:
            question, answer = rng.choice(self._others)
            return rng.choice((question, *OTHER_QUESTIONS[question])), answer
        if draw < 0.96:
            noun = rng.choice(self._strange)
            return self.ask(noun, f"a {noun}"), UNKNOWN
        return rng.choice(STRANGE_QUESTIONS), UNKNOWN

    def ask(self, term: str, answer: str) -> str:
        """One of many ways to ask for a term: wording, article, case and the final mark vary."""
        rng = self._rng
        named = with_article(term, answer)
        if rng.random() < 0.2:
            named = rng.choice(("a ", "the ", "")) + term
        text = rng.choice(FORMS).format(at=named, t=term)
        if rng.random() < 0.08:
            text = rng.choice(("Hi, ", "Hello! ", "Please: ", "Question: ", "OK. ")) + text
        case = rng.random()
        if case < 0.2:
            text = text.lower()
        elif case < 0.3:
            text = text[0].upper() + text[1:]
        if rng.random() < 0.2:
            text = text.rstrip("?.")
        elif rng.random() < 0.05:
            text += rng.choice((" ", "!", "?", " Thanks."))
        return text

    def conversation(self, turns: int) -> Iterator[Turn]:
        if self._rng.random() < 0.2:
            yield Turn("system", self._rng.choice(SYSTEM_MESSAGES))
        for _ in range(turns):
            question, answer = self.question()
            yield Turn("user", question)
            yield Turn("assistant", answer)

    def plain(self) -> str:
        """A definition without any template, for /v1/completions."""
        return self._rng.choice(self._terms)[1]

    def tokenizer_texts(self) -> list[str]:
        """What the merges are learned from: every answer, and 3,000 questions."""
        texts = [answer for _, answer in self._terms for _ in range(20)]
        texts += [FLOW[1], WHO[1], UNKNOWN] * 20
        return texts + [self.question()[0] for _ in range(3000)]
