"""A configuration -> the memory one rank will need, before any model is loaded.

Weights and optimizer are counted exactly, from the model's config.json alone. Activations, logits and caches follow the
formulas below; what they leave out (allocator slack, communication buffers) is named, not guessed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dirl.errors import UserError, one_line
from dirl.files import is_hub_id
from dirl.model.checkpoint import ModelConfig
from dirl.model.families.registry import family_of, family_with_config, read_published
from dirl.model.logprobs import LOGITS_PER_CHUNK
from dirl.model.lora import LoraConfig, adapted_layers

_GB = 1e9
# How many ranks share weights, gradients and optimizer states: name -> which of the three are divided.
SHARDS: Mapping[str, tuple[bool, bool, bool]] = {
    "ddp": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "zero3": (True, True, True),
    "fsdp2": (True, True, True),
}
# Numbers kept for backward per token and layer without checkpointing, as multiples of hidden size D and of MLP width F:
# inputs of two norms in and out, of attention and of its output (D each), queries, keys, values and their normed and
# rotated forms (3 widths each), and gate, up, their activation and product (F each).
_PER_TOKEN_HIDDEN, _PER_TOKEN_ATTENTION, _PER_TOKEN_MLP = 8, 3, 4


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """An engine that decodes on the trainer's device."""

    name: Literal["torch", "lmdeploy"]
    longest: int  # tokens of the longest prompt with its completion
    batch_size: int  # sequences decoded at once, where their keys and values have room
    max_cached_tokens: int = 0  # torch: the room that was set; 0: half of the free memory decides
    cache_share: float = 0.0  # lmdeploy: part of the free memory that its KV cache takes

    @property
    def needed_tokens(self) -> int:
        """Tokens the KV cache must have room for; what an engine takes because it is free is no need."""
        if self.name == "lmdeploy":
            return 0
        return min(self.batch_size * self.longest, self.max_cached_tokens or self.longest)

    def weight_bytes(self, num_parameters: int, bytes_each: int, *, is_sharded: bool) -> int:
        """LMDeploy has weights of its own, in half precision; torch a copy where the trainer's are sharded."""
        if self.name == "lmdeploy":
            return 2 * num_parameters
        return bytes_each * num_parameters if is_sharded else 0

    def cache_note(self, bytes_per_token: int) -> str:
        """What the KV cache takes beyond its need; empty where that is nothing."""
        if self.name == "lmdeploy":
            return f"lmdeploy's KV cache takes {self.cache_share:g} of what is free when it starts, and is not summed."
        full = self.batch_size * self.longest
        if self.max_cached_tokens or full == self.longest:
            return ""
        return (
            f"torch's KV cache is summed for one sequence; it takes up to half of what is free, and "
            f"{full * bytes_per_token / _GB:.2f} GB hold all {self.batch_size} (rollout.max_cached_tokens bounds it)."
        )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What besides the model decides the memory of a run."""

    tokens_per_micro_batch: int  # packed tokens of one forward pass
    bf16: bool
    trained_fraction: float = 1.0  # of the parameters; LoRA trains few
    optimizer_bytes: float = 8.0  # a trained parameter, beside its float32 master copy where there is one
    num_copies: int = 0  # whole frozen copies: a reference
    critic: Literal["none", "copy", "shared"] = "none"  # trained as the model is; shared: on the model's frozen weights
    engine: EngineLoad | None = None  # None: nothing is decoded here
    offload_optimizer: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank by what they are for."""

    backend: str
    world_size: int
    uses: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.uses.values())

    def line(self) -> str:
        sizes = "  ".join(f"{name} {size / _GB:.2f}" for name, size in self.uses.items())
        return f"{self.backend:6} x{self.world_size}: {self.total / _GB:8.2f} GB a rank  ({sizes})"


def estimate_memory(config: ModelConfig, workload: Workload, backend: str, world_size: int) -> MemoryEstimate:
    """Memory of one rank while it trains and, in turn, rolls out.

    Raises:
        UserError: no readable config.json at model.path.
    """
    shape = _shape(config)
    num_parameters = sum(parameter.numel() for parameter in _outline(shape).parameters())
    weight_bytes, compute_bytes = _bytes_each(config, workload)
    trained = num_parameters * workload.trained_fraction
    has_master = weight_bytes == 2 and backend.startswith("zero")  # DeepSpeed keeps float32 masters of bfloat16 weights
    optimizer = trained * (workload.optimizer_bytes + (4 if has_master else 0))
    gradient_bytes = 4 if has_master else weight_bytes
    shared = [world_size if is_shared else 1 for is_shared in SHARDS[backend]]
    engine, is_sharded = workload.engine, SHARDS[backend][0]
    uses = {
        "weights": num_parameters * weight_bytes / shared[0],
        "gradients": trained * gradient_bytes / shared[1],
        "optimizer": 0.0 if workload.offload_optimizer else optimizer / shared[2],
    }
    return MemoryEstimate(
        backend,
        world_size,
        {
            **uses,
            "critic": _critic_bytes(shape, workload, uses),
            "copies": workload.num_copies * num_parameters * weight_bytes,
            "engine_weights": engine.weight_bytes(num_parameters, weight_bytes, is_sharded=is_sharded) if engine else 0,
            "activations": workload.tokens_per_micro_batch * activation_bytes(shape, config, compute_bytes),
            "logits": 2 * 4 * min(LOGITS_PER_CHUNK, workload.tokens_per_micro_batch * shape.vocab_size),
            "kv_cache": engine.needed_tokens * cache_bytes_per_token(shape, compute_bytes) if engine else 0,
        },
    )


def _critic_bytes(shape: Any, workload: Workload, policy: Mapping[str, float]) -> float:
    """A value model beside the policy: as large, without lm_head, with gradients and optimizer states of its own."""
    if workload.critic == "none":
        return 0.0
    model: Any = _outline(shape)
    share = sum(p.numel() for p in model.model.parameters()) / sum(p.numel() for p in model.parameters())
    weights = policy["weights"] * share if workload.critic == "copy" else 0.0
    is_whole = workload.trained_fraction == 1.0  # adapters are all in what is copied
    return weights + (policy["gradients"] + policy["optimizer"]) * (share if is_whole else 1.0)


def trained_fraction(config: ModelConfig, lora: LoraConfig) -> float:
    """How much of a model the run trains: all of it, or its adapters."""
    if lora.r == 0:
        return 1.0
    model = _outline(_shape(config))
    layers = adapted_layers(model, lora).values()
    adapters = sum(lora.r * (layer.in_features + layer.out_features) for layer in layers)
    return adapters / sum(parameter.numel() for parameter in model.parameters())


def _shape(config: ModelConfig) -> Any:
    if not Path(config.path).is_dir() and not is_hub_id(config.path):
        raise UserError(f"model.path={config.path}: no such directory; give a Hugging Face directory or a hub id")
    try:
        published = read_published(config.path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={config.path}: no readable config.json: {one_line(error, 200)}") from error
    return family_of(published, config.path).read(published)


def _outline(shape: Any) -> nn.Module:
    """The model without a single number in memory."""
    with torch.device("meta"):
        return family_with_config(shape).model_class(shape)


def activation_bytes(shape: Any, config: ModelConfig, compute_bytes: int) -> float:
    """Bytes kept for backward per packed token; with checkpointing, each layer's input and one layer in full."""
    widths = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
    experts = getattr(shape, "moe_intermediate_size", 0) * getattr(shape, "num_experts_per_tok", 0)
    mlp = experts or shape.intermediate_size
    layer = (
        _PER_TOKEN_HIDDEN * shape.hidden_size + _PER_TOKEN_ATTENTION * widths + _PER_TOKEN_MLP * mlp
    ) * compute_bytes
    if config.gradient_checkpointing:
        return shape.num_hidden_layers * shape.hidden_size * compute_bytes + layer
    return shape.num_hidden_layers * layer


def cache_bytes_per_token(shape: Any, bytes_each: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * bytes_each


def free_bytes(device: torch.device) -> int:
    """What a CUDA device, or main memory, could still take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(facts["MemAvailable"].removesuffix("kB")) * 1024
    except (OSError, KeyError):  # no Linux: what there is in all
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_memory(config: ModelConfig, workload: Workload, world_size: int) -> str:
    """One line a backend, for people."""
    lines = [estimate_memory(config, workload, backend, world_size).line() for backend in SHARDS]
    lines.append("Estimates: without allocator slack and communication buffers; add about 10 %.")
    if workload.engine:
        bytes_per_token = cache_bytes_per_token(_shape(config), _bytes_each(config, workload)[1])
        lines.append(workload.engine.cache_note(bytes_per_token))
    return "\n".join(filter(None, lines))


def _bytes_each(config: ModelConfig, workload: Workload) -> tuple[int, int]:
    """Of a weight, and of what a forward pass computes."""
    weight_bytes = 2 if config.dtype == "bfloat16" else 4
    return weight_bytes, 2 if workload.bf16 else weight_bytes
