# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""pipelines/figures.py draws each figure for a tiny checkpoint; what is drawn is what the model computes."""

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_pipeline import make_pipeline, make_vae, seeded

from pipelines import figures
from pipelines.shared.programs import run_program


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    for name in ("a", "b"):
        PIL.Image.fromarray(noise).resize((48, 40)).save(tmp_path / f"{name}.png")
    make_vae().save_pretrained(tmp_path / "model")

    def call(*arguments):
        common = ["--resolution", 32, "--device", "cpu", "--output", "drawn"]
        return run_program(figures.main, list(map(str, [*arguments, *common])))

    return call


def test_figures_of_a_tokenizer(run, tmp_path, capsys):
    assert run("a.png", "b.png", "--model", "model") == 0
    made = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert made == {"figure4.png", "figure5.png", "figure6.png", "report.md", "report.html", ".gpstoken.json"}
    page = (tmp_path / "drawn/report.md").read_text()
    assert "2 images with 2, 4, 8, 16 tokens" in page
    assert "the box 8,8,23,23 with weight 30" in page
    sizes = {}
    for name in made:
        if name.endswith(".png"):
            with PIL.Image.open(tmp_path / "drawn" / name) as picture:
                sizes[name] = picture.size
    side = 32 * 7  # enlarged to 224 pixels
    assert sizes["figure6.png"][0] >= 5 * side  # the image and four numbers of tokens
    assert sizes["figure4.png"][1] >= 4 * side  # two rows for each image
    assert run("a.png", "--model", "model") == 2  # the folder is not empty
    assert "must not exist or be an empty folder" in capsys.readouterr().err
    assert run("a.png", "--model", "model", "--figures", 6, "--tokens", 3, "--overwrite") == 0
    assert not (tmp_path / "drawn/figure4.png").exists()


def test_the_reconstruction_is_in_the_figure(run, tmp_path):
    assert run("a.png", "--model", "model", "--figures", 6, "--tokens", 8) == 0
    sheet = np.asarray(PIL.Image.open(tmp_path / "drawn/figure6.png").convert("RGB")).astype(int)
    model = make_vae()
    images = figures.ImageSet([tmp_path / "a.png"], "image", 32).batch(0, 1)
    with torch.no_grad():
        sample = model(images, num_tokens=8).sample[0].clamp(-1, 1)
    pixels = ((sample + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().repeat(7, 0).repeat(7, 1).astype(int)
    height, width = pixels.shape[:2]
    places = [
        (y, x)
        for y in range(sheet.shape[0] - height + 1)
        for x in range(sheet.shape[1] - width + 1)
        if abs(sheet[y, x] - pixels[0, 0]).max() <= 1
        and abs(sheet[y + height - 1, x + width - 1] - pixels[-1, -1]).max() <= 1
    ]
    assert any(abs(sheet[y : y + height, x : x + width] - pixels).max() <= 1 for y, x in places)


@pytest.mark.parametrize(("mode", "columns"), [("generated", 4), ("bank", 3), ("one_stage", 2)])
def test_figure_of_a_pipeline(run, tmp_path, mode, columns):
    make_pipeline(mode).save_pretrained(tmp_path / "pipeline")
    assert run("--pipeline", "pipeline", "--classes", "dog", 7, "--steps", 2, "--layout_steps", 2) == 0
    with PIL.Image.open(tmp_path / "drawn/figure8.png") as sheet:
        assert columns * 224 <= sheet.width < (columns + 1) * 224 + 100
    page = (tmp_path / "drawn/report.md").read_text()
    assert "for classes 1, 7; 2 steps" in page
    assert ("calibrated" in page) == (mode == "generated")


def test_the_layout_before_calibration_is_kept():
    base = make_pipeline("generated")
    pipeline = figures.RecordingPipeline(**base.components, id2label=base.config.id2label)
    pipeline.set_progress_bar_config(disable=True)
    calibrated = pipeline([1], output_type="layout", num_layout_steps=2, generator=seeded(0)).layout
    assert pipeline.generated.shape == calibrated.gaussians.shape
    assert not torch.allclose(pipeline.generated, calibrated.gaussians)
    from gpstoken_hf import calibrate_layout

    config = base.vae.config
    again = calibrate_layout(pipeline.generated, (32, 32), config.min_region_size, sigma_scale=config.sigma_scale)
    assert torch.equal(again.gaussians, calibrated.gaussians)


def test_sample_photographs_are_the_default(run, tmp_path):
    pytest.importorskip("skimage", reason="needs scikit-image")
    assert run("--model", "model", "--figures", 5, "--max_images", 1, "--focus", "0,0,9,9") == 0
    assert (tmp_path / "drawn/figure5.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.png", "--model", "model"], "no such file: absent.png"),
        (["a.png", "--model", "model", "--focus", "0,0,32,3"], "--focus must lie inside 32 x 32 pixels, got 0,0,32,3"),
        (["--figures", 8], "--pipeline must be given for figure 8, got none"),
        (["a.png", "--model", "model", "--tokens", 1000, "--figures", 6], "1000"),
    ],
)
def test_errors(run, tmp_path, capsys, arguments, message):
    assert run(*arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "drawn").exists()
