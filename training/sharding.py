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
from accelerate.utils import DistributedType, GradientAccumulationPlugin, convert_outputs_to_fp32
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import unset_hf_deepspeed_config

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


class TrainingAccelerator(Accelerator):
    """An `Accelerator` under which the options of a program hold with DeepSpeed as they do without it.

    DeepSpeed counts the micro-batches of a step and clips gradients by itself, whatever the options say. In mixed
    precision it would keep the weights in bfloat16, and their average would be one of rounded weights: here they stay
    in float32 and only operations are in bfloat16, as with DDP and FSDP.

    Args:
        batch_size (`int`): Of a micro-batch of one process.
        accumulation_steps (`int`): Micro-batches of a step.
        max_norm (`float`): The norm to which gradients are clipped.
        mixed_precision (`str`): "no", "fp16" or "bf16"; "fp16" not with DeepSpeed.
        settings: Those of `Accelerator`.
    """

    def __init__(
        self, batch_size: int, accumulation_steps: int, max_norm: float, mixed_precision: str, **settings: Any
    ) -> None:
        # Not as a number, which a variable of `accelerate launch` would overrule.
        accumulation = GradientAccumulationPlugin(num_steps=accumulation_steps)
        super().__init__(mixed_precision=mixed_precision, gradient_accumulation_plugin=accumulation, **settings)
        self.with_deepspeed = self.distributed_type == DistributedType.DEEPSPEED
        self.has_own_autocast = self.with_deepspeed and mixed_precision == "bf16"
        if self.with_deepspeed:
            self.state.deepspeed_plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": batch_size,
                "gradient_accumulation_steps": accumulation_steps,
                "gradient_clipping": max_norm,
                "bf16": {"enabled": False},
            }
            # With ZeRO-3, transformers would cut up every model that is loaded, a frozen one as well.
            unset_hf_deepspeed_config()

    def autocast(self, *arguments: Any, **settings: Any) -> Any:
        """As accelerate's, and with DeepSpeed, too."""
        if self.has_own_autocast:
            return torch.autocast(self.device.type, torch.bfloat16)
        return super().autocast(*arguments, **settings)


def compute_in_mixed_precision(module: torch.nn.Module, accelerator: Accelerator) -> None:
    """Have a module compute in the mixed precision of the run and return float32, where accelerate leaves it alone."""
    forward = module.forward

    def in_mixed_precision(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    module.forward = convert_outputs_to_fp32(in_mixed_precision)


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
        compute_in_mixed_precision(module, accelerator)
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
