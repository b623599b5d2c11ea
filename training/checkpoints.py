# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of a training run: written whole, verified before they are read.

`checkpoint-{step}` holds what accelerate's `save_state` writes, the averaged weights and the state of the run. Written
last, a manifest records the size and the SHA-256 of every file. A folder that does not match it is never resumed.

What protects from a hostile checkpoint: weights and averages are safetensors, the state of the run and the manifest
are JSON. The optimizers and the random states are pickles, which accelerate reads with `weights_only=True`, and that
unpickler builds tensors and numbers and calls nothing else. Nothing is registered with accelerate's
`register_for_checkpointing`, because it reads such objects with `weights_only=False`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load
from safetensors import SafetensorError

from pipelines.shared.programs import ProgramError, one_line
from training.ema import ExponentialMovingAverage
from training.run_folder import writing
from training.sharding import load_shards, save_shards

MANIFEST = "manifest.json"
RUN_STATE = "run_state.json"
AVERAGE = "ema.safetensors"
PLACE = "place_{}.json"
MANIFEST_FORMAT = 1

_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class RunState:
    """How far a run is.

    Args:
        step (`int`): Finished optimizer steps.
        batches (`int`): Micro-batches that each process has consumed.
        num_images (`int`): Images of all processes.
        elapsed_seconds (`float`): Training time, interruptions not counted.
        num_unusable (`int`): Samples of all processes that could not be used.
    """

    step: int = 0
    batches: int = 0
    num_images: int = 0
    elapsed_seconds: float = 0.0
    num_unusable: int = 0


def step_of(checkpoint: Path) -> int:
    """The step of a folder called checkpoint-{step}, or -1."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints_of(output_dir: Path) -> list[Path]:
    """The folders called checkpoint-{step}, damaged ones among them, oldest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """The recorded `RunState` of a checkpoint, and the number of processes."""
    return json.loads((checkpoint / RUN_STATE).read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------------- manifest


def write_manifest(checkpoint: Path) -> None:
    """Record the size and the SHA-256 of every file below `checkpoint`."""
    files = {
        path.relative_to(checkpoint).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path != checkpoint / MANIFEST
    }
    manifest = {"format": MANIFEST_FORMAT, "files": files}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _is_ours(checkpoint: Path) -> bool:
    """Whether the manifest lists every file. A folder that holds other files must not be deleted."""
    try:
        listed = {MANIFEST, *json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False
    files = (path for path in checkpoint.rglob("*") if path.is_symlink() or not path.is_dir())
    return all(path.relative_to(checkpoint).as_posix() in listed for path in files)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it matches its manifest.

    Sizes are compared before any file is read.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        known = manifest["format"] == MANIFEST_FORMAT and RUN_STATE in files
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        return f"{MANIFEST} is not readable"
    try:
        for name, (size, _) in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
        for name, (_, digest) in files.items():
            if _sha256(checkpoint / name) != digest:
                return f"the contents of {name} have changed"
    except OSError as error:
        return one_line(error)
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- choice, save, load


def choose_checkpoint(output_dir: Path, choice: str) -> tuple[Path | None, list[str]]:
    """Resolve `--resume_from_checkpoint`.

    Damaged checkpoints that are newer than the chosen one are renamed, so that they are in nobody's way.

    Args:
        output_dir (`Path`): The folder of the run.
        choice (`str`): "latest", "none", or a checkpoint folder, by its path or its name in `output_dir`.

    Returns:
        `tuple[Path | None, list[str]]`: The checkpoint, None to start anew, and one line for each damaged one.

    Raises:
        ProgramError: If the named checkpoint is damaged, if all are, or if "none" would overwrite existing ones.
    """
    existing = checkpoints_of(output_dir)
    if choice == "none":
        if existing:
            raise ProgramError(
                f"--output_dir must be without checkpoints for --resume_from_checkpoint none, got {output_dir} with "
                f"{existing[-1].name}"
            )
        return None, []
    if choice != "latest":
        path = Path(choice)
        if not path.is_dir() and (output_dir / choice).is_dir():
            path = output_dir / choice
        if damage := find_damage(path):
            raise ProgramError(f"--resume_from_checkpoint must be a whole checkpoint, got {choice}: {damage}")
        return path, []
    damaged: list[tuple[Path, str]] = []
    for path in reversed(existing):
        damage = find_damage(path)
        if damage is None:
            notes = [f"{bad.name} is damaged ({why}); renamed to {_set_aside(bad).name}" for bad, why in damaged]
            return path, notes
        damaged.append((path, damage))
    if damaged:
        listed = ", ".join(f"{path.name} ({why})" for path, why in damaged)
        raise ProgramError(
            f"{output_dir} must hold a whole checkpoint, got {listed}; remove the damaged ones to start anew"
        )
    return None, []


def _set_aside(path: Path) -> Path:
    for number in itertools.count():
        target = path.with_name(f"{path.name}.damaged" + (f"-{number}" if number else ""))
        if not target.exists():
            return path.rename(target)
    raise AssertionError("unreachable")


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    state: RunState,
    average: ExponentialMovingAverage | None,
    total_limit: int,
    place: dict[str, Any] | None = None,
    shards: tuple[torch.nn.Module, torch.optim.Optimizer] | None = None,
) -> Path:
    """Write checkpoint-{step} and remove the oldest ones beyond `total_limit`. All processes must call it.

    `place` says where this process is in a stream, `shards` are the model and the optimizer of FSDP.

    The folder has its name only once it is whole, and older ones are removed only then.

    Raises:
        ProgramError: If it cannot be written, on a full disk for example. The older checkpoints are kept.
    """
    path = output_dir / f"checkpoint-{state.step}"
    staging = output_dir / f".{path.name}.partial"
    main = accelerator.is_main_process
    try:
        with writing(path):
            if main:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(staging))
            if shards is not None:
                save_shards(staging, *shards, is_main=main)
            if average is not None:
                average.save(staging / AVERAGE, is_main=main)
            if place is not None:
                (staging / PLACE.format(accelerator.process_index)).write_text(json.dumps(place), encoding="utf-8")
            if main:
                recorded = {**asdict(state), "num_processes": accelerator.num_processes}
                (staging / RUN_STATE).write_text(json.dumps(recorded), encoding="utf-8")
            accelerator.wait_for_everyone()
            if main:
                write_manifest(staging)
                if _is_ours(path):  # written by a run that was then resumed from an earlier checkpoint
                    shutil.rmtree(path)
                elif path.exists():
                    _set_aside(path)
                staging.rename(path)
                ours = [old for old in checkpoints_of(output_dir) if _is_ours(old)]
                for old in [old for old in ours if step_of(old) <= state.step][:-total_limit]:
                    shutil.rmtree(old)
    finally:
        if main:
            shutil.rmtree(staging, ignore_errors=True)
    accelerator.wait_for_everyone()
    return path


def load_checkpoint(
    accelerator: Accelerator,
    path: Path,
    state: RunState,
    average: ExponentialMovingAverage | None,
    shards: tuple[torch.nn.Module, torch.optim.Optimizer] | None = None,
) -> dict[str, Any] | None:
    """Restore modules, optimizers and random states through `accelerator`, and with them `state` and `average`.

    Returns:
        `dict`, *optional*: The place of this process in its stream, if the data is one.

    Raises:
        ProgramError: If the checkpoint is of another model or of another number of processes.
    """
    try:
        recorded = read_run_state(path)
        if recorded["num_processes"] != accelerator.num_processes:
            raise ProgramError(
                f"the number of processes must be that of {path}, {recorded['num_processes']}, "
                f"got {accelerator.num_processes}"
            )
        for field in fields(state):
            # Older checkpoints do not count unusable samples.
            value = recorded.get(field.name, 0) if field.name == "num_unusable" else recorded[field.name]
            setattr(state, field.name, type(getattr(state, field.name))(value))
        # accelerate ignores random states that it cannot read.
        load(path / f"random_states_{accelerator.process_index}.pkl")
        accelerator.load_state(str(path))
        if shards is not None:
            load_shards(path, *shards)
        if average is not None:
            average.load(path / AVERAGE)
        place = path / PLACE.format(accelerator.process_index)
        return json.loads(place.read_text(encoding="utf-8")) if place.exists() else None
    except ProgramError:
        raise
    except (
        *(OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError),
        *(pickle.UnpicklingError, SafetensorError),
    ) as error:
        raise ProgramError(
            f"{path} does not fit this run (was the model's configuration changed?): {one_line(error)}"
        ) from error
