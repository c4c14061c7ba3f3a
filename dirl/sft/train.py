"""Documents -> a model fine-tuned with random masking: the SFT trainer.

Each step draws a global batch of documents, makes one noisy view of every completion block, packs them, and minimises
the NELBO per completion token of the global batch.

Source: DiRL (arXiv 2512.22234), section 3.1, with one noise level per block instead of per sequence by default.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dirl.config import config_to_dict, save_config
from dirl.data.chat import load_tokenizer
from dirl.data.conversations import Document, load_documents
from dirl.data.prompt_stream import PromptStream, fingerprint
from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.noising import NoiseConfig
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.diffusion.views import PackedViews, placeholder_pack
from dirl.errors import UserError
from dirl.model.checkpoint import ModelConfig, load_model, write_final
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.model.lora import LoraConfig, add_adapters
from dirl.model.memory import Workload, trained_fraction
from dirl.model.sdar import BlockDiffusionModel
from dirl.sft.batch import Example, batch_noise_levels, make_example, pack_micro_batches, view_document
from dirl.sft.loss import decile_sums, nelbo_loss
from dirl.show.model_card import finish_model
from dirl.show.pictures import plot_run
from dirl.training.balance import balanced_owners, packed_cost, split_by_budget
from dirl.training.distributed import Distributed
from dirl.training.loop import Run, record_skipped
from dirl.training.optimizer import OPTIMIZER_BYTES, Learner, OptimizerConfig
from dirl.training.run_state import RunConfig
from dirl.training.seeds import stable_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SFTDataConfig:
    """What is imitated."""

    path: str = "task:noisy_sums"  # .json/.jsonl/.parquet, hub id, or task:NAME
    limit: int = 0  # rows read; 0: all
    num_heldout: int = 128  # rows set aside for the held-out loss
    max_length: int = 4096  # tokens of prompt + completion; longer documents are left out and counted
    system_prompt: str = ""
    skip_bad_rows: bool = False
    score_fill: bool = True  # also learn what fills the last block after EOS, so that the decoder ends in few steps

    def __post_init__(self) -> None:
        for key, least in (("limit", 0), ("num_heldout", 0), ("max_length", 1)):
            if getattr(self, key) < least:
                raise UserError(f"{key} must be at least {least}, got {getattr(self, key)}")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig, OptimizerConfig):
    """Everything of an SFT run."""

    output_dir: str = "outputs/sft"
    global_batch_size: int = 64  # documents per optimizer step, over all ranks
    eval_steps: int = 0  # optimizer steps between held-out losses; 0: only at the end
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: SFTDataConfig = field(default_factory=SFTDataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        OptimizerConfig.__post_init__(self)
        if self.global_batch_size < 1:
            raise UserError(f"global_batch_size must be at least 1, got {self.global_batch_size}")


class SFTTrainer:
    """Random-masking SFT. `train()` runs to the end; `step()` is one optimizer step, for notebooks."""

    def __init__(
        self,
        config: SFTConfig,
        *,
        model: BlockDiffusionModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        documents: Sequence[Document] | None = None,
    ) -> None:
        self.config = config
        self.distributed = Distributed(bf16=config.bf16, timeout_seconds=2 * config.phase_timeout)
        self.tokenizer = tokenizer or load_tokenizer(config.model.path)
        self.model = model or load_model(config.model, self.tokenizer)
        self.block_length = self.model.config.block_size
        self.examples, self.heldout, self.rows = self._examples(documents)
        self.stream = PromptStream(
            len(self.examples),
            config.seed,
            fingerprint((e.prompt_ids.tolist(), e.completion_ids.tolist()) for e in self.examples),
        )
        add_adapters(self.model, config.lora, config.seed)
        scorer = PackedScorer(self.model, config.model.attention, config.max_tokens_per_micro_batch)
        self.learner = Learner(scorer, config, self.distributed)
        self.rule = ScoringRule(TokenDistribution(), UnmaskingRule(), suppressed_by(self.model))
        self.learner.on_skip = self._record_skipped
        self.steps_done = 0
        self._drawn: list[int] = []  # indices of the last step's documents

    def train(self) -> Path:
        """Train to max_steps (or from the newest checkpoint on) and write `final/`; returns its path."""
        config, output_dir = self.config, Path(self.config.output_dir)
        with Run(config, config_to_dict(config), self.learner, self.stream, config.max_steps) as run:
            if self.distributed.is_main:
                save_config(config, output_dir / "config.yaml")
            self.steps_done = run.step
            while not run.is_finished:
                run.stop_if_asked()
                with run.timings.phase("step"):
                    metrics = self.step()
                run.step = self.steps_done
                if self.heldout and (run.is_due(config.eval_steps) or run.is_finished):
                    with run.timings.phase("eval"):
                        metrics |= self.evaluate()
                run.save_if_due(metrics)
                metrics |= run.timings.drain()
                metrics["perf/train_tokens_per_s"] = metrics["num_tokens"] / metrics["timing_s/step"]
                run.log(metrics, f"loss {metrics['loss']:.4f}  {metrics['perf/train_tokens_per_s']:.0f} tokens/s")
        final = write_final(
            self.model,
            self.tokenizer,
            output_dir,
            base=config.model.path,
            lora=config.lora,
            is_main=self.distributed.is_main,
        )
        if self.distributed.is_main:
            finish_model(final, output_dir, "sft", config.push_to_hub)
            plot_run(output_dir)
        self.distributed.barrier()
        return final

    def step(self) -> dict[str, float]:
        """One optimizer step over a global batch; its metrics."""
        self._drawn = self.stream.take(self.config.global_batch_size)
        batch = [self.examples[i] for i in self._drawn]
        packs = self._packs(batch, seed=stable_seed(self.config.seed, self.steps_done))
        denominator = float(sum(example.num_scored for example in batch))
        losses = [partial(self._loss, packed, denominator) for packed in packs]
        metrics = self.learner.update(losses, self._empty_loss)
        (metrics["num_tokens"],) = self.distributed.sum(float(sum(map(len, packs))))
        self.steps_done += 1
        return metrics

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out NELBO per token, and cross-entropy per masked token in each tenth of the noise levels.

        The noise is the same at every call, so that curves show the model and not the draw.
        """
        self.learner.module.eval()
        packs = self._packs(self.heldout, seed=stable_seed(self.config.seed, -1))
        filler = placeholder_pack(self.block_length, self.model.config.mask_token_id).to(self.distributed.device)
        total, deciles = 0.0, torch.zeros(10, 2, dtype=torch.float64)
        for index, packed in enumerate(self.distributed.evened(packs, filler)):
            logprob_T = self.learner.module(packed, self.rule).logprob_T
            if index >= len(packs):
                continue
            total += float(nelbo_loss(logprob_T, packed.weight_T, 1.0))
            # w(t) = 1/t (halved for each of a complementary pair), so the weight tells the level.
            level_T = (0.5 if self.config.noise.complementary else 1.0) / packed.weight_T
            deciles += decile_sums(logprob_T, level_T).cpu()
        num_scored = float(sum(example.num_scored for example in self.heldout))
        loss, *flat = self.distributed.sum(total, *deciles.flatten().tolist())
        metrics = {"eval/loss": loss / num_scored}
        for index, (nats, count) in enumerate(torch.tensor(flat).view(10, 2).tolist()):
            if count:
                metrics[f"eval/loss_noise_decile_{index}"] = nats / count
        return metrics

    def _record_skipped(self) -> None:
        mine = self.distributed.share([self.rows[i] for i in self._drawn])
        record_skipped(self.config.output_dir, self.steps_done + 1, list(mine), self.distributed)

    def _loss(self, packed: PackedViews, denominator: float) -> Tensor:
        scores = self.learner.module(packed, self.rule)
        return nelbo_loss(scores.logprob_T, packed.weight_T, denominator)

    def _empty_loss(self) -> Tensor:
        packed = placeholder_pack(self.block_length, self.model.config.mask_token_id)
        return self._loss(packed.to(self.distributed.device), 1.0) * 0.0

    def _packs(self, batch: Sequence[Example], *, seed: int) -> list[PackedViews]:
        """This rank's micro-batches of a global batch."""
        levels = batch_noise_levels(batch, self.config.noise, seed)
        ranks, hidden_size = self.distributed.world_size, self.model.config.hidden_size
        num_views = 2 if self.config.noise.complementary else 1
        lengths = [(len(example.prompt_ids), len(example.completion_ids)) for example in batch]
        costs = [packed_cost(prompt, [(tokens, num_views * tokens)], hidden_size) for prompt, tokens in lengths]
        owners = balanced_owners(costs, [i * ranks // len(batch) for i in range(len(batch))], ranks)
        mine = [i for i, owner in enumerate(owners) if owner == self.distributed.rank]
        return self._local_packs(
            [batch[i] for i in mine], [levels[i] for i in mine], [stable_seed(seed, i) for i in mine]
        )

    def _local_packs(
        self, examples: Sequence[Example], levels: Sequence[Tensor], seeds: Sequence[int]
    ) -> list[PackedViews]:
        mask_token_id, noise = self.model.config.mask_token_id, self.config.noise
        documents = [
            view_document(example, levels_K, mask_token_id, noise=noise, seed=seed)
            for example, levels_K, seed in zip(examples, levels, seeds, strict=True)
        ]
        split: Callable[[Sequence[int]], list[list[int]]] = partial(
            split_by_budget, budget=self.config.max_tokens_per_micro_batch
        )
        packs = pack_micro_batches(documents, self.block_length, split)
        return [packed.to(self.distributed.device) for packed in packs]

    def _examples(self, documents: Sequence[Document] | None) -> tuple[list[Example], list[Example], list[int]]:
        """Training examples, held-out ones (the last of a fixed shuffle), and which documents the former are."""
        data = self.config.data
        if documents is None:
            documents = load_documents(
                data.path,
                self.tokenizer,
                max_length=data.max_length,
                limit=data.limit,
                seed=self.config.seed,
                skip_bad_rows=data.skip_bad_rows,
                system_prompt=data.system_prompt,
            )
        if len(documents) <= data.num_heldout:
            raise UserError(
                f"data.num_heldout={data.num_heldout} leaves none of {len(documents)} documents to train on; lower it"
            )
        pad_id = self.tokenizer.pad_token_id
        fill_id = self.tokenizer.eos_token_id if pad_id is None else pad_id
        examples = [make_example(d, self.block_length, fill_id, score_fill=data.score_fill) for d in documents]
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(self.config.seed)).tolist()
        cut = len(examples) - data.num_heldout
        return [examples[i] for i in order[:cut]], [examples[i] for i in order[cut:]], order[:cut]


def sft_workload(config: SFTConfig) -> Workload:
    """What a memory estimate needs to know of an SFT run."""
    return Workload(
        tokens_per_micro_batch=config.max_tokens_per_micro_batch,
        bf16=config.bf16,
        trained_fraction=trained_fraction(config.model, config.lora),
        optimizer_bytes=OPTIMIZER_BYTES[config.optim],
        offload_optimizer=config.offload_optimizer,
    )
