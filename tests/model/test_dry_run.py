"""What a run without numbers counts, against what the same model with numbers really allocates."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dirl.data.chat import load_tokenizer
from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import PackedViews, ViewedDocument, pack
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.diffusion.views import replay_views
from dirl.model.checkpoint import ModelConfig
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.registry import family_of
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.model.lora import LoraConfig, add_adapters
from dirl.model.memory import EngineLoad, RunMemory, Workload
from dirl.model.stand_ins import FlexStandIn
from dirl.rollout.engine import EngineConfig, SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from tests.model.published import MASK_ID, PUBLISHED, write_tokenizer

# Large enough that what grows with tokens, width and depth outweighs the rest; keys of all families' config.json.
LARGER = {
    **dict.fromkeys(("hidden_size", "d_model"), 96),
    **dict.fromkeys(("intermediate_size", "mlp_hidden_size", "dense_intermediate_size"), 256),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), 4),
    "moe_layer_freq": [1, 1, 0, 1],
    "block_size": 8,
}


def larger(name: str, path: Path) -> dict[str, Any]:
    """A family's config.json, with larger numbers, in a directory without weights."""
    published = PUBLISHED[name]().config
    config = published | {key: value for key, value in LARGER.items() if key in published}
    (path / "config.json").write_text(json.dumps(config))
    return config


def made(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> BlockDiffusionModel:
    torch.manual_seed(0)
    family = family_of(config, "")
    shape = family.read(config)
    shape.mask_token_id = MASK_ID
    model: Any = family.model_class._from_config(shape, dtype=dtype)
    return model.train()


def packed_for(model: BlockDiffusionModel, lengths: tuple[int, ...]) -> PackedViews:
    """Documents of these lengths, each block decoded in two steps."""
    scheme, documents = model.scheme, []
    for length in lengths:
        ids = torch.arange(length) % 80
        step_map = 1 + torch.arange(length - 16) % 2
        trajectory = Trajectory(ids[:16], ids[16:], step_map, scheme.block_length)
        documents.append(ViewedDocument(ids[:16], [replay_views(trajectory, scheme.mask_token_id)]))
    return pack(documents, scheme.block_length, scheme.shift)


class Alive(TorchDispatchMode):
    """The most bytes of storages at once, made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        inputs = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for storage in (x.untyped_storage() for x in tree_leaves(made) if isinstance(x, torch.Tensor)):
            if id(storage) not in self.sizes and id(storage) not in inputs:
                self.sizes[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, id(storage), None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return made


def second_micro_batch(model: BlockDiffusionModel, packed: PackedViews, rule: ScoringRule, *, bf16: bool) -> int:
    """Bytes at the peak of a forward and backward pass to whose gradients another has added before."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    scorer = PackedScorer(model, "sdpa", len(packed))
    scorer.forward = torch.autocast("cpu", torch.bfloat16, enabled=bf16)(scorer.forward)  # as a trainer does
    with Alive() as alive:
        scorer(packed, rule).logprob_T.sum().backward()
    return alive.peak


MODES = {
    "float32": {},
    "autocast": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "autocast, checkpointing": {"bf16": True, "gradient_checkpointing": True},
    "half, checkpointing": {"bf16": True, "dtype": "bfloat16", "gradient_checkpointing": True},
    "adapters": {"bf16": True, "r": 4},
}


def ratio(name: str, mode: dict[str, Any], path: Path, **more: Any) -> float:
    """What is counted over what is allocated."""
    mode, config = dict(mode), larger(name, path)
    bf16, lora = mode.pop("bf16", False), LoraConfig(r=mode.pop("r", 0))
    settings = ModelConfig(path=str(path), attention="sdpa", **mode)
    model = made(config, getattr(torch, settings.dtype))
    add_adapters(model, lora, seed=0)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packed = packed_for(model, (128, 160, 160))
    packed = packed if more.get("has_holds") else packed.reveals_only()
    work = Workload(tokens_per_micro_batch=len(packed), bf16=bf16, longest=160, lora=lora, **more)
    rule = ScoringRule(work.distribution, UnmaskingRule(), suppressed_by(model), work.wants_entropy)
    uses = RunMemory(settings, work).under("ddp", 1).uses
    measured = second_micro_batch(model, packed, rule, bf16=bf16)
    return sum(uses[use] for use in ("activations", "weight_copies", "logits", "work")) / measured


OFTEN = "autocast, checkpointing"
CASES = [(name, mode) for name in PUBLISHED for mode in (MODES if name == "sdar" else ("float32", OFTEN))]


@pytest.mark.parametrize(
    ("name", "mode"), [pytest.param(*case, marks=[] if case[1] == OFTEN else pytest.mark.slow) for case in CASES]
)
def test_a_micro_batch_takes_what_is_counted(name: str, mode: str, tmp_path: Path) -> None:
    if mode == "adapters":
        pytest.importorskip("peft")
    torch.manual_seed(0)  # a mixture's memory depends on how evenly its router spreads the tokens
    assert 0.9 < ratio(name, MODES[mode], tmp_path) < 1.1


@pytest.mark.parametrize("name", ["sdar", "dream"])
def test_a_head_is_scored_in_chunks_and_with_holds_and_entropy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("dirl.model.logprobs", "dirl.model.dry_run"):
        monkeypatch.setattr(f"{module}.LOGITS_PER_CHUNK", 100 * 100)
    more = {"has_holds": True, "wants_entropy": True, "distribution": TokenDistribution(0.7, top_k=20)}
    assert 0.9 < ratio(name, MODES[OFTEN], tmp_path, **more) < 1.1


@pytest.mark.parametrize(("name", "low", "high"), [("llada", 0.9, 1.1), ("sdar", 0.85, 1.2)])
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rollout_takes_what_is_counted(name: str, low: float, high: float, bf16: bool, tmp_path: Path) -> None:
    """Canvases are counted as they are; of a pass over a cache, the layers without its bookkeeping."""
    write_tokenizer(PUBLISHED[name](), tmp_path)
    model = made(larger(name, tmp_path))
    autocast = torch.bfloat16 if bf16 else None
    engine = TorchEngine(model, load_tokenizer(str(tmp_path)), EngineConfig(max_cached_tokens=1024), autocast=autocast)
    prompts = [[*range(first, first + 64)] for first in range(8)]
    sampling = SamplingConfig(max_completion_length=64, denoising_steps=4)
    with Alive() as alive:
        engine.generate(prompts, sampling, list(range(8)))
    load = EngineLoad(
        name="torch",
        longest_prompt=64,
        longest=128,
        batch_size=8,
        max_cached_tokens=1024,
        prefill_tokens=1024,
        canvas_tokens=1024,
        window=32,
    )
    work = Workload(tokens_per_micro_batch=256, bf16=bf16, engine=load)
    counted = RunMemory(ModelConfig(path=str(tmp_path)), work).under("ddp", 1).in_rollout
    assert low < sum(counted.values()) / alive.peak < high


def test_what_stands_in_for_flex_attention_keeps_what_a_fused_kernel_keeps() -> None:
    def kept(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
        query, key, value = (torch.randn(1, 4, 32, 16, requires_grad=True) for _ in range(3))
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            attend(query, key, value)
        return sum(sizes.values())

    fused = kept(torch.nn.functional.scaled_dot_product_attention)
    assert kept(lambda *inputs: FlexStandIn().attend(*inputs, 1.0)) == fused == 4 * 4 * 32 * (4 * 16 + 1)
