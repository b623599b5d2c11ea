# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Results of evaluations as JSON files that hold their protocol, and a comparison that refuses differing protocols.

    {
      "format": 1,
      "protocol": {"images": 100, "resolution": 64, "resize": "bicubic", ...},
      "run": {"command": ..., "versions": ..., ...},
      "results": [{"name": "gpstoken-nano, 32 tokens", "psnr": 23.4, ...}, ...],
      "warnings": [...]
    }

Two numbers can be compared if the protocols are equal. What is under "run" may differ: the command, the versions, the
device.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .file_checks import read_json

FORMAT = 1
RECORDED_PACKAGES = (
    "gpstoken-hf",
    "torch",
    "torchvision",
    "transformers",
    "diffusers",
    "numpy",
    "pillow",
    "torch-fidelity",
    "lpips",
    "timm",
)
# Numbers by which the rows of a comparison are described, not scored.
DESCRIPTIVE = ("tokens", "floats", "bits")


def make_result(
    protocol: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    command: Sequence[str] | None = None,
    warnings: Iterable[str] = (),
    **run: Any,
) -> dict[str, Any]:
    """A result as it is written to JSON.

    Args:
        protocol (`Mapping[str, Any]`): how the numbers were measured, by name. Every value must be JSON.
        results (`Sequence[Mapping[str, Any]]`): one entry for each thing that was measured, each with a "name".
        command (`Sequence[str]`, *optional*): the command line; by default that of this process.
        warnings (`Iterable[str]`, *optional*): what a reader of the numbers must know.
        run: more entries of "run", such as `device`.

    Returns:
        `dict`: with "format", "protocol", "run", "results" and "warnings".

    Raises:
        ValueError: if an entry has no name or two have the same.

    Examples:
        ```python
        >>> from gpstoken_hf.evaluation_results import make_result

        >>> result = make_result({"images": 100}, [{"name": "a model", "psnr": 24.1}])
        >>> result["protocol"], sorted(result["run"])
        ({'images': 100}, ['command', 'python', 'versions'])

        ```
    """
    names = [entry.get("name") for entry in results]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"results must have different names, got {names}")
    return {
        "format": FORMAT,
        "protocol": dict(protocol),
        "run": {
            "command": list(sys.argv if command is None else command),
            "python": platform.python_version(),
            "versions": _versions(),
            **run,
        },
        "results": [dict(entry) for entry in results],
        "warnings": list(dict.fromkeys(warnings)),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the build
    return found


def write_result(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Write a result as JSON. Infinite numbers become the strings "Infinity" and "-Infinity", NaN becomes null.

    Args:
        path (`str` or `os.PathLike`): the file, which is replaced.
        result (`Mapping[str, Any]`): what `make_result` returns.
    """
    text = json.dumps(_plain(result), indent=2, allow_nan=False, ensure_ascii=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a result that `write_result` has written.

    Args:
        path (`str` or `os.PathLike`): the file.

    Returns:
        `dict`: with "format", "protocol", "run", "results" and "warnings".

    Raises:
        ValueError: if the file is not such a result.
        OSError: if it cannot be read.
    """
    result = read_json(path)
    if result.get("format") != FORMAT:
        raise ValueError(f"{path} must be a result of format {FORMAT}, got format {result.get('format')!r}")
    protocol, results = result.get("protocol"), result.get("results")
    if not isinstance(protocol, dict) or not isinstance(results, list):
        raise ValueError(f"{path} must hold a protocol and results, got {', '.join(sorted(result))}")
    if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in results):
        raise ValueError(f"{path} must hold results with names, got others")
    result["results"] = [_numbers(entry) for entry in results]
    return result


def compare(
    first: Mapping[str, Any] | str | os.PathLike[str],
    second: Mapping[str, Any] | str | os.PathLike[str],
    ignore: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Compare two results of one protocol.

    Args:
        first, second (`Mapping` or `str` or `os.PathLike`): results, or the JSON files that hold them.
        ignore (`Iterable[str]`, *optional*): fields of the protocol that may differ.

    Returns:
        `list[dict]`: for each number of an entry that both results have: "name" (of the entry), "metric", "first",
        "second" and "difference" (second less first). Without an entry of the same name in both, results of one entry
        each are compared.

    Raises:
        ValueError: if the protocols differ; the message names the fields and their values. If no entry is in both.

    Examples:
        ```python
        >>> from gpstoken_hf.evaluation_results import compare, make_result

        >>> protocol = {"images": 100, "resize": "bicubic"}
        >>> first = make_result(protocol, [{"name": "32 tokens", "psnr": 23.25}])
        >>> second = make_result(protocol, [{"name": "32 tokens", "psnr": 23.75}])
        >>> compare(first, second)
        [{'name': '32 tokens', 'metric': 'psnr', 'first': 23.25, 'second': 23.75, 'difference': 0.5}]
        >>> other = make_result({**protocol, "resize": "bilinear"}, [{"name": "32 tokens", "psnr": 24.0}])
        >>> compare(first, other)
        Traceback (most recent call last):
        ...
        ValueError: protocols must be equal to be compared, got resize 'bicubic' and 'bilinear'

        ```
    """
    one, two = (read_result(value) if isinstance(value, str | os.PathLike) else value for value in (first, second))
    differing = protocol_differences(one["protocol"], two["protocol"], ignore)
    if differing:
        pairs = ", ".join(f"{name} {_shown(a)} and {_shown(b)}" for name, a, b in differing)
        raise ValueError(f"protocols must be equal to be compared, got {pairs}")
    entries = {entry["name"]: entry for entry in two["results"]}
    pairs_of = [(entry, entries[entry["name"]]) for entry in one["results"] if entry["name"] in entries]
    if not pairs_of and len(one["results"]) == len(two["results"]) == 1:
        pairs_of = [(one["results"][0], two["results"][0])]
    if not pairs_of:
        names = [", ".join(entry["name"] for entry in result["results"]) for result in (one, two)]
        raise ValueError(f"results must have an entry of the same name, got {names[0]} and {names[1]}")
    rows = []
    for a, b in pairs_of:
        for metric, value in a.items():
            other = b.get(metric)
            if metric not in DESCRIPTIVE and _is_number(value) and _is_number(other):
                # Equal infinite values differ by 0, not by NaN.
                difference = 0.0 if value == other else other - value
                rows.append(
                    {"name": a["name"], "metric": metric, "first": value, "second": other, "difference": difference}
                )
    return rows


def protocol_differences(
    first: Mapping[str, Any], second: Mapping[str, Any], ignore: Iterable[str] = ()
) -> list[tuple[str, Any, Any]]:
    """The fields in which two protocols differ.

    Args:
        first, second (`Mapping[str, Any]`): protocols. A field of a nested object is named `outer.inner`.
        ignore (`Iterable[str]`, *optional*): fields that may differ.

    Returns:
        `list[tuple[str, Any, Any]]`: name and both values, sorted by name; "absent" for a value that is not there.
    """
    ignored = set(ignore)
    flat = [_flat(_plain(protocol)) for protocol in (first, second)]
    names = sorted({*flat[0], *flat[1]})
    rows = [(name, flat[0].get(name, "absent"), flat[1].get(name, "absent")) for name in names]
    return [row for row in rows if row[1] != row[2] and row[0] not in ignored and row[0].split(".")[0] not in ignored]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, Mapping):
            found |= _flat(entry, f"{prefix}{name}.")
        else:
            found[prefix + name] = entry
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """Lists for tuples, and strings for infinite numbers, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _numbers(entry: dict[str, Any]) -> dict[str, Any]:
    infinite = {"Infinity": math.inf, "-Infinity": -math.inf}
    return {name: infinite.get(value, value) if isinstance(value, str) else value for name, value in entry.items()}
