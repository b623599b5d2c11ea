# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The splat as a kernel of the Hub: written, loaded without this package, and in the place of the model's renderer."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import make_images, make_model, max_error
from safetensors.torch import load_file, save_file
from transformers.utils.import_utils import is_kernels_available

from conversion import export_kernel
from gpstoken_hf import splat_gaussians
from pipelines.shared.programs import ProgramError, run_program

ROOT = Path(__file__).resolve().parents[1]


def write_kernel(folder, *options):
    assert run_program(export_kernel.main, ["--output", str(folder), *options]) == 0
    return folder


def inputs():
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(2, 70, 5, generator=generator)
    gaussians = torch.cat([random[..., :2] * 0.2 + 0.02, random[..., 2:] * 1.8 - 0.9], dim=-1)
    return {
        "gaussians": gaussians,
        "features": torch.randn(2, 70, 6, generator=generator),
        "mask": (torch.arange(70).expand(2, 70) < 60).clone(),
        "weights": torch.randn(2, 6, 24, 40, generator=generator),
    }


def value_and_gradients(splat, gaussians, features, mask, weights, **options):
    gaussians, features = gaussians.requires_grad_(), features.requires_grad_()
    maps = splat(gaussians, features, tuple(weights.shape[-2:]), attention_mask=mask, **options)
    grads = torch.autograd.grad((maps * weights).sum(), (gaussians, features))
    return {"maps": maps.detach(), "grad_gaussians": grads[0], "grad_features": grads[1]}


# -- loaded

LOAD = """
import sys
sys.modules["gpstoken_hf"] = sys.modules["numba"] = None
from pathlib import Path
import torch
from kernels import get_local_kernel
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
kernel = get_local_kernel(folder / "kernel")
given = load_file(folder / "inputs.safetensors")
gaussians, features = given["gaussians"].requires_grad_(), given["features"].requires_grad_()
for backend in ("auto", "triton"):
    # Triton's interpreter is slow, so it renders the first tokens.
    length = 70 if backend == "auto" else 3
    part = gaussians[:1, :length], features[:1, :length]
    part, mask, weights = ((gaussians, features), given["mask"], given["weights"]) if backend == "auto" else (
        part, None, given["weights"][:1, :, :8, :9]
    )
    size = tuple(weights.shape[-2:])
    maps = kernel.splat_gaussians(*part, size, backend=backend, attention_mask=mask)
    grads = torch.autograd.grad((maps * weights).sum(), part)
    found = {"maps": maps.detach(), "grad_gaussians": grads[0], "grad_features": grads[1]}
    save_file({k: v.contiguous() for k, v in found.items()}, folder / f"{backend}.safetensors")
assert not hasattr(torch.ops.gpstoken, "splat")
print(kernel.__name__)
"""


def import_kernels():
    """The package, where it has the functions that these tests call."""
    kernels = pytest.importorskip("kernels", reason="the package kernels is not installed")
    if not hasattr(kernels, "get_loaded_kernels"):
        pytest.skip("needs a newer version of the package kernels than transformers 5.4 admits")
    return kernels


def test_loads_without_this_package_and_equals_it(tmp_path):
    import_kernels()
    write_kernel(tmp_path / "kernel")
    save_file(inputs(), tmp_path / "inputs.safetensors")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("_gpstoken_splat_")

    given = inputs()
    expected = {"auto": value_and_gradients(splat_gaussians, **given)}
    few = {name: given[name].detach()[:1, :3] for name in ("gaussians", "features")}
    expected["triton"] = value_and_gradients(
        splat_gaussians, **few, mask=None, weights=given["weights"][:1, :, :8, :9]
    )
    for backend, values in expected.items():
        found = load_file(tmp_path / f"{backend}.safetensors")
        for name, value in values.items():
            assert max_error(found[name], value) <= 2e-6 * value.abs().max().item(), (backend, name)


def test_takes_the_place_of_the_renderer_on_request(tmp_path, monkeypatch):
    kernels = import_kernels()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_kernel(tmp_path / "kernel")
    model, images = make_model().requires_grad_(False), make_images(2, 32, 40)
    expected = model(images, num_tokens=[8, 5]).sample
    assert not kernels.get_loaded_kernels()
    assert model.renderer.forward.__func__ is type(model.renderer).forward

    def replace():
        if is_kernels_available():
            model.set_use_kernels(True)
        else:  # transformers refuses this version of kernels, and would call the same function
            kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")

    # Without a mapping nothing is replaced, and nothing is fetched.
    replace()
    assert model.renderer.forward.__func__ is type(model.renderer).forward
    assert not kernels.get_loaded_kernels()

    layer = kernels.LocalLayerRepository(tmp_path / "kernel", layer_name="GaussianSplat")
    with kernels.use_kernel_mapping({"GaussianSplat": {"cpu": layer}}):
        replace()
    (loaded,) = kernels.get_loaded_kernels()
    assert model.renderer.forward.__func__ is loaded.module.layers.GaussianSplat.forward
    assert loaded.module.splat_gaussians is not splat_gaussians
    assert max_error(model(images, num_tokens=[8, 5]).sample, expected) <= 1e-5


def test_without_the_kernels_package_one_line_says_so():
    if is_kernels_available():
        pytest.skip("transformers finds a version of the package kernels that it can use")
    with pytest.raises((ValueError, ImportError), match=r"(?i)kernels"):
        make_model().set_use_kernels(True)


@pytest.mark.slow
def test_its_own_tests_pass(tmp_path):
    pytest.importorskip("kernels", reason="the package kernels is not installed")
    write_kernel(tmp_path / "kernel")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    result = subprocess.run(command, cwd=tmp_path / "kernel", capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout


# -- written


def test_the_folder(tmp_path):
    folder = write_kernel(tmp_path / "kernel", "--repo_id", "someone/splat", "--version", "3")
    variants = sorted(path.name for path in (folder / "build").iterdir())
    assert variants == ["torch-cpu", "torch-cuda", "torch-metal", "torch-rocm", "torch-xpu"]
    identifiers = set()
    for variant in (folder / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": variant.name.removeprefix("torch-")}
        assert (metadata["version"], metadata["python-depends"]) == (3, [])
        identifiers.add(metadata["id"])
        sources = {path.name: path.read_text() for path in variant.glob("*.py")}
        for name, text in sources.items():
            assert text.startswith("# Copyright 2026 The gpstoken-hf authors."), name
            compile(text, name, "exec")
            imported = set(re.findall(r"^ *(?:from|import) ([a-z_]+)", text, re.MULTILINE))
            third_party = imported - set(sys.stdlib_module_names) - {"torch", "triton", "__future__"}
            assert not third_party, (name, third_party)
        assert not re.search(r"numba|cpu_forward|gpstoken::|ops\.gpstoken\.|gpstoken_hf", sources["splatting.py"])
    assert len(identifiers) == len(variants)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: kernels\n")
    assert 'get_kernel("someone/splat", version=3' in card


def test_other_sources_make_other_ops(monkeypatch):
    namespace = export_kernel.kernel_sources()["_ops.py"]
    assert export_kernel.kernel_sources()["_ops.py"] == namespace
    monkeypatch.setattr(export_kernel, "INIT", export_kernel.INIT + "# another version\n")
    assert export_kernel.kernel_sources()["_ops.py"] != namespace


def test_a_text_that_is_gone_stops_the_export(monkeypatch):
    monkeypatch.setattr(export_kernel, "EDITS", (("no such text", ""),))
    with pytest.raises(ProgramError, match=r"splatting.py must hold 'no such text' once, got it 0 times"):
        export_kernel.kernel_sources()


def test_what_is_refused(tmp_path, capsys):
    assert run_program(export_kernel.main, ["--output", str(tmp_path / "new"), "--repo_id", "nobody"]) == 2
    assert "--repo_id must be owner/name, got nobody" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert run_program(export_kernel.main, ["--output", str(tmp_path / "mine"), "--overwrite"]) == 2
    assert "that also holds file" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
