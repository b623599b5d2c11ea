# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Train a GPSToken tokenizer on any image dataset.

    python -m training.train_tokenizer --config training/presets/nano.yaml --train_data_files images.parquet \\
        --output_dir runs/nano

Images are cropped and partitioned by the loader's workers. With `--min_tokens`/`--max_tokens` every image gets its
own number of tokens and with `--resolutions` every batch its own size, so that one checkpoint serves any of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor
from gpstoken_hf.metrics import psnr
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines.shared.outputs import atomic_file
from pipelines.shared.programs import ProgramError, non_negative_float, run_program
from pipelines.shared.programs import positive_int as positive
from training.data import (
    BatchPlan,
    ImageBatches,
    PartitionSettings,
    TokenCounts,
    batch_loader,
    load_image_dataset,
    load_validation_images,
    partitioned_batch,
)
from training.loop import TrainingTask, run_training
from training.losses import PerceptualLoss, reconstruction_loss
from training.options import (
    add_dataset_options,
    add_optimizer_options,
    add_run_options,
    assignment,
    check_run_options,
    describe_options,
    parse_options,
    unit_interval,
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_tokenizer", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_run_options(parser)
    add_dataset_options(parser)
    add_optimizer_options(parser, betas=(0.5, 0.9), learning_rate=5e-5)

    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", help="go on from this tokenizer")
    group.add_argument("--preset", help="start from random weights of this configuration preset")
    group.add_argument(
        "--config_overrides", type=assignment, nargs="+", default=[], help="fields of the preset, as key=value"
    )
    group.add_argument("--channels_last", action=argparse.BooleanOptionalAction, default=False)

    group = parser.add_argument_group("images and tokens")
    group.add_argument("--resolution", type=positive, help="side of the square crops; default: the model's image_size")
    group.add_argument("--resolutions", type=positive, nargs="+", help="draw each batch's side from these instead")
    group.add_argument("--resolution_weights", type=non_negative_float, nargs="+", help="one per --resolutions")
    group.add_argument(
        "--crop",
        choices=("center", "random", "random_resized"),
        default="center",
        help="squares of the shortest side, or smaller random ones",
    )
    group.add_argument("--min_crop_scale", type=unit_interval, default=0.25, help="smallest area of random_resized")
    group.add_argument("--random_flip", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument(
        "--min_tokens", type=positive, help="at --resolution, scaled with the area; default: the model's"
    )
    group.add_argument("--max_tokens", type=positive, help="likewise")
    group.add_argument(
        "--token_counts_per",
        choices=("image", "batch"),
        default="image",
        help="draw one count for every image (padded and masked) or one for the batch (no padding)",
    )

    group = parser.add_argument_group("loss")
    group.add_argument("--l1_weight", type=non_negative_float, default=0.0)
    group.add_argument("--mse_weight", type=non_negative_float, default=1.0)
    group.add_argument("--lpips_weight", type=non_negative_float, default=0.0, help="needs the VGG weights at hand")

    group = parser.add_argument_group("validation")
    group.add_argument("--validation_data_files", nargs="+", help="parquet files of held-out images")
    group.add_argument("--validation_split", help="a held-out split of the training dataset")
    group.add_argument("--num_validation_images", type=positive, default=64, help="the first ones; else held out")
    group.add_argument("--validation_tokens", type=positive, nargs="+", help="token counts; default: the model's")
    group.add_argument("--num_grid_images", type=positive, default=12)
    return parser


class TokenizerLosses(torch.nn.Module):
    """GPSTokenModel with its objective: batch -> losses, one forward pass for whatever wraps the module."""

    def __init__(self, model: GPSTokenModel, options: argparse.Namespace) -> None:
        super().__init__()
        self.model = model
        self.perceptual = PerceptualLoss() if options.lpips_weight else None
        self.l1_weight, self.mse_weight = options.l1_weight, options.mse_weight
        self.lpips_weight = options.lpips_weight
        self.channels_last = options.channels_last

    def reconstruct(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Batch of `ImageBatches` -> (B, 3, H, W)."""
        images = batch["pixel_values"]
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        encoded = self.model.encode(
            images,
            boxes=batch["boxes"],
            init_gaussians=batch["init_gaussians"],
            attention_mask=batch["attention_mask"],
        )
        return self.model.decode(
            encoded.tokens, image_size=tuple(images.shape[-2:]), attention_mask=batch["attention_mask"]
        ).sample

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        images = batch["pixel_values"]
        reconstruction = self.reconstruct(batch)
        loss = reconstruction_loss(reconstruction, images, self.l1_weight, self.mse_weight)
        values = {"mse": torch.nn.functional.mse_loss(reconstruction.detach().float(), images)}
        if self.perceptual is not None:
            values["lpips"] = self.perceptual(reconstruction, images).mean()
            loss = loss + self.lpips_weight * values["lpips"]
        return {"loss": loss, **values}


class TokenizerTask(TrainingTask):
    """What `run_training` needs to know about training a tokenizer."""

    name = "train_tokenizer"

    def __init__(self, options: argparse.Namespace, config: GPSTokenConfig, accelerator: Accelerator) -> None:
        self.options, self.config, self.accelerator = options, config, accelerator
        settings = Sizes.of(options, config)
        self.sizes = settings
        self.partition = PartitionSettings(config.complexity_exponent, config.min_region_size, config.sigma_scale)
        self._check_token_counts()
        self.train_data, validation_data = self._datasets()
        self.validation_images = load_validation_images(
            validation_data, options.image_column, options.num_validation_images, settings.resolution
        )
        self.validation_batches = [
            partitioned_batch(self.validation_images, count, self.partition) for count in settings.validation_tokens
        ]
        if options.pretrained_model_name_or_path is not None:
            model = GPSTokenModel.from_pretrained(options.pretrained_model_name_or_path, dtype=torch.float32)
        else:
            model = GPSTokenModel(config)
        if options.gradient_checkpointing:
            # The name since transformers 5.1, or the one before.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if options.channels_last:
            model.to(memory_format=torch.channels_last)
        self.module = TokenizerLosses(model, options)

    def _check_token_counts(self) -> None:
        """Refuse counts that the partition cannot reach, before anything is trained."""
        wanted = [(size, self.sizes.token_counts.bounds(size)[1]) for size in self.sizes.resolutions]
        wanted += [(self.sizes.resolution, count) for count in self.sizes.validation_tokens]
        for resolution, count in wanted:
            try:
                partitioned_batch(torch.zeros(1, 3, resolution, resolution), count, self.partition)
            except ValueError as error:
                raise ProgramError(f"{count} tokens at {resolution} x {resolution}: {error}") from error

    def _datasets(self) -> tuple[Any, Any]:
        """Training and validation data; without a validation set, the first images are held out."""
        options = self.options
        train = load_image_dataset(options)
        if options.validation_data_files is not None:
            return train, load_image_dataset(options, files=options.validation_data_files, split="validation")
        if options.validation_split is not None:
            return train, load_image_dataset(options, split=options.validation_split)
        held_out = options.num_validation_images
        if not hasattr(train, "__len__"):
            return train.skip(held_out), train.take(held_out)
        if len(train) <= held_out:
            raise ProgramError(f"{held_out} images are to be held out for validation, the dataset has {len(train)}")
        return train.select(range(held_out, len(train))), train.select(range(held_out))

    def describe(self) -> dict[str, Any]:
        return {"model_config": self.config.to_diff_dict()}

    def loader(self, first_batch: int, accelerator: Accelerator) -> Iterable[dict[str, torch.Tensor]]:
        options = self.options
        plan = BatchPlan(
            self.train_data,
            seed=options.seed,
            resolutions=self.sizes.resolutions,
            weights=self.sizes.weights,
            base_resolution=self.sizes.resolution,
            batch_size=options.train_batch_size,
            first_batch=first_batch,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            shuffle_buffer_size=options.shuffle_buffer_size,
        )
        batches = ImageBatches(
            None if plan.is_stream else self.train_data,
            image_column=options.image_column,
            seed=options.seed,
            crop=options.crop,
            min_crop_scale=options.min_crop_scale,
            flip="random" if options.random_flip else "never",
            token_counts=self.sizes.token_counts,
            partition=self.partition,
        )
        return batch_loader(batches, plan, options.dataloader_num_workers, accelerator.device.type == "cuda")

    def validate(self, step: int, directory: Path) -> dict[str, float]:
        values = {}
        for index, (count, batch) in enumerate(zip(self.sizes.validation_tokens, self.validation_batches)):
            reconstruction = self._reconstruct(batch)
            name = "psnr" if index == 0 else f"psnr_{count}_tokens"
            values[name] = psnr(reconstruction, self.validation_images).mean().item()
            if index == 0:
                shown = self.options.num_grid_images
                save_comparison(
                    self.validation_images[:shown],
                    reconstruction[:shown],
                    directory / "images" / f"step-{step:07d}.png",
                )
        return values

    def _reconstruct(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = []
        for start in range(0, len(batch["pixel_values"]), self.options.train_batch_size):
            part = {
                name: value[start : start + self.options.train_batch_size].to(self.accelerator.device)
                for name, value in batch.items()
            }
            with self.accelerator.autocast():
                parts.append(self.module.reconstruct(part).float().clamp(-1, 1).cpu())
        return torch.cat(parts)

    def save(self, directory: Path, dtype: torch.dtype) -> None:
        model = self.module.model
        # The configuration goes on saying float32, so what is stored in 16 bits is loaded and used in 32.
        state = {name: value.detach().to("cpu", dtype) for name, value in model.state_dict().items()}
        model.save_pretrained(directory, state_dict=state)
        GPSTokenImageProcessor().save_pretrained(directory)


class Sizes:
    """Resolutions and token counts of a run, from the options and the model's configuration."""

    def __init__(
        self,
        resolution: int,
        resolutions: list[int],
        weights: list[float],
        token_counts: TokenCounts,
        validation_tokens: list[int],
    ) -> None:
        self.resolution, self.resolutions, self.weights = resolution, resolutions, weights
        self.token_counts, self.validation_tokens = token_counts, validation_tokens

    @classmethod
    def of(cls, options: argparse.Namespace, config: GPSTokenConfig) -> Sizes:
        """Raises ProgramError where the options contradict each other."""
        resolution = options.resolution or config.image_size
        resolutions = options.resolutions or [resolution]
        weights = options.resolution_weights or [1.0] * len(resolutions)
        if len(weights) != len(resolutions) or not sum(weights) > 0:
            raise ProgramError(
                f"--resolution_weights must give one weight per resolution, not all 0; got {weights} for {resolutions}"
            )
        low = options.min_tokens or options.max_tokens or config.num_tokens
        high = options.max_tokens or max(low, config.num_tokens)
        if low > high:
            raise ProgramError(f"--min_tokens must not exceed --max_tokens, got {low} and {high}")
        counts = TokenCounts(low, high, resolution, per_image=options.token_counts_per == "image")
        return cls(resolution, resolutions, weights, counts, options.validation_tokens or [config.num_tokens])


def save_comparison(images: torch.Tensor, reconstructions: torch.Tensor, path: Path) -> None:
    """A PNG with originals in the odd rows and their reconstructions below them; both (N, 3, H, W) in [-1, 1]."""
    columns = min(6, len(images))
    rows = []
    for start in range(0, len(images), columns):
        for part in (images[start : start + columns], reconstructions[start : start + columns]):
            missing = columns - len(part)
            row = torch.cat([part, part.new_ones(missing, *part.shape[1:])])
            rows.append(torch.cat(list(row), dim=-1))
    pixels = ((torch.cat(rows, dim=-2).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    with atomic_file(path) as staging:
        Image.fromarray(np.ascontiguousarray(pixels)).save(staging)


def resolve_config(options: argparse.Namespace) -> GPSTokenConfig:
    """The configuration of the model to train.

    Raises:
        ProgramError: neither or both of a preset and a pretrained model are given.
    """
    if (options.preset is None) == (options.pretrained_model_name_or_path is None):
        raise ProgramError("give one of --preset and --pretrained_model_name_or_path")
    if options.preset is not None:
        overrides = dict(options.config_overrides)
        # A configuration of transformers takes any further attribute, so a misspelt one would go unnoticed.
        if unknown := overrides.keys() - GPSTokenConfig.preset(options.preset).to_dict().keys():
            raise ProgramError(
                f"--config_overrides: no such fields of the configuration: {', '.join(sorted(unknown))}"
            )
        return GPSTokenConfig.preset(options.preset, **overrides)
    if options.config_overrides:
        raise ProgramError("--config_overrides go with --preset; a pretrained model keeps its configuration")
    return GPSTokenConfig.from_pretrained(options.pretrained_model_name_or_path)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(make_parser(), argv)
    check_run_options(options)
    config = resolve_config(options)
    Sizes.of(options, config)
    if options.dry_run:
        print(describe_options(options, model_config=config.to_diff_dict()), end="")
        return 0
    return run_training(options, lambda accelerator: TokenizerTask(options, config, accelerator))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
