# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Train a generator on tokens: of layouts, of textures, or of whole tokens at once (the one-stage baseline).

    python -m training.train_sit --stage layout --tokens_dir tokens/ --size S --output_dir runs/layout
    python -m training.train_sit --stage texture --tokens_dir tokens/ --size XL --output_dir runs/texture

The data is what `training.cache_tokens` writes, or a dataset of images that `--tokenizer` encodes on the fly. The
objective is velocity matching on the straight path between noise and data (paper Sec. 3.3). At every validation the
averaged generator draws a sheet of samples, and with `--frechet_network` their distance to held-out data is measured.

Shapes: B images, L tokens, C texture channels, C' channels that the generator models.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.gaussians import NUM_GAUSSIAN_PARAMS
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.transformer_sit import (
    GAUSSIAN_TARGETS,
    SIT_PRESETS,
    TIMESTEP_SCALE,
    SiTTransformer1DModel,
    tokens_to_latents,
)
from pipelines.shared.checkpoints import find_checkpoint
from pipelines.shared.programs import ProgramError, non_negative_float, non_negative_int, one_line, run_program
from pipelines.shared.programs import positive_int as positive
from training.estimates import generator_estimate
from training.generator_samples import GeneratorSamples
from training.loop import run_training
from training.losses import linear_path, velocity_matching_loss
from training.options import (
    Switch,
    add_dataset_options,
    add_optimizer_options,
    add_program_options,
    add_run_options,
    assignment,
    check_run_options,
    describe_options,
    parse_options,
    unit_interval,
)
from training.perceptual import FeatureLoss
from training.task import TrainingTask
from training.token_cache import read_statistics
from training.token_sources import CachedTokens, OnlineTokens, TokenSource

PROGRAM = "training.train_sit"
STAGES = ("layout", "texture", "one-stage")
CONDITION_NOISE_UNITS = ("channel_std", "region", "absolute")


def make_parser() -> argparse.ArgumentParser:
    """The parser of this program."""
    parser = argparse.ArgumentParser(prog="train_sit", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_program_options(parser)
    add_run_options(parser)
    add_optimizer_options(parser, betas=(0.9, 0.999), learning_rate=1e-4)

    add_dataset_options(parser)

    group = parser.add_argument_group("tokens")
    group.add_argument("--tokens_dir", help="output of cache_tokens: a folder or a dataset of the Hub")
    group.add_argument(
        "--tokenizer", help="encodes images on the fly, and decodes samples; default: the one that made the cache"
    )
    group.add_argument("--resolution", type=positive, help="side of the central squares; default: the tokenizer's")
    group.add_argument("--num_tokens", type=positive, help="tokens of an image; default: the tokenizer's")
    group.add_argument("--random_flip", action=Switch, default=True, help="of images that are encoded on the fly")
    group.add_argument(
        "--num_statistics_images", type=positive, default=4096, help="for the channel statistics on the fly"
    )
    group.add_argument(
        "--num_validation_samples",
        type=positive,
        default=256,
        help="held out: the last rows of a cache, the first images of a dataset",
    )

    group = parser.add_argument_group("samples")
    group.add_argument("--num_samples", type=non_negative_int, default=36, help="drawn at every validation; 0: none")
    group.add_argument("--num_sample_steps", type=positive, default=25)
    group.add_argument(
        "--frechet_network", help="measure the Fréchet distance to held-out data with this one; see --feature_network"
    )
    group.add_argument("--frechet_weights_file", help="its weights; default: cached or downloaded")

    group = parser.add_argument_group("model")
    group.add_argument("--stage", choices=STAGES, required=True)
    group.add_argument("--size", choices=sorted(SIT_PRESETS), default="S")
    group.add_argument(
        "--config_overrides", type=assignment, nargs="+", default=[], help="fields of SiTTransformer1DModel, key=value"
    )
    group.add_argument("--pretrained_model_name_or_path", help="start from this generator")
    group.add_argument(
        "--gaussian_target",
        choices=GAUSSIAN_TARGETS,
        help="meaning of the Gaussian channels; default: offset for texture, absolute otherwise",
    )
    group.add_argument("--condition_injection", choices=("input", "every_block"), default="input")
    group.add_argument("--class_dropout_prob", type=unit_interval, default=0.1)

    group = parser.add_argument_group("objective")
    group.add_argument("--timestep_sampling", choices=("uniform", "logit_normal"), default="uniform")
    group.add_argument("--condition_noise", type=non_negative_float, default=0.5, help="of --stage texture")
    group.add_argument(
        "--condition_noise_unit",
        choices=CONDITION_NOISE_UNITS,
        default="channel_std",
        help="unit of --condition_noise: the standard deviation of each channel over the data; the sigma of the token "
        "(for sigma and mu; rho gets no noise); or 1 in normalised coordinates",
    )
    return parser


def noised_condition(
    layout: torch.Tensor, noise: torch.Tensor, amount: float, unit: str, channel_std: torch.Tensor
) -> torch.Tensor:
    """Add Gaussian noise to the condition of the texture model, as in training (paper App. B).

    The paper says "noise of 0.5" and leaves the unit open.

    Args:
        layout (`torch.Tensor`): Initial Gaussians, (B, L, 5).
        noise (`torch.Tensor`): Standard normal, (B, L, 5).
        amount (`float`): Standard deviation of the added noise, in `unit`.
        unit (`str`): "channel_std": the standard deviation of each channel over the data. "region": sigma_x and
            sigma_y of the token, for sigma and mu of that axis; rho is unchanged. "absolute": 1 in normalised
            coordinates.
        channel_std (`torch.Tensor`): (5,).

    Returns:
        `torch.Tensor`: (B, L, 5).

    Raises:
        ValueError: If the unit is unknown.
    """
    if unit == "absolute":
        scale = torch.ones_like(layout)
    elif unit == "channel_std":
        scale = channel_std.expand_as(layout)
    elif unit == "region":
        sigma = layout[..., :2]
        scale = torch.cat([sigma, torch.zeros_like(layout[..., 2:3]), sigma], dim=-1)
    else:
        raise ValueError(f"unit must be one of {CONDITION_NOISE_UNITS}, got {unit!r}")
    return layout + amount * scale * noise


class VelocityMatching(torch.nn.Module):
    """A SiT with its objective: batch of tokens -> loss.

    Args:
        model (`SiTTransformer1DModel`): With the time and the sign of diffusers.
        stage (`str`): One of `STAGES`.
        layout_std (`list[float]`): Standard deviations of the 5 channels of the initial Gaussians over the data.
        options (`argparse.Namespace`): Those of `make_parser`.
    """

    def __init__(
        self, model: SiTTransformer1DModel, stage: str, layout_std: list[float], options: argparse.Namespace
    ) -> None:
        super().__init__()
        self.model, self.stage = model, stage
        self.condition_noise, self.condition_noise_unit = options.condition_noise, options.condition_noise_unit
        self.timestep_sampling = options.timestep_sampling
        for name, values in (
            ("mean", model.config.latents_mean),
            ("std", model.config.latents_std),
            ("layout_std", layout_std),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    def draw(
        self, tokens: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw, for tokens (B, L, 5 + C): sigma (B,), noise of the path (B, L, C') and of the condition (B, L, 5)."""
        channels = self.model.config.in_channels
        kind: dict[str, Any] = {"device": tokens.device, "generator": generator}
        if self.timestep_sampling == "uniform":
            sigma = torch.rand(len(tokens), **kind)
        else:
            sigma = torch.randn(len(tokens), **kind).sigmoid()
        noise = torch.randn(*tokens.shape[:2], channels, **kind)
        return sigma, noise, torch.randn(*tokens.shape[:2], NUM_GAUSSIAN_PARAMS, **kind)

    def loss(
        self, batch: dict[str, torch.Tensor], sigma: torch.Tensor, noise: torch.Tensor, condition_noise: torch.Tensor
    ) -> torch.Tensor:
        """The objective for given draws, a scalar."""
        layout = batch["init_gaussians"]
        target = self.model.config.gaussian_target
        data = tokens_to_latents(
            layout if self.stage == "layout" else batch["tokens"],
            self.mean,
            self.std,
            target,
            layout if target == "offset" else None,
        )
        condition = None
        if self.stage == "texture":
            condition = noised_condition(
                layout, condition_noise, self.condition_noise, self.condition_noise_unit, self.layout_std
            )
        prediction = self.model(
            linear_path(data, noise, sigma),
            sigma * TIMESTEP_SCALE,
            class_labels=batch["labels"],
            encoder_condition=condition,
        ).sample
        return velocity_matching_loss(prediction, data, noise)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The objective for new draws, a scalar."""
        return self.loss(batch, *self.draw(batch["tokens"]))


class SiTTask(TrainingTask):
    """A generator as `run_training` trains it.

    Raises:
        ProgramError: If the pretrained generator does not fit the stage and the data, or no tokenizer can be loaded to
            decode samples.
    """

    name = "train_sit"

    def __init__(self, options: argparse.Namespace, source: TokenSource, accelerator: Accelerator) -> None:
        self.options, self.source, self.accelerator = options, source, accelerator
        self.config = config = resolve_config(options, source.statistics)
        if options.pretrained_model_name_or_path is not None:
            model = SiTTransformer1DModel.from_pretrained(options.pretrained_model_name_or_path)
            _check_pretrained(model, config)
        else:
            model = SiTTransformer1DModel(**config)
        if options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        layout_std = source.statistics["channels"]["layout"]["std"]
        self.module = VelocityMatching(model, options.stage, layout_std, options)
        self.modules = {"model": self.module}
        self.samples = make_samples(options, source, accelerator) if accelerator.is_main_process else None

    def losses(
        self, modules: dict[str, torch.nn.Module], batch: dict[str, torch.Tensor], step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = modules["model"](self.source.tokens_of(batch))
        return loss, {"loss": loss}

    def describe(self) -> dict[str, Any]:
        return {"model_config": self.config}

    def place_of(self, batch: int) -> dict[str, Any] | None:
        return self.source.plan.place_of(batch)

    def loader(
        self, first_batch: int, accelerator: Accelerator, place: dict[str, Any] | None = None
    ) -> Iterable[dict[str, Any]]:
        return self.source.loader(self.options, first_batch, accelerator, place)

    def validate(self, step: int, directory: Path) -> dict[str, float]:
        """The loss on held-out tokens, with the same draws every time; a sheet of samples and their distance."""
        generator = torch.Generator().manual_seed(self.options.seed)
        held_out = self.source.held_out
        draws = self.module.draw(held_out["tokens"], generator)
        total, count = 0.0, 0
        for start in range(0, len(draws[0]), self.options.train_batch_size):
            part = slice(start, start + self.options.train_batch_size)
            batch = {name: value[part].to(self.accelerator.device) for name, value in held_out.items()}
            with self.accelerator.autocast():
                loss = self.module.loss(batch, *(draw[part].to(self.accelerator.device) for draw in draws))
            total += loss.item() * len(batch["labels"])
            count += len(batch["labels"])
        values = {"loss": total / count}
        if self.samples is not None and math.isfinite(values["loss"]):
            picture = directory / "images" / f"step-{step:07d}-samples.png"
            values |= self.samples.evaluate(self.module.model, picture)
        return values

    def save(self, directory: Path, dtype: torch.dtype) -> None:
        model = self.module.model
        # diffusers loads in float32 by default, whatever the storage type.
        (model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)).save_pretrained(directory)


def make_samples(
    options: argparse.Namespace, source: TokenSource, accelerator: Accelerator
) -> GeneratorSamples | None:
    """What draws samples at every validation; None without `--num_samples`.

    Raises:
        ProgramError: If the tokenizer or the network of the Fréchet distance cannot be loaded.
    """
    count = options.num_samples
    if not count:
        return None
    tokenizer, features = None, None
    if options.stage != "layout":
        if isinstance(source, OnlineTokens):
            tokenizer = source.model
        else:
            name = options.tokenizer or source.statistics["tokenizer"]
            try:
                found = find_checkpoint(name, "--tokenizer")
                tokenizer = GPSTokenModel.from_pretrained(found, dtype=torch.float32).to(accelerator.device).eval()
            except (OSError, ValueError) as error:
                raise ProgramError(
                    f"samples need the tokenizer {name}, which cannot be loaded ({one_line(error)}): give --tokenizer "
                    "or --num_samples 0"
                ) from error
        if options.frechet_network is not None:
            features = (
                FeatureLoss(options.frechet_network, options.frechet_weights_file).to(accelerator.device).features
            )
    return GeneratorSamples(
        options.stage,
        {name: value[:count] for name, value in source.held_out.items()},
        options.num_sample_steps,
        options.seed,
        tokenizer,
        source.statistics["resolution"],
        None if source.images is None else source.images[:count],
        features,
    )


def _check_pretrained(model: SiTTransformer1DModel, config: dict[str, Any]) -> None:
    names = ("sample_size", "in_channels", "num_classes", "condition_channels", "gaussian_target")
    differing = [name for name in names if model.config[name] != config[name]]
    if differing:
        raise ProgramError(
            "the pretrained generator must fit the stage and the data: "
            + ", ".join(f"{name} must be {config[name]}, got {model.config[name]}" for name in differing)
        )


def resolve_config(options: argparse.Namespace, statistics: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SiTTransformer1DModel for the stage and the tokens.

    Raises:
        ProgramError: If the stage cannot have the Gaussian target, an override is no argument of the model, or the
            number of classes is unknown.
    """
    target = options.gaussian_target or ("offset" if options.stage == "texture" else "absolute")
    if target == "offset" and options.stage != "texture":
        raise ProgramError(f"--stage must be texture with --gaussian_target offset, got {options.stage}")
    channels = {"absolute": "layout", "logit": "layout_logit"}[target] if options.stage == "layout" else target
    statistic = statistics["channels"][channels]
    names = statistics.get("class_names")
    overrides = dict(options.config_overrides)
    if unknown := overrides.keys() - inspect.signature(SiTTransformer1DModel.__init__).parameters.keys():
        raise ProgramError(f"--config_overrides must be arguments of the model, got {', '.join(sorted(unknown))}")
    if "num_classes" not in overrides and not names:
        raise ProgramError(
            "--config_overrides num_classes=N must be given, because the cached dataset does not name its classes"
        )
    return {
        **SIT_PRESETS[options.size],
        "sample_size": statistics["num_tokens"],
        "in_channels": len(statistic["mean"]),
        "num_classes": len(names or ()),
        "condition_channels": NUM_GAUSSIAN_PARAMS if options.stage == "texture" else None,
        "condition_injection": options.condition_injection,
        "class_dropout_prob": options.class_dropout_prob,
        "learn_sigma": False,
        "gaussian_target": target,
        "latents_mean": statistic["mean"],
        "latents_std": statistic["std"],
        **overrides,
    }


def check_sources(options: argparse.Namespace) -> None:
    """Check that tokens come from one place.

    Raises:
        ProgramError: If there is no place or more than one, or images without a tokenizer.
    """
    images = [options.dataset_name, options.train_data_files, options.train_data_dir]
    given = [options.tokens_dir is not None, any(source is not None for source in images)]
    if sum(given) != 1:
        raise ProgramError(
            "--tokens_dir or a dataset of images must be given, got " + ("both" if all(given) else "neither")
        )
    if given[1] and options.tokenizer is None:
        raise ProgramError("--tokenizer must be given to encode images on the fly, got none")
    if 0 < options.num_samples < 2 or options.num_samples > options.num_validation_samples:
        raise ProgramError(
            f"--num_samples must be 0 or from 2 to --num_validation_samples, {options.num_validation_samples}, "
            f"got {options.num_samples}"
        )


def assumed_statistics(options: argparse.Namespace) -> dict[str, Any]:
    """The shape of the tokens of the m128 preset on ImageNet, for a dry run without data."""
    config = GPSTokenConfig.preset("m128")
    channels = {"layout": 5, "layout_logit": 5}
    return {
        "num_tokens": options.num_tokens or config.num_tokens,
        "class_names": [str(label) for label in range(1000)],
        "channels": {
            name: {"mean": [0.0] * size, "std": [1.0] * size}
            for name in ("layout", "layout_logit", *GAUSSIAN_TARGETS)
            for size in [channels.get(name, config.token_channels)]
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_options(make_parser(), argv)
    check_run_options(options)
    options.num_samples = min(options.num_samples, options.num_validation_samples)
    if options.dry_run:
        cached = options.tokens_dir is not None
        config = resolve_config(
            options, read_statistics(options.tokens_dir)[0] if cached else assumed_statistics(options)
        )
        source = "the cache" if cached else "assumed: tokens of the preset m128, 1000 classes"
        print(
            describe_options(options, model_config=config, tokens=source, estimate=generator_estimate(options, config))
        )
        return 0
    check_sources(options)
    if options.tokens_dir is not None:
        statistics, directory = read_statistics(options.tokens_dir)
        resolve_config(options, statistics)
        options.tokens_dir = str(directory)
        return run_training(options, lambda accelerator: SiTTask(options, CachedTokens(options), accelerator), PROGRAM)
    return run_training(
        options, lambda accelerator: SiTTask(options, OnlineTokens(options, accelerator), accelerator), PROGRAM
    )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
