# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""cache_tokens on streams and over processes: every image once, statistics merged exactly, pushed with a card."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from loopback_hub import LoopbackHub
from PIL import Image
from training_helpers import (
    NUM_ROWS,
    cache_command,
    fresh_run,
    launch,
    make_tokenizer,
    reset_accelerator,
    write_images,
)

from pipelines.shared.programs import run_program
from training import cache_tokens
from training.streams import ImageStream
from training.token_cache import STATISTICS

fresh_accelerator_state = pytest.fixture(autouse=True)(fresh_run)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "train.parquet")


@pytest.fixture(scope="module")
def files(images, tmp_path_factory):
    """The pictures in three files of 3, 4 and 5."""
    folder = tmp_path_factory.mktemp("files")
    rows = datasets.load_dataset("parquet", data_files=str(images), split="train")
    bounds = [0, 3, 7, 12]
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        rows.select(range(start, end)).to_parquet(folder / f"{index}.parquet")
    return sorted(folder.glob("*.parquet"))


def stream_command(files, tokenizer, output, *more):
    command = cache_command(files[0], tokenizer, output, "--streaming", *more)
    start = command.index("--train_data_files")
    command[start + 1 : start + 2] = [str(file) for file in files]
    command[command.index("--shard_size") + 1] = "2"
    return command


@pytest.fixture(scope="module")
def streamed(files, tokenizer, tmp_path_factory):
    """The cache of one process."""
    output = tmp_path_factory.mktemp("streamed") / "tokens"
    assert cache_tokens.main(stream_command(files, tokenizer, output)) == 0
    reset_accelerator()
    return output


def contents(folder):
    return {path.name: path.read_bytes() for path in [*sorted((folder / "data").iterdir()), folder / STATISTICS]}


def labels(output):
    files = sorted(str(path) for path in (output / "data").glob("*.parquet"))
    return datasets.load_dataset("parquet", data_files=files, split="train")["label"][:]


def test_a_stream_gives_the_rows_of_the_dataset(streamed, images, tokenizer, tmp_path):
    whole = tmp_path / "tokens"
    assert cache_tokens.main(cache_command(images, tokenizer, whole)) == 0
    found, expected = (
        datasets.load_dataset(str(path), split="train").with_format("numpy") for path in (streamed, whole)
    )
    assert labels(streamed) == [index % 3 for index in range(NUM_ROWS)]
    # Worst error seen 2e-7: batches are of other sizes.
    np.testing.assert_allclose(found["tokens"][:], expected["tokens"][:], atol=1e-5)
    described = [json.loads((path / STATISTICS).read_text()) for path in (streamed, whole)]
    np.testing.assert_allclose(*(entry["channels"]["offset"]["std"] for entry in described), rtol=1e-5)
    assert described[0]["num_rows"] == NUM_ROWS
    assert described[0]["class_names"] == ["a", "b", "c"]


@pytest.mark.parametrize("world_size", [2, 5])
def test_processes_share_a_stream_and_the_result_is_that_of_one(files, tokenizer, streamed, tmp_path, world_size):
    """Two deal the three files, five deal their parts."""
    output = tmp_path / "tokens"
    command = stream_command(files, tokenizer, output)
    options = cache_tokens.make_parser().parse_args(command)
    dataset = ImageStream(cache_tokens.load_image_dataset(options))
    model = cache_tokens.GPSTokenModel.from_pretrained(tokenizer).eval()
    identity = json.loads((streamed / cache_tokens.IDENTITY).read_text())
    written = []
    for rank in range(world_size):
        process = SimpleNamespace(
            process_index=rank,
            num_processes=world_size,
            is_local_main_process=False,
            device=torch.device("cpu"),
            autocast=nullcontext,
        )
        before = set((output / "data").glob("*")) if output.exists() else set()
        cache_tokens.write_parts(options, process, dataset, model, identity)
        written.append(len(set((output / "data").glob("*")) - before))
    assert sum(written) == len(list((streamed / "data").glob("*")))
    assert sum(number > 0 for number in written) >= 2
    cache_tokens.write_description(options, dataset, identity, ["a", "b", "c"])
    assert contents(output) == contents(streamed)


def test_a_stream_goes_on_with_the_missing_parts(files, tokenizer, streamed, tmp_path):
    output = tmp_path / "tokens"
    shutil.copytree(streamed, output)
    (output / "sums" / "00001-00001.json").unlink()
    (output / "data" / "train-00001-00001.parquet").unlink()
    (output / "data" / "train-00002-00000.parquet").write_bytes(b"left without a record")
    (output / "sums" / "00002-00000.json").unlink()
    (output / STATISTICS).unlink()
    kept = output / "data" / "train-00000-00000.parquet"
    written = kept.stat().st_mtime_ns
    assert cache_tokens.main(stream_command(files, tokenizer, output)) == 0
    assert kept.stat().st_mtime_ns == written
    assert contents(output) == contents(streamed)


def test_unusable_images_are_left_out_counted_and_named(images, tokenizer, tmp_path, capsys):
    rows = list(datasets.load_dataset("parquet", data_files=str(images), split="train"))
    rows[4]["image"], rows[7]["image"] = Image.new("RGB", (1, 20)), Image.new("I;16", (20, 20))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "partly.parquet")
    output = tmp_path / "tokens"
    assert cache_tokens.main(cache_command(tmp_path / "partly.parquet", tokenizer, output)) == 0
    assert labels(output) == [index % 3 for index in range(NUM_ROWS) if index not in (4, 7)]
    described = json.loads((output / STATISTICS).read_text())
    assert described["num_unusable"] == 2
    assert [text.split(" must")[0] for text in described["unusable"]] == ["row 4", "row 7"]
    assert "left out: row 4 must have at least 2 x 2 pixels, got 1 x 20" in capsys.readouterr().err
    reset_accelerator()
    command = cache_command(tmp_path / "partly.parquet", tokenizer, tmp_path / "other", "--max_unusable_share", "0.01")
    assert run_program(cache_tokens.main, command) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "at most 0.01 of the images may be unusable" in message
    assert "row 7" in message


READ_BACK = """
import sys
from training import cache_tokens
from training.token_cache import load_token_dataset, read_statistics
assert cache_tokens.main(sys.argv[1:]) == 0
statistics, folder = read_statistics("tester/digits")
assert statistics["num_rows"] == len(load_token_dataset(folder)) == 12
import datasets
assert len(datasets.load_dataset("tester/digits", split="train")) == 12
"""


@pytest.mark.slow
def test_the_cache_is_pushed_as_a_dataset_with_its_card(images, tokenizer, tmp_path):
    command = cache_command(
        images, tokenizer, tmp_path / "tokens", "--push_to_hub", "--hub_dataset_id", "tester/digits"
    )
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.env, "HF_HOME": str(tmp_path / "home")}
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_CACHE"):
            environment.pop(name, None)
        result = subprocess.run(
            [sys.executable, "-c", READ_BACK, *command], env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, result.stderr[-3000:]
        pushed = hub.files("tester/digits", "datasets")
    assert b"12 images of 32 x 32 pixels as 8 tokens each" in pushed["README.md"]
    assert {"README.md", STATISTICS, "data/train-00000.parquet"} <= pushed.keys()
    assert not [name for name in pushed if name.startswith("sums/") or name.endswith("gpstoken.json")]


@pytest.mark.slow
def test_killed_processes_lose_and_repeat_nothing(files, tokenizer, streamed, tmp_path):
    """SIGKILL to two processes at random moments, until a run is through; the last one has three processes."""
    output, random_source = tmp_path / "tokens", random.Random(0)
    command = stream_command(files, tokenizer, output)
    for _ in range(4):
        process = launch("cache_tokens", 2, command, wait=False)
        deadline = time.monotonic() + random_source.uniform(8, 40)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, 9) if process.poll() is None else None
        process.wait()
    launch("cache_tokens", 3, command)
    assert contents(output) == contents(streamed)
