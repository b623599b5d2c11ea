# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels: on a GPU if there is one, else through Triton's interpreter in a separate process.

Triton decides at import whether kernels are interpreted. They are also compiled ahead of time, which needs no GPU.
"""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from ahead_of_time import compile_kernel, local_memory
from splatting_cases import (
    RHOS_NEAR_ONE,
    random_mask,
    random_tokens,
    relative_errors,
    ridge_tokens,
    value_and_gradients,
)

from gpstoken_hf import splatting_triton
from gpstoken_hf.gaussians import pixel_coordinates
from gpstoken_hf.splatting import splat_gaussians, splat_reference
from gpstoken_hf.triton_support import is_available

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
runs_kernels = pytest.mark.skipif(not is_available(DEVICE), reason="no GPU here: test_under_the_interpreter runs it")


@pytest.mark.skipif(is_available(DEVICE), reason="the kernels run in this process")
def test_under_the_interpreter(pytestconfig):
    command = [
        sys.executable,
        "-m",
        "pytest",
        __file__,
        "-q",
        "-p",
        "no:cacheprovider",
        "-rs",
        "-k",
        "not ahead_of_time",
    ]
    command += [f"-W{warning}" for warning in pytestconfig.getoption("pythonwarnings") or []]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "passed" in result.stdout
    assert "no GPU here" not in result.stdout, "what is skipped outside is to run here"


def assert_same(actual, expected, tolerances):
    for got, want, tolerance in zip(actual, expected, tolerances, strict=True):
        assert got.shape == want.shape
        scale = max(1.0, want.abs().max().item())
        torch.testing.assert_close(got.cpu(), want.cpu(), rtol=0, atol=tolerance * scale)


def reference_values(gaussians, features, size, support, mask, weights):
    return value_and_gradients(lambda g, f: splat_reference(g, f, size, support, mask), gaussians, features, weights)


@runs_kernels
@pytest.mark.parametrize(
    ("B", "L", "C", "size", "support", "masked"),
    [
        (2, 7, 3, (9, 13), 3.0, True),
        (1, 1, 1, (1, 1), 3.0, False),
        (1, 5, 2, (1, 20), 0.5, False),
        (1, 3, 2, (20, 1), 10.0, True),
        (2, 20, 16, (16, 16), 3.0, False),
        (1, 6, 70, (17, 19), 0.5, True),
        (1, 4, 128, (9, 9), 10.0, False),
    ],
)
def test_every_variant_equals_the_reference(B, L, C, size, support, masked):
    gaussians, features = (tensor.to(DEVICE) for tensor in random_tokens(L, B, L, C))
    mask = random_mask(L, B, L).to(DEVICE) if masked else None
    weights = torch.randn(B, C, *size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    maps, grad_gaussians, grad_features = reference_values(gaussians, features, size, support, mask, weights)
    for make_lists in (False, True):
        forward = splatting_triton.triton_forward(gaussians, features, mask, *size, support, make_lists=make_lists)
        assert_same([forward], [maps], [1e-5])
    for num_strips in (1, 3):
        grads = splatting_triton.triton_backward(weights, gaussians, features, mask, support, num_strips=num_strips)
        assert_same(grads, [grad_gaussians, grad_features], [1e-5, 1e-5])
        if mask is not None:
            assert all((grad[~mask] == 0).all() for grad in grads)


@runs_kernels
def test_more_tokens_than_are_scanned_at_once(monkeypatch):
    monkeypatch.setattr(splatting_triton, "SCAN", 32)
    gaussians, features = (tensor.to(DEVICE) for tensor in random_tokens(0, 2, 75, 3))
    mask = random_mask(0, 2, 75).to(DEVICE)
    maps = splatting_triton.triton_forward(gaussians, features, mask, 12, 20, 3.0, make_lists=True)
    assert_same([maps], [splat_reference(gaussians, features, (12, 20), 3.0, mask)], [1e-5])


@runs_kernels
@pytest.mark.parametrize("seed", range(4))
def test_extreme_gaussians(seed):
    gaussians, features = (tensor.to(DEVICE) for tensor in random_tokens(seed, 1, 24, 4, extreme=True))
    support = (0.5, 1.7, 3.0, 10.0)[seed]
    weights = torch.randn(1, 4, 19, 21, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    expected = reference_values(gaussians, features, (19, 21), support, None, weights)
    actual = value_and_gradients(
        lambda g, f: splat_gaussians(g, f, (19, 21), support, backend="triton"), gaussians, features, weights
    )
    assert (expected[0] != 0).float().mean() > 0.1
    # At |rho| = 1 - 1e-5, t magnifies the rounding of u 224 times.
    assert_same(actual, expected, [1e-4, 5e-4, 1e-4])


@runs_kernels
@pytest.mark.parametrize("rho", RHOS_NEAR_ONE)
def test_digits_survive_as_rho_comes_near_one(rho):
    gaussians, features = ridge_tokens(rho)
    weights = torch.randn(1, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    exact = reference_values(gaussians.double(), features.double(), (33, 33), 6.0, None, weights.double())
    actual = value_and_gradients(
        lambda g, f: splat_gaussians(g, f, (33, 33), 6.0, backend="triton"),
        gaussians.to(DEVICE),
        features.to(DEVICE),
        weights.to(DEVICE),
    )
    # As in test_splatting; worst seen 4.4e-7, and 2.8e-6 at the second rho with 1 - rho * rho.
    assert max(relative_errors(actual, exact)) <= 8e-7 / math.sqrt((1 - rho) * (1 + rho))


@runs_kernels
def test_padded_tokens_may_hold_anything():
    gaussians, features = random_tokens(0, 2, 8, 3)
    mask = random_mask(0, 2, 8)
    garbage = torch.where(mask, 0.0, float("nan")).unsqueeze(-1)
    weights = torch.ones(2, 3, 10, 10, device=DEVICE)
    expected = reference_values(gaussians.to(DEVICE), features.to(DEVICE), (10, 10), 3.0, mask.to(DEVICE), weights)
    actual = value_and_gradients(
        lambda g, f: splat_gaussians(g, f, (10, 10), backend="triton", attention_mask=mask.to(DEVICE)),
        (gaussians + garbage).to(DEVICE),
        (features + garbage).to(DEVICE),
        weights,
    )
    assert_same(actual, expected, [1e-5] * 3)


@runs_kernels
def test_tokens_outside_the_frame_and_nothing_at_all():
    gaussians, features = (tensor.to(DEVICE) for tensor in random_tokens(0, 1, 6, 2))
    gaussians[..., 3] += 1000
    actual = value_and_gradients(
        lambda g, f: splat_gaussians(g, f, (9, 9), backend="triton"),
        gaussians,
        features,
        torch.ones(1, 2, 9, 9, device=DEVICE),
    )
    assert all((tensor == 0).all() for tensor in actual)
    empty = splat_gaussians(gaussians[:, :0], features[:, :0], (3, 4), backend="triton")
    assert torch.equal(empty, torch.zeros(1, 2, 3, 4, device=DEVICE))


@runs_kernels
def test_more_tokens_and_rows_than_one_program_takes():
    """With the op's own choice of variants: lists of tokens, and boxes in strips, most of them empty."""
    L, size = splatting_triton.LIST_MIN_TOKENS + 3, (splatting_triton.ROWS_PER_STRIP + 6, 11)
    gaussians, features = (tensor.to(DEVICE) for tensor in random_tokens(0, 1, L, 3))
    mask = random_mask(0, 1, L).to(DEVICE)
    weights = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = reference_values(gaussians, features, size, 3.0, mask, weights)
    first, second = (
        value_and_gradients(
            lambda g, f: splat_gaussians(g, f, size, backend="triton", attention_mask=mask),
            gaussians,
            features,
            weights,
        )
        for _ in range(2)
    )
    assert_same(first, expected, [1e-5] * 3)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@runs_kernels
def test_float64_is_refused():
    gaussians, features = (tensor.to(DEVICE) for tensor in random_tokens(0, 1, 2, 1, torch.float64))
    with pytest.raises(ValueError, match=r"inputs must fit float32 for backend 'triton', got torch.float64"):
        splat_gaussians(gaussians, features, (4, 4), backend="triton")


@runs_kernels
@pytest.mark.parametrize("size", [3, 4, 5, 16, 33])
def test_no_pixel_changes_sides(size):
    """Boxes that end on pixel centres: one unit in the last place would move pixels to the other side."""
    x = pixel_coordinates(size, DEVICE, torch.float32)
    features = torch.ones(1, 1, 1, device=DEVICE)
    for i in range(size // 2, size):
        if x[i] > 0:
            gaussians = torch.tensor([[[x[i], 0.5, 0.0, 0.0, 0.0]]], device=DEVICE)
            maps = splat_gaussians(gaussians, features, (size, size), 1.0, backend="triton")
            expected = splat_reference(gaussians, features, (size, size), 1.0)
            assert expected[0, 0, :, i].any()
            assert torch.equal(maps != 0, expected != 0)


@pytest.mark.parametrize(
    "sizes",
    [
        (*range(2, 2049), 3000, 4095, 4096, 8191, 8192, 10000, 16384),
        pytest.param(range(2, 20001), marks=pytest.mark.slow),
    ],
    ids=["some", "every one"],
)
def test_coordinates_without_float64(sizes):
    """The float32 formula of the kernels has the same bits as the float64 one."""
    for size in sizes:
        span = np.float32(size - 1)
        ours = (2 * np.arange(size) - (size - 1)).astype(np.float32) / span
        assert np.array_equal(ours, pixel_coordinates(size, torch.device("cpu"), torch.float32).numpy())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_on_a_gpu_auto_is_triton_and_float64_is_tiled():
    gaussians, features = (tensor.to(DEVICE) for tensor in random_tokens(0, 1, 30, 4))
    forced = splat_gaussians(gaussians, features, (16, 16), backend="triton")
    assert torch.equal(splat_gaussians(gaussians, features, (16, 16)), forced)
    double = splat_gaussians(gaussians.double(), features.double(), (16, 16))
    torch.testing.assert_close(double.float(), forced, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_on_a_gpu_every_token_on_every_tile():
    """Without barriers, a warp would overwrite a list that other warps still read."""
    gaussians, features = (tensor.to(DEVICE) for tensor in random_tokens(0, 2, 2000, 20))
    gaussians[..., :2] = 0.9
    weights = torch.randn(2, 20, 96, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = reference_values(gaussians, features, (96, 96), 3.0, None, weights)
    for _ in range(5):
        actual = value_and_gradients(lambda g, f: splat_gaussians(g, f, (96, 96)), gaussians, features, weights)
        assert_same(actual, expected, [1e-4, 1e-4, 1e-4])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_on_a_gpu_unaligned_views_other_streams_and_graphs():
    tokens = torch.cat(random_tokens(0, 3, 40, 8), dim=-1).to(DEVICE)
    gaussians, features = tokens[1:, 1:, :5], tokens[1:, 1:, 5:]
    weights = torch.randn(2, 8, 20, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def run():
        return value_and_gradients(lambda g, f: splat_gaussians(g, f, (20, 20)), gaussians, features, weights)

    expected = reference_values(gaussians, features, (20, 20), 3.0, None, weights)
    assert_same(run(), expected, [1e-5] * 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = run()
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(other, expected, [1e-5] * 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    tokens[..., 5:] *= 2
    graph.replay()
    assert_same(captured[:1], [2 * expected[0]], [1e-5])


# ---- Without a GPU: the kernels compile for one ---------------------------------------------------------------------

FORWARD = {
    "TILE_H": splatting_triton.TILE_HEIGHT,
    "TILE_W": splatting_triton.TILE_WIDTH,
    "CHUNK_L": splatting_triton.CHUNK,
    "EXP2_SCALE": splatting_triton._EXP2_SCALE,
}
BACKWARD = {
    "BLOCK_H": splatting_triton.BLOCK_HEIGHT,
    "BLOCK_W": splatting_triton.BLOCK_WIDTH,
    "EXP2_SCALE": splatting_triton._EXP2_SCALE,
}


# The kernels for 64 channels at a time spill a few registers.
MAX_SPILLED_BYTES = 64


def kernel_variants():
    """Every variant that a call can need, as `(kernel, constants, warps)`."""
    for has_mask, block_c in itertools.product((False, True), (16, 32, 64)):
        common = {"HAS_MASK": has_mask, "BLOCK_C": block_c}
        yield "forward_kernel", FORWARD | common | {"MAKE_LISTS": False, "SCAN_L": splatting_triton.CHUNK}, 4
        for scan in (128, splatting_triton.SCAN):
            yield "forward_kernel", FORWARD | common | {"MAKE_LISTS": True, "SCAN_L": scan}, 4
        for split in (False, True):
            yield "backward_kernel", BACKWARD | common | {"SPLIT": split}, 2 if block_c <= 32 else 4
        yield "finish_kernel", common, 1


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(
    "capability", [pytest.param(75, marks=pytest.mark.slow), pytest.param(80, marks=pytest.mark.slow), 90]
)
@pytest.mark.parametrize(("kernel", "constants", "num_warps"), list(kernel_variants()))
def test_compiled_ahead_of_time(kernel, constants, num_warps, capability, tmp_path, monkeypatch):
    pointers = {"mask_ptr": "*u8" if constants["HAS_MASK"] else "*fp32", "lists_ptr": "*i32"}
    compiled = compile_kernel(
        splatting_triton, kernel, constants, pointers, num_warps, tmp_path, monkeypatch, capability
    )
    ptx = compiled.asm["ptx"]
    assert "atom." not in ptx
    assert "red.global" not in ptx
    # No cached reads of the lists, which the kernel itself writes; full float32 products; no float64.
    assert "ld.global.nc" not in ptx
    assert "mma." not in ptx
    assert ".f64" not in ptx
    spilled = local_memory(compiled.asm["cubin"], tmp_path)
    assert spilled is None or sum(spilled) <= MAX_SPILLED_BYTES
