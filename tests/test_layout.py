# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GaussianLayout: made from boxes or Gaussians, stacked, indexed, checked, saved, drawn."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpstoken_hf import GaussianLayout, partition_images
from gpstoken_hf.gaussians import boxes_to_gaussians
from gpstoken_hf.layout import PADDING_BOX, PADDING_GAUSSIAN

BOXES = torch.tensor([[[0, 0, 31, 63], [32, 0, 63, 31], [32, 32, 63, 63]]])


def layout_of(num_tokens, seed=0, batch_size=1):
    images = torch.rand(batch_size, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return partition_images(images, num_tokens)


def equal(a, b):
    return (
        torch.equal(a.gaussians, b.gaussians)
        and (a.boxes is b.boxes is None or torch.equal(a.boxes, b.boxes))
        and torch.equal(a.attention_mask, b.attention_mask)
    )


def test_boxes_and_gaussians_lead_to_each_other():
    layout = GaussianLayout.from_boxes(BOXES, (64, 64))
    assert torch.equal(layout.gaussians, boxes_to_gaussians(BOXES, (64, 64)))
    assert layout.attention_mask.tolist() == [[1, 1, 1]]
    assert equal(GaussianLayout.from_gaussians(layout.gaussians, (64, 64)), layout)
    for options in ({"sigma_scale": 1 / 3}, {"align_corners": False}):
        other = GaussianLayout.from_boxes(BOXES, (64, 64), **options)
        assert not torch.equal(other.gaussians, layout.gaussians)
        assert torch.equal(GaussianLayout.from_gaussians(other.gaussians, (64, 64), **options).boxes, BOXES)


def test_padding_is_the_same_whatever_stood_there():
    mask = torch.tensor([[1, 0, 1]])
    gaussians = boxes_to_gaussians(BOXES, (64, 64))
    gaussians[0, 1] = torch.nan
    boxes = BOXES.clone()
    boxes[0, 1] = -7
    for layout in (
        GaussianLayout(gaussians, boxes, mask),
        GaussianLayout.from_boxes(boxes, (64, 64), mask),
        GaussianLayout.from_gaussians(gaussians, (64, 64), mask),
    ):
        layout.check((64, 64))
        assert layout.is_padded
        assert layout.gaussians[0, 1].tolist() == list(PADDING_GAUSSIAN)
        assert layout.num_tokens.tolist() == [2]
    assert GaussianLayout(gaussians, boxes, mask).boxes[0, 1].tolist() == list(PADDING_BOX)


def test_stack_pads_and_indexing_takes_the_padding_off_again():
    parts = [layout_of(5), layout_of(9, seed=1), layout_of(2, seed=2, batch_size=2)]
    stacked = GaussianLayout.stack(parts)
    assert len(stacked) == 4
    assert stacked.num_tokens.tolist() == [5, 9, 2, 2]
    assert stacked.gaussians.shape == (4, 9, 5)
    assert (stacked.gaussians[0, 5:] == torch.tensor(PADDING_GAUSSIAN)).all()
    assert (stacked.boxes[0, 5:] == torch.tensor(PADDING_BOX)).all()
    assert equal(stacked[0], parts[0])
    assert equal(stacked[1], parts[1])
    assert not stacked[1].is_padded
    assert equal(GaussianLayout.stack(list(stacked)), stacked)
    assert not GaussianLayout.stack([layout_of(5), layout_of(5, seed=1)]).is_padded
    assert stacked[1:3].num_tokens.tolist() == [9, 2]
    assert stacked[[3, 0]].num_tokens.tolist() == [2, 5]
    assert stacked[torch.tensor([True, False, False, True])].num_tokens.tolist() == [5, 2]
    assert [len(one) for one in stacked] == [1, 1, 1, 1]
    with pytest.raises(IndexError):
        stacked[4]


def test_stack_of_layouts_without_boxes():
    bare = [GaussianLayout(layout_of(n).gaussians) for n in (3, 5)]
    assert GaussianLayout.stack(bare).boxes is None
    with pytest.raises(ValueError, match="layouts must all have boxes or all have none, got both"):
        GaussianLayout.stack([bare[0], layout_of(3)])
    with pytest.raises(ValueError, match="at least one layout, got none"):
        GaussianLayout.stack([])


def test_parts_of_an_image_are_joined():
    joined = GaussianLayout.join([layout_of(4), layout_of(6, seed=1)])
    assert joined.gaussians.shape == (1, 12, 5)
    assert joined.attention_mask.tolist() == [[1] * 4 + [0] * 2 + [1] * 6]


def test_expand_is_a_copy():
    layout = layout_of(4)
    batch = layout.expand(3)
    assert len(batch) == 3
    batch.gaussians[0, 0, 0] = 0.25
    assert layout.gaussians[0, 0, 0] != 0.25
    assert batch.gaussians[1, 0, 0] == layout.gaussians[0, 0, 0]
    with pytest.raises(ValueError, match="layout must be of 1 or 2 images, got 3"):
        batch.expand(2)


def test_to_another_device():
    moved = layout_of([3, 5], batch_size=2).to("meta")
    assert {tensor.device.type for tensor in (moved.gaussians, moved.boxes, moved.attention_mask)} == {"meta"}
    assert moved.device.type == "meta"


def test_save_and_load(tmp_path):
    for layout in (layout_of([3, 7], batch_size=2), layout_of(4), GaussianLayout(layout_of(4).gaussians)):
        layout.save(tmp_path / "layout.safetensors")
        loaded = GaussianLayout.load(tmp_path / "layout.safetensors", (64, 64))
        assert equal(loaded, layout)
        assert loaded.is_padded == layout.is_padded


def test_load_refuses(tmp_path):
    path = tmp_path / "layout.safetensors"
    layout_of(4).save(path)
    good = load_file(path)
    with pytest.raises(ValueError, match=r"inside the 32 x 32 image"):
        GaussianLayout.load(path, (32, 32))

    def refused(message, tensors, metadata=None):
        save_file(tensors, path, metadata={"format": "gpstoken-layout-1"} if metadata is None else metadata)
        with pytest.raises(ValueError, match=message):
            GaussianLayout.load(path)

    refused("must be a layout file of format 'gpstoken-layout-1', got format 'pt'", good, {"format": "pt"})
    refused("must hold the tensors", {"gaussians": good["gaussians"]})
    refused("must hold the tensors", {**good, "stranger": torch.zeros(1)})
    refused("gaussians must be finite", {**good, "gaussians": good["gaussians"] * torch.nan})
    refused("0 < sigma < 1", {**good, "gaussians": -good["gaussians"]})
    refused("gaussians must have shape", {**good, "gaussians": good["gaussians"][0]})
    refused("attention_mask must hold 0 and 1", {**good, "attention_mask": good["attention_mask"] * 2})
    refused("boxes must be inclusive pixels .* got", {**good, "boxes": good["boxes"].flip(-1).contiguous()})
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="whole safetensors file, got a damaged one"):
        GaussianLayout.load(path)


def test_draw():
    layout = layout_of([3, 7], batch_size=2)
    image = torch.zeros(3, 64, 64)
    first, second = (np.asarray(layout.draw(image, index, zoom=2)) for index in (0, 1))
    assert first.shape == (128, 128, 3)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gaussians": np.zeros((1, 3, 5))}, r"gaussians must be a tensor of shape \(B, L, 5\), got ndarray"),
        ({"gaussians": torch.zeros(3, 5)}, r"gaussians must have shape \(B, L, 5\), got \(3, 5\)"),
        ({"gaussians": torch.zeros(1, 3, 4)}, r"gaussians must have shape \(B, L, 5\), got \(1, 3, 4\)"),
        ({"gaussians": torch.zeros(1, 0, 5)}, r"at least 1 token per image, got shape \(1, 0, 5\)"),
        ({"gaussians": torch.zeros(1, 3, 5, dtype=torch.int64)}, "gaussians must be floating point, got torch.int64"),
        ({"boxes": torch.zeros(1, 2, 4, dtype=torch.int64)}, r"boxes must have shape \(1, 3, 4\), got \(1, 2, 4\)"),
        ({"boxes": torch.zeros(1, 3, 4)}, "boxes must be integers, .* got torch.float32"),
        ({"attention_mask": torch.ones(1, 2)}, r"attention_mask must have shape \(1, 3\), got \(1, 2\)"),
        (
            {"attention_mask": torch.ones(1, 3, device="meta")},
            "attention_mask must be on the device of g.*, cpu",
        ),
    ],
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianLayout(**{"gaussians": torch.full((1, 3, 5), 0.5), **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gaussians": torch.full((1, 3, 5), 1.5)}, "gaussians must have 0 < sigma < 1, got sigma from 1.5 to 1.5"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "every image at least one token, got an image with none"),
        ({"attention_mask": torch.tensor([[1, 2, 0]])}, "attention_mask must hold 0 and 1, got values from 0 to 2"),
        ({"boxes": BOXES - 1}, r"boxes must be inclusive pixels .* got \[-1, -1, 30, 62\]"),
        ({"boxes": BOXES + 1}, r"inside the 64 x 64 image, got \[1, 1, 32, 64\]"),
        ({"boxes": BOXES[..., [2, 1, 0, 3]]}, r"got \[31, 0, 0, 63\]"),
    ],
)
def test_check_refuses(change, message):
    layout = GaussianLayout(**{"gaussians": boxes_to_gaussians(BOXES, (64, 64)), "boxes": BOXES, **change})
    with pytest.raises(ValueError, match=message):
        layout.check((64, 64))
