# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Reads untrusted files: first the header, then checks of its sizes, then the contents.

A JSON file is read up to a limit and must be an object with known fields. A safetensors header is bounded before it is
parsed. Every file that is not what it should be is one ValueError with its name; missing files and unreachable
repositories are OSErrors, as everywhere in transformers and diffusers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import cached_file

# A thousand class names take 40 KB in a `model_index.json`, the index of a thousand layers 2 MB.
MAX_JSON_BYTES = 4 * 2**20
MAX_JSON_DEPTH = 32
# About 100 bytes for each tensor.
MAX_HEADER_BYTES = 16 * 2**20
# No quantization packs more than 8 numbers into a byte.
MAX_PARAMETERS_PER_BYTE = 8
# Schedulers make tables of this length.
MAX_TRAIN_TIMESTEPS = 10**6
# What a caller who takes a checkpoint that does not fit may have initialised instead.
MAX_FRESH_PARAMETERS = 2**30

FLOATING_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
CONFIG_FILE, SCHEDULER_CONFIG, PIPELINE_INDEX = "config.json", "scheduler_config.json", "model_index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DISTRIBUTED_FILES = "shard-*.safetensors"
# What both libraries write into configs without declaring it.
UNDECLARED_FIELDS = {"auto_map", "quantization_config"}

# -- JSON files and their fields


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read an untrusted JSON file.

    Args:
        path (`str` or `os.PathLike`): the file, of at most `MAX_JSON_BYTES`.

    Returns:
        `dict`: the object that it holds, nested at most `MAX_JSON_DEPTH` levels deep.

    Raises:
        ValueError: if the file is larger or nested deeper, is not JSON in UTF-8, has a key twice or is not an object.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{path} must be at most {MAX_JSON_BYTES} bytes of JSON, got more")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file, got: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent)]
        level = [child for child in level if isinstance(child, dict | list)]
    if level:
        raise ValueError(f"{path} must be nested at most {MAX_JSON_DEPTH} levels deep, got more")
    return value


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, entry in pairs:
        if name in value:
            raise ValueError(f"the key {shown(name)} twice")
        value[name] = entry
    return value


def shown(value: Any) -> str:
    """A value of a file in a message, cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


def check_fields(path: str | os.PathLike[str], config: Mapping[str, Any], class_name: str, known: set[str]) -> None:
    """Refuse fields of a config that its class does not know.

    A field of a later version would otherwise be ignored, and the model would silently be another one.

    Raises:
        ValueError: if a field is unknown, or one of the libraries' fields has a wrong type.
    """
    unknown = sorted(set(config) - known)
    if unknown:
        saved_by = config.get("_class_name", config.get("model_type"))
        raise ValueError(
            f"{path} must hold fields of {class_name} only, got {', '.join(map(shown, unknown[:5]))}"
            + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            + (f" in a config of {shown(saved_by)}" if isinstance(saved_by, str) else "")
        )
    quantization = config.get("quantization_config")
    if quantization is not None and not (
        isinstance(quantization, dict) and isinstance(quantization.get("quant_method"), str)
    ):
        raise ValueError(
            f"{path}: quantization_config must be an object with a quant_method, got {shown(quantization)}"
        )
    for name in ("_class_name", "_diffusers_version", "transformers_version", "architectures"):
        value = config.get(name)
        parts = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{path}: {name} must be a name or a list of names, got {shown(value)}")


def transformers_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """The fields that a saved config of this class may have: its own, and those of transformers."""
    declared = {field.name for field in fields(config_class)}
    settable = {name for name, value in vars(PreTrainedConfig).items() if isinstance(value, property) and value.fset}
    # Settings of text generation, which transformers takes out of every config; its Trainer writes `use_cache`.
    generation = set(GenerationConfig().to_dict())
    # What is private does not come from files: it would choose the code that runs. transformers adds the commit.
    public = {name for name in declared | settable | generation if not name.startswith("_")}
    return public | UNDECLARED_FIELDS | {"model_type", "tie_word_embeddings", "_commit_hash"}


@contextmanager
def refusing(what: str | os.PathLike[str]) -> Iterator[None]:
    """Turn every error that values of a file can cause in a constructor into one ValueError that names the file."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{what} must hold legal values, got: {str(error)[:1000]}") from error


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise a ValueError unless a value is a number from `low` to `high`, and an integer if both limits are.

    Booleans are no numbers.
    """
    is_whole = isinstance(low, int) and isinstance(high, int)
    is_number = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
    # NaN is in no range.
    if not is_number or not low <= value <= high:
        kind = "an integer" if is_whole else "a number"
        # Python refuses to print an integer of more than 4300 digits.
        got = "a longer one" if isinstance(value, int) and abs(value) >= 10**20 else shown(value)
        raise ValueError(f"{name} must be {kind} from {low} to {high}, got {got}")


def check_statistics(
    names: tuple[str, str], mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> None:
    """Raise a ValueError unless mean and standard deviation are both `None` or both hold a number per channel.

    Args:
        names (`tuple[str, str]`): what the two are called.
        mean, std (`Sequence[float]`, *optional*): finite numbers; `std` above 0.
        channels (`int`): how many numbers each must hold.
    """
    if mean is None and std is None:
        return
    if mean is None or std is None:
        raise ValueError(
            f"{names[0]} and {names[1]} must be given together, got only {names[0] if std is None else names[1]}"
        )
    for name, values, low in ((names[0], mean, -MAX_STATISTIC), (names[1], std, MIN_STD)):
        if not isinstance(values, list | tuple) or len(values) != channels:
            found = len(values) if isinstance(values, list | tuple) else shown(values)
            raise ValueError(f"{name} must hold {channels} numbers, one per channel, got {found}")
        for value in values:
            check_number(f"every entry of {name}", value, low, MAX_STATISTIC)


# Statistics outside of float32 would become 0 or infinite.
MAX_STATISTIC, MIN_STD = 1e38, 1e-38


# -- safetensors files


def read_header(path: str | os.PathLike[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names of the tensors of a safetensors file -> `(dtype, shape)`, without reading the tensors.

    Raises:
        ValueError: if the header is larger than `MAX_HEADER_BYTES`, or the file is damaged.
    """
    with open(path, "rb") as start:
        claimed = int.from_bytes(start.read(8), "little")
    if MAX_HEADER_BYTES < claimed < os.path.getsize(path):
        raise ValueError(f"{path} must have a header of at most {MAX_HEADER_BYTES} bytes, got {claimed}")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, got a damaged one: {error}") from error


def read_index(path: str | os.PathLike[str]) -> dict[str, set[str]]:
    """The index of a sharded checkpoint: file names -> the names of the tensors in each.

    Raises:
        ValueError: if it is not such an index, or names something else than safetensors files beside it.
    """
    index = read_json(path)
    names, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(names, dict) or not names or not isinstance(metadata, dict):
        raise ValueError(f"{path} must hold the objects weight_map and metadata, got {shown(sorted(index))}")
    if not all(isinstance(value, int | float) for value in metadata.values()):
        raise ValueError(f"{path}: metadata must hold numbers, got {shown(metadata)}")
    shards: dict[str, set[str]] = {}
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path} must name safetensors files beside it, got {shown(file)}")
        shards.setdefault(file, set()).add(name)
    return shards


# -- where files are


def check_source(source: Any) -> None:
    """Refuse anything but a folder or the name of a repository; the name of a bundled checkpoint gets a hint."""
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"pretrained_model_name_or_path must be a folder or a repository on the Hub, got {shown(source)}"
        )
    folder = Path(__file__).parent / "bundled"
    name = str(source)
    if folder.is_dir() and name in os.listdir(folder) and not os.path.exists(name):
        raise OSError(
            f"{name} must be a folder or a repository on the Hub (owner/name), got the name of a bundled checkpoint: "
            f'use from_pretrained(gpstoken_hf.bundled("{name}"))'
        )


def find_file(source: Any, name: str, arguments: Mapping[str, Any]) -> Path | None:
    """A file of a folder or of a repository on the Hub, downloaded if need be; `None` if it is not there.

    Args:
        source (`str` or `os.PathLike`): the folder or the repository.
        name (`str`): name of the file.
        arguments (`Mapping`): those of `from_pretrained`; what concerns the Hub and `subfolder` are used.
    """
    found = cached_file(
        source,
        name,
        subfolder=arguments.get("subfolder") or "",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_arguments(arguments),
    )
    return None if found is None else Path(found)


def require_file(source: Any, name: str, arguments: Mapping[str, Any]) -> None:
    """Raise the OSError of transformers, which says why, if a file is not there or cannot be reached.

    Args:
        source, name, arguments: as for `find_file`.
    """
    cached_file(source, name, subfolder=arguments.get("subfolder") or "", **hub_arguments(arguments))


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in HUB_ARGUMENTS if arguments.get(name) is not None}


def check_json_files(source: Any, names: Iterable[str], arguments: Mapping[str, Any]) -> None:
    """Read a JSON file, or those of the names that a folder or repository has: ValueError if one is malformed."""
    check_source(source)
    is_file = os.path.isfile(source)
    for path in [source] if is_file else [find_file(source, name, arguments) for name in names]:
        if path is not None:
            read_json(path)


def only_safetensors(arguments: dict[str, Any]) -> None:
    """Set `use_safetensors=True`.

    Raises:
        ValueError: if the caller asks for pickles.
    """
    if arguments.get("use_safetensors") not in (None, True):
        raise ValueError(
            f"use_safetensors must be True (pickles are never loaded), got {arguments['use_safetensors']}"
        )
    arguments["use_safetensors"] = True
