# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSToken for Hugging Face: images as 2D-Gaussian tokens, for reconstruction and two-stage generation.

The imports below follow the data: image -> layout -> encode -> splat -> decode -> image, then label -> layout ->
calibration -> texture -> decode. Read the modules in this order, beside the paper (arXiv 2509.01109).
"""

# ruff: noqa: I001 - the imports follow the data
from importlib import import_module
from importlib.resources import files
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .configuration_gpstoken import GPSTokenConfig
from .image_processing_gpstoken import GPSTokenImageProcessor
from .layout import GaussianLayout
from .partition import partition_images
from .splatting import splat_gaussians
from .modeling_gpstoken import GPSTokenModel
from .autoencoder_gpstoken import AutoencoderGPSToken
from .transformer_sit import SiTTransformer1DModel
from .scheduling_flow_match_sde import FlowMatchSDEScheduler
from .calibration import calibrate_layout
from .layout_bank import GaussianLayoutBank
from .pipeline_gpstoken import GPSTokenPipeline
from .hub import register_with_diffusers

__version__ = "0.1.0"

__all__ = [
    "AutoencoderGPSToken",
    "FlowMatchSDEScheduler",
    "GPSTokenConfig",
    "GPSTokenImageProcessor",
    "GPSTokenModel",
    "GPSTokenPipeline",
    "GaussianLayout",
    "GaussianLayoutBank",
    "SiTTransformer1DModel",
    "bundled",
    "calibrate_layout",
    "partition_images",
    "splat_gaussians",
]

AutoConfig.register("gpstoken", GPSTokenConfig, exist_ok=True)
AutoModel.register(GPSTokenConfig, GPSTokenModel, exist_ok=True)
AutoImageProcessor.register(
    GPSTokenConfig, image_processor_classes={"torchvision": GPSTokenImageProcessor}, exist_ok=True
)
register_with_diffusers()

# Not imported above, as they need a diffusers with modular pipelines.
MODULAR_NAMES = ("GPSTokenBlocks", "GPSTokenModularPipeline", "GPSTokenReconstructBlocks", "IntervalGuidance")


def __getattr__(name: str) -> Any:
    if name in MODULAR_NAMES:
        return getattr(import_module(f"{__name__}.modular_gpstoken"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def bundled(name: str) -> str:
    """The folder of a checkpoint that ships with this package, for `from_pretrained`.

    Args:
        name (`str`): `"gpstoken-nano"`, a tokenizer for photographs of 64 x 64 pixels, or `"gpstoken-digits"`, a
            pipeline that generates handwritten digits of 32 x 32 pixels.

    Returns:
        `str`: the path of the folder.

    Raises:
        ValueError: if no checkpoint of this name is bundled.

    Examples:
        ```python
        >>> from gpstoken_hf import GPSTokenModel, bundled

        >>> model = GPSTokenModel.from_pretrained(bundled("gpstoken-nano"))
        >>> model.config.num_tokens
        32

        ```
    """
    root = files(__name__) / "bundled"
    available = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    if name not in available:
        raise ValueError(f"name must be one of the bundled checkpoints {available}, got {name!r}")
    return str(root / name)
