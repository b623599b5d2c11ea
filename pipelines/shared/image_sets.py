# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The images that evaluations are about: of folders, image files, parquet files and ADM's `.npz`, in a fixed order.

Shapes: B images of H x W pixels.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL.Image
import torch

from gpstoken_hf.feature_statistics import DAMAGED, read_array_header
from gpstoken_hf.image_processing_gpstoken import PILLOW_READ_ERRORS, GPSTokenImageProcessor, open_image

from .photographs import find_photographs
from .programs import ProgramError, one_line, printable

RESAMPLES = ("bicubic", "bilinear", "lanczos")
MAX_SIDE = 2**14


class ImageSet:
    """Images in a fixed order, read on demand.

    Args:
        paths (`Sequence[Path]`): Parquet files, `.npz` files of images, image files, and folders of images.
        column (`str`): The column of the parquet files, of encoded images.
        resolution (`int`, *optional*): The shortest side is resized to it and the image is cropped in the middle.
            Without it images keep their size, which must then be one for all.
        max_images (`int`, *optional*): Use only the first images, this many.
        resample (`str`, *optional*, defaults to `"bicubic"`): The filter of the resize, which is antialiased.

    Raises:
        ProgramError: If there is no image, or a file does not exist or is not what its name says.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        column: str = "image",
        resolution: int | None = None,
        max_images: int | None = None,
        resample: str = "bicubic",
    ):
        self.entries: list[Path | tuple[Any, int]] = []  # a file, or rows and the number of one
        self.names: list[str] = []
        self.resolution = resolution
        self._size: tuple[tuple[int, int], str] | None = None  # of the first image, and its name
        self.processor = self.make_processor(resolution, resample)
        for path in paths:
            if path.suffix in (".parquet", ".npz") and path.is_file():
                rows = ParquetRows(path, column) if path.suffix == ".parquet" else ArrayRows(path)
                self.entries += [(rows, row) for row in range(len(rows))]
                self.names += [f"{printable(path.name)}[{row}]" for row in range(len(rows))]
            else:
                found = find_photographs([path])
                self.entries += [file for file, _ in found]
                self.names += [printable(name.as_posix()) for _, name in found]
        self.entries, self.names = self.entries[:max_images], self.names[:max_images]
        if not self.entries:
            raise ProgramError(f"data must hold images, got none in {', '.join(map(str, paths))}")

    @staticmethod
    def make_processor(resolution: int | None, resample: str) -> GPSTokenImageProcessor:
        """Makes tensors in [-1, 1] of pictures, resized and cropped if there is a resolution."""
        if resolution is None:
            return GPSTokenImageProcessor()
        return GPSTokenImageProcessor(
            do_resize=True,
            size={"shortest_edge": resolution},
            resample=PIL.Image.Resampling[resample.upper()],
            do_center_crop=True,
            crop_size=resolution,
        )

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images; without a resolution those of the first, which all others must have."""
        if self.resolution is not None:
            return self.resolution, self.resolution
        if self._size is None:
            image = self.read(0)
            self._check_size((image.height, image.width), self.names[0])
        assert self._size is not None
        return self._size[0]

    def batch(self, start: int, stop: int) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [-1, 1].

        Raises:
            ProgramError: If an image cannot be read, or, without a resolution, two sizes differ.
        """
        images = []
        for index in range(start, min(stop, len(self))):
            image = self.read(index)
            if self.resolution is None:
                self._check_size((image.height, image.width), self.names[index])
            images.append(image)
        return self.processor(images, return_tensors="pt").pixel_values

    def _check_size(self, size: tuple[int, int], name: str) -> None:
        if self._size is None:
            self._size = size, name
        if size != self._size[0]:
            (height, width), first = self._size
            raise ProgramError(
                f"images must be of one size, got {first} of {height} x {width} pixels and {name} of "
                f"{size[0]} x {size[1]}; --resolution resizes and crops them"
            )

    def read(self, index: int) -> PIL.Image.Image:
        """One image as it is stored."""
        entry = self.entries[index]
        return open_image(entry) if isinstance(entry, Path) else entry[0].image(entry[1])

    def checksum(self) -> str:
        """A hash of the contents of all images, in order, as they are stored."""
        digest = hashlib.sha256()
        for entry in self.entries:
            if isinstance(entry, Path):
                with entry.open("rb") as file:
                    while block := file.read(2**20):
                        digest.update(block)
            else:
                digest.update(entry[0].content(entry[1]))
            digest.update(b"|")
        return digest.hexdigest()[:16]


class ParquetRows:
    """The encoded images of a column of a parquet file."""

    def __init__(self, path: Path, column: str):
        self.path = path
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ProgramError("parquet files need pyarrow: pip install gpstoken-hf[eval]") from error
        try:
            file = pyarrow.parquet.ParquetFile(path)
            if column not in file.schema_arrow.names:
                raise ProgramError(f"{path} must have a column {column!r}, got {', '.join(file.schema_arrow.names)}")
            self.rows = file.read([column]).column(column)
        except pyarrow.ArrowException as error:
            raise ProgramError(f"{path} must be a parquet file, got: {one_line(error)}") from error

    def __len__(self) -> int:
        return len(self.rows)

    def content(self, row: int) -> bytes:
        """The bytes of an encoded image."""
        value = self.rows[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ProgramError(f"row {row} of {self.path} must hold an encoded image, got {type(content).__name__}")
        return content

    def image(self, row: int) -> PIL.Image.Image:
        """The image of a row."""
        content = self.content(row)
        try:
            image = PIL.Image.open(BytesIO(content))
            image.load()
        except PILLOW_READ_ERRORS as error:
            raise ProgramError(f"row {row} of {self.path} must hold a readable image, got: {error}") from error
        return image


class ArrayRows:
    """The images of an `.npz` file as ADM's programs write it: `arr_0` of shape (N, H, W, 3), uint8.

    The array may be larger than memory: rows are read one after the other.
    """

    def __init__(self, path: Path):
        self.path, self._next = path, 0
        self._file: IO[bytes] | None = None
        with self._errors(), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, is_fortran, dtype = read_array_header(file)
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or is_fortran or not all(shape):
            raise ProgramError(f"{path} must hold images (N, H, W, 3) of uint8 in arr_0, got {dtype} of {shape}")
        if max(shape[1:3]) > MAX_SIDE:
            raise ProgramError(f"{path} must hold images of at most {MAX_SIDE} pixels a side, got {shape[1:3]}")
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def content(self, row: int) -> bytes:
        """The pixels of an image, H x W x 3 bytes."""
        size = self.shape[1] * self.shape[2] * 3
        with self._errors():
            if self._file is None or row < self._next:
                self._file = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115 - it stays open
                read_array_header(self._file)
                self._next = 0
            for _ in range(row - self._next):
                self._file.read(size)
            content = self._file.read(size)
            self._next = row + 1
        if len(content) != size:
            raise ProgramError(f"image {row} of {self.path} must have {size} bytes, got {len(content)}")
        return content

    def image(self, row: int) -> PIL.Image.Image:
        """One image."""
        return PIL.Image.fromarray(np.frombuffer(self.content(row), np.uint8).reshape(self.shape[1:]))

    def _errors(self) -> _ArchiveErrors:
        return _ArchiveErrors(self.path)


class _ArchiveErrors:
    """Errors of a damaged archive as one line."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, DAMAGED) and not isinstance(error, ProgramError):
            raise ProgramError(f"{self.path} must be an .npz file of images, got: {one_line(error)}") from error
