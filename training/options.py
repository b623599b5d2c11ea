# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Options that the training programs share, presets in YAML, and the record of a run's settings."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.shared.outputs import atomic_file
from pipelines.shared.programs import ProgramError, non_negative_float, non_negative_int, positive_float
from pipelines.shared.programs import positive_int as positive
from pipelines.shared.publishing import REMOTE_CODE_HELP

LR_SCHEDULERS = ("constant", "constant_with_warmup", "cosine", "linear")
DTYPES = ("fp32", "fp16", "bf16")


def unit_interval(text: str) -> float:
    """An argparse type: a number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1], got {text!r}")
    return value


class Switch(argparse.Action):
    """An option without a value: `--name` sets it to True, `--no_name` to False."""

    def __init__(self, option_strings: Sequence[str], dest: str, default: bool, help: str | None = None) -> None:
        names = [*option_strings, *(f"--no_{name.removeprefix('--')}" for name in option_strings)]
        super().__init__(names, dest, nargs=0, default=default, help=help)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, not (option or "").startswith("--no_"))


def add_program_options(parser: argparse.ArgumentParser) -> None:
    """Options of every program of this folder that reads a preset."""
    parser.add_argument("--config", type=Path, help="YAML file of defaults for these options; the command line wins")
    parser.add_argument("--threads", type=positive, help="number of CPU threads; default: torch's choice")
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="print the resolved configuration and what the run would cost, and exit",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Where a run is kept, how long it lasts and how it is resumed."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir", type=Path, help="checkpoints, logs, pictures and the final model; --dry_run needs none"
    )
    group.add_argument("--seed", type=non_negative_int, default=0)
    group.add_argument("--max_train_steps", type=positive, help="optimizer steps of the whole run")
    group.add_argument(
        "--max_train_minutes",
        type=positive_float,
        help="training time of the whole run, interruptions not counted; the learning rate follows whichever of time "
        "and steps is further on",
    )
    group.add_argument("--checkpointing_steps", type=positive, default=1000)
    group.add_argument("--checkpoints_total_limit", type=positive, default=2)
    group.add_argument(
        "--resume_from_checkpoint",
        default="latest",
        help="'latest' (the newest whole checkpoint of --output_dir, or none), 'none', or a checkpoint folder",
    )
    group.add_argument("--validation_steps", type=positive, default=500)
    group.add_argument("--logging_steps", type=positive, default=10)
    group.add_argument("--report_to", default="tensorboard", help="none, all, or tensorboard, trackio, wandb, ...")
    group.add_argument("--save_dtype", choices=DTYPES, default="fp32", help="storage type of the final weights")
    group.add_argument("--push_to_hub", action="store_true", help="upload the final model")
    group.add_argument("--hub_model_id", help="repository of --push_to_hub; default: the name of --output_dir")
    group.add_argument("--hub_private", action="store_true", help="create that repository as a private one")
    group.add_argument("--remote_code", action="store_true", help=REMOTE_CODE_HELP)


def add_optimizer_options(
    parser: argparse.ArgumentParser, *, betas: tuple[float, float], learning_rate: float
) -> None:
    """Optimizer, schedule, weight average and precision."""
    group = parser.add_argument_group("optimization")
    group.add_argument("--learning_rate", type=positive_float, default=learning_rate)
    group.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="constant_with_warmup")
    group.add_argument("--lr_warmup_steps", type=non_negative_int, default=0)
    group.add_argument(
        "--lr_final_ratio", type=unit_interval, default=0.0, help="last over peak learning rate, of cosine and linear"
    )
    group.add_argument("--adam_beta1", type=unit_interval, default=betas[0])
    group.add_argument("--adam_beta2", type=unit_interval, default=betas[1])
    group.add_argument("--adam_epsilon", type=positive_float, default=1e-8)
    group.add_argument("--adam_weight_decay", type=non_negative_float, default=0.0)
    group.add_argument("--max_grad_norm", type=positive_float, default=1.0)
    group.add_argument("--gradient_accumulation_steps", type=positive, default=1)
    group.add_argument("--gradient_checkpointing", action=Switch, default=False)
    group.add_argument("--torch_compile", action=Switch, default=False)
    group.add_argument("--torch_compile_backend", default="inductor")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    group.add_argument("--allow_tf32", action=Switch, default=False)
    group.add_argument("--use_ema", action=Switch, default=True, help="validate and save averaged weights")
    group.add_argument("--ema_decay", type=unit_interval, default=0.9999)
    group.add_argument("--train_batch_size", type=positive, default=96, help="images per process and micro-batch")
    group.add_argument("--dataloader_num_workers", type=non_negative_int, default=2)


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """Where images come from."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="a dataset of the Hub, or a folder that load_dataset understands")
    group.add_argument("--dataset_config_name")
    group.add_argument("--train_data_files", nargs="+", help="parquet, arrow or webdataset tar files")
    group.add_argument("--train_data_dir", help="a folder of images, with or without a subfolder per class")
    group.add_argument("--train_split", default="train")
    group.add_argument("--streaming", action=Switch, default=False)
    group.add_argument("--shuffle_buffer_size", type=positive, default=2048, help="of --streaming")
    group.add_argument("--image_column", default="image")
    group.add_argument("--label_column", default="label")
    group.add_argument("--max_train_samples", type=positive)
    group.add_argument(
        "--max_unusable_share",
        type=unit_interval,
        default=0.05,
        help="stop when more of the samples than this are unreadable, one pixel wide, or of a mode that is not 8-bit; "
        "fewer than 100 samples count as 100",
    )
    group.add_argument("--cache_dir")


def check_run_options(options: argparse.Namespace) -> None:
    """Check what argparse cannot check one option at a time.

    Raises:
        ProgramError: If the run has no end or no folder.
    """
    if options.output_dir is None and not options.dry_run:
        raise ProgramError("--output_dir must be given, got none")
    if options.max_train_steps is None and options.max_train_minutes is None:
        raise ProgramError("--max_train_steps or --max_train_minutes must be given, got neither")


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse `argv` on top of the file that its `--config` names.

    The file's entries are put in front of the command line. So they pass the same checks, and the command line wins.

    Raises:
        ProgramError: If the file cannot be parsed, holds no mapping, or names an unknown option.
    """
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
        raise ProgramError(f"{path} must be valid YAML, got: {error}") from error
    if not isinstance(entries, dict):
        raise ProgramError(f"{path} must hold a mapping of options, got {type(entries).__name__}")
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    arguments: list[str] = []
    for name, value in entries.items():
        if name not in actions or name == "config":
            raise ProgramError(f"the options of {path} must be of {', '.join(sorted(actions))}, got {name!r}")
        flag = f"--{name}"
        if value is None:
            continue
        if isinstance(value, bool):
            if not isinstance(actions[name], Switch | argparse._StoreTrueAction):
                raise ProgramError(f"{name} of {path} must have a value, got {value}")
            if value:
                arguments.append(flag)
            elif isinstance(actions[name], Switch):
                arguments.append(f"--no_{name}")
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
        raise argparse.ArgumentTypeError(f"must be key=value, got {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"must be key=value with a YAML value, got {text!r}") from None


def describe_options(options: argparse.Namespace, **more: Any) -> str:
    """The resolved options as YAML, followed by further sections such as the model's configuration."""
    plain = {name: _plain(value) for name, value in vars(options).items() if name not in ("config", "dry_run")}
    return yaml.safe_dump({**plain, **{name: _plain(value) for name, value in more.items()}}, sort_keys=False)


def save_options(path: Path, options: argparse.Namespace, **more: Any) -> None:
    """Write `describe_options(options, **more)` to a file."""
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
