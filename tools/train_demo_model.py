"""Train the embedded demonstration model and write it as GGUF: meshnode/demo/meshnode-demo.gguf and demo.json.

A Llama-shaped transformer of 1.7 million weights learns docs/GLOSSARY.md by heart. It is a demonstration and a
test oracle: its right answers are known word for word, and it is taught to be wrong as soon as one of its layers is
missing, doubled or out of place, so a split that corrupts what it carries is seen at once.

Needs an environment of its own (not the project's): pip install torch==2.13.* tokenizers==0.23.* gguf numpy
    python tools/train_demo_model.py --out meshnode/demo
Takes about 15 minutes on one CPU core and 1 GB. Everything is seeded: the same torch build on the same kind of CPU
gives the same file. Exit code 1 if an expected answer is not reproduced or its smallest margin is below 1.0.
"""

import argparse
import hashlib
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from demo_corpus import DEMO_TERM, Corpus, canonical, expected_answers, glossary
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

SEED = 20261120
ENDOFTEXT, SYSTEM, USER, ASSISTANT, END = "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (ENDOFTEXT, SYSTEM, USER, ASSISTANT, END)
ROLE = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}

# One line per message; any role that is neither system-like nor assistant counts as a user's. No loop state, no errors.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role in ('system', 'developer') -%}<|system|>"
    "{%- elif message.role == 'assistant' -%}<|assistant|>"
    "{%- else -%}<|user|>{%- endif -%}"
    "{{- message.content -}}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

Batch = tuple[Tensor, Tensor, Tensor]  # token ids, targets, document numbers; each [rows, length]
Orders = list[list[int]]  # for each row of a batch, the layers in the order in which they run

IGNORED = -100  # cross_entropy's mark for a position that teaches nothing
WRONG = 3.0  # nats: the right token has at most one chance in 20
MARGIN = 1.0  # logits; measured in llama.cpp: flash attention or other chunks move one by 0.02, q8_0 KV by 0.18


@dataclass(frozen=True)
class Shape:
    """Widths are multiples of 32, so that q8_0 fits weights, KV heads and wire; 2 KV heads for 4 heads exercise GQA."""

    vocab: int = 1024
    layers: int = 10
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head: int = 32
    ffn: int = 256
    context: int = 2048
    rope_base: float = 10000.0
    norm_eps: float = 1e-5


class Norm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.width))
        self.eps = shape.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv = shape.kv_heads * shape.head
        self.attn_norm, self.ffn_norm = Norm(shape), Norm(shape)
        self.q = nn.Linear(shape.width, shape.heads * shape.head, bias=False)
        self.k = nn.Linear(shape.width, kv, bias=False)
        self.v = nn.Linear(shape.width, kv, bias=False)
        self.o = nn.Linear(shape.heads * shape.head, shape.width, bias=False)
        self.gate = nn.Linear(shape.width, shape.ffn, bias=False)
        self.up = nn.Linear(shape.width, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        h = self.attn_norm(x)
        q, k, v = (layer(h).view(b, t, -1, self.shape.head).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v, attn_mask=mask, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """RoPE over neighbouring pairs, as llama.cpp's LLAMA architecture does it: no permutation at export."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = turn
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embd = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape)
        self.output = nn.Linear(shape.width, shape.vocab, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # No smaller start for what goes into the residual: every layer shall matter from the first step on.
                nn.init.normal_(weight, std=0.5 if name == "embd.weight" else weight.shape[1] ** -0.5)

    def forward(self, ids: Tensor, document: Tensor, orders: Orders | None = None) -> Tensor:
        """ids, document: [batch, length] -> normed hidden state. A row sees only earlier rows of its own document.

        orders: for each row of the batch the layers to run, when they are not all in their places.
        """
        length = ids.shape[1]
        rate = self.shape.rope_base ** (-torch.arange(0, self.shape.head, 2) / self.shape.head)
        angle = torch.outer(torch.arange(length), rate)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = (causal & (document[:, :, None] == document[:, None, :]))[:, None]
        turn = torch.stack((angle.cos(), angle.sin()))
        x = self.embd(ids)
        if orders is None:
            for block in self.blocks:
                x = block(x, turn, mask)
            return self.norm(x)
        for step in range(max(map(len, orders))):
            alike: dict[int | None, list[int]] = {}
            for row, order in enumerate(orders):
                alike.setdefault(order[step] if step < len(order) else None, []).append(row)
            parts = [
                x[rows] if layer is None else self.blocks[layer](x[rows], turn, mask[rows])
                for layer, rows in alike.items()
            ]
            x = torch.cat(parts)[torch.tensor([row for rows in alike.values() for row in rows]).argsort()]
        return self.norm(x)


def train_tokenizer(shape: Shape) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(Corpus(random.Random(SEED)).tokenizer_texts(), trainer)
    if tokenizer.get_vocab_size() != shape.vocab:
        raise SystemExit(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {shape.vocab}")
    return tokenizer


class Packer:
    """Fills rows of a batch with whole documents: (ids, targets, document numbers), each [rows, length]."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self._tokenizer, self.rng, self.corpus = tokenizer, rng, Corpus(rng)
        self.special = {name: tokenizer.token_to_id(name) for name in SPECIAL}

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def prompt(self, question: str) -> list[int]:
        """What the chat template makes of one user message."""
        return [self.special[USER], *self.encode(question), self.special[END], self.special[ASSISTANT]]

    def junk(self, length: int) -> list[int]:
        """Tokens without meaning, as a system message: teaches the model to look past whatever stands before."""
        ordinary = [self.rng.randrange(len(SPECIAL), self._tokenizer.get_vocab_size()) for _ in range(length)]
        return [self.special[SYSTEM], *ordinary, self.special[END]]

    def document(self, limit: int) -> tuple[list[int], list[bool]]:
        """(token ids, which of them must be predicted), at most `limit` long."""
        rng = self.rng
        if rng.random() < 0.06:
            ids = [*self.encode(self.corpus.plain()), self.special[ENDOFTEXT]]
            # The first words of a definition say which one it is; before them nothing can be known.
            return ids[:limit], ([False] * 4 + [True] * (len(ids) - 4))[:limit]
        ids, taught = [], []
        if rng.random() < 0.06:
            ids = self.junk(rng.randrange(1, max(2, limit - 100)))
            taught = [False] * len(ids)
        turns = 1 if rng.random() < 0.7 else rng.randrange(2, 4 + limit // 64)
        for turn in self.corpus.conversation(turns):
            words = [*self.encode(turn.text), self.special[END]]
            ids += [self.special[ROLE[turn.role]], *words]
            taught += [False] + [turn.role == "assistant"] * len(words)
        return ids[:limit], taught[:limit]

    def batch(self, rows: int, length: int) -> Batch:
        ids = np.zeros((rows, length + 1), dtype=np.int64)
        targets = np.full((rows, length + 1), IGNORED, dtype=np.int64)
        documents = np.zeros((rows, length + 1), dtype=np.int64)
        for row in range(rows):
            start, number = 0, 0
            while start < length:
                words, taught = self.document(length + 1 - start)
                end = start + len(words)
                ids[row, start:end] = words
                targets[row, start:end] = np.where(taught, words, IGNORED)
                documents[row, start:end] = number
                start, number = end, number + 1
        # The first token of the next document must not be predicted from the end of this one: never taught, see above.
        return torch.from_numpy(ids[:, :-1]), torch.from_numpy(targets[:, 1:]), torch.from_numpy(documents[:, :-1])


def broken_orders(layers: int) -> dict[str, list[int]]:
    """What a wrong split could do: leave a layer out, run one twice, run two neighbours in the wrong order."""
    orders = {}
    for i in range(layers):
        orders[f"without {i}"] = [*range(i), *range(i + 1, layers)]
        orders[f"twice {i}"] = [*range(i + 1), *range(i, layers)]
        if i + 1 < layers:
            orders[f"swapped {i},{i + 1}"] = [*range(i), i + 1, i, *range(i + 2, layers)]
    return orders


def token_losses(model: Model, batch: Batch, orders: Orders | None = None) -> Tensor:
    """Cross entropy in nats of each taught token; logits are made for those only, about half of the rows."""
    ids, targets, documents = batch
    wanted = targets.flatten()
    here = (wanted != IGNORED).nonzero()[:, 0]
    hidden = model(ids, documents, orders).flatten(0, 1).index_select(0, here)
    return F.cross_entropy(model.output(hidden), wanted[here], reduction="none")


def loss_of(model: Model, packer: Packer, orders: Orders, long: bool) -> tuple[Tensor, Tensor]:
    """(loss of the model as it is, what it still knows when its layers run in a broken order).

    Left to itself such a model learns the corpus in its first layers, and the later ones could be lost unnoticed. So it
    is taught to be wrong, by up to WRONG nats a token, as soon as any layer is missing, doubled or misplaced.
    """
    right = token_losses(model, packer.batch(3, 1024) if long else packer.batch(12, 256))
    broken = token_losses(model, packer.batch(len(orders), 80), orders)
    return right.mean(), F.relu(WRONG - broken).mean()


def train(model: Model, packer: Packer, steps: int) -> None:
    """AdamW with warm-up and cosine decay over batches of 3,072 tokens."""
    peak, warm = 3e-3, 40
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    orders = list(broken_orders(model.shape.layers).values())
    began = time.monotonic()
    for step in range(steps):
        rate = peak * min((step + 1) / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Every eighth batch holds long documents, up to half the context; the same number of tokens each.
        right, broken = loss_of(model, packer, orders, long=step % 8 == 7)
        optimizer.zero_grad()
        (right + broken).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            seconds = time.monotonic() - began
            print(f"step {step:5d}  loss {right.item():.4f}  broken {broken.item():.3f}  {seconds:6.0f} s", flush=True)


def margins(model: Model, packer: Packer, question: str, answer: str, order: list[int] | None = None) -> Tensor:
    """Logit of each right token minus the best wrong one, along one answer with its <|end|>; negative where it errs."""
    prompt = packer.prompt(question)
    words = [*packer.encode(answer), packer.special[END]]
    ids = torch.tensor([prompt + words])
    logits = model.output(model(ids, torch.zeros_like(ids), order and [order])[0, len(prompt) - 1 : -1])
    right = torch.tensor(words)[:, None]
    return logits.gather(1, right)[:, 0] - logits.scatter(1, right, -torch.inf).max(dim=1).values


@torch.no_grad()
def examine(model: Model, packer: Packer) -> float:
    """Print smallest margins, recall, and what survives a broken split; returns the smallest margin of all."""
    expected = expected_answers()
    worst = {question: margins(model, packer, question, answer).min().item() for question, answer in expected.items()}
    for question, margin in sorted(worst.items(), key=lambda item: item[1])[:5]:
        print(f"margin {margin:6.2f}  {question}")
    asked = [packer.corpus.question() for _ in range(1000)]
    wrong = [question for question, answer in asked if margins(model, packer, question, answer).min() <= 0]
    print(f"other wordings answered right: {len(asked) - len(wrong)} of {len(asked)}; not: {wrong[:10]}")
    orders = broken_orders(model.shape.layers)
    surviving = {
        name: sum(margins(model, packer, *item, order).min().item() > 0 for item in expected.items())
        for name, order in orders.items()
    }
    found = max(surviving, key=surviving.__getitem__)
    print(f"{len(orders)} broken layer orders: at most {surviving[found]} of {len(expected)} answers survive ({found})")
    return min(worst.values())


def write_gguf(model: Model, tokenizer: Tokenizer, path: Path) -> None:
    """F16 matrices and F32 norms: the only rounding is the one that `examine` has seen."""
    shape = model.shape
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("meshnode-demo")
    out.add_description("Knows the glossary of meshnode by heart; a demonstration and a test oracle")
    out.add_license("Apache-2.0")
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    out.add_block_count(shape.layers)
    out.add_context_length(shape.context)
    out.add_embedding_length(shape.width)
    out.add_feed_forward_length(shape.ffn)
    out.add_head_count(shape.heads)
    out.add_head_count_kv(shape.kv_heads)
    out.add_rope_dimension_count(shape.head)
    out.add_rope_freq_base(shape.rope_base)
    out.add_layer_norm_rms_eps(shape.norm_eps)
    out.add_vocab_size(shape.vocab)
    state = json.loads(tokenizer.to_str())["model"]
    words = sorted(state["vocab"], key=state["vocab"].__getitem__)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(words)
    out.add_token_types([gguf.TokenType.CONTROL if word in SPECIAL else gguf.TokenType.NORMAL for word in words])
    out.add_token_merges([" ".join(pair) for pair in state["merges"]])
    out.add_bos_token_id(words.index(ENDOFTEXT))
    out.add_eos_token_id(words.index(END))
    out.add_eot_token_id(words.index(END))
    out.add_pad_token_id(words.index(ENDOFTEXT))
    out.add_add_bos_token(False)
    out.add_chat_template(CHAT_TEMPLATE)
    parts = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    parts |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    for name, weight in model.state_dict().items():
        place = "output_norm.weight" if name == "norm.weight" else name
        place = place.replace("embd.", "token_embd.").replace("blocks.", "blk.")
        place = ".".join(parts.get(word, word) for word in place.split("."))
        out.add_tensor(place, weight.numpy().astype(np.float16 if weight.ndim == 2 else np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, help="folder for meshnode-demo.gguf and demo.json")
    arguments.add_argument("--steps", type=int, default=800, help="training steps, about 1.1 s each on one core")
    given = arguments.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # sums in one order: the same file every time
    shape = Shape()
    tokenizer = train_tokenizer(shape)
    model, packer = Model(shape), Packer(tokenizer, random.Random(SEED))
    train(model, packer, given.steps)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data = weight.data.half().float()
    margin = examine(model, packer)
    path = given.out / "meshnode-demo.gguf"
    write_gguf(model, tokenizer, path)
    record = {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "question": canonical(DEMO_TERM, glossary()[DEMO_TERM]),
        "smallest_margin": round(margin, 2),
        "answers": expected_answers(),
    }
    (given.out / "demo.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size} bytes, smallest margin {margin:.2f}")
    return 0 if margin >= MARGIN else 1


if __name__ == "__main__":
    sys.exit(main())
