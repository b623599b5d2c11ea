# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Training programs in a hostile world: foreign folders, damaged and hostile checkpoints, full disks, kills, NaN."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import load_file
from training_helpers import (
    cache_command,
    digest,
    fresh_run,
    make_tokenizer,
    reset_accelerator,
    sit_command,
    tokenizer_command,
    write_images,
)

from pipelines.shared.outputs import MARKER, check_free, staging_folder
from pipelines.shared.programs import ProgramError, run_program
from training import cache_tokens, make_digits, train_sit, train_tokenizer
from training.checkpoints import MANIFEST, checkpoints_of, choose_checkpoint, find_damage, write_manifest
from training.run_folder import claimed_folder, owner_of

PROGRAM = "training.train_sit"


fresh_accelerator_state = pytest.fixture(autouse=True)(fresh_run)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "train.parquet")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokens(images, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "tokens"
    assert cache_tokens.main(cache_command(images, tokenizer, path)) == 0
    reset_accelerator()
    return path


def short_run(tokens, output, steps, *more):
    return sit_command(tokens, output, "layout", steps, "--checkpointing_steps", "2", *more)


@pytest.fixture(scope="module")
def finished(tokens, tmp_path_factory):
    """Two runs of the same seed: one of 4 steps with checkpoints 2 and 4, and one of 6 steps."""
    folder = tmp_path_factory.mktemp("finished")
    for name, steps in (("half", 4), ("whole", 6)):
        assert train_sit.main(short_run(tokens, folder / name, steps, "--lr_scheduler", "constant")) == 0
        reset_accelerator()
    return folder


def go_on(tokens, finished, tmp_path, *more):
    """A copy of the short run, and the command that makes it a whole one."""
    output = tmp_path / "run"
    if not output.exists():
        shutil.copytree(finished / "half", output)
    return output, short_run(tokens, output, 6, "--lr_scheduler", "constant", *more)


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------- what is not ours


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["model/thesis.txt", "metrics.jsonl", "curves.png", "images/step-1.png", "checkpoint-7/x", "model"]
)
def test_training_replaces_nothing_foreign(tokens, tmp_path, capsys, name):
    output = tmp_path / "run"
    (output / name).parent.mkdir(parents=True)
    (output / name).write_text("mine")
    before = contents(output)
    assert run_program(train_sit.main, short_run(tokens, output, 1)) == 2
    printed = capsys.readouterr().err
    assert name.split("/")[0] in printed.splitlines()[-1]
    assert printed.count("\n") == 1  # before anything is loaded or trained
    assert contents(output) == before


def test_a_model_that_was_put_into_the_run_folder_later_is_not_replaced(tokens, finished, tmp_path, capsys):
    output, command = go_on(tokens, finished, tmp_path)
    shutil.rmtree(output / "model")
    (output / "model").mkdir()
    (output / "model" / "thesis.txt").write_text("mine")
    assert run_program(train_sit.main, command) == 2
    assert "must be written by training.train_sit" in last_line(capsys)
    assert [path.name for path in (output / "model").iterdir()] == ["thesis.txt"]


def test_a_file_put_beside_the_model_is_named_before_anything_is_trained(tokens, finished, tmp_path, capsys):
    """It would keep the new model from taking the place of the old one, hours later."""
    output, command = go_on(tokens, finished, tmp_path)
    (output / "model" / "notes.txt").write_text("mine")
    before = contents(output)
    assert run_program(train_sit.main, command) == 2
    printed = capsys.readouterr().err
    assert "got a folder that also holds notes.txt" in printed.splitlines()[-1]
    assert printed.count("\n") == 1
    assert contents(output) == before


def test_a_run_of_another_program_is_refused(images, tokens, finished, tmp_path, capsys):
    output, _ = go_on(tokens, finished, tmp_path)
    before = contents(output)
    assert run_program(train_tokenizer.main, tokenizer_command(images, output, 1)) == 2
    assert "which training.train_sit has written" in last_line(capsys)
    assert contents(output) == before


def test_other_files_in_the_output_folder_are_left_alone(tokens, tmp_path):
    output = tmp_path / "run"
    (output / "notes").mkdir(parents=True)
    (output / "notes" / ".draft.abcdefgh.txt").write_text("mine")
    (output / ".draft.abcdefgh.txt").write_text("mine")
    (output / ".model.original").mkdir()  # a name that looks like staging
    (output / ".model.original" / "mine.txt").write_text("mine")
    assert train_sit.main(short_run(tokens, output, 1)) == 0
    assert (output / "notes" / ".draft.abcdefgh.txt").read_text() == "mine"
    assert (output / ".draft.abcdefgh.txt").read_text() == "mine"
    assert (output / ".model.original" / "mine.txt").read_text() == "mine"
    assert owner_of(output / "model") == PROGRAM


def test_a_marker_that_leads_elsewhere_is_not_written(tokens, tmp_path, capsys):
    output, mine = tmp_path / "run", tmp_path / "mine.json"
    output.mkdir()
    mine.write_text("[1, 2]")
    (output / MARKER).symlink_to(mine)
    assert run_program(train_sit.main, short_run(tokens, output, 1)) == 2
    assert f"whose {MARKER} would be replaced" in last_line(capsys)
    assert mine.read_text() == "[1, 2]"
    (output / MARKER).unlink()
    with file_size_limit(4):  # the disk is full as a run begins
        assert run_program(train_sit.main, short_run(tokens, output, 1)) == 2
    assert (output / MARKER).stat().st_size == 0  # as after a kill
    assert train_sit.main(short_run(tokens, output, 1)) == 0


def test_what_was_added_to_a_checkpoint_is_kept(tokens, finished, tmp_path):
    output, command = go_on(tokens, finished, tmp_path)
    for name in ("checkpoint-2", "checkpoint-4"):
        (output / name / "notes.txt").write_text("mine")
    assert (
        train_sit.main([*command, "--resume_from_checkpoint", "checkpoint-2", "--checkpoints_total_limit", "1"]) == 0
    )
    kept = sorted(path.parent.name for path in output.glob("checkpoint-*/notes.txt"))
    assert kept == ["checkpoint-2", "checkpoint-4.damaged"]


def test_cache_and_digits_replace_nothing_foreign(images, tokenizer, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "README.md").write_text("mine")
    assert run_program(cache_tokens.main, cache_command(images, tokenizer, output)) == 2
    assert "README.md would be replaced" in last_line(capsys)
    command = ["--work_dir", str(tmp_path / "work"), "--output_dir", str(output), "--overwrite"]
    assert run_program(make_digits.main, command) == 2
    assert "must be written by training.make_digits" in last_line(capsys)
    assert (output / "README.md").read_text() == "mine"


@pytest.mark.parametrize("marker", ["", "[1, 2]", "[" * 100000, '{"program": "training.train_sit"}', '{"format": 1}'])
def test_a_marker_that_proves_nothing(tmp_path, marker):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / MARKER).write_text(marker)
    with pytest.raises(ProgramError, match="must be written by"):
        check_free(tmp_path / "model", overwrite=True, program=PROGRAM)


# -------------------------------------------------------------------------------------------- damaged checkpoints


def empty(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = [
    ("model.safetensors", empty, "has 0 bytes instead of"),
    ("optimizer.bin", zero, "the contents of optimizer.bin have changed"),
    ("random_states_0.pkl", zero, "the contents of random_states_0.pkl have changed"),
    ("random_states_0.pkl", flip, "the contents of random_states_0.pkl have changed"),
    ("ema.safetensors", flip, "the contents of ema.safetensors have changed"),
    ("run_state.json", Path.unlink, "run_state.json is missing"),
    (MANIFEST, Path.unlink, "manifest.json is missing"),
    (MANIFEST, empty, "manifest.json is not readable"),
    (MANIFEST, lambda path: path.write_text("[1, 2]"), "manifest.json is not readable"),
    (MANIFEST, lambda path: path.write_text("[" * 100000), "manifest.json is not readable"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_an_older_one_resumed(finished, tmp_path, name, damage, message):
    shutil.copytree(finished / "half", tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-4" / name)
    checkpoint, notes = choose_checkpoint(tmp_path / "run", "latest")
    assert checkpoint.name == "checkpoint-2"
    assert len(notes) == 1
    assert notes[0].startswith("checkpoint-4 is damaged (")
    assert message in notes[0]
    assert "renamed to checkpoint-4.damaged" in notes[0]
    assert (tmp_path / "run" / "checkpoint-4.damaged").exists()


@pytest.mark.parametrize(("name", "damage"), [("model.safetensors", empty), ("random_states_0.pkl", zero)])
def test_a_run_with_a_damaged_checkpoint_ends_like_an_undamaged_one(tokens, finished, tmp_path, capsys, name, damage):
    output, command = go_on(tokens, finished, tmp_path, "--checkpoints_total_limit", "1")
    damage(output / "checkpoint-4" / name)
    assert train_sit.main(command) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("checkpoint-4 is damaged")
    assert "resuming at step 2 from" in captured.out
    assert digest(output / "model") == digest(finished / "whole" / "model")
    # The damaged one neither counts as the newest nor is removed.
    assert [path.name for path in checkpoints_of(output)] == ["checkpoint-6"]
    assert (output / "checkpoint-4.damaged").exists()


def test_without_a_whole_checkpoint_nothing_starts_anew_in_silence(tokens, finished, tmp_path, capsys):
    output, command = go_on(tokens, finished, tmp_path)
    empty(output / "checkpoint-4" / "optimizer.bin")
    shutil.rmtree(output / "checkpoint-2")
    assert run_program(train_sit.main, command) == 2
    assert "must hold a whole checkpoint, got checkpoint-4 (optimizer.bin has 0 bytes" in last_line(capsys)
    assert run_program(train_sit.main, [*command, "--resume_from_checkpoint", "checkpoint-4"]) == 2
    assert "--resume_from_checkpoint must be a whole checkpoint, got checkpoint-4" in last_line(capsys)
    assert run_program(train_sit.main, [*command, "--resume_from_checkpoint", "none"]) == 2
    assert "--output_dir must be without checkpoints" in last_line(capsys)


def test_a_named_checkpoint_is_resumed_and_the_later_history_replaced(tokens, finished, tmp_path, capsys):
    output, command = go_on(tokens, finished, tmp_path)
    written = (output / "checkpoint-4" / MANIFEST).stat().st_mtime_ns
    assert train_sit.main([*command, "--resume_from_checkpoint", "checkpoint-2"]) == 0
    assert "resuming at step 2 from" in capsys.readouterr().out
    assert digest(output / "model") == digest(finished / "whole" / "model")
    assert (output / "checkpoint-4" / MANIFEST).stat().st_mtime_ns > written


class Payload:
    """A pickle that writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "code has run"))


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"])
def test_a_hostile_checkpoint_runs_no_code(tokens, finished, tmp_path, capsys, name):
    """Its manifest is right: whoever makes the files makes the manifest, too."""
    output, command = go_on(tokens, finished, tmp_path)
    proof = tmp_path / "proof"
    for write in (
        lambda path: path.write_bytes(pickle.dumps(Payload(proof), protocol=2)),
        lambda path: torch.save({"step": Payload(proof)}, path),
    ):
        write(output / "checkpoint-4" / name)
        write_manifest(output / "checkpoint-4")
        code = run_program(train_sit.main, command)
        assert not proof.exists()
        if not name.startswith("custom"):  # nothing reads that one
            assert code == 2
            assert "checkpoint-4 does not fit this run" in last_line(capsys)


def test_the_number_of_processes_must_be_that_of_the_checkpoint(tokens, finished, tmp_path, capsys):
    output, command = go_on(tokens, finished, tmp_path)
    path = output / "checkpoint-4" / "run_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_processes": 2}))
    write_manifest(output / "checkpoint-4")
    assert run_program(train_sit.main, command) == 2
    assert last_line(capsys).endswith("checkpoint-4, 2, got 1")


def test_every_file_of_a_checkpoint_is_in_its_manifest(finished):
    checkpoint = finished / "half" / "checkpoint-4"
    assert find_damage(checkpoint) is None
    listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert listed.keys() == {path.name for path in checkpoint.iterdir()} - {MANIFEST}
    assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "ema.safetensors", "run_state.json"} <= (
        listed.keys()
    )


# --------------------------------------------------------------------------------- full disks, kills, two at a time


@contextlib.contextmanager
def file_size_limit(num_bytes):
    """No file grows beyond `num_bytes`: what a full disk does, for this process alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [16 << 10, 90 << 10])
def test_a_full_disk_is_one_line_and_the_old_checkpoints_survive(tokens, finished, tmp_path, capsys, limit):
    """The first limit is met by the weights, which safetensors writes, the second by what torch writes."""
    output, command = go_on(tokens, finished, tmp_path)
    checkpoint = output / "checkpoint-4"
    assert (checkpoint / "model.safetensors").stat().st_size > 16 << 10
    assert (checkpoint / "model.safetensors").stat().st_size < 90 << 10 < (checkpoint / "optimizer.bin").stat().st_size
    before = contents(checkpoint)
    with file_size_limit(limit):
        assert run_program(train_sit.main, command) == 2
    assert last_line(capsys).startswith(f"error: cannot write {output / 'checkpoint-6'}: ")
    assert contents(checkpoint) == before
    assert not list(output.glob(".checkpoint*"))
    reset_accelerator()
    assert train_sit.main(command) == 0
    assert digest(output / "model") == digest(finished / "whole" / "model")


def test_a_disk_that_is_full_at_the_end_leaves_the_old_model(tokens, finished, tmp_path, capsys):
    output, command = go_on(tokens, finished, tmp_path)
    shutil.rmtree(output)
    shutil.copytree(finished / "whole", output)  # the checkpoint of the last step exists already
    before = digest(output / "model")
    with file_size_limit(16 << 10):
        assert run_program(train_sit.main, [*command, "--validation_steps", "100"]) == 2
    assert "error: " in last_line(capsys)
    assert digest(output / "model") == before
    assert not list(output.glob(".model*"))


def test_leftovers_of_a_kill_are_removed_by_the_next_run(tokens, finished, images, tokenizer, tmp_path):
    output, command = go_on(tokens, finished, tmp_path)
    left = [output / ".checkpoint-6.partial" / "model.safetensors", output / ".model.ab12_xyz" / "config.json"]
    left += [output / ".metrics.ab12_xyz.jsonl", output / "images" / ".step-0000002.ab12_xyz.png"]
    cache = tmp_path / "tokens"
    assert cache_tokens.main(cache_command(images, tokenizer, cache)) == 0
    left += [cache / "data" / ".train-00000.ab12_xyz.parquet", cache / ".statistics.ab12_xyz.json"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    # Killed after the file was in place and before its staging folder was gone: a whole file is not written again.
    for target in (cache / "data" / "train-00000.parquet", cache / "statistics.json", output / "curves.png"):
        left.append(staging_folder(target))
        (left[-1] / "new").mkdir(parents=True)
        (left[-1] / MARKER).write_text(json.dumps({"staging_of": target.name, "format": 1}))
    assert train_sit.main(command) == 0
    assert cache_tokens.main(cache_command(images, tokenizer, cache)) == 0
    assert not [path for path in left if path.exists()]
    assert not [path.name for folder in (output, cache) for path in folder.rglob(".*") if path.name != MARKER]


def test_a_second_run_in_the_same_folder_is_refused(images, tokenizer, tokens, finished, tmp_path, capsys):
    output, command = go_on(tokens, finished, tmp_path)
    before = contents(output)
    with claimed_folder(output, PROGRAM, ()):
        assert run_program(train_sit.main, command) == 2
    assert "is in use by another run of training.train_sit" in last_line(capsys)
    assert contents(output) == before
    with claimed_folder(tmp_path / "tokens", "training.cache_tokens", ()):
        assert run_program(cache_tokens.main, cache_command(images, tokenizer, tmp_path / "tokens")) == 2
    assert "is in use by another run of training.cache_tokens" in last_line(capsys)


def processes_of(group):
    """Ids of the living processes of a process group."""
    living = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
            if int(number) == group and state != "Z":
                living.append(int(path.parent.name))
    return living


@pytest.mark.skipif(not Path("/proc").exists(), reason="counts processes in /proc")
def test_workers_of_a_killed_run_do_not_hold_its_folder(tmp_path):
    """Workers take seconds to notice that their parent is gone. The same command must resume at once."""
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom training.run_folder import claimed_folder\n"
        "with claimed_folder(Path(sys.argv[1]), 'training.train_sit', ()):\n"
        "    if os.fork() == 0:\n        print('forked', flush=True)\n        time.sleep(60)\n        os._exit(0)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "forked\n"
        with pytest.raises(ProgramError, match="in use"), claimed_folder(tmp_path / "run", PROGRAM, ()):
            pass
        process.kill()
        process.wait()
        with claimed_folder(tmp_path / "run", PROGRAM, ()):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the worker
        process.stdout.close()


def test_a_signal_to_all_processes_of_a_run_ends_it_cleanly(images, tmp_path):
    """As a job scheduler sends it: the loader's workers get it, too."""
    output = tmp_path / "run"
    command = tokenizer_command(images, output, 100000, "--dataloader_num_workers", "2")
    process = subprocess.Popen([sys.executable, "-m", "training.train_tokenizer", *command], start_new_session=True)
    try:
        while not (output / "metrics.jsonl").exists() or not (output / "metrics.jsonl").read_text().count("\n"):
            assert process.poll() is None
            time.sleep(0.02)
        assert len(processes_of(process.pid)) >= 3
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    (checkpoint,) = checkpoints_of(output)
    assert find_damage(checkpoint) is None
    assert not processes_of(process.pid)


# ------------------------------------------------------------------------------------------------------ NaN and Hub


def test_a_nan_names_its_step_and_the_last_good_checkpoint(tokens, finished, tmp_path, capsys):
    output, command = go_on(tokens, finished, tmp_path)
    more = ["--learning_rate", "1e30", "--max_grad_norm", "1e30", "--logging_steps", "50"]
    # The weights of the checkpoint give a finite loss at step 5, the update of that step ruins them.
    assert run_program(train_sit.main, [*command, *more, "--checkpointing_steps", "50"]) == 2
    message = last_line(capsys)
    assert "loss is " in message or "gradient_norm is " in message
    assert " at step 6; " in message
    assert f"the last good checkpoint is {output / 'checkpoint-4'}: lower the learning rate" in message
    assert [path.name for path in checkpoints_of(output)] == ["checkpoint-2", "checkpoint-4"]
    weights = load_file(output / "checkpoint-4" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


PUSH = """
import sys
from training import train_sit
assert train_sit.main(sys.argv[1:]) == 0
from gpstoken_hf import SiTTransformer1DModel
assert SiTTransformer1DModel.from_pretrained("tester/layouts").config.in_channels == 5
"""


def test_the_model_is_pushed_without_the_marker(tokens, tmp_path):
    output = tmp_path / "run"
    command = short_run(tokens, output, 1, "--push_to_hub", "--hub_model_id", "tester/layouts")
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.env, "HF_HOME": str(tmp_path / "cache")}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
            environment.pop(name, None)
        result = subprocess.run(
            [sys.executable, "-c", PUSH, *command], env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr[-3000:]
        pushed = hub.files("tester/layouts")
    for file in (output / "model").iterdir():
        if file.name != MARKER:
            assert pushed[file.name] == file.read_bytes(), file.name
    assert MARKER not in pushed
