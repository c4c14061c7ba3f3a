"""Documents -> a model fine-tuned with random masking: the SFT trainer.

Each step takes a global batch of documents, makes one noisy view of every completion block, packs them, and minimises
the NELBO per completion token of the global batch.

Source: DiRL (arXiv 2512.22234), section 3.1, with one noise level per block instead of per sequence by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from dirl.config import bounded
from dirl.data.conversations import Document
from dirl.data.document_source import DocumentSource, JoinedDocuments, ListedDocuments, open_documents
from dirl.data.document_stream import Fit, none_fits
from dirl.data.mixture import document_stream
from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.noising import NoiseConfig
from dirl.diffusion.packing import PackedViews
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.diffusion.views import placeholder_pack
from dirl.errors import UserError
from dirl.model.checkpoint import ModelConfig, load_model, write_final, write_snapshot
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.registry import published_noise
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.model.lora import LoraConfig, add_adapters
from dirl.model.memory import Workload
from dirl.model.model_path import tokenizer_of
from dirl.presets import Presets
from dirl.sft.batch import Example, batch_noise_levels, make_example, pack_micro_batches, packed_tokens, view_document
from dirl.sft.block_starts import count_block_starts, next_token_loss, with_noisy_starts
from dirl.sft.loss import decile_sums, nelbo_loss
from dirl.sft.sft_data import SFTDataConfig, split_documents
from dirl.training.background import BackgroundConfig
from dirl.training.balance import balanced_owners, packed_cost, split_by_budget, whole_cost
from dirl.training.loop import Trainer, TrainingConfig
from dirl.training.optimizer import OPTIMIZER_BYTES, Learner, Loss
from dirl.training.seeds import stable_seed
from dirl.training.stages import RunStage, stages_of


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Everything of an SFT run."""

    CHANGEABLE: ClassVar[tuple[str, ...]] = (
        *("model.block_length", "data.max_length", "data.score_fill", "global_batch_size"),
        *(f"noise.{f.name}" for f in fields(NoiseConfig)),
        "autoregressive_weight",
    )
    PRESETS: ClassVar[Mapping[str, Presets]] = {"noise": published_noise}
    FIXED: ClassVar[tuple[str, ...]] = (
        *("seed", "model.dtype", "model.block_length", "lora", "noise", "autoregressive_weight"),
        *("data.limit", "data.num_heldout", "data.heldout"),
        *("data.max_length", "data.system_prompt", "data.score_fill", "data.fill_window"),
    )

    output_dir: str = "outputs/sft"
    global_batch_size: int = bounded(64, least=1)  # documents per optimizer step, over all ranks
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: SFTDataConfig = field(default_factory=SFTDataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    # weight of next-token prediction from the clean copy, at the first token of each block; 0: none
    autoregressive_weight: float = bounded(0.0, least=0)

    def check(self) -> None:
        stages_of(self)
        if self.eval.background and not self.data.num_heldout and not self.data.heldout:
            raise UserError("eval.background=true has nothing to evaluate on: set data.num_heldout or data.heldout")


class SFTTrainer(Trainer):
    """Random-masking SFT: `step()` is one optimizer step."""

    CONFIG = SFTConfig
    config: SFTConfig
    stage = "sft"

    def __init__(
        self,
        config: SFTConfig,
        *,
        model: BlockDiffusionModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        documents: Sequence[Document] | None = None,
    ) -> None:
        super().__init__(config)
        self.refuse_beside(documents=documents)
        self.tokenizer = tokenizer or tokenizer_of(config.model.path)
        self.model = model or load_model(config.model, self.tokenizer)
        self.tags = self.model.tags
        self._first_block_length = self.model.config.block_size
        if self.model.scheme.is_full and any(stage.config.autoregressive_weight > 0 for stage in stages_of(config)):
            raise UserError("autoregressive_weight is of blocks, and the model of model.path has none; leave it 0")
        starts, scheme = {stage.config.noise.block_start for stage in stages_of(config)}, self.model.scheme
        if "noisy" in starts and (scheme.is_full or not scheme.shift):
            raise UserError("noise.block_start=noisy needs blocks and rows that predict the next token; leave it clean")
        self.documents = JoinedDocuments(self._sources() if documents is None else [ListedDocuments(documents)])
        self.split = split_documents(self.documents, config.data, config.seed)
        weights = [0.0] if documents is not None else [source.weight for source in config.data.all_sources()]
        self.stream = self.source = document_stream(self.documents.sources, self.split.trained, weights, config.seed)
        if config.num_train_epochs and any(source.has_texts for source in self.documents.sources):
            raise UserError("num_train_epochs counts documents, and texts are cut into several; give max_steps instead")
        self.count_steps(sum(map(len, self.split.trained)), "global_batch_size")
        config = self.config
        self.heldout = self._heldout()
        add_adapters(self.model, config.lora, config.seed)
        self.learner = Learner(
            PackedScorer(self.model, config.model.attention, config.max_tokens_per_micro_batch),
            config,
            self.distributed,
            on_micro_batch=self.show_micro_batch,
            on_skip=self.record_skipped,
        )
        self.rule = ScoringRule(TokenDistribution(), UnmaskingRule(), suppressed_by(self.model))
        self._last_taken: list[int] = []  # numbers of the last step's documents

    def step(self) -> dict[str, float]:
        """One optimizer step over a global batch; its metrics."""
        self.enter_stage()
        drawn = self.stream.take(self.config.global_batch_size, self._fit)
        self._last_taken = drawn.indices
        batch = self.examples(drawn.documents)
        is_autoregressive = self.config.autoregressive_weight > 0
        packs = self._packs(batch, seed=stable_seed(self.config.seed, self.steps_done), starts=is_autoregressive)
        num_scored = float(sum(example.num_scored for example in batch))
        num_starts = float(max(count_block_starts(example.trajectory for example in batch), 1))
        losses = [partial(self._loss, packed, num_scored, num_starts) for packed in packs]
        outcome = self.learner.update(losses, self._empty_loss)
        self.steps_done += 1
        metrics = {"documents/too_long": float(drawn.num_too_long), "documents/bad": float(drawn.num_bad)}
        if is_autoregressive:
            metrics["loss_autoregressive"] = outcome.sums.get("next_token", 0.0)
        return outcome.metrics | {"num_tokens": outcome.sums.get("tokens", 0.0)} | metrics

    def begin(self) -> None:
        if self.distributed.is_main and (line := self.split.overlaps.write(self.config.output_dir)):
            self.terminal.say(line)

    def begin_stage(self, stage: RunStage[Any]) -> None:
        self.model.config.block_size = self.config.model.block_length or self._first_block_length
        self.heldout = self._heldout()

    def examples(self, documents: Sequence[Document]) -> list[Example]:
        """Documents, each filled up to the end of its last block."""
        pad_id = self.tokenizer.pad_token_id
        fill_id = self.tokenizer.eos_token_id if pad_id is None else pad_id
        scheme, data = self.model.scheme, self.config.data
        return [
            make_example(document, scheme, fill_id, score_fill=data.score_fill, window=data.fill_window)
            for document in documents
        ]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out NELBO per token, and cross-entropy per masked token in each tenth of the noise levels.

        The noise is the same at every call, so that curves show the model and not the draw.
        """
        self.learner.module.eval()
        noise = replace(self.config.noise, max_noise=1.0, weight="nelbo", block_start="clean")
        packs = self._packs(self.heldout, noise, seed=stable_seed(self.config.seed, -1))
        filler = placeholder_pack(self.model.scheme).to(self.distributed.device)
        total, deciles = 0.0, torch.zeros(10, 2, dtype=torch.float64)
        for index, packed in enumerate(self.distributed.evened(packs, filler)):
            logprob_T = self.learner.module(packed, self.rule).logprob_T
            if index >= len(packs):
                continue
            weight_T = packed.actions.weight_T
            total += float(nelbo_loss(logprob_T, weight_T, 1.0))
            # w(t) = 1/t (halved for each of a complementary pair), so the weight tells the level.
            level_T = (0.5 if noise.complementary else 1.0) / weight_T
            deciles += decile_sums(logprob_T, level_T).cpu()
        num_scored = float(sum(example.num_scored for example in self.heldout))
        loss, *flat = self.distributed.sum(total, *deciles.flatten().tolist())
        metrics = {"eval/loss": loss / num_scored}
        for index, (nats, count) in enumerate(torch.tensor(flat).view(10, 2).tolist()):
            if count:
                metrics[f"eval/loss_noise_decile_{index}"] = nats / count
        return metrics

    def headline(self, metrics: Mapping[str, float]) -> str:
        return f"loss {metrics['loss']:.4f}  {metrics['perf/train_tokens_per_s']:.0f} tokens/s"

    def throughput(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {"perf/train_tokens_per_s": metrics["num_tokens"] / metrics["timing_s/step"]}

    def last_documents(self) -> list[Any]:
        return list(self.distributed.share(self._last_taken))

    def write_final(self) -> Path:
        return write_final(
            self.model,
            self.tokenizer,
            Path(self.config.output_dir),
            base=self.config.model.path,
            lora=self.config.lora,
            is_main=self.distributed.is_main,
        )

    def write_snapshot(self, directory: Path) -> None:
        write_snapshot(self.model, self.tokenizer, directory, is_main=self.distributed.is_main)

    @classmethod
    def evaluate_snapshot(cls, config: SFTConfig, snapshot: Path) -> dict[str, float]:
        model = replace(config.model, path=str(snapshot), dtype="float32")  # adapters are in, and nothing is trained
        return cls(
            replace(
                config,
                output_dir=str(snapshot),
                model=model,
                lora=LoraConfig(),
                bf16=config.bf16 or config.model.dtype == "bfloat16",
                offload_optimizer=False,
                eval=BackgroundConfig(),
            )
        ).evaluate()

    def _loss(self, packed: PackedViews, num_scored: float, num_starts: float) -> Loss:
        logprob_T, weight = self.learner.module(packed, self.rule).logprob_T, self.config.autoregressive_weight
        value = nelbo_loss(logprob_T, packed.actions.weight_T, num_scored)
        sums = {"tokens": torch.full_like(value.detach(), len(packed), dtype=torch.float64)}
        if weight > 0:
            sums["next_token"] = next_token_loss(logprob_T, packed.actions, num_starts)
            value = value + weight * sums["next_token"]
        return Loss(value, len(packed), sums)

    def _empty_loss(self) -> Loss:
        packed = placeholder_pack(self.model.scheme)
        return self._loss(packed.to(self.distributed.device), 1.0, 1.0).nothing()

    def _packs(
        self, batch: Sequence[Example], noise: NoiseConfig | None = None, *, seed: int, starts: bool = False
    ) -> list[PackedViews]:
        """This rank's micro-batches of a global batch; `starts`: with the first tokens of blocks scored too."""
        noise = noise or self.config.noise
        levels = batch_noise_levels(batch, noise, seed)
        ranks, hidden_size = self.distributed.world_size, self.model.config.hidden_size
        num_views = 2 if noise.complementary else 1
        lengths = [(len(e.trajectory.prompt_ids), len(e.trajectory.completion_ids)) for e in batch]
        if self.model.scheme.is_full:
            costs = [whole_cost(prompt + tokens, num_views, hidden_size) for prompt, tokens in lengths]
        else:
            costs = [packed_cost(prompt, [(tokens, num_views * tokens)], hidden_size) for prompt, tokens in lengths]
        owners = balanced_owners(costs, [i * ranks // len(batch) for i in range(len(batch))], ranks)
        mine = [i for i, owner in enumerate(owners) if owner == self.distributed.rank]
        mask_token_id = self.model.config.mask_token_id
        documents = [
            view_document(batch[i], levels[i], mask_token_id, noise=noise, seed=stable_seed(seed, i)) for i in mine
        ]
        split: Callable[[Sequence[int]], list[list[int]]] = partial(
            split_by_budget, budget=self.config.max_tokens_per_micro_batch
        )
        packs = pack_micro_batches(documents, self.model.scheme, split, starts=starts)
        if noise.block_start == "noisy":
            packs = [with_noisy_starts(packed, num_views) for packed in packs]
        return [packed.to(self.distributed.device) for packed in packs]

    @property
    def _fit(self) -> Fit:
        config, block_length = self.config, self.model.scheme.block_length
        num_views = 2 if config.noise.complementary else 1
        size = partial(packed_tokens, scheme=self.model.scheme, num_views=num_views, window=config.data.fill_window)
        return Fit(config.data.max_length, block_length or 1, config.max_tokens_per_micro_batch, size)

    def _sources(self) -> list[DocumentSource]:
        data = self.config.data
        return [
            open_documents(
                source,
                self.tokenizer,
                seed=self.config.seed,
                skip_bad_rows=data.skip_bad_rows,
                system_prompt=data.system_prompt,
            )
            for source in data.all_sources()
        ]

    def _heldout(self) -> list[Example]:
        """The held-out documents that fit."""
        indices = self.split.heldout
        drawn = [document for i in indices if (document := self.documents[i]) is not None]
        fitting = [piece for document in drawn for piece in self._fit.pieces(document)]
        if indices and not fitting:
            raise none_fits(f"{self.documents.name}, held out", len(indices), self._fit)
        return self.examples(fitting)


def sft_workload(config: SFTConfig) -> Workload:
    """What a memory estimate needs to know of an SFT run."""
    return Workload(
        tokens_per_micro_batch=config.max_tokens_per_micro_batch,
        bf16=config.bf16,
        longest=config.data.max_length,
        lora=config.lora,
        optimizer_bytes=OPTIMIZER_BYTES[config.optim],
        offload_optimizer=config.offload_optimizer,
    )
