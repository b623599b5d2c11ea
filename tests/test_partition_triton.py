# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The partition's kernels: on a GPU where there is one, else through Triton's interpreter in a process of its own.

They are also compiled ahead of time, which needs no GPU.
"""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from ahead_of_time import compile_kernel, local_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_partition import BAD_ARGUMENTS, PORTABLE, complexity, golden_arguments, golden_cases, random_image

from gpstoken_hf import complexity_torch, complexity_triton, partition, partition_images
from gpstoken_hf.complexity_torch import grey_images, region_entropies, region_tensors
from gpstoken_hf.regions import choose_regions, region_tree, sort_regions
from gpstoken_hf.triton_support import is_available

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
runs_kernels = pytest.mark.skipif(not is_available(DEVICE), reason="no GPU here: test_under_the_interpreter runs it")

# The interpreter computes with NumPy, which warns of inf - inf; a GPU does not, and these tests put inf and NaN in.
interpreted_nan = pytest.mark.filterwarnings(r"ignore:invalid value encountered in (add|subtract):RuntimeWarning")


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """The interpreter takes as long for a row of pixels as for all: one block of rows, but where a test says so."""
    if INTERPRETED:
        monkeypatch.setattr(complexity_triton, "ROWS", 64)


@pytest.mark.skipif(is_available(DEVICE), reason="the kernels run in this process")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(which):
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-m", f"{which} and not gpu"]
    command.append("-rs")
    result = subprocess.run(
        [*command, "-k", "not without_a_gpu"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "passed" in result.stdout
    assert "no GPU here" not in result.stdout, "what is skipped outside is to run here"


def random_batch(size, height, width, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([random_image(rng, height, width) for _ in range(size)]))


# ---- The entropies --------------------------------------------------------------------------------------------------


def every_entropy(grey, tree):
    """Entropies of all regions of the tree, not only of those that a partition needs."""
    return torch.ops.gpstoken.region_entropies(
        grey.to(DEVICE),
        torch.from_numpy(tree.boxes).to(DEVICE),
        torch.from_numpy(complexity_torch.entropy_table()).to(DEVICE),
    ).cpu()


@runs_kernels
@pytest.mark.parametrize(
    ("height", "width", "min_region_size"),
    [(1, 1, 8), (1, 40, 10), (300, 1, 60), (2, 9, 4), (9, 9, 4), (37, 61, 18), (37, 301, 80), (64, 64, 32)],
)
def test_entropies_are_those_of_the_compiled_loop_bit_for_bit(height, width, min_region_size):
    tree = region_tree(height, width, min_region_size)
    grey = grey_images(random_batch(1, height, width, seed=width))
    entropies = every_entropy(grey, tree)
    for (x0, y0, x1, y1), entropy in zip(tree.boxes, entropies[0].tolist()):
        region = np.ascontiguousarray(grey[0, y0 : y1 + 1, x0 : x1 + 1].numpy())
        assert complexity(region, exponent=1.0) == entropy * region.shape[0] * region.shape[1]
    regions = region_tensors(height, width, min_region_size, torch.device("cpu"))
    assert torch.equal(entropies[:, : regions.num_splittable], region_entropies(grey, regions))


@runs_kernels
def test_programs_that_score_several_regions_in_blocks(monkeypatch):
    """As on a GPU: blocks of rows, and scratch that is written again for the next region."""
    monkeypatch.setattr(complexity_triton, "ROWS", 16)
    monkeypatch.setattr(complexity_triton, "MAX_PROGRAMS", 3)
    tree = region_tree(40, 30, 20)
    grey = grey_images(random_batch(2, 40, 30))
    assert 2 * len(tree.boxes) > 3 * 3
    entropies = every_entropy(grey, tree)
    regions = region_tensors(40, 30, 20, torch.device("cpu"))
    assert torch.equal(entropies[:, : regions.num_splittable], region_entropies(grey, regions))


@runs_kernels
@pytest.mark.parametrize("steps", [1, 5])
def test_magnitudes_on_the_edges_of_bins(steps):
    ramp = (np.arange(64) * steps * 11 / 4096).astype(np.float32)
    beside = np.random.default_rng(0).choice([0, 2.0**-24, -(2.0**-24)], (64, 64)).astype(np.float32)
    grey = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.clip(ramp + beside, 0, 1)])
    entropies = every_entropy(torch.from_numpy(grey), region_tree(64, 64, 64))[:, 0]
    assert entropies.tolist() == [complexity(np.ascontiguousarray(image), exponent=1.0) / 4096 for image in grey]


@runs_kernels
@interpreted_nan
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, -7.0])
def test_pixels_that_nobody_has_checked_do_no_harm(value):
    grey = grey_images(random_batch(1, 20, 20))
    grey[:, 3:17, 5:8] = value
    tree = region_tree(20, 20, 12)
    assert torch.isfinite(every_entropy(grey, tree)).all()
    assert torch.isfinite(region_entropies(grey, region_tensors(20, 20, 12, torch.device("cpu")))).all()


# ---- The choices ----------------------------------------------------------------------------------------------------


def host_choice(scores, tree, counts):
    """Boxes `(B, L, 4)` that the compiled loop chooses for given scores."""
    boxes = np.zeros((len(counts), max(counts), 4), dtype=np.int64)
    # With entropies of 0 and an exponent of 1, the weights are the scores.
    choose_regions(
        np.zeros(scores.shape), scores, tree.boxes, tree.halves, np.array(counts, dtype=np.int64), 1.0, boxes
    )
    is_real = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return sort_regions(torch.from_numpy(boxes), is_real)


def device_choice(scores, size, counts):
    regions = region_tensors(*size, DEVICE)
    # An exponent of 0 gives 1 h w for every region: subtracted, the weights are the scores.
    area = regions.height * regions.width
    weights = torch.from_numpy(scores).to(DEVICE) - area
    return complexity_triton.triton_choose_boxes(
        torch.zeros(scores.shape, dtype=torch.float64, device=DEVICE),
        weights,
        regions,
        torch.tensor(counts, device=DEVICE),
        max(counts),
        0.0,
    ).cpu()


@runs_kernels
@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    min_region_size=st.integers(4, 12),
    num_scores=st.sampled_from([1, 2, 5, 1000]),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_choices_are_those_of_the_compiled_loop(height, width, min_region_size, num_scores, shares, seed):
    """Integers as scores, many of them equal: the oldest of the largest is taken, and squares go the same way."""
    tree = region_tree(height, width, min_region_size)
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, num_scores, (len(shares), tree.num_splittable)).astype(np.float64)
    largest = min(partition.max_regions(height, width, min_region_size), 24)
    counts = [1 + round(share * (largest - 1)) for share in shares]
    chosen = device_choice(scores, (height, width, min_region_size), counts)
    is_real = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    assert torch.equal(chosen[is_real], host_choice(scores, tree, counts)[is_real])


@runs_kernels
def test_choices_among_more_regions_than_a_warp_has_threads():
    tree = region_tree(128, 128, 8)
    scores = np.random.default_rng(0).integers(0, 50, (1, tree.num_splittable)).astype(np.float64)
    assert torch.equal(device_choice(scores, (128, 128, 8), [150]), host_choice(scores, tree, [150]))


@runs_kernels
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_scores_that_nobody_has_checked_do_no_harm(value):
    regions = region_tensors(32, 32, 8, DEVICE)
    scores = torch.full((2, regions.num_splittable), value, dtype=torch.float64, device=DEVICE)
    scores[1, ::3] = 1.0
    # More regions than there are, too.
    counts = torch.tensor([16, 40], device=DEVICE)
    chosen = torch.ops.gpstoken.choose_regions(scores, regions.halves, counts, 30)
    assert chosen.shape == (2, 30)
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) < len(regions.boxes)


# ---- The partition --------------------------------------------------------------------------------------------------


def same_partition(images, num_tokens, **options):
    """The three backends give the same; returns the kernels' output."""
    importance = options.pop("importance", None)
    expected = partition_images(images, num_tokens, importance=importance, backend="numba", **options)
    if importance is not None:
        importance = importance.to(DEVICE)
    output = partition_images(images.to(DEVICE), num_tokens, importance=importance, backend="triton", **options)
    for name in ("boxes", "gaussians", "attention_mask"):
        actual = getattr(output, name)
        assert actual.device.type == DEVICE.type
        assert torch.allclose(actual.cpu(), getattr(expected, name), rtol=0, atol=1e-7 * (name == "gaussians"))
    return output


@runs_kernels
@pytest.mark.parametrize(("height", "width", "min_region_size"), [(37, 101, 25), (1, 60, 15), (48, 48, 20), (1, 1, 1)])
def test_batches_with_counts_and_importance(height, width, min_region_size):
    images = random_batch(2, height, width, seed=width)
    rng = np.random.default_rng(height)
    # Powers of two: their sums are exact in any order.
    importance = torch.from_numpy(rng.choice([0.0, 0.5, 8.0], (2, height, width)).astype(np.float32))
    largest = partition.max_regions(height, width, min_region_size)
    for weights in (None, importance):
        same_partition(images, [largest, 1 + largest // 2], min_region_size=min_region_size, importance=weights)


@runs_kernels
@pytest.mark.parametrize("name", ["0", "flat", "halves"])
def test_portable_pictures(name):
    file = PORTABLE / ("partition.safetensors" if name == "0" else "partition_degenerate.safetensors")
    pixels = load_file(file)[f"image_{name}"].astype(np.float32) / 127.5 - 1
    same_partition(torch.from_numpy(pixels).permute(2, 0, 1)[None], 40, min_region_size=40)


@runs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "name"),
    # One number of tokens for each picture: the scores are the same for all.
    [case for case in golden_cases() if "bias" in case[1] or not re.search("_l64_|_l128_|min4", case[1])],
)
def test_golden_regions(file, name):
    arguments = golden_arguments(load_file(file), name)
    same_partition(arguments.pop("images"), arguments.pop("num_tokens"), **arguments)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_an_empty_batch(dtype):
    images = random_batch(1, 20, 24).to(dtype).requires_grad_()
    expected = partition_images(images.detach().to(torch.float32), 3, min_region_size=12)
    output = partition_images(images.to(DEVICE), 3, min_region_size=12, backend="triton")
    assert torch.equal(output.boxes.cpu(), expected.boxes)
    empty = partition_images(images[:0].to(DEVICE), 4, backend="triton")
    assert empty.boxes.shape[0] == empty.gaussians.shape[0] == empty.attention_mask.shape[0] == 0


@runs_kernels
def test_tensors_kept_from_inference_mode_serve_outside_it():
    images = random_batch(1, 20, 28).to(DEVICE)
    with torch.inference_mode():
        inside = partition_images(images, 4, min_region_size=12, backend="triton")
    outside = partition_images(images, 4, min_region_size=12, backend="triton")
    assert torch.equal(inside.boxes, outside.boxes)
    assert not outside.boxes.is_inference()
    assert outside.gaussians.clone().requires_grad_().square().sum().requires_grad


@runs_kernels
def test_more_regions_than_the_kernel_holds_are_chosen_by_the_host(monkeypatch):
    monkeypatch.setattr(partition, "MAX_CHOSEN", 4)
    monkeypatch.setattr(partition, "triton_choose_boxes", None)
    same_partition(random_batch(2, 40, 40), [6, 7], min_region_size=12)


@runs_kernels
@interpreted_nan
@pytest.mark.parametrize("name", ["nan", "infinite", "range", "importance negative", "importance nan"])
def test_bad_values_are_refused_as_on_the_cpu(name):
    arguments, message = BAD_ARGUMENTS[name]
    arguments = {"images": torch.zeros(1, 3, 32, 32), **arguments}
    arguments = {key: value.to(DEVICE) for key, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        partition_images(num_tokens=4, min_region_size=16, backend="triton", **arguments)
    # What was refused leaves nothing behind.
    same_partition(random_batch(1, 32, 32), 4, min_region_size=16)


@runs_kernels
def test_one_bad_pixel_in_a_batch_is_found():
    images = torch.zeros(3, 3, 32, 32)
    images[1, 2, 31, 31] = -1.001
    with pytest.raises(ValueError, match=r"got values from -1\.001 to 0"):
        partition_images(images.to(DEVICE), 4, min_region_size=16, backend="triton")


@pytest.mark.skipif(is_available(DEVICE), reason="the kernels run here")
def test_forced_without_a_gpu():
    with pytest.raises(ValueError, match=r"got 'triton', which needs Triton and images on CUDA .* images on cpu"):
        partition_images(torch.zeros(1, 3, 32, 32), 4, backend="triton")


@runs_kernels
def test_ops_are_well_formed():
    regions = region_tensors(20, 20, 12, DEVICE)
    grey = grey_images(random_batch(1, 20, 20)).to(DEVICE)
    boxes = regions.boxes[: regions.num_splittable]
    torch.library.opcheck(torch.ops.gpstoken.region_entropies, (grey, boxes, regions.entropy_table))
    scores = torch.ones(2, regions.num_splittable, dtype=torch.float64, device=DEVICE)
    counts = torch.tensor([1, 4], device=DEVICE)
    torch.library.opcheck(torch.ops.gpstoken.choose_regions, (scores, regions.halves, counts, 4))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_on_a_gpu_auto_takes_the_kernels(monkeypatch):
    images = random_batch(8, 256, 256).cuda()
    expected = partition_images(images, 128, backend="triton").boxes
    assert torch.equal(expected.cpu(), partition_images(images.cpu(), 128).boxes)
    monkeypatch.setattr(partition, "region_entropies", None)
    assert torch.equal(partition_images(images, 128).boxes, expected)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        elsewhere = partition_images(images, 128).boxes
    stream.synchronize()
    assert torch.equal(elsewhere, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_on_a_gpu_no_operation_synchronises():
    images = random_batch(4, 256, 256).cuda()
    importance = torch.rand(4, 256, 256, device="cuda")
    partition_images(images, [5, 128, 7, 9], importance=importance)
    torch.cuda.set_sync_debug_mode("error")
    try:
        partition_images(images, [5, 128, 7, 9], importance=importance, validate=False)
        partition_images(images, 64, validate=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- Without a GPU: the kernels compile for one ---------------------------------------------------------------------

POINTERS = {
    "entropy_kernel": {
        "grey_ptr": "*fp32",
        "boxes_ptr": "*i64",
        "table_ptr": "*fp64",
        "resized_ptr": "*fp32",
        "counts_ptr": "*i32",
        "entropies_ptr": "*fp64",
    },
    "choose_kernel": {"scores_ptr": "*fp64", "halves_ptr": "*i32", "counts_ptr": "*i64", "regions_ptr": "*i64"},
}


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_entropy_kernel_compiled_without_a_gpu(capability, tmp_path, monkeypatch):
    constants = {
        "ROWS": complexity_triton.ROWS,
        "SIZE": complexity_torch.RESIZED,
        "BINS": complexity_torch.USED_BINS,
        "BIN_WIDTH": complexity_torch.BIN_WIDTH,
        "MAGNITUDE_LIMIT": complexity_torch.MAGNITUDE_LIMIT,
    }
    pointers, warps = POINTERS["entropy_kernel"], complexity_triton.ENTROPY_WARPS
    result = compile_kernel(
        complexity_triton, "entropy_kernel", constants, pointers, warps, tmp_path, monkeypatch, capability
    )
    assert local_memory(result.asm["cubin"], tmp_path) in (None, [0, 0])
    ptx = result.asm["ptx"]
    # What the last bit hangs on: a square root that rounds, nothing fused or flushed to zero, no order of additions
    # that chance decides. Counting, in shared memory, may be atomic.
    assert "sqrt.rn.f64" in ptx
    assert not re.findall(r"\bfma\.|\bsqrt\.approx|\b(?:add|sub|mul|div)\.[\w.]*ftz", ptx)
    atomics = re.findall(r"\b(?:atom|red)\.[\w.:]+", ptx)
    assert all(".shared" in atomic and atomic.endswith(("u32", "s32")) for atomic in atomics), atomics
    # Addition and multiplication as written: none that the assembler may fuse.
    assert not re.findall(r"\b(?:add|sub|mul)\.f(?:32|64)", ptx)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("block", [2**n for n in range(5, 13)])
def test_choose_kernel_compiled_without_a_gpu(block, capability, tmp_path, monkeypatch):
    constants = {"BLOCK_L": block, "NO_KEY": complexity_triton._NO_KEY}
    warps = complexity_triton.choose_warps(block)
    pointers = POINTERS["choose_kernel"]
    result = compile_kernel(
        complexity_triton, "choose_kernel", constants, pointers, warps, tmp_path, monkeypatch, capability
    )
    assert local_memory(result.asm["cubin"], tmp_path) in (None, [0, 0])
    assert "atom." not in result.asm["ptx"]
    assert "f32" not in result.asm["ptx"]
