# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The rows of a reconstruction table: models, folders of reconstructions, and the base lines that they have to beat.

Shapes: B images of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .autoencoders import BITS_PER_FLOAT, Candidate
from .baselines import CODECS, compress_batch, thumbnail, thumbnail_side
from .image_sets import ImageSet
from .programs import ProgramError, printable

KINDS = ("thumbnail", *CODECS)


@dataclass
class Method:
    """A row of the table: how images become reconstructions.

    Attributes:
        name (`str`): Of the row.
        kind (`str`): "model", "folder" or one of `KINDS`.
        produce (`Callable`): Images `(B, 3, H, W)` and their places in the set -> a reconstruction of each, or `None`.
        floats, bits (`int`, *optional*): Per image.
        candidate (`Candidate`, *optional*): The model.
        checksum (`str`, *optional*): Of reconstructions that come as files.
        group (`str`, *optional*): Of the table that the row is in, where there are several.
    """

    name: str
    kind: str
    produce: Callable[[torch.Tensor, range], Sequence[torch.Tensor | None]]
    floats: int | None = None
    bits: int | None = None
    candidate: Candidate | None = None
    checksum: str | None = None
    group: str = ""


def of_candidate(candidate: Candidate) -> Method:
    """The method of a model."""
    return Method(
        candidate.name,
        "model",
        lambda images, places: list(candidate.reconstruct(images)),
        candidate.floats,
        candidate.bits,
        candidate,
    )


def of_folder(folder: Path, images: ImageSet, resolution: int) -> Method:
    """Reconstructions that another program has made of the same images, in the order of their names.

    Raises:
        ProgramError: If there is not one for each image; later, if they have another size.
    """
    files = ImageSet([folder])
    if len(files) != len(images):
        raise ProgramError(
            f"--reconstructions {folder} must hold one image for each of the {len(images)} images, got {len(files)}"
        )

    def produce(batch: torch.Tensor, places: range) -> list[torch.Tensor]:
        found = files.batch(places.start, places.stop).to(batch.device)
        if found.shape != batch.shape:
            raise ProgramError(
                f"--reconstructions {folder} must hold images of {resolution} x {resolution} pixels, "
                f"got {found.shape[-2]} x {found.shape[-1]}"
            )
        return list(found)

    return Method(printable(folder.name), "folder", produce, checksum=files.checksum())


def make_baselines(candidates: Sequence[Candidate], baselines: Sequence[str], resolution: int) -> list[Method]:
    """A thumbnail for every number of floats, and JPEG and WebP for every number of bytes."""
    methods: dict[str, Method] = {}
    for candidate in candidates:
        if "thumbnail" in baselines:
            side = min(thumbnail_side(candidate.floats), resolution)
            methods.setdefault(thumbnail_name(side), _of_thumbnail(side))
        for codec in CODECS:
            if codec in baselines:
                size = candidate.bits // 8
                methods.setdefault(_codec_name(codec, size), _of_codec(codec, size))
    return sorted(methods.values(), key=lambda method: (KINDS.index(method.kind), method.bits or 0))


def thumbnail_name(side: int) -> str:
    """The name of the row of a thumbnail."""
    return f"thumbnail {side} x {side}"


def _codec_name(codec: str, size: int) -> str:
    return f"{'JPEG' if codec == 'jpeg' else 'WebP'}, {size} bytes"


def _of_thumbnail(side: int) -> Method:
    floats = 3 * side * side
    return Method(
        thumbnail_name(side),
        "thumbnail",
        lambda images, places: list(thumbnail(images, side)),
        floats,
        floats * BITS_PER_FLOAT,
    )


def _of_codec(codec: str, size: int) -> Method:
    return Method(
        _codec_name(codec, size), codec, lambda images, places: compress_batch(images, codec, size), None, 8 * size
    )
