"""LMDeploy 0.18.0 on a CPU, real but for the device: its engine, scheduler, paging, strategies, loops and threads run
as they are, and only CUDA's streams and the kernels below `forward` are replaced.

The stand-in keeps *token ids* in the pages that LMDeploy allocates, where the real cache engine keeps keys and values,
and computes hidden states with dirl's own model from the tokens it finds there. A page that was not written, written
late or handed to somebody else therefore shows in the logits; one that was written with older weights is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dirl.model.attention import DensePlan

GIB = 1 << 30


class CpuModel(nn.Module):
    """What LMDeploy's patched model is to its agent, around a dirl model and a cache of pages of token ids."""

    def __init__(self, hf_config: Any, page_length: int) -> None:
        super().__init__()
        self.inner = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
        self.page_length = page_length
        self.pages = self.written_by = torch.empty(0)
        self.num_loads = 0
        self.num_resets = 0

    def get_model(self) -> CpuModel:
        return self

    def get_logits(self, hidden: Tensor) -> Tensor:
        return self.inner.lm_head(hidden).float()

    def get_input_processor(self) -> None:
        return None

    def reset(self) -> None:
        self.num_resets += 1

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.num_loads += 1
        ours = dict(self.inner.named_parameters())
        for name, tensor in weights:
            ours[name].data.copy_(tensor)

    def read(self, inputs: Any) -> dict[str, Tensor]:
        """Hidden states of the tokens that are new in these inputs; writes them to their pages."""
        contexts, starts = [], []
        new_rows = inputs.input_ids.flatten().split(inputs.seq_length.tolist())
        for new, start, pages in zip(new_rows, inputs.history_lengths.tolist(), inputs.block_offsets, strict=True):
            position = torch.arange(start + len(new))
            slots = pages[position // self.page_length].long() * self.page_length + position % self.page_length
            self.pages.view(-1)[slots[start:]] = new
            self.written_by.view(-1)[slots[start:]] = self.num_loads
            if not bool((self.written_by.view(-1)[slots] == self.num_loads).all()):
                raise RuntimeError("keys of older weights were read")
            contexts.append(self.pages.view(-1)[slots])
            starts.append(start)
        longest = max(map(len, contexts))
        ids = torch.stack([nn.functional.pad(row, (0, longest - len(row))) for row in contexts])
        position_ids = torch.arange(longest).expand_as(ids)
        is_token = torch.stack([torch.arange(longest) < len(row) for row in contexts])
        plan = DensePlan.block_causal(position_ids, is_token, self.inner.config.block_size)
        hidden = self.inner.model(
            input_ids=ids, position_ids=position_ids, attention_plan=plan, use_cache=False
        ).last_hidden_state
        parts = [row[start : len(c)] for row, start, c in zip(hidden, starts, contexts, strict=True)]
        return {"hidden_states": torch.cat(parts)[None], "seq_length": inputs.seq_length}


class Event:
    def record(self, *_: object) -> None: ...
    def wait(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class Stream:
    def wait_event(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


@contextmanager
def cpu_lmdeploy() -> Iterator[pytest.MonkeyPatch]:
    """LMDeploy engines that are built inside run on the CPU; they must be closed inside, too."""
    from lmdeploy.pytorch import envs
    from lmdeploy.pytorch.engine.model_agent import agent as stock

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "stream": lambda *_: nullcontext(),
            "current_stream": Stream,
            "synchronize": lambda *_: None,
            "empty_cache": lambda *_: None,
            "current_device": lambda: torch.device("cpu"),
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
        patch.setattr(envs, "skip_warmup", True)
        patch.setattr(stock, "get_gpu_memory", lambda *_: (GIB, GIB))
        patch.setattr(stock, "_try_to_cuda", to_cpu)
        patch.setattr(stock, "build_patched_model", _build)
        agent = stock.BaseModelAgent
        patch.setattr(agent, "build_cache_plans", _plan)
        patch.setattr(agent, "build_graph_runner", lambda self: None)
        patch.setattr(agent, "build_cache_engine", _allocate_pages)
        patch.setattr(agent, "_forward_impl", lambda self, inputs, cache_inputs=None: self.patched_model.read(inputs))
        yield patch


def to_cpu(value: Any, **_: object) -> Any:
    return value.to_device("cpu") if hasattr(value, "to_device") else value


def _build(model_config: Any, device: object = None, build_model_ctx: object = None) -> CpuModel:
    return CpuModel(model_config.hf_config, model_config.block_size).eval()


def _plan(self: Any, cache_config: object, spec_cache_config: object = None) -> tuple[int, int, int]:
    self._cache_plan_block_nbytes = (1 << 18, 0)
    return 1 << 18, 0, 0


def _allocate_pages(self: Any) -> None:
    """Pages full of a token that no prompt holds: reading one that was not written changes the logits."""
    model = self.patched_model
    shape = (self.cache_config.num_gpu_blocks, model.page_length)
    model.pages = torch.full(shape, model.inner.config.vocab_size - 1, dtype=torch.int64)
    model.written_by = torch.zeros_like(model.pages)
