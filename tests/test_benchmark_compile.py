# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The comparison of torch.compile with eager execution writes figures of every case."""

import json

import torch
from PIL import Image

from pipelines import benchmark_compile
from pipelines.shared.programs import run_program


def test_figures_of_every_case(tmp_path, capsys):
    torch.compiler.reset()
    arguments = ["--preset", "tiny", "--batch_size", "2", "--repeats", "2", "--backend", "eager", "--device", "cpu"]
    assert run_program(benchmark_compile.main, [*arguments, "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [name.split(",")[0] for name in results] == ["encode", "decode", "SiT"]
    for result in results.values():
        assert 0 < result["speedup_min"] <= result["speedup"] <= result["speedup_max"]
    assert (tmp_path / "out" / "results.md").read_text().strip() == capsys.readouterr().out.strip()
    with Image.open(tmp_path / "out" / "speed.png") as plot:
        assert plot.size[0] > 100
    assert run_program(benchmark_compile.main, [*arguments, "--output", str(tmp_path / "out")]) == 2
