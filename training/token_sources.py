# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Where the tokens that a generator learns come from: a cache, or images that a frozen tokenizer encodes on the fly.

Shapes: B images, L tokens, C texture channels.
"""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines.shared.checkpoints import find_checkpoint
from pipelines.shared.outputs import atomic_file
from pipelines.shared.programs import ProgramError
from training.data import BatchPlan, BatchRequest, batch_loader, load_image_dataset
from training.online_tokens import channel_statistics, encode_batch, encode_rows, image_batches
from training.streams import ImageStream
from training.token_cache import STATISTICS, class_names, load_token_dataset, read_statistics

ENCODE_BATCH = 32


class TokenSource(ABC):
    """Training batches, held-out data and the statistics of the channels.

    Attributes:
        statistics (`dict`): As `training.cache_tokens` writes them.
        held_out (`dict[str, torch.Tensor]`): tokens, init_gaussians and labels, on the CPU.
        images (`torch.Tensor`, *optional*): The held-out images (B, 3, H, W), if there are any.
    """

    statistics: dict[str, Any]
    held_out: dict[str, torch.Tensor]
    images: torch.Tensor | None = None
    plan: BatchPlan

    @abstractmethod
    def batches(self) -> tuple[Dataset, Any]:
        """What makes batches of requests, and the rows that the requests are about."""

    def tokens_of(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A training batch as tokens."""
        return batch

    def loader(
        self, options: argparse.Namespace, first_batch: int, accelerator: Accelerator, place: dict[str, Any] | None
    ) -> Iterable[dict[str, Any]]:
        """See `training.task.TrainingTask.loader`."""
        batches, rows = self.batches()
        resolution = self.statistics["resolution"]
        self.plan = BatchPlan(
            rows,
            seed=options.seed,
            resolutions=[resolution],
            weights=[1.0],
            base_resolution=resolution,
            batch_size=options.train_batch_size,
            first_batch=first_batch,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            shuffle_buffer_size=options.shuffle_buffer_size,
            place=place,
        )
        return batch_loader(batches, self.plan, options.dataloader_num_workers, accelerator.device.type == "cuda")


class TokenBatches(Dataset):
    """`batches[request]`: tokens (B, L, 5 + C), init_gaussians (B, L, 5) and labels (B,) of the requested rows."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getitem__(self, request: BatchRequest) -> dict[str, torch.Tensor]:
        batch = self.rows[request.rows]
        return {
            "tokens": torch.from_numpy(np.ascontiguousarray(batch["tokens"], dtype=np.float32)),
            "init_gaussians": torch.from_numpy(np.ascontiguousarray(batch["init_gaussians"], dtype=np.float32)),
            "labels": torch.from_numpy(np.ascontiguousarray(batch["label"], dtype=np.int64)),
        }


def number_of_classes(options: argparse.Namespace, names: list[str] | None) -> int | None:
    """As `--config_overrides` or the names of the classes say; None without either."""
    return dict(options.config_overrides).get("num_classes", len(names) if names else None)


class CachedTokens(TokenSource):
    """Rows of `training.cache_tokens`; the last ones are held out.

    Raises:
        ProgramError: If there is no finished cache, it has too few rows, or a label is no class.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.statistics, directory = read_statistics(options.tokens_dir)
        rows = load_token_dataset(directory)
        count = options.num_validation_samples
        if len(rows) <= count:
            raise ProgramError(f"--num_validation_samples must be less than {len(rows)}, got {count}")
        held_out = rows.select(range(len(rows) - count, len(rows)))
        self.held_out = TokenBatches(held_out)[BatchRequest(0, 0, 1, [], list(range(count)))]
        self.rows = rows.select(range(min(len(rows) - count, options.max_train_samples or len(rows))))
        largest = int(rows.with_format("numpy", columns=["label"])[:]["label"].max())
        num_classes = number_of_classes(options, self.statistics.get("class_names"))
        if num_classes is not None and largest >= num_classes:
            raise ProgramError(f"the labels of the cache must be below the {num_classes} classes, got {largest}")

    def batches(self) -> tuple[Dataset, Any]:
        return TokenBatches(self.rows), self.rows


class OnlineTokens(TokenSource):
    """Images that a frozen tokenizer encodes in every step; the first ones are held out.

    The statistics are those of the first `--num_statistics_images` images. They are kept in the folder of the run.

    Raises:
        ProgramError: If the data has no labels or too few images.
    """

    def __init__(self, options: argparse.Namespace, accelerator: Accelerator) -> None:
        self.options, self.accelerator = options, accelerator
        model = GPSTokenModel.from_pretrained(find_checkpoint(options.tokenizer, "--tokenizer"), dtype=torch.float32)
        self.model = model.to(accelerator.device).eval().requires_grad_(False)
        self.resolution = options.resolution or model.config.image_size
        self.num_tokens = options.num_tokens or model.config.num_tokens
        dataset = load_image_dataset(options)
        count = options.num_validation_samples
        self.rows: Any
        if hasattr(dataset, "__len__"):
            if len(dataset) <= count:
                raise ProgramError(f"--num_validation_samples must be less than {len(dataset)}, got {count}")
            held_out, self.rows = dataset.select(range(count)), dataset.select(range(count, len(dataset)))
            columns = dataset.column_names
        else:
            held_out, self.rows = ImageStream(dataset).hold_out(count)
            columns = self.rows.column_names
        if options.label_column not in columns:
            raise ProgramError(f"--label_column must be one of {', '.join(columns)}, got {options.label_column!r}")
        names = class_names(dataset, options.label_column)
        self.num_classes = number_of_classes(options, names)
        encoded = list(self._encode(held_out))
        if not encoded:
            raise ProgramError("the held-out images must hold a usable one, got none")
        self.held_out = {name: torch.cat([tokens[name].cpu() for tokens, _ in encoded]) for name in encoded[0][0]}
        self.images = torch.cat([images for _, images in encoded])
        self.statistics = self._statistics(names)

    def _batches(self, source: Any, flip: str, replace_unusable: bool) -> Any:
        return image_batches(
            source,
            self.model,
            image_column=self.options.image_column,
            label_column=self.options.label_column,
            resolution=self.resolution,
            num_tokens=self.num_tokens,
            seed=self.options.seed,
            flip=flip,
            replace_unusable=replace_unusable,
            first_row=0 if source is None else self.options.num_validation_samples,
            num_classes=self.num_classes,
        )

    def _encode(self, rows: Iterable[Any]) -> Iterable[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        return encode_rows(
            rows, self._batches(None, "never", False), self.model, self.accelerator, self.resolution, ENCODE_BATCH
        )

    def _statistics(self, names: list[str] | None) -> dict[str, Any]:
        identity = {
            "tokenizer": str(self.options.tokenizer),
            "resolution": self.resolution,
            "num_tokens": self.num_tokens,
            "num_images": self.options.num_statistics_images,
        }
        path = Path(self.options.output_dir) / STATISTICS
        if self.accelerator.is_main_process:
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if any(known.get(name) != value for name, value in identity.items()):
                count = self.options.num_statistics_images
                if isinstance(self.rows, ImageStream):
                    first, _ = self.rows.hold_out(count)
                else:
                    first = self.rows.select(range(min(count, len(self.rows))))
                channels = channel_statistics(self._encode(first), len(first), quiet=len(first) < 1000)
                with atomic_file(path) as staging:
                    described = {**identity, "class_names": names, "channels": channels}
                    staging.write_text(json.dumps(described, indent=1), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        return json.loads(path.read_text(encoding="utf-8"))

    def batches(self) -> tuple[Dataset, Any]:
        source = None if isinstance(self.rows, ImageStream) else self.rows
        return self._batches(source, "random" if self.options.random_flip else "never", True), self.rows

    def tokens_of(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return encode_batch(self.model, batch, self.accelerator)
