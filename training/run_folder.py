# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The folder of a run: one run at a time, nothing of other people replaced, leftovers of a killed run removed.

A folder that a program has written carries a marker file with the program's name. Only a marked folder is replaced.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from pipelines.shared.outputs import FORMAT, MARKER, sweep, try_lock
from pipelines.shared.programs import ProgramError, one_line

# The name of a checkpoint while it is written.
_STAGING = re.compile(r"\.(?P<stem>.+)\.(?:[a-z0-9_]{8}|partial)(?P<suffix>\.\w+)?")

_locks: set[IO[bytes]] = set()


def _close_locks() -> None:
    for lock in _locks:
        lock.close()


if hasattr(os, "register_at_fork"):
    # A lock lasts as long as any process has the file open. The workers of a killed run live a few seconds longer.
    os.register_at_fork(after_in_child=_close_locks)


def owner_of(folder: Path) -> str | None:
    """The program that has marked `folder`, or None. The marker of a run lists no files: the program knows its own."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return str(marker["program"]) if marker["format"] == FORMAT else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


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
        marker = folder / MARKER
        if owner is None and (marker.is_symlink() or (marker.exists() and marker.stat().st_size > 0)):
            found.append(MARKER)  # a run that was killed as it began leaves an empty one
        if owner is not None or found:
            raise ProgramError(
                f"the output folder must be new or written by {program}, got {folder}, "
                + (f"which {owner} has written" if owner is not None else f"whose {found[0]} would be replaced")
            )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / MARKER).open("ab", buffering=0) as lock:
        # The operating system drops the lock when the process ends, however it ends.
        if try_lock(lock) is False:
            raise ProgramError(f"{folder} is in use by another run of {owner or program}")
        _locks.add(lock)
        try:
            if owner is None:
                # Not through a temporary file: the lock is on this one.
                content = json.dumps({"program": program, "format": FORMAT}) + "\n"
                try:
                    (folder / MARKER).write_text(content, encoding="utf-8")
                except OSError:
                    lock.truncate(0)  # half a marker would look like somebody else's
                    raise
            else:  # a run marks its folder before it writes anything else
                for pattern in outputs:
                    _remove_staging(folder / pattern)
                sweep(folder)
            yield
        finally:
            _locks.discard(lock)


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


def _remove_staging(pattern: Path) -> None:
    for path in pattern.parent.glob(".*"):
        match = _STAGING.fullmatch(path.name)
        if match is None or not fnmatch(match["stem"] + (match["suffix"] or ""), pattern.name):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
