# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The training programs, run for a few steps on tiny data: what they write, how they stop, go on and refuse."""

import io
import json
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from training_helpers import (
    NUM_ROWS,
    cache_command,
    digest,
    fresh_run,
    make_tokenizer,
    signal_at_step,
    sit_command,
    tokenizer_command,
    write_images,
)

from gpstoken_hf import GaussianLayout, GPSTokenImageProcessor, GPSTokenModel, SiTTransformer1DModel
from pipelines.shared.programs import run_program
from training import cache_tokens, make_digits, train_sit, train_tokenizer
from training import digits as digits_data
from training.checkpoints import checkpoints_of
from training.records import read_metrics
from training.token_cache import STATISTICS

fresh_accelerator_state = pytest.fixture(autouse=True)(fresh_run)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A parquet file of small pictures with labels."""
    return write_images(tmp_path_factory.mktemp("images") / "train.parquet")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokens(images, tokenizer, tmp_path_factory):
    """The pictures as tokens, in shards of 5."""
    path = tmp_path_factory.mktemp("cache") / "tokens"
    assert cache_tokens.main(cache_command(images, tokenizer, path)) == 0
    return path


# ------------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_run_leaves_everything_it_promises(images, tmp_path):
    pytest.importorskip("tensorboard")
    output = tmp_path / "run"
    code = train_tokenizer.main(
        tokenizer_command(
            *(
                images,
                output,
                4,
                "--validation_steps",
                "2",
                "--checkpointing_steps",
                "1",
                "--report_to",
                "tensorboard",
            ),
            *("--checkpoints_total_limit", "2", "--save_dtype", "fp16", "--validation_tokens", "8", "4"),
        )
    )
    assert code == 0
    assert [path.name for path in checkpoints_of(output)] == ["checkpoint-3", "checkpoint-4"]
    rows = read_metrics(output / "metrics.jsonl")
    validated = [row for row in rows if "validation/psnr" in row]
    assert [row["step"] for row in validated] == [2, 4]
    assert all(np.isfinite(row["validation/psnr_4_tokens"]) for row in validated)
    assert list((output / "logs").rglob("events.out.tfevents.*"))
    for picture in ("curves.png", "images/step-0000004.png"):
        assert np.asarray(Image.open(output / picture)).std() > 1
    recorded = yaml.safe_load((output / "training_config.yaml").read_text())
    assert recorded["resolutions"] == [32, 48]
    assert recorded["model_config"]["num_tokens"] == 8

    # Stored in 16 bits, used in 32.
    from safetensors.torch import load_file

    stored = load_file(output / "model" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    model = GPSTokenModel.from_pretrained(output / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    processor = GPSTokenImageProcessor.from_pretrained(output / "model")
    pixel_values = processor(Image.new("RGB", (32, 32), "red"), return_tensors="pt")["pixel_values"]
    assert torch.isfinite(model(pixel_values).sample).all()


def test_tokenizer_learns(images, tmp_path):
    output = tmp_path / "run"
    command = tokenizer_command(images, output, 40, "--resolutions", "32", "--ema_decay", "0.5", "--crop", "center")
    assert train_tokenizer.main([*command, "--learning_rate", "3e-3"]) == 0
    rows = [row["train/mse"] for row in read_metrics(output / "metrics.jsonl") if "train/mse" in row]
    # Seen: from 0.6 to 0.2. A constant grey image stands at 0.35.
    assert np.mean(rows[-5:]) < 0.6 * np.mean(rows[:3])


def test_tokenizer_stopped_by_a_signal_goes_on_bit_for_bit(images, tmp_path):
    more = ("--gradient_accumulation_steps", "2", "--dataloader_num_workers", "1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_tokenizer.main(tokenizer_command(images, whole, 8, *more)) == 0
    thread = signal_at_step(parts, 3, signal.SIGTERM)
    assert train_tokenizer.main(tokenizer_command(images, parts, 8, *more)) == 128 + signal.SIGTERM
    thread.join()
    (checkpoint,) = checkpoints_of(parts)
    assert 3 <= int(checkpoint.name.split("-")[1]) < 8
    assert not (parts / "model").exists()
    assert train_tokenizer.main(tokenizer_command(images, parts, 8, *more)) == 0
    assert digest(parts / "model") == digest(whole / "model")
    losses = [
        {row["step"]: row["train/loss"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row}
        for run in (whole, parts)
    ]
    assert losses[0] == losses[1]


def test_streamed_images_give_the_same_run_after_a_break(images, tmp_path):
    more = ("--streaming", "--shuffle_buffer_size", "4")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_tokenizer.main(tokenizer_command(images, whole, 5, *more)) == 0
    thread = signal_at_step(parts, 2, signal.SIGINT)
    assert train_tokenizer.main(tokenizer_command(images, parts, 5, *more)) == 128 + signal.SIGINT
    thread.join()
    assert train_tokenizer.main(tokenizer_command(images, parts, 5, *more)) == 0
    assert digest(parts / "model") == digest(whole / "model")


def test_image_folder_and_further_training(images, tokenizer, tmp_path):
    folder = tmp_path / "pictures"
    for index in range(5):
        (folder / str(index % 2)).mkdir(parents=True, exist_ok=True)
        row = datasets.load_dataset("parquet", data_files=str(images), split="train")[index]
        row["image"].save(folder / str(index % 2) / f"{index}.png")
    command = [
        *("--pretrained_model_name_or_path", str(tokenizer), "--train_data_dir", str(folder)),
        *("--output_dir", str(tmp_path / "run"), "--max_train_steps", "1", "--train_batch_size", "2"),
        *("--num_validation_images", "2", "--dataloader_num_workers", "0", "--report_to", "none"),
        *("--mixed_precision", "bf16", "--channels_last", "--gradient_checkpointing", "--l1_weight", "1"),
    ]
    assert train_tokenizer.main(command) == 0
    before, after = GPSTokenModel.from_pretrained(tokenizer), GPSTokenModel.from_pretrained(tmp_path / "run" / "model")
    moved = max((a - b).abs().max().item() for a, b in zip(before.parameters(), after.parameters()))
    assert 0 < moved < 1e-3


def test_time_budget_ends_the_run_with_the_rate_down(images, tmp_path):
    # The first step on a machine compiles the loops, which may take longer than the budget.
    assert train_tokenizer.main(tokenizer_command(images, tmp_path / "compiles", 1)) == 0
    output = tmp_path / "run"
    command = tokenizer_command(images, output, 100000, "--max_train_minutes", "0.1", "--lr_warmup_steps", "0")
    started = time.monotonic()
    assert train_tokenizer.main(command) == 0
    assert time.monotonic() - started < 60
    rates = [row["train/learning_rate"] for row in read_metrics(output / "metrics.jsonl") if "train/loss" in row]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5 * rates[0]


@pytest.fixture
def partly_unusable(images, tmp_path):
    """Pictures of which a quarter cannot be used, each for another reason."""
    rows = list(
        datasets.load_dataset("parquet", data_files=str(images), split="train").cast_column(
            "image", datasets.Image(decode=False)
        )
    )
    rows[3]["image"] = {"bytes": b"rubbish", "path": None}
    for index, image in ((6, Image.new("RGB", (1, 20))), (9, Image.new("I;16", (20, 20)))):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        rows[index]["image"] = {"bytes": buffer.getvalue(), "path": None}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    path = tmp_path / "partly.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_unusable_samples_are_left_out_counted_and_named(partly_unusable, tmp_path, capsys, streaming):
    more = ["--streaming", "--shuffle_buffer_size", "9"] if streaming else []
    output = tmp_path / "run"
    command = tokenizer_command(partly_unusable, output, 6, "--resolutions", "32", *more)
    assert train_tokenizer.main([*command, "--max_unusable_share", "0.5"]) == 0
    named = {row["sample"].split(" must ")[0] for row in read_metrics(output / "unusable.jsonl")}
    assert named == {f"row {index}" + (" of shard 0" if streaming else "") for index in (3, 6, 9)}
    printed = capsys.readouterr().err
    assert printed.count("left out: row") == 3
    last = [row for row in read_metrics(output / "metrics.jsonl") if "train/unusable" in row][-1]
    state = json.loads((checkpoints_of(output)[-1] / "run_state.json").read_text())
    assert state["num_unusable"] == last["train/unusable"] >= 3
    assert state["num_images"] == 18


def test_too_many_unusable_samples_stop_the_run(partly_unusable, tmp_path, capsys):
    command = tokenizer_command(partly_unusable, tmp_path / "run", 50, "--resolutions", "32")
    assert run_program(train_tokenizer.main, [*command, "--max_unusable_share", "0.02"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: at most 0.02 of the samples may be unusable (--max_unusable_share), got 3 of ")
    assert "unusable.jsonl names" in message
    assert not checkpoints_of(tmp_path / "run")


@pytest.mark.slow
def test_tokenizer_killed_in_mid_step_goes_on_bit_for_bit(images, tmp_path):
    """kill -9: nothing can be said any more, the last whole checkpoint is where it goes on."""
    more = ("--checkpointing_steps", "3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_tokenizer.main(tokenizer_command(images, whole, 9, *more)) == 0
    command = tokenizer_command(images, parts, 9, *more)
    process = subprocess.Popen([sys.executable, "-m", "training.train_tokenizer", *command])
    while not any(parts.glob("checkpoint-3")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (parts / "model").exists()
    assert train_tokenizer.main(command) == 0
    assert digest(parts / "model") == digest(whole / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--max_tokens", "5000"], "5000 tokens at 32 x 32"),
        (["--min_tokens", "9", "--max_tokens", "5"], "--min_tokens must not exceed"),
        (["--resolution_weights", "1"], "one weight per resolution"),
        (["--image_column", "picture"], "got 'picture'"),
        (["--num_validation_images", "500"], "must be less than the 12 images of the dataset, got 500"),
        (["--train_data_dir", "also"], "one of --dataset_name"),
        (["--preset", "gigantic"], "gigantic"),
        (["--config_overrides", "hidden_sizes=3"], "hidden_sizes"),
        (["--resume_from_checkpoint", "nowhere"], "must be a whole checkpoint, got nowhere"),
        (["--pretrained_model_name_or_path", "x"], "one of --preset"),
    ],
)
def test_tokenizer_refuses_in_one_line(images, tmp_path, capsys, change, message):
    output = tmp_path / "run"
    assert run_program(train_tokenizer.main, [*tokenizer_command(images, output, 2), *change]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert message in printed[-1]
    assert printed[-1].startswith("error: ")
    assert not (output / "model").exists()


def test_a_run_needs_an_end_and_readable_images(images, tmp_path, capsys):
    command = ["--preset", "tiny", "--train_data_files", str(images), "--output_dir", str(tmp_path / "run")]
    assert run_program(train_tokenizer.main, command) == 2
    assert "--max_train_steps or --max_train_minutes" in capsys.readouterr().err
    assert run_program(train_tokenizer.main, tokenizer_command(tmp_path / "no.parquet", tmp_path / "run", 1)) == 2
    assert "no such data file" in capsys.readouterr().err

    rows = [{"image": {"bytes": b"rubbish", "path": None}}] * 5
    broken = tmp_path / "broken.parquet"
    datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image()})).to_parquet(broken)
    assert run_program(train_tokenizer.main, tokenizer_command(broken, tmp_path / "run", 1)) == 2
    assert "must be a readable image" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(images, tmp_path, capsys):
    output = tmp_path / "run"
    assert train_tokenizer.main(tokenizer_command(images, output, 1)) == 0
    command = tokenizer_command(images, output, 2, "--config_overrides", "texture_channels=6")
    assert run_program(train_tokenizer.main, command) == 2
    assert "does not fit this run" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ cache and generator


def test_token_cache_holds_what_the_model_says(images, tokenizer, tokens):
    from training.data import PartitionSettings, partitioned_batch
    from training.pictures import image_to_array

    rows = datasets.load_dataset(str(tokens), split="train").with_format("numpy")
    assert len(rows) == NUM_ROWS
    assert rows["label"][:].tolist() == [index % 3 for index in range(NUM_ROWS)]
    model = GPSTokenModel.from_pretrained(tokenizer).eval()
    picture = datasets.load_dataset("parquet", data_files=str(images), split="train")[7]["image"]
    cropped = picture.resize((32, 32), Image.Resampling.BICUBIC, box=(5, 0, 45, 40))
    settings = PartitionSettings(
        model.config.complexity_exponent, model.config.min_region_size, model.config.sigma_scale
    )
    batch = partitioned_batch(torch.from_numpy(image_to_array(cropped))[None], model.config.num_tokens, settings)
    with torch.no_grad():
        expected = model.encode(batch["pixel_values"], layout=GaussianLayout(batch["init_gaussians"], batch["boxes"]))
    # Worst error seen 2e-7: the cache encodes three images at a time.
    np.testing.assert_allclose(rows[7]["tokens"], expected.tokens[0].numpy(), atol=1e-5)
    np.testing.assert_array_equal(rows[7]["init_gaussians"], batch["init_gaussians"][0].numpy())


def test_channel_statistics_are_those_of_the_rows(tokens):
    rows = datasets.load_dataset(str(tokens), split="train").with_format("numpy")
    tokens_, layouts = rows["tokens"][:].astype(np.float64), rows["init_gaussians"][:].astype(np.float64)
    target = np.concatenate([tokens_[..., :5] - layouts, tokens_[..., 5:]], axis=-1).reshape(-1, tokens_.shape[-1])
    channels = json.loads((tokens / STATISTICS).read_text())["channels"]
    np.testing.assert_allclose(channels["offset"]["mean"], target.mean(0), atol=1e-7)
    varying = target.std(0) > 1e-6
    np.testing.assert_allclose(np.array(channels["offset"]["std"])[varying], target.std(0)[varying], rtol=1e-4)
    assert channels["layout"]["std"][2] == 1  # rho of an initial Gaussian is 0 throughout


def test_cache_goes_on_with_the_missing_shard(images, tokenizer, tokens, tmp_path, capsys):
    output = tmp_path / "tokens"
    assert cache_tokens.main(cache_command(images, tokenizer, output)) == 0
    kept = output / "data" / "train-00000.parquet"
    written = kept.stat().st_mtime_ns
    (output / "sums" / "00001.json").unlink()
    (output / "data" / "train-00001.parquet").unlink()
    (output / STATISTICS).unlink()
    assert cache_tokens.main(cache_command(images, tokenizer, output)) == 0
    assert kept.stat().st_mtime_ns == written
    assert (
        json.loads((output / STATISTICS).read_text())["channels"]
        == (json.loads((tokens / STATISTICS).read_text())["channels"])
    )
    assert run_program(cache_tokens.main, cache_command(images, tokenizer, output, "--num_tokens", "4")) == 2
    assert "num_tokens must be 8, got 4" in capsys.readouterr().err


def test_cache_with_flips_holds_both(images, tokenizer, tmp_path):
    output = tmp_path / "tokens"
    assert cache_tokens.main(cache_command(images, tokenizer, output, "--with_flips")) == 0
    assert json.loads((output / STATISTICS).read_text())["num_rows"] == 2 * NUM_ROWS


@pytest.mark.parametrize("stage", train_sit.STAGES)
def test_generators_train(tokens, tmp_path, stage):
    output = tmp_path / stage
    assert train_sit.main(sit_command(tokens, output, stage, 60, "--validation_steps", "30")) == 0
    rows = read_metrics(output / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert np.mean(losses[-10:]) < np.mean(losses[:5])
    assert [row["step"] for row in rows if "validation/loss" in row] == [30, 60]
    model = SiTTransformer1DModel.from_pretrained(output / "model")
    assert model.config.in_channels == (5 if stage == "layout" else 9)
    assert model.config.condition_channels == (5 if stage == "texture" else None)
    assert model.config.num_classes == 3
    assert (output / "curves.png").exists()


def test_generator_stopped_by_a_signal_goes_on_bit_for_bit(tokens, tmp_path):
    """Noise, times and dropped labels come from the global generator: its state is in the checkpoint."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_sit.main(sit_command(tokens, whole, "texture", 12)) == 0
    thread = signal_at_step(parts, 4, signal.SIGTERM)
    assert train_sit.main(sit_command(tokens, parts, "texture", 12)) == 128 + signal.SIGTERM
    thread.join()
    assert train_sit.main(sit_command(tokens, parts, "texture", 12)) == 0
    assert digest(parts / "model") == digest(whole / "model")


def test_generator_refuses_in_one_line(tokens, tmp_path, capsys):
    for command, message in (
        (sit_command(tmp_path, tmp_path / "run", "layout", 1), "run cache_tokens"),
        (sit_command(tokens, tmp_path / "run", "layout", 1, "--gaussian_target", "offset"), "--stage must be texture"),
        (sit_command(tokens, tmp_path / "run", "layout", 1, "--num_validation_samples", "12"), "less than 12, got 12"),
    ):
        assert run_program(train_sit.main, command) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_diverged_run_saves_nothing(tokens, tmp_path, capsys):
    output = tmp_path / "run"
    command = sit_command(tokens, output, "layout", 20, "--learning_rate", "1e30", "--max_grad_norm", "1e30")
    assert run_program(train_sit.main, command) == 2
    assert "lower the learning rate" in capsys.readouterr().err.splitlines()[-1]
    assert not checkpoints_of(output)


def test_generator_dry_run(tokens, tmp_path, capsys):
    assert train_sit.main(sit_command(tokens, tmp_path / "run", "one-stage", 1, "--dry_run")) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model_config"]["in_channels"] == 9
    assert printed["model_config"]["gaussian_target"] == "absolute"
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- digits


def test_digit_images_keep_their_pixels():
    pytest.importorskip("sklearn")
    digits, labels = digits_data.load_digit_images()
    assert len(digits) == len(labels) == digits_data.NUM_IMAGES
    images = digits_data.upscale(digits[:50])
    assert images.shape == (50, 32, 32, 3)
    # The cubic filter smooths: worst mean error seen 0.9 of 16 levels.
    assert np.abs(digits_data.downscale(images) - digits[:50].reshape(50, 64)).mean() < 1.5


def test_nearest_distances():
    rng = np.random.default_rng(0)
    queries, references = rng.normal(size=(5, 3)), rng.normal(size=(9, 3))
    expected = [min(np.linalg.norm(query - reference) for reference in references) for query in queries]
    np.testing.assert_allclose(digits_data.nearest_distances(queries, references), expected, rtol=1e-9)
    assert digits_data.nearest_distances(references[:2], references).max() < 1e-6


@pytest.mark.slow
def test_digits_are_made_end_to_end(tmp_path):
    pytest.importorskip("sklearn")
    command = [
        *("--work_dir", str(tmp_path / "work"), "--output_dir", str(tmp_path / "out"), "--tokenizer_steps", "2"),
        *("--generator_steps", "2", "--samples_per_class", "2", "--num_inference_steps", "2"),
        *("--num_layout_steps", "2"),
    ]
    assert make_digits.main(command) == 0
    from gpstoken_hf import GPSTokenPipeline

    pipeline = GPSTokenPipeline.from_pretrained(tmp_path / "out")
    assert len(pipeline(["three", 7], num_inference_steps=2, num_layout_steps=2).images) == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| two-stage (this pipeline) |" in card
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()) < 10e6
    for name in ("samples-two-stage.png", "samples-one-stage.png", "training-images.png"):
        assert np.asarray(Image.open(tmp_path / "work" / name)).std() > 1
