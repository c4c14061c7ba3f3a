"""What a family of models is, as values: how its published files are read and written back, and how it was trained.

A family's published `config.json` -> the configuration of one of our classes, and back. The file is read as data: code
that a checkpoint brings along (`auto_map`) is never run, and nobody is asked whether it may be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from huggingface_hub.errors import StrictDataclassError
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from dirl.diffusion.distribution import Confidence
from dirl.diffusion.packing import BlockOrigin
from dirl.errors import UserError, one_line
from dirl.model.families.block_diffusion import BlockDiffusionModel

# What a config.json may say about the way of diffusion, under the names our configurations have.
_SCHEME_KEYS = ("block_size", "block_origin", "shift", "full_attention")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture with everything about it that its tensors do not say.

    A model class is called what its checkpoints call it in `architectures[0]`, and its configuration's defaults are the
    family's block length, shift and attention.
    """

    name: str
    checkpoints: str  # that are published in this form, for people
    model_class: type[BlockDiffusionModel]
    renamed: Mapping[str, str] = field(default_factory=dict)  # key of the published config -> key of our configuration
    expected: Mapping[str, Any] = field(default_factory=dict)  # published key -> the one value our class computes
    derived: Callable[[Mapping[str, Any]], Mapping[str, Any]] = (
        lambda published: {}
    )  # further keys of our configuration
    config_names_mask: bool = False  # the published mask_token_id counts; elsewhere the tokenizer's token does
    keeps_published_config: bool = True  # saving repeats the keys that were read; False: it writes transformers' own
    mask_token: str
    stop_tokens: tuple[str, ...]
    trains_fill: bool  # SFT teaches the end-of-text tokens that fill a row up behind an answer
    # Keys of SamplingConfig and NoiseConfig with the values of the published decoder and SFT: the presets `published`.
    decoder: Mapping[str, Any]
    sft: Mapping[str, Any]
    remarks: str = ""  # what of the two these values cannot say, for people

    @property
    def architecture(self) -> str:
        """What `architectures[0]` of its checkpoints says."""
        return self.model_class.__name__

    @property
    def config_class(self) -> Any:
        return self.model_class.config_class

    @property
    def block_length(self) -> int:
        """Of checkpoints that name none."""
        return self.config_class.block_size

    @property
    def shift(self) -> int:
        """1: the row before a position predicts its token; 0: its own row."""
        return getattr(self.config_class, "shift", 0)

    @property
    def confidence(self) -> Confidence:
        """The probability that a step compares: of the distribution drawn from, after temperature only, or before."""
        return self.model_class.confidence

    @property
    def attention(self) -> Literal["block_causal", "full"]:
        return "full" if getattr(self.config_class, "full_attention", False) else "block_causal"

    def read(self, published: Mapping[str, Any]) -> Any:
        """The configuration that a published config.json describes.

        Raises:
            UserError: it asks for something that the family's class does not compute.
        """
        for key, value in {**_EXPECTED, **self.expected}.items():
            if published.get(key, value) != value:
                raise UserError(
                    f"model.path: config.json says {key}={published[key]!r}; of {self.name} only {value!r} is supported"
                )
        ours = {self.renamed.get(key, key): value for key, value in published.items() if key not in _NOT_OURS}
        try:
            config = self.config_class.from_dict({**ours, **self.derived(published)})
        except StrictDataclassError as error:  # a value of another type
            raise UserError(f"model.path: config.json is no {self.name}'s: {one_line(error, 200)}") from error
        for key, is_possible in (
            ("block_size", type(config.block_size) is int and config.block_size > 0),
            ("block_origin", getattr(config, "block_origin", "start") in get_args(BlockOrigin)),
            ("shift", getattr(config, "shift", 0) in (0, 1)),
        ):
            if not is_possible:
                raise UserError(f"model.path: config.json says {key}={getattr(config, key)!r}, which is impossible")
        return config

    def publish(self, config: Any, published: Mapping[str, Any], dtype: str) -> dict[str, Any]:
        """The config.json to save: what was read, and what has changed since.

        Args:
            dtype: of the weights that are saved with it.
        """
        written = {key: value for key, value in published.items() if key != "auto_map"}  # its code is not copied
        written |= {key: dtype for key in ("dtype", "torch_dtype") if key in written}
        before, names = self.read(published), {ours: theirs for theirs, ours in self.renamed.items()}
        for key in _SCHEME_KEYS:
            value = getattr(config, key, None)
            if value != getattr(before, key, None):
                written[names.get(key, key)] = value
        return written


_EXPECTED = {"use_sliding_window": False}  # of every family: blocks read all before them
# Of the file rather than of the model; model_type is our class's own.
_NOT_OURS = ("auto_map", "architectures", "model_type", "transformers_version")


def register_weight_names(model_type: str, *rules: Any) -> None:
    """Tell transformers how a family's tensors are named in its files; it reads and writes them so.

    Experts, which files hold one by one, are stacked as in Qwen3-MoE; without its rules they would be left at random
    values, with a report only.

    Args:
        rules: further WeightRenaming and WeightConverter.
    """
    experts = get_checkpoint_conversion_mapping("qwen3_moe")
    if experts is None:
        raise ImportError("this transformers version has no checkpoint mapping for qwen3_moe; install 5.10 or newer")
    register_checkpoint_conversion_mapping(model_type, [*experts, *rules], overwrite=True)
