# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Compare a converted model with recorded inputs and outputs of the authors' code.

Tolerances are the largest absolute errors allowed in float32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from conversion.checkpoints import Checkpoint, PlannedTensor, as_bytes
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.partition import partition_images
from gpstoken_hf.transformer_sit import SiTTransformer1DModel

INIT_GAUSSIANS_TOLERANCE = 1e-6
TOKENS_TOLERANCE = 1e-5
RENDERED_TOLERANCE = 1e-5
VELOCITY_TOLERANCE = 1e-5
DECODED_TOLERANCE = 1e-3
MERGED_DECODED_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Comparison:
    """The largest absolute error of one output, and its tolerance."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def load_arrays(path: Path) -> dict[str, torch.Tensor]:
    """Load recorded inputs and outputs from a safetensors file.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, got {error}") from None


def check_errors(comparisons: Iterable[Comparison]) -> None:
    """Print every comparison.

    Raises:
        ValueError: if an error exceeds its tolerance.
    """
    comparisons = list(comparisons)
    for item in comparisons:
        print(f"verified: {item.name}: largest error {item.error:.3g} (tolerance {item.tolerance:g})")
    failed = [item for item in comparisons if not item.passed]
    if failed:
        listing = ", ".join(f"{item.name} {item.error:.3g} > {item.tolerance:g}" for item in failed)
        raise ValueError(f"the converted model must reproduce the recorded outputs, got errors of {listing}")


def compare_tensors(checkpoint: Checkpoint, restored: Iterable[PlannedTensor]) -> int:
    """Check that restored tensors equal the checkpoint's in number type, shape and every bit, and count them.

    Raises:
        ValueError: if a tensor differs.
    """
    count = 0
    for tensor in restored:
        original, value = checkpoint.tensor(tensor.name), tensor.load()
        same_kind = original.dtype == value.dtype and original.shape == value.shape
        if not same_kind or not torch.equal(as_bytes(original), as_bytes(value)):
            raise ValueError(f"{tensor.name} must equal the checkpoint's bit for bit, got other values")
        count += 1
    return count


def regions_to_boxes(regions: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Convert regions `(..., 4)`, inclusive corners x0 y0 x1 y1 in [-1, 1], to inclusive pixel boxes, int64."""
    height, width = size
    scale = regions.new_tensor([width - 1, height - 1, width - 1, height - 1])
    return ((regions + 1) / 2 * scale).round().long()


def match_regions(boxes: torch.Tensor, expected: torch.Tensor) -> torch.Tensor | None:
    """Return the index in `boxes` `(L, 4)` of each expected box `(L, 4)`, or None if the two sets differ."""
    places = {tuple(box): index for index, box in enumerate(boxes.tolist())}
    wanted = [tuple(box) for box in expected.tolist()]
    if len(places) != len(wanted) or set(places) != set(wanted):
        return None
    return torch.tensor([places[box] for box in wanted])


def max_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference.

    Raises:
        ValueError: if the shapes differ.
    """
    if value.shape != expected.shape:
        raise ValueError(f"the model's output must have shape {tuple(expected.shape)}, got {tuple(value.shape)}")
    return (value.double() - expected.double()).abs().max().item()


@torch.no_grad()
def verify_gpstoken(model: GPSTokenModel, arrays: dict[str, torch.Tensor]) -> list[Comparison]:
    """Errors of a tokenizer against recorded arrays, for as many of them as there are.

    Args:
        model: the converted model, float32.
        arrays: pixel_values `(B, 3, H, W)` and regions `(B, L, 4)`; optional init_gaussians `(B, L, 5)`, tokens
            `(B, L, 5 + C)`, rendered `(B, C, h, w)`, decoded `(B, 3, H, W)`, and merged_tokens, merged_rendered,
            merged_decoded of the images as the n x n tiles of one, row by row. Regions and tokens in any order.

    Raises:
        ValueError: pixel_values or regions are missing, or shapes that do not fit.
    """
    for name in ("pixel_values", "regions"):
        if name not in arrays:
            raise ValueError(f"the recorded arrays must hold {name}, got {sorted(arrays)}")
    images, regions = arrays["pixel_values"], arrays["regions"]
    size = (images.shape[-2], images.shape[-1])
    config = model.config
    boxes = regions_to_boxes(regions, size)
    partition = partition_images(
        images,
        regions.shape[1],
        complexity_exponent=config.complexity_exponent,
        min_region_size=config.min_region_size,
        sigma_scale=config.sigma_scale,
    )
    assert partition.boxes is not None
    orders = [match_regions(ours, expected) for ours, expected in zip(partition.boxes, boxes)]
    different = sum(order is None for order in orders)
    results = [Comparison("images with other regions", different, 0)]
    if different:
        return results
    order = torch.stack([item for item in orders if item is not None])  # (B, L)

    def reorder(values: torch.Tensor) -> torch.Tensor:
        return values.gather(1, order.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    encoded = model.encode(images, num_tokens=regions.shape[1])
    if "init_gaussians" in arrays:
        error = max_error(reorder(encoded.layout.gaussians), arrays["init_gaussians"])
        results.append(Comparison("init_gaussians", error, INIT_GAUSSIANS_TOLERANCE))
    if "tokens" in arrays:
        results.append(Comparison("tokens", max_error(reorder(encoded.tokens), arrays["tokens"]), TOKENS_TOLERANCE))
    tokens = arrays.get("tokens", encoded.tokens)
    if "rendered" in arrays:
        map_size = arrays["rendered"].shape[-2:]
        error = max_error(model.render(tokens, tuple(map_size)), arrays["rendered"])
        results.append(Comparison("rendered", error, RENDERED_TOLERANCE))
    if "decoded" in arrays:
        error = max_error(model.decode(tokens, size).sample, arrays["decoded"])
        results.append(Comparison("decoded", error, DECODED_TOLERANCE))
    if "merged_tokens" in arrays:
        results += _verify_merged(model, images, order, arrays)
    return results


def _verify_merged(
    model: GPSTokenModel, images: torch.Tensor, order: torch.Tensor, arrays: dict[str, torch.Tensor]
) -> list[Comparison]:
    """The images as the n x n tiles of one larger image, encoded in tiles and decoded once."""
    num_tiles, _, height, width = images.shape
    n = int(num_tiles**0.5)
    rows = [torch.cat(list(images[row * n : (row + 1) * n]), dim=-1) for row in range(n)]
    image = torch.cat(rows, dim=-2).unsqueeze(0)
    encoded = model.encode(image, num_tokens=order.numel(), tile_size=height)
    # Tokens come tile by tile, in each tile as when it is encoded on its own.
    flat = (order + torch.arange(num_tiles).unsqueeze(1) * order.shape[1]).flatten()
    results = [
        Comparison("merged_tokens", max_error(encoded.tokens[:, flat], arrays["merged_tokens"]), TOKENS_TOLERANCE)
    ]
    tokens = arrays["merged_tokens"]
    if "merged_rendered" in arrays:
        map_size = arrays["merged_rendered"].shape[-2:]
        error = max_error(model.render(tokens, tuple(map_size)), arrays["merged_rendered"])
        results.append(Comparison("merged_rendered", error, RENDERED_TOLERANCE))
    if "merged_decoded" in arrays:
        decoded = model.decode(tokens, (n * height, n * width), tile_size=height).sample
        error = max_error(decoded, arrays["merged_decoded"])
        results.append(Comparison("merged_decoded", error, MERGED_DECODED_TOLERANCE))
    return results


# Guidance of the recorded cfg_* outputs: v_null + w (v_class - v_null) at a time inside the interval, else v_class.
RECORDED_GUIDANCE_SCALE = 1.5
RECORDED_TIMES = {"cfg_in": 0.5, "cfg_out": 0.1}


@torch.no_grad()
def verify_sit(model: SiTTransformer1DModel, arrays: dict[str, torch.Tensor]) -> list[Comparison]:
    """Compare a generator's velocities with the recorded ones.

    Args:
        model (`SiTTransformer1DModel`): the converted model, float32.
        arrays (`dict[str, torch.Tensor]`): x `(B, C, L, 1)`, t `(B,)` (the paper's time), y `(B,)`, and any of
            velocity `(B, C, L, 1)` (the paper's sign) with cond `(B, L, E)`, velocity_unconditioned, and cfg_in and
            cfg_out with cfg_x, cfg_y and cfg_cond.

    Raises:
        ValueError: if an input or all outputs are missing, or a shape does not fit.
    """
    for name in ("x", "t", "y"):
        if name not in arrays:
            raise ValueError(f"the recorded arrays must hold {name}, got {sorted(arrays)}")

    def velocity(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        tokens = x.squeeze(-1).transpose(1, 2)  # (B, L, C)
        output = model(tokens, 1000 * (1 - t), y, condition).sample
        return -output.transpose(1, 2).unsqueeze(-1)

    x, t, y, condition = arrays["x"], arrays["t"], arrays["y"], arrays.get("cond")
    results = []
    if "velocity" in arrays:
        results.append(
            Comparison("velocity", max_error(velocity(x, t, y, condition), arrays["velocity"]), VELOCITY_TOLERANCE)
        )
    if "velocity_unconditioned" in arrays:
        error = max_error(velocity(x, t, y, None), arrays["velocity_unconditioned"])
        results.append(Comparison("velocity_unconditioned", error, VELOCITY_TOLERANCE))
    for name, time in RECORDED_TIMES.items():
        if name in arrays:
            x, y, condition = arrays["cfg_x"], arrays["cfg_y"], arrays.get("cfg_cond")
            t = torch.full((len(x),), time)
            guided = velocity(x, t, y, condition)
            if name == "cfg_in":
                null = velocity(x, t, torch.full_like(y, model.config.num_classes), condition)
                guided = null + RECORDED_GUIDANCE_SCALE * (guided - null)
            results.append(Comparison(name, max_error(guided, arrays[name]), VELOCITY_TOLERANCE))
    if not results:
        raise ValueError(
            f"the recorded arrays must hold velocity, velocity_unconditioned or cfg_*, got {sorted(arrays)}"
        )
    return results
