# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Loading checkpoints strictly: a file that is damaged or holds other weights is one clear ValueError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError


@contextmanager
def readable_weights(source: Any) -> Iterator[None]:
    """Turn the error of a damaged safetensors file into a ValueError that names the checkpoint."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        # diffusers hides it behind an OSError, and that behind the error of reading the file as text.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SafetensorError):
            cause = cause.__context__
        if cause is None:
            raise
        raise ValueError(
            f"the weights of {source} must be whole safetensors files, got a damaged one: {cause}"
        ) from error


def check_loading_info(class_name: str, source: Any, info: dict[str, Any]) -> None:
    """Raise ValueError unless a checkpoint held exactly the weights of its model.

    Args:
        info: the loading info of transformers or diffusers, with `missing_keys`, `unexpected_keys` and
            `mismatched_keys`, the last of `(key, shape in the checkpoint, shape in the model)`.
    """
    mismatched = [
        f"{key} {tuple(found)} instead of {tuple(expected)}" for key, found, expected in info["mismatched_keys"]
    ]
    problems = []
    for kind, keys in (
        ("missing", info["missing_keys"]),
        ("unexpected", info["unexpected_keys"]),
        ("of another shape", mismatched),
    ):
        if keys:
            shown = sorted(keys)
            more = f", and {len(shown) - 5} more" if len(shown) > 5 else ""
            problems.append(f"{len(shown)} {kind} ({', '.join(shown[:5])}{more})")
    if problems:
        raise ValueError(f"expected exactly the weights of {class_name} in {source}, got: {'; '.join(problems)}")
