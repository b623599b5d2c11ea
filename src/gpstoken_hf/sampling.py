# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What a stage of sampling is made of: noise, steps of any flow scheduler, latents -> tokens.

`GPSTokenPipeline` and the blocks of `modular_gpstoken` put these together. Shapes: B batch, L tokens, C texture
channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .configuration_gpstoken import GPSTokenConfig
from .layout import GaussianLayout
from .transformer_sit import TIMESTEP_SCALE, SiTTransformer1DModel, latents_to_tokens

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None


def check_num_steps(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is a number of steps."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value}")


def check_generators(generator: Generators, batch_size: int) -> None:
    """Raise a ValueError unless there is one generator, or one per image."""
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"generator must be one or a list of {batch_size}, one per label, got {len(generator)}")


def check_flow_scheduler(name: str, scheduler: Any) -> None:
    """Raise a ValueError for a scheduler of models that predict anything but a flow.

    Args:
        name (`str`): name of the component.
        scheduler (`~diffusers.SchedulerMixin`): the scheduler.
    """
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction":
        raise ValueError(
            f"{name} must be a flow scheduler (prediction_type='flow_prediction'), "
            f"got {type(scheduler).__name__} with prediction_type={prediction!r}"
        )


def initial_noise(
    name: str, latents: torch.Tensor | None, shape: tuple[int, ...], generator: Generators, device: torch.device
) -> torch.Tensor:
    """Given or drawn noise of a stage, float32 for any dtype of the model, as steps are summed in it.

    Args:
        name (`str`): the name of the argument, for the error.
        latents (`torch.Tensor` of shape `shape`, *optional*): the given noise.
        shape (`tuple[int, ...]`): `(B, L, channels)`.
        generator (`torch.Generator` or list of B of them, *optional*): source of drawn noise.
        device (`torch.device`): where the noise goes.

    Raises:
        ValueError: if `latents` have another shape.
    """
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if tuple(latents.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(latents.shape)}")
    return latents.to(device=device, dtype=torch.float32)


def stage_noise(
    name: str,
    transformer: SiTTransformer1DModel,
    layout: GaussianLayout | None,
    latents: torch.Tensor | None,
    labels: torch.Tensor,
    generator: Generators,
) -> torch.Tensor:
    """`initial_noise` in the shape that a transformer needs for a layout, or for none."""
    num_tokens = transformer.config.sample_size if layout is None else layout.gaussians.shape[1]
    shape = (len(labels), num_tokens, transformer.config.in_channels)
    return initial_noise(name, latents, shape, generator, labels.device)


def set_timesteps(scheduler: SchedulerMixin, num_steps: int, device: torch.device) -> torch.Tensor:
    """Set the steps of any flow scheduler and return its timesteps."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # Its default steps end at sigma 0.001, as in training. These are uniform and end one step before the data.
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist(), device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler.timesteps


def model_timesteps(scheduler: SchedulerMixin, timesteps: torch.Tensor) -> torch.Tensor:
    """Timesteps of a scheduler, `num_train_timesteps sigma`, -> those of the transformer, 1000 sigma."""
    num_train_timesteps = scheduler.config.num_train_timesteps
    return timesteps if num_train_timesteps == TIMESTEP_SCALE else timesteps * (TIMESTEP_SCALE / num_train_timesteps)


def counted_steps(timesteps: torch.Tensor, order: int, bar: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """Index and timestep of every step. The bar counts the steps that a caller asked for: one in `order`."""
    for i, timestep in enumerate(timesteps):
        yield i, timestep
        if (i + 1) % order == 0 or i + 1 == len(timesteps):
            bar.update()


def take_step(
    scheduler: SchedulerMixin,
    output: torch.Tensor,
    timestep: torch.Tensor,
    latents: torch.Tensor,
    generator: Generators,
) -> torch.Tensor:
    """One step of any scheduler: latents at a timestep and `noise - data` -> latents at the next timestep."""
    kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    return scheduler.step(output, timestep, latents, **kwargs, return_dict=False)[0]


def tokens_of(
    latents: torch.Tensor, transformer: SiTTransformer1DModel, tokenizer: GPSTokenConfig, layout: GaussianLayout | None
) -> torch.Tensor:
    """Latents of a stage -> tokens, by the statistics of its transformer or, if it has none, of the tokenizer.

    Args:
        latents (`torch.Tensor` of shape `(B, L, 5 + C)`): what the stage has sampled.
        transformer ([`SiTTransformer1DModel`]): the transformer of the stage.
        tokenizer ([`GPSTokenConfig`]): the config of the tokenizer.
        layout ([`GaussianLayout`], *optional*): the layout that offsets of Gaussians are added to.

    Returns:
        `torch.Tensor` of shape `(B, L, 5 + C)`, float32.
    """
    config = transformer.config
    is_offset = config.gaussian_target == "offset"
    owner = tokenizer if config.latents_mean is None and is_offset else config
    mean, std = torch.zeros(()), torch.ones(())
    if owner.latents_mean is not None:
        mean, std = torch.tensor(owner.latents_mean), torch.tensor(owner.latents_std)
    gaussians = layout.gaussians if layout is not None and is_offset else None
    latents = latents.float()
    return latents_to_tokens(latents, mean.to(latents), std.to(latents), config.gaussian_target, gaussians)
