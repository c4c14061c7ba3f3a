"""The forward pass of every family in plain torch, from the published tensors under their published names.

Written from what the families are said to compute, not from transformers' classes: loops over heads' groups and tokens,
one sequence, no cache. Shapes: L tokens, D hidden, H heads, G key/value heads, E head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from tests.model.published import Checkpoint, Config, Tensors

Mlp = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    before_attention_D: Tensor
    before_mlp_D: Tensor
    query: tuple[Tensor, Tensor | None]  # weight, bias
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    output: Tensor
    mlp: Mlp
    query_norm_E: Tensor | None = None
    key_norm_E: Tensor | None = None


@dataclass(frozen=True)
class Described:
    embedding_VD: Tensor
    layers: list[Layer]
    last_norm_D: Tensor
    head_VD: Tensor
    head_dim: int
    rotary_dim: int
    theta: float
    eps: float


def logits_of(checkpoint: Checkpoint, ids_L: Tensor, may_read_LL: Tensor) -> Tensor:
    """(L, V)."""
    model = _describe(checkpoint)
    hidden_LD = model.embedding_VD[ids_L]
    for layer in model.layers:
        hidden_LD = hidden_LD + _attend(model, layer, _rms(hidden_LD, layer.before_attention_D, model.eps), may_read_LL)
        hidden_LD = hidden_LD + layer.mlp(_rms(hidden_LD, layer.before_mlp_D, model.eps))
    return _rms(hidden_LD, model.last_norm_D, model.eps) @ model.head_VD.T


def block_causal(length: int, block_length: int) -> Tensor:
    block_L = torch.arange(length) // block_length
    return block_L[:, None] >= block_L[None, :]


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _attend(model: Described, layer: Layer, hidden_LD: Tensor, may_read_LL: Tensor) -> Tensor:
    query_LHE, key_LGE, value_LGE = (
        linear(hidden_LD, *part).unflatten(-1, (-1, model.head_dim)) for part in (layer.query, layer.key, layer.value)
    )
    if layer.query_norm_E is not None and layer.key_norm_E is not None:
        query_LHE = _rms(query_LHE, layer.query_norm_E, model.eps)
        key_LGE = _rms(key_LGE, layer.key_norm_E, model.eps)
    query_LHE, key_LGE = _turned(model, query_LHE), _turned(model, key_LGE)
    group = query_LHE.shape[1] // key_LGE.shape[1]
    heads = []
    for head in range(query_LHE.shape[1]):
        score_LL = query_LHE[:, head] @ key_LGE[:, head // group].T / model.head_dim**0.5
        heads.append(score_LL.masked_fill(~may_read_LL, -torch.inf).softmax(-1) @ value_LGE[:, head // group])
    return linear(torch.cat(heads, -1), layer.output)


def _turned(model: Described, x_LHE: Tensor) -> Tensor:
    """Rotary embedding: feature i and i + half are the two of a plane; features from rotary_dim on stay."""
    half = model.rotary_dim // 2
    speed = model.theta ** -(torch.arange(half) * 2 / model.rotary_dim)
    angle = (torch.arange(len(x_LHE))[:, None] * speed)[:, None]
    first, second, rest = x_LHE.split([half, half, x_LHE.shape[-1] - 2 * half], -1)
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat([*turned, rest], -1)


def _describe(checkpoint: Checkpoint) -> Described:
    config, tensors = checkpoint.config, checkpoint.tensors
    architecture = config["architectures"][0]
    if architecture == "LLaDAModelLM":
        return _llada(config, tensors)
    return _llada2(config, tensors) if architecture == "LLaDA2MoeModelLM" else _qwen(config, tensors)


def _gated(tensors: Tensors, gate: str, up: str, down: str) -> Mlp:
    return lambda x: linear(silu(linear(x, tensors[gate])) * linear(x, tensors[up]), tensors[down])


def _mlp(tensors: Tensors, prefix: str) -> Mlp:
    return _gated(tensors, *(f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down")))


def _softmax_experts(config: Config, tensors: Tensors, prefix: str) -> Mlp:
    """The best experts of a softmax; their weights sum to 1 where the config says so, and LLaDA-MoE's does not."""
    chosen = config["num_experts_per_tok"]

    def mlp(x_LD: Tensor) -> Tensor:
        outputs = []
        for x_D in x_LD:
            weight_X = linear(x_D, tensors[f"{prefix}.gate.weight"]).softmax(-1)
            best = weight_X.argsort(descending=True)[:chosen]
            scale = weight_X[best].sum() if config.get("norm_topk_prob", False) else 1.0
            outputs.append(
                sum(weight_X[e] / scale * _mlp(tensors, f"{prefix}.experts.{e}")(x_D) for e in best.tolist())
            )
        return torch.stack(outputs)

    return mlp


def chosen_experts(scores_X: Tensor, bias_X: Tensor, config: Config) -> list[int]:
    """LLaDA2's choice: the best experts within the best groups, both by biased scores."""
    biased = (scores_X + bias_X).tolist()
    size = len(biased) // config["n_group"]
    groups = [list(range(start, start + size)) for start in range(0, len(biased), size)]
    groups.sort(key=lambda group: -sum(sorted((biased[expert] for expert in group), reverse=True)[:2]))
    allowed = [expert for group in groups[: config["topk_group"]] for expert in group]
    return sorted(allowed, key=lambda expert: -biased[expert])[: config["num_experts_per_tok"]]


def _sigmoid_experts(config: Config, tensors: Tensors, prefix: str) -> Mlp:
    shared = _mlp(tensors, f"{prefix}.shared_experts")

    def mlp(x_LD: Tensor) -> Tensor:
        outputs = []
        for x_D in x_LD:
            score_X = linear(x_D, tensors[f"{prefix}.gate.weight"]).sigmoid()
            best = chosen_experts(score_X, tensors[f"{prefix}.gate.expert_bias"], config)
            scale = config["routed_scaling_factor"] / score_X[best].sum()
            experts = {expert: _mlp(tensors, f"{prefix}.experts.{expert}") for expert in best}
            outputs.append(shared(x_D) + sum(score_X[expert] * scale * mlp(x_D) for expert, mlp in experts.items()))
        return torch.stack(outputs)

    return mlp


def _numbers(config: Config, hidden: int, heads: int) -> dict[str, Any]:
    head_dim = config.get("head_dim", hidden // heads)
    return {
        "head_dim": head_dim,
        "rotary_dim": int(head_dim * config.get("partial_rotary_factor", 1)),
        "theta": config["rope_theta"],
        "eps": config["rms_norm_eps"],
    }


def _qwen(config: Config, tensors: Tensors) -> Described:
    layers = []
    for number in range(config["num_hidden_layers"]):
        here = f"model.layers.{number}"
        query, key, value = (
            (
                tensors[f"{here}.self_attn.{name}_proj.weight"],
                tensors.get(f"{here}.self_attn.{name}_proj.bias"),
            )
            for name in "qkv"
        )
        has_experts = f"{here}.mlp.gate.weight" in tensors
        layers.append(
            Layer(
                tensors[f"{here}.input_layernorm.weight"],
                tensors[f"{here}.post_attention_layernorm.weight"],
                query,
                key,
                value,
                tensors[f"{here}.self_attn.o_proj.weight"],
                _softmax_experts(config, tensors, f"{here}.mlp") if has_experts else _mlp(tensors, f"{here}.mlp"),
                tensors.get(f"{here}.self_attn.q_norm.weight"),
                tensors.get(f"{here}.self_attn.k_norm.weight"),
            )
        )
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding)
    numbers = _numbers(config, config["hidden_size"], config["num_attention_heads"])
    return Described(embedding, layers, tensors["model.norm.weight"], head, **numbers)


def _llada(config: Config, tensors: Tensors) -> Described:
    layers = []
    for number in range(config["n_layers"]):
        here = f"model.transformer.blocks.{number}"
        query, key, value = ((tensors[f"{here}.{name}_proj.weight"], None) for name in "qkv")
        layers.append(
            Layer(
                tensors[f"{here}.attn_norm.weight"],
                tensors[f"{here}.ff_norm.weight"],
                query,
                key,
                value,
                tensors[f"{here}.attn_out.weight"],
                _gated(tensors, *(f"{here}.{name}.weight" for name in ("ff_proj", "up_proj", "ff_out"))),
            )
        )
    outer = [tensors[f"model.transformer.{name}.weight"] for name in ("wte", "ln_f", "ff_out")]
    return Described(outer[0], layers, outer[1], outer[2], **_numbers(config, config["d_model"], config["n_heads"]))


def _llada2(config: Config, tensors: Tensors) -> Described:
    layers = []
    heads = [config["num_attention_heads"], config["num_key_value_heads"], config["num_key_value_heads"]]
    for number in range(config["num_hidden_layers"]):
        here = f"model.layers.{number}"
        fused = tensors[f"{here}.attention.query_key_value.weight"]
        query, key, value = ((part, None) for part in fused.split([count * config["head_dim"] for count in heads]))
        is_dense = number < config["first_k_dense_replace"]
        layers.append(
            Layer(
                tensors[f"{here}.input_layernorm.weight"],
                tensors[f"{here}.post_attention_layernorm.weight"],
                query,
                key,
                value,
                tensors[f"{here}.attention.dense.weight"],
                _mlp(tensors, f"{here}.mlp") if is_dense else _sigmoid_experts(config, tensors, f"{here}.mlp"),
                tensors[f"{here}.attention.query_layernorm.weight"],
                tensors[f"{here}.attention.key_layernorm.weight"],
            )
        )
    numbers = _numbers(config, config["hidden_size"], heads[0])
    outer = [tensors[name] for name in ("model.word_embeddings.weight", "model.norm.weight", "lm_head.weight")]
    return Described(outer[0], layers, outer[1], outer[2], **numbers)
