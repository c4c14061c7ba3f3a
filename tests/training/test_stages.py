"""Configurations that change on the way: what a stage is, when it begins, and what it may not touch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dirl.config import ConfigError, load_config, save_config
from dirl.data.conversations import Document
from dirl.data.problems import Problem
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer
from dirl.training.stages import stages_of

WARM_UP = [{"from_step": 1, "model.block_length": 8}, {"from_step": 3, "data.max_length": 40, "noise.min_noise": 0.2}]


def even_length(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(len(completion) % 2 == 0) for completion in completions]


def test_a_stage_keeps_what_the_ones_before_it_changed() -> None:
    config = SFTConfig(stages=WARM_UP, data=SFTDataConfig(limit=7), learning_rate=0.5)
    first, second, third = stages_of(config)
    assert first.config is config
    assert [stage.from_step for stage in (first, second, third)] == [0, 1, 3]
    assert (second.config.model.block_length, second.config.data.max_length) == (8, 4096)
    assert (third.config.model.block_length, third.config.data.max_length, third.config.noise.min_noise) == (8, 40, 0.2)
    assert (third.config.data.limit, third.config.learning_rate) == (7, 0.5)
    assert third.changes == {"data.max_length": 40, "noise.min_noise": 0.2}


def test_stages_are_read_and_written_like_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "stages:\n- {from_step: 1, model.block_length: 8}\n"
        "- from_step: 3\n  data: {max_length: 40}\n  noise.complementary: true\n"
    )
    config = load_config(SFTConfig, file)
    assert stages_of(config)[2].changes == {"data.max_length": 40, "noise.complementary": True}
    save_config(config, tmp_path / "again.yaml")
    assert load_config(SFTConfig, tmp_path / "again.yaml") == config
    told = load_config(SFTConfig, file, ["stages=[{from_step: 5, model.block_length: 16}]"])
    assert [dict(entry) for entry in told.stages] == [{"from_step": 5, "model.block_length": 16}]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("[{model.block_length: 8}]", r"stages\[0\]\.from_step must be a whole number above 0, .* got None"),
        ("[{from_step: 0, model.block_length: 8}]", r"stages\[0\]\.from_step must be .* got 0"),
        ("[{from_step: 2, global_batch_size: 8}, {from_step: 2, global_batch_size: 9}]", r"stages\[1\].* above 2"),
        ("[{from_step: 2}]", r"stages\[0\] changes nothing"),
        ("[{from_step: 2, output_dir: x}]", r"stages\[0\]: output_dir cannot change within a run; those that can: mod"),
        ("[{from_step: 2, seed: 3}]", "seed cannot change"),
        ("[{from_step: 2, data.path: x}]", r"data\.path cannot change"),
        ("[{from_step: 2, stages: []}]", "stages cannot change"),
        ("[{from_step: 2, model.block_length: -1}]", r"stages\[0\]: model\.block_length must be at least 0, got -1"),
        ("[{from_step: 2, noise.noise_level: token}]", r"stages\[0\]: noise\.noise_level must be one of block"),
        ("[3]", r"stages\[0\] must be a mapping of keys, got 3"),
    ],
)
def test_impossible_stages_are_one_line(stages: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(SFTConfig, None, [f"stages={stages}"])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("override 'stages=")


def test_rl_stages_are_checked_by_the_whole_configuration() -> None:
    with pytest.raises(ConfigError, match=r"stages\[0\]: rollout\.temperature must be above 0: greedy"):
        load_config(RLConfig, None, ["stages=[{from_step: 2, rollout.temperature: 0}]"])
    blocks = "stages=[{from_step: 2, model.block_length: 8}]"
    assert load_config(RLConfig, None, [blocks]).stages
    for fixed in ("rollout.engine=lmdeploy", "rollout.mode=server"):
        with pytest.raises(ConfigError, match=rf"stages: model\.block_length cannot change with .*{fixed}"):
            load_config(RLConfig, None, [blocks, fixed])
        assert load_config(RLConfig, None, ["stages=[{from_step: 2, rollout.temperature: 0.5}]", fixed]).stages


def sft_trainer(stages: Sequence[Any]) -> SFTTrainer:
    model, tokenizer = tiny()
    config = SFTConfig(
        output_dir="unused", global_batch_size=3, stages=list(stages), data=SFTDataConfig(num_heldout=2, max_length=24)
    )
    documents = [Document([1, 2, 3], list(range(40, 40 + length))) for length in range(9, 20)]
    return SFTTrainer(config, model=model, tokenizer=tokenizer, documents=[*documents, Document([], [7] * 60)])


def test_sft_takes_on_a_stage_when_its_step_comes(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = sft_trainer([*WARM_UP[:1], {"from_step": 2, "data.max_length": 40, "global_batch_size": 5}])
    shapes: list[tuple[int, int]] = []
    trainer.learner.module.register_forward_pre_hook(
        lambda module, arguments: shapes.append(
            (int(arguments[0].tokens.block_L.max()), int(arguments[0].tokens.document_L.max()) + 1)
        )
    )
    lengths = []
    for _ in range(3):
        trainer.step()
        lengths.append((trainer.model.config.block_size, trainer.now.number, trainer._fit.max_length))
    assert lengths == [(4, 0, 24), (8, 1, 24), (8, 2, 40)]
    assert [documents for _, documents in shapes] == [3, 3, 5]
    assert all(example.trajectory.block_length == 8 for example in trainer.heldout)
    trainer.evaluate()
    said = capsys.readouterr().err
    assert "stage 1 of 2 begins at step 1: model.block_length=8" in said
    assert "stage 2 of 2 begins at step 2: data.max_length=40, global_batch_size=5" in said


def test_rl_takes_on_a_stage_and_gives_up_groups_that_wait() -> None:
    model, tokenizer = tiny()
    stage = {"from_step": 1, "model.block_length": 8, "rollout.max_completion_length": 24, "rollout.temperature": 0.5}
    config = RLConfig(
        output_dir="unused",
        stages=[stage],
        rollout=RolloutConfig(prompts_per_step=3, num_generations=4, max_completion_length=12, oversampling=3.0),
        reward=RewardConfig(functions=[f"{__file__}:even_length"]),
    )
    problems = [Problem("?" * length, "0", {}) for length in range(1, 8)]
    trainer = RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)
    trainer.step()
    assert trainer.collector.waiting and trainer.last is not None
    assert max(len(c.token_ids) for group in trainer.last.everyone for c in group.completions) <= 12
    trainer.step()
    assert all(group.sampled_at == 1 for group in trainer.last.everyone)
    completions = [c for group in trainer.last.everyone for c in group.completions]
    assert all((len(c.prompt_ids) + len(c.token_ids)) % 8 == 0 for c in completions)
    assert 12 < max(len(c.token_ids) for c in completions) <= 24
    assert trainer.updater.rule.distribution.temperature == 0.5
