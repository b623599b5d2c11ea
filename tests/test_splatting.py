# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.

import doctest
import math
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from splatting_cases import (
    RHOS_NEAR_ONE,
    naive_splat,
    random_mask,
    random_tokens,
    relative_errors,
    ridge_tokens,
    value_and_gradients,
)
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from gpstoken_hf import splatting_torch
from gpstoken_hf.gaussians import pixel_coordinates
from gpstoken_hf.splatting import splat_gaussians, splat_reference

GOLDEN = pathlib.Path(__file__).parent / "golden"
# "cpu": compiled loops; "tiled": the PyTorch path of devices without a kernel. Both run on CPU tensors.
PATHS = ("cpu", "tiled")


def splat_by(path, size, support=3.0, mask=None):
    """The op on one of its paths; the option `backend` does not name "tiled"."""
    return lambda gaussians, features: torch.ops.gpstoken.splat(gaussians, features, mask, *size, support, path)


def reference(size, support=3.0, mask=None):
    return lambda gaussians, features: splat_reference(gaussians, features, size, support, mask)


def assert_same(actual, expected, rtol):
    """Each tensor to within `rtol` of its largest value."""
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape
        if want.numel():
            scale = max(1.0, want.abs().max().item())
            torch.testing.assert_close(got, want, rtol=0, atol=rtol * scale)


# ---- Against the formula --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("support", [0.5, 3.0, 10.0])
@pytest.mark.parametrize("size", [(1, 1), (7, 12), (1, 9)])
def test_reference_is_the_formula(size, support, extreme):
    gaussians, features = random_tokens(0, 2, 9, 3, torch.float64, extreme)
    mask = random_mask(0, 2, 9)
    for kept in (None, mask):
        expected = naive_splat(gaussians, features, size, support, kept)
        # The naive exponent cancels near rho = 1: worst seen 2e-9 at |rho| = 1 - 1e-5.
        assert_same([splat_reference(gaussians, features, size, support, kept)], [expected], 1e-8)


@pytest.mark.parametrize("prefix", ["", "merged_"])
@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_golden_maps(backend, prefix):
    golden = load_file(GOLDEN / "tokenizer_io.safetensors")
    tokens, rendered = golden[prefix + "tokens"].float(), golden[prefix + "rendered"].float()
    maps = splat_gaussians(tokens[..., :5], tokens[..., 5:], rendered.shape[-2:], backend=backend)
    torch.testing.assert_close(maps, rendered, rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=25)
@given(
    B=st.integers(0, 3),
    L=st.integers(0, 24),
    C=st.integers(1, 19),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    support=st.floats(0.5, 10),
    extreme=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_paths_equal_the_reference(path, B, L, C, size, support, extreme, masked, seed):
    gaussians, features = random_tokens(seed, B, L, C, torch.float64, extreme)
    mask = random_mask(seed, B, L) if masked else None
    weights = torch.randn(B, C, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = value_and_gradients(reference(size, support, mask), gaussians, features, weights)
    actual = value_and_gradients(splat_by(path, size, support, mask), gaussians, features, weights)
    # Worst seen: 4e-12, at |rho| = 1 - 1e-5, where t is 224 times as large as u.
    assert_same(actual, expected, 1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("B", "L", "C", "size", "support"),
    [
        (2, 128, 16, (64, 64), 3.0),
        (1, 300, 1, (33, 70), 0.5),
        (3, 20, 128, (17, 9), 10.0),
        (1, 5, 3, (1, 1), 3.0),
        (1, 40, 2, (1024, 1), 3.0),
        (1, 1, 7, (8, 8), 3.0),
    ],
)
def test_float32_equals_the_reference(path, B, L, C, size, support):
    gaussians, features = random_tokens(L, B, L, C)
    weights = torch.randn(B, C, *size, generator=torch.Generator().manual_seed(0))
    expected = value_and_gradients(reference(size, support), gaussians, features, weights)
    actual = value_and_gradients(splat_by(path, size, support), gaussians, features, weights)
    assert_same(actual, expected, 1e-5)


def test_large_map():
    gaussians, features = random_tokens(0, 1, 60, 2)
    expected = splat_reference(gaussians, features, (1024, 1024))
    for path in PATHS:
        maps = splat_by(path, (1024, 1024))(gaussians, features)
        torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_float32_digits_survive_extreme_gaussians(path):
    gaussians, features = random_tokens(3, 2, 64, 4, extreme=True)
    weights = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    # Float32 and float64 may disagree on whether a pixel is in a box. At support 6 its weight is then below 2e-8.
    expected = value_and_gradients(reference((32, 32), 6.0), gaussians.double(), features.double(), weights.double())
    actual = value_and_gradients(splat_by(path, (32, 32), 6.0), gaussians, features, weights)
    expected = [tensor.float() for tensor in expected]
    assert_same(actual[::2], expected[::2], 1e-4)
    # t is up to 224 times as large as u, and its rounding goes into the gradient of rho: worst seen 1.3e-4.
    assert_same(actual[1:2], expected[1:2], 5e-4)


@pytest.mark.parametrize("num_pixels", [1, 2, 9, 64, 1000, 16384])
def test_tiles_of_a_box_hold_all_its_pixels(num_pixels):
    """Boxes near and far that end on a pixel centre or one float32 away from it."""
    rng = np.random.default_rng(num_pixels)
    x = pixel_coordinates(num_pixels, dtype=torch.float32)
    edge = x[torch.from_numpy(rng.integers(0, num_pixels, 3000))]
    extent = torch.from_numpy(10 ** rng.uniform(-5, 4, 3000)).float()
    mu = torch.where(torch.from_numpy(rng.random(3000) < 0.5), edge + extent, edge - extent)
    nudge = torch.from_numpy(rng.choice([-np.inf, np.inf, 0], 3000)).float()
    extent = torch.where(nudge == 0, extent, torch.nextafter(extent, nudge))
    first, count = splatting_torch._tile_range(mu, extent, num_pixels)
    inside = (x - mu.unsqueeze(1)).abs() <= extent.unsqueeze(1)  # as _tile_weights compares
    some = inside.any(1)
    assert some.float().mean() > 0.3
    first_pixel = inside.int().argmax(1)
    last_pixel = num_pixels - 1 - inside.flip(1).int().argmax(1)
    side = splatting_torch.TILE_SIZE
    assert (first[some] <= first_pixel[some] // side).all()
    assert (first + count > last_pixel // side)[some].all()


def test_tiles_need_no_float64():
    """Apple's GPUs have none."""

    class NoFloat64(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple) else (out,):
                assert getattr(value, "dtype", None) != torch.float64, func
            return out

    gaussians, _ = random_tokens(0, 2, 40, 3)
    mask = random_mask(0, 2, 40)
    x = torch.linspace(-1, 1, 16).view(2, 8)
    with NoFloat64():
        table = splatting_torch._token_table(gaussians, 3.0)
        for tiles, tokens in splatting_torch._tile_buckets(gaussians, mask, 16, 16, 3.0):
            splatting_torch._tile_weights(table, x, x, tiles, tokens)
        splatting_torch.gaussian_gradients(gaussians, gaussians, mask)


@pytest.mark.parametrize("path", ["reference", *PATHS])
@pytest.mark.parametrize("rho", RHOS_NEAR_ONE)
def test_float32_digits_survive_as_rho_comes_near_one(path, rho):
    splat = reference((33, 33), 6.0) if path == "reference" else splat_by(path, (33, 33), 6.0)
    for seed in range(4):
        gaussians, features = ridge_tokens(rho, seed)
        weights = torch.randn(1, 3, 33, 33, generator=torch.Generator().manual_seed(seed))
        exact = value_and_gradients(reference((33, 33), 6.0), gaussians.double(), features.double(), weights.double())
        errors = relative_errors(value_and_gradients(splat, gaussians, features, weights), exact)
        # t is up to 1 / sqrt(1 - rho²) times as large as u and inherits its rounding. Worst seen 5.8e-7; 3.0e-6 at the
        # second rho if 1 - rho * rho replaces (1 - rho) (1 + rho).
        assert max(errors) <= 8e-7 / math.sqrt((1 - rho) * (1 + rho))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(path, masked):
    gaussians, features = random_tokens(1, 2, 5, 3, torch.float64)
    mask = random_mask(1, 2, 5) if masked else None
    inputs = (gaussians.requires_grad_(), features.requires_grad_())
    assert torch.autograd.gradcheck(splat_by(path, (6, 7), 3.0, mask), inputs)


@pytest.mark.parametrize("path", PATHS)
def test_every_token_gets_its_gradient(path):
    # One pixel under many tokens: none is dropped for its position, its weight or its share.
    gaussians = torch.tensor([0.3, 0.3, 0.0, 0.0, 0.0]).repeat(1, 600, 1)
    gaussians[..., 3] = torch.linspace(-0.85, 0.85, 600)
    features = torch.ones(1, 600, 1)
    maps, grad_gaussians, grad_features = value_and_gradients(
        splat_by(path, (1, 1), 3.0), gaussians, features, torch.ones(1, 1, 1, 1)
    )
    weight = torch.exp(-0.5 * (gaussians[..., 3] / 0.3) ** 2)
    torch.testing.assert_close(grad_features[..., 0], weight)
    torch.testing.assert_close(maps.squeeze(), weight.sum())
    torch.testing.assert_close(grad_gaussians[..., 3], -weight * gaussians[..., 3] / 0.09, rtol=1e-5, atol=1e-6)


def test_examples_of_the_docstrings_run():
    results = doctest.testmod(sys.modules[splat_gaussians.__module__])
    assert results.failed == 0
    assert results.attempted >= 10


# ---- Padding, emptiness, dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_padded_tokens_change_nothing(backend, dtype):
    gaussians, features = random_tokens(0, 2, 12, 3)
    mask = random_mask(0, 2, 12)
    garbage = torch.where(mask, 0.0, float("nan")).unsqueeze(-1)
    weights = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    maps, grad_gaussians, grad_features = value_and_gradients(
        lambda g, f: splat_gaussians(g, f, (10, 10), backend=backend, attention_mask=mask.to(dtype)),
        gaussians + garbage,
        features + garbage,
        weights,
    )
    for b in range(2):
        alone = splat_gaussians(gaussians[b : b + 1, mask[b]], features[b : b + 1, mask[b]], (10, 10), backend=backend)
        torch.testing.assert_close(maps[b : b + 1], alone, rtol=0, atol=1e-6)
    for grad in (grad_gaussians, grad_features):
        assert (grad[~mask] == 0).all()
        assert (grad[mask] != 0).any(-1).all()


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize(("B", "L"), [(0, 4), (2, 0), (0, 0)])
def test_nothing_to_render(backend, B, L):
    gaussians, features = (tensor.requires_grad_() for tensor in random_tokens(0, B, L, 3))
    maps = splat_gaussians(gaussians, features, (5, 6), backend=backend)
    assert maps.shape == (B, 3, 5, 6)
    assert (maps == 0).all()
    maps.sum().backward()
    assert gaussians.grad.shape == (B, L, 5)
    assert features.grad.shape == (B, L, 3)


@pytest.mark.parametrize("path", PATHS)
def test_tokens_outside_the_frame_add_nothing(path):
    gaussians, features = random_tokens(0, 1, 6, 2)
    far = gaussians.clone()
    far[..., 3] += 1000
    maps, grad_gaussians, grad_features = value_and_gradients(
        splat_by(path, (9, 9)), torch.cat([gaussians, far], 1), features.repeat(1, 2, 1), torch.ones(1, 2, 9, 9)
    )
    torch.testing.assert_close(maps, splat_by(path, (9, 9))(gaussians, features))
    assert (grad_gaussians[:, 6:] == 0).all()
    assert (grad_features[:, 6:] == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dtypes(backend):
    gaussians, features = random_tokens(0, 1, 20, 4)
    full = splat_gaussians(gaussians, features, (8, 8), backend=backend)

    def dtype_of(gaussians, features):
        return splat_gaussians(gaussians, features, (8, 8), backend=backend).dtype

    assert dtype_of(gaussians.double(), features) == torch.float64
    assert dtype_of(gaussians, features.bfloat16()) == torch.float32
    assert dtype_of(gaussians.bfloat16(), features.bfloat16()) == torch.bfloat16
    # Rounded once at the start and once at the end: the sum itself is float32.
    rounded = splat_gaussians(gaussians, features.bfloat16().float(), (8, 8), backend=backend)
    half = splat_gaussians(gaussians, features.bfloat16(), (8, 8), backend=backend)
    assert torch.equal(half, rounded)
    assert not torch.equal(half, full)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_renders_in_float32(backend):
    gaussians, features = random_tokens(0, 2, 20, 4)
    half = features.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        maps = splat_gaussians(gaussians.bfloat16(), half, (8, 8), backend=backend)
        direct = torch.ops.gpstoken.splat(gaussians.bfloat16(), half, None, 8, 8, 3.0, "cpu")
    assert maps.dtype == direct.dtype == torch.float32
    expected = splat_gaussians(gaussians.bfloat16().float(), half.float(), (8, 8), backend=backend)
    assert torch.equal(maps, expected)
    maps.sum().backward()
    assert half.grad.dtype == torch.bfloat16


# ---- Determinism, threads, memory -----------------------------------------------------------------------------------


@pytest.fixture
def thread_count():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("thread_count")
def test_deterministic_on_any_number_of_threads(path):
    gaussians, features = random_tokens(0, 3, 200, 16)
    weights = torch.randn(3, 16, 96, 96, generator=torch.Generator().manual_seed(0))
    results = []
    for num_threads in (1, 3, 3):
        torch.set_num_threads(num_threads)
        results.append(value_and_gradients(splat_by(path, (96, 96)), gaussians, features, weights))
    if path == "tiled":  # PyTorch's matrix products depend on the number of threads
        results = results[1:]
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


def test_calls_from_several_threads():
    gaussians, features = random_tokens(0, 2, 100, 8)
    expected = splat_gaussians(gaussians, features, (40, 40))
    results = [None] * 4

    def work(index):
        for _ in range(5):
            results[index] = splat_gaussians(gaussians, features, (40, 40))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("path", PATHS)
def test_peak_memory(path):
    clear = pathlib.Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        pytest.skip("the kernel does not let a process reset its peak memory")

    def kibibytes(field):
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split(field + ":")[1].split()[0])

    gaussians, features = random_tokens(0, 1, 4096, 32)
    weights = torch.ones(1, 32, 256, 256)
    value_and_gradients(splat_by(path, (8, 8)), gaussians[:, :4], features[:, :4], weights[..., :8, :8])  # compiles
    clear.write_text("5")
    before = kibibytes("VmRSS")
    value_and_gradients(splat_by(path, (256, 256)), gaussians, features, weights)
    assert kibibytes("VmHWM") - before <= 200e6 / 1024


def test_strided_inputs_and_gradients():
    gaussians, features = random_tokens(0, 2, 10, 6)
    expected = value_and_gradients(splat_by("cpu", (9, 9)), gaussians, features, torch.ones(2, 6, 9, 9))
    strided = torch.stack([gaussians, gaussians], -1)[..., 0], features.transpose(1, 2).contiguous().transpose(1, 2)
    actual = value_and_gradients(splat_by("cpu", (9, 9)), *strided, torch.ones(1, 1, 1, 1).expand(2, 6, 9, 9))
    assert all(torch.equal(first, second) for first, second in zip(actual, expected, strict=True))


# ---- As an op -------------------------------------------------------------------------------------------------------


# opcheck reads the gradients of inputs that it has made non-leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(path, masked):
    gaussians, features = random_tokens(0, 2, 6, 3)
    mask = random_mask(0, 2, 6) if masked else None
    splat, backward = torch.ops.gpstoken.splat.default, torch.ops.gpstoken.splat_backward.default
    torch.library.opcheck(splat, (gaussians.requires_grad_(), features.requires_grad_(), mask, 8, 9, 3.0, path))
    grad = torch.randn(2, 3, 8, 9)
    torch.library.opcheck(backward, (grad, gaussians.detach(), features.detach(), mask, 3.0, path))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def render(gaussians, features, mask):
        return splat_gaussians(gaussians, features * 2, (8, 9), attention_mask=mask).square().mean()

    compiled = torch.compile(render, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for L in (6, 11):
        gaussians, features = (tensor.requires_grad_() for tensor in random_tokens(L, 2, L, 3))
        mask = random_mask(L, 2, L)
        expected = torch.autograd.grad(render(gaussians, features, mask), (gaussians, features))
        actual = torch.autograd.grad(compiled(gaussians, features, mask), (gaussians, features))
        assert_same(actual, expected, 1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_vmap(path):
    gaussians, features = random_tokens(0, 6, 7, 3)
    gaussians, mask = gaussians.unflatten(0, (3, 2)), random_mask(0, 2, 7)
    splat = splat_by(path, (5, 6), 3.0, mask)
    expected = torch.stack([splat(item, features[:2]) for item in gaussians])
    torch.testing.assert_close(torch.vmap(splat, in_dims=(0, None))(gaussians, features[:2]), expected)
    moved = torch.vmap(splat, in_dims=(2, None))(gaussians.movedim(0, 2), features[:2])
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("path", PATHS)
def test_many_gradients_at_once(path):
    gaussians, features = (tensor.requires_grad_() for tensor in random_tokens(0, 2, 7, 3))
    maps = splat_by(path, (5, 6), 3.0, random_mask(0, 2, 7))(gaussians, features)
    weights = torch.randn(4, *maps.shape, generator=torch.Generator().manual_seed(0))
    batched = torch.autograd.grad(maps, (gaussians, features), weights, is_grads_batched=True, retain_graph=True)
    for index in range(4):
        single = torch.autograd.grad(maps, (gaussians, features), weights[index], retain_graph=True)
        assert_same([grad[index] for grad in batched], single, 1e-6)


def test_second_derivatives_raise():
    gaussians, features = (tensor.requires_grad_() for tensor in random_tokens(0, 1, 4, 2))
    maps = splat_gaussians(gaussians, features, (6, 6), backend="cpu")
    (grad,) = torch.autograd.grad(maps.square().sum(), gaussians, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives of gpstoken::splat are not implemented"):
        grad.sum().backward()


# PyTorch prepares forward-mode AD with a function that it has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_forward_mode_raises(needs_gradient):
    gaussians, features = random_tokens(0, 1, 4, 2)
    gaussians.requires_grad_(needs_gradient)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(gaussians, torch.ones_like(gaussians))
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            splat_gaussians(dual, features, (6, 6))
        tangent = forward_ad.unpack_dual(splat_gaussians(dual, features, (6, 6), backend="reference")).tangent
        assert tangent.abs().max() > 0
        assert torch.isfinite(splat_gaussians(gaussians, features, (6, 6))).all()  # no tangent


def test_function_transforms_need_the_reference():
    gaussians, features = random_tokens(0, 1, 4, 2)

    def loss(gaussians, backend):
        return splat_gaussians(gaussians, features, (6, 6), backend=backend).square().sum()

    with pytest.raises(RuntimeError):  # PyTorch's own
        torch.func.grad(loss)(gaussians, "cpu")
    transformed = torch.func.grad(loss)(gaussians, "reference")
    (expected,) = torch.autograd.grad(loss(gaussians.requires_grad_(), "cpu"), gaussians)
    assert_same([transformed], [expected], 1e-5)


def copy_of_the_modules(package):
    """A package with splatting alone."""
    package.mkdir()
    (package / "__init__.py").touch()
    source = pathlib.Path(splatting_torch.__file__).parent
    for pattern in ("gaussians.py", "splatting*.py", "*_support.py"):
        for path in source.glob(pattern):
            shutil.copy(path, package)


def run_program(program, folder, **environment):
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, check=True, cwd=folder, capture_output=True, text=True)


def test_copies_of_the_module_share_the_op_and_compile_nothing_at_import(tmp_path):
    # The remote code of two model repositories loads two copies of the package's modules into one process.
    for copy in ("first_copy", "second_copy"):
        copy_of_the_modules(tmp_path / copy)
    program = (
        "import warnings, torch, first_copy.splatting\n"
        "with warnings.catch_warnings():\n"
        "    warnings.simplefilter('error', UserWarning)  # PyTorch's, about an op that is registered twice\n"
        "    import second_copy.splatting as second\n"
        "from first_copy import splatting_cpu as loops\n"
        "assert not loops._render_bands.signatures and not loops._reduce_tokens.signatures\n"
        "g, f = torch.full((1, 1, 5), 0.5), torch.ones(1, 1, 1)\n"
        "expected = second.splat_gaussians(g, f, (4, 4), backend='reference')\n"
        "torch.testing.assert_close(torch.ops.gpstoken.splat(g, f, None, 4, 4, 3.0, 'tiled'), expected)\n"
    )
    run_program(program, tmp_path)


def test_compiling_is_announced_once_and_loading_is_not(tmp_path):
    copy_of_the_modules(tmp_path / "package")
    program = (
        "import torch\n"
        "from package.splatting import splat_gaussians\n"
        "gaussians = torch.full((1, 2, 5), 0.5, requires_grad=True)\n"
        "splat_gaussians(gaussians, torch.ones(1, 2, 3), (4, 4)).sum().backward()\n"
    )
    cache = str(tmp_path / "cache")
    first, second = (run_program(program, tmp_path, NUMBA_CACHE_DIR=cache).stderr for _ in range(2))
    assert first.count("Compiling loops for the CPU with numba") == 1
    assert "Compiling" not in second


def test_without_numba_the_cpu_takes_the_tiles(tmp_path):
    copy_of_the_modules(tmp_path / "package")
    program = (
        "import sys\n"
        "sys.modules['numba'] = None\n"
        "import torch\n"
        "from package.splatting import splat_gaussians\n"
        "gaussians, features = torch.full((1, 2, 5), 0.5, requires_grad=True), torch.randn(1, 2, 3)\n"
        "results = []\n"
        "for backend in ('auto', 'reference'):\n"
        "    maps = splat_gaussians(gaussians, features, (4, 4), backend=backend)\n"
        "    results.append((maps, *torch.autograd.grad(maps.sum(), gaussians)))\n"
        "torch.testing.assert_close(*results)\n"
        "try:\n"
        "    splat_gaussians(gaussians, features, (4, 4), backend='cpu')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    assert (
        run_program(program, tmp_path).stdout
        == "backend must be one that is available, got 'cpu', which needs numba\n"
    )


def test_exports_with_a_size_that_is_not_known():
    class Render(torch.nn.Module):
        def forward(self, gaussians, features, pixels):
            return splat_gaussians(gaussians, features, (pixels.shape[0] // 2, pixels.shape[1]))

    def arguments(L, height):
        return *random_tokens(L, 2, L, 3), torch.zeros(height, 7)

    dynamic = {"gaussians": {1: torch.export.Dim("L")}, "features": {1: torch.export.Dim("L")}}
    dynamic["pixels"] = {0: 2 * torch.export.Dim("half_height", min=1)}
    for strict in (False, True):
        exported = torch.export.export(Render(), arguments(6, 8), dynamic_shapes=dynamic, strict=strict).module()
        assert torch.equal(exported(*arguments(11, 20)), Render()(*arguments(11, 20)))


# ---- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gaussians": torch.ones(2, 3, 4)}, r"gaussians must have shape \(B, L, 5\), got \(2, 3, 4\)"),
        ({"features": torch.ones(2, 4, 6)}, r"\(B, L\) = \(2, 3\).*got \(2, 4, 6\)"),
        ({"features": torch.ones(2, 3, 6, dtype=torch.int64)}, "features must be floating point, got torch.int64"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must have shape .*\(2, 3\), got \(2, 4\)"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask must be bool or integer, got torch.float32"),
        ({"gaussians": np.ones((2, 3, 5))}, "gaussians must be a torch.Tensor, got ndarray"),
        ({"features": [[[1.0]]]}, "features must be a torch.Tensor, got list"),
        ({"attention_mask": np.ones((2, 3), bool)}, "attention_mask must be a torch.Tensor, got ndarray"),
        ({"size": (0, 4)}, r"size must be \(h, w\), two integers of at least 1, got \(0, 4\)"),
        ({"size": (4,)}, r"size must be \(h, w\), two integers of at least 1, got \(4,\)"),
        ({"size": 4.5}, r"size must be \(h, w\), two integers of at least 1, got 4.5"),
        ({"size": (4.0, 4)}, r"size must be \(h, w\), two integers of at least 1, got \(4.0, 4\)"),
        ({"size": ("4", 4)}, r"size must be \(h, w\), two integers of at least 1, got \('4', 4\)"),
        ({"size": "44"}, r"size must be \(h, w\), two integers of at least 1, got '44'"),
        ({"size": None}, r"size must be \(h, w\), two integers of at least 1, got None"),
        ({"support": "3"}, "support must be a finite number above 0, got '3'"),
        ({"support": None}, "support must be a finite number above 0, got None"),
        ({"support": 0.0}, "support must be a finite number above 0, got 0.0"),
        ({"support": float("inf")}, "support must be a finite number above 0, got inf"),
        ({"support": float("nan")}, "support must be a finite number above 0, got nan"),
        ({"backend": "cuda"}, "backend must be one of .* got 'cuda'"),
        ({"features": torch.ones(2, 3, 6, device="meta")}, "on one device, got gaussians on cpu, features on meta"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"gaussians": torch.full((2, 3, 5), 0.5), "features": torch.ones(2, 3, 6), "size": (4, 4)}
    with pytest.raises(ValueError, match=message):
        splat_gaussians(**(arguments | change))
    if "backend" not in change:
        with pytest.raises(ValueError, match=message):
            splat_reference(**(arguments | change))


def test_sizes_and_supports_of_other_number_types():
    gaussians, features = random_tokens(0, 1, 4, 2)
    expected = splat_gaussians(gaussians, features, (4, 6), 3.0)
    for size in ([4, 6], torch.Size((4, 6)), (np.int64(4), np.int32(6))):
        for support in (3, np.float32(3), np.int64(3)):
            assert torch.equal(splat_gaussians(gaussians, features, size, support), expected)


def test_a_forced_backend_that_is_not_there_raises():
    gaussians, features = torch.full((1, 1, 5), 0.5), torch.ones(1, 1, 1)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(ValueError, match=r"got 'triton', which needs .* not tensors on cpu"):
            splat_gaussians(gaussians, features, (4, 4), backend="triton")
    with pytest.raises(ValueError, match=r"tensors must be on the CPU for backend 'cpu', got meta"):
        splat_gaussians(gaussians.to("meta"), features.to("meta"), (4, 4), backend="cpu")


def test_shapes_without_data():
    gaussians, features = torch.ones(2, 3, 5, device="meta"), torch.ones(2, 3, 6, device="meta")
    assert splat_gaussians(gaussians, features, (4, 7)).shape == (2, 6, 4, 7)


def test_without_triton_the_notice_comes_once(monkeypatch):
    from gpstoken_hf import splatting

    splatting._notice_no_triton.cache_clear()
    with pytest.warns(UserWarning, match="Triton is not installed"):
        splatting._notice_no_triton()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splatting._notice_no_triton()
    monkeypatch.setattr(splatting, "triton_is_available", lambda device: False)
    assert splatting._resolve_backend("auto", torch.device("cuda"), torch.float32) == "tiled"
    with pytest.raises(ValueError, match="got 'triton', which needs Triton"):
        splatting._resolve_backend("triton", torch.device("cuda"), torch.float32)
