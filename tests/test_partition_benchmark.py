# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmark program on its small cases; what it measures is not judged here."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from pipelines import benchmark_partition
from pipelines.shared.programs import run_program


def test_quick_run_writes_tables_numbers_and_plot(tmp_path):
    output = tmp_path / "results"
    arguments = ["--quick", "--seconds", "1", "--output", str(output)]
    assert run_program(benchmark_partition.main, arguments) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        ".gpstoken.json",
        "growth.png",
        "results.json",
        "results.md",
    ]
    results = json.loads((output / "results.json").read_text())
    for row in results["headline"]:
        assert row["plain_ms"] > row["ours_ms"] > 0
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["ours_ms"])
    assert "| 128 x 128 | 64 |" in (output / "results.md").read_text()
    with PIL.Image.open(output / "growth.png") as plot:
        assert plot.size == (1200, 504)
    # What is there is not overwritten unasked, and what somebody has added not even then.
    assert run_program(benchmark_partition.main, arguments) == 2
    (output / "notes.txt").write_text("mine")
    assert run_program(benchmark_partition.main, [*arguments, "--overwrite"]) == 2
    assert (output / "notes.txt").read_text() == "mine"


def test_pictures_of_every_size_are_mirrored_from_one():
    square = np.random.default_rng(0).uniform(-1, 1, (3, 600, 600)).astype(np.float32)
    small, large = benchmark_partition.picture(square, 512), benchmark_partition.picture(square, 1100)
    assert large.shape == (3, 1100, 1100)
    assert np.array_equal(large[:, :512, :512], small)
    assert np.array_equal(large[:, :512, 512:1024], small[:, :, ::-1])
    assert np.array_equal(large[:, 1024:, 1024:], small[:, :76, :76])
    assert np.abs(benchmark_partition.picture(square, 64)).max() <= 1


def test_batches_of_every_backend_that_the_device_has():
    square = np.random.default_rng(0).uniform(-1, 1, (3, 64, 64)).astype(np.float32)
    reference = benchmark_partition.load_reference()
    row = benchmark_partition.compare_batches(square, reference, 32, 6, 2, 1, torch.device("cpu"))
    assert row["numba_equal"] == row["torch_equal"] == 2
    assert "triton_ms" not in row
    numba, batched = benchmark_partition.batch_table([row | {"plain_ms_per_image": 8.0, "torch_ms": 4.0}])[2:]
    assert numba.startswith("| 2 | 32 x 32 | 6 | numba | ")
    assert batched == "| 2 | 32 x 32 | 6 | torch | 4.00 | 500 | 8.0 | 4.0x | 2 of 2 | - |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_one_line_and_leaves_nothing(tmp_path, capsys):
    arguments = ["--device", "cuda", "--quick", "--output", str(tmp_path / "results")]
    assert run_program(benchmark_partition.main, arguments) == 2
    assert "must have a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
