# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Training at scale, on two CPU processes: DDP, FSDP, accelerate's configurations, trackers, compiled modules."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils import LoggerType
from safetensors.torch import load_file
from training_helpers import (
    digest,
    fresh_run,
    launch,
    make_tokenizer,
    reset_accelerator,
    sit_command,
    tokenizer_command,
    write_images,
)

from gpstoken_hf import GPSTokenModel
from pipelines.shared.programs import ProgramError, run_program
from training import train_sit, train_tokenizer
from training.checkpoints import checkpoints_of
from training.records import read_metrics
from training.sharding import take_fsdp_request
from training.trackers import chosen_trackers

CONFIGS = Path(train_tokenizer.__file__).parent / "configs"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

fresh_accelerator_state = pytest.fixture(autouse=True)(fresh_run)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "train.parquet")


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_our_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    kind = yaml.safe_load(path.read_text())["distributed_type"]
    assert str(config.distributed_type).endswith(kind)
    assert config.num_processes == 8


def test_there_is_a_configuration_for_every_kind():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {
        *("ddp", "ddp_two_machines", "fsdp", "deepspeed_zero2", "deepspeed_zero3")
    }


def test_what_is_asked_of_fsdp(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert take_fsdp_request() is False
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert take_fsdp_request() is True
    assert os.environ["ACCELERATE_USE_FSDP"] == "false"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ProgramError, match="fsdp_version must be 2, got 1"):
        take_fsdp_request()


def test_deepspeed_without_its_package_is_one_line(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run_program(train_tokenizer.main, tokenizer_command(images, tmp_path / "run", 1)) == 2
    assert "which is not installed: pip install deepspeed" in last_line(capsys)


# ---------------------------------------------------------------------------------------------------------- trackers


def test_trackers_are_known_and_installed(monkeypatch):
    pytest.importorskip("tensorboard")
    assert chosen_trackers("none") == []
    assert chosen_trackers("tensorboard") == ["tensorboard"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(ProgramError, match=f"--report_to {name} needs the package {name}: pip install {name}"):
            chosen_trackers(name)
    with pytest.raises(ProgramError, match=r"--report_to must be none or some of .*, got paper"):
        chosen_trackers("paper")


@pytest.mark.slow
def test_trackio_gets_scalars_and_pictures(images, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    if "trackio" not in [str(kind) for kind in LoggerType]:
        pytest.skip("needs an accelerate that knows trackio")
    script = (
        "import sys\nfrom training import train_tokenizer\nassert train_tokenizer.main(sys.argv[1:]) == 0\n"
        "import trackio\nrun = trackio.Api().runs('train_tokenizer')[0]\n"
        "print(sorted(run.metrics()) if hasattr(run, 'metrics') else 'no listing')\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "GRADIO_ANALYTICS_ENABLED": "False"}
    command = tokenizer_command(images, tmp_path / "run", 1, "--report_to", "trackio")
    result = subprocess.run(
        [sys.executable, "-c", script, *command], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert list((tmp_path / "trackio").rglob("*train_tokenizer*"))
    assert list((tmp_path / "trackio").rglob("*.png"))


def test_a_compiled_run_trains_and_saves_plain_weights(images, tmp_path):
    command = tokenizer_command(images, tmp_path / "run", 2, "--resolutions", "32", "--token_counts_per", "batch")
    assert train_tokenizer.main([*command, "--torch_compile", "--torch_compile_backend", "eager"]) == 0
    assert (
        train_tokenizer.main([word.replace(str(tmp_path / "run"), str(tmp_path / "plain")) for word in command]) == 0
    )
    compiled, plain = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "plain"))
    assert compiled.keys() == plain.keys()
    # The backend runs the same operations one by one.
    assert max((compiled[name] - plain[name]).abs().max().item() for name in plain) < 1e-5


# ------------------------------------------------------------------------------------------------------ two processes


def two_process_command(images, output, batch_size, *more):
    return tokenizer_command(
        *(images, output, 6, "--resolutions", "32", "--min_tokens", "8", "--max_tokens", "8"),
        *("--train_batch_size", str(batch_size), "--adversarial_weight", "0.3", "--adversarial_start_step", "2"),
        *("--checkpointing_steps", "3", *more),
    )


@pytest.fixture(scope="module")
def one_process(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "run"
    assert train_tokenizer.main(two_process_command(images, output, 6)) == 0
    reset_accelerator()
    return output


def logged(output):
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "train/images_per_s" in row]
    return {row["step"]: (row.get("train/mse", 0), row.get("train/adversarial_weight", 0)) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_like_one_with_twice_the_batch_and_resume(images, one_process, tmp_path, kind):
    output, environment = tmp_path / "two", FSDP if kind == "fsdp" else {}
    command = two_process_command(images, output, 3)
    launch("train_tokenizer", 2, command, **environment)
    one, two = logged(one_process), logged(output)
    for step in range(1, 7):
        assert one[step] == pytest.approx(two[step], rel=1e-3), step
    # The averages, whole. Worst error seen 6.2e-6, after four updates of 1e-3.
    averages = [load_file(run / "checkpoint-6" / "ema.safetensors") for run in (one_process, output)]
    assert averages[0].keys() == averages[1].keys()
    worst = max((averages[0][name] - averages[1][name]).abs().max().item() for name in averages[0])
    print(f"{kind}: worst difference of the averages {worst:.1e}")
    assert worst < 3e-5
    saved = GPSTokenModel.from_pretrained(output / "model").state_dict()
    assert all(torch.equal(saved[name.removeprefix("model.")], value) for name, value in averages[1].items())

    whole = digest(output / "model")
    for name in ("checkpoint-6", "model"):
        shutil.rmtree(output / name)
    result = launch("train_tokenizer", 2, command, **environment)
    assert "resuming at step 3" in result.stdout
    assert digest(output / "model") == whole


DEEPSPEED_ON_CPU = """
import importlib, sys
from accelerate import PartialState
PartialState(backend="gloo")  # accelerate itself would leave every process alone on a CPU
raise SystemExit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
"""


def launch_deepspeed(stage, program, command, tmp_path):
    """Run a training program in two processes on the CPU, with the configuration of a ZeRO stage."""
    script = tmp_path / "on_cpu.py"
    script.write_text(DEEPSPEED_ON_CPU)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launcher += ["--config_file", str(CONFIGS / f"deepspeed_zero{stage}.yaml"), str(script), f"training.{program}"]
    result = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(2, "no"), (3, "no"), (2, "bf16")])
def test_deepspeed_trains_like_ddp_and_resumes(images, tmp_path, stage, precision):
    pytest.importorskip("deepspeed")
    tokenizer = make_tokenizer(tmp_path / "tokenizer")

    def command(output):
        words = tokenizer_command(images, output, 6, "--resolutions", "32", "--min_tokens", "8", "--max_tokens", "8")
        assert words[:2] == ["--preset", "tiny"]
        words[:2] = ["--pretrained_model_name_or_path", str(tokenizer), "--mixed_precision", precision]
        more = ("--gradient_accumulation_steps", "2", "--max_grad_norm", "0.5", "--checkpointing_steps", "3")
        return [*words, *more]

    launch("train_tokenizer", 2, command(tmp_path / "ddp"))
    launch_deepspeed(stage, "train_tokenizer", command(tmp_path / "run"), tmp_path)
    ddp, run = logged(tmp_path / "ddp"), logged(tmp_path / "run")
    for step in range(1, 7):
        assert ddp[step] == pytest.approx(run[step], rel=1e-3), step
    averages = [load_file(tmp_path / name / "checkpoint-6" / "ema.safetensors") for name in ("ddp", "run")]
    assert averages[0].keys() == averages[1].keys()
    worst = max((averages[0][name] - averages[1][name]).abs().max().item() for name in averages[0])
    print(f"ZeRO-{stage}, {precision}: worst difference of the averages {worst:.1e}")
    # Worst error seen 3.0e-6. In bfloat16, weights that differ in their last bit may round apart, and Adam moves those
    # whose gradient is mere rounding by the whole learning rate: there the losses are what can be compared.
    assert precision == "bf16" or worst < 3e-5

    whole = digest(tmp_path / "run" / "model")
    for name in ("checkpoint-6", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    result = launch_deepspeed(stage, "train_tokenizer", command(tmp_path / "run"), tmp_path)
    assert "resuming at step 3" in result.stdout
    assert digest(tmp_path / "run" / "model") == whole


@pytest.mark.slow
def test_deepspeed_trains_a_generator_beside_a_frozen_tokenizer(images, tmp_path):
    pytest.importorskip("deepspeed")
    tokenizer = make_tokenizer(tmp_path / "tokenizer")

    def command(output, batch_size):
        words = sit_command("unused", output, "texture", 4, "--tokenizer", str(tokenizer), "--resolution", "32")
        at = words.index("--tokens_dir")
        del words[at : at + 2]
        return [*words, "--train_data_files", str(images), "--num_tokens", "8", "--train_batch_size", str(batch_size)]

    assert train_sit.main(command(tmp_path / "one", 4)) == 0
    launch_deepspeed(3, "train_sit", command(tmp_path / "two", 2), tmp_path)
    one, two = (
        [row["validation/loss"] for row in read_metrics(tmp_path / run / "metrics.jsonl") if "validation/loss" in row]
        for run in ("one", "two")
    )
    assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.slow
def test_two_processes_accumulate_stream_and_validate_in_shards(images, tmp_path):
    """FSDP in bf16 with accumulated and checkpointed gradients, on a stream."""
    more = [
        "--streaming",
        "--gradient_accumulation_steps",
        "2",
        "--gradient_checkpointing",
        "--mixed_precision",
        "bf16",
    ]
    command = tokenizer_command(images, tmp_path / "run", 4, *more, "--validation_steps", "2", "--no_use_ema")
    launch("train_tokenizer", 2, command, **FSDP)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "validation/psnr" in row] == [2, 4]
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "run/model/model.safetensors").values())


@pytest.mark.slow
def test_inductor_trains(images, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    command = tokenizer_command(images, tmp_path / "run", 2, "--resolutions", "32", "--torch_compile")
    assert train_tokenizer.main([*command, "--min_tokens", "8", "--max_tokens", "8"]) == 0


# -------------------------------------------------------------------------------------------------------- random kills


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_twenty_random_kills_change_nothing(images, tmp_path, streaming):
    """SIGKILL at random moments, also while checkpoints are written; with workers and the GAN on, in mid-epoch."""
    random_source = random.Random(streaming)
    more = ["--checkpointing_steps", "2", "--dataloader_num_workers", "1", "--adversarial_weight", "0.3"]
    more += ["--adversarial_start_step", "4", "--validation_steps", "100"]
    more += ["--streaming", "--shuffle_buffer_size", "5"] if streaming else []
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_tokenizer.main(tokenizer_command(images, whole, 40, *more)) == 0
    command = tokenizer_command(images, parts, 40, *more)
    words = [sys.executable, "-m", "training.train_tokenizer", *command]
    for kill in range(10):
        process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        goal = 2 + 3 * kill  # moves on, or nothing would be trained in mid-run
        while process.poll() is None and not any(
            row["step"] > goal
            for row in (read_metrics(parts / "metrics.jsonl") if (parts / "metrics.jsonl").exists() else [])
        ):
            time.sleep(0.02)
        time.sleep(random_source.uniform(0, 0.5))
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.wait()
    assert checkpoints_of(parts)
    assert not (parts / "model").exists()
    assert train_tokenizer.main(command) == 0
    assert digest(parts / "model") == digest(whole / "model")
    for name in ("model_1.safetensors", "optimizer.bin", "optimizer_1.bin", "ema.safetensors"):
        ends = [checkpoints_of(run)[-1] / name for run in (whole, parts)]
        assert ends[0].read_bytes() == ends[1].read_bytes(), name
