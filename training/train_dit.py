# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Train diffusers' DiT on digits through the latents of AutoencoderGPSToken, and sample it with DiTPipeline.

    python -m training.train_dit --output_dir runs/dit

`<output_dir>/gpstoken/model` is a DiTPipeline whose vae is an AutoencoderGPSToken. `<output_dir>/grid/model` is the
baseline: the same network and training on a grid of patches, with as many numbers (see `training.patch_basis`). Both
are loaded again, sampled and judged by the classifier of `training.digits`. The same command resumes a run.

Shapes: N images, B batch, F channels of a latent, h x w cells.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from tqdm.auto import tqdm

from gpstoken_hf import AutoencoderGPSToken, bundled
from gpstoken_hf.metrics import psnr
from pipelines.shared.outputs import atomic_file
from pipelines.shared.programs import ProgramError, non_negative_float, run_program
from pipelines.shared.programs import positive_int as positive
from training.digits import (
    CLASS_NAMES,
    IMAGE_SIZE,
    NUM_CLASSES,
    evaluate,
    fit_classifier,
    save_sheet,
    split_digits,
)
from training.loop import TrainingTask, run_training
from training.options import (
    add_optimizer_options,
    add_program_options,
    add_run_options,
    describe_options,
    parse_options,
)
from training.patch_basis import PatchBasis
from training.run_folder import claimed_folder

PROGRAM = "training.train_dit"
LATENTS = ("gpstoken", "grid")
OUTPUTS = ("results.json", "samples-*.png")
# DiTPipeline takes this class for the unconditional one.
NULL_CLASS = 1000


def make_parser() -> argparse.ArgumentParser:
    """The parser of this program."""
    parser = argparse.ArgumentParser(prog="train_dit", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_program_options(parser)
    add_run_options(parser)
    add_optimizer_options(parser, betas=(0.9, 0.999), learning_rate=2e-3)

    group = parser.add_argument_group("latents")
    group.add_argument("--tokenizer", help="an AutoencoderGPSToken or GPSTokenModel; default: that of gpstoken-digits")

    group = parser.add_argument_group("model")
    group.add_argument("--num_layers", type=positive, default=6)
    group.add_argument("--num_attention_heads", type=positive, default=4)
    group.add_argument("--attention_head_dim", type=positive, default=24)

    group = parser.add_argument_group("evaluation")
    group.add_argument("--samples_per_class", type=positive, default=50)
    group.add_argument("--num_inference_steps", type=positive, default=50)
    group.add_argument("--guidance_scale", type=non_negative_float, default=1.5)

    parser.set_defaults(
        max_train_steps=2500,
        train_batch_size=96,
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        adam_weight_decay=0.01,
        ema_decay=0.995,
        checkpointing_steps=250,
        checkpoints_total_limit=1,
        logging_steps=25,
        report_to="none",
    )
    return parser


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, 32, 32, 3) -> (N, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """(N, 3, 32, 32) in [-1, 1] -> uint8 (N, 32, 32, 3)."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Latents (N, F, h, w) of images (N, 3, H, W), scaled as pipelines scale them."""
    latents = [vae.encode(part).latent_dist.mode() for part in pixels.split(120)]
    return torch.cat(latents) * vae.config.scaling_factor


class FixedBatches(Iterable[dict[str, torch.Tensor]]):
    """Endless batches of tensors in memory. Batch n is a function of the seed, n and the process."""

    def __init__(self, tensors: dict[str, torch.Tensor], size: int, first: int, seed: int, rank: int) -> None:
        self.tensors, self.size, self.first, self.seed, self.rank = tensors, size, first, seed, rank

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        count, number = len(next(iter(self.tensors.values()))), self.first
        while True:
            rows = np.random.default_rng([self.seed, self.rank, number]).integers(0, count, self.size)
            yield {name: tensor[torch.from_numpy(rows)] for name, tensor in self.tensors.items()}
            number += 1


# --------------------------------------------------------------------------------------------------------- generator


class Denoising(torch.nn.Module):
    """A DiT with its objective: the squared error of the predicted velocity at random times."""

    def __init__(self, model: DiTTransformer2DModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.model, self.scheduler = model, scheduler

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The objective on `latents` (B, F, h, w) and `labels` (B,), a scalar."""
        latents = batch["latents"]
        noise = torch.randn_like(latents)
        times = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noised = self.scheduler.add_noise(latents, noise, times)
        predicted = self.model(noised, timestep=times, class_labels=batch["labels"]).sample
        return (predicted - self.scheduler.get_velocity(latents, noise, times)).square().mean()


class GeneratorTask(TrainingTask):
    """A DiT on the latents of any autoencoder with the interface of AutoencoderKL, as `run_training` trains it."""

    name = "train_dit"

    def __init__(self, options: argparse.Namespace, vae: Any, data: dict[str, torch.Tensor]) -> None:
        self.options, self.vae = options, vae
        self.train_data, self.test_data = (
            {"latents": encode(vae, data[part]), "labels": data[f"{part}_labels"]} for part in ("train", "test")
        )
        channels, side = self.train_data["latents"].shape[1:3]
        self.scheduler = DDIMScheduler(
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
        )
        self.model = DiTTransformer2DModel(
            sample_size=side,
            patch_size=1,
            in_channels=channels,
            out_channels=channels,
            num_layers=options.num_layers,
            num_attention_heads=options.num_attention_heads,
            attention_head_dim=options.attention_head_dim,
            num_embeds_ada_norm=NULL_CLASS,
        )
        if options.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.modules = {"model": Denoising(self.model, self.scheduler)}

    def loader(
        self, first_batch: int, accelerator: Accelerator, place: dict[str, Any] | None = None
    ) -> Iterable[dict[str, torch.Tensor]]:
        options = self.options
        return FixedBatches(
            self.train_data, options.train_batch_size, first_batch, options.seed, accelerator.process_index
        )

    def losses(
        self, modules: dict[str, torch.nn.Module], batch: dict[str, torch.Tensor], step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = modules["model"](batch)
        return loss, {"loss": loss}

    def validate(self, step: int, directory: Path) -> dict[str, float]:
        """The loss on held-out digits, with the same draws every time."""
        device = self.model.device
        with torch.random.fork_rng():
            torch.manual_seed(self.options.seed)
            batch = {name: value.to(device) for name, value in self.test_data.items()}
            return {"loss": self.modules["model"](batch).item()}

    def describe(self) -> dict[str, Any]:
        return {"parameters": sum(parameter.numel() for parameter in self.model.parameters())}

    def save(self, directory: Path, dtype: torch.dtype) -> None:
        model = self.model if dtype == torch.float32 else copy.deepcopy(self.model).to(dtype)
        pipeline = DiTPipeline(model, self.vae, self.scheduler)
        # Its constructor takes the names but does not record them; loading reads them from model_index.json.
        pipeline.register_to_config(id2label={str(digit): name for digit, name in enumerate(CLASS_NAMES)})
        pipeline.save_pretrained(directory)


# -------------------------------------------------------------------------------------------------------- evaluation


def sample(folder: Path, options: argparse.Namespace, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Samples of a saved DiTPipeline, class by class: uint8 images (N, 32, 32, 3) and their labels (N,)."""
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for label in tqdm(range(NUM_CLASSES), desc=f"sampling {name}", unit="class", mininterval=5):
        batch = pipeline(
            [label] * options.samples_per_class,
            guidance_scale=options.guidance_scale,
            num_inference_steps=options.num_inference_steps,
            generator=torch.Generator().manual_seed(options.seed * 1000 + label),
        ).images
        images += [np.asarray(image) for image in batch]
    return np.stack(images), np.repeat(np.arange(NUM_CLASSES), options.samples_per_class)


def measure(options: argparse.Namespace, data: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Sample both pipelines, write their sample sheets, and judge samples and reconstructions."""
    train_images, train_labels = data["train"]
    test_images, test_labels = data["test"]
    classifier = fit_classifier(train_images, train_labels)
    results: dict[str, Any] = {"held-out digits": evaluate(classifier, test_images, test_labels, train_images)}
    for name in LATENTS:
        folder = options.output_dir / name / "model"
        vae = DiTPipeline.from_pretrained(folder).vae
        pixels = to_pixels(test_images)
        with torch.no_grad():
            decoded = vae.decode(encode(vae, pixels) / vae.config.scaling_factor).sample
        images, labels = sample(folder, options, name)
        results[name] = {
            **evaluate(classifier, images, labels, train_images),
            "reconstruction_psnr": psnr(decoded.clamp(-1, 1), pixels).mean().item(),
            "floats": int(encode(vae, pixels[:1]).numel()),
        }
        save_sheet(images, options.samples_per_class, options.output_dir / f"samples-{name}.png")
    with atomic_file(options.output_dir / "results.json") as staging:
        staging.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


# -------------------------------------------------------------------------------------------------------------- main


def load_tokenizer(options: argparse.Namespace, pixels: torch.Tensor) -> AutoencoderGPSToken:
    """The autoencoder of `--tokenizer`, with the statistics of its latents over the training digits."""
    place = {"subfolder": "vae"} if options.tokenizer is None else {}
    vae = AutoencoderGPSToken.from_pretrained(options.tokenizer or bundled("gpstoken-digits"), **place)
    if vae.config.image_size != IMAGE_SIZE:
        raise ProgramError(f"--tokenizer must be for {IMAGE_SIZE} x {IMAGE_SIZE} images, got {vae.config.image_size}")
    vae.measure_statistics(pixels.split(120))
    return vae


def stage_options(options: argparse.Namespace, name: str, **changes: Any) -> argparse.Namespace:
    """The options of one training of this program."""
    return argparse.Namespace(**{**vars(options), "output_dir": options.output_dir / name, **changes})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_options(make_parser(), argv)
    if options.dry_run:
        print(describe_options(options), end="")
        return 0
    arrays = split_digits(options.seed)
    data = {name: to_pixels(images) for name, (images, _) in arrays.items()}
    data |= {f"{name}_labels": torch.from_numpy(labels).long() for name, (_, labels) in arrays.items()}
    with claimed_folder(options.output_dir, PROGRAM, OUTPUTS):
        vae = load_tokenizer(options, data["train"])
        stage = stage_options(options, "gpstoken")
        if code := run_training(stage, lambda _: GeneratorTask(stage, vae, data), PROGRAM):
            return code
        baseline = stage_options(options, "grid", push_to_hub=False)
        basis = PatchBasis(vae.spatial_compression_ratio, vae.config.latent_channels)
        basis.fit(data["train"])
        if code := run_training(baseline, lambda _: GeneratorTask(baseline, basis, data), PROGRAM):
            return code
        results = measure(options, arrays)
    for name, values in results.items():
        print(
            f"{name}: {100 * values['accuracy']:.1f} % recognised, distance to the nearest training image "
            f"{values['nearest_distance_median']:.1f} (median), {values['nearest_distance_min']:.1f} (minimum)"
        )
    print(f"pipelines and sample sheets in {options.output_dir}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
