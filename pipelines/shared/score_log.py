# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""A file of rows that grows while a program measures, so that an interrupted run resumes after the last row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .outputs import OwnDirectory, atomic_file
from .programs import ProgramError


class ScoreLog:
    """Rows of a program in a file of JSON lines. The first line holds the settings.

    Args:
        folder (`OwnDirectory`): The output folder.
        name (`str`): Name of the file.
        settings (`dict`): What the rows depend on.
        outputs (`Sequence[str]`): The other files that the program writes there.
        overwrite (`bool`): Replace rows of other settings.

    Raises:
        ProgramError: If the file is damaged or holds rows of other settings, unless `overwrite`.
    """

    def __init__(
        self, folder: OwnDirectory, name: str, settings: dict[str, Any], outputs: Sequence[str], overwrite: bool
    ):
        self.path: Path = folder.path / name
        header, complete, rows = json.dumps(settings), [], []
        if self.path.exists() and not overwrite:
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
            if lines[0] != header:
                raise ProgramError(
                    f"{self.path} holds the rows of other settings; choose another --output, or --overwrite"
                )
            complete = lines[1:-1]  # the rest after the last line break is empty, or was cut off
            try:
                rows = [json.loads(line) for line in complete]
            except (ValueError, RecursionError) as error:
                raise ProgramError(f"{self.path} must hold JSON lines, got: {error}; --overwrite clears it") from error
        elif overwrite:
            folder.clear()
        folder.expect((name, *outputs))
        with atomic_file(self.path) as staging:
            staging.write_text("\n".join([header, *complete]) + "\n", encoding="utf-8")
        self.rows: list[Any] = rows

    def add(self, row: Any) -> None:
        """Append a row, on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
