# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""pipelines/reconstruct.py as people run it, with a tiny model of random weights."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines import reconstruct
from pipelines.shared.outputs import MARKER
from pipelines.shared.programs import run_program

OUTPUTS = {
    ".gpstoken.json",
    "error.png",
    "initial_gaussians.png",
    "panel.png",
    "reconstruction.png",
    "refined_gaussians.png",
    "scores.json",
    "tokens.safetensors",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = GPSTokenModel(GPSTokenConfig.preset("tiny"))
    torch.nn.init.normal_(model.encoder.gaussian_head.weight, std=0.3)  # so that refinement moves the Gaussians
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        options = [] if "--model" in arguments else ["--model", model_folder]
        return run_program(reconstruct.main, [*map(str, arguments), *options, "--device", "cpu"])

    return call


def photograph(seed=0, size=(40, 56)):
    """Smooth on the left, noise on the right."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(-60, 60, (height, width, 3)) * (x > width // 2)[..., None]
    smooth = np.stack([2 * x + 60, 2 * y + 60, x + y + 40], -1)
    return PIL.Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def scores_of(folder):
    return json.loads((folder / "scores.json").read_text())


# -------------------------------------------------------------------------------------------------------- outputs


def test_one_photograph(run, tmp_path, capsys):
    photograph().save(tmp_path / "photo.png")
    assert run("photo.png", "--tokens", 12, "--output", "results") == 0
    folder = tmp_path / "results" / "photo"
    assert {file.name for file in folder.iterdir()} == OUTPUTS
    scores = scores_of(folder)
    assert (scores["width"], scores["height"], scores["tokens"], scores["floats"]) == (56, 40, 12, 12 * 9)
    printed = capsys.readouterr().out
    assert (
        f"photo.png: 56 x 40, PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f}, 12 tokens, 108 floats"
        in printed
    )

    with PIL.Image.open(folder / "reconstruction.png") as picture:
        assert picture.size == (56, 40)
        levels = np.asarray(picture).astype(float)
    mse = ((levels - np.asarray(photograph()).astype(float)) ** 2).mean()
    assert scores["psnr"] == pytest.approx(10 * np.log10(255**2 / mse), abs=0.02)  # the file is rounded to 8 bits
    pictures = {name: PIL.Image.open(folder / f"{name}.png") for name in ("initial_gaussians", "refined_gaussians")}
    assert pictures["initial_gaussians"].size == (56 * 9, 40 * 9)  # drawn enlarged
    assert not np.array_equal(*map(np.asarray, pictures.values()))
    with PIL.Image.open(folder / "panel.png") as panel:
        assert panel.width > 5 * 56 * 9


def test_stored_tokens_decode_to_the_same_picture(run, tmp_path, capsys):
    photograph(size=(37, 45)).save(tmp_path / "photo.png")
    for options in ((), ("--tile_size", 16)):
        assert run("photo.png", "--tokens", 17, *options, "--overwrite") == 0
        assert run("--from_tokens", "out/photo/tokens.safetensors", "--overwrite") == 0
        with (
            PIL.Image.open(tmp_path / "out/photo/reconstruction.png") as first,
            PIL.Image.open(tmp_path / "out/photo-from-tokens/reconstruction.png") as second,
        ):
            assert np.array_equal(np.asarray(first), np.asarray(second))
    assert "45 x 37, 17 tokens, 153 floats -> out/photo-from-tokens" in capsys.readouterr().out
    stored = load_file(tmp_path / "out/photo/tokens.safetensors")
    assert stored["attention_mask"].sum() == 17
    assert stored["tokens"].shape[-1] == 9
    assert stored["init_gaussians"].shape == (*stored["tokens"].shape[:2], 5)
    assert stored["boxes"].shape == (*stored["tokens"].shape[:2], 4)


def test_tokens_follow_the_size_by_default(run, tmp_path):
    photograph(size=(48, 64)).save(tmp_path / "photo.png")
    assert run("photo.png") == 0
    assert scores_of(tmp_path / "out/photo")["tokens"] == 8 * 48 * 64 // 32**2


def test_large_photographs_are_reduced_and_say_so(run, tmp_path, capsys):
    photograph(size=(90, 120)).save(tmp_path / "photo.png")
    assert run("photo.png", "--max_side", 60, "--tokens", 8) == 0
    assert "reduced from 120 x 90 to 60 x 45 (--max_side 60)" in capsys.readouterr().out
    assert scores_of(tmp_path / "out/photo")["height"] == 45
    assert run("photo.png", "--max_side", 0, "--tokens", 8, "--output", "whole") == 0
    assert scores_of(tmp_path / "whole/photo")["height"] == 90


def tokens_inside(folder, box):
    boxes = load_file(folder / "tokens.safetensors")["boxes"][0].float()
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    x0, y0, x1, y1 = box
    return int(((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).sum())


def test_focus_and_mask_bring_tokens(run, tmp_path, capsys):
    photograph(size=(64, 64)).save(tmp_path / "photo.png")
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:32, :32] = 255
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    assert run("photo.png", "--tokens", 24, "--output", "plain") == 0
    assert run("photo.png", "--tokens", 24, "--output", "focus", "--focus", "0,0,31,31") == 0
    assert "PSNR in focus" in capsys.readouterr().out
    assert run("photo.png", "--tokens", 24, "--output", "mask", "--importance", "mask.png") == 0
    inside = {name: tokens_inside(tmp_path / name / "photo", (0, 0, 31, 31)) for name in ("plain", "focus", "mask")}
    assert inside["focus"] >= 2 * inside["plain"]
    assert inside["mask"] == inside["focus"]  # the mask is white where the box is
    assert len(scores_of(tmp_path / "focus/photo")["psnr_in_focus"]) == 1
    # a reduced image keeps the box where it was in the original
    assert run("photo.png", "--tokens", 24, "--output", "small", "--focus", "0,0,31,31", "--max_side", 48) == 0
    assert tokens_inside(tmp_path / "small/photo", (0, 0, 23, 23)) >= 2 * inside["plain"]


def test_samples_without_an_argument(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("skimage")
    assert run("--tokens", 8, "--max_side", 48) == 0
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {*reconstruct.SAMPLES, "overview.png", MARKER}
    for name in reconstruct.SAMPLES:
        assert {file.name for file in (tmp_path / "out" / name).iterdir()} == OUTPUTS
    assert "4 images: mean PSNR" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- many, and again


def test_folder_with_an_unreadable_file(run, tmp_path, capsys):
    (tmp_path / "photos/sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "sub/a.png", "b.jpg", "b.png")):
        photograph(number).save(tmp_path / "photos" / name)
    whole = (tmp_path / "photos/a.png").read_bytes()
    (tmp_path / "photos/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "photos/notes.txt").write_text("not an image")
    assert run("photos", "--tokens", 8) == 2
    printed = capsys.readouterr()
    assert "error: photos/cut.png: image must be a readable file" in printed.err
    assert "1 of 5 images not reconstructed: photos/cut.png" in printed.err
    assert "4 images: mean PSNR" in printed.out
    folders = {file.parent.relative_to(tmp_path / "out").as_posix() for file in tmp_path.rglob("out/**/scores.json")}
    assert folders == {"a", "sub/a", "b.jpg", "b.png"}
    assert {file.name for file in tmp_path.rglob("out/**/.*")} == {".gpstoken.json"}  # nothing half-written


def test_the_same_command_goes_on_where_it_stopped(run, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        photograph().save(tmp_path / name)
    assert run("a.png", "--tokens", 8) == 0
    before = (tmp_path / "out/a/scores.json").stat().st_mtime_ns
    assert run("a.png", "b.png", "--tokens", 8) == 0
    printed = capsys.readouterr().out
    assert "a.png: done before, skipped (--overwrite makes it anew): out/a" in printed
    assert (tmp_path / "out/a/scores.json").stat().st_mtime_ns == before
    assert (tmp_path / "out/b/scores.json").exists()

    assert run("a.png", "--tokens", 9) == 2
    assert "out/a holds the outputs of other settings" in capsys.readouterr().err
    assert run("a.png", "--tokens", 9, "--overwrite") == 0
    assert scores_of(tmp_path / "out/a")["tokens"] == 9
    photograph(seed=5).save(tmp_path / "b.png")  # another picture under the same name
    assert run("b.png", "--tokens", 8) == 2
    assert "other settings" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jpg"], "no such file: absent.jpg"),
        (["cut.jpg"], "cannot read cut.jpg"),
        (["empty"], "images in the folder empty, found none"),
        (["photo.png", "--tokens", "100000"], "100000"),
        (["photo.png", "--focus", "0,0,56,10"], "inside the image's 56 x 40 pixels, got 0,0,56,10"),
        (["photo.png", "--importance", "mask.png"], "56 x 40 pixels, got 30 x 20"),
        (["photo.png", "--importance", "absent.png"], "absent.png"),
        (["photo.png", "--model", "absent-model"], "absent-model"),
        (["photo.png", "--tile_size", "3"], "tile_size"),
        (["photo.png", "--from_tokens", "t.safetensors"], "expected no images"),
        (["--from_tokens", "t.safetensors"], "no such file: t.safetensors"),
        (["--from_tokens", "photo.png"], "cannot read photo.png"),
        (["--from_tokens", "bad.safetensors"], "sigma"),
    ],
)
def test_one_line_and_exit_code_2(run, tmp_path, capsys, arguments, message):
    photograph().save(tmp_path / "photo.png")
    photograph(size=(300, 300)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    (tmp_path / "empty").mkdir()
    PIL.Image.new("L", (30, 20)).save(tmp_path / "mask.png")
    tokens = {"tokens": torch.zeros(1, 4, 9), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    save_file(tokens, tmp_path / "bad.safetensors", metadata={"height": "40", "width": "56", "tile_size": ""})
    assert run(*arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_checkpoint_with_missing_keys(run, model_folder, tmp_path, capsys):
    photograph().save(tmp_path / "photo.png")
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["decoder.extra"] = weights.pop("decoder.conv_out.bias")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert run("photo.png", "--model", broken) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "decoder.conv_out.bias" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argument", [["--tokens", "0"], ["--focus", "1,2,3"], ["--focus", "5,0,4,9"], ["--nonsense"]])
def test_bad_arguments(run, capsys, argument):
    with pytest.raises(SystemExit) as caught:
        run(*argument)
    assert caught.value.code == 2
    assert argument[0] in capsys.readouterr().err
