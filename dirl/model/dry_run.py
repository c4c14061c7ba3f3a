"""A model without numbers -> the bytes that its passes hold in memory, as torch would allocate them.

The model is made of torch's fake tensors, which have shapes and no memory, and its own code runs on them: what autograd
keeps, what autocast copies and what an operation needs for a moment is then counted and not guessed, for every family.
One layer of each kind is run; the others hold what it does.

What cannot run so has a stand-in (`stand_ins.py`).

Shapes: L packed tokens, T actions, D hidden, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dirl.diffusion.distribution import TokenDistribution, sample
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import Actions, TokenTable
from dirl.model.attention import AttentionPlan
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.registry import family_with_config
from dirl.model.logprobs import LOGITS_PER_CHUNK, score_actions
from dirl.model.lora import LoraConfig, add_adapters
from dirl.model.stand_ins import FlexStandIn, HeadStandIn, choose_evenly
from dirl.model.tiled_attention import TiledPlan


class LiveBytes(TorchDispatchMode):
    """Counts, while it is on, the bytes of all memory that operations have made and that is still in use.

    Args:
        known: tensors that are not counted, the weights; copies of them in another precision are counted apart too.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.copies = 0
        self._held = [tensor.untyped_storage() for tensor in known]
        self._known = {id(storage) for storage in self._held}
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        is_copy = func is torch.ops.aten._to_copy.default and id(args[0].untyped_storage()) in self._known
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), is_copy)
        self.peak = max(self.peak, self.now)
        return made

    def _count(self, storage: torch.UntypedStorage, is_copy: bool) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in self._counted:
            return
        self._counted.add(key)
        self._add(size, is_copy)
        weakref.finalize(storage, self._forget, key, size, is_copy)

    def _forget(self, key: int, size: int, is_copy: bool) -> None:
        self._counted.discard(key)
        self._add(-size, is_copy)

    def _add(self, size: int, is_copy: bool) -> None:
        self.now += size
        self.copies += size * is_copy


@dataclass(frozen=True)
class _Span:
    """Bytes in a forward and a backward pass, one after the other."""

    kept: int = 0  # when the forward pass ends, without `copies`
    copies: int = 0  # of weights, which autocast makes and has until the forward pass ends
    forward: int = 0  # at most in the forward pass, beyond both
    stays: int = 0  # when the backward pass begins
    backward: int = 0  # at most in it, beyond that

    def plus(self, other: _Span, bare: _Span, count: int) -> _Span:
        """With so many more layers of a kind; `other` is what one takes, with all that `bare` has."""
        return _Span(
            self.kept + count * (other.kept - bare.kept),
            self.copies + count * (other.copies - bare.copies),
            max(self.forward, other.forward),
            self.stays + count * (other.stays - bare.stays),
            max(self.backward, other.backward),
        )


@dataclass(frozen=True)
class PassBytes:
    """What a pass has in memory beside weights, their gradients and optimizer states; the sum is its peak."""

    activations: int  # kept for the backward pass
    weight_copies: int  # in bfloat16, by autocast
    logits: int  # what scoring takes beyond these
    work: int  # what the layers' operations take beyond all that: a recomputed layer, gradients on their way


class DryModel:
    """A model of fake tensors, as a run has it.

    Args:
        shape: its configuration.
        autocast: forward passes run in bfloat16.
        checkpointing: layers are recomputed in backward.
        on_gpu: with FlexAttention and a head in half precision, as on CUDA; else with SDPA tiles, as elsewhere.
    """

    def __init__(
        self, shape: Any, dtype: torch.dtype, lora: LoraConfig, *, autocast: bool, checkpointing: bool, on_gpu: bool
    ) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._autocast, self.on_gpu = autocast, on_gpu
        with torch.device("meta"):
            model: Any = family_with_config(shape).model_class._from_config(shape, dtype=dtype)
            add_adapters(model, lora, seed=0)
        with self._fake:
            _materialize(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        choose_evenly(model)
        self.model: BlockDiffusionModel = model.train()

    def training(self, tokens: TokenTable, actions: Actions, rule: ScoringRule) -> PassBytes:
        """One micro-batch, forward and backward, where others have left their gradients."""
        plan = FlexStandIn() if self.on_gpu else TiledPlan(tokens)
        with self._fake, self._gradients():
            layers = self._all_layers(plan, len(tokens), has_gradient=True)
            scoring = self._scoring(len(tokens), actions, rule)
        embedding: Any = self.model.get_input_embeddings().weight
        work = [layers.kept + layers.copies + layers.forward, layers.stays + layers.backward]
        work.append(embedding.nbytes if embedding.requires_grad else 0)  # its gradient, when nothing else is left
        scored = max(layers.kept + layers.copies + scoring.forward, layers.stays + scoring.backward)
        return PassBytes(
            activations=layers.kept,
            weight_copies=layers.copies,
            logits=scored - layers.kept - layers.copies,
            work=max(0, max(work) - scored),
        )

    @torch.no_grad()
    def decoding(
        self, num_tokens: int, num_rows: int, distribution: TokenDistribution, *, in_chunks: bool
    ) -> PassBytes:
        """A pass of a decoder's, without what it caches.

        Args:
            num_tokens: that go through the layers.
            num_rows: masked positions, for each of which a token is drawn.
            in_chunks: lm_head is, as drawing always is; else it gives all logits at once.
        """
        with self._fake:
            layers = self._all_layers(FlexStandIn(), num_tokens, has_gradient=False)
            drawing = self._drawing(num_rows, distribution, in_chunks=in_chunks)
        return PassBytes(0, layers.copies, drawing, max(0, layers.kept + layers.forward - drawing))

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Trained weights have gradients, to which others are added."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.grad = None

    def _counter(self, *further: Tensor) -> LiveBytes:
        parameters = [*self.model.parameters()]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return LiveBytes([*parameters, *gradients, *self.model.buffers(), *further])

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._autocast)

    def _all_layers(self, plan: AttentionPlan, num_tokens: int, *, has_gradient: bool) -> _Span:
        """What all layers take; those whose weights have the same shapes take the same."""
        layers: Any = self.model.model.layers
        kinds = [_kind(layer) for layer in layers]
        total = bare = self._layers([], plan, num_tokens, has_gradient=has_gradient)
        for kind, count in Counter(kinds).items():
            span = self._layers([layers[kinds.index(kind)]], plan, num_tokens, has_gradient=has_gradient)
            total = total.plus(span, bare, count)
        return total

    def _layers(
        self, layers: Sequence[nn.Module], plan: AttentionPlan, num_tokens: int, *, has_gradient: bool
    ) -> _Span:
        """What these layers and the last norm take."""
        backbone: Any = self.model.model
        whole, backbone.layers = backbone.layers, nn.ModuleList(layers)
        embedding = backbone.embed_tokens.weight
        position_1L = torch.zeros(1, num_tokens, dtype=torch.int64)
        live = self._counter(position_1L)
        try:
            with live:
                start_1 = embedding.new_empty(1).requires_grad_(has_gradient)
                with self._precision():
                    out_1LD = backbone(
                        inputs_embeds=start_1.expand(1, num_tokens, embedding.shape[1]).clone(),  # nobody else has it
                        position_ids=position_1L,
                        attention_plan=plan,
                        use_cache=False,
                    ).last_hidden_state
                    kept, copies, peak = live.now - live.copies, live.copies, live.peak
                if not has_gradient:
                    return _Span(kept, copies, peak - kept - copies)
                edge, gradient = get_gradient_edge(out_1LD), torch.empty_like(out_1LD)
                before = live.now
                del out_1LD  # scoring takes rows of it
                kept, stays, live.peak = kept - (before - live.now), live.now - gradient.nbytes, live.now
                torch.autograd.backward(edge, gradient)
                return _Span(kept, copies, peak - kept - copies, stays, live.peak - stays)
        finally:
            backbone.layers = whole

    def _scoring(self, num_tokens: int, actions: Actions, rule: ScoringRule) -> _Span:
        """What scoring the actions takes, from the last hidden states on."""
        head = self._head()
        hidden_LD = head.weight.new_empty(num_tokens, head.weight.shape[1]).requires_grad_()
        live = self._counter(hidden_LD, *actions.columns().values(), rule.suppressed_V)
        with live:
            with self._precision():
                loss = score_actions(hidden_LD[actions.index_T], head, actions, rule).logprob_T.sum()
            forward, live.peak = live.peak, live.now
            loss.backward()
        return _Span(forward=forward, backward=live.peak)

    def _drawing(self, num_rows: int, distribution: TokenDistribution, *, in_chunks: bool) -> int:
        """What drawing a token for each row takes, with the rows."""
        head = self._head()
        vocab_size, hidden_size = head.weight.shape
        chunk = min(num_rows, max(1, LOGITS_PER_CHUNK // vocab_size))
        suppressed_V = torch.zeros(vocab_size, dtype=torch.bool)
        live = self._counter(suppressed_V)
        with live, self._precision():
            rows_TD = head.weight.new_empty(num_rows, hidden_size)
            logits_TV = head(rows_TD[: chunk if in_chunks else num_rows])[:chunk]
            tempered_TV = distribution.tempered_logprobs(logits_TV, suppressed_V)
            sampling_TV = distribution.sampling_logprobs(tempered_TV)
            sample(sampling_TV, torch.zeros(chunk, dtype=torch.float64))
        return live.peak

    def _head(self) -> Any:
        head: Any = self.model.lm_head
        return HeadStandIn(head.weight) if self.on_gpu and head.weight.dtype != torch.float32 else head


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    return tuple((name, *p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())


def _materialize(model: nn.Module) -> None:
    """Give parameters and buffers that are on no device fake tensors of the host, in place; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in list(held.items()):
                if old is not None and id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    is_parameter = isinstance(old, nn.Parameter)
                    made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
                if old is not None:
                    held[name] = made[id(old)]  # type: ignore[assignment]
