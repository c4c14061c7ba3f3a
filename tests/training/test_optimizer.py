"""One optimizer step over micro-batches; what happens to gradients that are not finite; bins of documents."""

from __future__ import annotations

import math
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dirl.errors import UserError
from dirl.training.distributed import Distributed
from dirl.training.optimizer import Learner, Loss, OptimizerConfig, TrainingDiverged, parameter_groups


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
        self.vector = nn.Parameter(torch.tensor([4.0, -1.0]))

    def forward(self, scale: float) -> Tensor:
        return scale * (self.matrix.square().sum() + self.vector.square().sum())


def learner(max_grad_norm: float = 0.0, optim: str = "adamw_torch") -> Learner:
    config = OptimizerConfig(
        learning_rate=0.1,
        lr_scheduler_type="linear",
        max_steps=10,
        max_grad_norm=max_grad_norm,
        weight_decay=0.1,
        optim=optim,  # type: ignore[arg-type]
    )
    return Learner(Quadratic(), config, Distributed())


def loss_of(trained: Learner, scale: float) -> Loss:
    value = trained.module(scale)
    return Loss(value, 10, {"scale": torch.tensor(scale)}, {"largest scale": torch.tensor(scale)})


def losses(trained: Learner, *scales: float) -> list[partial[Loss]]:
    return [partial(loss_of, trained, scale) for scale in scales]


def nothing(trained: Learner) -> Loss:
    return loss_of(trained, 1.0).nothing()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_update_is_adamw_on_the_sum_of_losses(optim: str) -> None:
    ours, reference = learner(optim=optim), Quadratic()
    optimizer = torch.optim.AdamW(
        [{"params": [reference.matrix], "weight_decay": 0.1}, {"params": [reference.vector], "weight_decay": 0.0}],
        lr=0.1,
    )
    for step in range(3):
        metrics = ours.update(losses(ours, 0.25, 0.5, 0.25), partial(nothing, ours)).metrics
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1 * (1 - step / 10)
        loss = reference(1.0)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.parameters() if p.grad is not None))
        optimizer.step()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert metrics["learning_rate"] == pytest.approx(0.1 * (1 - step / 10))
    for ours_p, reference_p in zip(ours.module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours_p, reference_p)


def test_a_missing_optimizer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"optim=adamw_bnb_8bit needs .* pip install bitsandbytes"):
        learner(optim="adamw_bnb_8bit")


def test_without_losses_the_rank_still_takes_part() -> None:
    ours = learner()
    assert ours.update([], partial(nothing, ours)).metrics["grad_norm"] == 0.0


def test_what_losses_tell_is_added_up_or_the_largest_is_kept() -> None:
    ours = learner()
    outcome = ours.update(losses(ours, 0.25, -0.5, 0.125), partial(nothing, ours))
    assert (outcome.sums, outcome.largest) == ({"scale": -0.125}, {"largest scale": 0.25})
    assert set(outcome.metrics) == {"loss", "grad_norm", "learning_rate", "skipped_steps"}


def test_a_loss_made_nothing_of_tells_nothing_and_has_a_gradient_of_zero() -> None:
    """What a rank adds that only keeps the others company."""
    ours = learner()
    empty = nothing(ours)
    assert (empty.value.item(), empty.num_tokens, float(empty.sums["scale"])) == (0.0, 0, 0.0)
    assert float(empty.largest["largest scale"]) == -math.inf
    empty.value.backward()
    assert [bool(p.grad.any()) for p in ours.module.parameters() if p.grad is not None] == [False, False]
    outcome = ours.update([*losses(ours, -0.5), partial(nothing, ours)], partial(nothing, ours))
    assert (outcome.sums, outcome.largest) == ({"scale": -0.5}, {"largest scale": -0.5})


def test_only_matrices_are_decayed() -> None:
    module = Quadratic()
    decayed, plain = parameter_groups(module, 0.3)
    assert (decayed["params"], decayed["weight_decay"]) == ([module.matrix], 0.3)
    assert (plain["params"], plain["weight_decay"]) == ([module.vector], 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    ours = learner(max_grad_norm=1.0)
    before = [parameter.clone() for parameter in ours.module.parameters()]
    assert ours.update(losses(ours, 1.0, bad), partial(nothing, ours)).metrics["skipped_steps"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, ours.module.parameters(), strict=True))
    assert not ours.optimizer.state
    assert ours.update(losses(ours, 1.0), partial(nothing, ours)).metrics["skipped_steps"] == 0
    assert not any(torch.equal(a, b) for a, b in zip(before, ours.module.parameters(), strict=True))


def test_three_in_a_row_stop_the_run_and_two_do_not() -> None:
    ours = learner()
    for scale in (math.nan, math.nan, 1.0, math.nan, math.nan):
        ours.update(losses(ours, scale), partial(nothing, ours))
    with pytest.raises(TrainingDiverged, match="three steps in a row"):
        ours.update(losses(ours, math.nan), partial(nothing, ours))


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_steps", 0), ("warmup_steps", -1), ("learning_rate", math.nan), ("lr_scheduler_type", "cosin")],
)
def test_impossible_settings_are_errors(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        OptimizerConfig(**{key: value})  # type: ignore[arg-type]


def test_an_interrupted_step_leaves_nothing_behind() -> None:
    """Ctrl-C in a notebook, then the same cell again."""

    def interrupt() -> Loss:
        raise KeyboardInterrupt

    ends = []
    for is_interrupted in (False, True):
        torch.manual_seed(0)
        module = nn.Linear(2, 1)
        learner = Learner(module, OptimizerConfig(learning_rate=0.1), Distributed())
        loss = lambda learner=learner: Loss(learner.module(torch.ones(1, 2)).sum(), 1)  # noqa: E731
        if is_interrupted:
            with pytest.raises(KeyboardInterrupt):
                learner.update([loss, interrupt], loss)
        metrics = learner.update([loss], loss).metrics
        ends.append((metrics["grad_norm"], module.weight.tolist()))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", ["cosine_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau"])
def test_schedules_that_want_more_are_one_line(name: str) -> None:
    with pytest.raises(UserError, match=rf"^lr_scheduler_(type|kwargs).*{name}"):
        OptimizerConfig(lr_scheduler_type=name)
    with pytest.raises(UserError, match=r"^lr_scheduler_kwargs"):
        OptimizerConfig(lr_scheduler_type="linear", lr_scheduler_kwargs={"min_lr": 0.1})
    OptimizerConfig(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1})


def test_gradients_that_somebody_turned_off_are_turned_on() -> None:
    trained = learner()
    with torch.no_grad():
        outcome = trained.update(losses(trained, 1.0), partial(nothing, trained))
    assert outcome.metrics["grad_norm"] > 0
