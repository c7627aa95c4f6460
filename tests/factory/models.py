"""Tiny random GGUF models with a working byte-level tokenizer.

`build(path)` writes a model that llama.cpp loads and tokenizes any text with: 256 byte tokens, and a few special ones.
"""

from pathlib import Path

import gguf
import numpy as np

SPECIALS = ("<|unk|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_letters():
    """GPT-2's printable letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    spare = iter(range(256, 512))
    return [letters[byte] if byte in letters else chr(next(spare)) for byte in range(256)]


def add_tokenizer(writer, vocabulary):
    """A byte-level BPE without merges; padded with unused tokens up to `vocabulary`."""
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
    writer.add_chat_template(CHAT_TEMPLATE)
    return len(tokens)


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
    tied=False,
):
    """Write a random model of the Llama shape to `path` and return the path."""
    path = Path(path)
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name(path.stem)
    writer.add_context_length(context)
    writer.add_embedding_length(embd)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(embd // heads)
    vocabulary = add_tokenizer(writer, vocabulary)
    writer.add_vocab_size(vocabulary)

    def tensor(name, *shape, scale=0.1):
        writer.add_tensor(name, (random.standard_normal(shape) * scale).astype(np.float32))

    def ones(name, size):
        writer.add_tensor(name, (1 + 0.1 * random.standard_normal(size)).astype(np.float32))

    head = embd // heads
    tensor("token_embd.weight", vocabulary, embd, scale=1.0)
    ones("output_norm.weight", embd)
    if not tied:
        tensor("output.weight", vocabulary, embd)
    for index in range(layers):
        ones(f"blk.{index}.attn_norm.weight", embd)
        ones(f"blk.{index}.ffn_norm.weight", embd)
        tensor(f"blk.{index}.attn_q.weight", heads * head, embd)
        tensor(f"blk.{index}.attn_k.weight", kv_heads * head, embd)
        tensor(f"blk.{index}.attn_v.weight", kv_heads * head, embd)
        tensor(f"blk.{index}.attn_output.weight", embd, heads * head)
        tensor(f"blk.{index}.ffn_gate.weight", ff, embd)
        tensor(f"blk.{index}.ffn_up.weight", ff, embd)
        tensor(f"blk.{index}.ffn_down.weight", embd, ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
