# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GaussianLayoutBank: what goes in comes out, draws are fair, reproducible and never padded with illegal values."""

import pytest
import torch
from diffusers import ModelMixin

from gpstoken_hf.gaussians import check_gaussians
from gpstoken_hf.layout_bank import GaussianLayoutBank


def random_layout(num_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(num_tokens, 5, generator=generator)
    return torch.cat([0.01 + 0.9 * values[:, :2], 1.9 * values[:, 2:] - 0.95], dim=-1)


@pytest.fixture
def layouts():
    """Classes 2, 3 and 7; layouts of 4, 6 and 9 tokens."""
    return {
        7: [random_layout(6, 70), random_layout(9, 71), random_layout(6, 72)],
        2: [random_layout(4, 20)],
        3: [random_layout(6, seed) for seed in range(30, 40)],
    }


@pytest.fixture
def bank(layouts):
    return GaussianLayoutBank.from_layouts(layouts)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_contents(bank, layouts):
    assert len(bank) == 14
    assert bank.class_ids == [2, 3, 7]
    assert bank.class_counts == {2: 1, 3: 10, 7: 3}
    assert bank.token_counts == {4: 1, 6: 12, 9: 1}
    stored = bank.layouts_by_class()
    assert stored.keys() == layouts.keys()
    for label, items in layouts.items():
        for got, expected in zip(stored[label], items, strict=True):
            assert torch.equal(got, expected)


def test_sample_pads_and_masks(bank, layouts):
    out = bank.sample([2, 7, 3], num_tokens=[4, 9, 6], generator=generator())
    assert out.gaussians.shape == (3, 9, 5)
    assert out.gaussians.dtype == torch.float32
    assert out.attention_mask.sum(-1).tolist() == [4, 9, 6]
    assert torch.equal(out.gaussians[0, :4], layouts[2][0])
    assert torch.equal(out.gaussians[1], layouts[7][1])
    assert any(torch.equal(out.gaussians[2, :6], item) for item in layouts[3])
    # The mask is ones then zeros, and the padding is legal: a logit of it is finite.
    assert torch.equal(out.attention_mask, (torch.arange(9) < torch.tensor([[4], [9], [6]])).long())
    check_gaussians(out.gaussians)
    assert torch.equal(torch.stack([bank.gaussians_of(i)[0] for i in out.indices]), out.gaussians[:, 0])


def test_labels_may_be_a_tensor_a_list_or_one_number(bank):
    as_list = bank.sample([3, 3], generator=generator())
    as_tensor = bank.sample(torch.tensor([3, 3]), generator=generator())
    assert torch.equal(as_list.gaussians, as_tensor.gaussians)
    assert bank.sample(2).gaussians.shape == (1, 4, 5)
    assert torch.equal(bank(torch.tensor([2])).gaussians, bank.sample(2).gaussians)
    with pytest.raises(ValueError, match="at least one class, got none"):
        bank.sample([])


def test_same_seed_same_layouts(bank):
    draws = [bank.sample([3] * 20, generator=generator(seed)).indices.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_a_generator_per_sample_makes_the_batch_equal_to_singles(bank):
    batch = bank.sample([3, 7, 3], generator=[generator(5), generator(6), generator(7)])
    for row, (label, seed) in enumerate([(3, 5), (7, 6), (3, 7)]):
        single = bank.sample(label, generator=generator(seed))
        assert single.indices.item() == batch.indices[row].item()


def test_the_global_generator_is_used_without_one(bank):
    torch.manual_seed(3)
    first = bank.sample([3] * 8).indices
    torch.manual_seed(3)
    assert torch.equal(first, bank.sample([3] * 8).indices)


def test_draws_are_uniform(bank):
    """Chi-square of 4000 draws among 10 layouts: 27.9 is passed by chance once in 1000 seeds."""
    counts = torch.bincount(bank.sample([3] * 4000, generator=generator()).indices, minlength=14)[1:11]
    assert counts.sum() == 4000
    assert ((counts - 400.0) ** 2 / 400).sum() < 27.9


def test_without_replacement(bank):
    out = bank.sample([3] * 10 + [7] * 3, generator=generator(), replacement=False)
    assert len(set(out.indices.tolist())) == 13
    with pytest.raises(ValueError, match="class 3 at most 10 times without replacement, got 11 times"):
        bank.sample([3] * 11, replacement=False)
    # One pool per length, but a layout is one layout however it was asked for.
    mixed = bank.sample([7, 7, 7], num_tokens=[None, 6, 9], replacement=False, generator=generator(2))
    assert len(set(mixed.indices.tolist())) == 3


def test_without_replacement_over_several_calls(bank):
    seen = torch.empty(0, dtype=torch.int64)
    for _ in range(5):
        out = bank.sample([3, 3], generator=generator(), replacement=False, exclude=seen)
        seen = torch.cat([seen, out.indices])
    assert len(set(seen.tolist())) == 10
    with pytest.raises(ValueError, match="exclude must leave at least one layout of class 3, got all"):
        bank.sample(3, exclude=seen)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_save_and_load(bank, tmp_path, variant):
    bank.save_pretrained(tmp_path, variant=variant)
    assert not list(tmp_path.glob("*.bin"))
    loaded = GaussianLayoutBank.from_pretrained(tmp_path, variant=variant)
    for name in ("gaussians", "offsets", "class_labels"):
        assert torch.equal(getattr(loaded, name), getattr(bank, name))
    assert loaded.class_counts == bank.class_counts
    assert isinstance(loaded, ModelMixin)


def test_layouts_stay_float32(bank, tmp_path):
    """A pipeline in half precision must not move its layouts."""
    bank.save_pretrained(tmp_path)
    loaded = GaussianLayoutBank.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for module in (loaded, loaded.to(torch.bfloat16), loaded.half(), loaded.to("cpu", torch.float16)):
        assert module.gaussians.dtype == torch.float32
        assert torch.equal(module.gaussians, bank.gaussians)
    assert loaded.offsets.dtype == torch.int64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(bank):
    expected = bank.sample([3, 7], generator=generator())
    out = bank.to("cuda").sample([3, 7], generator=generator())
    assert out.gaussians.device.type == "cuda"
    assert torch.equal(out.gaussians.cpu(), expected.gaussians)
    on_device = bank.sample([3] * 4, generator=torch.Generator("cuda").manual_seed(0))
    assert torch.equal(
        bank.sample([3] * 4, generator=torch.Generator("cuda").manual_seed(0)).indices, on_device.indices
    )


def test_bad_draws(bank):
    with pytest.raises(ValueError, match=r"class_labels must be among \[2, 3, 7\], .* got 5"):
        bank.sample([3, 5])
    with pytest.raises(ValueError, match=r"num_tokens must be among \[6, 9\] for class 7, got 8"):
        bank.sample(7, num_tokens=8)
    with pytest.raises(ValueError, match=r"generator must be one value or 2, one per class label, got 3"):
        bank.sample([3, 3], generator=[generator()] * 3)
    with pytest.raises(ValueError, match=r"num_tokens must be one value or 1, one per class label, got 2"):
        bank.sample(3, num_tokens=[6, 6])
    with pytest.raises(ValueError, match="index must be between 0 and 13, got 14"):
        bank.gaussians_of(14)


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        ({}, "at least one layout"),
        ({1: []}, "at least one layout"),
        ({-1: [random_layout(4, 0)]}, "at least 0, got -1"),
        (
            {1: [random_layout(4, 0)[:, :4]]},
            r"layout 0 of class 1 must be of shape \(L, 5\) with L >= 1, got \(4, 4\)",
        ),
        ({1: [random_layout(0, 0)]}, r"got \(0, 5\)"),
        ({1: [random_layout(4, 0), random_layout(4, 0) * float("nan")]}, "layout 1 of class 1 must be finite"),
        ({1: [random_layout(4, 0) + 1]}, "layout 0 of class 1 must have 0 < sigma < 1"),
    ],
)
def test_bad_layouts(layouts, message):
    with pytest.raises(ValueError, match=message):
        GaussianLayoutBank.from_layouts(layouts)


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"total_tokens must be an integer from 3 to .*, got 2"):
        GaussianLayoutBank(num_layouts=3, total_tokens=2)
