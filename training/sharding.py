# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Models in shards over processes: FSDP and DeepSpeed, as `accelerate launch --config_file` asks for them.

FSDP is torch's `fully_shard` itself, so it also runs on CPUs and beside a discriminator that is not sharded.
DeepSpeed runs through accelerate. Only the module "model" of a task is sharded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipelines.shared.programs import ProgramError

MODEL, OPTIMIZER = "sharded_model.safetensors", "sharded_optimizer.bin"
DEEPSPEED = "deepspeed"


def take_fsdp_request() -> bool:
    """True if accelerate's configuration asks for FSDP. Accelerate itself then no longer sees it.

    Raises:
        ProgramError: If it asks for the first version of FSDP, or for DeepSpeed without the package.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec(DEEPSPEED) is None:
        raise ProgramError(
            "the accelerate configuration asks for DeepSpeed, which is not installed: pip install deepspeed"
        )
    if not _is_set("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise ProgramError(f"fsdp_version must be 2, got {os.environ['FSDP_VERSION']}")
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return True


def _is_set(name: str, default: str = "false") -> bool:
    return os.environ.get(name, default).lower() in ("1", "true", "yes")


def shard_model(module: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """Shard a module in place: every block is a unit, and what lies outside of the blocks is another.

    The blocks are the classes that the configuration names in `fsdp_transformer_layer_cls_to_wrap`, or those that the
    model must not split (`_no_split_modules`).
    """
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    classes = set(filter(None, (name.strip() for name in named.split(","))))
    if not classes:
        classes = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "reshard_after_forward": _is_set("FSDP_RESHARD_AFTER_FORWARD", "true"),
        "offload_policy": CPUOffloadPolicy() if _is_set("FSDP_OFFLOAD_PARAMS") else OffloadPolicy(),
    }
    module.to(accelerator.device)
    for part in module.modules():
        if type(part).__name__ in classes:
            fully_shard(part, **settings)
    if accelerator.mixed_precision == "bf16":
        forward = module.forward

        def in_mixed_precision(*args: Any, **kwargs: Any) -> Any:
            with accelerator.autocast():
                return forward(*args, **kwargs)

        module.forward = convert_outputs_to_fp32(in_mixed_precision)
    return fully_shard(module, **settings)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from its shards. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@contextlib.contextmanager
def gathered_by_deepspeed(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Have the parameters whole for the length of the block, where ZeRO-3 has cut them up."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
        yield


def set_micro_batch(accelerator: Accelerator, batch_size: int) -> None:
    """DeepSpeed wants to know the batch size, which it would else take from a loader that accelerate prepares."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size


def save_shards(folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, is_main: bool) -> None:
    """Write model and optimizer, gathered. All processes must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(module, optimizer, options=options)
    if is_main:
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / MODEL)
        torch.save(moments, folder / OPTIMIZER)


def load_shards(folder: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read what `save_shards` has written; the number of processes may be another."""
    set_state_dict(
        module,
        optimizer,
        model_state_dict=load_file(folder / MODEL),
        optim_state_dict=torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True),
        options=StateDictOptions(full_state_dict=True),
    )
