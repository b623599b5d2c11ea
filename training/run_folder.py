# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The folder of a run: one run at a time, nothing of other people replaced, leftovers of a killed run removed.

A folder that a program has written carries a marker file with the program's name. Only a marked folder is replaced.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from pipelines.shared.outputs import FORMAT, MARKER, atomic_directory
from pipelines.shared.programs import ProgramError, one_line

# The name of a checkpoint while it is written. What `pipelines.shared.outputs` stages it removes by itself.
_STAGING = re.compile(r"\.(?P<stem>.+)\.(?:[a-z0-9_]{8}|partial)(?P<suffix>\.\w+)?")


def owner_of(folder: Path) -> str | None:
    """The program that has marked `folder`, or None."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return str(marker["program"]) if marker["format"] == FORMAT else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


def check_replaceable(folder: Path, program: str) -> None:
    """Check that `folder` does not exist, is empty, or was written by `program`.

    Raises:
        ProgramError: If it holds anything else.
    """
    if folder.is_dir() and not folder.is_symlink():
        if owner_of(folder) == program or not any(folder.iterdir()):
            return
    elif not folder.exists() and not folder.is_symlink():
        return
    raise ProgramError(
        f"{folder} must not exist or must be written by {program}, which would replace it; got something else: "
        "move it or choose another output folder"
    )


@contextmanager
def replaced_folder(folder: Path, program: str) -> Iterator[Path]:
    """A new folder, marked as written by `program`, that takes the place of `folder` when the block ends.

    Raises:
        ProgramError: If `folder` holds what another program or a person has put there.
    """
    check_replaceable(folder, program)
    with atomic_directory(folder, overwrite=True, program=program) as staging:
        yield staging


@contextmanager
def claimed_folder(folder: Path, program: str, outputs: Sequence[str]) -> Iterator[None]:
    """Hold `folder` for one run of `program`, and start by removing what a killed run has left half-written.

    Args:
        folder (`Path`): Created if it does not exist.
        program (`str`): Name of the program, such as "training.train_sit".
        outputs (`Sequence[str]`): Glob patterns, relative to `folder`, of everything that the program writes there.

    Raises:
        ProgramError: If another run holds the folder, or if it holds a file that the run would replace and that was
            not written by `program`.
    """
    owner = owner_of(folder)
    if owner != program:
        found = sorted(str(path.relative_to(folder)) for pattern in outputs for path in folder.glob(pattern))
        if owner is not None or found:
            raise ProgramError(
                f"the output folder must be new or written by {program}, got {folder}, "
                + (f"which {owner} has written" if owner is not None else f"whose {found[0]} would be replaced")
            )
    folder.mkdir(parents=True, exist_ok=True)
    # The operating system drops the lock when the process ends, however it ends.
    with (folder / MARKER).open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ProgramError(f"{folder} is in use by another run of {owner or program}") from None
        if owner is None:
            _write_marker(folder / MARKER, program)
        else:  # a run marks its folder before it writes anything else
            for pattern in outputs:
                _remove_staging(folder / pattern)
        yield


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report a failed write, such as one to a full disk, in one line whichever library it comes from.

    Raises:
        ProgramError: If the block raises what torch, safetensors or the operating system raise then.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ProgramError(f"cannot write {path}: {one_line(error)}") from error


def _write_marker(path: Path, program: str) -> None:
    # Not through a temporary file: the lock is on this one.
    path.write_text(json.dumps({"program": program, "format": FORMAT}) + "\n", encoding="utf-8")


def _remove_staging(pattern: Path) -> None:
    for path in pattern.parent.glob(".*"):
        match = _STAGING.fullmatch(path.name)
        if match is None or not fnmatch(match["stem"] + (match["suffix"] or ""), pattern.name):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
