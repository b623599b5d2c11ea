# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The campaign of attacks: it tells survival from failure, repeats its cases, and writes its table."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.hostile_campaign import AREAS, Child, Ended, call
from tests.hostile_files import corrupt_bytes, corrupt_json, corrupt_png, corrupt_safetensors

ROOT = Path(__file__).resolve().parents[1]


def test_a_few_cases_and_their_table(tmp_path):
    """In a process of its own: the campaign forks, and pytest has threads."""
    command = [sys.executable, "-m", "tests.hostile_campaign", "--areas", "half", "--scale", "0.02"]
    result = subprocess.run(
        [*command, "--output", str(tmp_path / "page.md")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    page = (tmp_path / "page.md").read_text()
    assert f"| {AREAS['half'].title} | 20 | 20 |" in page
    assert "## Failures\n\nNone.\n" in page


def raises(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize("error", [ValueError("size must be >= 1, got 0"), OSError("no such file")])
def test_a_clear_error_survives(tmp_path, error):
    assert call(raises(error), tmp_path) is None


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (raises(KeyError("height")), "traceback, exit 70: KeyError: 'height'"),
        (raises(ValueError("")), "ValueError without a message"),
        (lambda: bytearray(2**40), "MemoryError"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "killed by SIGTERM"),
        (signal.pause, "still running after"),
    ],
)
def test_what_is_a_failure(tmp_path, function, problem):
    assert problem in call(function, tmp_path, seconds=3)


def test_what_a_program_may_print():
    assert Ended(2, "error: a.png is damaged\n", 1.0).problem() is None
    assert Ended(0, "done\n", 1.0).problem() is None
    assert "without a line that says why" in Ended(2, "oh\n", 1.0).problem()
    assert Ended(2, "error: a.png is damaged\n", 1.0).problem((0,)) == "exit 2 instead of 0: error: a.png is damaged"
    assert "exit 1 instead of" in Ended(1, "error: no\n", 1.0).problem()


def test_a_child_is_limited(tmp_path):
    def write():
        (tmp_path / "file").write_bytes(bytes(1000))

    ended = Child(write, tmp_path, file_size=100).wait(20)
    assert "File too large" in ended.problem()
    ended = Child(signal.pause, tmp_path).wait(20, sigkill_after=0.1)
    assert (ended.code, ended.seconds < 10) == (-signal.SIGKILL, True)


FORK_AND_CONVERT = """
import threading
from pathlib import Path

import torch

from tests.hostile_campaign import Child

torch.set_num_threads(2)
# PyTorch sets up its pool at the first operation of a thread. After this one, a forked child will not do it again.
numbers = torch.zeros(1000).to(torch.bfloat16).float()


def convert_in_threads():
    barrier, converted = threading.Barrier(8), []

    def convert():
        barrier.wait()
        converted.append(numbers.to(torch.bfloat16))

    threads = [threading.Thread(target=convert) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(converted) < len(threads):
        raise RuntimeError(f"{len(converted)} of {len(threads)} threads converted")


assert Child(torch.get_num_threads, Path.cwd()).wait(60).code == 1
problems = [Child(convert_in_threads, Path.cwd()).wait(60).problem((0,)) for _ in range(30)]
print(problems)
assert not any(problems)
"""


def test_threads_of_a_child_may_start_together():
    """PyTorch's pool of threads is made anew after a fork, by whoever comes first; two at once fail."""
    command = [sys.executable, "-c", FORK_AND_CONVERT]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("corrupt", "file"),
    [
        (corrupt_bytes, "src/gpstoken_hf/bundled/gpstoken-nano/curves.png"),
        (corrupt_png, "src/gpstoken_hf/bundled/gpstoken-nano/curves.png"),
        (corrupt_json, "src/gpstoken_hf/bundled/gpstoken-nano/config.json"),
        (corrupt_safetensors, "tests/golden/partition.safetensors"),
    ],
)
def test_damage_follows_from_the_seed(corrupt, file):
    data = (ROOT / file).read_bytes()
    made = [corrupt(data, np.random.default_rng([0, number])) for number in range(60)]
    assert made == [corrupt(data, np.random.default_rng([0, number])) for number in range(60)]
    assert sum(damaged != data for damaged, _ in made) >= 55
    assert len({what for _, what in made}) >= 6
