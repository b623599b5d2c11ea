# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The options that the training programs share, presets in YAML, and the record of what a run was told."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.shared.outputs import atomic_file
from pipelines.shared.programs import ProgramError, non_negative_float, non_negative_int, positive_float
from pipelines.shared.programs import positive_int as positive

LR_SCHEDULERS = ("constant", "constant_with_warmup", "cosine", "linear")
DTYPES = ("fp32", "fp16", "bf16")


def unit_interval(text: str) -> float:
    """An argparse type: a number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text!r}")
    return value


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Where a run is kept, how long it lasts and how it goes on after a break."""
    group = parser.add_argument_group("run")
    group.add_argument("--config", type=Path, help="YAML file of defaults for these options; the command line wins")
    group.add_argument(
        "--output_dir", type=Path, required=True, help="checkpoints, logs, pictures and the final model"
    )
    group.add_argument("--seed", type=non_negative_int, default=0)
    group.add_argument("--dry_run", "--dry-run", action="store_true", help="print the resolved configuration and stop")
    group.add_argument("--max_train_steps", type=positive, help="optimizer steps of the whole run")
    group.add_argument(
        "--max_train_minutes",
        type=positive_float,
        help="wall-clock budget of the whole run, breaks not counted; the schedule then follows whichever of time and "
        "steps is further on, so that the learning rate has come down when the time is up",
    )
    group.add_argument("--checkpointing_steps", type=positive, default=1000)
    group.add_argument("--checkpoints_total_limit", type=positive, default=2)
    group.add_argument(
        "--resume_from_checkpoint",
        default="latest",
        help="'latest' (of --output_dir; starts anew when there is none), 'none' or a checkpoint folder",
    )
    group.add_argument("--validation_steps", type=positive, default=500)
    group.add_argument("--logging_steps", type=positive, default=10)
    group.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, ..., all or none")
    group.add_argument("--save_dtype", choices=DTYPES, default="fp32", help="storage type of the final weights")
    group.add_argument("--threads", type=positive, help="CPU threads of the arithmetic; default: torch's own choice")
    group.add_argument("--push_to_hub", action="store_true")
    group.add_argument("--hub_model_id", help="default: the name of --output_dir")
    group.add_argument("--hub_private", action="store_true")


def add_optimizer_options(
    parser: argparse.ArgumentParser, *, betas: tuple[float, float], learning_rate: float
) -> None:
    """Optimizer, schedule, average and precision."""
    group = parser.add_argument_group("optimization")
    group.add_argument("--learning_rate", type=positive_float, default=learning_rate)
    group.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="constant_with_warmup")
    group.add_argument("--lr_warmup_steps", type=non_negative_int, default=0)
    group.add_argument("--lr_final_ratio", type=unit_interval, default=0.0, help="last / peak rate of the decays")
    group.add_argument("--adam_beta1", type=unit_interval, default=betas[0])
    group.add_argument("--adam_beta2", type=unit_interval, default=betas[1])
    group.add_argument("--adam_epsilon", type=positive_float, default=1e-8)
    group.add_argument("--adam_weight_decay", type=non_negative_float, default=0.0)
    group.add_argument("--max_grad_norm", type=positive_float, default=1.0)
    group.add_argument("--gradient_accumulation_steps", type=positive, default=1)
    group.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False)
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    group.add_argument("--allow_tf32", action=argparse.BooleanOptionalAction, default=False)
    group.add_argument("--use_ema", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--ema_decay", type=unit_interval, default=0.9999)
    group.add_argument("--train_batch_size", type=positive, default=96, help="images per process and micro-batch")
    group.add_argument("--dataloader_num_workers", type=non_negative_int, default=2)


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """Where images come from."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="a dataset of the Hub, or a folder that load_dataset understands")
    group.add_argument("--dataset_config_name")
    group.add_argument("--train_data_files", nargs="+", help="parquet (or arrow, webdataset tar) files")
    group.add_argument("--train_data_dir", help="a folder of images, with one subfolder per class or without")
    group.add_argument("--train_split", default="train")
    group.add_argument("--streaming", action=argparse.BooleanOptionalAction, default=False)
    group.add_argument("--shuffle_buffer_size", type=positive, default=2048, help="with --streaming")
    group.add_argument("--image_column", default="image")
    group.add_argument("--label_column", default="label")
    group.add_argument("--max_train_samples", type=positive)
    group.add_argument("--cache_dir")


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse `argv` on top of the file that its `--config` names.

    A file's entries are put in front of the command line, so they pass the same checks and lose against it.

    Raises:
        ProgramError: the file cannot be read, is no mapping, or names an option that does not exist.
    """
    import sys

    arguments = list(sys.argv[1:] if argv is None else argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    config = early.parse_known_args(arguments)[0].config
    if config is not None:
        arguments = preset_arguments(parser, config) + arguments
    return parser.parse_args(arguments)


def preset_arguments(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The entries of a YAML file as command-line arguments of `parser`."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ProgramError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(entries, dict):
        raise ProgramError(f"{path} must hold a mapping of options, got {type(entries).__name__}")
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    arguments: list[str] = []
    for name, value in entries.items():
        if name not in actions or name == "config":
            raise ProgramError(f"{path}: unknown option {name!r}; known: {', '.join(sorted(actions))}")
        flag = f"--{name}"
        if value is None:
            continue
        if isinstance(value, bool):
            if not isinstance(actions[name], argparse.BooleanOptionalAction | argparse._StoreTrueAction):
                raise ProgramError(f"{path}: {name} takes a value, got {value}")
            if value:
                arguments.append(flag)
            elif isinstance(actions[name], argparse.BooleanOptionalAction):
                arguments.append(f"--no-{name}")
        elif isinstance(value, dict):
            arguments += [flag, *(f"{key}={json.dumps(item)}" for key, item in value.items())]
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        else:
            arguments.append(f"{flag}={value}")
    return arguments


def assignment(text: str) -> tuple[str, Any]:
    """An argparse type: `key=value`, the value in YAML (numbers, lists, words)."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"expected key=value with a YAML value, got {text!r}") from None


def describe_options(options: argparse.Namespace, **more: Any) -> str:
    """The resolved configuration as YAML, with further sections (the model's configuration, say)."""
    plain = {name: _plain(value) for name, value in vars(options).items() if name not in ("config", "dry_run")}
    return yaml.safe_dump({**plain, **{name: _plain(value) for name, value in more.items()}}, sort_keys=False)


def save_options(path: Path, options: argparse.Namespace, **more: Any) -> None:
    """Write `describe_options` beside the run."""
    with atomic_file(path) as staging:
        staging.write_text(describe_options(options, **more), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in value):
            return {key: _plain(item) for key, item in value}
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def check_run_options(options: argparse.Namespace) -> None:
    """What argparse cannot check one option at a time.

    Raises:
        ProgramError: no end of the run is given, or a decaying schedule has nothing to follow.
    """
    if options.max_train_steps is None and options.max_train_minutes is None:
        raise ProgramError("give the run an end: --max_train_steps or --max_train_minutes")
