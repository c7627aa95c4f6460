"""A model of any size made of noise: Llama shape, quantized blocks written directly, a tokenizer that works.

Speed and memory of a model depend on its shape and not on what it knows. Scales are chosen so that activations stay
finite and of usual size; the text is nonsense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from meshnode.errors import ConfigError
from meshnode.io.llama.gguf_file import encode_header, tensor_bytes
from meshnode.io.llama.gguf_values import KeyValue, ValueType, make_array, make_scalar

HEAD: Final = 64
"""Values of an attention head: a multiple of 32, so that q8_0 and q4_0 caches work."""
_F32, _F16, _Q4_0, _Q8_0, _Q4_K, _Q6_K = 0, 1, 2, 8, 12, 14
_TYPES: Final = {
    "f16": (_F16, _F16),
    "q4_0": (_Q4_0, _Q4_0),
    "q8_0": (_Q8_0, _Q8_0),
    # The mixture that llama.cpp calls Q4_K_M: finer blocks for the tensors that suffer most.
    "q4_k_m": (_Q4_K, _Q6_K),
}
_FINER: Final = ("attn_v", "ffn_down", "output.weight")
_ALIGNMENT: Final = 32
_SPECIALS: Final = ("<|unk|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CONTROL, _NORMAL = 3, 1
_CHUNK_VALUES: Final = 1 << 22
"""Values made at once: 4 to 16 MiB of memory for a model of any size."""


@dataclass(frozen=True)
class SyntheticShape:
    """What to write. `embd` is a multiple of 256 (a block of the K types)."""

    layers: int = 24
    embd: int = 1024
    type: str = "q8_0"
    vocabulary: int = 32_000
    context: int = 8192

    def __post_init__(self) -> None:
        if self.type not in _TYPES:
            raise ConfigError(f"a model of type {self.type!r} cannot be made", f"one of {', '.join(_TYPES)}")
        if self.embd < 256 or self.embd % 256 or self.embd > 32_768:
            raise ConfigError("the width must be a multiple of 256", "--embd 1024")
        if not 1 <= self.layers <= 512:
            raise ConfigError("a model has 1 to 512 layers", "--layers 24")
        if not 512 <= self.vocabulary <= 1_000_000:
            raise ConfigError("a vocabulary has 512 to 1000000 tokens", "--vocabulary 32000")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.embd // HEAD

    @property
    def kv_heads(self) -> int:
        """Grouped 4 to 1, as usual for the shape."""
        return self.heads // 4

    @property
    def feed_forward(self) -> int:
        """2.75 x the width, rounded to blocks of 256."""
        return round(self.embd * 2.75 / 256) * 256


def write_synthetic(shape: SyntheticShape, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the model to `path`, whole or not at all; `progress(done, total)` in bytes. Raises ConfigError, OSError."""
    described: list[tuple[str, int, tuple[int, ...], int]] = []
    end = 0
    for name, kind, dims in _tensors(shape):
        described.append((name, kind, dims, end))
        end += -(-tensor_bytes(kind, dims) // _ALIGNMENT) * _ALIGNMENT
    partial = path.with_name(path.name + ".part")
    noise = np.random.default_rng(1)
    try:
        with partial.open("wb") as file:
            file.write(encode_header(_keys(shape), described))
            for _, kind, dims, offset in described:
                for data in _values(noise, kind, dims):
                    file.write(data.tobytes())
                file.write(bytes(-tensor_bytes(kind, dims) % _ALIGNMENT))
                if progress is not None:
                    progress(offset, end)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _tensors(shape: SyntheticShape) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Name, type and dims (fastest first, as GGUF has them) of every tensor."""
    plain, finer = _TYPES[shape.type]
    width, kv, inner = shape.embd, shape.kv_heads * HEAD, shape.feed_forward

    def matrix(name: str, *dims: int) -> tuple[str, int, tuple[int, ...]]:
        return name, finer if any(part in name for part in _FINER) else plain, dims

    yield matrix("token_embd.weight", width, shape.vocabulary)
    yield "output_norm.weight", _F32, (width,)
    yield matrix("output.weight", width, shape.vocabulary)
    for index in range(shape.layers):
        block = f"blk.{index}."
        yield block + "attn_norm.weight", _F32, (width,)
        yield block + "ffn_norm.weight", _F32, (width,)
        yield matrix(block + "attn_q.weight", width, width)
        yield matrix(block + "attn_k.weight", width, kv)
        yield matrix(block + "attn_v.weight", width, kv)
        yield matrix(block + "attn_output.weight", width, width)
        yield matrix(block + "ffn_gate.weight", width, inner)
        yield matrix(block + "ffn_up.weight", width, inner)
        yield matrix(block + "ffn_down.weight", inner, width)


def _values(noise: np.random.Generator, kind: int, dims: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    if kind == _F32:
        yield np.ones(dims[0], np.float32)
        return
    total = int(np.prod(dims))
    # Rows of unit variance keep their size through a matrix of this deviation.
    deviation = dims[0] ** -0.5
    step = max(dims[0], _CHUNK_VALUES // dims[0] * dims[0])
    for at in range(0, total, step):
        yield _blocks(noise, kind, min(step, total - at), deviation)


def _blocks(noise: np.random.Generator, kind: int, values: int, deviation: float) -> NDArray[Any]:
    """`values` weights as blocks of `kind`. Layouts: ggml-common.h."""
    if kind == _F16:
        return (noise.standard_normal(values, np.float32) * deviation).astype(np.float16)
    if kind in (_Q8_0, _Q4_0):
        size, spread = (32, 74.0) if kind == _Q8_0 else (16, 4.6)
        layout = np.dtype([("d", "<f2"), ("q", "u1", (size,))])
        blocks = np.empty(values // 32, layout)
        blocks["d"] = deviation / spread
    elif kind == _Q4_K:
        # value = d * scale * q - dmin * min; 6-bit scales and minima are packed in 12 bytes.
        layout = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", (12,)), ("q", "u1", (128,))])
        blocks = np.empty(values // 256, layout)
        blocks["d"], blocks["dmin"] = deviation / 220, deviation / 220 * 7.5
        blocks["scales"] = noise.integers(0, 256, blocks["scales"].shape, np.uint8)
    else:
        layout = np.dtype([("q", "u1", (192,)), ("scales", "i1", (16,)), ("d", "<f2")])
        blocks = np.empty(values // 256, layout)
        blocks["d"] = deviation / (18.5 * 37)
        blocks["scales"] = noise.integers(-64, 64, blocks["scales"].shape, np.int8)
    blocks["q"] = noise.integers(0, 256, blocks["q"].shape, np.uint8)
    return blocks


def _keys(shape: SyntheticShape) -> list[KeyValue]:
    text, whole, real = ValueType.STRING, ValueType.UINT32, ValueType.FLOAT32
    name = f"noise-{shape.layers}x{shape.embd}-{shape.type}"
    letters = _byte_letters()
    tokens = [*_SPECIALS, *letters]
    tokens += [f"<|{number}|>" for number in range(shape.vocabulary - len(tokens))]
    kinds = [_CONTROL] * len(_SPECIALS) + [_NORMAL] * (shape.vocabulary - len(_SPECIALS))
    return [
        make_scalar("general.architecture", text, "llama"),
        make_scalar("general.name", text, name),
        make_scalar("llama.block_count", whole, shape.layers),
        make_scalar("llama.context_length", whole, shape.context),
        make_scalar("llama.embedding_length", whole, shape.embd),
        make_scalar("llama.feed_forward_length", whole, shape.feed_forward),
        make_scalar("llama.attention.head_count", whole, shape.heads),
        make_scalar("llama.attention.head_count_kv", whole, shape.kv_heads),
        make_scalar("llama.attention.layer_norm_rms_epsilon", real, 1e-5),
        make_scalar("llama.rope.dimension_count", whole, HEAD),
        make_scalar("llama.vocab_size", whole, shape.vocabulary),
        make_scalar("tokenizer.ggml.model", text, "gpt2"),
        make_scalar("tokenizer.ggml.pre", text, "gpt-2"),
        make_array("tokenizer.ggml.tokens", text, tokens),
        make_array("tokenizer.ggml.token_type", ValueType.INT32, kinds),
        make_array("tokenizer.ggml.merges", text, [f"{letters[ord('t')]} {letters[ord('h')]}"]),
        make_scalar("tokenizer.ggml.unknown_token_id", whole, 0),
        make_scalar("tokenizer.ggml.bos_token_id", whole, 1),
        make_scalar("tokenizer.ggml.eos_token_id", whole, _SPECIALS.index("<|end|>")),
        make_scalar("tokenizer.ggml.add_bos_token", ValueType.BOOL, False),
        make_scalar("tokenizer.chat_template", text, _TEMPLATE),
    ]


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
