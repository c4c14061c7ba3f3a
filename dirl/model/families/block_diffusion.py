"""What every model of the package is: a transformers class whose attention is ours and whose logits are float32.

A family (`sdar.py` and its neighbours) is a thin subclass, `SDARForCausalLM(BlockDiffusionModel, Qwen3ForCausalLM)`.
A plain call, `model(input_ids)`, applies the block mask to clean rows. The packed forward of training hands in
an `attention_plan` of its own; decoding runs the layers itself (`rollout/local/cached_forward.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dirl.diffusion.distribution import Confidence
from dirl.diffusion.packing import DiffusionScheme
from dirl.model.attention import ATTENTION_NAME, AttentionPlan, DensePlan


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of two matrices of any one precision, accumulated and kept in float32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


class _LogitsOfHalfPrecision(torch.autograd.Function):
    """Float32 logits of half-precision hidden states and weights; gradients as nn.Linear's."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_TD, weight_VD)
        return float32_product(hidden_TD, weight_VD.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TD, weight_VD = ctx.saved_tensors
        gradient_TV = gradients[0].to(weight_VD.dtype)
        return gradient_TV @ weight_VD, gradient_TV.T @ hidden_TD


class LogitsHead(nn.Linear):
    """Float32 logits, whatever the weights' precision and autocast: rounding them moves every logprob."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            if self.weight.dtype == torch.float32:
                return super().forward(input.float())
            rows_TD = input.to(self.weight.dtype).flatten(0, -2)
            logits_TV: Tensor = _LogitsOfHalfPrecision.apply(rows_TD, self.weight)
            return logits_TV.unflatten(0, input.shape[:-1])


class BlockDiffusionModel(PreTrainedModel):
    """What all models share; stands before the transformers class in the order of resolution.

    Its configuration has `block_size`, `mask_token_id` and `tokenizer_length` (ids from there on have no token and are
    never sampled; None: `vocab_size`), and where they are not their defaults `shift` (0) and `full_attention` (False).
    """

    if TYPE_CHECKING:  # transformers reads annotations of these names as declarations
        config: Any
        model: Any
        lm_head: LogitsHead

    # What its family's decoder compares with a threshold, and what happens just there (see DiffusionScheme).
    confidence: ClassVar[Confidence] = "tempered"
    holds_at_threshold: ClassVar[bool] = False
    published_config = None  # the config.json it was loaded from, where saving repeats its keys
    # A mixture's experts are computed one by one. transformers asks the source file of a class, or remembers its
    # parent's answer, so that memory would depend on which models were made before.
    _can_set_experts_implementation_cached_value = False

    def __init__(self, config: Any) -> None:
        config._attn_implementation = ATTENTION_NAME
        config.architectures = [type(self).__name__]  # saved alone, the configuration still names its family
        super().__init__(config)
        # Nothing is padded here, and the padding of several families is their end of text, whose row must learn.
        self.model.embed_tokens.padding_idx = None
        self.lm_head.__class__ = LogitsHead  # the same parameter, tied or not

    @property
    def scheme(self) -> DiffusionScheme:
        """What packing and decoding must know of this model."""
        config = self.config
        return DiffusionScheme(
            block_length=0 if getattr(config, "full_attention", False) else config.block_size,
            mask_token_id=config.mask_token_id,
            shift=getattr(config, "shift", 0),
            confidence=self.confidence,
            holds_at_threshold=self.holds_at_threshold,
            block_origin=getattr(config, "block_origin", "start"),
        )

    @property
    def tags(self) -> tuple[str, str]:
        """What the Hub sorts it by: how it diffuses, and its family."""
        return "masked-diffusion" if self.scheme.is_full else "block-diffusion", self.config.model_type

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_plan: AttentionPlan | None = None,
        **kwargs: Any,  # transformers' own forward options
    ) -> Any:
        """Logits under the model's mask, or under `attention_plan` where one is given; a row's are of its own input.

        Args:
            input_ids: (N, L); blocks are aligned to position 0 of each row.
            attention_mask: (N, L), 1 where a token is real; rows are padded on the right.
        """
        if attention_plan is None:
            if input_ids is None:
                raise ValueError("a plain forward pass needs input_ids to build its mask")
            if self.scheme.block_origin != "start":
                raise ValueError("blocks are counted from the end of a prompt: a plain pass needs an attention_plan")
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            block_length = self.scheme.block_length or input_ids.shape[1]
            attention_plan = DensePlan.block_causal(position_ids, is_token.bool(), block_length)
        kwargs["use_cache"] = False  # decoding has its own forward pass and cache
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids, position_ids=position_ids, attention_plan=attention_plan, **kwargs
        )
