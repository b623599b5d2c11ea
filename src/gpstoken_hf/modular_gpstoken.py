# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The pipeline as a modular pipeline of diffusers: labels -> layout -> calibrate -> texture -> decode.

Blocks can be left out, replaced and put between others; see docs/modular.md. `modular_blocks` has the single steps.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch

from .file_checks import check_source, find_file
from .loading import saved_class
from .lora import GPSTokenLoraMixin

try:
    from diffusers.guiders import BaseGuidance  # noqa: F401 - modular_blocks needs it
    from diffusers.modular_pipelines.modular_pipeline import (
        MODULAR_PIPELINE_MAPPING,
        ModularPipeline,
        SequentialPipelineBlocks,
    )
    from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
except ImportError as error:
    raise ImportError(
        f"modular pipelines need diffusers >= 0.40, got diffusers {diffusers.__version__} without them"
    ) from error

from .guiders import IntervalGuidance
from .modular_blocks import (
    ALLOWED,
    MODEL_NAME,
    GPSTokenBlock,
    GPSTokenCalibrateStep,
    GPSTokenDecodeStep,
    GPSTokenDenoiseStep,
    GPSTokenEncodeStep,
    GPSTokenLabelStep,
    GPSTokenLayoutStep,
    GPSTokenPrepareTextureStep,
    GPSTokenToTokensStep,
    output_params,
)

# What `save_pretrained(..., remote_code=True)` adds, for programs that do not import this package.
REMOTE_MODULE = "gpstoken_blocks"
BLOCKS_CONFIG = "modular_config.json"


class GPSTokenTextureStep(SequentialPipelineBlocks):
    """The texture stage: noise -> tokens."""

    description = "Samples the texture of every token, and refines its Gaussian."
    block_classes: ClassVar[list] = [GPSTokenPrepareTextureStep, GPSTokenDenoiseStep, GPSTokenToTokensStep]
    block_names: ClassVar[list[str]] = ["prepare", "denoise", "to_tokens"]

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Pass arguments of tqdm on to the loop."""
        self.sub_blocks["denoise"].set_progress_bar_config(**kwargs)


class GPSTokenBlocks(SequentialPipelineBlocks):
    """Class labels -> images: labels, layout, calibrate, texture, decode.

    `sub_blocks` is an ordered dict: `pop` a block, or `insert(name, block, index)` one of your own.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import GPSTokenBlocks, bundled

        >>> blocks = GPSTokenBlocks()
        >>> list(blocks.sub_blocks)
        ['labels', 'layout', 'calibrate', 'texture', 'decode']
        >>> uncalibrated = blocks.sub_blocks.pop("calibrate")
        >>> pipe = blocks.init_pipeline(bundled("gpstoken-digits"))
        >>> pipe.load_components()
        >>> generator = torch.Generator().manual_seed(0)
        >>> pipe(class_labels="three", num_inference_steps=4, generator=generator, output="images")[0].size
        (32, 32)

        ```
    """

    description = "Generates images of classes: finds a layout of Gaussians, calibrates it, samples texture, decodes."
    block_classes: ClassVar[list] = [
        GPSTokenLabelStep,
        GPSTokenLayoutStep,
        GPSTokenCalibrateStep,
        GPSTokenTextureStep,
        GPSTokenDecodeStep,
    ]
    block_names: ClassVar[list[str]] = ["labels", "layout", "calibrate", "texture", "decode"]
    _workflow_map: ClassVar[dict] = {
        "generated": {"class_labels": True, "layout_source": "generated"},
        "bank": {"class_labels": True, "layout_source": "bank"},
        "given": {"class_labels": True, "layout": True},
        "image": {"class_labels": True, "image": True},
    }

    @property
    def outputs(self) -> list[OutputParam]:
        """Images, and what they were made of."""
        return output_params("images", "layout", "tokens")


class GPSTokenReconstructBlocks(SequentialPipelineBlocks):
    """Images -> tokens -> images: encode, decode. Put a block of your own between them to edit the tokens.

    Examples:
        ```python
        >>> import numpy as np
        >>> from gpstoken_hf import GPSTokenReconstructBlocks, bundled

        >>> pipe = GPSTokenReconstructBlocks().init_pipeline(bundled("gpstoken-digits"))
        >>> pipe.load_components()
        >>> state = pipe(image=np.zeros((32, 32, 3), dtype=np.uint8))
        >>> state.tokens.shape, state.images[0].size
        (torch.Size([1, 16, 13]), (32, 32))

        ```
    """

    description = "Reconstructs images: encodes them as tokens, and decodes these."
    block_classes: ClassVar[list] = [GPSTokenEncodeStep, GPSTokenDecodeStep]
    block_names: ClassVar[list[str]] = ["encode", "decode"]

    @property
    def outputs(self) -> list[OutputParam]:
        """Images, and what they were made of."""
        return output_params("images", "tokens", "layout")


class GPSTokenModularPipeline(GPSTokenLoraMixin, ModularPipeline):
    """A modular pipeline of [`GPSTokenBlocks`], or of blocks that were made of them.

    `from_pretrained` and `init_pipeline` take repositories of both forms: with a `modular_model_index.json`, or with
    the `model_index.json` of a [`GPSTokenPipeline`]. `load_components` then loads the weights.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import GPSTokenModularPipeline, GPSTokenPipeline, bundled

        >>> pipe = GPSTokenModularPipeline.from_pretrained(bundled("gpstoken-digits"))
        >>> pipe.load_components()
        >>> generator = torch.Generator().manual_seed(0)
        >>> tokens = pipe(class_labels=5, num_inference_steps=4, generator=generator, output="tokens")
        >>> same = GPSTokenPipeline.from_pretrained(bundled("gpstoken-digits"))
        >>> generator = torch.Generator().manual_seed(0)
        >>> torch.equal(tokens, same(5, num_inference_steps=4, generator=generator).tokens)
        True

        ```
    """

    default_blocks_name = "GPSTokenBlocks"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for spec in self._component_specs.values():
            # A `model_index.json` names a component that is not there as [null, null].
            if spec.type_hint is None:
                spec.pretrained_model_name_or_path = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> GPSTokenModularPipeline:
        """Read the index of a pipeline from a folder or the Hub. `load_components` loads the weights.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): the folder or repository.
            kwargs: arguments of [`~diffusers.ModularPipeline.from_pretrained`].
        """
        source = str(pretrained_model_name_or_path)
        check_source(source)
        if find_file(source, cls.config_name, kwargs) is None:
            return cls(pretrained_model_name_or_path=source, **kwargs)
        return super().from_pretrained(source, **kwargs)

    @staticmethod
    def _dict_to_component_spec(name: str, spec_dict: dict[str, Any]) -> Any:
        module, class_name = spec_dict["type_hint"]
        if module is not None and name in ALLOWED:
            saved_class("the index of the pipeline", name, ALLOWED[name], module, class_name)
        return ModularPipeline._dict_to_component_spec(name, spec_dict)

    def load_components(self, names: list[str] | str | None = None, **kwargs: Any) -> None:
        """Load components; all in float32 unless a dtype is given.

        Args:
            names (`list[str]` or `str`, *optional*): components to load. By default all that are not loaded.
            kwargs: arguments of [`~diffusers.ModularPipeline.load_components`].
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        super().load_components(names, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], remote_code: bool = False, **kwargs: Any
    ) -> None:
        """Save the components, and a `modular_model_index.json` that points to them.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            remote_code (`bool`, *optional*, defaults to `False`): add a file of code that imports this package, so
                that programs which do not, such as `diffusers-cli`, run the pipeline with `trust_remote_code`.
                Everybody else must then trust the repository as well.
            kwargs: arguments of [`~diffusers.ModularPipeline.save_pretrained`].
        """
        folder = os.fspath(save_directory)
        os.makedirs(folder, exist_ok=True)
        if remote_code:
            name = type(self.blocks).__name__
            config = {"_class_name": name, "_diffusers_version": diffusers.__version__}
            config["auto_map"] = {"ModularPipelineBlocks": f"{REMOTE_MODULE}.{name}"}
            (Path(folder) / BLOCKS_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            code = f"from gpstoken_hf.modular_gpstoken import {name}\n\n__all__ = [{name!r}]\n"
            (Path(folder) / f"{REMOTE_MODULE}.py").write_text(code)
        super().save_pretrained(folder, **{"overwrite_modular_index": True, **kwargs})

    def push_to_hub(self, repo_id: str, remote_code: bool = False, **kwargs: Any) -> None:
        """Save to a repository on the Hub.

        Args:
            repo_id (`str`): `owner/name`.
            remote_code (`bool`, *optional*, defaults to `False`): see `save_pretrained`.
            kwargs: `private`, `token`, `commit_message`, `create_pr`, `variant`, `safe_serialization`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, remote_code, push_to_hub=True, repo_id=repo_id, **kwargs)


# `init_pipeline` of blocks looks up the class of their pipeline here.
MODULAR_PIPELINE_MAPPING[MODEL_NAME] = lambda config_dict=None: GPSTokenModularPipeline.__name__

__all__ = [
    "GPSTokenBlock",
    "GPSTokenBlocks",
    "GPSTokenModularPipeline",
    "GPSTokenReconstructBlocks",
    "GPSTokenTextureStep",
    "IntervalGuidance",
]
