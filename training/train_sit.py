# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Train a generator on cached tokens: of layouts, of textures, or of whole tokens at once (the one-stage baseline).

    python -m training.train_sit --stage layout --tokens_dir tokens/ --size S --output_dir runs/layout
    python -m training.train_sit --stage texture --tokens_dir tokens/ --size XL --output_dir runs/texture

The data is what `training.cache_tokens` writes. The objective is velocity matching on the straight path between noise
and data (paper Sec. 3.3).
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
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
from training.cache_tokens import STATISTICS
from training.data import BatchPlan, BatchRequest, batch_loader
from training.loop import TrainingTask, run_training
from training.losses import linear_path, velocity_matching_loss
from training.options import (
    add_optimizer_options,
    add_run_options,
    assignment,
    check_run_options,
    describe_options,
    parse_options,
    unit_interval,
)

STAGES = ("layout", "texture", "one-stage")
CONDITION_NOISE_UNITS = ("channel_std", "region", "absolute")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_sit", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_run_options(parser)
    add_optimizer_options(parser, betas=(0.9, 0.999), learning_rate=1e-4)

    group = parser.add_argument_group("data")
    group.add_argument("--tokens_dir", required=True, help="what cache_tokens wrote: a folder or a dataset of the Hub")
    group.add_argument("--max_train_samples", type=positive)
    group.add_argument("--num_validation_samples", type=positive, default=256, help="the last rows, held out")

    group = parser.add_argument_group("model")
    group.add_argument("--stage", choices=STAGES, required=True)
    group.add_argument("--size", choices=sorted(SIT_PRESETS), default="S")
    group.add_argument(
        "--config_overrides", type=assignment, nargs="+", default=[], help="fields of SiTTransformer1DModel, key=value"
    )
    group.add_argument("--pretrained_model_name_or_path", help="go on from this generator")
    group.add_argument(
        "--gaussian_target",
        choices=GAUSSIAN_TARGETS,
        help="what the Gaussian channels are; default: offset for texture, absolute otherwise",
    )
    group.add_argument("--condition_injection", choices=("input", "every_block"), default="input")
    group.add_argument("--class_dropout_prob", type=unit_interval, default=0.1)

    group = parser.add_argument_group("objective")
    group.add_argument("--timestep_sampling", choices=("uniform", "logit_normal"), default="uniform")
    group.add_argument("--condition_noise", type=non_negative_float, default=0.5, help="for --stage texture")
    group.add_argument(
        "--condition_noise_unit",
        choices=CONDITION_NOISE_UNITS,
        default="channel_std",
        help="of --condition_noise: each channel's standard deviation over the data; the token's own sigma (for sigma "
        "and mu, none for rho); or normalized units as they are",
    )
    return parser


def noised_condition(
    layout: torch.Tensor, noise: torch.Tensor, amount: float, unit: str, channel_std: torch.Tensor
) -> torch.Tensor:
    """The condition of the texture model with Gaussian noise, as in training (paper App. B).

    The paper says "noise of 0.5" and leaves the unit open.

    Args:
        layout: initial Gaussians (B, L, 5).
        noise: standard normal, (B, L, 5).
        amount: standard deviation of what is added, in units of
        unit: "channel_std": the channels' standard deviations over the data; "region": the token's own sigma_x and
            sigma_y, for sigma and mu of that axis, rho unchanged; "absolute": 1 in normalized coordinates.
        channel_std: (5,).

    Raises:
        ValueError: an unknown unit.
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
    """A SiT with its objective: batch of tokens -> losses.

    Args:
        model: speaks diffusers' time and sign.
        stage: one of `STAGES`.
        layout_std: (5,), of the initial Gaussians over the data.
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
        """For tokens (B, L, 5 + C): sigma (B,), the path's noise (B, L, C') and the condition's (B, L, 5)."""
        channels = self.model.config.in_channels
        kind: dict[str, Any] = {"device": tokens.device, "generator": generator}
        if self.timestep_sampling == "uniform":
            sigma = torch.rand(len(tokens), **kind)
        else:
            sigma = torch.randn(len(tokens), **kind).sigmoid()
        noise = torch.randn(*tokens.shape[:2], channels, **kind)
        return sigma, noise, torch.randn(*tokens.shape[:2], NUM_GAUSSIAN_PARAMS, **kind)

    def losses(
        self, batch: dict[str, torch.Tensor], sigma: torch.Tensor, noise: torch.Tensor, condition_noise: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The objective for given draws."""
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
        return {"loss": velocity_matching_loss(prediction, data, noise)}

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.losses(batch, *self.draw(batch["tokens"]))


class SiTTask(TrainingTask):
    """What `run_training` needs to know about training a generator."""

    name = "train_sit"

    def __init__(
        self, options: argparse.Namespace, statistics: dict[str, Any], config: dict[str, Any], accelerator: Accelerator
    ) -> None:
        self.options, self.config, self.accelerator = options, config, accelerator
        rows = load_token_dataset(Path(options.tokens_dir))
        held_out = options.num_validation_samples
        if len(rows) <= held_out:
            raise ProgramError(f"{held_out} samples are to be held out for validation, there are {len(rows)}")
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
        module: VelocityMatching = self.module
        generator = torch.Generator().manual_seed(self.options.seed)
        draws = module.draw(self.validation_batch["tokens"], generator)
        total, count = 0.0, 0
        for start in range(0, len(draws[0]), self.options.train_batch_size):
            part = slice(start, start + self.options.train_batch_size)
            batch = {name: value[part].to(self.accelerator.device) for name, value in self.validation_batch.items()}
            with self.accelerator.autocast():
                values = module.losses(batch, *(draw[part].to(self.accelerator.device) for draw in draws))
            total += values["loss"].item() * len(batch["labels"])
            count += len(batch["labels"])
        return {"loss": total / count}

    def save(self, directory: Path, dtype: torch.dtype) -> None:
        model = self.module.model
        # diffusers loads in float32 unless told otherwise, whatever the weights are stored in.
        (model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)).save_pretrained(directory)


def _check_pretrained(model: SiTTransformer1DModel, config: dict[str, Any]) -> None:
    names = ("sample_size", "in_channels", "num_classes", "condition_channels", "gaussian_target")
    differing = [name for name in names if model.config[name] != config[name]]
    if differing:
        raise ProgramError(
            "the pretrained generator does not fit this stage and data: "
            + ", ".join(f"{name} {model.config[name]} there, {config[name]} here" for name in differing)
        )


def load_token_dataset(directory: Path) -> Any:
    """The rows that cache_tokens wrote, as NumPy arrays, memory-mapped."""
    import datasets

    files = sorted(map(str, (directory / "data").glob("train-*.parquet")))
    return datasets.load_dataset("parquet", data_files=files, split="train").with_format("numpy")


def read_statistics(tokens_dir: str) -> tuple[dict[str, Any], str]:
    """What cache_tokens says about its tokens, and the local folder they are in.

    Raises:
        ProgramError: there is no finished token cache at that place.
    """
    directory = Path(tokens_dir)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            directory = Path(snapshot_download(tokens_dir, repo_type="dataset"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise ProgramError(f"{tokens_dir} is neither a folder nor a dataset of the Hub: {error}") from error
    path = directory / STATISTICS
    if not path.is_file():
        raise ProgramError(f"{directory} holds no finished token cache ({STATISTICS} is missing): run cache_tokens")
    return json.loads(path.read_text(encoding="utf-8")), str(directory)


def resolve_config(options: argparse.Namespace, statistics: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SiTTransformer1DModel for this stage and these tokens.

    Raises:
        ProgramError: a Gaussian target that the stage cannot have.
    """
    target = options.gaussian_target or ("offset" if options.stage == "texture" else "absolute")
    if target == "offset" and options.stage != "texture":
        raise ProgramError(f"--gaussian_target offset needs a layout: not possible with --stage {options.stage}")
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
    options = parse_options(make_parser(), argv)
    check_run_options(options)
    statistics, options.tokens_dir = read_statistics(options.tokens_dir)
    config = resolve_config(options, statistics)
    if options.dry_run:
        print(describe_options(options, model_config=config), end="")
        return 0
    return run_training(options, lambda accelerator: SiTTask(options, statistics, config, accelerator))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
