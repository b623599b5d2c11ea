# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""pipelines/quality_curves.py with a tiny model of random weights."""

import json

import numpy as np
import PIL.Image
import pytest
from model_helpers import make_images, make_model

from gpstoken_hf.partition import partition_images, split_sequence
from gpstoken_hf.quality import NestedPartition
from pipelines import quality_curves
from pipelines.shared.programs import run_program


@pytest.fixture
def folder(tmp_path):
    make_model(quality_predictor=[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for number in range(3):
        noise = rng.integers(0, 10 + 80 * number, (40, 44, 3)).astype(np.uint8)
        PIL.Image.fromarray(noise).save(tmp_path / f"{number}.png")
    return tmp_path


def test_curves_are_measured_written_and_resumed(folder, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    options = [str(folder / f"{number}.png") for number in range(3)]
    options += ["--model", str(folder / "model"), "--resolution", "32", "--batch_size", "2", "--device", "cpu"]
    options += ["--tokens", "4", "12", "--targets", "3", "90", "--max_tokens", "16", "--steps", "0.5", "1"]
    output = folder / "curves"
    assert run_program(quality_curves.main, [*options, "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {
        ".gpstoken.json", "per_image.jsonl", "results.json", "tables.md", "demand.png", "greedy.png", "codecs.png",
    }  # fmt: skip
    results = json.loads((output / "results.json").read_text())["results"]
    demand = {entry["name"]: entry for entry in results["demand"]}
    assert list(demand) == ["fixed 4", "fixed 12", "target 3", "fast 3", "target 90", "fast 90"]
    assert demand["fixed 12"]["tokens"] == 12
    assert demand["fixed 4"]["bytes"] < demand["fixed 12"]["bytes"]
    assert demand["target 90"]["reached"] == 0
    assert "above_target" not in demand["fast 90"]
    assert 1 < demand["target 90"]["reconstructions"] <= 7
    assert len(results["greedy"]) == 6
    assert results["greedy"][0]["gain"] == 0
    codecs = {entry["name"]: entry for entry in results["codecs"]}
    assert codecs["12 tokens, lossless"]["bytes"] > codecs["12 tokens, step 0.5"]["bytes"]
    assert codecs["12 tokens, step 0.5"]["bytes"] > codecs["12 tokens, step 1"]["bytes"]
    assert codecs["JPEG 50"]["psnr"] > codecs["JPEG 2"]["psnr"]
    assert codecs["JPEG 50"]["bits_per_pixel"] == pytest.approx(8 * codecs["JPEG 50"]["bytes"] / 1024)
    assert (output / "tables.md").read_text() in capsys.readouterr().out
    before = (output / "results.json").read_text()
    assert run_program(quality_curves.main, [*options, "--output", str(output)]) == 0
    assert (output / "results.json").read_text() == before


def test_fixed_tokens_of_an_equal_score_are_interpolated():
    fixed = [{"tokens": 8, "psnr": 20.0}, {"tokens": 32, "psnr": 24.0}, {"tokens": 64, "psnr": 23.0}]
    assert quality_curves._tokens_of(22.0, fixed, "psnr") == pytest.approx(16)
    assert quality_curves._tokens_of(20.0, fixed, "psnr") == 8
    assert quality_curves._tokens_of(25.0, fixed, "psnr") is None


def test_splits_go_where_the_error_is():
    images = make_images(1, 64, 64)
    boxes = NestedPartition(split_sequence(images, 8), (64, 64)).boxes(0, 8)
    error = np.zeros((64, 64))
    error[40:, 40:] = 1.0
    found = quality_curves.split_worst(boxes, error, 14, 8)
    assert len(found) == 14
    area = (found[:, 2] - found[:, 0] + 1) * (found[:, 3] - found[:, 1] + 1)
    assert area.sum() == 64 * 64
    # All that was split lies around the error.
    new = {tuple(box) for box in found} - {tuple(box) for box in boxes}
    assert all(x1 >= 32 and y1 >= 32 for _, _, x1, y1 in new)
    # Regions that are too small to split are kept.
    every = quality_curves.split_worst(boxes, error, 64, 8)
    assert {tuple(box) for box in every} == {tuple(box) for box in partition_images(images, 64).boxes[0].tolist()}
