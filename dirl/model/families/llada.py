"""LLaDA-8B and LLaDA-1.5: Llama with full attention, under names of its own; LLaDA-MoE: Qwen3-MoE with full attention.

Both call themselves model_type "llada"; only `architectures` tells them apart.

Source: LLaDA (arXiv 2502.09992); LLaDA-MoE (arXiv 2509.24389).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.core_model_loading import WeightRenaming

from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.family import Family, register_weight_names


class LLaDAConfig(LlamaConfig):
    """Llama's configuration plus what diffusion needs."""

    model_type = "llada"
    rms_norm_eps: float = 1e-5
    block_size: int = 32  # order of decoding alone: every position reads every other
    mask_token_id: int = 126336
    tokenizer_length: int | None = None  # ids from here on have no token and are never sampled; None: vocab_size
    full_attention: bool = True


class LLaDAMoEConfig(Qwen3MoeConfig):
    """Qwen3-MoE's configuration plus what diffusion needs."""

    model_type = "llada_moe"  # the published "llada" is the dense model's too
    head_dim: int | None = None
    norm_topk_prob: bool = False  # the chosen experts' weights are not made to sum to 1
    block_size: int = 32
    mask_token_id: int = 156895
    tokenizer_length: int | None = None
    full_attention: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class LLaDAModelLM(BlockDiffusionModel, LlamaForCausalLM):
    """Llama that reads masks, everywhere at once."""

    config_class = LLaDAConfig
    confidence = "untempered"


class LLaDAMoEModelLM(BlockDiffusionModel, Qwen3MoeForCausalLM):
    """Qwen3-MoE that reads masks, everywhere at once."""

    config_class = LLaDAMoEConfig
    confidence = "untempered"


def _experts_of_layers(published: Mapping[str, Any]) -> dict[str, Any]:
    """`moe_layer_freq` has a 0 for each layer without experts, or is one number for all."""
    frequency = published.get("moe_layer_freq")
    if not isinstance(frequency, list):
        return {}
    return {"mlp_only_layers": [layer for layer, has_experts in enumerate(frequency) if not has_experts]}


_DECODER = {"unmasking_strategy": "low_confidence_static", "temperature": 0.0, "generation_window": 32}
LLADA = Family(
    name="LLaDA",
    checkpoints="LLaDA-8B-Base/Instruct, LLaDA-1.5",
    model_class=LLaDAModelLM,
    renamed={
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "n_layers": "num_hidden_layers",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
        "weight_tying": "tie_word_embeddings",
    },
    expected={
        "block_type": "llama",
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "include_bias": False,
        "include_qkv_bias": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "alibi": False,
    },
    config_names_mask=True,
    mask_token="<|mdm_mask|>",
    stop_tokens=("<|eot_id|>", "<|endoftext|>"),
    trains_fill=True,
    decoder=_DECODER,
    sft={"noise_level": "sequence"},
    remarks="windows of 16 to 512 tokens by task",
)
LLADA_MOE = Family(
    name="LLaDA-MoE",
    checkpoints="LLaDA-MoE-7B-A1B",
    model_class=LLaDAMoEModelLM,
    renamed={"expert_intermediate_size": "moe_intermediate_size", "dense_intermediate_size": "intermediate_size"},
    expected={
        "moe_router_score_function": "softmax",
        "qk_layernorm": True,
        "shared_expert_intermediate_size": None,
        "partial_rotary_factor": 1,
    },
    derived=_experts_of_layers,
    mask_token="<|mask|>",
    stop_tokens=("<|role_end|>", "<|endoftext|>"),
    trains_fill=True,
    decoder=_DECODER,
    sft={"noise_level": "sequence"},
)

# `ff_out` is the head outside a block and the down projection inside: the longer name comes first.
_BLOCK = r"^model\.transformer\.blocks\.(\d+)\."
_NAMES = {
    _BLOCK + r"attn_norm\.": r"model.layers.\1.input_layernorm.",
    _BLOCK + r"ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
    _BLOCK + r"q_proj\.": r"model.layers.\1.self_attn.q_proj.",
    _BLOCK + r"k_proj\.": r"model.layers.\1.self_attn.k_proj.",
    _BLOCK + r"v_proj\.": r"model.layers.\1.self_attn.v_proj.",
    _BLOCK + r"attn_out\.": r"model.layers.\1.self_attn.o_proj.",
    _BLOCK + r"ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
    _BLOCK + r"up_proj\.": r"model.layers.\1.mlp.up_proj.",
    _BLOCK + r"ff_out\.": r"model.layers.\1.mlp.down_proj.",
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
}
register_weight_names(LLaDAConfig.model_type, *(WeightRenaming(theirs, ours) for theirs, ours in _NAMES.items()))
register_weight_names(LLaDAMoEConfig.model_type)
