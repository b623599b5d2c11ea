# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Loading untrusted checkpoints, strictly and never from a pickle.

The headers of a checkpoint's safetensors files are compared with the model that its config describes. That model is
built on the meta device, before any memory is taken for weights. `file_checks` reads the files.

[`StrictTransformersMixin`] and [`StrictDiffusersMixin`] give models such a `from_pretrained`,
[`CheckedConfigMixin`] gives it to what has a config only.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import extract_commit_hash

from .file_checks import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    DISTRIBUTED_FILES,
    FLOATING_DTYPES,
    MAX_FRESH_PARAMETERS,
    MAX_PARAMETERS_PER_BYTE,
    MAX_TRAIN_TIMESTEPS,
    PIPELINE_INDEX,
    SCHEDULER_CONFIG,
    UNDECLARED_FIELDS,
    check_fields,
    check_number,
    check_source,
    find_file,
    hub_arguments,
    only_safetensors,
    read_header,
    read_index,
    read_json,
    refusing,
    require_file,
    shown,
)
from .pushing import PushWithCardMixin, save_with_card

# -- checkpoints of models


def check_loading_info(class_name: str, source: Any, info: Mapping[str, Any]) -> None:
    """Raise a ValueError unless a checkpoint held exactly the weights of its model.

    Args:
        class_name (`str`): the class of the model.
        source (`str` or `os.PathLike`): the checkpoint.
        info (`Mapping`): the loading info of transformers or diffusers, with `missing_keys`, `unexpected_keys` and
            `mismatched_keys`, the last of `(key, shape in the checkpoint, shape in the model)`.
    """
    mismatched = [
        f"{key} {tuple(found)} instead of {tuple(expected)}"
        for key, found, expected in info.get("mismatched_keys", ())
    ]
    problems = []
    for kind, keys in (
        ("missing", info.get("missing_keys")),
        ("unexpected", info.get("unexpected_keys")),
        ("of another shape", mismatched),
    ):
        if keys:
            shown = sorted(keys)
            more = f", and {len(shown) - 5} more" if len(shown) > 5 else ""
            problems.append(f"{len(shown)} {kind} ({', '.join(name[:200] for name in shown[:5])}{more})")
    if problems:
        raise ValueError(f"{source} must hold exactly the weights of {class_name}, got: {'; '.join(problems)}")


class CheckedConfigMixin:
    """For classes of diffusers with a config: they refuse a file that is no config of theirs.

    Leans on `_dict_from_json_file`, which diffusers reads every config with.
    """

    @classmethod
    def known_fields(cls, config: Mapping[str, Any]) -> set[str]:
        """The fields that a saved config of this class may have; diffusers keeps its own behind an underscore."""
        private = {name for name in config if name.startswith("_") and not name.startswith("__")}
        return set(inspect.signature(cls.__init__).parameters) - {"self"} | private | UNDECLARED_FIELDS

    @classmethod
    def check_config_file(cls, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read a saved config of this class.

        Raises:
            ValueError: if it is malformed or has unknown fields.
        """
        config = read_json(path)
        check_fields(path, config, cls.__name__, cls.known_fields(config))
        # It names code of the repository, which belongs to the file and not to the object.
        config.pop("auto_map", None)
        return config

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        cls.check_config_file(json_file)
        config = super()._dict_from_json_file(json_file, *args, **kwargs)  # type: ignore[misc]
        config.pop("auto_map", None)
        return config


class CheckedPipelineMixin(CheckedConfigMixin):
    """[`CheckedConfigMixin`] for a pipeline whose class annotates its components with their classes."""

    @classmethod
    def check_config_file(cls, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read a `model_index.json`.

        Raises:
            ValueError: if it is malformed or has unknown fields, or if a component is not `[module, class]`.
        """
        config = super().check_config_file(path)
        if not config.get("_class_name"):
            raise ValueError(f"{path} must name the class of the pipeline as _class_name, got none")
        for name in cls._component_types():
            value = config.get(name, [None, None])
            is_pair = isinstance(value, list) and len(value) == 2
            if not is_pair or not (value == [None, None] or all(isinstance(part, str) for part in value)):
                raise ValueError(f"{path}: {name} must be [module, class] or [null, null], got {shown(value)}")
        names = config.get("id2label")
        is_names = isinstance(names, dict) and all(key.isdecimal() for key in names)
        if names is not None and not (is_names and all(isinstance(value, str) for value in names.values())):
            raise ValueError(f"{path}: id2label must map class ids to names, got {shown(names)}")
        return config

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Read the `model_index.json` of a pipeline as diffusers does, and check the components that it names.

        Raises:
            ValueError: if a component is of a class that does not belong there, or the config of a scheduler is bad.
        """
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            index = folder / cls.config_name  # type: ignore[attr-defined]
            config = cls.check_config_file(index)
            if isinstance(config["_class_name"], list):
                # The remote-code edition names a file and its class. This class needs no code of a repository.
                (loaded[0] if isinstance(loaded, tuple) else loaded)["_class_name"] = config["_class_name"][-1]
            for name, expected in cls._component_types().items():
                module, class_name = config.get(name, [None, None])
                # diffusers asks for trust before it runs code of a repository.
                if module is not None and not (folder / name / f"{module}.py").is_file():
                    _check_saved_component(index, name, expected, module, class_name)
        return loaded

    @classmethod
    def _component_types(cls) -> dict[str, Any]:
        """Component -> the class that it must be of."""
        hints = get_type_hints(cls)
        return {name: hints.get(name, object) for name in cls._get_signature_keys(cls)[0]}  # type: ignore[attr-defined]


def saved_class(index: Any, name: str, expected: Any, module: str, class_name: str) -> Any:
    """The class of a component that an index names. Its module is looked up and never imported: importing runs it.

    Raises:
        ValueError: if the module is not imported, or the class is not an `expected` one.
    """
    library = getattr(diffusers.pipelines, module, None) or sys.modules.get(module)
    component: Any = getattr(library, class_name, None)
    if not isinstance(component, type) or not issubclass(component, expected):
        raise ValueError(f"{index}: {name} must be of {expected}, got {shown(class_name)} of {shown(module)}")
    return component


def _check_saved_component(index: Path, name: str, expected: Any, module: str, class_name: str) -> None:
    component = saved_class(index, name, expected, module, class_name)
    file = index.parent / name / SCHEDULER_CONFIG
    if issubclass(component, diffusers.SchedulerMixin) and file.is_file():
        config = read_json(file)
        check_number(f"num_train_timesteps in {file}", config.get("num_train_timesteps", 1), 1, MAX_TRAIN_TIMESTEPS)
        with refusing(file):
            component.from_config(config)


class StrictLoadingMixin(PushWithCardMixin):
    """A `from_pretrained` that checks a checkpoint before it takes memory for it, and loads all of it or nothing."""

    # Names of a checkpoint in one file and of the index of several, in the order in which the library looks for them.
    _weight_files: ClassVar[tuple[str, str]]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load config and weights from a folder or from the Hub, strictly and never from a pickle.

        Pass `output_loading_info=True`, `ignore_mismatched_sizes=True` or a `state_dict` to load whatever fits.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a repository on the Hub.
            kwargs: the arguments of `from_pretrained` of the base class.

        Returns:
            The model in evaluation mode; with `output_loading_info=True` a tuple of it and the loading info.

        Raises:
            ValueError: if the config is malformed or has unknown fields; if a file of weights is damaged; if weights
                are missing, unexpected or of another shape; if `use_safetensors=False` is asked for.
            OSError: if there is no such checkpoint, or none in safetensors files.
        """
        source = pretrained_model_name_or_path
        if source is not None or kwargs.get("state_dict") is None:
            check_source(source)
        only_safetensors(kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        is_lenient = with_info or kwargs.get("ignore_mismatched_sizes") or kwargs.get("state_dict") is not None
        if source is not None and os.path.isdir(source) and kwargs.get("subfolder"):
            source = os.path.join(source, kwargs.pop("subfolder"))
        # GGUF and FlashPack are formats of their own, which the libraries read and check.
        if source is not None and not kwargs.get("gguf_file") and not kwargs.get("use_flashpack"):
            kwargs.update(cls._check_checkpoint(source, args, kwargs, is_lenient))
        if not is_lenient:
            kwargs["ignore_mismatched_sizes"] = True  # reported below, by name
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if not is_lenient:
            check_loading_info(cls.__name__, source, info)
        try:
            model.check_weights()
        except ValueError as error:
            raise ValueError(f"{source} must hold legal weights of {cls.__name__}, got: {error}") from error
        return (model, info) if with_info else model

    def check_weights(self) -> None:
        """Raise a ValueError for weights that no model of this class has. By default any values are legal."""

    @classmethod
    def _build(cls, source: Any, config_file: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
        """A model as `from_pretrained` would build it."""
        raise NotImplementedError

    @classmethod
    def _check_checkpoint(
        cls, source: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_lenient: bool
    ) -> dict[str, Any]:
        """Check the config of a checkpoint, and the headers of its files against the model of that config.

        Returns:
            `dict`: arguments that make the library load the very files that were checked.
        """
        check_source(source)
        # transformers takes a file of weights with a config object.
        is_weights = kwargs.get("config") is not None and str(source).endswith(".safetensors")
        if os.path.isfile(source) and not is_weights:
            raise ValueError(f"{source} must be a folder or a repository on the Hub, got a file")
        config_file = None
        if kwargs.get("config") is None:
            config_file = find_file(source, CONFIG_FILE, kwargs)
            if config_file is None and find_file(source, ADAPTER_CONFIG, kwargs) is not None:
                return {}  # transformers loads the model that the adapter names
            if config_file is None:
                raise _missing(source, CONFIG_FILE, kwargs)
        with torch.device("meta"):
            model = cls._build(source, config_file, args, kwargs)
        expected = model.state_dict()

        files = cls._find_weights(source, kwargs)
        # transformers prefers a distributed checkpoint, whose files hold parts of tensors, to any other.
        distributed = sorted(Path(source).glob(DISTRIBUTED_FILES)) if os.path.isdir(source) else []
        if not files and not distributed:
            error = _missing(source, _with_variant(min(cls._weight_files, key=len), kwargs.get("variant")), kwargs)
            raise OSError(f"{error} Weights are loaded from safetensors files only, never from pickles (.bin).")
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path, names in files.items():
            header = read_header(path)
            if names is not None and set(header) != names:
                wrong = shown(sorted(set(header) ^ names))
                raise ValueError(f"{path} must hold the tensors that the index names, got a difference in {wrong}")
            found.update(header)
        for path in distributed:
            read_header(path)
        is_quantized = getattr(model.config, "quantization_config", None) is not None
        if files and not (is_lenient or is_quantized or kwargs.get("key_mapping")):
            check_loading_info(cls.__name__, source, _difference(cls, source, found, expected))
        num_parameters = sum(tensor.numel() for tensor in expected.values())
        num_bytes = sum(path.stat().st_size for path in [*files, *distributed])
        if num_parameters > MAX_PARAMETERS_PER_BYTE * num_bytes + (MAX_FRESH_PARAMETERS if is_lenient else 0):
            raise ValueError(
                f"{config_file or source} must describe the model of its weights, "
                f"got one of {num_parameters} parameters for files of {num_bytes} bytes"
            )
        commit = None if os.path.exists(source) else extract_commit_hash(str(next(iter(files))), None)
        if commit is None:
            return {}
        return {"revision": commit, "local_files_only": True, "force_download": False}

    @classmethod
    def _find_weights(cls, source: Any, kwargs: Mapping[str, Any]) -> dict[Path, set[str] | None]:
        """The files of a checkpoint, each with the tensors that an index says it holds; none if there are none."""
        if os.path.isfile(source):
            return {Path(source): None}
        for name in cls._weight_files:
            path = find_file(source, _with_variant(name, kwargs.get("variant")), kwargs)
            if path is None:
                continue
            if name.endswith(".safetensors"):
                return {path: None}
            files: dict[Path, set[str] | None] = {}
            for shard, names in read_index(path).items():
                shard_file = find_file(source, shard, kwargs)
                if shard_file is None:
                    raise _missing(source, shard, kwargs)
                files[shard_file] = names
            return files
        return {}


class StrictTransformersMixin(StrictLoadingMixin):
    """[`StrictLoadingMixin`] for models of transformers."""

    _weight_files = ("model.safetensors", "model.safetensors.index.json")
    save_pretrained = save_with_card(PreTrainedModel.save_pretrained)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """[`StrictLoadingMixin.from_pretrained`]; `dtype=None`, as diffusers passes it to components, is float32."""
        if "dtype" in kwargs and kwargs["dtype"] is None:
            kwargs["dtype"] = torch.float32
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _build(cls, source: Any, config_file: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
        config = kwargs.get("config")
        config_class = cls.config_class  # type: ignore[attr-defined]
        if not isinstance(config, PreTrainedConfig):
            own = {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}
            given = {name: value for name, value in kwargs.items() if name in own}
            if kwargs.get("subfolder"):
                given["subfolder"] = kwargs["subfolder"]
            config = config_class.from_pretrained(
                source if config is None else config, **given, **hub_arguments(kwargs)
            )
        with refusing(config_file or source):
            return cls(copy.deepcopy(config), *args, **_constructor_arguments(cls, kwargs))  # type: ignore[call-arg]

    def load_adapter(self, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Load a PEFT adapter as transformers does, but never from a pickle.

        Raises:
            ValueError: if the adapter is not in a safetensors file.
        """
        arguments = getattr(kwargs.get("load_config"), "download_kwargs", None) or kwargs
        if peft_model_id is not None and find_file(peft_model_id, ADAPTER_WEIGHTS, arguments) is None:
            raise ValueError(f"{peft_model_id} must hold {ADAPTER_WEIGHTS} (pickles are never loaded), got none")
        return super().load_adapter(peft_model_id, *args, **kwargs)  # type: ignore[misc]


class StrictDiffusersMixin(CheckedConfigMixin, StrictLoadingMixin):
    """[`StrictLoadingMixin`] for models of diffusers."""

    _weight_files = ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors")
    save_pretrained = save_with_card(ModelMixin.save_pretrained)

    @classmethod
    def _build(cls, source: Any, config_file: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
        config = cls.check_config_file(config_file)
        with refusing(config_file):
            return cls.from_config(config, **_constructor_arguments(cls, kwargs))  # type: ignore[attr-defined]


class SafetensorsAdapterMixin(PeftAdapterMixin):
    """LoRAs of a model of diffusers, from safetensors files only."""

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a LoRA as diffusers does, but never from a pickle.

        Raises:
            ValueError: if the file is a pickle.
        """
        only_safetensors(kwargs)
        name = kwargs.get("weight_name")
        if name is not None and not name.endswith(".safetensors"):
            raise ValueError(f"weight_name must end in .safetensors (pickles are never loaded), got {shown(name)}")
        return super().load_lora_adapter(pretrained_model_name_or_path_or_dict, *args, **kwargs)


def _with_variant(name: str, variant: str | None) -> str:
    """`model.safetensors` -> `model.fp16.safetensors`."""
    stem, suffix = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _missing(source: Any, name: str, arguments: Mapping[str, Any]) -> OSError:
    """The error for a file that is not there, or that cannot be reached: the library's own says why."""
    if name == CONFIG_FILE and find_file(source, PIPELINE_INDEX, arguments) is not None:
        # diffusers looks here for the component of a folder that is missing.
        return OSError(
            f"{source} must hold a model with a {name}, got a pipeline. Load it with GPSTokenPipeline, name the "
            "folder of a component as subfolder, or restore the folder of a component that is missing."
        )
    try:
        require_file(source, name, arguments)
    except OSError as error:
        return error
    return OSError(f"{source} does not appear to have a file named {name}.")


def _constructor_arguments(cls: type, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that the constructor of a model takes."""
    parameters = set(inspect.signature(cls.__init__).parameters) - {"self", "config"}  # type: ignore[misc]
    return {name: value for name, value in kwargs.items() if name in parameters}


def _difference(
    cls: type, source: Any, found: Mapping[str, tuple[str, tuple[int, ...]]], expected: Mapping[str, torch.Tensor]
) -> dict[str, list]:
    """How the headers of a checkpoint differ from the weights of a model, as loading info."""
    # transformers takes the weights of a base model with and without its prefix.
    prefix = f"{getattr(cls, 'base_model_prefix', '')}."
    shapes = {name.removeprefix(prefix): (dtype, shape) for name, (dtype, shape) in found.items()}
    tensors = {name.removeprefix(prefix): tensor for name, tensor in expected.items()}
    mismatched = []
    for name in sorted(tensors.keys() & shapes.keys()):
        dtype, shape = shapes[name]
        if shape != tuple(tensors[name].shape):
            mismatched.append((name, shape, tuple(tensors[name].shape)))
        elif (dtype in FLOATING_DTYPES) != tensors[name].is_floating_point():
            raise ValueError(f"{name} in {source} must be of a dtype like {tensors[name].dtype}, got {dtype}")
    return {
        "missing_keys": list(tensors.keys() - shapes.keys()),
        "unexpected_keys": list(shapes.keys() - tensors.keys()),
        "mismatched_keys": mismatched,
    }
