# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.

import os
import pathlib
import shutil
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from splatting_cases import naive_splat, random_mask, random_tokens, value_and_gradients
from torch.autograd import forward_ad

from gpstoken_hf.splatting import splat_gaussians, splat_reference

GOLDEN = pathlib.Path(__file__).parent / "golden"
# "cpu": compiled loops; "tiled": the PyTorch path of devices without a kernel. Both run on CPU tensors.
PATHS = ("cpu", "tiled")


def splat_by(path, size, support=3.0, mask=None):
    """The op on one of its paths, which `backend` does not all name."""
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
    # Supports of 6 and more: where a pixel changes sides between float32 and float64 its weight is below 2e-8.
    expected = value_and_gradients(reference((32, 32), 6.0), gaussians.double(), features.double(), weights.double())
    actual = value_and_gradients(splat_by(path, (32, 32), 6.0), gaussians, features, weights)
    expected = [tensor.float() for tensor in expected]
    assert_same(actual[::2], expected[::2], 1e-4)
    # t is up to 224 times as large as u, and its rounding goes into the gradient of rho: worst seen 1.3e-4.
    assert_same(actual[1:2], expected[1:2], 5e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(path, masked):
    gaussians, features = random_tokens(1, 2, 5, 3, torch.float64)
    mask = random_mask(1, 2, 5) if masked else None
    inputs = (gaussians.requires_grad_(), features.requires_grad_())
    assert torch.autograd.gradcheck(splat_by(path, (6, 7), 3.0, mask), inputs)


@pytest.mark.parametrize("path", PATHS)
def test_every_token_gets_its_gradient(path):
    # One pixel under many tokens: none is dropped for its rank, its weight or its share.
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
    if path == "tiled":  # PyTorch's matrix products depend on the number of threads; on the same number they do not
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


# opcheck reads the gradients of inputs that it has made non-leaves itself.
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
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


# PyTorch prepares forward-mode AD with a function that it has deprecated itself.
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
        assert torch.isfinite(splat_gaussians(gaussians, features, (6, 6))).all()  # no tangent: as ever


def test_function_transforms_need_the_reference():
    gaussians, features = random_tokens(0, 1, 4, 2)

    def loss(gaussians, backend):
        return splat_gaussians(gaussians, features, (6, 6), backend=backend).square().sum()

    with pytest.raises(RuntimeError):  # PyTorch's own
        torch.func.grad(loss)(gaussians, "cpu")
    transformed = torch.func.grad(loss)(gaussians, "reference")
    (expected,) = torch.autograd.grad(loss(gaussians.requires_grad_(), "cpu"), gaussians)
    assert_same([transformed], [expected], 1e-5)


def test_copies_of_the_module_share_the_op_and_compile_nothing_at_import(tmp_path):
    # Remote code of two model repositories brings two copies of the package's modules into one process.
    source = pathlib.Path(sys.modules["gpstoken_hf.splatting"].__file__).parent
    for copy in ("first_copy", "second_copy"):
        (tmp_path / copy).mkdir()
        (tmp_path / copy / "__init__.py").touch()
        for name in ("gaussians", "splatting", "splatting_cpu", "splatting_triton", "triton_support"):
            shutil.copy(source / f"{name}.py", tmp_path / copy)
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
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, cwd=tmp_path)


# ---- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gaussians": torch.ones(2, 3, 4)}, r"gaussians must have shape \(B, L, 5\), got \(2, 3, 4\)"),
        ({"features": torch.ones(2, 4, 6)}, r"\(B, L\) = \(2, 3\).*got \(2, 4, 6\)"),
        ({"features": torch.ones(2, 3, 6, dtype=torch.int64)}, "features must be floating point, got torch.int64"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must have shape .*\(2, 3\), got \(2, 4\)"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask must be bool or integer, got torch.float32"),
        ({"size": (0, 4)}, r"both at least 1, got \(0, 4\)"),
        ({"size": (4,)}, r"size must be \(h, w\)"),
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


def test_a_forced_backend_that_is_not_there_raises():
    gaussians, features = torch.full((1, 1, 5), 0.5), torch.ones(1, 1, 1)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(ValueError, match=r"'triton' needs .* got tensors on cpu"):
            splat_gaussians(gaussians, features, (4, 4), backend="triton")
    with pytest.raises(ValueError, match=r"'cpu' needs tensors on the CPU, got meta"):
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
    with pytest.raises(ValueError, match="'triton' needs Triton"):
        splatting._resolve_backend("triton", torch.device("cuda"), torch.float32)
