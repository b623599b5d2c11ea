# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Loading pipelines of this package from the Hub.

Diffusers records a component of another package under its module path, `["gpstoken_hf.modeling_gpstoken", ...]`, and
takes such a path in a Hub repository for a file of code inside of that repository. Two things make it look here:
the component modules are registered beside diffusers' own (`register_with_diffusers`, which also makes
`DiffusionPipeline.from_pretrained` and the pipelines of diffusers find them), and our pipeline downloads its
repository without looking for code in it (`HubDownloadMixin`).
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import diffusers
from huggingface_hub import snapshot_download

# The module paths are recorded in every saved pipeline: a module that moves must leave a shim behind.
COMPONENT_MODULES = (
    "modeling_gpstoken",
    "autoencoder_gpstoken",
    "image_processing_gpstoken",
    "transformer_sit",
    "scheduling_flow_match_sde",
    "layout_bank",
)
# Found by name on the diffusers module: pipelines when one is loaded through DiffusionPipeline, schedulers when one
# is made from the config of another.
DIFFUSERS_CLASSES = (
    ("pipeline_gpstoken", "GPSTokenPipeline"),
    ("scheduling_flow_match_sde", "FlowMatchSDEScheduler"),
)


def register_with_diffusers() -> None:
    """Make diffusers find the classes of this package by the names that saved pipelines hold. Safe to repeat."""
    for name in COMPONENT_MODULES:
        module = importlib.import_module(f".{name}", __package__)
        setattr(diffusers.pipelines, module.__name__, module)
    for name, class_name in DIFFUSERS_CLASSES:
        setattr(diffusers, class_name, getattr(importlib.import_module(f".{name}", __package__), class_name))


class HubDownloadMixin:
    """A pipeline that downloads what its repository holds, instead of looking for the code of its components there."""

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike[str]:
        """Download a pipeline repository, or find it in the cache.

        Args:
            pretrained_model_name: `owner/name` on the Hub.
            kwargs: those of `DiffusionPipeline.download`: `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`, `variant`, ... Components that are passed are not downloaded.

        Returns:
            The folder with the files. Code in the repository is not downloaded; with `custom_pipeline` or
            `trust_remote_code=True` diffusers' own download is used.
        """
        if kwargs.get("custom_pipeline") is not None or kwargs.get("trust_remote_code"):
            return super().download(pretrained_model_name, **kwargs)  # type: ignore[misc]
        passed = [f"{name}/*" for name in cls._get_signature_keys(cls)[0] if name in kwargs]  # type: ignore[attr-defined]
        # A variant's weights have one more part in their name: model.fp16.safetensors. A component may have no file of
        # the variant asked for, so with one the plain weights are downloaded too.
        variants = ["*.*.safetensors"] if kwargs.get("variant") is None else []
        arguments = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        given = {name: kwargs[name] for name in arguments if kwargs.get(name) is not None}
        return snapshot_download(
            pretrained_model_name,
            allow_patterns=["*.json", "*.safetensors"],
            ignore_patterns=[*variants, *passed],
            **given,
        )
