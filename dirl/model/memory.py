"""A configuration -> the memory one rank will need, before any model is loaded.

All is counted from the model's config.json alone; what a micro-batch and a decoding pass take, in a run without numbers
(`dry_run.py`). What is left out is named.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.errors import UserError, one_line
from dirl.files import is_hub_id
from dirl.model.checkpoint import ModelConfig
from dirl.model.dry_run import DryModel, PassBytes
from dirl.model.families.registry import family_of, read_published
from dirl.model.flex_attention import FLEX_TILE
from dirl.model.lora import LoraConfig
from dirl.model.model_path import find_model
from dirl.model.stand_ins import nominal_actions, nominal_tokens

_UNITS: Mapping[str, float] = {"GB": 1e9, "MB": 1e6}
# How many ranks share weights, gradients and optimizer states: name -> which of the three are divided.
SHARDS: Mapping[str, tuple[bool, bool, bool]] = {
    "ddp": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "zero3": (True, True, True),
    "fsdp2": (True, True, True),
}
# What memory is for -> what it is called for people.
USES: Mapping[str, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states, master weights",
    "critic": "critic: weights, gradients, optimizer",
    "copies": "reference",
    "activations": "T  activations kept for backward",
    "weight_copies": "T  bfloat16 copies of weights (autocast)",
    "logits": "T  logits and what is made of them",
    "work": "T  work of a layer in backward",
    "engine_weights": "weights of the engine's own",
    "kv_cache": "R  KV cache",
    "decoding_copies": "R  bfloat16 copies of weights (autocast)",
    "decoding": "R  a decoding pass and its logits",
}


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """An engine that decodes on the trainer's device."""

    name: Literal["torch", "lmdeploy"]
    longest_prompt: int  # tokens
    longest: int  # tokens of the longest prompt with its completion
    batch_size: int  # sequences decoded at once, where their keys and values have room
    prefill_tokens: int  # of prompts in one pass
    canvas_tokens: int  # full attention: of all canvases in a pass, where max_cached_tokens sets no bound
    window: int  # full attention: positions of a canvas that are drawn at once
    max_cached_tokens: int = 0  # torch: the room that was set; 0: half of the free memory decides
    cache_share: float = 0.0  # lmdeploy: part of the free memory that its KV cache takes
    has_own_weights: bool = False  # torch: a copy, since the trainer's change while it decodes
    sleeps: bool = False  # lmdeploy: gives its weights back while the trainer works

    def num_slots(self, block_length: int) -> int:
        """Sequences that the torch engine decodes at once; without a bound the free memory decides: one is a need."""
        length = _whole_blocks(self.longest, block_length)
        if block_length == 0:
            return min(self.batch_size, max(1, (self.max_cached_tokens or self.canvas_tokens) // length))
        return min(self.batch_size, max(1, self.max_cached_tokens // length))

    def cached_tokens(self, block_length: int) -> int:
        """Tokens the KV cache has room for; what LMDeploy takes because it is free is no need."""
        if self.name == "lmdeploy" or block_length == 0:
            return 0
        return self.num_slots(block_length) * _whole_blocks(self.longest, block_length)

    def passes(self, block_length: int) -> tuple[int, int]:
        """Tokens of the largest pass, and the masked positions of one."""
        if block_length == 0:
            num_rows = self.num_slots(0)
            return num_rows * self.longest, num_rows * self.window
        slots = self.batch_size if self.name == "lmdeploy" else self.num_slots(block_length)
        masked = slots * block_length
        return min(self.prefill_tokens, slots * self.longest_prompt) + 2 * masked, masked

    def note(self, bytes_per_token: int, block_length: int) -> str:
        """What the KV cache takes beyond its need; empty where that is nothing."""
        if self.name == "lmdeploy":
            return f"lmdeploy's KV cache takes {self.cache_share:g} of what is free when it starts, and is not summed."
        full = self.batch_size * _whole_blocks(self.longest, block_length)
        if self.max_cached_tokens or self.batch_size == 1 or block_length == 0:
            return ""
        return (
            f"torch's KV cache is summed for one sequence; it takes up to half of what is free, and "
            f"{full * bytes_per_token / 1e9:.2f} GB hold all {self.batch_size} (rollout.max_cached_tokens bounds it)."
        )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What besides the model decides the memory of a run."""

    tokens_per_micro_batch: int  # packed tokens of one forward pass
    bf16: bool
    longest: int = 0  # tokens of the longest document; 0: as many as a micro-batch
    distribution: TokenDistribution = field(default_factory=TokenDistribution)  # actions are scored under
    has_holds: bool = False  # they are scored as well
    wants_entropy: bool = False  # so is the distribution's entropy
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer_bytes: float = 8.0  # a trained parameter, beside its float32 master copy where there is one
    num_copies: int = 0  # whole frozen copies: a reference
    critic: Literal["none", "copy", "shared"] = "none"  # trained as the model is; shared: on the model's frozen weights
    engine: EngineLoad | None = None  # None: nothing is decoded here
    offload_optimizer: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, each by what they are for (`USES`)."""

    held: Mapping[str, float]  # all the time
    in_training: Mapping[str, float]
    in_rollout: Mapping[str, float]

    @property
    def uses(self) -> Mapping[str, float]:
        return {name: {**self.held, **self.in_training, **self.in_rollout}[name] for name in USES}

    @property
    def training(self) -> float:
        """At most while it trains."""
        return sum(self.held.values()) + sum(self.in_training.values())

    @property
    def rollout(self) -> float:
        """At most while it rolls out."""
        return sum(self.held.values()) + sum(self.in_rollout.values())


@dataclass(frozen=True)
class _Model:
    """Sizes of a model that is trained, or of the part of it that is a critic's own."""

    weights: int  # bytes, adapters included
    trained: int  # numbers
    trained_bytes: int

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter]) -> _Model:
        parameters = list(parameters)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return cls(
            sum(parameter.nbytes for parameter in parameters),
            sum(parameter.numel() for parameter in trained),
            sum(parameter.nbytes for parameter in trained),
        )

    def states(self, workload: Workload, backend: str, world_size: int, *, is_half: bool) -> dict[str, float]:
        """Bytes of its weights, gradients and optimizer states on each rank."""
        is_zero = backend.startswith("zero")
        # DeepSpeed updates float32 copies; only stage 3 takes weights of that precision as they are.
        has_master = is_zero and (is_half or backend != "zero3")
        optimizer = self.trained * (workload.optimizer_bytes + (4 if has_master else 0))
        gradients = 4 * self.trained if is_zero and is_half else self.trained_bytes
        parts = (self.weights, gradients, 0.0 if workload.offload_optimizer else optimizer)
        return {
            name: size / (world_size if is_shared else 1)
            for name, size, is_shared in zip(("weights", "gradients", "optimizer"), parts, SHARDS[backend], strict=True)
        }


class RunMemory:
    """What a run takes, at its largest micro-batch; its passes are counted once for all backends.

    Raises:
        UserError: no readable config.json at model.path, or an architecture without family.
    """

    def __init__(self, config: ModelConfig, workload: Workload) -> None:
        self.workload, self.is_half = workload, config.dtype == "bfloat16"
        shape = read_shape(config)
        self.block_length = 0 if getattr(shape, "full_attention", False) else config.block_length or shape.block_size
        self.cached_token = cache_bytes_per_token(shape, 2 if workload.bf16 or self.is_half else 4)
        dry = DryModel(
            shape,
            getattr(torch, config.dtype),
            workload.lora,
            autocast=workload.bf16,
            checkpointing=config.gradient_checkpointing,
            on_gpu=config.attention != "sdpa",
        )
        base = [parameter for name, parameter in dry.model.named_parameters() if ".lora_" not in name]
        self.base_bytes, self.num_base = sum(p.nbytes for p in base), sum(p.numel() for p in base)
        self.policy = _Model.of(dry.model.parameters())
        is_copied = workload.critic == "copy"
        self.critic = _Model.of(p for p in dry.model.model.parameters() if is_copied or p.requires_grad)
        self.training = self._training(dry, shape.vocab_size)
        self.decoding = PassBytes(0, 0, 0, 0)
        if workload.engine is not None:
            is_torch, (num_tokens, num_rows) = (
                workload.engine.name == "torch",
                workload.engine.passes(self.block_length),
            )
            if not is_torch:  # it has a model of its own
                dry = DryModel(shape, torch.bfloat16, LoraConfig(), autocast=False, checkpointing=False, on_gpu=True)
            self.decoding = dry.decoding(num_tokens, num_rows, workload.distribution, in_chunks=is_torch)

    def under(self, backend: str, world_size: int) -> MemoryEstimate:
        """On one of so many ranks."""
        workload, engine, is_sharded = self.workload, self.workload.engine, SHARDS[backend][0]
        states = self.policy.states(workload, backend, world_size, is_half=self.is_half)
        critic = self.critic.states(workload, backend, world_size, is_half=self.is_half)
        gradients = {"gradients": states.pop("gradients")}
        engine_weights = {"engine_weights": 0.0}
        if engine is not None and (engine.name == "lmdeploy" or is_sharded or engine.has_own_weights):
            engine_weights["engine_weights"] = 2 * self.num_base if engine.name == "lmdeploy" else self.base_bytes
        keeps_gradients = backend.startswith("zero")  # others give theirs back after each step
        sleeps = engine is not None and engine.sleeps
        held = {
            **states,
            "critic": sum(critic.values()) if workload.critic != "none" else 0.0,
            "copies": workload.num_copies * self.base_bytes,
            **(gradients if keeps_gradients else {}),
            **({} if sleeps else engine_weights),
        }
        passed, decoded = self.training, self.decoding
        in_training = {
            "activations": passed.activations,
            "weight_copies": passed.weight_copies,
            "logits": passed.logits,
            "work": passed.work,
        }
        in_rollout = {
            "kv_cache": engine.cached_tokens(self.block_length) * self.cached_token if engine else 0,
            "decoding_copies": 0 if is_sharded else decoded.weight_copies,  # autocast keeps those of trained weights
            "decoding": decoded.logits + decoded.work,
        }
        return MemoryEstimate(
            held,
            {**({} if keeps_gradients else gradients), **in_training},
            {**(engine_weights if sleeps else {}), **in_rollout},
        )

    def _training(self, dry: DryModel, vocab_size: int) -> PassBytes:
        """What a full micro-batch takes; of its tokens half are in views, and of these half are masked."""
        workload, num_tokens = self.workload, self.workload.tokens_per_micro_batch
        if dry.on_gpu:
            num_tokens += -num_tokens % FLEX_TILE
        longest = min(workload.longest or num_tokens, num_tokens)
        num_actions = max(1, num_tokens // (2 if workload.has_holds or self.block_length == 0 else 4))
        actions = nominal_actions(num_actions, self.block_length or longest, has_holds=workload.has_holds)
        nothing_V = torch.zeros(vocab_size, dtype=torch.bool)
        rule = ScoringRule(workload.distribution, UnmaskingRule(), nothing_V, workload.wants_entropy)
        return dry.training(nominal_tokens(num_tokens, longest, self.block_length), actions, rule)


def read_shape(config: ModelConfig) -> Any:
    """The configuration of our class that the checkpoint's config.json describes."""
    directory = find_model(config.path).directory
    if not Path(directory).is_dir() and not is_hub_id(directory):
        raise UserError(f"model.path={config.path}: no such directory; give a Hugging Face directory or a hub id")
    try:
        published = read_published(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={config.path}: no readable config.json: {one_line(error, 200)}") from error
    return family_of(published, config.path).read(published)


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
    """A table for people: one column a backend, one row a use, and the peaks."""
    run = RunMemory(config, workload)
    estimates = {backend: run.under(backend, world_size) for backend in SHARDS}
    rows = {title: [estimate.uses[name] for estimate in estimates.values()] for name, title in USES.items()}
    rows["most while training"] = [estimate.training for estimate in estimates.values()]
    if workload.engine:
        rows["most while rolling out"] = [estimate.rollout for estimate in estimates.values()]
    unit = "GB" if max(rows["most while training"]) >= _UNITS["GB"] else "MB"
    width = max(map(len, rows))
    lines = [f"{f'{unit} a rank, of {world_size}':{width}}" + "".join(f"{backend:>9}" for backend in estimates)]
    for title, sizes in rows.items():
        if any(sizes):
            lines.append(f"{title:{width}}" + "".join(f"{size / _UNITS[unit]:9.2f}" for size in sizes))
    return "\n".join([*lines, *_notes(config, workload, run)])


def _notes(config: ModelConfig, workload: Workload, run: RunMemory) -> Iterator[str]:
    """How the table is to be read, and what it leaves out."""
    tokens = workload.tokens_per_micro_batch
    yield "T: only while training, R: only while rolling out."
    yield f"A micro-batch is counted full: {tokens} tokens, of documents of {min(workload.longest or tokens, tokens)}."
    if config.attention == "sdpa":
        yield "Counted with SDPA tiles and torch's CPU operations, as model.attention=sdpa says."
    else:
        yield "Counted as on a GPU, with FlexAttention; model.attention=sdpa counts the tiles that a CPU computes."
    yield (
        "Left out: the allocator's slack, the CUDA context, buffers of communication (DeepSpeed's buckets, the layers "
        "that zero3 and fsdp2 gather), and that fused kernels take less; add about 10 %."
    )
    if run.is_half and workload.lora.r == 0:
        yield "ddp and fsdp2 refuse to train bfloat16 weights; use model.dtype=float32 with bf16=true there."
    if workload.engine and (note := workload.engine.note(run.cached_token, run.block_length)):
        yield note


def _whole_blocks(length: int, block_length: int) -> int:
    return length + -length % block_length if block_length else length
