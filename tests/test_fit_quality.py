# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""pipelines/fit_quality.py with a tiny model of random weights."""

import json

import numpy as np
import PIL.Image
import pytest
from model_helpers import make_model

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from pipelines import fit_quality
from pipelines.shared.programs import run_program


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for number in range(4):
        noise = rng.integers(0, 10 + 60 * number, (40, 44, 3)).astype(np.uint8)
        PIL.Image.fromarray(noise).save(tmp_path / f"{number}.png")
    return tmp_path


def run(folder, *options):
    images = [str(folder / f"{number}.png") for number in range(4)]
    fixed = ["--model", str(folder / "model"), "--batch_size", "2", "--samples", "3", "--device", "cpu"]
    return run_program(fit_quality.main, [*images, *fixed, "--output", str(folder / "fit"), *options])


def test_weights_are_fitted_written_and_resumed(folder, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert run(folder, "--resolutions", "32", "40") == 0
    assert {path.name for path in (folder / "fit").iterdir()} == {
        ".gpstoken.json", "rows.jsonl", "config.json", "fit.json", "fit.png",
    }  # fmt: skip
    fit = json.loads((folder / "fit" / "fit.json").read_text())
    assert "24 measurements" in capsys.readouterr().out
    config = GPSTokenConfig.from_pretrained(folder / "fit")
    assert config.quality_predictor == fit["weights"]
    # The rows of an interrupted run are kept, and a line that was cut off is measured again.
    lines = (folder / "fit" / "rows.jsonl").read_text().split("\n")
    (folder / "fit" / "rows.jsonl").write_text("\n".join(lines[:3]) + lines[3][:20])
    assert run(folder, "--resolutions", "32", "40") == 0
    again = json.loads((folder / "fit" / "fit.json").read_text())
    np.testing.assert_allclose(again["weights"], fit["weights"], rtol=1e-4, atol=1e-6)
    whole = (folder / "fit" / "rows.jsonl").read_text()
    (folder / "fit" / "rows.jsonl").write_text(whole.replace("[[", "[{", 1))
    assert run(folder, "--resolutions", "32", "40") == 2
    assert "rows.jsonl must hold JSON lines" in capsys.readouterr().err
    (folder / "fit" / "rows.jsonl").write_text(whole)
    for other in (["--resolutions", "32"], ["--resolutions", "32", "40", "--batch_size", "4"]):
        assert run(folder, *other) == 2
        assert "holds the rows of other settings" in capsys.readouterr().err
    PIL.Image.new("RGB", (44, 40)).save(folder / "3.png")  # another image of the same name
    assert run(folder, "--resolutions", "32", "40") == 2
    assert "holds the rows of other settings" in capsys.readouterr().err
    assert run(folder, "--resolutions", "32", "--overwrite") == 0


def test_least_squares_finds_the_weights():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(100, 7))
    features[:, 0], features[:, 4] = 1.0, 0.0  # one resolution
    weights = np.array([3.0, 0.5, 1.0, 0.3, 0.0, -0.2, 0.1])
    fit = fit_quality.fit_weights(np.column_stack([features, features @ weights]))
    np.testing.assert_allclose(fit["weights"], weights, atol=1e-9)
    assert fit["rms_error_held_out"] < 1e-9
