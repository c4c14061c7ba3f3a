"""Gradient of a packed step == sum of the gradients of its documents by brute force, to 1e-5 of its norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dirl.data.conversations import Document
from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.noising import NoiseConfig, draw_noise_levels
from dirl.diffusion.packing import DiffusionScheme, ViewedDocument, pack
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.diffusion.views import noisy_views
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.logprobs import ActionScores, PackedScorer, suppressed_by
from dirl.rl.actions import PolicyBatch
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.policy_loss import policy_loss
from dirl.rollout.engine import SamplingConfig
from dirl.sft.batch import batch_noise_levels, view_document
from dirl.sft.loss import nelbo_loss
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer
from dirl.training.seeds import stable_seed
from tests.oracle import brute_force_actions, brute_force_logprobs, sharp_tiny_model, state_logits
from tests.parity.packs import group_of_completions, packed, replayed

SAMPLING = {
    "dynamic": SamplingConfig(confidence_threshold=0.1, max_completion_length=12),
    "static": SamplingConfig(
        unmasking_strategy="low_confidence_static",
        denoising_steps=2,
        max_completion_length=12,
        temperature=0.8,
        top_k=30,
    ),
}


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """All parameters' gradients in one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def assert_same_gradient(found: Tensor, expected: Tensor) -> None:
    assert float(expected.norm()) > 1e-3
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("block_length", [2, 4])
def test_sum_of_logprobs(block_length: int, shared: bool) -> None:
    sampling = SAMPLING["dynamic"]
    model, groups = group_of_completions(sampling, block_length)
    pack_ = packed(groups, model, shared=shared).reveals_only()
    found = gradient(replayed(pack_, model, sampling).sum(), model)
    one_by_one = [brute_force_logprobs(model, c, sampling).sum() for group in groups for c in group]
    assert_same_gradient(found, torch.stack([gradient(loss, model) for loss in one_by_one]).sum(0))


@pytest.mark.parametrize(("block_length", "shift"), [(4, 1), (0, 0), (0, 1)])
def test_sum_of_logprobs_shifted_and_under_full_attention(block_length: int, shift: int) -> None:
    sampling = replace(SAMPLING["dynamic"], generation_window=5)
    model, groups = group_of_completions(sampling, block_length, shift=shift)
    pack_ = packed(groups, model, shared=True).reveals_only()
    found = gradient(replayed(pack_, model, sampling).sum(), model)
    one_by_one = [brute_force_logprobs(model, c, sampling).sum() for group in groups for c in group]
    assert_same_gradient(found, torch.stack([gradient(loss, model) for loss in one_by_one]).sum(0))


@pytest.mark.parametrize("strategy", SAMPLING)
def test_policy_loss_with_holds_clipping_and_reference(strategy: str) -> None:
    sampling, objective = SAMPLING[strategy], ObjectiveConfig(epsilon=0.1, epsilon_high=0.2, beta=0.05)
    model, groups = group_of_completions(sampling, 4)
    completions = [completion for group in groups for completion in group]
    pack_ = packed(groups, model, shared=True)
    advantage_N, coefficient_N = torch.randn(len(completions)), torch.rand(len(completions))
    logprob_T = replayed(pack_, model, sampling)
    behavior_T = (logprob_T + 0.3 * torch.randn(len(logprob_T))).detach()
    ref_T = (logprob_T + 0.5 * torch.randn(len(logprob_T))).detach()
    branch_T = pack_.actions.branch_T
    batch = replace(
        PolicyBatch.blank(pack_),
        behavior_logprob_T=behavior_T,
        ref_logprob_T=ref_T,
        advantage_T=advantage_N[branch_T],
        coefficient_T=coefficient_N[branch_T],
    )
    result = policy_loss(ActionScores(logprob_T, torch.zeros_like(behavior_T)), batch, objective)
    assert int(result.sums["clipped_low"]) and int(result.sums["clipped_high"]) and pack_.actions.has_holds
    expected, loss_sum = torch.zeros(()), 0.0
    for branch, completion in enumerate(completions):
        mine_T = branch_T == branch
        actions = zip(brute_force_actions(model, completion, sampling), behavior_T[mine_T], ref_T[mine_T], strict=True)
        loss = torch.zeros(())
        for logprob, behavior, ref in actions:
            ratio, advantage = (logprob - behavior).exp(), advantage_N[branch]
            surrogate = min(ratio * advantage, ratio.clamp(0.9, 1.2) * advantage)
            kl = (ref - logprob).exp() - (ref - logprob) - 1
            loss = loss - coefficient_N[branch] * (surrogate - 0.05 * kl)
        expected, loss_sum = expected + gradient(loss, model), loss_sum + loss.item()
    assert result.value.item() == pytest.approx(loss_sum, rel=1e-4)
    assert_same_gradient(gradient(result.value, model), expected)


@pytest.mark.parametrize(("block_length", "shift"), [(4, 0), (4, 1), (1, 1), (0, 0), (0, 1)])
@pytest.mark.parametrize("noise", [NoiseConfig(min_noise=0.1), NoiseConfig(complementary=True)], ids=["plain", "pairs"])
def test_nelbo_of_given_masks(noise: NoiseConfig, block_length: int, shift: int) -> None:
    model, _ = sharp_tiny_model(block_length=block_length, shift=shift)
    lengths = ((5, 7), (1, 11), (8, 4), (2, 2), (0, 8))
    viewed = [noisy_document(*pair, noise, model.scheme) for pair in lengths]
    pack_ = pack(viewed, block_length, shift)
    rule = ScoringRule(TokenDistribution(), UnmaskingRule(), suppressed_by(model))
    loss = nelbo_loss(PackedScorer(model, "sdpa")(pack_, rule).logprob_T, pack_.actions.weight_T, denominator=24.0)
    by_hand = sum_over_views(model, viewed) / 24.0
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert_same_gradient(gradient(loss, model), gradient(by_hand, model))


def noisy_document(
    prompt_length: int, completion_length: int, noise: NoiseConfig, scheme: DiffusionScheme
) -> ViewedDocument:
    """A random document with noisy views; the last token of its completion is context only."""
    generator = torch.Generator().manual_seed(prompt_length)
    words = min(scheme.mask_token_id, 256)
    prompt_ids, completion_ids = torch.randint(words, (prompt_length,)), torch.randint(words, (completion_length,))
    trajectory = Trajectory(
        *(prompt_ids, completion_ids, torch.ones_like(completion_ids), scheme.block_length),
        lead=scheme.lead(prompt_length),
    )
    scored_KB = torch.ones_like(trajectory.token_ids_KB, dtype=torch.bool)
    scored_KB[-1, -1] = False
    levels_K = draw_noise_levels(len(scored_KB), noise, generator)
    views = noisy_views(trajectory, scored_KB, levels_K, scheme.mask_token_id, noise=noise, generator=generator)
    return ViewedDocument(prompt_ids, [views])


def sum_over_views(model: BlockDiffusionModel, documents: Sequence[ViewedDocument]) -> Tensor:
    """The NELBO with one plain forward on [clean prefix | noisy block] for each view."""
    total = torch.zeros(())
    for document in documents:
        views = document.branches[0]
        clean = document.prompt_ids.tolist() + views.completion_ids.tolist()
        for view, block in enumerate(views.block_V.tolist()):
            noisy = views.token_ids_VB[view].tolist()
            logits_BV = state_logits(model, clean, block, noisy, views.lead)
            for lane, token in enumerate(noisy):
                if token == model.config.mask_token_id:
                    probs_V = logits_BV[lane, : model.config.mask_token_id].softmax(-1)  # the mask is the last id
                    total = (
                        total
                        - views.weight_VB[view, lane] * probs_V[clean[block * len(noisy) - views.lead + lane]].log()
                    )
    return total


def test_packs_add_up() -> None:
    """One pack of all groups == the sum over packs of one group each: accumulation is exact."""
    sampling = SAMPLING["dynamic"]
    model, groups = group_of_completions(sampling, 4)
    whole = gradient(replayed(packed(groups, model, shared=True), model, sampling).sum(), model)
    parts = [replayed(packed([group], model, shared=True), model, sampling).sum() for group in groups]
    assert_same_gradient(torch.stack([gradient(part, model) for part in parts]).sum(0), whole)


def test_gradient_checkpointing_and_chunked_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SAMPLING["dynamic"]
    model, groups = group_of_completions(sampling, 4)
    pack_ = packed(groups, model, shared=True)
    weight_T = torch.randn(len(pack_.actions))

    def step() -> Tensor:
        return gradient((weight_T * replayed(pack_, model, sampling)).sum(), model)

    expected = step()
    monkeypatch.setattr("dirl.model.logprobs.LOGITS_PER_CHUNK", 10 * model.config.vocab_size)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_same_gradient(step(), expected)


@pytest.mark.parametrize(("block_length", "shift"), [(4, 1), (1, 1), (0, 0), (0, 1)])
@torch.no_grad()
def test_sft_scores_by_the_scheme_of_its_model(block_length: int, shift: int, tmp_path: Path) -> None:
    """The trainer's held-out loss from its own documents, by plain passes."""
    model, tokenizer = sharp_tiny_model(block_length=block_length, shift=shift)
    model.config.block_size = block_length or 4
    documents = [Document(list(range(40, 40 + n)), list(range(60, 66 + n))) for n in range(6)]
    config = SFTConfig(output_dir=str(tmp_path), data=SFTDataConfig(num_heldout=4, fill_window=8))
    trainer = SFTTrainer(config, model=model, tokenizer=tokenizer, documents=documents)
    seed, heldout = stable_seed(config.seed, -1), trainer.heldout
    levels = batch_noise_levels(heldout, config.noise, seed)
    viewed = [
        view_document(example, levels_K, model.scheme.mask_token_id, noise=config.noise, seed=stable_seed(seed, i))
        for i, (example, levels_K) in enumerate(zip(heldout, levels, strict=True))
    ]
    num_scored = sum(example.num_scored for example in heldout)
    expected = float(sum_over_views(model.eval(), viewed)) / num_scored
    assert trainer.evaluate()["eval/loss"] == pytest.approx(expected, rel=1e-5)
