"""Which tensors and keys a model of each architecture has (create_tensor calls of llama.cpp's src/models).

A shape is written in letters: E width, Q query values, K key values (of all KV heads), H head, N heads, F feed-forward,
X experts, V vocabulary; numbers stand for themselves. `name` is a weight, `name:b` a bias, `!` a vector around 1.
"""

from dataclasses import dataclass, field

_QKV = "attn_q=E,Q attn_k=E,K attn_v=E,K attn_output=Q,E"
_QKV_BIAS = "attn_q:b=Q attn_k:b=K attn_v:b=K"
_FUSED = "attn_qkv=E,Q+K+K attn_output=Q,E"
_GATED = "ffn_gate=E,F ffn_up=E,F ffn_down=F,E"
_PLAIN_FF = "ffn_up=E,F ffn_down=F,E"
_EXPERTS = "ffn_gate_inp=E,X ffn_gate_exps=E,F,X ffn_up_exps=E,F,X ffn_down_exps=F,E,X"
_SHARED_EXPERT = "ffn_gate_shexp=E,F ffn_up_shexp=E,F ffn_down_shexp=F,E"
_NORMS = "attn_norm!=E ffn_norm!=E"
_NORM_BIASES = "attn_norm:b=E ffn_norm:b=E"
_HEAD_NORMS = "attn_q_norm!=H attn_k_norm!=H"
_POST_NORMS = "post_attention_norm!=E post_ffw_norm!=E"
_LLAMA = f"{_NORMS} {_QKV} {_GATED}"


@dataclass(frozen=True)
class Shape:
    """`layer` and `dense` are the tensors of a layer (`dense`: of the leading dense ones), `ends` those outside."""

    layer: str
    dense: str = ""
    ends: str = ""
    tied: bool = False
    layer_norm: bool = False
    keys: dict = field(default_factory=dict)


_MIXTURE = {"expert_count": 4, "expert_used_count": 2}
_LATENT = (
    "attn_norm!=E ffn_norm!=E attn_q_a=E,32 attn_q_a_norm!=32 attn_q_b=32,N*64 attn_kv_a_mqa=E,96 attn_kv_a_norm!=64 "
    "attn_k_b=32,64,N attn_v_b=64,32,N attn_output=N*32,E"
)

SHAPES = {
    "llama": Shape(_LLAMA),
    "mistral3": Shape(_LLAMA),
    "qwen2": Shape(f"{_LLAMA} {_QKV_BIAS}"),
    "qwen3": Shape(f"{_LLAMA} {_HEAD_NORMS}"),
    "qwen2moe": Shape(
        f"{_NORMS} {_QKV} {_QKV_BIAS} {_EXPERTS} ffn_gate_inp_shexp=E {_SHARED_EXPERT}",
        keys={**_MIXTURE, "expert_feed_forward_length": "F", "expert_shared_feed_forward_length": "F"},
    ),
    "qwen3moe": Shape(
        f"{_NORMS} {_QKV} {_HEAD_NORMS} {_EXPERTS}", keys={**_MIXTURE, "expert_feed_forward_length": "F"}
    ),
    "phi3": Shape(f"{_NORMS} {_FUSED} ffn_up=E,F+F ffn_down=F,E"),
    "gemma": Shape(_LLAMA, tied=True, keys={"attention.key_length": "H", "attention.value_length": "H"}),
    "gemma2": Shape(
        f"{_LLAMA} {_POST_NORMS}",
        tied=True,
        keys={
            "attention.key_length": "H",
            "attention.value_length": "H",
            "attention.sliding_window": 16,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": Shape(
        f"{_LLAMA} {_HEAD_NORMS} {_POST_NORMS}",
        tied=True,
        keys={"attention.key_length": "H", "attention.value_length": "H", "attention.sliding_window": 16},
    ),
    "gpt-oss": Shape(
        f"attn_norm!=E post_attention_norm!=E {_QKV} {_QKV_BIAS} attn_output:b=E attn_sinks=N {_EXPERTS} "
        "ffn_gate_inp:b=X ffn_gate_exps:b=F,X ffn_up_exps:b=F,X ffn_down_exps:b=E,X",
        keys={**_MIXTURE, "expert_feed_forward_length": "F", "attention.sliding_window": 16},
    ),
    "granite": Shape(
        _LLAMA, keys={"embedding_scale": 6.0, "residual_scale": 0.3, "attention.scale": 0.2, "logit_scale": 4.0}
    ),
    "deepseek2": Shape(
        f"{_LATENT} {_EXPERTS} {_SHARED_EXPERT}",
        dense=f"{_LATENT} {_GATED}",
        keys={
            **_MIXTURE,
            "expert_feed_forward_length": "F",
            "expert_shared_count": 1,
            "leading_dense_block_count": 1,
            "attention.q_lora_rank": 32,
            "attention.kv_lora_rank": 64,
            "attention.key_length": 96,
            "attention.value_length": 64,
            "attention.key_length_mla": 64,
            "attention.value_length_mla": 32,
            "rope.dimension_count": 32,
            "attention.head_count_kv": 1,
            "expert_weights_scale": 1.0,
        },
    ),
    "olmo2": Shape(f"{_QKV} attn_q_norm!=Q attn_k_norm!=K {_POST_NORMS} {_GATED}"),
    "starcoder2": Shape(
        f"{_NORMS} {_NORM_BIASES} {_QKV} {_QKV_BIAS} attn_output:b=E {_PLAIN_FF} ffn_up:b=F ffn_down:b=E",
        layer_norm=True,
    ),
    "stablelm": Shape(f"{_NORMS} {_NORM_BIASES} {_QKV} {_GATED}", layer_norm=True),
    "command-r": Shape(f"attn_norm!=E {_QKV} {_GATED}", tied=True, layer_norm=True, keys={"logit_scale": 0.5}),
    "glm4": Shape(f"{_NORMS} {_QKV} {_POST_NORMS} ffn_up=E,F+F ffn_down=F,E"),
    "falcon": Shape(f"attn_norm!=E attn_norm:b=E {_FUSED} {_PLAIN_FF}", layer_norm=True),
    "gpt2": Shape(
        f"{_NORMS} {_NORM_BIASES} {_FUSED} attn_qkv:b=Q+K+K attn_output:b=E {_PLAIN_FF} ffn_up:b=F ffn_down:b=E",
        ends="position_embd=E,C",
        layer_norm=True,
    ),
    "lfm2": Shape(
        f"{_LLAMA} {_HEAD_NORMS}",
        dense=f"{_NORMS} shortconv.conv=3,E shortconv.in_proj=E,E+E+E shortconv.out_proj=E,E {_GATED}",
        ends="token_embd_norm!=E",
        tied=True,
        keys={"shortconv.l_cache": 3},
    ),
}
# Layer norms with a bias of their own at the end; command-r has none.
WITHOUT_OUTPUT_NORM_BIAS = {"command-r"}
WITHOUT_OUTPUT_NORM = {"lfm2"}
