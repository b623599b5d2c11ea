# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The compiled partition against the golden regions and against the plain NumPy/OpenCV algorithm."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_reference import partition_reference, region_complexity
from safetensors.numpy import load_file

from gpstoken_hf import partition_images
from gpstoken_hf.complexity_cpu import _ENTROPY_TABLE, Scratch, _complexity
from gpstoken_hf.gaussians import boxes_to_gaussians
from gpstoken_hf.layout import PADDING_BOX, PADDING_GAUSSIAN
from gpstoken_hf.regions import max_regions, morton_order

TESTS = Path(__file__).parent
PORTABLE = TESTS / "golden"
SHARED = TESTS.parent.parent / "shared"

cv2.setNumThreads(1)


def golden_cases():
    """(file, name of the regions) of every golden partition, the photographs' too where they are at hand."""
    files = [PORTABLE / "partition.safetensors", PORTABLE / "partition_degenerate.safetensors"]
    photographs = SHARED / "golden" / "partition.safetensors"
    if photographs.exists():
        files.append(photographs)
    return [(file, name) for file in files for name in sorted(load_file(file)) if name.startswith("regions_")]


def golden_arguments(tensors, name):
    """Arguments of `partition_images` for the golden regions of that name."""
    match = re.fullmatch(r"regions_(bias_)?(\w+?)(?:_l(\d+)_lambda([\d.]+)_min(\d+))?", name)
    bias, image, num_tokens, exponent, min_size = match.groups()
    pixels = tensors[f"image_{image}"].astype(np.float32) / 127.5 - 1
    return {
        "images": torch.from_numpy(pixels).permute(2, 0, 1)[None],
        "num_tokens": int(num_tokens or 64),
        "complexity_exponent": float(exponent or 2.5),
        "min_region_size": int(min_size or 8),
        "importance": torch.from_numpy(tensors[f"bias_{image}"])[None] if bias else None,
    }


def as_set(boxes):
    return {tuple(box) for box in np.asarray(boxes).tolist()}


def sorted_rows(array):
    return array[np.lexsort(array.T[::-1])]


def random_image(rng, height, width):
    """Noise of uneven strength: some regions flat, some busy."""
    strength = cv2.resize(rng.random((3, 3)), (width, height)).reshape(height, width)
    return (rng.uniform(-1, 1, (3, height, width)) * strength).astype(np.float32)


@pytest.mark.parametrize(("file", "name"), golden_cases(), ids=lambda value: getattr(value, "stem", value))
def test_golden_regions_and_gaussians(file, name):
    tensors = load_file(file)
    arguments = golden_arguments(tensors, name)
    output = partition_images(**arguments)
    height, width = arguments["images"].shape[-2:]
    corners = np.array([width - 1, height - 1, width - 1, height - 1])
    expected = np.rint((tensors[name].astype(np.float64) + 1) / 2 * corners).astype(np.int64)
    assert as_set(output.boxes[0]) == as_set(expected)
    gaussians = tensors[name.replace("regions", "gaussians")]
    np.testing.assert_allclose(sorted_rows(output.gaussians[0].numpy()), sorted_rows(gaussians), rtol=0, atol=1e-6)


def complexity(grey, exponent=2.5):
    height, width = grey.shape
    return _complexity(
        grey,
        np.array([0, 0, width - 1, height - 1]),
        exponent,
        np.zeros((0, 0), dtype=np.float32),
        _ENTROPY_TABLE,
        Scratch.for_image(height, width, 1),
    )


@pytest.mark.parametrize("which", [PORTABLE, SHARED / "golden"], ids=["synthetic", "photographs"])
def test_golden_complexity(which):
    if not (which / "partition.safetensors").exists():
        pytest.skip("no golden photographs here")
    tensors = load_file(which / "partition.safetensors")
    red, green, blue = (tensors["image_0"].astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)
    grey = (0.299 * red + 0.587 * green + 0.114 * blue + 1) / 2
    for y0, y1, x0, x1, exponent, m in tensors["complexity_rows"]:
        region = np.ascontiguousarray(grey[int(y0) : int(y1), int(x0) : int(x1)])
        assert complexity(region, exponent) == pytest.approx(m, rel=1e-13)


@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 1), (1, 7), (7, 1), (1, 300), (300, 1), (2, 2), (2, 7), (3, 5), (8, 8), (8, 16), (16, 8), (19, 11)],
        *[(37, 150), (64, 64), (64, 128), (128, 64), (127, 129), (128, 128), (150, 20), (37, 301), (300, 400)],
    ],
)
def test_complexity_is_that_of_opencv(shape):
    """Bit for bit: OpenCV 5 on x86-64 with AVX2 or AVX-512 (other builds round the resize differently)."""
    height, width = shape
    rng = np.random.default_rng(height * 1000 + width)
    for contrast in (1.0, 0.1, 1e-3):
        for grey in (rng.random(shape), cv2.GaussianBlur(rng.random(shape), (9, 9), 3).reshape(shape)):
            grey = np.ascontiguousarray(grey * contrast, dtype=np.float32)
            expected = region_complexity(grey, (0, 0, width - 1, height - 1))
            if cv2.__version__ >= "5":
                assert complexity(grey) == expected
            else:
                assert complexity(grey) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_magnitudes_on_the_edges_of_bins(steps):
    """A ramp whose magnitude is exactly an edge of a bin, and the same an ulp beside it."""
    ramp = (np.arange(64) * steps * 11 / 4096).astype(np.float32)
    beside = np.random.default_rng(0).choice([0, 2.0**-24, -(2.0**-24)], (64, 64)).astype(np.float32)
    for grey in (np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.clip(ramp + beside, 0, 1)):
        grey = np.ascontiguousarray(grey)
        assert complexity(grey) == region_complexity(grey, (0, 0, 63, 63))


@pytest.mark.parametrize(
    ("height", "width", "min_region_size", "num_tokens"),
    [
        (37, 301, 8, 100),
        (192, 320, 8, 300),
        (1, 1, 8, 1),
        (1, 300, 8, 40),
        (300, 1, 3, 60),
        (3, 200, 2, 50),
        (17, 17, 1, 60),
        (64, 64, 4, 256),
        (101, 99, 5, 128),
    ],
)
def test_any_size_gives_the_regions_of_the_plain_algorithm(height, width, min_region_size, num_tokens):
    rng = np.random.default_rng(height + width)
    image = random_image(rng, height, width)
    importance = (rng.random((height, width)) < 0.1).astype(np.float32) * 64
    for weights in (None, importance):
        expected = partition_reference(image, num_tokens, 2.5, min_region_size, weights)
        output = partition_images(
            torch.from_numpy(image)[None],
            num_tokens,
            min_region_size=min_region_size,
            importance=None if weights is None else torch.from_numpy(weights)[None],
        )
        assert as_set(output.boxes[0]) == as_set(expected)


def photographs():
    datasets = pytest.importorskip("datasets")
    file = SHARED / "data" / "imagenet_sample" / "validation.parquet"
    if not file.exists():
        pytest.skip("no photographs here")
    return datasets.load_dataset("parquet", data_files=str(file), split="train")


@pytest.mark.slow
def test_regions_of_200_random_crops_of_photographs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    rng = np.random.default_rng(0)
    rows = photographs()
    for trial in range(200):
        pixels = np.asarray(rows[trial % len(rows)]["image"].convert("RGB"))
        height = int(rng.integers(16, pixels.shape[0] + 1)) if trial % 2 else min(256, pixels.shape[0])
        width = int(rng.integers(16, pixels.shape[1] + 1)) if trial % 2 else min(256, pixels.shape[1])
        top, left = rng.integers(pixels.shape[0] - height + 1), rng.integers(pixels.shape[1] - width + 1)
        crop = pixels[top : top + height, left : left + width].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        min_region_size = int(rng.choice([4, 8]))
        num_tokens = int(rng.integers(1, min(256, max_regions(height, width, min_region_size)) + 1))
        expected = partition_reference(crop, num_tokens, 2.5, min_region_size)
        output = partition_images(torch.from_numpy(crop)[None], num_tokens, min_region_size=min_region_size)
        assert as_set(output.boxes[0]) == as_set(expected), (trial, top, left, height, width, num_tokens)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    min_region_size=st.integers(1, 12),
    share=st.floats(0, 1),
    flat=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_regions_tile_the_image_in_morton_order(height, width, min_region_size, share, flat, seed):
    rng = np.random.default_rng(seed)
    image = np.zeros((3, height, width), dtype=np.float32) if flat else random_image(rng, height, width)
    num_tokens = 1 + round(share * (max_regions(height, width, min_region_size) - 1))
    output = partition_images(torch.from_numpy(image)[None], num_tokens, min_region_size=min_region_size)
    boxes = output.boxes[0]
    assert boxes.shape == (num_tokens, 4)
    assert boxes.dtype == torch.int64
    covered = np.zeros((height, width), dtype=int)
    for x0, y0, x1, y1 in boxes.tolist():
        assert 0 <= x0 <= x1 < width
        assert 0 <= y0 <= y1 < height
        covered[y0 : y1 + 1, x0 : x1 + 1] += 1
    assert (covered == 1).all()
    assert torch.equal(morton_order(boxes), torch.arange(num_tokens))
    assert torch.equal(output.gaussians[0], boxes_to_gaussians(boxes, (height, width)))
    assert output.attention_mask.tolist() == [[1] * num_tokens]
    again = partition_images(torch.from_numpy(image)[None], num_tokens, min_region_size=min_region_size)
    assert torch.equal(again.boxes, output.boxes)


def test_counts_per_image_are_padded_and_masked():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(np.stack([random_image(rng, 48, 80) for _ in range(4)]))
    counts = [1, 24, 7, 24]
    output = partition_images(images, counts)
    assert output.boxes.shape == (4, 24, 4)
    assert output.gaussians.shape == (4, 24, 5)
    assert output.attention_mask.dtype == torch.int64
    for index, count in enumerate(counts):
        alone = partition_images(images[index : index + 1], count)
        assert torch.equal(output.boxes[index, :count], alone.boxes[0])
        assert torch.equal(output.gaussians[index, :count], alone.gaussians[0])
        assert (output.boxes[index, count:] == torch.tensor(PADDING_BOX)).all()
        assert (output.gaussians[index, count:] == torch.tensor(PADDING_GAUSSIAN)).all()
        assert output.attention_mask[index].tolist() == [1] * count + [0] * (24 - count)


def test_importance_draws_tokens():
    rng = np.random.default_rng(1)
    images = torch.from_numpy(random_image(rng, 128, 128))[None]
    importance = torch.zeros(1, 128, 128)
    importance[:, 32:64, 64:96] = 1000.0

    def tokens_inside(boxes):
        x0, y0, x1, y1 = boxes.unbind(-1)
        return int(((x0 >= 64) & (x1 < 96) & (y0 >= 32) & (y1 < 64)).sum())

    plain = tokens_inside(partition_images(images, 64).boxes)
    focused = tokens_inside(partition_images(images, 64, importance=importance).boxes)
    assert focused == 16 > plain


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_layouts_of_memory(dtype):
    rng = np.random.default_rng(2)
    images = torch.from_numpy(np.stack([random_image(rng, 64, 64) for _ in range(2)])).to(dtype)
    expected = partition_images(images.to(torch.float32), 32).boxes
    assert torch.equal(partition_images(images, 32).boxes, expected)
    assert torch.equal(partition_images(images.to(memory_format=torch.channels_last), 32).boxes, expected)
    assert torch.equal(partition_images(images.requires_grad_(), 32).boxes, expected)


def test_threads_give_what_one_thread_gives():
    rng = np.random.default_rng(3)
    images = torch.from_numpy(np.stack([random_image(rng, 64, 96) for _ in range(9)]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = partition_images(images, 48).boxes
        torch.set_num_threads(4)
        assert torch.equal(partition_images(images, 48).boxes, expected)
    finally:
        torch.set_num_threads(threads)


BAD_ARGUMENTS = {
    "unbatched": ({"images": torch.zeros(3, 32, 32)}, r"\(B, 3, H, W\), got \(3, 32, 32\)"),
    "grey": ({"images": torch.zeros(1, 1, 32, 32)}, r"\(B, 3, H, W\), got \(1, 1, 32, 32\)"),
    "no pixels": ({"images": torch.zeros(1, 3, 0, 32)}, r"\(B, 3, H, W\), got \(1, 3, 0, 32\)"),
    "array": ({"images": np.zeros((1, 3, 32, 32))}, "got ndarray"),
    "uint8": ({"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}, "floating point.*torch.uint8"),
    "nan": ({"images": torch.full((1, 3, 32, 32), torch.nan)}, "finite, got 3072 NaN"),
    "infinite": ({"images": torch.full((1, 3, 32, 32), torch.inf)}, "finite, got 3072 NaN or infinite"),
    "range": ({"images": torch.full((1, 3, 32, 32), 1.5)}, r"in \[-1, 1\], got values from 1.5 to 1.5"),
    "zero tokens": ({"num_tokens": 0}, "at least 1, got 0"),
    "negative tokens": ({"num_tokens": [-3]}, "at least 1, got -3"),
    "too many tokens": (
        {"num_tokens": 17},
        "at most 16, the number of regions .* 32 x 32 pixels .* min_region_size=8, got 17",
    ),
    "absurdly many tokens": ({"num_tokens": 10**15}, "at most 16, the number of regions"),
    "wrong number of counts": ({"num_tokens": [4, 4]}, "one number per image, 1, got 2 numbers"),
    "fraction of a token": ({"num_tokens": 4.0}, "integer or one integer per image, got 4.0"),
    "fractions of tokens": ({"num_tokens": [4.5]}, r"integer or one integer per image, got \[4.5\]"),
    "exponent": ({"complexity_exponent": -1.0}, "complexity_exponent .* got -1.0"),
    "exponent nan": ({"complexity_exponent": float("nan")}, "complexity_exponent .* got nan"),
    "region size": ({"min_region_size": 0}, "at least 1 pixel, got 0"),
    "region size fraction": ({"min_region_size": 4.5}, "integer .* got 4.5"),
    "sigma scale": ({"sigma_scale": 0.0}, r"sigma_scale must be in \(0, 1\], got 0.0"),
    "importance shape": ({"importance": torch.zeros(32, 32)}, r"\(1, 32, 32\), got \(32, 32\)"),
    "importance negative": ({"importance": -torch.ones(1, 32, 32)}, "importance must be at least 0, got .* -1"),
    "importance nan": ({"importance": torch.full((1, 32, 32), torch.nan)}, "importance must be finite"),
    "backend": ({"backend": "cuda"}, "backend must be .* got 'cuda'"),
}


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_input(arguments, message, backend):
    with pytest.raises(ValueError, match=message):
        partition_images(**{"images": torch.zeros(1, 3, 32, 32), "num_tokens": 4, "backend": backend, **arguments})


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_pixels_may_leave_their_range_by_the_rounding_of_a_resize(backend, sign):
    images = torch.from_numpy(random_image(np.random.default_rng(3), 40, 32))[None].clone()
    images[0, :, 7, 9] = sign * (1 + 2**-17)
    boxes = partition_images(images, 12, backend=backend).boxes
    assert torch.equal(boxes, partition_images(images.clamp(-1, 1), 12, backend=backend).boxes)
    images[0, 1, 7, 9] = sign * (1 + 2**-16)
    with pytest.raises(ValueError, match=r"images must be in \[-1, 1\], got values from .*1\.00002"):
        partition_images(images, 12, backend=backend)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("where", ["images", "importance"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_values_that_are_not_validated_do_no_harm(backend, where, value):
    """The result is a partition, though a meaningless one; nothing is read or written out of bounds."""
    rng = np.random.default_rng(4)
    arguments = {
        "images": torch.from_numpy(random_image(rng, 40, 33))[None].clone(),
        "importance": torch.ones(1, 40, 33),
    }
    arguments[where][..., 5:30, 11] = value
    boxes = partition_images(**arguments, num_tokens=20, backend=backend, validate=False).boxes[0]
    covered = torch.zeros(40, 33, dtype=torch.int64)
    for x0, y0, x1, y1 in boxes.tolist():
        covered[y0 : y1 + 1, x0 : x1 + 1] += 1
    assert (covered == 1).all()


def test_one_bad_image_in_a_batch_is_found():
    images = torch.zeros(3, 3, 32, 32)
    images[1, 2, 31, 31] = -1.001
    with pytest.raises(ValueError, match=r"got values from -1\.001 to 0"):
        partition_images(images, 4)


@pytest.mark.parametrize(("height", "width", "min_region_size"), [(37, 301, 8), (17, 17, 1), (1, 9, 8), (65, 33, 3)])
def test_the_largest_number_of_tokens_is_reached(height, width, min_region_size):
    image = random_image(np.random.default_rng(5), height, width)
    largest = max_regions(height, width, min_region_size)
    boxes = partition_images(torch.from_numpy(image)[None], largest, min_region_size=min_region_size).boxes
    assert boxes.shape[1] == largest
    x0, y0, x1, y1 = boxes[0].unbind(-1)
    assert int(torch.maximum(x1 - x0, y1 - y0).max()) <= min_region_size
    with pytest.raises(ValueError, match=f"at most {largest}, the number of regions .* got {largest + 1}"):
        partition_images(torch.from_numpy(image)[None], largest + 1, min_region_size=min_region_size)
    with pytest.raises(ValueError, match=f"at most {largest} regions"):
        partition_reference(image, largest + 1, 2.5, min_region_size)


def test_an_empty_batch_is_empty():
    output = partition_images(torch.zeros(0, 3, 32, 32), 4)
    assert output.boxes.shape[0] == output.gaussians.shape[0] == output.attention_mask.shape[0] == 0
