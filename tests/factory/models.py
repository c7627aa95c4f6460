"""Tiny random GGUF models with a working byte-level tokenizer.

`build(path)` writes a model that llama.cpp loads and tokenizes any text with: 256 byte tokens, and a few special ones.
`quantize` runs llama.cpp's own quantizer on one (in a child process: it is native code).
"""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np

from tests.factory.shapes import SHAPES, WITHOUT_OUTPUT_NORM, WITHOUT_OUTPUT_NORM_BIAS

SPECIALS = ("<|unk|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
# llama_ftype of llama.h, for `quantize`.
FILE_TYPES = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15, "q6_k": 18}
_QUANTIZE = """
import ctypes, sys
from llama_cpp import llama_cpp as api
options = api.llama_model_quantize_default_params()
options.ftype, options.nthread, options.allow_requantize = int(sys.argv[3]), 1, True
sys.exit(api.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
"""


def byte_letters():
    """GPT-2's printable letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    spare = iter(range(256, 512))
    return [letters[byte] if byte in letters else chr(next(spare)) for byte in range(256)]


def add_tokenizer(writer, vocabulary, fim=(), template=""):
    """A byte-level BPE without useful merges; padded with unused tokens up to `vocabulary`."""
    letters = byte_letters()
    tokens = [*SPECIALS, *letters]
    kinds = [gguf.TokenType.CONTROL] * len(SPECIALS) + [gguf.TokenType.NORMAL] * 256
    while len(tokens) < vocabulary:
        tokens.append(f"<|unused{len(tokens)}|>")
        kinds.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{letters[ord('t')]} {letters[ord('h')]}"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(4)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template or CHAT_TEMPLATE)
    for name, token in zip(("pre", "suf", "mid"), fim, strict=False):
        writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", token)
    return len(tokens)


class _Maker:
    """Writes the tensors of one model."""

    def __init__(self, writer, sizes, seed, kind):
        self.writer, self.sizes, self.kind = writer, sizes, TYPES[kind]
        self.random = np.random.default_rng(seed)

    def size(self, text):
        names = {letter: str(value) for letter, value in self.sizes.items()}
        terms = [[int(names.get(factor, factor)) for factor in term.split("*")] for term in text.split("+")]
        return sum(int(np.prod(term)) for term in terms)

    def add_all(self, spec, prefix=""):
        for item in spec.split():
            name, _, shape = item.partition("=")
            self.add(prefix + name, tuple(self.size(part) for part in shape.split(",")))

    def add(self, name, shape, scale=0.1):
        """`shape` is innermost first, as in the GGUF."""
        values = self.random.standard_normal(shape[::-1]).astype(np.float32) * np.float32(scale)
        if name.endswith("!"):
            self.writer.add_tensor(name.removesuffix("!") + ".weight", 1 + values)
        elif name.endswith(":b"):
            self.writer.add_tensor(name.removesuffix(":b") + ".bias", values)
        elif len(shape) == 1 or self.kind == TYPES["f32"] or "gate_inp" in name or "conv" in name:
            self.writer.add_tensor(name + ".weight", values)
        else:
            self.writer.add_tensor(name + ".weight", gguf.quants.quantize(values, self.kind), raw_dtype=self.kind)


def _add_keys(writer, arch, keys, sizes):
    for name, given in keys.items():
        key, value = f"{arch}.{name}", sizes.get(given, given) if isinstance(given, str) else given
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)


def _every_key(sizes, heads, kv_heads, layers, nextn, shape):
    epsilon = "layer_norm_epsilon" if shape.layer_norm else "layer_norm_rms_epsilon"
    every = {
        "context_length": sizes["C"],
        "embedding_length": sizes["E"],
        "block_count": layers + nextn,
        "feed_forward_length": sizes["F"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        f"attention.{epsilon}": 1e-5,
        "rope.dimension_count": sizes["H"],
        "vocab_size": sizes["V"],
    }
    return {**every, "nextn_predict_layers": nextn} if nextn else every


def build(
    path,
    arch="llama",
    *,
    layers=8,
    embd=64,
    heads=4,
    kv_heads=2,
    ff=128,
    vocabulary=512,
    seed=1,
    context=512,
    tied=None,
    kind="f32",
    keys=None,
    nextn=0,
    shards=1,
    fim=(),
    template="",
):
    """Write a random model to `path` and return the path of its (first) file.

    `kind` is the type of its matrices, `keys` more or other keys under the architecture (None leaves one out), `nextn`
    prediction blocks behind the layers, `shards` files, `fim` the tokens before a prefix, a suffix and what is between,
    `template` that of chats.
    """
    path, shape = Path(path), SHAPES[arch]
    if arch == "gpt2":
        kv_heads = heads
    per_file = {"split_max_tensors": -(-(layers + nextn) * 12 // shards)} if shards > 1 else {}
    writer = gguf.GGUFWriter(str(path), arch, **per_file)
    # llama.cpp gives tokens of models with phi in their name a special meaning, and wants them to exist.
    writer.add_name("tiny" if "phi" in path.stem else path.stem)
    vocabulary = add_tokenizer(writer, vocabulary, fim, template)
    head = embd // heads
    sizes = {
        "E": embd,
        "Q": heads * head,
        "K": kv_heads * head,
        "H": head,
        "N": heads,
        "F": ff,
        "X": 4,
        "V": vocabulary,
        "C": context,
    }
    chosen = {**_every_key(sizes, heads, kv_heads, layers, nextn, shape), **shape.keys, **(keys or {})}
    _add_keys(writer, arch, {name: value for name, value in chosen.items() if value is not None}, sizes)
    maker = _Maker(writer, sizes, seed, kind)
    maker.add("token_embd", (embd, vocabulary), scale=1.0)
    if arch not in WITHOUT_OUTPUT_NORM:
        maker.add("output_norm!", (embd,))
    if shape.layer_norm and arch not in WITHOUT_OUTPUT_NORM_BIAS:
        maker.add("output_norm:b", (embd,))
    if not (shape.tied if tied is None else tied):
        maker.add("output", (embd, vocabulary))
    maker.add_all(shape.ends)
    kv = chosen["attention.head_count_kv"]
    for index in range(layers + nextn):
        without = isinstance(kv, list) and kv[index] == 0
        lead = index < chosen.get("leading_dense_block_count", 0)
        maker.add_all(shape.dense if without or lead else shape.layer, f"blk.{index}.")
        if index >= layers:
            maker.add_all("nextn.eh_proj=E+E,E nextn.enorm!=E nextn.hnorm!=E", f"blk.{index}.")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if shards == 1 else next(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def quantize(source, target, kind):
    """Quantize a model with llama.cpp's own quantizer; `kind` is a key of FILE_TYPES."""
    command = [sys.executable, "-c", _QUANTIZE, str(source), str(target), str(FILE_TYPES[kind])]
    subprocess.run(command, check=True, capture_output=True)
    return Path(target)
