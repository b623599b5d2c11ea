# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels: on a GPU where there is one, else through Triton's interpreter in a process of its own.

Triton decides at import whether kernels are interpreted. They are also compiled ahead of time for sm_90, which needs
no GPU.
"""

import os
import subprocess
import sys

import pytest
import torch
from splatting_cases import random_mask, random_tokens, value_and_gradients

from gpstoken_hf import splatting_triton
from gpstoken_hf.splatting import splat_gaussians, splat_reference
from gpstoken_hf.triton_support import is_available

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
runs_kernels = pytest.mark.skipif(not is_available(DEVICE), reason="no GPU here: test_under_the_interpreter runs it")


@pytest.mark.skipif(is_available(DEVICE), reason="the kernels run in this process")
def test_under_the_interpreter(pytestconfig):
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", "not ahead_of_time"]
    command += [f"-W{warning}" for warning in pytestconfig.getoption("pythonwarnings") or []]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "passed" in result.stdout


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
    # At |rho| = 1 - 1e-5 the rounding of u grows 224 times in t.
    assert_same(actual, expected, [1e-4, 5e-4, 1e-4])


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
def test_deterministic():
    gaussians, features = (tensor.to(DEVICE) for tensor in random_tokens(0, 2, 12, 5))
    weights = torch.randn(2, 5, 20, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    first, second = (
        value_and_gradients(
            lambda g, f: splat_gaussians(g, f, (20, 20), backend="triton"), gaussians, features, weights
        )
        for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@runs_kernels
def test_float64_is_refused():
    gaussians, features = (tensor.to(DEVICE) for tensor in random_tokens(0, 1, 2, 1, torch.float64))
    with pytest.raises(ValueError, match=r"computes in float32, got inputs that need torch.float64"):
        splat_gaussians(gaussians, features, (4, 4), backend="triton")


@runs_kernels
def test_pixel_coordinates_are_those_of_the_reference():
    # A support that ends on pixel centres: one unit in the last place would move them to the other side.
    for size in (3, 5, 16):
        gaussians = torch.tensor([[[0.25, 0.5, 0.0, 0.0, 0.0]]], device=DEVICE)
        features = torch.ones(1, 1, 1, device=DEVICE)
        for support in (1.0, 2.0):
            maps = splat_gaussians(gaussians, features, (size, size), support, backend="triton")
            expected = splat_reference(gaussians, features, (size, size), support)
            assert torch.equal(maps != 0, expected != 0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_on_a_gpu_auto_is_triton_and_float64_is_tiled():
    gaussians, features = (tensor.to(DEVICE) for tensor in random_tokens(0, 1, 30, 4))
    forced = splat_gaussians(gaussians, features, (16, 16), backend="triton")
    assert torch.equal(splat_gaussians(gaussians, features, (16, 16)), forced)
    double = splat_gaussians(gaussians.double(), features.double(), (16, 16))
    torch.testing.assert_close(double.float(), forced, rtol=0, atol=1e-5)


# ---- Without a GPU: the kernels compile for one ---------------------------------------------------------------------

POINTERS = {"mask_ptr": "*u8", "lists_ptr": "*i32"}
FORWARD = {
    "TILE_H": splatting_triton.TILE_HEIGHT,
    "TILE_W": splatting_triton.TILE_WIDTH,
    "CHUNK_L": splatting_triton.CHUNK,
    "SCAN_L": splatting_triton.SCAN,
    "EXP2_SCALE": splatting_triton._EXP2_SCALE,
}
BACKWARD = {
    "BLOCK_H": splatting_triton.BLOCK_HEIGHT,
    "BLOCK_W": splatting_triton.BLOCK_WIDTH,
    "EXP2_SCALE": splatting_triton._EXP2_SCALE,
}


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(
    ("kernel", "constants", "num_warps"),
    [
        ("forward_kernel", FORWARD | {"MAKE_LISTS": False, "HAS_MASK": False, "BLOCK_C": 16}, 4),
        ("forward_kernel", FORWARD | {"MAKE_LISTS": True, "HAS_MASK": True, "BLOCK_C": 64}, 4),
        ("backward_kernel", BACKWARD | {"SPLIT": False, "HAS_MASK": False, "BLOCK_C": 16}, 2),
        ("backward_kernel", BACKWARD | {"SPLIT": True, "HAS_MASK": True, "BLOCK_C": 64}, 4),
        ("finish_kernel", {"HAS_MASK": True, "BLOCK_C": 16}, 1),
    ],
)
def test_compiled_ahead_of_time_for_sm_90(kernel, constants, num_warps, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(splatting_triton, kernel)
    signature = {
        name: "constexpr" if name in constants
        else POINTERS.get(name, "*fp32") if name.endswith("_ptr")
        else "fp32" if name == "support"
        else "i32"
        for name in function.arg_names
    }  # fmt: skip
    compiled = triton.compile(
        ASTSource(function, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, **splatting_triton._OPTIONS},
    )
    assert compiled.asm["cubin"]
    assert "atom." not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 48 * 1024
