# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Tokens made on the fly: a frozen tokenizer between the loader of images and the generator.

Shapes: B images, L tokens, C texture channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines.shared.programs import ProgramError
from training.data import BatchRequest, ImageBatches, PartitionSettings, TokenCounts
from training.token_cache import ChannelSums


def partition_settings(model: GPSTokenModel) -> PartitionSettings:
    """How a tokenizer partitions images."""
    config = model.config
    return PartitionSettings(
        config.complexity_exponent, config.min_region_size, config.sigma_scale, config.align_corners
    )


@torch.no_grad()
def encode_batch(model: GPSTokenModel, batch: dict[str, Any], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """A batch of `ImageBatches` as tokens (B, L, 5 + C), init_gaussians (B, L, 5) and labels (B,).

    Raises:
        ProgramError: If a token is not finite.
    """
    inputs = {name: batch[name].to(accelerator.device) for name in ("pixel_values", "init_gaussians", "boxes")}
    with accelerator.autocast():
        encoded = model.encode(
            inputs["pixel_values"], layout=GaussianLayout(inputs["init_gaussians"], inputs["boxes"])
        )
    tokens = encoded.tokens.float()
    if not torch.isfinite(tokens).all():
        raise ProgramError("tokens must be finite, got NaN or infinity from the tokenizer: try more precision")
    labels = batch.get("labels", torch.zeros(len(tokens), dtype=torch.int64))
    return {"tokens": tokens, "init_gaussians": inputs["init_gaussians"], "labels": labels.to(accelerator.device)}


def image_batches(
    source: Any,
    model: GPSTokenModel,
    *,
    image_column: str,
    label_column: str | None,
    resolution: int,
    num_tokens: int,
    seed: int = 0,
    flip: str = "never",
    replace_unusable: bool = True,
    first_row: int = 0,
    num_classes: int | None = None,
) -> ImageBatches:
    """Central squares as the tokenizer sees them."""
    return ImageBatches(
        source,
        image_column=image_column,
        label_column=label_column,
        seed=seed,
        crop="center",
        min_crop_scale=1.0,
        flip=flip,
        token_counts=TokenCounts(num_tokens, num_tokens, resolution, per_image=False),
        partition=partition_settings(model),
        replace_unusable=replace_unusable,
        first_row=first_row,
        num_classes=num_classes,
    )


def encode_rows(
    rows: Iterable[Any],
    batches: ImageBatches,
    model: GPSTokenModel,
    accelerator: Accelerator,
    resolution: int,
    size: int,
) -> Iterable[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """`(tokens, images)` of rows in order, `size` at a time, without the unusable ones."""
    iterator = iter(rows)
    for number in itertools.count():
        part = list(itertools.islice(iterator, size))
        if not part:
            return
        first = number * size
        named = [(f"row {first + index}", row) for index, row in enumerate(part)]
        batch = batches[BatchRequest(number, 0, resolution, list(range(first, first + len(part))), named)]
        if "pixel_values" in batch:
            yield encode_batch(model, batch, accelerator), batch["pixel_values"]


def channel_statistics(
    encoded: Iterable[tuple[dict[str, torch.Tensor], torch.Tensor]], total: int, quiet: bool
) -> dict[str, Any]:
    """Means and standard deviations of the channels of every target over some batches.

    Raises:
        ProgramError: If there are none.
    """
    sums = ChannelSums()
    with tqdm(total=total, desc="channel statistics", unit="image", disable=quiet, mininterval=5) as bar:
        for tokens, images in encoded:
            sums.add(tokens["tokens"].cpu(), tokens["init_gaussians"].cpu())
            bar.update(len(images))
    if not sums.count:
        raise ProgramError("the training data must hold usable images, got none")
    return sums.statistics()
