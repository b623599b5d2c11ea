# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Where the layout of generated images comes from: the caller, an image that lends its own, a bank, a generator.

Shapes: B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch

from .calibration import calibrate_layout
from .configuration_gpstoken import GPSTokenConfig
from .image_processing_gpstoken import GPSTokenImageProcessor
from .layout import GaussianLayout
from .partition import partition_images

# Names of sources, and the components that each needs.
LAYOUT_SOURCES = {"generated": ("layout_transformer", "layout_scheduler"), "bank": ("layout_bank",)}

Images: TypeAlias = PIL.Image.Image | np.ndarray | torch.Tensor | Sequence[PIL.Image.Image | np.ndarray]


def choose_source(components: Any, source: str | None) -> str:
    """The name of a source that the components of a pipeline can serve.

    Args:
        components: a pipeline, with its components as attributes.
        source (`str`, *optional*): `"generated"` or `"bank"`. By default layouts are generated if there is a layout
            transformer, and drawn from the bank if not.

    Raises:
        ValueError: if a component that the source needs is missing.
    """
    if source is None:
        generator = getattr(components, "layout_transformer", None)
        if generator is None and getattr(components, "layout_bank", None) is None:
            raise ValueError("layout must be given to a pipeline without layout_transformer and layout_bank, got None")
        source = "bank" if generator is None else "generated"
    for name in LAYOUT_SOURCES[source]:
        if getattr(components, name, None) is None:
            raise ValueError(f"{name} must be a component of the pipeline for layout={source!r}, got None")
    return source


def check_given(layout: Any) -> GaussianLayout | Images:
    """Return a layout, checked, or images that lend theirs.

    Raises:
        ValueError: if `layout` is neither, or an illegal layout.
    """
    if isinstance(layout, GaussianLayout):
        layout.check()
        return layout
    # A tensor of Gaussians would pass for a grey image.
    tensors = [one for one in layout if isinstance(one, torch.Tensor)] if isinstance(layout, list | tuple) else []
    is_name = isinstance(layout, str)
    if is_name or tensors or (isinstance(layout, torch.Tensor) and layout.ndim != 4):
        got = repr(layout) if is_name else "tensors that are not a (B, 3, H, W) batch"
        raise ValueError(f"layout must be a GaussianLayout, images or one of {list(LAYOUT_SOURCES)}, got {got}")
    return layout


def spread(layout: GaussianLayout, batch_size: int, num_images_per_label: int = 1) -> GaussianLayout:
    """A layout of one image, of one per label or of one per image -> the layouts of B images, free to be edited.

    Args:
        layout ([`GaussianLayout`]): the layout.
        batch_size (`int`): B, images.
        num_images_per_label (`int`, *optional*, defaults to 1): images of each label, one after another.

    Raises:
        ValueError: if the layout is of another number of images.
    """
    num_labels = batch_size // num_images_per_label
    if num_images_per_label > 1 and len(layout) == num_labels:
        layout = layout[torch.arange(num_labels).repeat_interleave(num_images_per_label).tolist()]
    return layout.expand(batch_size)


def borrow_layout(
    images: Images, config: GPSTokenConfig, processor: GPSTokenImageProcessor | None, device: torch.device
) -> GaussianLayout:
    """The layout that a tokenizer chooses for images, after a resize and centre crop to its image size.

    Args:
        images (PIL, NumPy, or a `(B, 3, H, W)` tensor in [0, 1]): the images.
        config ([`GPSTokenConfig`]): config of the tokenizer.
        processor ([`GPSTokenImageProcessor`], *optional*): prepares the images; a default one if `None`.
        device (`torch.device`): where the layout is computed.
    """
    side = config.image_size
    pixel_values = (processor or GPSTokenImageProcessor())(
        images,
        do_resize=True,
        size={"shortest_edge": side},
        do_center_crop=True,
        crop_size={"height": side, "width": side},
        return_tensors="pt",
    )["pixel_values"]
    geometry = _geometry(config)
    return partition_images(pixel_values.to(device), config.num_tokens, config.complexity_exponent, **geometry)


def calibrated(gaussians: torch.Tensor, config: GPSTokenConfig) -> GaussianLayout:
    """Generated Gaussians `(B, L, 5)` -> the legal layout of a tokenizer that follows them (Alg. 2)."""
    return calibrate_layout(gaussians, (config.image_size, config.image_size), **_geometry(config))


def _geometry(config: GPSTokenConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("min_region_size", "sigma_scale", "align_corners")}
