# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""LoRAs of the two generators, loaded and saved by the pipeline as by other pipelines of diffusers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils import USE_PEFT_BACKEND
from safetensors import safe_open
from safetensors.torch import load_file

from .file_checks import HUB_ARGUMENTS, check_source, find_file, only_safetensors, read_header, refusing, shown

COMPONENTS = ("transformer", "layout_transformer")
NO_PEFT = "load_lora_weights needs the package peft, got none installed"
READ_ARGUMENTS = ("weight_name", "subfolder", "use_safetensors", *HUB_ARGUMENTS)


class GPSTokenLoraMixin(LoraBaseMixin):
    """Reads, loads and saves LoRAs of a pipeline's generators. Weights are named after their component."""

    _lora_loadable_modules = list(COMPONENTS)  # noqa: RUF012 - diffusers reads a list

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA of the texture generator, of the layout generator, or of both.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `Mapping`): a folder, a repository on the
                Hub, a safetensors file, or the weights. Their names begin with `transformer.` or
                `layout_transformer.`.
            adapter_name (`str`, *optional*): its name in `set_adapters`. Defaults to `default_0`, `default_1`, ...
            hotswap (`bool`, *optional*, defaults to `False`): replace the weights of the adapter of this name.
            low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): do not initialise the layers of the LoRA
                before its weights are loaded.
            kwargs: `weight_name` (defaults to `"pytorch_lora_weights.safetensors"`), `subfolder`, and the arguments
                of the Hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, `proxies`.

        Raises:
            ValueError: if `peft` is not installed, the file is damaged or a pickle, or it holds weights of something
                else.
            TypeError: if there is no argument of such a name.
            OSError: if there is no such file.
        """
        if not USE_PEFT_BACKEND:
            raise ValueError(NO_PEFT)
        source = pretrained_model_name_or_path_or_dict
        weights, metadata = _read_lora(source, kwargs)
        for name in COMPONENTS:
            if not any(key.startswith(f"{name}.") for key in weights):
                continue
            component = getattr(self, name)
            if component is None:
                raise ValueError(
                    f"{name} must be a component of the pipeline for the LoRA in {_shown_source(source)}, got None"
                )
            own = {key: value for key, value in (metadata or {}).items() if key.startswith(f"{name}.")}
            _check_metadata(f"{LORA_ADAPTER_METADATA_KEY} of {_shown_source(source)}", own, f"{name}.")
            component.load_lora_adapter(
                weights,
                prefix=name,
                adapter_name=adapter_name,
                hotswap=hotswap,
                low_cpu_mem_usage=low_cpu_mem_usage,
                metadata=own or None,  # without it, ranks and scales are those that the weights tell
                _pipeline=self,
            )

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        return_lora_metadata: bool = False,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """Read the weights of a LoRA, as `load_lora_weights` does, without a pipeline.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `Mapping`): as for `load_lora_weights`.
            return_lora_metadata (`bool`, *optional*, defaults to `False`): return the metadata too.
            kwargs: as for `load_lora_weights`.

        Returns:
            `dict[str, torch.Tensor]`: the weights by name, on the CPU if they were read from a file. With
            `return_lora_metadata=True` a tuple of it and the metadata that `save_lora_weights` has written, a `dict`
            whose keys begin with the name of the component, or `None` if there is none.

        Raises:
            ValueError: if the file is damaged or a pickle, or it holds weights of something else.
            TypeError: if there is no argument of such a name.
            OSError: if there is no such file.

        Examples:
            ```python
            >>> import torch
            >>> from gpstoken_hf import GPSTokenPipeline

            >>> names = ("to_q.lora_A.weight", "to_q.lora_B.weight")
            >>> layers = {f"transformer_blocks.0.attn.{name}": torch.zeros(4, 4) for name in names}
            >>> GPSTokenPipeline.save_lora_weights("my-lora", transformer_lora_layers=layers)
            >>> sorted(GPSTokenPipeline.lora_state_dict("my-lora"))[0]
            'transformer.transformer_blocks.0.attn.to_q.lora_A.weight'

            ```
        """
        weights, metadata = _read_lora(pretrained_model_name_or_path_or_dict, kwargs)
        return (weights, metadata) if return_lora_metadata else weights

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        transformer_lora_layers: Mapping[str, torch.Tensor] | None = None,
        layout_transformer_lora_layers: Mapping[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        layout_transformer_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Write the LoRAs of one or both generators to one safetensors file.

        Args:
            save_directory (`str` or `os.PathLike`): the folder, made if need be.
            transformer_lora_layers, layout_transformer_lora_layers (`Mapping[str, torch.Tensor]`, *optional*): what
                `peft.get_peft_model_state_dict` returns for the generator; at least one of them.
            is_main_process (`bool`, *optional*, defaults to `True`): whether this process writes.
            weight_name (`str`, *optional*): name of the file. Defaults to `"pytorch_lora_weights.safetensors"`.
            safe_serialization (`bool`, *optional*, defaults to `True`): taken as other pipelines take it, but only
                `True`: with `False` they would write a pickle under another name.
            transformer_lora_adapter_metadata, layout_transformer_lora_adapter_metadata (`dict`, *optional*): the
                `LoraConfig.to_dict()` of each, for ranks and scales that the weights do not tell.

        Raises:
            ValueError: if neither generator has layers, or a pickle is asked for, by `safe_serialization` or by the
                name of the file.
        """
        layers = dict(zip(COMPONENTS, (transformer_lora_layers, layout_transformer_lora_layers)))
        metadata = (transformer_lora_adapter_metadata, layout_transformer_lora_adapter_metadata)
        layers = {name: value for name, value in layers.items() if value}
        if not layers:
            raise ValueError(
                f"at least one of {[f'{name}_lora_layers' for name in COMPONENTS]} must be given, got none"
            )
        if safe_serialization is not True:
            raise ValueError(
                f"safe_serialization must be True (pickles are never written), got {safe_serialization!r}"
            )
        weight_name = weight_name or LORA_WEIGHT_NAME_SAFE
        if not weight_name.endswith(".safetensors"):
            raise ValueError(f"weight_name must end in .safetensors (pickles are never written), got {weight_name!r}")
        if is_main_process:
            cls._save_lora_weights(save_directory, layers, dict(zip(COMPONENTS, metadata)), weight_name=weight_name)

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Merge the active LoRAs into the weights. See [`~diffusers.loaders.lora_base.LoraBaseMixin.fuse_lora`].

        Args:
            components (`list[str]`, *optional*): the generators to fuse. Defaults to those that have a LoRA.
        """
        super().fuse_lora(components=components or self._with_lora(), **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Undo `fuse_lora`.

        Args:
            components (`list[str]`, *optional*): the generators to restore. Defaults to those that have a LoRA.
        """
        super().unfuse_lora(components=components or self._with_lora(), **kwargs)

    def _with_lora(self) -> list[str]:
        return [name for name in COMPONENTS if getattr(getattr(self, name), "peft_config", None)]


def _shown_source(source: Any) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)


def _read_lora(
    source: str | os.PathLike[str] | Mapping[str, torch.Tensor], arguments: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Weights and metadata; see `lora_state_dict`."""
    unknown = sorted(set(arguments) - set(READ_ARGUMENTS))
    if unknown:
        raise TypeError(f"a LoRA is read with {', '.join(READ_ARGUMENTS)}, got an unexpected argument {unknown[0]!r}")
    only_safetensors(arguments)
    metadata = None
    if isinstance(source, Mapping):
        weights = dict(source)
    else:
        path = _lora_file(source, arguments)
        read_header(path)
        weights = load_file(path)
        metadata = _read_metadata(path)
    foreign = [key for key in weights if key.split(".")[0] not in COMPONENTS or "lora" not in key]
    if foreign or not weights:
        raise ValueError(
            f"{_shown_source(source)} must hold LoRA weights named "
            f"{' or '.join(f'{name}.*' for name in COMPONENTS)}, got {shown(sorted(foreign))}"
        )
    return weights, metadata


def _read_metadata(path: Path) -> dict[str, Any] | None:
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "null")
    with refusing(f"{LORA_ADAPTER_METADATA_KEY} of {path}"):
        metadata = json.loads(text)
    if not isinstance(metadata, dict | None):
        raise ValueError(f"{LORA_ADAPTER_METADATA_KEY} of {path} must be a JSON object, got {shown(metadata)}")
    return metadata


def _check_metadata(what: str, metadata: Mapping[str, Any], prefix: str) -> None:
    """Raise a ValueError unless the metadata of a component are empty or peft can make its layers from them."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(NO_PEFT) from error
    with refusing(what):
        config = LoraConfig(**{key.removeprefix(prefix): value for key, value in metadata.items()})
    if metadata and not config.target_modules:
        raise ValueError(f"{what} must have {prefix}target_modules, got {shown(sorted(metadata))}")


def _lora_file(source: str | os.PathLike[str], arguments: Mapping[str, Any]) -> Path:
    name = arguments.get("weight_name") or LORA_WEIGHT_NAME_SAFE
    check_source(source)
    path = Path(source) if os.path.isfile(source) else None
    if not (path or Path(name)).name.endswith(".safetensors"):
        raise ValueError(f"a LoRA must be a safetensors file (pickles are never loaded), got {path or name}")
    path = path or find_file(source, name, arguments)
    if path is None:
        raise OSError(f"{source} does not appear to have a file named {name}; another is chosen by weight_name.")
    return path
