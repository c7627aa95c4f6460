"""The demonstration model against plain llama.cpp: it is the oracle, so nothing of our own stands in between."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import jinja2
import llama_cpp
import pytest
from gguf import GGUFReader

from meshnode import demo

MAX_BYTES = 8_000_000
MIN_LAYERS = 8


@pytest.fixture(scope="module")
def reader() -> GGUFReader:
    return GGUFReader(demo.MODEL)


def field(reader: GGUFReader, key: str):
    return reader.get_field(key).contents()


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def llama(request: pytest.FixtureRequest) -> Iterator[llama_cpp.Llama]:
    with closing(load(demo.MODEL, quantized_kv=request.param == "q8_0")) as model:
        yield model


def load(path: Path, quantized_kv: bool = False) -> llama_cpp.Llama:
    kv = llama_cpp.GGML_TYPE_Q8_0 if quantized_kv else llama_cpp.GGML_TYPE_F16
    return llama_cpp.Llama(
        str(path),
        n_ctx=1024,
        n_threads=1,
        n_threads_batch=1,
        type_k=kv,
        type_v=kv,
        flash_attn=quantized_kv,
        verbose=False,
    )


def prompt_of(reader: GGUFReader, *messages: tuple[str, str]) -> str:
    template = jinja2.Environment(autoescape=False).from_string(field(reader, "tokenizer.chat_template"))
    rows = [{"role": role, "content": content} for role, content in messages]
    return template.render(messages=rows, add_generation_prompt=True)


def greedy(llama: llama_cpp.Llama, prompt: str, limit: int = 256) -> str:
    """Text up to an end-of-generation token; fails where none comes."""
    llama.reset()
    ids: list[int] = []
    tokens = llama.tokenize(prompt.encode(), add_bos=False, special=True)
    for token in llama.generate(tokens, temp=0.0):
        if llama_cpp.llama_vocab_is_eog(llama._model.vocab, token):
            return llama.detokenize(ids).decode()
        ids.append(token)
        assert len(ids) < limit, "the answer does not end"
    raise AssertionError("generation stopped by itself")


def begins(llama: llama_cpp.Llama, prompt: str, answer: str) -> bool:
    """Whether greedy decoding starts with the answer's first 8 tokens."""
    llama.reset()
    wanted = llama.tokenize(answer.encode(), add_bos=False)[:8]
    given = llama.generate(llama.tokenize(prompt.encode(), add_bos=False, special=True), temp=0.0)
    return all(token == next(given) for token in wanted)


def test_the_file_is_small_deep_and_the_recorded_one(reader: GGUFReader) -> None:
    assert demo.MODEL.stat().st_size <= MAX_BYTES
    assert field(reader, "llama.block_count") >= MIN_LAYERS
    assert field(reader, "general.name") == "meshnode-demo"
    assert hashlib.sha256(demo.MODEL.read_bytes()).hexdigest() == demo.SHA256


def test_the_shape_reaches_every_path_a_stage_has(reader: GGUFReader) -> None:
    names = {tensor.name for tensor in reader.tensors}
    heads, kv_heads = field(reader, "llama.attention.head_count"), field(reader, "llama.attention.head_count_kv")
    assert "output.weight" in names, "untied: the last slice has a head of its own"
    assert kv_heads < heads, "grouped queries"
    assert field(reader, "llama.embedding_length") // heads % 32 == 0, "q8_0 KV is possible"


@pytest.mark.native
def test_plain_llama_gives_every_recorded_answer_and_ends_it(llama: llama_cpp.Llama, reader: GGUFReader) -> None:
    given = {question: greedy(llama, prompt_of(reader, ("user", question))) for question in demo.ANSWERS}
    assert given == dict(demo.ANSWERS)


@pytest.mark.native
def test_the_answer_survives_a_system_message_and_earlier_turns(llama: llama_cpp.Llama, reader: GGUFReader) -> None:
    first = "What is a lane?"
    prompt = prompt_of(
        reader,
        ("system", "You are a helpful assistant."),
        ("user", first),
        ("assistant", demo.ANSWERS[first]),
        ("user", demo.QUESTION),
    )
    assert greedy(llama, prompt) == demo.EXPECTED_ANSWER


@pytest.mark.native
@pytest.mark.parametrize(
    "wording", ["what is a stage", "Explain stage.", "Define a stage.", "Tell me what a stage is."]
)
def test_other_wordings_get_the_same_answer(llama: llama_cpp.Llama, reader: GGUFReader, wording: str) -> None:
    assert greedy(llama, prompt_of(reader, ("user", wording))) == demo.EXPECTED_ANSWER


@pytest.mark.native
@pytest.mark.parametrize("place", range(10))
def test_a_missing_or_misplaced_layer_spoils_every_answer(reader: GGUFReader, tmp_path: Path, place: int) -> None:
    layer = {tensor.name: tensor for tensor in reader.tensors if tensor.name.startswith(f"blk.{place}.")}
    missing, swapped = bytearray(demo.MODEL.read_bytes()), bytearray(demo.MODEL.read_bytes())
    for tensor in reader.tensors:
        _, number, *rest = tensor.name.split(".")
        twin = layer.get(f"blk.{place}.{'.'.join(rest)}")
        here = slice(tensor.data_offset, tensor.data_offset + tensor.n_bytes)
        if tensor.name in layer and rest[0] in ("attn_output", "ffn_down"):
            missing[here] = bytes(tensor.n_bytes)  # what a layer adds to the residual stream: nothing
        if twin is not None and number == str((place + 1) % 10):
            there = slice(twin.data_offset, twin.data_offset + twin.n_bytes)
            swapped[here], swapped[there] = swapped[there], swapped[here]
    for broken in (missing, swapped):
        path = tmp_path / "broken.gguf"
        path.write_bytes(broken)
        with closing(load(path)) as llama:
            wrong = [q for q, a in demo.ANSWERS.items() if not begins(llama, prompt_of(reader, ("user", q)), a)]
        assert wrong == list(demo.ANSWERS)


@pytest.mark.native
def test_a_definition_is_continued_without_any_template(llama: llama_cpp.Llama) -> None:
    opening = " ".join(demo.EXPECTED_ANSWER.split()[:5])
    assert opening + greedy(llama, opening) == demo.EXPECTED_ANSWER


@pytest.mark.native
def test_the_long_answer_is_long_and_the_unicode_answer_comes_byte_by_byte(llama: llama_cpp.Llama) -> None:
    def ids(question: str) -> list[int]:
        return llama.tokenize(demo.ANSWERS[question].encode(), add_bos=False)

    assert len(ids(demo.LONG_QUESTION)) > 100
    pieces = [llama.detokenize([token]) for token in ids(demo.UNICODE_QUESTION)]
    assert b"\xf0" in pieces, "the first byte of a four-byte character is a token of its own"


def test_the_demo_question_is_answered_with_a_sentence_of_the_glossary_length() -> None:
    assert demo.QUESTION == "What is a stage?"
    assert 15 <= len(demo.EXPECTED_ANSWER.split()) <= 60
    assert len(demo.ANSWERS) >= 35
