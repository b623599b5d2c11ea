# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSToken for Hugging Face: images as 2D-Gaussian tokens, for reconstruction and two-stage generation."""

from importlib.resources import files

from .calibration import CalibrationOutput, calibrate_layout
from .partition import PartitionOutput, partition_images
from .scheduling_flow_match_sde import FlowMatchSDEScheduler
from .transformer_sit import SiTTransformer1DModel

__version__ = "0.1.0"


def bundled(name: str) -> str:
    """Path of a checkpoint that ships with the package, for `from_pretrained`: works offline.

    Raises:
        ValueError: no checkpoint of that name is bundled.
    """
    root = files(__name__) / "bundled"
    available = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    if name not in available:
        raise ValueError(f"bundled checkpoints are {available}, got {name!r}")
    return str(root / name)
