# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Find, load and fingerprint the models that programs run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import diffusers
import torch
import transformers

import gpstoken_hf
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline

from .programs import ProgramError

DEFAULT_MODEL = "gpstoken-nano"
DEFAULT_PIPELINE = "gpstoken-digits"


def find_checkpoint(name: str, option: str) -> str:
    """What `from_pretrained` takes for a folder, a Hub repository or the name of a bundled checkpoint.

    Args:
        name (`str`): The value that the user gave. A folder wins over a bundled checkpoint of the same name.
        option (`str`): Names the option in the error message.

    Raises:
        ProgramError: If `name` is none of these.
    """
    if name and Path(name).is_dir():
        return name
    bundled = sorted(entry.name for entry in (files(gpstoken_hf) / "bundled").iterdir() if entry.is_dir())
    if name in bundled:
        return gpstoken_hf.bundled(name)
    if name.count("/") == 1 and not name.startswith("."):
        return name
    raise ProgramError(
        f"{option} must be a folder, a Hub repository owner/name or one of {', '.join(bundled)}, got {name}"
    )


def load_tokenizer(name: str, device: str | torch.device, option: str = "--model") -> GPSTokenModel:
    """The tokenizer that `find_checkpoint` finds, in float32 and evaluation mode on `device`.

    On a CPU, convolutions in float16, the dtype of converted checkpoints, take a hundred times as long.

    Raises:
        ValueError: If there is no such checkpoint, or its weights are not those of the model.
    """
    with quiet_loading():
        model = GPSTokenModel.from_pretrained(find_checkpoint(name, option), dtype=torch.float32)
    return model.eval().to(device)


def load_pipeline(
    name: str, dtype: torch.dtype, device: str | torch.device, option: str = "--pipeline"
) -> GPSTokenPipeline:
    """The pipeline that `find_checkpoint` finds, in `dtype` on `device`, without progress bars of its own.

    Raises:
        ValueError: If there is no such checkpoint, or its weights are not those of the models.
    """
    with quiet_loading():
        pipeline = GPSTokenPipeline.from_pretrained(find_checkpoint(name, option))
    pipeline.set_progress_bar_config(disable=True)
    if dtype != torch.float32:
        pipeline.to(dtype)
    return pipeline.to(device)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the bars and key tables of transformers and diffusers. What is wrong is said in one line."""
    modules = (diffusers.utils.logging, transformers.utils.logging)
    shown = [module for module in modules if module.is_progress_bar_enabled()]
    levels = [(module, module.get_verbosity()) for module in modules]
    for module in modules:
        module.disable_progress_bar()
        module.set_verbosity_error()
    try:
        yield
    finally:
        for module, level in levels:
            module.set_verbosity(level)
        for module in shown:
            module.enable_progress_bar()


def weights_fingerprint(*modules: torch.nn.Module | None) -> str:
    """A hash of all weights of the modules, their names and types. `None` stands for a module that is absent.

    The bytes are hashed where they lie; only those on another device are copied, one tensor at a time.
    """
    digest = hashlib.sha256()
    for place, module in enumerate(modules):
        for name, tensor in sorted(module.state_dict().items()) if module is not None else ():
            digest.update(f"{place}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
