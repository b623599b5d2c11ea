# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import TOKENS, make_pipeline

from gpstoken_hf import GaussianLayout
from pipelines.generate import SCHEDULERS, Job, main
from pipelines.shared.outputs import own_directory
from pipelines.shared.programs import run_program

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline("both").save_pretrained(folder)
    return folder


@pytest.fixture
def generate(saved, tmp_path):
    """Runs the program on the tiny pipeline; returns its exit code."""

    def run(*arguments: object, output: Path = tmp_path / "out") -> int:
        fixed = ["--pipeline", saved, "--output", output, "--steps", 3, "--layout_steps", 2, "--device", "cpu"]
        return run_program(main, [str(argument) for argument in (*fixed, *arguments)])

    return run


def images(output: Path) -> dict[str, np.ndarray]:
    return {
        path.relative_to(output).as_posix(): np.asarray(PIL.Image.open(path))
        for path in sorted((output / "images").rglob("*.png"))
    }


def test_images_layouts_sheets_and_settings(generate, tmp_path, capsys):
    assert generate("--classes", "dog", 3, "1", "--count", 3, "--batch_size", 4) == 0
    output = tmp_path / "out"
    names = [f"{label:04d}/{index:05d}" for label in (1, 3) for index in range(3)]
    assert list(images(output)) == [f"images/{name}.png" for name in names]
    assert len({image.tobytes() for image in images(output).values()}) == 6
    for name in names:
        tensors = load_file(output / "layouts" / f"{name}.safetensors")
        assert tensors["layout"].shape == (TOKENS, 5)
        assert tensors["tokens"].shape == (TOKENS, 9)
    for sheet in ("sheet.png", "layouts.png"):
        picture = np.asarray(PIL.Image.open(output / sheet))
        # Three columns and two rows of 128 pixels.
        assert picture.shape[0] > 2 * 128
        assert picture.shape[1] > 3 * 128
        assert picture.std() > 10
    settings = json.loads((output / "settings.json").read_text())
    assert settings["scheduler"] == "FlowMatchSDEScheduler"
    assert settings["steps"] == 3
    captured = capsys.readouterr()
    assert "6 images of 2 classes" in captured.out
    assert "6/6" in captured.err
    assert "step 3/3" in captured.err


def test_an_image_depends_on_seed_class_and_index_alone(generate, tmp_path, saved):
    assert generate("--classes", 1, 3, "--count", 2, "--seed", 5, "--batch_size", 4) == 0
    assert generate("--classes", 3, "--count", 3, "--seed", 5, "--batch_size", 1, output=tmp_path / "alone") == 0
    first, second = images(tmp_path / "out"), images(tmp_path / "alone")
    for name in ("images/0003/00000.png", "images/0003/00001.png"):
        difference = np.abs(first[name].astype(int) - second[name].astype(int)).max()
        assert difference <= 1  # the rounding of one and of four in a batch
    assert generate("--classes", 3, "--count", 1, "--seed", 6, output=tmp_path / "other") == 0
    other = images(tmp_path / "other")["images/0003/00000.png"]
    assert np.abs(other.astype(int) - first["images/0003/00000.png"].astype(int)).max() > 10

    # The same picture comes from the pipeline itself.
    pipeline = make_pipeline("both")
    image = pipeline([3], 3, num_layout_steps=2, generator=[Job(3, 1).generator(5)]).images[0]
    assert np.abs(np.asarray(image).astype(int) - second["images/0003/00001.png"].astype(int)).max() <= 1


def test_the_noise_of_all_images_differs():
    seeds = {
        Job(label, index).generator(seed).initial_seed()
        for seed in range(3)
        for label in range(30)
        for index in range(30)
    }
    assert len(seeds) == 3 * 30 * 30


def test_the_same_command_goes_on_where_it_stopped(generate, tmp_path):
    assert generate("--classes", 1, 2, "--count", 2) == 0
    output = tmp_path / "out"
    before = images(output)
    times = {path: path.stat().st_mtime_ns for path in (output / "images").rglob("*.png")}
    lost = [output / "images" / "0001" / "00001.png", output / "images" / "0002" / "00000.png"]
    for path in lost:
        path.unlink()
    assert generate("--classes", 1, 2, "--count", 2) == 0
    for name, image in images(output).items():
        assert np.abs(image.astype(int) - before[name].astype(int)).max() <= 1
    kept = {path for path, time in times.items() if path.stat().st_mtime_ns == time}
    assert kept == set(times) - set(lost)

    # More images and classes add to the folder.
    assert generate("--classes", 2, 4, "--count", 3) == 0
    assert len(images(output)) == 4 + 1 + 3
    assert {path for path, time in times.items() if path.stat().st_mtime_ns == time} == kept


def test_an_interrupted_run_leaves_whole_images_and_goes_on(generate, tmp_path, monkeypatch):
    import pipelines.generate as program

    real, calls = program.make_images, []

    def stop_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(program, "make_images", stop_at_the_second)
    assert generate("--classes", 1, "--count", 4, "--batch_size", 2) == 130
    assert len(images(tmp_path / "out")) == 2
    assert [path.name for path in (tmp_path / "out").rglob(".*")] == [".gpstoken.json"]
    monkeypatch.setattr(program, "make_images", real)
    assert generate("--classes", 1, "--count", 4, "--batch_size", 2) == 0
    assert len(images(tmp_path / "out")) == 4


def test_other_settings_are_an_error_unless_overwritten(generate, tmp_path, capsys):
    assert generate("--classes", 1, 2, "--count", 1) == 0
    before = images(tmp_path / "out")
    assert generate("--classes", 1, "--count", 1, "--guidance_scale", 3) == 2
    assert "images of other settings: guidance_scale 1.5 (now 3.0)" in capsys.readouterr().err
    assert all(np.array_equal(image, before[name]) for name, image in images(tmp_path / "out").items())
    assert generate("--classes", 1, "--count", 1, "--guidance_scale", 3, "--overwrite") == 0
    after = images(tmp_path / "out")
    assert list(after) == ["images/0001/00000.png"]
    assert not np.array_equal(after["images/0001/00000.png"], before["images/0001/00000.png"])


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers with NumPy 2
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_by_name(generate, tmp_path, name):
    assert generate("--classes", 1, "--count", 1, "--scheduler", name) == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["scheduler"] == SCHEDULERS[name].__name__


def test_layouts_from_a_file_an_image_and_the_bank(generate, tmp_path):
    assert generate("--classes", 1, "--count", 1, "--layout", "bank", output=tmp_path / "bank") == 0
    path = tmp_path / "bank" / "layouts" / "0001" / "00000.safetensors"
    layout = load_file(path)["layout"]
    stored = make_pipeline("both").layout_bank.layouts_by_class()[1]
    assert any(torch.equal(layout, other) for other in stored)

    edited = layout.clone()
    edited[0, 3:] *= 0.5
    save_file({"layout": edited}, tmp_path / "edited.safetensors")
    assert generate("--classes", 1, "--count", 2, "--layout", tmp_path / "edited.safetensors") == 0
    for index in range(2):
        used = load_file(tmp_path / "out" / "layouts" / "0001" / f"{index:05d}.safetensors")["layout"]
        assert torch.equal(used, edited)

    GaussianLayout(edited[None]).save(tmp_path / "saved.safetensors")
    saved = tmp_path / "saved.safetensors"
    assert generate("--classes", 1, "--count", 1, "--layout", saved, output=tmp_path / "saved") == 0
    used = load_file(tmp_path / "saved" / "layouts" / "0001" / "00000.safetensors")["layout"]
    assert torch.equal(used, edited)

    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    assert generate("--classes", 1, "--count", 1, "--layout", tmp_path / "a.png", output=tmp_path / "image") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "cot"], "class names, such as ['cat'], got 'cot'"),
        (["--classes", "10"], "class ids must be between 0 and 9, got 10"),
        (["--classes", "-1"], "class ids must be between 0 and 9, got -1"),
        (["--guidance_interval", "0.9", "0.1"], "low <= high"),
        (
            ["--pipeline", "nowhere"],
            "--pipeline must be a folder, a Hub repository owner/name or one of gpstoken-digits",
        ),
        (["--pipeline", "."], "model_index.json"),
        (["--layout", "missing.png"], "no such file: missing.png"),
        (["--layout", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_errors_are_one_line(generate, capsys, arguments, message):
    # Classes beginning with a dash are arguments for argparse only in this form.
    if "-1" in arguments:
        arguments = ["--classes", "3", "-1"]
    assert generate("--count", 1, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_folder_of_something_else_is_left_alone(generate, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert generate("--classes", 1, "--count", 1, "--overwrite") == 2
    assert "written by pipelines.generate, got a folder that holds notes.txt" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_settings_of_somebody_else_do_not_make_a_folder_ones_own(generate, tmp_path, capsys):
    output = tmp_path / "out"
    (output / "images").mkdir(parents=True)
    (output / "images" / "work.png").write_text("years of it")
    (output / "settings.json").write_text("{}")
    for options in ((), ("--overwrite",)):
        assert generate("--classes", 1, "--count", 1, *options) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: the output ")
        assert error.count("\n") == 1
    assert (output / "images" / "work.png").read_text() == "years of it"


def test_what_was_added_to_the_images_is_kept(generate, tmp_path, capsys):
    assert generate("--classes", 1, 2, "--count", 1) == 0
    added = tmp_path / "out" / "images" / "0001" / "best.png"
    added.write_text("mine")
    assert generate("--classes", 1, "--count", 1, "--steps", 4, "--overwrite") == 2
    assert "also holds images/0001/best.png" in capsys.readouterr().err
    assert len(images_in(tmp_path / "out")) == 3
    added.unlink()
    assert generate("--classes", 1, "--count", 1, "--steps", 4, "--overwrite") == 0
    assert images_in(tmp_path / "out") == ["images/0001/00000.png"]


def images_in(output: Path) -> list[str]:
    return sorted(path.relative_to(output).as_posix() for path in (output / "images").rglob("*.png"))


def test_an_image_of_somebody_else_is_neither_replaced_nor_taken_for_a_result(generate, tmp_path, capsys):
    assert generate("--classes", 1, "--count", 1) == 0
    for name in ("images/0001/00001.png", "layouts/0001/00001.safetensors"):
        place = tmp_path / "out" / name
        place.write_text("mine")
        assert generate("--classes", 1, "--count", 2) == 2
        assert f"{name} must not exist or be written by pipelines.generate" in capsys.readouterr().err
        assert place.read_text() == "mine"
        place.unlink()


def test_a_damaged_result_is_named(generate, tmp_path, capsys):
    assert generate("--classes", 1, "--count", 1) == 0
    for name in ("images/0001/00000.png", "layouts/0001/00000.safetensors"):
        place = tmp_path / "out" / name
        before = place.read_bytes()
        place.write_bytes(bytes(9))
        assert generate("--classes", 1, "--count", 1) == 2
        assert name in capsys.readouterr().err
        place.write_bytes(before)


@pytest.mark.parametrize("content", [b"[1, 2]", b"{", b"\xff", b"[" * 100_000, b"5"])
def test_damaged_settings_are_one_line(generate, tmp_path, capsys, content):
    assert generate("--classes", 1, "--count", 1) == 0
    (tmp_path / "out" / "settings.json").write_bytes(content)
    capsys.readouterr()
    assert generate("--classes", 1, "--count", 1) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "holds images of other settings" in errors[0]
    assert generate("--classes", 1, "--count", 1, "--overwrite") == 0


def test_the_second_of_two_runs_refuses(generate, tmp_path, capsys):
    with own_directory(tmp_path / "out", "pipelines.generate"):
        assert generate("--classes", 1, "--count", 1) == 2
    assert "out is being written by another run" in capsys.readouterr().err
    assert generate("--classes", 1, "--count", 1) == 0


KILLED = """
import os, signal, sys
import pipelines.generate as program
real = program.save_file
def stop(tensors, path, metadata):
    real(tensors, path, metadata)
    if path.name == "00001.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
program.save_file = stop
program.main(sys.argv[1:])
"""


def test_a_killed_run_is_resumed_and_cleaned_up(generate, tmp_path, saved):
    (tmp_path / "killed.py").write_text(KILLED)
    arguments = [
        "--pipeline",
        saved,
        "--output",
        tmp_path / "out",
        "--steps",
        3,
        "--layout_steps",
        2,
        "--device",
        "cpu",
    ]
    arguments += ["--classes", 1, "--count", 2, "--batch_size", 1]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, str(tmp_path / "killed.py"), *map(str, arguments)]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -9
    output = tmp_path / "out"
    assert images_in(output) == ["images/0001/00000.png"]
    assert len(list(output.rglob(".gpstoken-*"))) == 2  # of the run and of the file
    # Other settings that clear the folder clear that, too.
    assert generate("--classes", 1, "--count", 2, "--steps", 2, "--overwrite") == 0
    assert [path.name for path in output.rglob(".*")] == [".gpstoken.json"]
    assert images_in(output) == ["images/0001/00000.png", "images/0001/00001.png"]


LAUNCHED = """
import os, sys
from pathlib import Path
import pipelines.generate as program

real = program.make_images

def recorded(pipeline, jobs, *rest):
    with open(Path(os.environ["RECORD"]) / f"rank{os.environ['RANK']}", "a") as file:
        file.writelines(f"{job.label} {job.index}\\n" for job in jobs)
    real(pipeline, jobs, *rest)

program.make_images = recorded
sys.exit(program.main(sys.argv[1:]))
"""


def test_processes_share_the_work_and_no_image_is_made_twice(generate, tmp_path, saved):
    (tmp_path / "launched.py").write_text(LAUNCHED)
    record, output = tmp_path / "record", tmp_path / "two"
    record.mkdir()
    # What `accelerate launch` runs for several processes.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["--pipeline", saved, "--output", output, "--steps", 3, "--layout_steps", 2, "--batch_size", 2]
    arguments += ["--classes", 1, 2, 4, "--count", 3, "--device", "cpu"]
    environment = {**os.environ, "RECORD": str(record), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [*launch, str(tmp_path / "launched.py"), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]

    shares = {path.name: path.read_text().splitlines() for path in record.iterdir()}
    assert set(shares) == {"rank0", "rank1"}
    assert Counter(line for share in shares.values() for line in share) == Counter(
        f"{label} {i}" for label in (1, 2, 4) for i in range(3)
    )
    assert sorted(map(len, shares.values())) == [4, 5]
    assert (output / "sheet.png").is_file()
    assert generate("--classes", 1, 2, 4, "--count", 3) == 0
    together, alone = images(output), images(tmp_path / "out")
    assert set(together) == set(alone)
    for name, image in together.items():
        assert np.abs(image.astype(int) - alone[name].astype(int)).max() <= 1
