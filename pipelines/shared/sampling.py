# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What the programs that sample share: schedulers by name, precisions, classes as typed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline
from gpstoken_hf.scheduling_flow_match_sde import FlowMatchSDEScheduler

from .checkpoints import quiet_loading
from .programs import ProgramError

SCHEDULERS = {
    "sde": FlowMatchSDEScheduler,
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def swap_scheduler(pipeline: GPSTokenPipeline, name: str | None) -> None:
    """Replace the scheduler of the texture stage by the one of that name."""
    if name is None or type(pipeline.scheduler) is SCHEDULERS[name]:
        return
    # Diffusers' multistep solvers take many kinds of models; these settings select flow models.
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    is_multistep = name in ("dpmsolver++", "unipc")
    with quiet_loading():
        pipeline.scheduler = SCHEDULERS[name].from_config(pipeline.scheduler.config, **(flow if is_multistep else {}))


def class_ids(pipeline: GPSTokenPipeline, classes: Sequence[str] | None) -> list[int]:
    """Turn ids and names, as typed, into ids without duplicates; all classes by default.

    Raises:
        ValueError: an unknown id or name.
    """
    num_classes = pipeline.transformer.config.num_classes
    if classes is None:
        return list(range(num_classes))
    ids = []
    for text in classes:
        label = int(text) if text.removeprefix("-").isdigit() else pipeline.get_label_ids(text)[0]
        if not 0 <= label < num_classes:
            raise ProgramError(f"class ids must be between 0 and {num_classes - 1}, got {label}")
        ids.append(label)
    return list(dict.fromkeys(ids))
