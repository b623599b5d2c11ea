# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""A tokenizer as the training loop sees it: its options, sizes, data, losses and validation.

Shapes: B images, H and W their sides in pixels, N validation images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor
from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.metrics import psnr
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines.shared.checkpoints import find_checkpoint
from pipelines.shared.outputs import atomic_file
from pipelines.shared.programs import ProgramError, non_negative_float, non_negative_int, positive_float
from pipelines.shared.programs import positive_int as positive
from training.data import (
    CROPS,
    BatchPlan,
    ImageBatches,
    PartitionSettings,
    TokenCounts,
    batch_loader,
    images_at,
    load_image_dataset,
    load_validation_images,
    partitioned_batch,
)
from training.discriminator import PatchDiscriminator
from training.losses import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss, reconstruction_loss
from training.optimization import enable_checkpointing
from training.options import (
    Switch,
    add_dataset_options,
    add_optimizer_options,
    add_program_options,
    add_run_options,
    assignment,
    unit_interval,
)
from training.perceptual import FeatureLoss, PerceptualLoss
from training.streams import ImageStream
from training.task import TrainingTask

# Keeps small gradients above the smallest float16.
FP16_SCALE = 2.0**16


def make_parser(prog: str = "train_tokenizer") -> argparse.ArgumentParser:
    """The parser of the programs that train a tokenizer."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Train a GPSToken tokenizer on any image dataset.", allow_abbrev=False
    )
    add_program_options(parser)
    add_run_options(parser)
    add_dataset_options(parser)
    add_optimizer_options(parser, betas=(0.5, 0.9), learning_rate=5e-5)

    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", help="start from this tokenizer; a bundled one has a name")
    group.add_argument("--preset", help="start from random weights of this configuration preset")
    group.add_argument(
        "--config_overrides", type=assignment, nargs="+", default=[], help="fields of the preset, as key=value"
    )
    group.add_argument(
        "--refinement",
        action=Switch,
        default=True,
        help="learn to move Gaussians; off, an ablation: they stay those of the layout",
    )
    group.add_argument("--channels_last", action=Switch, default=False, help="memory format of images and weights")

    group = parser.add_argument_group("images and tokens")
    group.add_argument("--resolution", type=positive, help="side of the square crops; default: the model's image_size")
    group.add_argument("--resolutions", type=positive, nargs="+", help="draw the side of every batch from these")
    group.add_argument("--resolution_weights", type=non_negative_float, nargs="+", help="one for each resolution")
    group.add_argument(
        "--crop",
        choices=CROPS,
        default="center",
        help="the central square of the shortest side, a random one, or a smaller random one; all are resized",
    )
    group.add_argument("--min_crop_scale", type=unit_interval, default=0.25, help="smallest area of random_resized")
    group.add_argument(
        "--native_crop_prob", type=unit_interval, default=0.0, help="share of images that are cropped without scaling"
    )
    group.add_argument("--random_flip", action=Switch, default=True)
    group.add_argument(
        "--min_tokens", type=positive, help="at --resolution; other sizes scale it with the area; default: the model's"
    )
    group.add_argument("--max_tokens", type=positive, help="the number is log-uniform between the two")
    group.add_argument(
        "--token_counts_per",
        choices=("image", "batch"),
        default="image",
        help="draw a number for every image (padded and masked) or one for the batch (no padding)",
    )

    group = parser.add_argument_group("loss")
    group.add_argument("--l1_weight", type=non_negative_float, default=0.0)
    group.add_argument("--mse_weight", type=non_negative_float, default=1.0)
    group.add_argument("--lpips_weight", type=non_negative_float, default=0.0, help="of the perceptual loss with VGG")
    group.add_argument("--lpips_start_step", type=non_negative_int, default=0)
    group.add_argument("--lpips_weights_file", help="weights of torchvision's vgg16; default: cached or downloaded")
    group.add_argument("--feature_weight", type=non_negative_float, default=0.0, help="of the pooled features")
    group.add_argument("--feature_start_step", type=non_negative_int, default=0)
    group.add_argument(
        "--feature_network",
        default="inception_v3",
        help="a classifier of torchvision, timm/NAME, or efficientnet_lite0 (whose weights are a package)",
    )
    group.add_argument("--feature_weights_file", help="its weights; default: cached or downloaded")
    group.add_argument("--feature_resolution", type=positive, help="side of its images; default: its own")
    group.add_argument(
        "--adversarial_weight",
        type=non_negative_float,
        default=0.0,
        help="times the ratio of gradient norms at the decoder's last layer; the paper has 0.3",
    )
    group.add_argument("--adversarial_start_step", type=non_negative_int, default=0)
    group.add_argument("--discriminator_learning_rate", type=positive_float, help="default: --learning_rate")

    group = parser.add_argument_group("validation")
    group.add_argument("--validation_data_files", nargs="+", help="files of held-out images")
    group.add_argument("--validation_split", help="a held-out split of the training dataset")
    group.add_argument("--num_validation_images", type=positive, default=64, help="the first ones")
    group.add_argument("--validation_tokens", type=positive, nargs="+", help="numbers of tokens; default: the model's")
    group.add_argument(
        "--validation_resolutions",
        type=positive,
        nargs="+",
        help="sides of the images, each with --validation_tokens scaled with the area; default: --resolution",
    )
    group.add_argument("--num_grid_images", type=positive, default=12)
    return parser


class Reconstruction(torch.nn.Module):
    """A tokenizer as accelerate wraps it: batch of `ImageBatches` -> reconstructed images (B, 3, H, W)."""

    def __init__(self, model: GPSTokenModel, channels_last: bool) -> None:
        super().__init__()
        self.model, self.channels_last = model, channels_last
        self.last_input: torch.Tensor | None = None
        model.decoder.conv_out.register_forward_pre_hook(self._note_input)

    def _note_input(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.last_input = inputs[0].detach()

    def last_layer_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient of the weights of the decoder's last layer, for a gradient (B, 3, H, W) of the last forward pass.

        Computed from the input of the layer. The weights themselves may be in shards.
        """
        layer, inputs = self.model.decoder.conv_out, self.last_input
        assert inputs is not None
        # What the map adds at the right and at the bottom is cropped off the image.
        (height, width), (inner_height, inner_width) = gradient.shape[-2:], inputs.shape[-2:]
        gradient = torch.nn.functional.pad(gradient, (0, inner_width - width, 0, inner_height - height))
        shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        return torch.nn.grad.conv2d_weight(inputs.float(), shape, gradient.float(), padding=layer.padding)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Encode and decode."""
        images, mask = batch["pixel_values"], batch["attention_mask"]
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        encoded = self.model.encode(images, layout=GaussianLayout(batch["init_gaussians"], batch["boxes"], mask))
        return self.model.decode(encoded.tokens, image_size=tuple(images.shape[-2:]), attention_mask=mask).sample


class TokenizerTask(TrainingTask):
    """A tokenizer as `run_training` trains it.

    Raises:
        ProgramError: If the data cannot be read, or an image cannot be split into so many tokens.
    """

    name = "train_tokenizer"

    def __init__(self, options: argparse.Namespace, config: GPSTokenConfig, accelerator: Accelerator) -> None:
        self.options, self.config, self.accelerator = options, config, accelerator
        self.sizes = Sizes.of(options, config)
        self.partition = PartitionSettings(
            config.complexity_exponent, config.min_region_size, config.sigma_scale, config.align_corners
        )
        self._check_token_counts()
        self.train_data, validation_data = self._datasets()
        images = {
            side: load_validation_images(validation_data, options.image_column, options.num_validation_images, side)
            for side in {side for side, _ in self.sizes.validation}
        }
        self.validation_batches = [
            partitioned_batch(images[side], count, self.partition) for side, count in self.sizes.validation
        ]
        if options.pretrained_model_name_or_path is not None:
            model = GPSTokenModel.from_pretrained(options.pretrained_model_name_or_path, dtype=torch.float32)
        else:
            model = GPSTokenModel(config)
        if not options.refinement:
            for parameter in model.encoder.gaussian_head.requires_grad_(False).parameters():
                torch.nn.init.zeros_(parameter)
        if options.gradient_checkpointing:
            enable_checkpointing(model)
        if options.channels_last:
            model.to(memory_format=torch.channels_last)
        self.model = model
        self.modules: dict[str, torch.nn.Module] = {"model": Reconstruction(model, options.channels_last)}
        # The frozen networks are no part of `modules`, so that checkpoints do not hold them.
        self.perceptual: PerceptualLoss | None = None
        self.feature: FeatureLoss | None = None
        if options.lpips_weight:
            self.perceptual = PerceptualLoss(options.lpips_weights_file).to(accelerator.device)
        if options.feature_weight:
            self.feature = FeatureLoss(
                options.feature_network, options.feature_weights_file, options.feature_resolution
            ).to(accelerator.device)
        if options.adversarial_weight:
            discriminator = PatchDiscriminator()
            if min(self.sizes.resolutions) < discriminator.min_resolution:
                raise ProgramError(
                    f"--resolutions must be at least {discriminator.min_resolution} with the adversarial loss, "
                    f"got {min(self.sizes.resolutions)}"
                )
            self.modules["discriminator"] = discriminator

    def turn(self, step: int) -> str:
        """From `--adversarial_start_step` on, the discriminator and the model alternate; the discriminator begins."""
        ahead = step - self.options.adversarial_start_step
        return "discriminator" if "discriminator" in self.modules and ahead >= 0 and ahead % 2 == 0 else "model"

    def learning_rate(self, name: str, options: argparse.Namespace) -> float:
        if name == "discriminator" and options.discriminator_learning_rate is not None:
            return options.discriminator_learning_rate
        return options.learning_rate

    def losses(
        self, modules: dict[str, torch.nn.Module], batch: dict[str, torch.Tensor], step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.turn(step) == "discriminator":
            return self._discriminator_losses(modules, batch)
        options, images = self.options, batch["pixel_values"]
        result = modules["model"](batch)
        is_adversarial = "discriminator" in modules and step >= options.adversarial_start_step
        # The gradients of both losses are needed apart, so they end at the reconstruction.
        reconstruction = result.detach().requires_grad_() if is_adversarial else result
        loss = reconstruction_loss(reconstruction, images, options.l1_weight, options.mse_weight)
        values = {"mse": torch.nn.functional.mse_loss(reconstruction.detach().float(), images)}
        with self.accelerator.autocast():
            if self.perceptual is not None and step >= options.lpips_start_step:
                values["lpips"] = self.perceptual(reconstruction, images).float().mean()
                loss = loss + options.lpips_weight * values["lpips"]
            if self.feature is not None and step >= options.feature_start_step:
                values["feature"] = self.feature(reconstruction, images)
                loss = loss + options.feature_weight * values["feature"]
        if is_adversarial:
            # The module without its distributed wrapper: this step has no gradients of it to exchange.
            discriminator = self.modules["discriminator"].requires_grad_(False)
            values["adversarial"] = hinge_generator_loss(discriminator(reconstruction))
            losses = (loss, values["adversarial"])
            scale = FP16_SCALE if self.accelerator.mixed_precision == "fp16" else 1.0
            gradients = [torch.autograd.grad(scale * value, reconstruction)[0] / scale for value in losses]
            weight = values["adversarial_weight"] = self._adversarial_weight(modules["model"], *gradients)
            # Has the value of the sum of the losses, and its gradient.
            surrogate = (result * (gradients[0] + weight * gradients[1])).sum()
            loss = surrogate + (loss + weight * values["adversarial"] - surrogate).detach()
        return loss, {"loss": loss, **values}

    def _adversarial_weight(
        self, module: torch.nn.Module, gradient: torch.Tensor, adversarial_gradient: torch.Tensor
    ) -> torch.Tensor:
        """`--adversarial_weight` times the ratio of gradient norms, of the mean gradients over all processes.

        Args:
            module (`torch.nn.Module`): The model as accelerate has wrapped it, after its forward pass.
            gradient, adversarial_gradient (`torch.Tensor`): Of the two losses for the reconstruction, (B, 3, H, W).
        """
        wrapped = getattr(module, "module", module)
        means = [
            self.accelerator.reduce(wrapped.last_layer_gradient(part), reduction="mean")
            for part in (gradient, adversarial_gradient)
        ]
        return self.options.adversarial_weight * adaptive_weight(*means)

    def _discriminator_losses(
        self, modules: dict[str, torch.nn.Module], batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images = batch["pixel_values"]
        with torch.no_grad():
            reconstruction = modules["model"](batch)
        self.modules["discriminator"].requires_grad_(True)
        # One forward pass for both: a distributed module allows one for each backward pass.
        real, fake = modules["discriminator"](torch.cat([images, reconstruction])).chunk(2)
        loss = hinge_discriminator_loss(real, fake)
        return loss, {"discriminator_loss": loss, "real_logit": real.mean(), "fake_logit": fake.mean()}

    def _check_token_counts(self) -> None:
        """Check that the partition can reach the numbers of tokens."""
        wanted = [(size, self.sizes.token_counts.bounds(size)[1]) for size in self.sizes.resolutions]
        for resolution, count in wanted + self.sizes.validation:
            try:
                partitioned_batch(torch.zeros(1, 3, resolution, resolution), count, self.partition)
            except ValueError as error:
                raise ProgramError(f"{count} tokens at {resolution} x {resolution}: {error}") from error

    def _datasets(self) -> tuple[Any, Any]:
        """Training and validation data. Without validation data, the first images are held out."""
        options = self.options
        self.first_row = 0
        train = load_image_dataset(options)
        if options.validation_data_files is not None:
            return train, load_image_dataset(options, files=options.validation_data_files, split="validation")
        if options.validation_split is not None:
            return train, load_image_dataset(options, split=options.validation_split)
        held_out = options.num_validation_images
        if not hasattr(train, "__len__"):
            rows, rest = ImageStream(train).hold_out(held_out)
            return rest, rows
        if len(train) <= held_out:
            raise ProgramError(
                f"--num_validation_images must be less than the {len(train)} images of the dataset, got {held_out}"
            )
        self.first_row = held_out
        return train.select(range(held_out, len(train))), train.select(range(held_out))

    def describe(self) -> dict[str, Any]:
        return {"model_config": self.config.to_diff_dict()}

    def place_of(self, batch: int) -> dict[str, Any] | None:
        return self.plan.place_of(batch)

    def loader(
        self, first_batch: int, accelerator: Accelerator, place: dict[str, Any] | None = None
    ) -> Iterable[dict[str, Any]]:
        batches, plan = self.batches(first_batch, accelerator, place)
        return batch_loader(batches, plan, self.options.dataloader_num_workers, accelerator.device.type == "cuda")

    def batches(
        self, first_batch: int, accelerator: Accelerator, place: dict[str, Any] | None = None
    ) -> tuple[ImageBatches, BatchPlan]:
        """What the workers do, and in which order."""
        options = self.options
        self.plan = plan = BatchPlan(
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
            place=place,
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
            native_crop_prob=options.native_crop_prob,
            first_row=self.first_row,
        )
        return batches, plan

    def validate(self, step: int, directory: Path) -> dict[str, float]:
        """PSNR at every size and number of tokens. The first one also gets the other distances, and a picture."""
        values = {}
        for index, ((side, count), batch) in enumerate(zip(self.sizes.validation, self.validation_batches)):
            images, reconstruction = batch["pixel_values"], self._reconstruct(batch)
            size = f"{side}px_" if side != self.sizes.resolution else ""
            name = "psnr" if index == 0 else f"psnr_{size}{count}_tokens"
            values[name] = psnr(reconstruction, images).mean().item()
            if index == 0:
                values |= self._perceptual_distances(reconstruction, images)
                shown = self.options.num_grid_images
                path = directory / "images" / f"step-{step:07d}.png"
                save_comparison(images[:shown], reconstruction[:shown], path)
        return values

    def _perceptual_distances(self, reconstruction: torch.Tensor, images: torch.Tensor) -> dict[str, float]:
        """The means over the validation images of the perceptual losses that are in use."""
        totals: dict[str, float] = {}
        size = self.options.train_batch_size
        for pair in zip(reconstruction.split(size), images.split(size)):
            parts = [part.to(self.accelerator.device) for part in pair]
            if self.perceptual is not None:
                totals["lpips"] = totals.get("lpips", 0.0) + self.perceptual(*parts).sum().item()
            if self.feature is not None:
                totals["feature"] = totals.get("feature", 0.0) + self.feature(*parts).item() * len(parts[0])
        return {name: total / len(reconstruction) for name, total in totals.items()}

    def _reconstruct(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = []
        count = images_at(batch["pixel_values"].shape[-1], self.sizes.resolution, self.options.train_batch_size)
        for start in range(0, len(batch["pixel_values"]), count):
            part = {name: value[start : start + count].to(self.accelerator.device) for name, value in batch.items()}
            with self.accelerator.autocast():
                parts.append(self.modules["model"](part).float().clamp(-1, 1).cpu())
        return torch.cat(parts)

    def save(self, directory: Path, dtype: torch.dtype) -> None:
        # The configuration keeps float32, so weights that are stored in 16 bits are loaded in 32.
        state = {name: value.detach().to("cpu", dtype) for name, value in self.model.state_dict().items()}
        self.model.save_pretrained(directory, state_dict=state)
        GPSTokenImageProcessor().save_pretrained(directory)


class Sizes:
    """Resolutions and numbers of tokens of a run.

    Args:
        resolution (`int`): The side that numbers of tokens and the batch size are meant for.
        resolutions (`list[int]`): Sides of the training images.
        weights (`list[float]`): How often each of them is drawn.
        token_counts (`TokenCounts`): Distribution of the number of tokens in training.
        validation (`list[tuple[int, int]]`): Sides and numbers of tokens in validation.
    """

    def __init__(
        self,
        resolution: int,
        resolutions: list[int],
        weights: list[float],
        token_counts: TokenCounts,
        validation: list[tuple[int, int]],
    ) -> None:
        self.resolution, self.resolutions, self.weights = resolution, resolutions, weights
        self.token_counts, self.validation = token_counts, validation

    @classmethod
    def of(cls, options: argparse.Namespace, config: GPSTokenConfig) -> Sizes:
        """From the options and the model's configuration.

        Raises:
            ProgramError: If the options contradict each other.
        """
        resolution = options.resolution or config.image_size
        resolutions = options.resolutions or [resolution]
        weights = options.resolution_weights or [1.0] * len(resolutions)
        if len(weights) != len(resolutions) or not sum(weights) > 0:
            raise ProgramError(
                f"--resolution_weights must hold one weight per resolution, not all 0, got {weights} for {resolutions}"
            )
        low = options.min_tokens or options.max_tokens or config.num_tokens
        high = options.max_tokens or max(low, config.num_tokens)
        if low > high:
            raise ProgramError(f"--min_tokens must not exceed --max_tokens, got {low} and {high}")
        counts = TokenCounts(low, high, resolution, per_image=options.token_counts_per == "image")
        validation = [
            (side, max(1, round(count * (side / resolution) ** 2)))
            for side in options.validation_resolutions or [resolution]
            for count in options.validation_tokens or [config.num_tokens]
        ]
        return cls(resolution, resolutions, weights, counts, validation)


def save_comparison(images: torch.Tensor, reconstructions: torch.Tensor, path: Path) -> None:
    """Write a PNG: rows of images, each with a row of their reconstructions below; both (N, 3, H, W) in [-1, 1]."""
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
    """The configuration of the model to train. Resolves the name of a bundled one in the options.

    Raises:
        ProgramError: If not exactly one of a preset and a pretrained model is given, or an override is unknown.
    """
    if (options.preset is None) == (options.pretrained_model_name_or_path is None):
        raise ProgramError(
            "one of --preset and --pretrained_model_name_or_path must be given, "
            f"got {'neither' if options.preset is None else 'both'}"
        )
    if options.preset is not None:
        overrides = dict(options.config_overrides)
        # A configuration of transformers accepts any attribute, so it would accept a misspelt one.
        if unknown := overrides.keys() - GPSTokenConfig.preset(options.preset).to_dict().keys():
            raise ProgramError(
                f"--config_overrides must be fields of the configuration, got {', '.join(sorted(unknown))}"
            )
        return GPSTokenConfig.preset(options.preset, **overrides)
    if options.config_overrides:
        raise ProgramError(
            "--config_overrides must come with --preset, because a pretrained model keeps its configuration"
        )
    options.pretrained_model_name_or_path = str(
        find_checkpoint(options.pretrained_model_name_or_path, "--pretrained_model_name_or_path")
    )
    return GPSTokenConfig.from_pretrained(options.pretrained_model_name_or_path)
