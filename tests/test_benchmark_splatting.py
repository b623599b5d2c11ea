# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.

import json

import pytest
import torch

from pipelines import benchmark_splatting
from pipelines.benchmark_splatting import Case, main, partition_like_gaussians
from pipelines.shared.programs import run_program


def test_quick_run_checks_times_and_draws(tmp_path):
    assert main(["--output", str(tmp_path / "out"), "--quick", "--rounds", "1"]) == 0
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["what"] for row in report["cases"]} == {"forward", "forward + backward"}
    assert all(row["ratio"] > 0 and set(row["milliseconds"]) >= {"op", "dense"} for row in report["cases"])
    assert {row["path"] for row in report["checks"]} >= {"op", "tiles in PyTorch"}
    assert "| dense, ms |" in (tmp_path / "out" / "results.md").read_text()
    assert (tmp_path / "out" / "growth.png").stat().st_size > 1000


def test_a_wrong_path_is_found_out(tmp_path, monkeypatch, capsys):
    def wrong(gaussians, features, size, support=3.0, mask=None):
        return benchmark_splatting.tiles(gaussians, features, size, support, mask) * 1.001

    monkeypatch.setitem(benchmark_splatting.SIDES, "tiles in PyTorch", wrong)
    assert run_program(main, ["--output", str(tmp_path / "out"), "--quick", "--check_only"]) == 2
    assert "tiles in PyTorch differs from the reference at B2 L7" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_one_line(tmp_path, capsys):
    assert run_program(main, ["--output", str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: --device cuda must have a CUDA device")


def test_layouts_are_like_a_partition():
    gaussians = partition_like_gaussians(2, 128, seed=0)
    assert gaussians.shape == (2, 128, 5)
    # Regions tile the frame: areas (3 sigma / 2 a side, drawn to within 10 %) add up to 1.
    areas = (gaussians[..., 0] * gaussians[..., 1] * 9 / 4).sum(-1)
    torch.testing.assert_close(areas, torch.ones(2), rtol=0, atol=0.1)
    # Not all of them in one corner: halves of regions of at least an eighth of the mean.
    assert (gaussians[..., 0] * gaussians[..., 1] * 9 / 4).min() > 0.81 / (16 * 128)
    # Pixels in boxes per pixel of the map; photographs have 3.4 to 3.6.
    axis = torch.linspace(-1, 1, 64)
    inside_x = (axis - gaussians[..., 3:4]).abs() <= 3 * gaussians[..., 0:1]
    inside_y = (axis - gaussians[..., 4:5]).abs() <= 3 * gaussians[..., 1:2]
    density = (inside_x.sum(-1) * inside_y.sum(-1)).sum(-1) / 64**2
    assert ((density > 2.5) & (density < 5)).all()


def test_targets_are_judged():
    case = Case("B", 1, 2048, 16, 256)
    assert case.num_pairs == 2048 * 65536
    judge = benchmark_splatting._target
    assert judge({"ratio": 41.0, "peak_extra_mb": 1.0}, "forward", "B", "cpu") == (">= 40x dense", True)
    assert judge({"ratio": 39.0, "peak_extra_mb": 1.0}, "forward", "B", "cpu") == (">= 40x dense", False)
    launch_bound = {"ratio": 31.0, "launches": 2.9, "peak_extra_mb": 1.0}
    assert judge(launch_bound, "forward", "B", "cuda") == (">= 30x dense, <= 3x two launches", True)
    assert not judge(launch_bound | {"launches": 3.1}, "forward", "B", "cuda")[1]
    assert not judge(launch_bound | {"ratio": 29.0}, "forward", "B", "cuda")[1]
    assert judge({"peak_extra_mb": 201.0}, "forward + backward", "C", "cuda") == ("<= 200 MB", False)
    assert judge({"ratio": 9.0, "peak_extra_mb": 1.0}, "forward", "training", "cpu") == ("", None)
