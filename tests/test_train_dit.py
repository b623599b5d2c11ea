# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""training.train_dit: the grid of patches, the batches, the objective, and the whole program with a resumed run."""

import itertools
import json

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from model_helpers import make_images, max_error
from PIL import Image

from gpstoken_hf import AutoencoderGPSToken, bundled
from pipelines.shared.programs import run_program
from training.patch_basis import PatchBasis
from training.train_dit import Denoising, FixedBatches, encode, main, to_bytes, to_pixels

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def make_basis(channels=13):
    basis = PatchBasis(8, channels)
    basis.fit(make_images(30, 32, 32))
    return basis


def test_patches_are_standardised_and_round_trip(tmp_path):
    images = make_images(30, 32, 32)
    basis = make_basis()
    latents = encode(basis, images)
    assert latents.shape == (30, 13, 4, 4)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-2
    decoded = basis.decode(latents).sample
    # What is decoded lies in the span of the components, so it is a fixed point.
    assert max_error(basis.decode(encode(basis, decoded)).sample, decoded) < 1e-4
    errors = [
        (make_basis(count).decode(encode(make_basis(count), images)).sample - images).square().mean()
        for count in (1, 13, 190)
    ]
    assert errors[0] > errors[1] > errors[2]
    basis.save_pretrained(tmp_path)
    assert torch.equal(encode(PatchBasis.from_pretrained(tmp_path), images), latents)


def test_batches_are_a_function_of_their_number():
    rows = {"latents": torch.arange(50.0)}
    first = [batch["latents"] for batch in itertools.islice(FixedBatches(rows, 8, 0, seed=3, rank=0), 5)]
    later = [batch["latents"] for batch in itertools.islice(FixedBatches(rows, 8, 3, seed=3, rank=0), 2)]
    assert torch.equal(torch.stack(first[3:]), torch.stack(later))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], next(iter(FixedBatches(rows, 8, 0, seed=3, rank=1)))["latents"])


def test_pixels_and_bytes_are_inverses():
    images = (make_images(2, 32, 32).permute(0, 2, 3, 1).numpy() * 127 + 128).astype("uint8")
    assert (to_bytes(to_pixels(images)) == images).all()


def test_the_objective_falls():
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        sample_size=2,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
    )
    module = Denoising(network, DDIMScheduler(prediction_type="v_prediction"))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    batch = {"latents": torch.ones(32, 4, 2, 2), "labels": torch.zeros(32, dtype=torch.long)}
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_dry_run(tmp_path, capsys):
    assert main(["--output_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    assert "max_train_steps: 2500" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_size_is_refused(tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path / "run"), "--tokenizer", bundled("gpstoken-nano")]
    assert run_program(main, arguments) == 2
    assert "--tokenizer must be for 32 x 32 images, got 64" in capsys.readouterr().err


@pytest.mark.slow
def test_the_program_resumes_and_its_pipelines_load(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--train_batch_size", "4", "--num_layers", "1", "--seed", "1"]
    arguments += ["--samples_per_class", "2", "--num_inference_steps", "2", "--lr_warmup_steps", "0"]
    assert main([*arguments, "--max_train_steps", "2"]) == 0
    assert main([*arguments, "--max_train_steps", "4"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"held-out digits", "gpstoken", "grid"}
    assert results["gpstoken"]["floats"] == results["grid"]["floats"] == 13 * 4 * 4
    assert results["held-out digits"]["accuracy"] > 0.98
    for name in ("gpstoken", "grid"):
        assert (tmp_path / name / "checkpoint-4").is_dir()
        with Image.open(tmp_path / f"samples-{name}.png") as sheet:
            assert sheet.height > sheet.width
        pipeline = DiTPipeline.from_pretrained(tmp_path / name / "model")
        assert pipeline.labels["three"] == 3
    assert type(DiTPipeline.from_pretrained(tmp_path / "gpstoken" / "model").vae) is AutoencoderGPSToken
