# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""A tiny pipeline of real components with random weights: 32 x 32 images, 8 tokens of 5 + 4 channels, 10 classes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor
from gpstoken_hf.layout_bank import GaussianLayoutBank
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.partition import partition_images
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline
from gpstoken_hf.scheduling_flow_match_sde import FlowMatchSDEScheduler
from gpstoken_hf.transformer_sit import SiTTransformer1DModel

SIDE, TOKENS, CHANNELS, CLASSES = 32, 8, 9, 10
ID2LABEL = {0: "cat, tabby", 1: "dog", 2: "crane, bird", 3: "crane, machine"} | {i: f"class {i}" for i in range(4, 10)}


def make_transformer(channels: int, condition_channels: int | None, seed: int, **config: Any) -> SiTTransformer1DModel:
    torch.manual_seed(seed)
    config = {"num_classes": CLASSES, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, **config}
    model = SiTTransformer1DModel(
        **{"sample_size": TOKENS, **config}, in_channels=channels, condition_channels=condition_channels
    )
    # What begins as zero gets values, so that every input reaches the output.
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_texture_transformer(mode: str = "generated", **config: Any) -> SiTTransformer1DModel:
    """Of whole tokens in "one_stage" mode; its statistics keep sigmas where they can be seen."""
    if mode == "one_stage":
        gaussians = {"mean": [0.3, 0.3, 0, 0, 0], "std": [0.05, 0.05, 0.2, 0.4, 0.4]}
    else:
        gaussians = {"mean": [0.0] * 5, "std": [0.02, 0.02, 0.2, 0.02, 0.02]}
    statistics = {f"latents_{key}": [float(x) for x in value] for key, value in gaussians.items()}
    statistics = {key: value + [float(key == "latents_std")] * (CHANNELS - 5) for key, value in statistics.items()}
    return make_transformer(CHANNELS, None if mode == "one_stage" else 5, seed=1, **{**statistics, **config})


def make_vae(seed: int = 0, **config: Any) -> GPSTokenModel:
    torch.manual_seed(seed)
    return GPSTokenModel(GPSTokenConfig.preset("tiny", **config)).eval()


def make_bank(seed: int = 5, lengths: tuple[int, ...] = (TOKENS, TOKENS)) -> GaussianLayoutBank:
    """One layout of each length for each class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(CLASSES * len(lengths), 3, SIDE, SIDE, generator=generator) * 2 - 1
    images = torch.where(torch.rand(images.shape[0], 1, 1, SIDE, generator=generator) > 0.5, images, images.mean())
    layouts: dict[int, list[torch.Tensor]] = {label: [] for label in range(CLASSES)}
    for i, image in enumerate(images):
        length = lengths[i // CLASSES]
        layouts[i % CLASSES].append(partition_images(image[None], length, min_region_size=4).gaussians[0])
    return GaussianLayoutBank.from_layouts(layouts)


def make_components(mode: str = "generated") -> dict[str, Any]:
    """Components of a pipeline with generated layouts, layouts from a "bank", "both", or of the "one_stage" kind."""
    components: dict[str, Any] = {
        "vae": make_vae(),
        "transformer": make_texture_transformer(mode),
        "scheduler": FlowMatchSDEScheduler(),
        "image_processor": GPSTokenImageProcessor(),
        "id2label": ID2LABEL,
    }
    if mode in ("generated", "both"):
        statistics = {"latents_mean": [0.15, 0.15, 0.0, 0.0, 0.0], "latents_std": [0.1, 0.1, 1.0, 0.5, 0.5]}
        components["layout_transformer"] = make_transformer(5, None, seed=2, **statistics)
        components["layout_scheduler"] = FlowMatchEulerDiscreteScheduler()
    if mode in ("bank", "both"):
        components["layout_bank"] = make_bank()
    return components


def make_pipeline(mode: str = "generated", **changes: Any) -> GPSTokenPipeline:
    pipeline = GPSTokenPipeline(**{**make_components(mode), **changes})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
