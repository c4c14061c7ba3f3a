"""The SFT trainer: reproducible noise, the held-out loss, and learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dirl.data.conversations import Document
from dirl.diffusion.noising import NoiseConfig
from dirl.diffusion.packing import PackedViews
from dirl.model.lora import LoraConfig
from dirl.model.tiny import tiny
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer
from dirl.training.background import BackgroundConfig
from dirl.training.distributed import Distributed
from dirl.training.optimizer import TrainingDiverged

CONFIG = SFTConfig(
    output_dir="unused",
    max_steps=2,
    global_batch_size=6,
    learning_rate=3e-3,
    data=SFTDataConfig(num_heldout=4),
)
DOCUMENTS = [Document([1, 2, 3], list(range(40, 40 + length))) for length in range(9, 25)]


class OneOf(Distributed):
    """A rank of several, without the others."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self._rank, self._world_size = rank, world_size

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


def trainer(config: SFTConfig, documents: Sequence[Document] = DOCUMENTS) -> SFTTrainer:
    model, tokenizer = tiny()
    return SFTTrainer(config, model=model, tokenizer=tokenizer, documents=documents)


def noisy_sequences(packs: Sequence[PackedViews]) -> list[list[int]]:
    """The tokens of every document of some packs, noisy copies included, in any order."""
    tables = [packed.tokens for packed in packs]
    return sorted(t.token_ids_L[t.document_L == d].tolist() for t in tables for d in t.document_L.unique().tolist())


def test_noise_does_not_depend_on_the_number_of_ranks() -> None:
    trained = trainer(CONFIG)
    alone = noisy_sequences(trained._packs(trained.examples(DOCUMENTS), seed=5))
    assert alone == noisy_sequences(trained._packs(trained.examples(DOCUMENTS), seed=5))
    assert alone != noisy_sequences(trained._packs(trained.examples(DOCUMENTS), seed=6))
    for world_size in (2, 5, 20):
        together = []
        for rank in range(world_size):
            trained.distributed = OneOf(rank, world_size)
            together += noisy_sequences(trained._packs(trained.examples(DOCUMENTS), seed=5))
        assert sorted(together) == alone


def test_every_document_is_trained_on_or_held_out() -> None:
    trained = trainer(CONFIG)
    drawn = trained.stream.take(12, trained._fit).documents
    every = [*trained.examples(drawn), *trained.heldout]
    lengths = sorted(len(example.trajectory.prompt_ids) + example.num_scored for example in every)
    assert len(trained.heldout) == 4
    assert lengths == sorted(-(-len(document) // 4) * 4 for document in DOCUMENTS)


def test_texts_are_learned_whole_in_pieces_that_fit() -> None:
    """No prompt, in packs, losses, costs and the held-out evaluation; what is too long is counted."""
    texts = [Document([], list(range(40, 40 + length))) for length in range(5, 45)]
    too_long = [Document([1], [50] * 12) for _ in range(5)]
    data = SFTDataConfig(num_heldout=9, max_length=12)
    trained = trainer(replace(CONFIG, data=data, learning_rate=1e-2), [*texts, *too_long])
    assert all(len(example.trajectory.prompt_ids) == 0 for example in trained.heldout)
    assert all(len(example.trajectory.completion_ids) <= 12 for example in trained.heldout)
    packs: list[PackedViews] = []
    trained.learner.module.register_forward_pre_hook(lambda module, arguments: packs.append(arguments[0]))
    before = trained.evaluate()["eval/loss"]
    packs.clear()
    metrics = [trained.step() for _ in range(30)]
    assert sum(row["documents/too_long"] for row in metrics) > 0
    assert trained.evaluate()["eval/loss"] < 0.8 * before
    first = trained._packs(trained.examples([Document([], list(range(60, 72)))]), seed=0)[0].tokens
    clean = first.view_L == 0
    assert first.token_ids_L[clean].tolist() == list(range(60, 72))
    assert first.position_L[clean].tolist() == list(range(12)) and len(first) == 24


def test_a_document_without_room_in_a_micro_batch_is_left_out_wherever_it_is_met() -> None:
    long = [Document([1, 2, 3], list(range(40, 40 + length))) for length in (60, 200, 61, 300, 62, 301)]
    config = replace(CONFIG, max_tokens_per_micro_batch=100, data=SFTDataConfig(num_heldout=6))
    trained = trainer(config, [*DOCUMENTS[:8], *long])
    assert 0 < len(trained.heldout) < 6
    assert sum(trained.step()["documents/too_long"] for _ in range(4)) > 0
    trained.evaluate()


def test_heldout_documents_that_are_all_too_long_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"list of documents, held out: all 4 documents are longer .*max_length=5"):
        trainer(replace(CONFIG, data=SFTDataConfig(num_heldout=4, max_length=5)))


@pytest.mark.parametrize("complementary", [False, True])
def test_heldout_loss_and_its_deciles(complementary: bool) -> None:
    """Against sums over the masked tokens; the loss of an untrained model is near that of guessing."""
    trained = trainer(replace(CONFIG, noise=NoiseConfig(complementary=complementary)))
    packs: list[PackedViews] = []
    hook = trained.learner.module.register_forward_pre_hook(lambda module, arguments: packs.append(arguments[0]))
    metrics = trained.evaluate()
    hook.remove()
    assert metrics == trained.evaluate()
    total, cells = 0.0, [[0.0, 0] for _ in range(10)]
    for packed in packs:
        with torch.no_grad():
            logprobs = trained.learner.module(packed, trained.rule).logprob_T.tolist()
        for logprob, weight in zip(logprobs, packed.actions.weight_T.tolist(), strict=True):
            total -= logprob * weight
            cell = cells[min(int(10 / (weight * (2 if complementary else 1))), 9)]
            cell[0] -= logprob
            cell[1] += 1
    assert metrics["eval/loss"] == pytest.approx(total / sum(e.num_scored for e in trained.heldout), rel=1e-5)
    deciles = {f"eval/loss_noise_decile_{i}": nats / n for i, (nats, n) in enumerate(cells) if n}
    assert {name: metrics[name] for name in deciles} == pytest.approx(deciles, rel=1e-5)
    assert set(metrics) == {"eval/loss", *deciles}


def test_training_lowers_the_heldout_loss_and_writes_the_run(tmp_path: Path) -> None:
    trained = trainer(replace(CONFIG, output_dir=str(tmp_path), max_steps=15))
    before = trained.evaluate()["eval/loss"]
    final = trained.train()
    assert trained.evaluate()["eval/loss"] < 0.8 * before
    assert (final / "config.json").is_file()
    assert {"config.yaml", "run.json", "metrics.jsonl", "checkpoints"} <= {path.name for path in tmp_path.iterdir()}


def test_a_learning_rate_beyond_reason_ends_in_one_line_and_leaves_no_model(tmp_path: Path) -> None:
    config = replace(CONFIG, output_dir=str(tmp_path / "run"), learning_rate=1e20, max_steps=9)
    with pytest.raises(TrainingDiverged, match="three steps in a row") as error:
        trainer(config).train()
    assert "\n" not in str(error.value) and not (tmp_path / "run/final").exists()


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"data\.num_heldout=4 leaves none of 4 documents"):
        trainer(CONFIG, DOCUMENTS[:4])


@pytest.mark.parametrize("lora", [0, 2])
def test_a_snapshot_is_evaluated_as_the_model_is(lora: int, tmp_path: Path) -> None:
    """By the process of `eval.background`, which has the configuration and the snapshot alone."""
    data = SFTDataConfig(limit=40, num_heldout=6)
    config = replace(CONFIG, output_dir=str(tmp_path / "run"), data=data, lora=LoraConfig(r=lora))
    model, tokenizer = tiny()
    trained = SFTTrainer(config, model=model, tokenizer=tokenizer)
    before = trained.evaluate()
    trained.step()
    trained.write_snapshot(tmp_path / "snapshot")
    found = SFTTrainer.evaluate_snapshot(config, tmp_path / "snapshot")
    assert found == pytest.approx(trained.evaluate(), rel=1e-4 if lora else 0) != before
    with pytest.raises(ValueError, match=r"eval\.background=true has nothing to evaluate on: set data\.num_heldout"):
        replace(config, data=SFTDataConfig(num_heldout=0), eval=BackgroundConfig(background=True))
    with pytest.raises(ValueError, match="by the configuration alone: pass no documents"):
        trainer(replace(config, eval=BackgroundConfig(background=True)))
