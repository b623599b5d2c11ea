# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""pipelines/evaluate_reconstruction.py with a tiny model of random weights, and its thumbnail against Pillow's."""

import io
import json
import math
import os

import numpy as np
import PIL.Image
import pytest
import torch

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.metrics import psnr, ssim
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines import evaluate_reconstruction as evaluate
from pipelines.shared.programs import run_program

OUTPUTS = {".gpstoken.json", "per_image.jsonl", "results.json", "table.md", "curve.png", "examples.png"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    GPSTokenModel(GPSTokenConfig.preset("tiny")).save_pretrained(folder)
    return str(folder)


def photograph(seed, size=(48, 40)):
    height, width = size
    y, x = np.mgrid[:height, :width]
    waves = [100 * np.sin(x / (3 + seed) + channel) * np.cos(y / (5 + channel)) + 128 for channel in range(3)]
    return PIL.Image.fromarray(np.stack(waves, -1).round().astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(5):
        photograph(number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--model", model_folder, "--resolution", "32", "--device", "cpu"]

    def call(*arguments):
        output = [] if "--output" in arguments else ["--output", "results"]
        return run_program(evaluate.main, [*map(str, arguments), *common, *output])

    return call


# ------------------------------------------------------------------------------------------------------- thumbnail


@pytest.mark.parametrize(("floats", "side"), [(1, 1), (3, 1), (4, 2), (12, 2), (13, 3), (192, 8), (193, 9), (672, 15)])
def test_side_is_the_smallest_that_holds_as_many_floats(floats, side):
    assert evaluate.thumbnail_side(floats) == side
    assert 3 * side**2 >= floats > 3 * (side - 1) ** 2


@pytest.mark.parametrize("side", [5, 8, 31])
def test_thumbnail_is_pillows(side):
    """Pillow's float images are its own bicubic filter without rounding; worst difference seen 1.3e-06."""
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = evaluate.thumbnail(image, side)[0].numpy()
    for channel, mine in zip(image[0].numpy(), ours):
        small = PIL.Image.fromarray(channel).resize((side, side), PIL.Image.Resampling.BICUBIC)
        small = PIL.Image.fromarray(np.asarray(small).clip(-1, 1))
        large = np.asarray(small.resize((32, 32), PIL.Image.Resampling.BICUBIC)).clip(-1, 1)
        assert np.allclose(mine, large, rtol=0, atol=5e-6)


def test_thumbnail_of_the_whole_size_is_the_image():
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.allclose(evaluate.thumbnail(image, 16), image, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- program


def test_scores_are_the_means_over_the_images(run, folder, tmp_path, capsys, model_folder):
    assert run(folder, "--tokens", 12, 4, "--batch_size", 2) == 0
    assert {file.name for file in (tmp_path / "results").iterdir()} == OUTPUTS
    report = json.loads((tmp_path / "results/results.json").read_text())
    assert [entry["tokens"] for entry in report["results"]] == [4, 12]
    assert [entry["floats"] for entry in report["results"]] == [36, 108]
    assert [entry["thumbnail_side"] for entry in report["results"]] == [4, 6]

    images = evaluate.ImageSet([folder], "image", 32, None, "bicubic").batch(0, 5)
    model = GPSTokenModel.from_pretrained(model_folder).eval()
    with torch.no_grad():
        sample = model(images, num_tokens=12).sample.clamp(-1, 1)
    entry = report["results"][1]
    assert entry["psnr"] == pytest.approx(psnr(sample, images).mean().item(), abs=1e-4)
    assert entry["ssim"] == pytest.approx(ssim(sample, images).mean().item(), abs=1e-5)
    expected = psnr(evaluate.thumbnail(images, 6), images).mean().item()
    assert entry["thumbnail_psnr"] == pytest.approx(expected, abs=1e-4)
    assert entry["gain"] == pytest.approx(entry["psnr"] - expected, abs=1e-4)
    table = (tmp_path / "results/table.md").read_text()
    assert f"| 12 | 108 | {entry['psnr']:.2f} | {entry['ssim']:.4f} | 6 x 6 | 108 | {expected:.2f} |" in table
    assert table in capsys.readouterr().out


def test_images_are_resized_by_the_shortest_side_and_cropped_in_the_middle(tmp_path):
    """One white column at the left edge is cut off; a grey gradient keeps its middle."""
    wide = np.tile(np.linspace(0, 255, 128).round().astype(np.uint8), (64, 1))
    PIL.Image.fromarray(wide).save(tmp_path / "wide.png")
    batch = evaluate.ImageSet([tmp_path / "wide.png"], "image", 32, None, "bicubic").batch(0, 1)
    assert batch.shape == (1, 3, 32, 32)
    assert batch[0, 0, 16].min() == pytest.approx(-0.5, abs=0.02)
    assert batch[0, 0, 16].max() == pytest.approx(0.5, abs=0.02)


def test_parquet_holds_the_same_images(run, folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = sorted(folder.iterdir())
    column = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    parquet.write_table(pyarrow.table({"picture": column, "label": [0] * 5}), tmp_path / "set.parquet")
    from_parquet = evaluate.ImageSet([tmp_path / "set.parquet"], "picture", 32, 3, "bicubic")
    assert len(from_parquet) == 3
    from_files = evaluate.ImageSet(files, "image", 32, None, "bicubic")
    assert torch.equal(from_parquet.batch(0, 3), from_files.batch(0, 3))
    assert run(tmp_path / "set.parquet", "--tokens", 4) == 2  # no column "image"


def test_focus_raises_the_share_of_the_box(run, folder, tmp_path):
    assert run(folder, "--tokens", 12, "--focus", "0,0,15,15") == 0
    entry = json.loads((tmp_path / "results/results.json").read_text())["results"][0]
    rows = [json.loads(line)["12"] for line in (tmp_path / "results/per_image.jsonl").read_text().splitlines()[1:]]
    assert entry["inside_psnr"] == pytest.approx(sum(row["inside_psnr"] for row in rows) / 5)
    assert entry["inside_psnr"] != entry["inside_psnr_focused"]
    table = (tmp_path / "results/table.md").read_text()
    assert "With the box 0,0,15,15 in focus (weight 30)" in table
    assert f"| 12 | {entry['inside_psnr']:.2f} | {entry['inside_psnr_focused']:.2f} |" in table


def test_an_interrupted_run_goes_on(run, folder, tmp_path, capsys):
    assert run(folder, "--tokens", 4) == 0
    whole = json.loads((tmp_path / "results/results.json").read_text())
    log = tmp_path / "results/per_image.jsonl"
    lines = log.read_text().splitlines()
    changed = json.loads(lines[2])
    changed["4"]["psnr"] += 5.0  # to see that it is not computed again
    log.write_text("\n".join([lines[0], lines[1], json.dumps(changed), lines[3][:20]]))
    assert run(folder, "--tokens", 4) == 0
    assert "2 of 5 images are scored already" in capsys.readouterr().out
    again = json.loads((tmp_path / "results/results.json").read_text())
    assert again["results"][0]["psnr"] == pytest.approx(whole["results"][0]["psnr"] + 1.0, abs=1e-6)
    assert len(log.read_text().splitlines()) == 6

    assert run(folder, "--tokens", 8) == 2
    assert "other settings" in capsys.readouterr().err
    assert run(folder, "--tokens", 8, "--overwrite") == 0


def test_a_folder_of_somebody_else_is_left_alone(run, folder, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/table.md").write_text("years of it")
    for options in ((), ("--overwrite",)):
        assert run(folder, "--tokens", 4, *options) == 2
        assert "got a folder that holds table.md" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["table.md"]


def test_its_own_pictures_are_not_taken_for_images(run, folder, tmp_path, capsys):
    for options in ((), ("--overwrite",), ()):
        assert run(folder, "--tokens", 4, "--output", folder / "results", *options) == 0
        assert "5 images of images" in capsys.readouterr().out


def test_names_that_are_not_text(run, folder, tmp_path, capsys):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    folder.rename(odd)
    assert run(odd, "--tokens", 4) == 0
    assert r"5 images of caf\udce9" in (tmp_path / "results/table.md").read_text()


def test_standard_error():
    assert evaluate._standard_error([1.0]) is None
    values = [1.0, 2.0, 4.0, 7.0]
    assert evaluate._standard_error(values) == pytest.approx(np.std(values, ddof=1) / math.sqrt(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.parquet"], "no such file: absent.parquet"),
        (["empty"], "images in the folder empty, found none"),
        (["text.parquet"], "text.parquet must be a parquet file"),
        (["images", "--focus", "0,0,32,5"], "--focus must lie inside 32 x 32 pixels, got 0,0,32,5"),
        (["images", "--tokens", "100000"], "100000"),
        (["cut.png"], "cannot read cut.png"),
        (["bytes.parquet"], "row 0 must hold a readable image"),
    ],
)
def test_one_line_and_exit_code_2(run, folder, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("not parquet")
    whole = (folder / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    if "bytes.parquet" in arguments:
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.table({"image": [{"bytes": io.BytesIO(whole[:50]).getvalue(), "path": None}]})
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "bytes.parquet")
    assert run(*arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "results/results.json").exists()
