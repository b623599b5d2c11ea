# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Exported programs: written by the program, run without this package, equal to the model at other sizes."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from model_helpers import make_model
from PIL import Image

from conversion import export_model
from pipelines.shared.programs import run_program

RUN = """
import sys
sys.modules["gpstoken_hf"] = None
import runpy
sys.argv = [sys.argv[1]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(num_hidden_layers=1).save_pretrained(folder)
    return folder


def export(model_folder, output, *options):
    return run_program(export_model.main, ["--model", str(model_folder), "--output", str(output), *options])


def run_without_this_package(folder):
    """The lines that the example script prints in a process that cannot import gpstoken_hf."""
    command = [sys.executable, "-c", RUN, str(folder / "run_exported.py")]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return [line for line in result.stdout.splitlines() if ".onnx" in line or ".pt2" in line]


# What the program then says is in test_a_version_that_cannot_export_is_one_line.
needs_newer_torch = pytest.mark.skipif(
    torch.__version__.startswith("2.7."), reason="torch 2.7 cannot export this part"
)


@needs_newer_torch
def test_onnx_of_decode(model_folder, tmp_path, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    folder = tmp_path / "exported"
    assert export(model_folder, folder, "--parts", "decode", "encode", "--formats", "onnx") == 0
    assert "encode cannot be exported as onnx: the partition is an op of gpstoken_hf" in capsys.readouterr().out
    (line,) = run_without_this_package(folder)
    assert line.startswith("decode.onnx: output (2, 3, ")
    assert float(line.split()[-1]) <= 1e-4
    example = np.load(folder / "example.npz")
    height, width = example["decode.canvas"].shape
    for name in ("decode.onnx.png", "example.png"):
        with Image.open(folder / name) as picture:
            assert picture.size == (width, height)

    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "decode.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["tokens", "attention_mask", "canvas"]
    model = make_model(num_hidden_layers=1)
    for batch, count, size in ((1, 5, (7, 12)), (3, 20, (40, 33))):
        layout = torch.rand(batch, count, 5) * 0.5 + 0.2
        tokens = torch.cat([layout, torch.randn(batch, count, 4)], dim=-1)
        inputs = tokens.numpy(), np.ones((batch, count), np.int64), np.zeros(size, np.uint8)
        (output,) = session.run(None, dict(zip(("tokens", "attention_mask", "canvas"), inputs)))
        with torch.no_grad():
            assert np.abs(output - model.decode(tokens, size).sample.numpy()).max() <= 1e-4


def test_programs_whose_packages_are_missing_are_skipped(tmp_path):
    """One line for each; a program that cannot be compared is no success."""
    folder = tmp_path / "exported"
    folder.mkdir()
    shutil.copy(export_model.run_exported.__file__, folder)
    for name in ("decode.onnx", "encode_regions.pt2", "decode.pt2"):
        (folder / name).touch()
    np.savez(folder / "example.npz")
    hide = "import sys\nfor name in ('onnxruntime', 'torch', 'torchvision'):\n    sys.modules[name] = None\n"
    command = [sys.executable, "-c", hide + RUN, str(folder / "run_exported.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.splitlines() == [
        "decode.onnx: skipped, it needs onnxruntime >= 1.20, not installed here",
        "decode.pt2: skipped, it needs torch >= 2.7, not installed here",
        "encode_regions.pt2: skipped, it needs torch >= 2.7 and torchvision >= 0.22, not installed here",
    ]


@needs_newer_torch
def test_a_program_that_gives_nan_is_no_success(model_folder, tmp_path):
    folder = tmp_path / "exported"
    assert export(model_folder, folder, "--parts", "decode", "--formats", "torch") == 0
    example = dict(np.load(folder / "example.npz"))
    example["decode.output"][0, 0, 0, 0] = np.nan
    np.savez(folder / "example.npz", **example)
    command = [sys.executable, "-c", RUN, str(folder / "run_exported.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1
    assert "largest difference from the model nan" in result.stdout


@needs_newer_torch
def test_torch_export_of_every_part(model_folder, tmp_path):
    folder = tmp_path / "exported"
    parts = ("decode", "encode_regions", "encode")
    assert export(model_folder, folder, "--parts", *parts, "--formats", "torch") == 0
    lines = run_without_this_package(folder)
    assert [line.split(":")[0] for line in lines] == ["decode.pt2", "encode.pt2", "encode_regions.pt2"]
    assert "skipped, its partition is an op of gpstoken_hf" in lines[1]
    assert all(float(line.split()[-1]) <= 1e-4 for line in (lines[0], lines[2]))


@pytest.mark.slow
def test_onnx_of_the_encoder_after_the_partition(model_folder, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    folder = tmp_path / "exported"
    assert export(model_folder, folder, "--parts", "encode_regions", "--formats", "onnx") == 0
    (line,) = run_without_this_package(folder)
    assert line.startswith("encode_regions.onnx: output (2, 11, 9), ")


@pytest.mark.slow
def test_aotinductor_package_of_decode(model_folder, tmp_path):
    folder = tmp_path / "exported"
    assert export(model_folder, folder, "--parts", "decode", "--formats", "aoti") == 0
    (line,) = run_without_this_package(folder)
    assert line.startswith("decode.aoti.pt2: output (2, 3, ")


# -- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "encode", "--formats", "onnx"], "encode cannot be exported as onnx: the partition is an op"),
        (["--parts", "encode", "--formats", "aoti"], "encode cannot be exported as aoti: the partition is an op"),
        (
            ["--parts", "encode_regions", "--formats", "aoti"],
            "encode_regions cannot be exported as aoti: RoIAlign is an op of torchvision",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(model_folder, tmp_path, capsys, options, message):
    assert export(model_folder, tmp_path / "exported", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(model_folder, tmp_path, capsys, monkeypatch, package):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    assert export(model_folder, tmp_path / "exported", "--formats", "onnx") == 2
    assert f"--formats onnx needs {package} >= 1." in capsys.readouterr().err.replace("0.5", "1.")
    assert not (tmp_path / "exported").exists()


def test_a_torch_without_aotinductor_is_named(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(torch._inductor, "aoti_compile_and_package")
    assert export(model_folder, tmp_path / "exported", "--parts", "decode", "--formats", "aoti") == 2
    assert f"needs torch >= 2.6 with AOTInductor, got torch {torch.__version__}" in capsys.readouterr().err


def test_an_exporter_that_fails_ends_in_one_line(model_folder, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no such op\nand a long report")

    monkeypatch.setattr(torch.export, "export", fail)
    assert export(model_folder, tmp_path / "exported", "--parts", "decode", "--formats", "torch") == 2
    error = capsys.readouterr().err
    assert f"decode cannot be exported with torch {torch.__version__}: RuntimeError: no such op" in error
    assert error.count("error: ") == 1
    assert not (tmp_path / "exported").exists()


def test_a_program_that_differs_from_the_model_is_refused(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_model, "run_torch", lambda path, inputs: np.full(1, 7.0, np.float32))
    assert export(model_folder, tmp_path / "exported", "--parts", "decode", "--formats", "torch") == 2
    assert "the output of decode.pt2 must be within 0.0001 of the model's, got" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()
