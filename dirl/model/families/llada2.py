"""LLaDA2.0 and 2.1, mini and flash: GLM-4-MoE with block-causal attention, under names of its own.

The router takes the sigmoid of its scores, adds each expert's bias for the *choice* alone, keeps the best groups of
experts and then the best experts, and weighs these by their unbiased scores.

Source: LLaDA2.0 (arXiv 2512.15745); LLaDA2.X (github.com/inclusionAI/LLaDA2.X).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.family import Family, register_weight_names


class LLaDA2MoeConfig(Glm4MoeConfig):
    """GLM-4-MoE's configuration plus what block diffusion needs."""

    model_type = "llada2_moe"
    rms_norm_eps: float = 1e-6
    use_qk_norm: bool = True  # the previews' config.json is silent, and their weights have the norms
    block_size: int = 32
    mask_token_id: int = 156895
    tokenizer_length: int | None = None  # ids from here on have no token and are never sampled; None: vocab_size


class LLaDA2MoeModelLM(BlockDiffusionModel, Glm4MoeForCausalLM):
    """GLM-4-MoE that reads masks."""

    config_class = LLaDA2MoeConfig
    confidence = "processed"
    holds_at_threshold = True
    # The router computes in float32 whatever its weight is; only the bias would lose by rounding.
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers[config.first_k_dense_replace :]:
            # Not trained, yet no less part of the weights: as a parameter it is pushed and saved as they are.
            bias = layer.mlp.gate.e_score_correction_bias
            del layer.mlp.gate.e_score_correction_bias
            layer.mlp.gate.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)


class _SplitByHeads(ConversionOps):
    """The fused rows of all queries, all keys and all values -> three tensors."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        (fused,) = input_dict.values()
        fused = fused[0] if isinstance(fused, list) else fused
        config = kwargs["config"]
        heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        parts: tuple[Tensor, ...] = fused.split([number * config.head_dim for number in heads])
        # Copies: of tensors that share one piece of memory, a checkpoint of training would keep only the first.
        return {name: part.clone() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(dim=0)


LLADA2 = Family(
    name="LLaDA2",
    checkpoints="LLaDA2.0-mini/flash, LLaDA2.1-mini/flash",
    model_class=LLaDA2MoeModelLM,
    renamed={
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "use_qkv_bias": "attention_bias",
    },
    expected={
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "use_bias": False,
        "use_qkv_bias": False,
    },
    mask_token="<|mask|>",
    stop_tokens=("<|role_end|>", "<|endoftext|>"),
    trains_fill=True,
    decoder={"confidence_threshold": 0.95, "temperature": 0.0},
    sft={"noise_level": "sequence", "min_noise": 0.3, "max_noise": 0.8, "weight": "even"},
    remarks="2.1 edits what it has revealed where that exceeds 0.9",
)

register_weight_names(
    LLaDA2MoeConfig.model_type,
    WeightRenaming(r"^model\.word_embeddings\.", "model.embed_tokens."),
    WeightRenaming(r"\.attention\.", ".self_attn."),
    WeightConverter("query_key_value", ["q_proj", "k_proj", "v_proj"], [_SplitByHeads()]),
    WeightRenaming(r"\.self_attn\.dense\.", ".self_attn.o_proj."),
    WeightRenaming(r"\.self_attn\.query_layernorm\.", ".self_attn.q_norm."),
    WeightRenaming(r"\.self_attn\.key_layernorm\.", ".self_attn.k_norm."),
    WeightRenaming(r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias"),
)
