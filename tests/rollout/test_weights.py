"""What a push sends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dirl.model.tiny import tiny
from dirl.rollout.weights import ShapeCheck, buckets, checkpoint_tensors
from dirl.training.full_parameters import named_full_parameters
from tests.oracle import tiny_moe


def test_a_pushed_moe_is_what_its_checkpoint_is(tmp_path: Path) -> None:
    """transformers keeps the experts of a layer in one tensor and writes them one by one; LMDeploy reads the latter."""
    model, _ = tiny_moe()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    pushed = dict(checkpoint_tensors(named_full_parameters(model)))
    assert pushed.keys() == saved.keys()
    assert any(".experts.2.up_proj.weight" in name for name in pushed)
    for name, tensor in saved.items():
        torch.testing.assert_close(pushed[name], tensor, rtol=0, atol=0)


def test_tied_embeddings_are_sent_once_and_wrappers_have_no_name() -> None:
    model, _ = tiny()

    class Wrapped(nn.Module):  # as DDP does
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    names = [name for name, _ in named_full_parameters(Wrapped())]
    assert names == [name for name, _ in model.named_parameters()]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert all(not tensor.requires_grad for _, tensor in named_full_parameters(model))


@pytest.mark.parametrize("max_bytes", [1, 100, 400, 10_000])
def test_buckets_keep_order_and_size(max_bytes: int) -> None:
    named = [(str(i), torch.zeros(n)) for i, n in enumerate([3, 40, 7, 25, 25, 1, 120, 2])]
    found = list(buckets(named, max_bytes))
    flat = [item for bucket in found for item in bucket]
    assert [(name, tensor.shape) for name, tensor in flat] == [(name, tensor.shape) for name, tensor in named]
    sizes = [sum(tensor.nbytes for _, tensor in bucket) for bucket in found]
    assert all(size <= max_bytes or len(bucket) == 1 for size, bucket in zip(sizes, found, strict=True))
    firsts = [bucket[0][1].nbytes for bucket in found[1:]]
    assert all(size + first > max_bytes for size, first in zip(sizes, firsts, strict=False)), "a bucket had room"


def test_a_bucket_holds_copies_and_no_more_than_a_bucket_of_them() -> None:
    """As with parameters gathered from shards: each is gone when the next one comes."""
    shared = torch.zeros(10)

    def gather() -> Iterator[tuple[str, Tensor]]:
        for i in range(20):
            yield str(i), shared.fill_(i)
        shared.fill_(-1)

    seen = []
    for bucket in buckets(gather(), max_bytes=120):
        assert sum(tensor.nbytes for _, tensor in bucket) <= 120
        seen += [(name, tensor.tolist()) for name, tensor in bucket]
    assert seen == [(str(i), [float(i)] * 10) for i in range(20)]


def test_another_configuration_is_named() -> None:
    check = ShapeCheck({"a": (2, 3), "b": (4,)})
    good = [("a", torch.zeros(2, 3)), ("b", torch.zeros(4))]
    assert list(check.watched(good)) == good
    for named, message in (
        ([("a", torch.zeros(3, 2))], r"a is \(3, 2\) in the pushed model and \(2, 3\)"),
        ([*good, ("c", torch.zeros(1))], r"c is \(1,\) in the pushed model and absent"),
        (good[:1], r"b is absent in the pushed model and \(4,\)"),
    ):
        with pytest.raises(ValueError, match=rf"update_weights: {message} in the engine; push a model of the same"):
            list(check.watched(named))
