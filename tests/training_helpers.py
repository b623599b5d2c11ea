# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Tiny data and short commands for the tests of the training programs."""

import hashlib
import os
import subprocess
import sys
import threading
import time

import datasets
import numpy as np
import torch
from accelerate.test_utils.testing import AccelerateTestCase
from PIL import Image

from gpstoken_hf import GPSTokenConfig, GPSTokenModel
from training.records import read_metrics

NUM_ROWS = 12


def reset_accelerator():
    """Accelerate's state is one per process, but each run of a test stands for a process."""
    AccelerateTestCase().tearDown()


def fresh_run(monkeypatch, tmp_path):
    """To be made an automatic fixture: no state of accelerate from another test, no cached downloads."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    threads = torch.get_num_threads()
    yield
    reset_accelerator()
    torch.set_num_threads(threads)


def make_tokenizer(path):
    """An untrained tokenizer of the tiny preset."""
    torch.manual_seed(0)
    GPSTokenModel(GPSTokenConfig.preset("tiny")).save_pretrained(path)
    return path


def write_images(path):
    """A parquet file of NUM_ROWS small pictures with three labels."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(NUM_ROWS):
        blocks = rng.integers(0, 255, size=(4, 5, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
        rows.append({"image": Image.fromarray(blocks), "label": index % 3})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def cache_command(images, tokenizer, output, *more):
    return [
        *("--tokenizer", str(tokenizer), "--train_data_files", str(images), "--output_dir", str(output)),
        *("--shard_size", "5", "--batch_size", "3", "--dataloader_num_workers", "0", *more),
    ]


def tokenizer_command(images, output, steps, *more):
    return [
        *("--preset", "tiny", "--train_data_files", str(images), "--output_dir", str(output)),
        *("--max_train_steps", str(steps), "--train_batch_size", "3", "--num_validation_images", "2"),
        *("--resolutions", "32", "48", "--min_tokens", "4", "--max_tokens", "12", "--crop", "random_resized"),
        *("--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2", "--logging_steps", "1"),
        *("--dataloader_num_workers", "0", "--report_to", "none", *more),
    ]


def sit_command(tokens, output, stage, steps, *more):
    return [
        *("--stage", stage, "--tokens_dir", str(tokens), "--output_dir", str(output), "--max_train_steps", str(steps)),
        *("--train_batch_size", "4", "--num_validation_samples", "3", "--logging_steps", "1"),
        *("--config_overrides", "num_layers=2", "num_attention_heads=2", "attention_head_dim=8"),
        *("--learning_rate", "3e-3", "--dataloader_num_workers", "0", "--report_to", "none"),
        *("--num_sample_steps", "1", *more),
    ]


def digest(directory):
    """Of the weights in a folder."""
    (path,) = directory.glob("*.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def signal_at_step(output, step, number):
    """Send this process a signal as soon as the run in `output` has logged a step."""

    def wait():
        metrics = output / "metrics.jsonl"
        while not metrics.exists() or not any(row["step"] >= step for row in read_metrics(metrics)):
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def launch(program, num_processes, command, wait=True, **environment):
    """Run a training program in processes on the CPU that talk through gloo."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", **environment}
    words = [*launcher, "-m", f"training.{program}", *command]
    if not wait:
        return subprocess.Popen(
            words, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return result
