# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import json

import pytest

from pipelines.benchmark_sampling import SCHEDULERS, main
from pipelines.shared.programs import run_program

TINY = ["--layers", "1", "--width", "32", "--heads", "2", "--tokens", "4", "--batch_size", "1", "--steps", "2"]
TINY += ["--repeats", "1", "--device", "cpu"]


def test_times_are_consistent_and_written(tmp_path, capsys):
    assert run_program(main, [*TINY, "--limit", "1e6", "--output", str(tmp_path / "times")]) == 0
    results = json.loads((tmp_path / "times" / "results.json").read_text())["results"]
    assert set(results) == set(SCHEDULERS)
    table = capsys.readouterr().out
    assert (tmp_path / "times" / "results.md").read_text() in table
    for name, result in results.items():
        assert f"| {name} |" in table
        assert result["model_ms_per_step"] > 0
        ratio = 100 * result["loop_ms_per_step"] / result["model_ms_per_step"]
        assert result["overhead_percent"] == pytest.approx(ratio)
        steps_s = 2 * (result["model_ms_per_step"] + result["loop_ms_per_step"]) / 1000
        layout_s, rest_s = result["layout_stage_ms"] / 1000, result["rest_ms"] / 1000
        assert 1 / result["images_per_s"] == pytest.approx(steps_s + layout_s + rest_s)


def test_too_slow_a_loop_is_an_exit_code(capsys):
    assert run_program(main, [*TINY, "--schedulers", "euler", "--limit", "1e-6"]) == 1
    assert "above the limit of 1e-06 %: euler" in capsys.readouterr().out


def test_errors(capsys):
    assert run_program(main, [*TINY, "--width", "33"]) == 2
    assert "--width must be a multiple of --heads, got 33 and 2" in capsys.readouterr().err
