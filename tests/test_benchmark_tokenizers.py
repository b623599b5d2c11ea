# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""pipelines/benchmark_tokenizers.py, benchmark_generation.py and what they count, with tiny models."""

import pytest
import torch
from diffusers import AutoencoderTiny

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.evaluation_results import read_result
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines import benchmark_generation, benchmark_tokenizers
from pipelines.shared.costs import device_name, milliseconds, multiply_adds, num_parameters, spread
from pipelines.shared.programs import run_program


def test_multiply_adds_of_what_is_known():
    convolution = torch.nn.Conv2d(3, 8, 3, padding=1)
    assert multiply_adds(lambda: convolution(torch.zeros(2, 3, 10, 12))) == 2 * 10 * 12 * 8 * 3 * 9
    linear = torch.nn.Linear(5, 7)
    assert multiply_adds(lambda: linear(torch.zeros(4, 5))) == 4 * 5 * 7
    # Two products of 2 heads, 6 queries, 6 keys and 4 channels.
    query = torch.zeros(1, 2, 6, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert multiply_adds(lambda: attention(query, query, query)) == 2 * (2 * 6 * 6 * 4)


def test_parameters_are_counted_once():
    linear = torch.nn.Linear(5, 7)
    assert num_parameters([linear, linear]) == 42
    assert "thread" in device_name("cpu")
    assert milliseconds(spread([0.002, 0.001, 0.004])) == "2.0 (1.0 to 4.0)"


def test_tokenizers(tmp_path, capsys):
    arguments = ["--models", "tiny", "TAESD", "--resolution", "32", "--batch_sizes", "1", "2", "--repeats", "2"]
    arguments += ["--device", "cpu", "--output", str(tmp_path / "costs")]
    assert run_program(benchmark_tokenizers.main, arguments) == 0
    report = read_result(tmp_path / "costs/results.json")
    ours, peer = report["results"]
    assert ours["parameters"] == num_parameters([GPSTokenModel(GPSTokenConfig.preset("tiny"))])
    assert peer["parameters"] == num_parameters([AutoencoderTiny()])
    assert ours["floats"] == 8 * 9
    assert peer["floats"] == 4 * 4 * 4
    for entry in report["results"]:
        assert entry["encoder_parameters"] + entry["decoder_parameters"] == entry["parameters"]
        assert entry["encode_multiply_adds"] > 0
        assert set(entry["encode"]) == set(entry["decode"]) == {"1", "2"}
        assert set(entry["train"]) == {"1"}
        loaded = entry["parameters"] * 4
        assert loaded <= entry["decode"]["2"]["peak_bytes"] < loaded + 2**27
        assert 0 < entry["decode"]["2"]["min_s"] <= entry["decode"]["2"]["median_s"] <= entry["decode"]["2"]["max_s"]
    page = (tmp_path / "costs/report.md").read_text()
    assert "## Batch size 2" in page
    assert report["protocol"]["device"] in page
    assert (tmp_path / "costs/throughput.png").is_file()
    assert "GPSToken tiny" in capsys.readouterr().out
    assert run_program(benchmark_tokenizers.main, arguments) == 2  # the folder is there


def test_counts_without_times(tmp_path):
    output = tmp_path / "counts"
    arguments = [
        "--models",
        "tiny",
        "--resolution",
        "32",
        "--repeats",
        "0",
        "--device",
        "cpu",
        "--output",
        str(output),
    ]
    assert run_program(benchmark_tokenizers.main, arguments) == 0
    (entry,) = read_result(output / "results.json")["results"]
    assert entry["encode"] == {}
    assert entry["encode_multiply_adds"] > 0
    assert "Batch size" not in (output / "report.md").read_text()
    assert not (output / "throughput.png").exists()


def test_tokenizer_errors(tmp_path, capsys):
    assert run_program(benchmark_tokenizers.main, ["--models", "nonsense"]) == 2
    assert "--models must be of" in capsys.readouterr().err
    output = ["--device", "cpu", "--output", str(tmp_path / "x")]
    assert run_program(benchmark_tokenizers.main, ["--models", "digits", "--resolution", "1", *output]) == 2
    assert "does not take images of 1 x 1 pixels" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(benchmark_generation.SIZES, "S", (1, 2, 16))
    real = benchmark_generation.AutoencoderKL

    def tiny(**options):
        return real(**{**options, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1})

    monkeypatch.setattr(benchmark_generation, "AutoencoderKL", tiny)


def test_generation(small, tmp_path):
    arguments = ["--size", "S", "--layout_size", "S", "--preset", "tiny", "--batch_size", "1", "--steps", "2"]
    arguments += ["--layout_steps", "1", "--repeats", "1", "--device", "cpu", "--output", str(tmp_path / "costs")]
    assert run_program(benchmark_generation.main, arguments) == 0
    ours, grid = read_result(tmp_path / "costs/results.json")["results"]
    assert (ours["tokens"], grid["tokens"]) == (8, 256)
    assert grid["multiply_adds"] > ours["multiply_adds"]
    assert "layout step" not in grid
    assert ours["peak_bytes"] > 4 * (ours["parameters"] + ours["other_parameters"])
    seconds = ours["layout step"]["median_s"] + 250 * ours["step"]["median_s"] + ours["decode"]["median_s"]
    assert ours["images_per_s"] == pytest.approx(1 / seconds)
    assert (tmp_path / "costs/times.png").is_file()
    assert "images/s at 250 steps" in (tmp_path / "costs/report.html").read_text()
