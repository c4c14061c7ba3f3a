"""The forward process: levels, masks and weights, by counting."""

from __future__ import annotations

import pytest
import torch

from dirl.diffusion.noising import NoiseConfig, draw_mask, draw_noise_levels, noise_weights


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_low_discrepancy_levels_put_one_in_each_stratum_in_random_order() -> None:
    config = NoiseConfig(min_noise=0.1)
    levels = draw_noise_levels(50, config, generator())
    strata = ((1 - levels) / 0.9 * 50).long()
    assert sorted(strata.tolist()) == list(range(50))
    assert strata.tolist() != sorted(strata.tolist())
    assert not torch.equal(levels, draw_noise_levels(50, config, generator(1)))
    assert torch.equal(levels, draw_noise_levels(50, config, generator()))


@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_each_level_on_its_own_is_uniform(low_discrepancy: bool) -> None:
    config = NoiseConfig(min_noise=0.2, low_discrepancy=low_discrepancy)
    one_generator = generator()
    second = torch.stack([draw_noise_levels(7, config, one_generator)[1] for _ in range(8000)])
    assert float(second.min()) >= 0.2 and float(second.max()) <= 1.0
    counts = ((second - 0.2) / 0.8 * 8).long().clamp(max=7).bincount(minlength=8)
    assert float((counts - 1000).square().sum() / 1000) < 24.4  # 7 degrees of freedom, 0.1 %


def test_no_levels_for_no_blocks() -> None:
    assert len(draw_noise_levels(0, NoiseConfig(), generator())) == 0


def test_masks_follow_the_level_and_stay_on_maskable_positions() -> None:
    levels_K = torch.tensor([0.1, 0.5, 1.0])
    maskable_KB = torch.ones(3, 4000, dtype=torch.bool)
    maskable_KB[:, ::4] = False
    masked_KB = draw_mask(levels_K, maskable_KB, generator())
    assert not (masked_KB & ~maskable_KB).any()
    assert masked_KB[2].equal(maskable_KB[2])  # level 1: the fully masked block that decoding starts from
    assert masked_KB.sum(1).tolist()[:2] == pytest.approx([300, 1500], rel=0.1)


def test_weighted_count_of_masked_tokens_is_one_per_token() -> None:
    one_generator, config = generator(), NoiseConfig(min_noise=0.05)
    levels_K = draw_noise_levels(20_000, config, one_generator)
    masked_KB = draw_mask(levels_K, torch.ones(20_000, 4, dtype=torch.bool), one_generator)
    weighted = (masked_KB * noise_weights(levels_K, config)[:, None]).mean()
    assert float(weighted) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("key", "value"), [("noise_level", "token"), ("min_noise", 0.0), ("min_noise", 1.0), ("min_noise", -0.1)]
)
def test_bad_configurations_are_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key} must be .*got {value!r}"):
        NoiseConfig(**{key: value})  # type: ignore[arg-type]
