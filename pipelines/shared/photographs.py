# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Find, identify and read the photographs that programs are pointed at.

Shapes: H x W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch

from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor

from .outputs import is_staged, read_marker
from .programs import ProgramError


@dataclass
class Photograph:
    """An image as the model takes it, and how it was reduced from the original."""

    pixel_values: torch.Tensor  # (1, 3, H, W)
    original_size: tuple[int, int]  # (H, W)

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.pixel_values.shape[-2:]
        return height, width


def find_photographs(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Files, and the images of folders in alphabetical order, without those that a program has written there.

    Args:
        paths (`Sequence[Path]`): Files, and folders that are searched recursively.

    Returns:
        `list[tuple[Path, Path]]`: Each file, and its name relative to the folder that was searched.

    Raises:
        ProgramError: If a path does not exist, or if a folder holds no image.
    """
    readable = {suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}
    found: list[tuple[Path, Path]] = []
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in readable and file.is_file())
            files = _without_outputs(files, path)
            if not files:
                raise ProgramError(f"the folder {path} must hold images, got none")
            found += [(file, file.relative_to(path)) for file in files]
        elif path.is_file():
            found.append((path, Path(path.name)))
        else:
            raise ProgramError(f"images must be an image file or a folder, got no such file: {path}")
    return found


def _without_outputs(files: Sequence[Path], root: Path) -> list[Path]:
    """The files that no program lists as its own, in the marker of their folder or of one above, below `root`.

    What lies deeper in an output that is searched itself is found: the images of `generate` can be evaluated.
    """

    def folders_of(file: Path) -> list[Path]:
        return [file.parent, *(folder for folder in file.parents if folder != root and folder.is_relative_to(root))]

    markers = {folder: read_marker(folder) for folder in {folder for file in files for folder in folders_of(file)}}
    written = {folder: marker.files for folder, marker in markers.items() if marker is not None}

    def is_written(file: Path) -> bool:
        return any(file.relative_to(folder).as_posix() in written.get(folder, ()) for folder in folders_of(file))

    return [file for file in files if not is_written(file) and not is_staged(file)]


def read_photograph(image: PIL.Image.Image, max_side: int) -> Photograph:
    """An image of any mode -> `pixel_values`, reduced until its longer side is `max_side` (0: never)."""
    original = (image.height, image.width)
    reduced = reduced_size(original, max_side)
    resize = {} if reduced == original else {"do_resize": True, "size": {"height": reduced[0], "width": reduced[1]}}
    return Photograph(GPSTokenImageProcessor()(image, return_tensors="pt", **resize).pixel_values, original)


def reduced_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(H, W) with the longer side at most `max_side`, the shape kept; 0 keeps everything."""
    longest = max(size)
    if not max_side or longest <= max_side:
        return size
    height, width = (max(1, round(side * max_side / longest)) for side in size)
    return height, width


def sample_photograph(name: str) -> PIL.Image.Image:
    """A photograph that scikit-image ships with."""
    try:
        import skimage.data
    except ImportError as error:
        raise ProgramError(
            "the sample photographs come with scikit-image: pip install gpstoken-hf[demo], or name an image file"
        ) from error
    return PIL.Image.fromarray(getattr(skimage.data, name)())


def file_digest(path: str | Path) -> str:
    """A hash of the contents of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]
