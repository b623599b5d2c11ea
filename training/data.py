# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Images for training: any dataset, in an order that is a pure function of (seed, position).

Sample number p of the endless data order is row `permutation(seed, p // N)[p % N]`. Its crop and flip come from a
generator seeded with (seed, p). No running object holds a part of the order, so a resumed run asks for batch n and
gets the batch that an uninterrupted run gets, without reading the ones before it. For streams see `training.streams`.

A sample that cannot be used is replaced by one that follows in the order, and reported with its batch.

Shapes: B images of a batch, L tokens, H = W = resolution.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from torch.utils.data import DataLoader, Dataset

from pipelines.shared.programs import FILE_ERRORS, ProgramError, one_line
from training.pictures import center_crop, decode_image, image_to_array, native_crop, random_resized_crop
from training.streams import BlockStart, ImageStream, NamedRow, ShuffledStream

# The purpose of a random stream, a part of its key beside the seed.
ORDER, AUGMENTATION, RESOLUTION, TOKEN_COUNT = range(4)

# What may take the place of an unusable sample: so many samples that follow in the order.
NUM_SPARES = 8

CROPS = ("center", "random", "random_resized")
FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}


def load_image_dataset(
    options: argparse.Namespace, files: Sequence[str] | None = None, split: str | None = None
) -> Any:
    """Load the dataset that the options name. Its images stay encoded.

    Args:
        options (`argparse.Namespace`): Those of `add_dataset_options`.
        files (`Sequence[str]`, *optional*): Load these files instead of the training data of the options.
        split (`str`, *optional*): Load this split instead of `--train_split`.

    Raises:
        ProgramError: If not exactly one source is given, it cannot be loaded, or it lacks the image column.
    """
    import datasets

    sources = [options.dataset_name, options.train_data_files, options.train_data_dir]
    num_given = sum(source is not None for source in sources)
    if files is None and num_given != 1:
        raise ProgramError(
            f"one of --dataset_name, --train_data_files and --train_data_dir must be given, got {num_given}"
        )
    split = split or options.train_split
    shared = {"split": split, "streaming": options.streaming and files is None, "cache_dir": options.cache_dir}
    files = files or options.train_data_files
    try:
        if files is not None:
            suffixes = {os.path.splitext(name)[1] for name in files}
            builder = FILE_BUILDERS.get(suffixes.pop()) if len(suffixes) == 1 else None
            if builder is None:
                raise ProgramError(f"data files must share one suffix of {sorted(FILE_BUILDERS)}, got {list(files)}")
            missing = [name for name in files if not _is_pattern_or_url(name) and not os.path.exists(name)]
            if missing:
                raise ProgramError(f"--train_data_files must exist, got no such data file: {', '.join(missing)}")
            dataset = datasets.load_dataset(builder, data_files={split: list(files)}, **shared)
        elif options.train_data_dir is not None:
            if not os.path.isdir(options.train_data_dir):
                raise ProgramError(f"--train_data_dir must be a folder, got {options.train_data_dir}")
            dataset = datasets.load_dataset("imagefolder", data_dir=options.train_data_dir, **shared)
        else:
            dataset = datasets.load_dataset(options.dataset_name, options.dataset_config_name, **shared)
    except ProgramError:
        raise
    except Exception as error:  # datasets has many exception types for bad input
        raise ProgramError(f"cannot load the dataset: {error}") from error
    columns = dataset.column_names or ImageStream(dataset).column_names
    if options.image_column not in columns:
        raise ProgramError(f"--image_column must be one of {', '.join(columns)}, got {options.image_column!r}")
    dataset = dataset.cast_column(options.image_column, datasets.Image(decode=False))
    if options.max_train_samples is not None and split == options.train_split:
        if not hasattr(dataset, "__len__"):
            dataset = dataset.take(options.max_train_samples)
        else:
            dataset = dataset.select(range(min(options.max_train_samples, len(dataset))))
    return dataset


def _is_pattern_or_url(name: str) -> bool:
    return "://" in name or any(character in name for character in "*?[")


@dataclass(frozen=True)
class BatchRequest:
    """One batch to be made by a worker.

    Args:
        number (`int`): Position of the batch in the run.
        rank (`int`): The process that it is for.
        resolution (`int`): Side of its images in pixels.
        positions (`list[int]`): Positions of its samples in the data order.
        rows (`list`): Row indices, or the named rows themselves if the dataset is a stream.
        spares (`list`, *optional*): Further ones, to replace unusable samples.
    """

    number: int
    rank: int
    resolution: int
    positions: list[int]
    rows: list[int] | list[NamedRow]
    spares: list[int] | list[NamedRow] = field(default_factory=list)


class RowOrder:
    """Row indices of the endless data order over `num_rows` rows, shuffled anew in every epoch."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self.seed = num_rows, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.num_rows)
        return int(self._permutation[place])


def images_at(resolution: int, base_resolution: int, batch_size: int) -> int:
    """Images at `resolution` that have as many pixels as `batch_size` images at `base_resolution`; at least 1."""
    return max(1, round(batch_size * (base_resolution / resolution) ** 2))


class BatchPlan:
    """The endless sequence of batches of one process, from `first_batch` on.

    Args:
        source (`Any`): A dataset with a length, or a stream of rows.
        seed (`int`): Determines the order of the samples and the resolutions.
        resolutions (`Sequence[int]`): Sides to draw from in pixels, one per batch and the same in all processes.
        weights (`Sequence[float]`): How often each resolution is drawn, relative to the others.
        base_resolution (`int`): The resolution that `batch_size` is meant for.
        batch_size (`int`): Images of a batch at `base_resolution`; other resolutions get as many pixels.
        first_batch (`int`, *optional*, defaults to 0): Where to start.
        rank (`int`, *optional*, defaults to 0): This process.
        world_size (`int`, *optional*, defaults to 1): Number of processes.
        shuffle_buffer_size (`int`, *optional*, defaults to 2048): Rows to shuffle a stream in.
        place (`dict`, *optional*): What `place_of(first_batch)` of an interrupted run has returned for a stream.
            Without it the stream is read from its beginning.
    """

    def __init__(
        self,
        source: Any,
        *,
        seed: int,
        resolutions: Sequence[int],
        weights: Sequence[float],
        base_resolution: int,
        batch_size: int,
        first_batch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer_size: int = 2048,
        place: dict[str, Any] | None = None,
    ) -> None:
        self.source, self.seed = source, seed
        self.resolutions = list(resolutions)
        self.probabilities = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.base_resolution, self.batch_size = base_resolution, batch_size
        self.first_batch, self.rank, self.world_size = first_batch, rank, world_size
        self.shuffle_buffer_size = shuffle_buffer_size
        self.is_stream = not hasattr(source, "__len__")
        self.resumed = BlockStart(**place["block"]) if place else BlockStart()
        self.first_row = place["row"] if place else 0
        # Of the batches that are made but may not be used yet: the number of the first row of each.
        self._row_of = {first_batch: self.first_row} if place or not first_batch else {}
        self._stream: ShuffledStream | None = None

    def _slots(self) -> Iterator[tuple[int, int, int, int]]:
        """(batch number, resolution, position of the first sample, number of samples) of this process."""
        position = 0
        for number in itertools.count():
            if len(self.resolutions) == 1:
                resolution = self.resolutions[0]
            else:
                rng = np.random.default_rng([self.seed, RESOLUTION, number])
                resolution = int(rng.choice(self.resolutions, p=self.probabilities))
            size = images_at(resolution, self.base_resolution, self.batch_size)
            yield number, resolution, position + self.rank * size, size
            position += self.world_size * size

    def __iter__(self) -> Iterator[BatchRequest]:
        if self.is_stream:
            yield from self._iterate_stream()
            return
        order = RowOrder(len(self.source), self.seed)
        for number, resolution, start, size in self._slots():
            if number >= self.first_batch:
                positions = list(range(start, start + size))
                spares = [order[p] for p in range(start + size, start + size + NUM_SPARES)]
                yield BatchRequest(number, self.rank, resolution, positions, [order[p] for p in positions], spares)

    def _iterate_stream(self) -> Iterator[BatchRequest]:
        """The main process reads the rows, still encoded, so the order does not depend on the number of workers."""
        source = self.source if isinstance(self.source, ImageStream) else ImageStream(self.source)
        self._stream = ShuffledStream(
            source, self.seed, self.rank, self.world_size, self.shuffle_buffer_size, self.resumed
        )
        # Without a place, the batches that are skipped take their rows too.
        row, begin = self.first_row, self.first_batch if self.first_batch in self._row_of else 0
        for number, resolution, start, size in self._slots():
            if number < begin:
                continue
            first, row = row, row + size
            self._row_of |= {number: first, number + 1: row}
            rows = [self._stream[index] for index in range(first, row)]
            if number >= self.first_batch:
                spares = self._stream.following(row - 1, NUM_SPARES)
                yield BatchRequest(number, self.rank, resolution, list(range(start, start + size)), rows, spares)

    def place_of(self, batch: int) -> dict[str, Any] | None:
        """Where batch number `batch` begins in a stream; None for a dataset with a length.

        Asked for in the order of the batches: what lies before is forgotten.
        """
        if not self.is_stream:
            return None
        row = self._row_of.get(batch, 0)
        self._row_of = {number: first for number, first in self._row_of.items() if number >= batch}
        block = self._stream.start_before(row) if self._stream is not None else self.resumed
        return {"row": row, "block": asdict(block)}


@dataclass(frozen=True)
class PartitionSettings:
    """The part of a model's configuration that `partition_images` needs."""

    complexity_exponent: float
    min_region_size: int
    sigma_scale: float
    align_corners: bool = True


@dataclass(frozen=True)
class TokenCounts:
    """Distribution of the number of tokens: log-uniform in [minimum, maximum], scaled with the area of the image.

    Args:
        minimum, maximum (`int`): At `base_resolution`.
        base_resolution (`int`): In pixels.
        per_image (`bool`): Draw a number for every image, or else one for the whole batch.
    """

    minimum: int
    maximum: int
    base_resolution: int
    per_image: bool

    def bounds(self, resolution: int) -> tuple[int, int]:
        """The smallest and the largest number at this resolution."""
        scale = (resolution / self.base_resolution) ** 2
        return max(1, round(self.minimum * scale)), max(1, round(self.maximum * scale))

    def draw(self, resolution: int, num_images: int, rng: np.random.Generator) -> list[int]:
        """One number for each of `num_images` images."""
        low, high = self.bounds(resolution)
        exponents = rng.uniform(math.log(low), math.log(high), size=num_images if self.per_image else 1)
        counts = [min(high, max(low, round(math.exp(exponent)))) for exponent in exponents]
        return counts if self.per_image else counts * num_images


class ImageBatches(Dataset):
    """`batches[request]` is a whole batch, cropped, partitioned and padded: the work of a DataLoader worker.

    Items are dicts of tensors: pixel_values (B, 3, H, W) in [-1, 1]; boxes (B, L, 4); init_gaussians (B, L, 5);
    attention_mask (B, L); with a label column also labels (B,). If samples could not be used, a list of
    texts, "unusable", names them. It stands alone if too few are left.

    Args:
        source (`Any`): The dataset; None if the requests hold the rows.
        image_column (`str`): Name of the column of images.
        seed (`int`): Determines crops, flips and numbers of tokens.
        crop (`str`): "center" (the largest central square), "random" (a random one) or "random_resized" (smaller
            random ones).
        min_crop_scale (`float`): Smallest area of "random_resized", relative to the largest square.
        flip (`str`): "never", "random" or "always".
        token_counts (`TokenCounts`): Distribution of the number of tokens.
        partition (`PartitionSettings`): How images are partitioned.
        label_column (`str`, *optional*): Name of the column of labels.
        native_crop_prob (`float`, *optional*, defaults to 0.0): Share of the images that are cropped without scaling
            instead.
        replace_unusable (`bool`, *optional*, defaults to `True`): Put another sample into the place of an unusable
            one, or else leave it out.
        first_row (`int`, *optional*, defaults to 0): Number of the first row in the names of unusable samples.
        num_classes (`int`, *optional*): Labels must be below it.
    """

    def __init__(
        self,
        source: Any,
        *,
        image_column: str,
        seed: int,
        crop: str,
        min_crop_scale: float,
        flip: str,
        token_counts: TokenCounts,
        partition: PartitionSettings,
        label_column: str | None = None,
        native_crop_prob: float = 0.0,
        replace_unusable: bool = True,
        first_row: int = 0,
        num_classes: int | None = None,
    ) -> None:
        self.source, self.image_column, self.label_column, self.seed = source, image_column, label_column, seed
        self.crop, self.min_crop_scale, self.flip = crop, min_crop_scale, flip
        self.token_counts, self.partition = token_counts, partition
        self.native_crop_prob, self.replace_unusable = native_crop_prob, replace_unusable
        self.first_row, self.num_classes = first_row, num_classes

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        samples, unusable, spares = [], [], iter(request.spares)
        for position, row in zip(request.positions, request.rows):
            candidates: Iterable[Any] = itertools.chain([row], spares) if self.replace_unusable else [row]
            for candidate in candidates:
                try:
                    samples.append(self._sample(candidate, position, request.resolution))
                    break
                except ProgramError as error:
                    unusable.append(str(error))
        if len(samples) < (len(request.rows) if self.replace_unusable else 1):
            return {"unusable": unusable}
        # One number for a batch is one for the batches of all processes, which then take equally long.
        rank = request.rank if self.token_counts.per_image else 0
        rng = np.random.default_rng([self.seed, TOKEN_COUNT, request.number, rank])
        counts = self.token_counts.draw(request.resolution, len(samples), rng)
        images = torch.from_numpy(np.stack([image for image, _ in samples]))
        batch: dict[str, Any] = partitioned_batch(images, counts, self.partition)
        if self.label_column is not None:
            batch["labels"] = torch.tensor([label for _, label in samples])
        return {**batch, "unusable": unusable} if unusable else batch

    def _sample(self, row: int | NamedRow, position: int, resolution: int) -> tuple[np.ndarray, int]:
        """The image, cropped, and the label (0 if there are none).

        Raises:
            ProgramError: If the sample cannot be used.
        """
        if isinstance(row, int):
            name = f"row {self.first_row + row}"
            try:
                values = self.source[row]
            except FILE_ERRORS as error:
                raise ProgramError(f"{name} cannot be read: {one_line(error)}") from error
        else:
            name, values = row
        image = self._image(values[self.image_column], position, resolution, name)
        if self.label_column is None:
            return image, 0
        label = values[self.label_column]
        if isinstance(label, bool) or not isinstance(label, int | np.integer) or label < 0:
            raise ProgramError(f"{name} must have a label that is an integer >= 0, got {label!r}")
        if self.num_classes is not None and label >= self.num_classes:
            raise ProgramError(f"{name} must have a label below the {self.num_classes} classes, got {label}")
        return image, int(label)

    def _image(self, value: Any, position: int, resolution: int, name: str) -> np.ndarray:
        image = decode_image(value, name)
        rng = np.random.default_rng([self.seed, AUGMENTATION, position])
        if self.native_crop_prob and rng.random() < self.native_crop_prob:
            image = native_crop(image, resolution, rng)
        elif self.crop == "center":
            image = center_crop(image, resolution)
        else:
            image = random_resized_crop(image, resolution, rng, 1.0 if self.crop == "random" else self.min_crop_scale)
        if self.flip == "always" or (self.flip == "random" and rng.random() < 0.5):
            image = ImageOps.mirror(image)
        return image_to_array(image)


def partitioned_batch(
    images: torch.Tensor, num_tokens: int | list[int], settings: PartitionSettings
) -> dict[str, torch.Tensor]:
    """Images (B, 3, H, W) in [-1, 1] with their layout, as `encode` takes it."""
    from gpstoken_hf.partition import partition_images

    regions = partition_images(
        images,
        num_tokens,
        complexity_exponent=settings.complexity_exponent,
        min_region_size=settings.min_region_size,
        sigma_scale=settings.sigma_scale,
        align_corners=settings.align_corners,
    )
    return {
        "pixel_values": images,
        "boxes": regions.boxes,
        "init_gaussians": regions.gaussians,
        "attention_mask": regions.attention_mask,
    }


def load_validation_images(rows: Iterable[Any], image_column: str, num_images: int, resolution: int) -> torch.Tensor:
    """The first `num_images` images, central squares: (N, 3, resolution, resolution) in [-1, 1].

    Unusable ones are left out, each with a line on stderr.

    Raises:
        ProgramError: If none is left.
    """
    images = []
    for index, row in enumerate(itertools.islice(iter(rows), num_images)):
        try:
            image = decode_image(row[image_column], f"validation row {index}")
        except ProgramError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        images.append(image_to_array(center_crop(image, resolution)))
    if not images:
        raise ProgramError("the validation data must hold readable images, got none")
    return torch.from_numpy(np.stack(images))


def batch_loader(batches: Dataset, plan: Iterable[BatchRequest], num_workers: int, pin_memory: bool) -> DataLoader:
    """A loader whose workers make whole batches, in the order of the plan. Read it through `batches_of`."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=plan,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker if num_workers else None,
        prefetch_factor=4 if num_workers else None,
        # Without a generator of its own a loader draws from the global one, and a resumed run would differ.
        generator=torch.Generator(),
    )


@contextmanager
def batches_of(loader: Iterable[dict[str, torch.Tensor]]) -> Iterator[Iterator[dict[str, torch.Tensor]]]:
    """The batches of a loader. Its workers end with the block, however the block ends."""
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        # The workers ignore the SIGTERM by which they would be ended at exit.
        if (shut_down := getattr(iterator, "_shutdown_workers", None)) is not None:
            shut_down()


def _prepare_worker(worker_id: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and a SIGTERM to all processes of a job reach the workers too. The main process, which still writes a
    # checkpoint then, would fail if one of them died.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
