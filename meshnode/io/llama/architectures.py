"""What must be known about an architecture before a slice of it may run.

One row a graph builder of llama.cpp, found by reading src/models at the pinned version and held by `meshnode verify`.
An architecture without a row is never guessed at: it is served whole, and said so. Look again at every version bump:
grep src/models for `n_layer()`, `type ==`, `il %`, `load_swa_pattern` and `is_recr_impl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType


class WayIn(StrEnum):
    """How activations enter a slice (design STAGES, "Two ways in")."""

    ROWS = "rows"
    """As embedding rows of the batch."""
    OVERWRITE = "overwrite"
    """Token 0 for every row, and the input tensor is replaced while the graph runs."""


class Recurrence(StrEnum):
    """How a builder tells recurrent layers from attention layers."""

    NONE = "none"
    """It does not: all layers are of one kind."""
    INTERVAL = "interval"
    """`attention.recurrent_layers`, or every k-th layer is attention (`full_attention_interval`)."""
    NO_KV_HEADS = "no_kv_heads"
    """Layers without KV heads are recurrent."""
    NO_KV_HEADS_NO_FF = "no_kv_heads_no_ff"
    """Layers with neither KV heads nor a feed-forward block are recurrent."""


@dataclass(frozen=True)
class Window:
    """Sliding-window layers where the file gives no pattern of its own: position in a `period` decides."""

    period: int = 0
    """0: the builder wants the pattern as an array and has no default."""
    dense_first: bool = False
    """The full-attention layer is the first of a period, not the last."""
    follows_attention: bool = False
    """Every attention layer is windowed, no recurrent one is; there is no pattern to read."""
    always: bool = False
    """Also without the key `attention.sliding_window`."""


@dataclass(frozen=True)
class Architecture:
    """One row of the table: traits of llama.cpp's graph builder of that name."""

    way_in: WayIn = WayIn.ROWS
    tap: str = "l_out"
    """The tensor that leaves a layer."""
    input_tensor: str = "embd"
    """What the overwrite way replaces in later slices; in the first it is always `embd`."""
    window: Window | None = None
    recurrence: Recurrence = Recurrence.NONE
    state_in_every_layer: bool = False
    """Every layer keeps recurrent state."""
    cache: bool = True
    """Layers keep a KV cache."""
    full_layer_needed: bool = False
    """With windows, a slice also needs a layer of full attention (others only need a windowed one)."""
    indexed: bool = False
    """`attention.indexer.types` says which layers look by the indexer of an earlier one."""
    steps: tuple[tuple[int, int], ...] = ()
    """(period, offset): (layer + offset) % period == 0 chooses behaviour and no key says so."""
    counts: tuple[int, ...] = ()
    """Layer counts that choose behaviour: no whole model of such a count is split, no slice has one."""
    input_scale: float | None = None
    """Default of `embedding_scale`, which acts on every input; any such key is written as 1 in later slices."""
    zeroed: tuple[str, ...] = ()
    """Tensors that act on the input: zeros in every slice but the first."""
    whole: str = ""
    """Why this architecture cannot be split; empty when it can."""


PLAIN = Architecture()
_FOUR = Architecture(window=Window(4))
_HYBRID = Architecture(recurrence=Recurrence.NO_KV_HEADS)
_INTERVAL = Architecture(recurrence=Recurrence.INTERVAL)
_RECURRENT = Architecture(state_in_every_layer=True)
_GIVEN = Architecture(window=Window())
_POSITIONS = Architecture(zeroed=("position_embd.weight",))
_AT_EMBEDDING = Architecture(way_in=WayIn.OVERWRITE)
_SCALED = Architecture(way_in=WayIn.OVERWRITE, input_tensor="inp_scaled")

_NEMOTRON_H = Architecture(recurrence=Recurrence.NO_KV_HEADS_NO_FF, tap="nemotron_h_block_out")

_PLAIN_NAMES = (
    "apertus arcee arctic bailingmoe bailingmoe2 bitnet chatglm codeshell command-r dbrx deci deepseek deepseek32 "
    "dots1 ernie4_5 ernie4_5-moe exaone falcon gptneox granite granitemoe grovemoe hunyuan-dense "
    "hunyuan-moe hunyuan_vl hy_v3 internlm2 jais jais2 llama maincoder minimax-m2 minimax-m3 "
    "mistral3 mistral4 nanbeige nemotron olmo olmoe openelm orion paddleocr pangu-embedded phi2 phi3 phimoe plamo "
    "pockettts qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe refact seed_oss stablelm starcoder2 "
    "xverse "
)

_ROWS: dict[str, Architecture] = {
    **dict.fromkeys(_PLAIN_NAMES.split(), PLAIN),
    # Layer counts that choose behaviour.
    "baichuan": Architecture(counts=(32, 40)),  # 32: rotary positions; 40: ALiBi
    "deepseek2": Architecture(counts=(26, 27, 47, 48)),  # other tensors, other routing
    "exaone4": replace(_FOUR, window=None, counts=(64,)),  # 64: sliding windows
    # Sliding windows.
    "gemma2": replace(_SCALED, window=Window(2, always=True), counts=(46,)),  # 46: another attention scale
    "gemma3": replace(_SCALED, window=Window(6), counts=(62,)),  # 62: another attention scale
    "gpt-oss": Architecture(window=Window(2)),
    "cohere2": _FOUR,
    "exaone-moe": _FOUR,
    "mellum": _FOUR,
    "muse-glimmer": replace(_FOUR, way_in=WayIn.OVERWRITE, input_tensor="embd_norm"),
    "olmo2": _FOUR,
    "plamo3": Architecture(window=Window(8)),
    "cohere2moe": Architecture(window=Window(4, dense_first=True)),
    "laguna": Architecture(window=Window(4, dense_first=True)),
    "granite_swa": _GIVEN,
    "maple": _GIVEN,
    "mimo2": _GIVEN,
    "spark2_5": _GIVEN,
    "step35": _GIVEN,
    "dots3note": replace(_GIVEN, full_layer_needed=True, indexed=True),
    "glm-dsa": Architecture(indexed=True),
    # Every fourth layer without rotary positions.
    "smollm3": Architecture(steps=((4, 1),)),
    "afmoe": replace(_FOUR, way_in=WayIn.OVERWRITE, input_tensor="inp_embd_scaled", steps=((4, 1),)),
    "smallthinker": Architecture(window=Window(4, dense_first=True), steps=((4, 0),), counts=(4,)),
    "llama4": Architecture(window=Window(4, always=True), steps=((4, 1),), full_layer_needed=True),
    # Recurrent layers, alone or among attention layers.
    "mamba": replace(_RECURRENT, cache=False),
    "mamba2": replace(_RECURRENT, cache=False),
    "falcon-h1": _RECURRENT,
    "bailingmoe3": _HYBRID,
    "granitehybrid": _HYBRID,
    "jamba": _HYBRID,
    "kimi-linear": _HYBRID,
    "plamo2": replace(_HYBRID, tap="ffn_residual"),
    "lfm2": replace(_HYBRID, window=Window(follows_attention=True)),
    "lfm2moe": replace(_HYBRID, window=Window(follows_attention=True)),
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_moe": _NEMOTRON_H,
    "qwen3next": _INTERVAL,
    "qwen35": _INTERVAL,
    "qwen35moe": _INTERVAL,
    # Something acts on every input.
    "gemma": _SCALED,
    "bloom": replace(_AT_EMBEDDING, input_tensor="inp_norm-0"),
    "minicpm": Architecture(input_scale=12.0),
    "grok": Architecture(input_scale=78.38367176906169),
    "gpt2": _POSITIONS,
    "starcoder": _POSITIONS,
    "mpt": _POSITIONS,
    # Other weights for embedding input, or a refusal of it.
    "cogvlm": _AT_EMBEDDING,
    "glm4": _AT_EMBEDDING,
    "glm4moe": _AT_EMBEDDING,
}

_WHOLE = {
    "a constant of every layer is computed from the number of layers": "minicpm3 minimax-01",
    "every layer needs the tokens or the first activations too": "talkie gemma3n gemma4 deepseek4 qwen4exp",
    "it keeps several residual streams": "hy_v4 glm5-next kimi-k3",
    "its layers run in a loop": "hrm_text",
    "it is a diffusion model: tokens are not made one after the other": "dream llada llada-moe rnd1",
    "it is an encoder": "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert t5 "
    "t5encoder gemma-embedding llama-embed wavtokenizer-dec clip",
    "its layers pass state on beside the activations": "rwkv6 rwkv6qwen2 rwkv7 arwkv7",
    "it is a draft for another model": "eagle3 dflash gemma4-assistant",
    "its output is no text": "qwen3tts",
}

TABLE: Mapping[str, Architecture] = MappingProxyType(
    {
        **_ROWS,
        **{name: Architecture(whole=reason) for reason, names in _WHOLE.items() for name in names.split()},
    }
)
