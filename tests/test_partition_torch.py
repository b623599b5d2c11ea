# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The batched tensor partition against the compiled one: equal entropies bit for bit, so equal regions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_partition import PORTABLE, as_set, complexity, golden_arguments, golden_cases, random_image

from gpstoken_hf import partition_images
from gpstoken_hf.complexity_torch import grey_images, importance_sums, region_entropies, region_tensors
from gpstoken_hf.partition import check_range
from gpstoken_hf.regions import max_regions, morton_order, region_tree

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def skip_without(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.parametrize(
    ("height", "width", "min_region_size", "expected"), [(256, 256, 8, 2729), (1, 1, 8, 1), (37, 301, 8, None)]
)
def test_tree_holds_every_region_once(height, width, min_region_size, expected):
    tree = region_tree(height, width, min_region_size)
    assert expected in (None, len(tree.boxes))
    assert len(as_set(tree.boxes)) == len(tree.boxes)
    x0, y0, x1, y1 = tree.boxes.T
    extent = np.maximum(x1 - x0, y1 - y0)
    assert ((tree.halves >= 0).any(axis=1) == (extent > min_region_size)).all()
    area = (x1 - x0 + 1) * (y1 - y0 + 1)
    for pair in (tree.halves[:, :2], tree.halves[:, 2:]):
        parents = (pair >= 0).all(axis=1)
        assert (area[pair[parents]].sum(axis=1) == area[parents]).all()
    smallest = (extent <= min_region_size).sum()
    assert smallest >= max_regions(height, width, min_region_size)


def every_region(height, width, min_region_size, device):
    """The tensors of a tree as if all of its regions, not only the splittable ones, had a score."""
    regions = region_tensors(height, width, min_region_size, torch.device(device))
    x0, y0, x1, y1 = regions.boxes.cpu().unbind(1)
    is_line = (x0 == x1) | (y0 == y1)
    return replace(
        regions,
        num_splittable=len(regions.boxes),
        area_rows=(~is_line).nonzero()[:, 0].to(device),
        line_rows=is_line.nonzero()[:, 0].to(device),
    )


@pytest.mark.parametrize(("height", "width", "min_region_size"), [(64, 64, 8), (1, 40, 3), (1, 1, 8), (37, 101, 1)])
def test_tensors_of_a_tree(height, width, min_region_size):
    tree = region_tree(height, width, min_region_size)
    regions = region_tensors(height, width, min_region_size, torch.device("cpu"))
    assert regions.num_splittable == tree.num_splittable == (tree.halves >= 0).any(axis=1).sum()
    assert (tree.halves[tree.num_splittable :] == -1).all()
    assert tree.boxes[0].tolist() == [0, 0, width - 1, height - 1]
    x0, y0, x1, y1 = regions.boxes.unbind(1)
    splittable = slice(tree.num_splittable)
    assert torch.equal(regions.width, (x1 - x0 + 1)[splittable].double())
    assert torch.equal(regions.height, (y1 - y0 + 1)[splittable].double())
    rows = torch.cat([regions.area_rows, regions.line_rows])
    assert torch.equal(rows.sort().values, torch.arange(tree.num_splittable))
    assert ((x0 == x1) | (y0 == y1))[regions.line_rows].all()
    assert ((x0 < x1) & (y0 < y1))[regions.area_rows].all()
    assert torch.equal(regions.morton_code.argsort(stable=True), morton_order(regions.boxes))
    # Kept: the second time it is the same.
    assert region_tensors(height, width, min_region_size, torch.device("cpu")) is regions


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("height", "width", "min_region_size"), [(64, 64, 8), (37, 101, 5), (1, 40, 3), (9, 9, 1)])
def test_entropies_are_those_of_the_compiled_loop_bit_for_bit(device, height, width, min_region_size):
    skip_without(device)
    rng = np.random.default_rng(height)
    images = torch.from_numpy(np.stack([random_image(rng, height, width) for _ in range(2)]))
    tree = region_tree(height, width, min_region_size)
    grey = grey_images(images.to(device))
    entropies = region_entropies(grey, every_region(height, width, min_region_size, device)).cpu().numpy()
    for image in range(2):
        pixels = grey[image].cpu().numpy()
        for (x0, y0, x1, y1), entropy in zip(tree.boxes, entropies[image]):
            region = np.ascontiguousarray(pixels[y0 : y1 + 1, x0 : x1 + 1])
            assert complexity(region, exponent=0.0) == region.size
            assert complexity(region, exponent=1.0) == entropy * region.shape[0] * region.shape[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["image_0", "image_flat", "image_halves", "image_rect", "bias"])
def test_golden_images(device, name):
    skip_without(device)
    for file, case in golden_cases():
        if file.parent != PORTABLE:
            continue
        tensors = load_file(file)
        wanted = (
            case.startswith("regions_bias") if name == "bias" else case.startswith(name.replace("image", "regions"))
        )
        # One setting of each image: what it scores does not depend on the number of tokens.
        if not wanted or ("_l64_" in case or "min4" in case or "lambda0" in case):
            continue
        arguments = golden_arguments(tensors, case)
        expected = partition_images(**arguments, backend="numba")
        arguments["images"] = arguments["images"].to(device)
        output = partition_images(**arguments, backend="torch")
        assert output.boxes.device.type == device
        assert torch.equal(output.boxes.cpu(), expected.boxes)
        assert torch.allclose(output.gaussians.cpu(), expected.gaussians, rtol=0, atol=1e-7)
        return
    pytest.fail(f"no golden case for {name}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("height", "width"), [(37, 101), (1, 60), (48, 48)])
def test_batches_with_counts_and_importance(device, height, width):
    skip_without(device)
    rng = np.random.default_rng(width)
    images = torch.from_numpy(np.stack([random_image(rng, height, width) for _ in range(3)]))
    # Powers of two: their sums are exact in any order.
    importance = torch.from_numpy(rng.choice([0.0, 0.5, 8.0], (3, height, width)).astype(np.float32))
    largest = max_regions(height, width, 4)
    counts = [largest, 1, largest // 2]
    for weights in (None, importance):
        expected = partition_images(images, counts, min_region_size=4, importance=weights, backend="numba")
        output = partition_images(images.to(device), counts, min_region_size=4, importance=weights, backend="torch")
        assert torch.equal(output.boxes.cpu(), expected.boxes)
        assert torch.equal(output.attention_mask.cpu(), expected.attention_mask)


def test_importance_sums():
    rng = np.random.default_rng(0)
    importance = torch.from_numpy(rng.random((2, 20, 30)))
    boxes = torch.tensor([[0, 0, 29, 19], [3, 4, 3, 4], [5, 0, 10, 19]])
    sums = importance_sums(importance, boxes)
    for row, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        expected = importance[:, y0 : y1 + 1, x0 : x1 + 1].sum((1, 2))
        torch.testing.assert_close(sums[:, row], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, 1.0], None),
        ([], None),
        ([-1.5, 0.0], r"weights must be in \[-1, 1\], got values from -1.5 to 0"),
        ([0.0, 1.5], "from 0 to 1.5"),
        ([0.0, float("nan")], "finite, got 1 NaN"),
        ([float("-inf"), float("inf")], "finite, got 2 NaN or infinite"),
    ],
)
def test_range_check(device, values, message):
    skip_without(device)
    tensor = torch.tensor(values, device=device)
    if message is None:
        check_range("weights", tensor, -1.0, 1.0)
    else:
        with pytest.raises(ValueError, match=message):
            check_range("weights", tensor, -1.0, 1.0)


def test_range_check_has_a_tolerance():
    check_range("weights", torch.tensor([-1.25, 1.25]), -1.0, 1.0, tolerance=0.25)
    with pytest.raises(ValueError, match=r"weights must be in \[-1, 1\], got values from -1.25 to 1.5"):
        check_range("weights", torch.tensor([-1.25, 1.5]), -1.0, 1.0, tolerance=0.25)


@pytest.mark.gpu
def test_cuda_tensors_choose_the_batched_path():
    skip_without("cuda")
    rng = np.random.default_rng(0)
    images = torch.from_numpy(np.stack([random_image(rng, 128, 128) for _ in range(8)]))
    assert torch.equal(partition_images(images.cuda(), 64).boxes.cpu(), partition_images(images, 64).boxes)
