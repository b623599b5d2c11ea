# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The Hub: loading pipelines of this package from it, and pushing to it.

A saved pipeline records its components by module path, such as `gpstoken_hf.modeling_gpstoken`. For a repository on
the Hub, diffusers takes such a path for a file of code inside the repository. `register_with_diffusers` registers the
modules beside those of diffusers, so that any pipeline class finds them. `HubDownloadMixin` downloads the repository
of a pipeline without looking for code in it. `export_remote_code` makes a repository that carries its code.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import diffusers
from huggingface_hub import snapshot_download

from .pushing import PushWithCardMixin, save_with_card
from .remote_code import LIBRARY, export_remote_code

__all__ = ["COMPONENT_MODULES", "HubDownloadMixin", "export_remote_code", "register_with_diffusers"]

# Every saved pipeline records these paths. A module that moves must leave a module behind that imports its names.
COMPONENT_MODULES = (
    "modeling_gpstoken",
    "autoencoder_gpstoken",
    "image_processing_gpstoken",
    "transformer_sit",
    "scheduling_flow_match_sde",
    "layout_bank",
)
# diffusers looks these up by name in its own namespace: pipelines in `DiffusionPipeline.from_pretrained`, schedulers
# in `from_config` of another scheduler, models in `AutoModel.from_pretrained`.
DIFFUSERS_CLASSES = (
    ("pipeline_gpstoken", "GPSTokenPipeline"),
    ("scheduling_flow_match_sde", "FlowMatchSDEScheduler"),
    ("autoencoder_gpstoken", "AutoencoderGPSToken"),
    ("transformer_sit", "SiTTransformer1DModel"),
    ("layout_bank", "GaussianLayoutBank"),
)


# The same for modular pipelines, where diffusers has them.
MODULAR_CLASSES = ("GPSTokenModularPipeline", "GPSTokenBlocks", "GPSTokenReconstructBlocks")


def register_with_diffusers() -> None:
    """Make diffusers find the classes of this package by their names in saved pipelines. May be called repeatedly."""
    for name in COMPONENT_MODULES:
        module = importlib.import_module(f".{name}", __package__)
        setattr(diffusers.pipelines, module.__name__, module)
    for name, class_name in DIFFUSERS_CLASSES:
        setattr(diffusers, class_name, getattr(importlib.import_module(f".{name}", __package__), class_name))
    try:
        modular = importlib.import_module(".modular_gpstoken", __package__)
    except ImportError:
        return  # an older diffusers; `gpstoken_hf.GPSTokenModularPipeline` says so
    for class_name in MODULAR_CLASSES:
        setattr(diffusers, class_name, getattr(modular, class_name))


class HubDownloadMixin(PushWithCardMixin):
    """A pipeline that downloads the weights and configs of a repository, and no code; and pushes with a card."""

    save_pretrained = save_with_card(diffusers.DiffusionPipeline.save_pretrained)

    def save_config(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the `model_index.json`. It names this package, also where a copy from remote code saves it."""
        prefix = f"{__package__}."
        renamed = {
            name: (f"{LIBRARY}.{value[0].removeprefix(prefix)}", value[1])
            for name, value in self.config.items()  # type: ignore[attr-defined]
            if isinstance(value, list | tuple) and str(value[0]).startswith(prefix)
        }
        self.register_to_config(**renamed)  # type: ignore[attr-defined]
        super().save_config(save_directory, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike[str]:
        """Download the repository of a pipeline, or find it in the cache.

        Args:
            pretrained_model_name (`str`): `owner/name` on the Hub.
            kwargs: arguments of `DiffusionPipeline.download`: `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`, `variant` and others. Components that are passed are not downloaded. With
                `custom_pipeline` or `trust_remote_code=True` diffusers downloads, code included.

        Returns:
            `str`: the folder with the files.
        """
        if kwargs.get("custom_pipeline") is not None or kwargs.get("trust_remote_code"):
            return super().download(pretrained_model_name, **kwargs)  # type: ignore[misc]
        passed = [f"{name}/*" for name in cls._get_signature_keys(cls)[0] if name in kwargs]  # type: ignore[attr-defined]
        # Weights of a variant have one more part in their name, as in model.fp16.safetensors. Not every component need
        # have the variant, so plain weights are always downloaded.
        variants = ["*.*.safetensors"] if kwargs.get("variant") is None else []
        arguments = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        given = {name: kwargs[name] for name in arguments if kwargs.get(name) is not None}
        return snapshot_download(
            pretrained_model_name,
            allow_patterns=["*.json", "*.safetensors"],
            ignore_patterns=[*variants, *passed],
            **given,
        )
