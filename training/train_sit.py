# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Train a generator on cached tokens: of layouts, of textures, or of whole tokens at once (the one-stage baseline).

    python -m training.train_sit --stage layout --tokens_dir tokens/ --size S --output_dir runs/layout
    python -m training.train_sit --stage texture --tokens_dir tokens/ --size XL --output_dir runs/texture

The data is what `training.cache_tokens` writes. The objective is velocity matching on the straight path between noise
and data (paper Sec. 3.3).

Shapes: B images, L tokens, C texture channels, C' channels that the generator models.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from gpstoken_hf.gaussians import NUM_GAUSSIAN_PARAMS
from gpstoken_hf.transformer_sit import (
    GAUSSIAN_TARGETS,
    SIT_PRESETS,
    TIMESTEP_SCALE,
    SiTTransformer1DModel,
    tokens_to_latents,
)
from pipelines.shared.programs import ProgramError, non_negative_float, run_program
from pipelines.shared.programs import positive_int as positive
from training.data import BatchPlan, BatchRequest, batch_loader
from training.loop import TrainingTask, run_training
from training.losses import linear_path, velocity_matching_loss
from training.options import (
    add_optimizer_options,
    add_program_options,
    add_run_options,
    assignment,
    check_run_options,
    describe_options,
    parse_options,
    unit_interval,
)
from training.token_cache import load_token_dataset, read_statistics

PROGRAM = "training.train_sit"
STAGES = ("layout", "texture", "one-stage")
CONDITION_NOISE_UNITS = ("channel_std", "region", "absolute")


def make_parser() -> argparse.ArgumentParser:
    """The parser of this program."""
    parser = argparse.ArgumentParser(prog="train_sit", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_program_options(parser)
    add_run_options(parser)
    add_optimizer_options(parser, betas=(0.9, 0.999), learning_rate=1e-4)

    group = parser.add_argument_group("data")
    group.add_argument("--tokens_dir", required=True, help="output of cache_tokens: a folder or a dataset of the Hub")
    group.add_argument("--max_train_samples", type=positive)
    group.add_argument("--num_validation_samples", type=positive, default=256, help="the last rows are held out")

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


class TokenBatches(Dataset):
    """`batches[request]`: tokens (B, L, 5 + C), init_gaussians (B, L, 5) and labels (B,) of the requested rows."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getitem__(self, request: BatchRequest) -> dict[str, torch.Tensor]:
        batch = self.rows[request.rows]
        return {
            "tokens": torch.from_numpy(np.ascontiguousarray(batch["tokens"], dtype=np.float32)),
            "init_gaussians": torch.from_numpy(np.ascontiguousarray(batch["init_gaussians"], dtype=np.float32)),
            "labels": torch.from_numpy(np.ascontiguousarray(batch["label"], dtype=np.int64)),
        }


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
        ProgramError: If there are too few samples, or the pretrained generator does not fit the stage and the data.
    """

    name = "train_sit"

    def __init__(
        self, options: argparse.Namespace, statistics: dict[str, Any], config: dict[str, Any], accelerator: Accelerator
    ) -> None:
        self.options, self.config, self.accelerator = options, config, accelerator
        rows = load_token_dataset(options.tokens_dir)
        held_out = options.num_validation_samples
        if len(rows) <= held_out:
            raise ProgramError(f"--num_validation_samples must be less than {len(rows)}, got {held_out}")
        validation = rows.select(range(len(rows) - held_out, len(rows)))
        num_train = min(len(rows) - held_out, options.max_train_samples or len(rows))
        self.train_data = rows.select(range(num_train))
        self.validation_batch = TokenBatches(validation)[BatchRequest(0, 0, 1, [], list(range(held_out)))]
        if options.pretrained_model_name_or_path is not None:
            model = SiTTransformer1DModel.from_pretrained(options.pretrained_model_name_or_path)
            _check_pretrained(model, config)
        else:
            model = SiTTransformer1DModel(**config)
        if options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.module = VelocityMatching(model, options.stage, statistics["channels"]["layout"]["std"], options)
        self.modules = {"model": self.module}

    def losses(
        self, modules: dict[str, torch.nn.Module], batch: dict[str, torch.Tensor], step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = modules["model"](batch)
        return loss, {"loss": loss}

    def describe(self) -> dict[str, Any]:
        return {"model_config": self.config}

    def loader(self, first_batch: int, accelerator: Accelerator) -> Iterable[dict[str, torch.Tensor]]:
        plan = BatchPlan(
            self.train_data,
            seed=self.options.seed,
            resolutions=[1],
            weights=[1.0],
            base_resolution=1,
            batch_size=self.options.train_batch_size,
            first_batch=first_batch,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        return batch_loader(
            TokenBatches(self.train_data),
            plan,
            self.options.dataloader_num_workers,
            accelerator.device.type == "cuda",
        )

    def validate(self, step: int, directory: Path) -> dict[str, float]:
        """The loss on held-out tokens, with the same draws every time."""
        generator = torch.Generator().manual_seed(self.options.seed)
        draws = self.module.draw(self.validation_batch["tokens"], generator)
        total, count = 0.0, 0
        for start in range(0, len(draws[0]), self.options.train_batch_size):
            part = slice(start, start + self.options.train_batch_size)
            batch = {name: value[part].to(self.accelerator.device) for name, value in self.validation_batch.items()}
            with self.accelerator.autocast():
                loss = self.module.loss(batch, *(draw[part].to(self.accelerator.device) for draw in draws))
            total += loss.item() * len(batch["labels"])
            count += len(batch["labels"])
        return {"loss": total / count}

    def save(self, directory: Path, dtype: torch.dtype) -> None:
        model = self.module.model
        # diffusers loads in float32 by default, whatever the storage type.
        (model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)).save_pretrained(directory)


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
        raise ProgramError(f"--gaussian_target offset needs --stage texture, got --stage {options.stage}")
    channels = {"absolute": "layout", "logit": "layout_logit"}[target] if options.stage == "layout" else target
    statistic = statistics["channels"][channels]
    names = statistics.get("class_names")
    overrides = dict(options.config_overrides)
    if unknown := overrides.keys() - inspect.signature(SiTTransformer1DModel.__init__).parameters.keys():
        raise ProgramError(f"--config_overrides: no such arguments of the model: {', '.join(sorted(unknown))}")
    if "num_classes" not in overrides and not names:
        raise ProgramError("the cached dataset does not name its classes: give --config_overrides num_classes=N")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_options(make_parser(), argv)
    check_run_options(options)
    statistics, options.tokens_dir = read_statistics(options.tokens_dir)
    config = resolve_config(options, statistics)
    if options.dry_run:
        print(describe_options(options, model_config=config), end="")
        return 0
    return run_training(options, lambda accelerator: SiTTask(options, statistics, config, accelerator), PROGRAM)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
