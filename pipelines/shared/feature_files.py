# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Images from files or from a pipeline, and their features in files of one batch each, so that any run can resume.

Shapes: B images of H x W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpstoken_hf.feature_networks import FeatureNetwork
from gpstoken_hf.metrics import to_uint8
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline

from .image_sets import ImageSet
from .outputs import atomic_file
from .sampling import swap_scheduler

# The pixels of the first images are kept, for the sheet.
NUM_KEPT = 8
SHEET_SIDE = 160


class Source(Protocol):
    """Images in a fixed order, each of which depends on its place alone."""

    settings: dict[str, Any]

    def __len__(self) -> int: ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""

    def batch(self, places: range) -> torch.Tensor:
        """Images `(B, 3, H, W)` uint8."""

    def image_files(self, is_saved: bool) -> list[str]:
        """Where the images are saved, relative to the output folder."""


class FileSource:
    """The images of files."""

    def __init__(self, images: ImageSet):
        self.images = images
        self.settings: dict[str, Any] = {"checksum": images.checksum()}

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.size

    def batch(self, places: range) -> torch.Tensor:
        """Images `(B, 3, H, W)` uint8."""
        return to_uint8(self.images.batch(places.start, places.stop))

    def image_files(self, is_saved: bool) -> list[str]:
        """They are files already."""
        return []


class PipelineSource:
    """The images of a pipeline: image i is of class i modulo their number, with noise of the seed and i."""

    def __init__(self, pipeline: GPSTokenPipeline, count: int, settings: dict[str, Any], name: str):
        self.pipeline, self.count, self.settings, self.name = pipeline, count, settings, name
        self.scheduler = pipeline.scheduler

    def __len__(self) -> int:
        return self.count

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        side = self.pipeline.vae.config.image_size
        return side, side

    def generator(self, place: int) -> torch.Generator:
        """A generator on the CPU, so that every device starts from the same noise."""
        state = np.random.SeedSequence([self.settings["seed"], place]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state) >> 1)

    def batch(self, places: range) -> torch.Tensor:
        """Images `(B, 3, H, W)` uint8."""
        settings = self.settings
        self.pipeline.scheduler = self.scheduler
        swap_scheduler(self.pipeline, settings["scheduler"])
        low, high = settings["guidance_interval"]
        images = self.pipeline(
            [settings["classes"][place % len(settings["classes"])] for place in places],
            num_inference_steps=settings["steps"],
            num_layout_steps=settings["layout_steps"],
            guidance_scale=settings["guidance_scale"],
            guidance_interval=(low, high),
            generator=[self.generator(place) for place in places],
            output_type="pil",
        ).images
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def image_files(self, is_saved: bool) -> list[str]:
        """One PNG file for each image."""
        return [self.image_file(place) for place in range(self.count)] if is_saved else []

    def image_file(self, place: int) -> str:
        """Where an image is saved."""
        return f"images/{self.name}/{place:06d}.png"


class FeatureFolder:
    """Features in files `<first>-<after the last>.safetensors`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def files(self, ranges: Sequence[range]) -> list[str]:
        """The names of files relative to the output folder."""
        return [f"features/{self.folder.name}/{self._name(places)}" for places in ranges]

    @staticmethod
    def _name(places: range) -> str:
        return f"{places.start:06d}-{places.stop:06d}.safetensors"

    def ranges(self) -> list[range]:
        """The images whose features are there, in order. Every file is whole, as it appears only then."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        found = [re.fullmatch(r"(\d+)-(\d+)\.safetensors", name) for name in names]
        return sorted((range(int(m[1]), int(m[2])) for m in found if m), key=lambda places: places.start)

    def missing(self, count: int, batch_size: int) -> list[range]:
        """The images without features, in batches."""
        batches, start = [], 0
        for places in [*self.ranges(), range(count, count)]:
            stop = min(places.start, count)
            batches += [range(i, min(i + batch_size, stop)) for i in range(start, stop, batch_size)]
            start = max(start, places.stop)
        return batches

    def write(self, places: range, tensors: dict[str, torch.Tensor]) -> None:
        """Write the features of some images."""
        with atomic_file(self.folder / self._name(places)) as staging:
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, staging)

    def read(self, places: range, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
        """Features `(N, D)` of some images, by kind.

        Raises:
            ValueError: If a file is damaged.
        """
        parts: dict[str, list[torch.Tensor]] = {kind: [] for kind in kinds}
        for present in self.ranges():
            start, stop = max(places.start, present.start), min(places.stop, present.stop)
            if start >= stop:
                continue
            path = self.folder / self._name(present)
            try:
                with safe_open(path, "pt") as file:
                    for kind in kinds:
                        parts[kind].append(file.get_slice(kind)[start - present.start : stop - present.start])
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} must hold features, cannot read it; delete it: {error}") from error
        return {kind: torch.cat(found) for kind, found in parts.items()}

    def images(self, count: int) -> list[PIL.Image.Image]:
        """The first images."""
        kept: list[PIL.Image.Image] = []
        for present in self.ranges():
            if present.start >= min(count, NUM_KEPT):
                break
            with safe_open(self.folder / self._name(present), "pt") as file:
                for pixels in file.get_tensor("pixels"):
                    picture = PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())
                    zoom = max(1, SHEET_SIDE // max(picture.size))
                    kept.append(
                        picture.resize((picture.width * zoom, picture.height * zoom), PIL.Image.Resampling.NEAREST)
                    )
        return kept[:count]


def extract(
    source: Source, places: range, network: FeatureNetwork, folder: FeatureFolder, output: Path | None = None
) -> None:
    """Make one batch of images and write its features, and with `output` the images before."""
    images = source.batch(places)
    if output is not None and isinstance(source, PipelineSource):
        for place, pixels in zip(places, images.permute(0, 2, 3, 1).numpy()):
            with atomic_file(output / source.image_file(place)) as staging:
                PIL.Image.fromarray(pixels).save(staging)
    device = next(network.parameters()).device
    tensors = network(images.to(device))
    if places.start < NUM_KEPT:
        tensors = {**tensors, "pixels": images[: NUM_KEPT - places.start]}
    folder.write(places, tensors)
