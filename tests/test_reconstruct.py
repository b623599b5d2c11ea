# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""pipelines/reconstruct.py as people run it, with a tiny model of random weights."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines import reconstruct
from pipelines.shared import outputs, tiles
from pipelines.shared.encoding import SAMPLES
from pipelines.shared.outputs import MARKER
from pipelines.shared.programs import run_program

ROOT = Path(__file__).resolve().parents[1]
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
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {*SAMPLES, "overview.png", MARKER}
    for name in SAMPLES:
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
    assert "a.png: done before, skipped (--overwrite replaces it): out/a" in printed
    assert (tmp_path / "out/a/scores.json").stat().st_mtime_ns == before
    assert (tmp_path / "out/b/scores.json").exists()

    assert run("a.png", "--tokens", 9) == 2
    assert "out/a holds the outputs of other settings" in capsys.readouterr().err
    assert run("a.png", "--tokens", 9, "--overwrite") == 0
    assert scores_of(tmp_path / "out/a")["tokens"] == 9
    photograph(seed=5).save(tmp_path / "b.png")  # another picture under the same name
    assert run("b.png", "--tokens", 8) == 2
    assert "other settings" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- nothing lost, nothing mixed


def results(output):
    """The folders that hold results."""
    return {file.parent.relative_to(output).as_posix() for file in output.rglob("scores.json")}


@pytest.mark.parametrize("marker", [None, {"program": "pipelines.generate", "format": 1, "files": ["work"]}])
def test_a_folder_of_somebody_else_is_not_replaced(run, tmp_path, capsys, marker):
    (tmp_path / "p/src").mkdir(parents=True)
    (tmp_path / "p/src/work").write_text("years of it")
    if marker is not None:
        (tmp_path / "p/src" / MARKER).write_text(json.dumps(marker))
    photograph().save(tmp_path / "p/src.png")
    for options in ((), ("--overwrite",)):
        assert run("p/src.png", "--output", "p", "--tokens", 8, *options) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: p/src.png: the output ")
        assert error.count("\n") == 1
        assert (tmp_path / "p/src/work").read_text() == "years of it"


def test_what_was_added_to_the_results_is_kept(run, tmp_path, capsys):
    photograph().save(tmp_path / "photo.png")
    assert run("photo.png", "--tokens", 8) == 0
    (tmp_path / "out/photo/notes.txt").write_text("mine")
    assert run("photo.png", "--tokens", 9, "--overwrite") == 2
    assert "also holds notes.txt" in capsys.readouterr().err
    assert scores_of(tmp_path / "out/photo")["tokens"] == 8


def test_the_overview_replaces_no_photograph(run, tmp_path, capsys):
    for name in ("a.png", "b.png", "overview.png"):
        photograph().save(tmp_path / name)
    before = (tmp_path / "overview.png").read_bytes()
    assert run("a.png", "b.png", "--tokens", 8, "--output", ".") == 2
    assert "overview.png must not exist or be written by pipelines.reconstruct" in capsys.readouterr().err
    assert (tmp_path / "overview.png").read_bytes() == before
    assert run("a.png", "b.png", "overview.png", "--tokens", 8, "--output", "out") == 0
    assert results(tmp_path / "out") == {"a", "b", "overview"}


def test_as_many_results_as_photographs_in_any_order(run, tmp_path, capsys):
    names = ["a/photo.jpg", "b/photo.jpg", "c/photo.jpg-2.png", "d/Photo.png"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir()
        photograph(number).save(tmp_path / name)
    for output, order in (("one", names), ("two", names[::-1])):
        assert run(*order, "--tokens", 8, "--output", output) == 0
        assert "4 images: mean PSNR" in capsys.readouterr().out
        assert len(results(tmp_path / output)) == 4
    sources = [
        {name: scores_of(tmp_path / output / name)["settings"]["source"] for name in results(tmp_path / output)}
        for output in ("one", "two")
    ]
    assert sources[0] == sources[1]
    assert len({name.casefold() for name in sources[0]}) == 4
    assert run(names[0], names[0], tmp_path / names[0], "--tokens", 8, "--output", "once") == 0
    assert results(tmp_path / "once") == {"photo"}  # one file, however it is named


def test_a_photograph_beside_a_folder_of_its_name(run, tmp_path):
    (tmp_path / "d/photo").mkdir(parents=True)
    photograph(0).save(tmp_path / "d/photo.png")
    photograph(1).save(tmp_path / "d/photo/inner.png")
    for options in ((), ("--overwrite",)):
        assert run("d", "--tokens", 8, *options) == 0
        assert results(tmp_path / "out") == {"photo.png", "photo/inner.png"}
    assert run("d", "--tokens", 8, "--output", "d", "--overwrite") == 0  # and into the folder itself
    assert len(results(tmp_path / "d")) == 2
    assert (tmp_path / "d/photo.png").is_file()
    assert (tmp_path / "d/photo/inner.png").is_file()


def test_results_are_not_taken_for_photographs(run, tmp_path, capsys):
    (tmp_path / "d").mkdir()
    for name in ("a.png", "b.png"):
        photograph().save(tmp_path / "d" / name)
    for _ in range(2):
        assert run("d", "--tokens", 8, "--output", "d") == 0
        assert "2 images: mean PSNR" in capsys.readouterr().out
    assert results(tmp_path / "d") == {"a", "b"}
    photograph(3).save(tmp_path / "d/b/more.png")  # not listed, so it is a photograph
    assert run("d", "--tokens", 8, "--output", "other") == 0
    assert results(tmp_path / "other") == {"a", "b.png", "b/more.png"}
    assert run("d/a", "--tokens", 8, "--output", "other") == 2
    assert "the folder d/a must hold images, got none" in capsys.readouterr().err


ODD_NAMES = {
    os.fsdecode(b"caf\xe9.png"): os.fsdecode(b"caf\xe9"),  # not UTF-8
    "two\nlines.png": "two\nlines",
    "-v.png": "-v",
    "x" * 251 + ".png": "x" * 251,
    "..png": "..png",
    "...png": "...png",
    "\x1b[31mred.png": "\x1b[31mred",
    "Case.png": "Case.png",
    "case.jpg": "case.jpg",
}


def test_odd_names(model_folder, tmp_path):
    """As a program of its own: pytest's capture takes characters that a terminal does not."""
    (tmp_path / "d").mkdir()
    for number, name in enumerate(ODD_NAMES):
        photograph(number, (24, 24)).save(tmp_path / "file", format="PNG")
        (tmp_path / "file").rename(tmp_path / "d" / name)
    bad = os.fsdecode(b"bad\n\xe9.jpg")
    (tmp_path / "d" / bad).write_bytes(b"no image")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-m", "pipelines.reconstruct", "d", "--tokens", "8", "--model", model_folder]
    result = subprocess.run(
        [*command, "--device", "cpu"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(ODD_NAMES) + 1  # a line for each image, and one for the mean
    assert lines[-1].startswith(f"{len(ODD_NAMES)} images: mean PSNR")
    assert result.stderr.splitlines()[-1] == r"1 of 10 images not reconstructed: d/bad\n\udce9.jpg"
    assert "\x1b" not in result.stdout + result.stderr
    assert results(tmp_path) == {f"out/{name}" for name in ODD_NAMES.values()}


def test_a_killed_run_leaves_nothing_that_the_next_does_not_remove(run, model_folder, tmp_path):
    (tmp_path / "d").mkdir()
    for number in range(3):
        photograph(number).save(tmp_path / "d" / f"{number}.png")
    program = f"""
import os, signal, sys
from pipelines import reconstruct
write = reconstruct.save_tokens
def stop(path, *arguments):
    write(path, *arguments)
    if "1" in path.parts: os.kill(os.getpid(), signal.SIGKILL)
reconstruct.save_tokens = stop
reconstruct.main(["d", "--tokens", "8", "--output", "d", "--model", {model_folder!r}, "--device", "cpu"])
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True)
    assert result.returncode == -9, result.stderr
    assert results(tmp_path / "d") == {"0"}
    assert len(list((tmp_path / "d").rglob("panel.png"))) == 2  # one of them in staging, not to be reconstructed
    assert run("d", "--tokens", 8, "--output", "d") == 0
    assert results(tmp_path / "d") == {"0", "1", "2"}
    assert not list((tmp_path / "d").glob(".gpstoken-*"))


def test_two_runs_at_once(run, tmp_path, capsys):
    photograph().save(tmp_path / "photo.png")
    with outputs.atomic_directory(tmp_path / "out/photo", program="pipelines.reconstruct"):
        assert run("photo.png", "--tokens", 8) == 2
    assert "out/photo is being written by another run" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob(".*"))
    shutil.rmtree(tmp_path / "out/photo")
    assert run("photo.png", "--tokens", 8) == 0


def test_a_batch_waits_for_the_run_that_writes_one_of_its_images(run, tmp_path, capsys, monkeypatch):
    """Two runs of the same command share the work, and both succeed."""
    (tmp_path / "d").mkdir()
    for number in range(2):
        photograph(number).save(tmp_path / f"d/{number}.png")
    other = outputs.atomic_directory(tmp_path / "out/0", program="pipelines.reconstruct")
    other.__enter__()

    def other_run_is_killed(seconds):
        assert (tmp_path / "out/1").is_dir()  # the rest of the batch was not held up
        with contextlib.suppress(RuntimeError):
            other.__exit__(RuntimeError, RuntimeError(), None)

    monkeypatch.setattr(time, "sleep", other_run_is_killed)
    assert run("d", "--tokens", 8) == 0
    assert "0.png: waiting for the run that is writing it" in capsys.readouterr().err
    assert results(tmp_path / "out") == {"0", "1"}


def test_a_full_disk_is_one_line_and_ends_the_batch(model_folder, tmp_path):
    (tmp_path / "d").mkdir()
    for number in range(3):
        photograph(number).save(tmp_path / "d" / f"{number}.png")
    program = f"""
import resource, sys
from pipelines import reconstruct
from pipelines.shared.programs import run_program
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
arguments = ["d", "--tokens", "8", "--model", {model_folder!r}, "--device", "cpu"]
sys.exit(run_program(reconstruct.main, arguments))
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if "compil" not in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: cannot write ")
    assert errors[0].endswith("out/0: File too large")
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / MARKER]


# ------------------------------------------------------------------------------------------------- files of tokens


def token_file(path, tensors=None, metadata=None, L=4):
    """A file that `load_tokens` accepts but for what is given."""
    tokens = torch.zeros(1, L, 9)
    tokens[..., :2] = 0.3
    whole = {"tokens": tokens, "attention_mask": torch.ones(1, L, dtype=torch.int64), **(tensors or {})}
    whole = {name: tensor for name, tensor in whole.items() if tensor is not None}
    save_file(whole, path, {"height": "40", "width": "56", "tile_size": "", **(metadata or {})})


BAD_TOKENS = {
    "size": ({"metadata": {"height": "100000", "width": "100000"}}, "must be at most 67108864 pixels"),
    "one side": ({"metadata": {"height": "9" * 5000}}, "height must be an integer from 1 to 999999"),
    "no size": ({"metadata": {"width": ""}}, "width must be an integer from 1 to 999999"),
    "negative": ({"metadata": {"width": "-5"}}, "width must be an integer from 1 to 999999"),
    "tile": ({"metadata": {"tile_size": "4", "height": "4000"}}, "tile_size must give each tile a token"),
    "tile of no size": ({"metadata": {"tile_size": "0"}}, "tile_size must be an integer from 1 to 999999"),
    "odd tile": ({"metadata": {"tile_size": "55"}}, "tile_size must be a positive multiple"),
    "no mask": ({"tensors": {"attention_mask": None}}, "without the tensor 'attention_mask'"),
    "long mask": ({"tensors": {"attention_mask": torch.ones(1, 5, dtype=torch.int64)}}, "attention_mask must be"),
    "float mask": ({"tensors": {"attention_mask": torch.ones(1, 4)}}, "attention_mask must be integers (1, 4)"),
    "batch": ({"tensors": {"tokens": torch.ones(2, 4, 9)}}, "tokens must be floating point (1, L, 9)"),
    "channels": ({"tensors": {"tokens": torch.ones(1, 4, 8)}}, "tokens must be floating point (1, L, 9)"),
    "none": ({"L": 0}, "tokens must be floating point (1, L, 9)"),
    "flat": ({"tensors": {"tokens": torch.tensor(1.0)}}, "tokens must be floating point (1, L, 9)"),
    "integers": ({"tensors": {"tokens": torch.ones(1, 4, 9, dtype=torch.int64)}}, "tokens must be floating point"),
    "sigma": ({"tensors": {"tokens": torch.zeros(1, 4, 9)}}, "sigma"),
    "nan": ({"tensors": {"tokens": torch.full((1, 4, 9), torch.nan)}}, ""),
    "all padding": ({"tensors": {"attention_mask": torch.zeros(1, 4, dtype=torch.int64)}}, None),
}


def test_bad_files_of_tokens_do_not_end_the_batch(run, tmp_path, capsys):
    folder = tmp_path / "files"
    folder.mkdir()
    token_file(folder / "first.safetensors")
    for name, (parts, _) in BAD_TOKENS.items():
        token_file(folder / f"{name}.safetensors", **parts)
    whole = (folder / "first.safetensors").read_bytes()
    damaged = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "short header": whole[:5],
        "long header": (2**62).to_bytes(8, "little") + whole[8:],
        "no json": whole[:8] + b"[" * (len(whole) - 8),
        "picture": b"\x89PNG\r\n",
    }
    for name, content in damaged.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    (folder / "a folder.safetensors").mkdir()
    token_file(folder / "last.safetensors")
    files = [folder / "first.safetensors", *sorted(folder.iterdir()), folder / "last.safetensors"]
    assert run("--from_tokens", *files) == 2
    errors = capsys.readouterr().err.splitlines()
    by_name = {line.split(".safetensors: ")[0].rpartition("/")[2]: line for line in errors[:-1]}
    for name, (_, message) in BAD_TOKENS.items():
        if message is not None:
            assert message in by_name.pop(name)
        else:
            by_name.pop(name, None)
    assert set(by_name) == {*damaged, "a folder"}
    assert errors[-1].startswith(f"{len(errors) - 1} of {len(set(files))} files not decoded: ")
    decoded = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"first-from-tokens", "last-from-tokens"} <= decoded
    assert len(decoded) == len(set(files)) - len(errors) + 1


def test_a_claimed_size_is_refused_before_anything_is_allocated(run, tmp_path, capsys):
    """100000 x 100000 pixels are 120 GB."""
    token_file(tmp_path / "big.safetensors", metadata={"height": "100000", "width": "100000"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run("--from_tokens", "big.safetensors") == 2
    assert "height x width must be at most" in capsys.readouterr().err  # and not "cannot allocate memory"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_files_of_tokens_of_one_name(run, tmp_path, capsys):
    for folder in ("a/photo", "b/photo"):
        (tmp_path / folder).mkdir(parents=True)
        token_file(tmp_path / folder / "tokens.safetensors")
    files = ["a/photo/tokens.safetensors", "b/photo/tokens.safetensors"]
    assert run("--from_tokens", *files) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(names) == 2
    assert all(name.startswith("photo-from-tokens-") for name in names)
    capsys.readouterr()
    assert run("--from_tokens", *files[::-1]) == 0  # resumed
    assert capsys.readouterr().out.count("done before, skipped") == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


# --------------------------------------------------------------------------------------------- large photographs


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_large_photograph_is_tiled_by_itself(run, tmp_path, capsys, monkeypatch):
    photograph(size=(200, 300)).save(tmp_path / "photo.png")
    monkeypatch.setattr(tiles, "MAX_WHOLE_PIXELS", 50_000)  # the real bound takes half a minute
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run("photo.png", "--max_side", 0) == 0
    shown = sys.stderr.getvalue()
    assert "300 x 200 pixels are too many for one pass: encoded in 70 tiles of 32 pixels" in capsys.readouterr().out
    assert re.search(r"encode photo.png: .* [1-9]\d*/70 ", shown)
    assert re.search(r"decode photo.png: .* [1-9]\d*/104 ", shown)  # windows of 32 pixels every 24
    scores = scores_of(tmp_path / "out/photo")
    assert scores["tile_size"] == 32
    assert scores["tokens"] == round(8 * 200 * 300 / 32**2)
    assert run("--from_tokens", "out/photo/tokens.safetensors") == 0
    first, second = (tmp_path / "out" / name / "reconstruction.png" for name in ("photo", "photo-from-tokens"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("tile_decode", ["merged", "stitched"])
@pytest.mark.parametrize("size", [(600, 1000), (29, 20400)])
def test_bars_know_how_many_parts_there_are(tile_decode, size, monkeypatch):
    """With a decoder that only counts; one that decodes takes minutes."""
    model = GPSTokenModel(GPSTokenConfig.preset("tiny", tile_decode=tile_decode)).eval()
    model.decoder = CountingDecoder(model.config.map_scale)
    bars = []
    monkeypatch.setattr(tiles, "tqdm", lambda **options: bars.append(real(file=Terminal(), **options)) or bars[-1])
    real = tqdm
    tile_size = 32 if tile_decode == "stitched" else None
    tokens = torch.zeros(1, tiles.num_tiles(size, 32), 9)
    tokens[..., :2] = 0.1
    tiles.decode_in_tiles(model, tokens, torch.ones(tokens.shape[:2], dtype=torch.int64), size, tile_size, "")
    assert bars[0].n == bars[0].total > 1
    assert not model.use_tiling


class CountingDecoder(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, maps, tiles=None):
        return maps.new_zeros(1, 3, maps.shape[2] * self.scale, maps.shape[3] * self.scale)


def test_small_photographs_are_not_tiled_and_few_tokens_make_large_tiles():
    model = GPSTokenModel(GPSTokenConfig.preset("tiny"))  # 8 tokens of 32 x 32 pixels
    assert tiles.choose_tile_size(model, (768, 768), 10_000) is None
    assert tiles.choose_tile_size(model, (769, 768), 10_000) == 32
    assert tiles.choose_tile_size(model, (2000, 3000), 4 * 63 * 94) == 32
    assert tiles.choose_tile_size(model, (2000, 3000), 4 * 63 * 94 - 1) == 64
    assert tiles.choose_tile_size(model, (2000, 3000), 24) == 512  # one token for each of 4 x 6 tiles
    assert tiles.choose_tile_size(model, (2000, 3000), 5) == 2048
    assert tiles.choose_tile_size(model, (2000, 3000), 1) is None


def test_ssim_in_bands_is_ssim():
    pair = [torch.rand(1, 3, 300, 40, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert reconstruct._ssim_in_bands(*pair) == pytest.approx(reconstruct.ssim(*pair).item(), abs=1e-12)


MEASURED = """
import resource, sys
from pipelines import reconstruct
from pipelines.shared.programs import run_program
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
code = run_program(reconstruct.main, ["photo.png", "--max_side", "0", "--device", "cpu", *sys.argv[1:]])
print(code, peak() - before)
"""


@pytest.mark.parametrize(
    ("size", "options", "megabytes"),
    [
        # Measured: 216 MB, in 13 s on one thread. In one pass: 908 MB, in 145 s.
        pytest.param((800, 1000), ["--model", "tiny"], 450, id="tiny", marks=pytest.mark.slow),
        # Measured: 1036 MB, in 156 s on one thread.
        pytest.param((2000, 3000), [], 1300, id="nano", marks=pytest.mark.slow),
    ],
)
def test_memory_of_a_large_photograph(model_folder, tmp_path, size, options, megabytes):
    photograph(size=size).save(tmp_path / "photo.png")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED, *(model_folder if word == "tiny" else word for word in options)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    code, kilobytes = result.stdout.split()[-2:]
    assert code == "0", result.stderr
    assert int(kilobytes) < 1000 * megabytes


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jpg"], "no such file: absent.jpg"),
        (["cut.jpg"], "image must be a readable file, got cut.jpg"),
        (["empty"], "the folder empty must hold images, got none"),
        (["photo.png", "--tokens", "100000"], "100000"),
        (["photo.png", "--focus", "0,0,56,10"], "--focus must lie inside the image's 56 x 40 pixels, got 0,0,56,10"),
        (["photo.png", "--importance", "mask.png"], "56 x 40 pixels, got 30 x 20"),
        (["photo.png", "--importance", "absent.png"], "absent.png"),
        (["photo.png", "--model", "absent-model"], "absent-model"),
        (["photo.png", "--tile_size", "3"], "tile_size"),
        (["photo.png", "--from_tokens", "t.safetensors"], "--from_tokens must come without images"),
        (["--from_tokens", "t.safetensors"], "no such file: t.safetensors"),
        (["--from_tokens", "photo.png"], "photo.png must hold tokens as this program writes them, got"),
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


# ------------------------------------------------------------------------------------------- quality and token files


def test_a_target_takes_the_fewest_tokens(run, tmp_path, capsys):
    photograph().save(tmp_path / "photo.png")
    assert run("photo.png", "--tokens", 6, "--output", "fixed") == 0
    target = scores_of(tmp_path / "fixed" / "photo")["psnr"] - 0.1
    assert run("photo.png", "--target_psnr", target, "--max_tokens", 20, "--output", "reached") == 0
    scores = scores_of(tmp_path / "reached" / "photo")
    assert scores["reached"] is True
    assert scores["psnr"] >= target
    assert scores["tokens"] < 20
    capsys.readouterr()
    assert run("photo.png", "--target_psnr", 90, "--max_tokens", 6, "--output", "short") == 0
    assert "short of the target" in capsys.readouterr().out
    assert scores_of(tmp_path / "short" / "photo")["reached"] is False


@pytest.mark.parametrize("step", [None, 0.5])
def test_a_token_file_decodes_to_the_same_picture(run, tmp_path, capsys, step):
    photograph().save(tmp_path / "photo.png")
    options = [] if step is None else ["--step", step]
    assert run("photo.png", "--tokens", 12, "--to_file", "x.gpst", *options) == 0
    size = (tmp_path / "x.gpst").stat().st_size
    assert scores_of(tmp_path / "out" / "photo")["file_bytes"] == size
    assert f"file of {size} bytes" in capsys.readouterr().out
    assert run("--from_file", "x.gpst") == 0
    whole, decoded = (tmp_path / "out" / name / "reconstruction.png" for name in ("photo", "x-from-file"))
    difference = np.abs(np.asarray(PIL.Image.open(whole), int) - np.asarray(PIL.Image.open(decoded), int))
    assert (difference.max() == 0) == (step is None)
    assert run("photo.png", "--tokens", 12, "--to_file", "x.gpst", *options) == 0  # done before
    assert "done before" in capsys.readouterr().out


def test_a_token_file_replaces_nothing_else(run, tmp_path, capsys):
    photograph().save(tmp_path / "photo.png")
    (tmp_path / "x.gpst").write_text("a letter")
    assert run("photo.png", "--to_file", "x.gpst") == 2
    assert "x.gpst must not exist yet" in capsys.readouterr().err
    assert run("photo.png", "--to_file", "x.gpst", "--overwrite") == 2
    assert "x.gpst must be a token file to be replaced" in capsys.readouterr().err
    assert (tmp_path / "x.gpst").read_text() == "a letter"
    assert run("photo.png", "--to_file", "new/photo/y.gpst", "--output", "new") == 2
    assert "--to_file must lie outside of new/photo" in capsys.readouterr().err
    assert not Path("new").exists()
    assert run("photo.png", "--to_file", "y.gpst") == 0
    assert run("photo.png", "--tokens", 3, "--to_file", "y.gpst", "--overwrite") == 0


def test_errors_of_targets_and_token_files(run, tmp_path, capsys):
    photograph().save(tmp_path / "photo.png")
    photograph(1).save(tmp_path / "other.png")
    (tmp_path / "bad.gpst").write_bytes(b"GPST\x01" + bytes(30))
    for arguments, message in (
        (["photo.png", "--tokens", 4, "--target_psnr", 20], "--tokens must not come with --target_psnr"),
        (["photo.png", "--max_tokens", 4], "--max_tokens must come with --target_psnr"),
        (["photo.png", "--step", 0.5], "--step must come with --to_file"),
        (["photo.png", "--to_file", "x.gpst", "--step", 1000], "--step must be from"),
        (["photo.png", "--to_file", "x.zip"], "--to_file must end in .gpst, got x.zip"),
        (["photo.png", "other.png", "--to_file", "x.gpst"], "--to_file must come with one image, got 2"),
        (["photo.png", "--from_file", "x.gpst"], "--from_file must come without images"),
        (["--from_file", "x.gpst", "--to_file", "y.gpst"], "--from_file must come without"),
        (["--from_file", "x.gpst"], "no such file: x.gpst"),
        (["--from_file", "bad.gpst"], "bad.gpst must be a whole token file, got one that is damaged or cut off"),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
