# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""FlowMatchSDEScheduler: Euler-Maruyama sampling of a flow model on the linear path (SiT's SDE sampler).

In the paper's time (t = 0 noise, t = 1 data; `x_t = t x_1 + (1 - t) x_0`, velocity `v = x_1 - x_0`) the score is
`s = (t v - x) / (1 - t)`, and for any diffusion coefficient D(t) >= 0 the stochastic equation

    dx = (v + D s) dt + sqrt(2 D) dw

has the same marginals as the flow. Diffusers' side is `sigma = 1 - t`, `timestep = 1000 sigma`, and a model output
of `noise - data = -v`.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .loading import MAX_TRAIN_TIMESTEPS, CheckedConfigMixin, check_number, check_source, refusing

DIFFUSION_FORMS = ("sbdm", "constant", "sigma", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = ("mean", "tweedie", "euler", None)


def diffusion_coefficient(t: float, form: str = "sbdm", norm: float = 1.0) -> float:
    """D(t) of the SDE, in the paper's time.

    Args:
        t: from 0 (noise) to 1 (data); "sbdm" needs t > 0.
        form: "sbdm" `(1 - t) / t`, that of score-based diffusion models; "constant" 1; "sigma" and "linear"
            `1 - t`, which are one on the linear path; "decreasing" `(cos(pi t) + 1)^2 / 4`, the norm inside the
            square; "increasing-decreasing" `sin(pi t)^2`.
        norm: a factor (inside the square for "decreasing").
    """
    if form == "sbdm":
        return norm * (1 - t) / t
    if form == "constant":
        return norm
    if form in ("sigma", "linear"):
        return norm * (1 - t)
    if form == "decreasing":
        return 0.25 * (norm * math.cos(math.pi * t) + 1) ** 2
    if form == "increasing-decreasing":
        return norm * math.sin(math.pi * t) ** 2
    raise ValueError(f"diffusion_form must be one of {list(DIFFUSION_FORMS)}, got {form!r}")


def score(x: torch.Tensor, v: torch.Tensor, t: float) -> torch.Tensor:
    """The score of the linear path at time t < 1 from the velocity: `(t v - x) / (1 - t)`."""
    return (t * v - x) / (1 - t)


@dataclass
class FlowMatchSDESchedulerOutput(BaseOutput):
    """Output of `FlowMatchSDEScheduler.step`.

    Args:
        prev_sample: the sample at the next, less noisy step, of the shape of `sample`.
    """

    prev_sample: torch.Tensor


class FlowMatchSDEScheduler(CheckedConfigMixin, SchedulerMixin, ConfigMixin):
    """SiT's stochastic sampler: Euler-Maruyama from t = `start_time`, then one last step of its own kind.

    `set_timesteps(N)` makes N steps, each with one call of the model: N - 1 of Euler-Maruyama, uniform from
    `start_time` to `1 - last_step_size`, and the last one from there to the data. Without a last step
    (`last_step=None`) all N are of Euler-Maruyama and end at `1 - start_time`.

    The configs of diffusers' flow schedulers are accepted by `from_config` and theirs accept ours; multistep solvers
    find `prediction_type` and `use_flow_sigmas` in it.

    Args:
        num_train_timesteps: the timestep of pure noise; `timestep = num_train_timesteps sigma`.
        diffusion_form: D(t), see `diffusion_coefficient`.
        diffusion_norm: its factor.
        last_step: "mean" (the drift `v + D s` without noise), "tweedie" (`x / t + (1 - t)^2 / t s`), "euler" (the
            flow alone) or `None`.
        last_step_size: the time that the last step covers; 0 < last_step_size < 1.
        start_time: t of the first step; above 0, where D of "sbdm" is infinite.
        prediction_type, use_flow_sigmas: "flow_prediction" and `True`, for the solvers that share this config.

    Raises:
        ValueError: a value outside of what is named above.
    """

    _compatibles: list[str] = []  # noqa: RUF012 - diffusers reads a list
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        diffusion_form: str = "sbdm",
        diffusion_norm: float = 1.0,
        last_step: str | None = "mean",
        last_step_size: float = 0.04,
        start_time: float = 1e-3,
        prediction_type: str = "flow_prediction",
        use_flow_sigmas: bool = True,
    ):
        check_number("num_train_timesteps", num_train_timesteps, 1, MAX_TRAIN_TIMESTEPS)
        check_number("diffusion_norm", diffusion_norm, 0.0, 1e6)
        check_number("last_step_size", last_step_size, 0.0, 1.0)
        check_number("start_time", start_time, 0.0, 1.0)
        if diffusion_form not in DIFFUSION_FORMS:
            raise ValueError(f"diffusion_form must be one of {list(DIFFUSION_FORMS)}, got {diffusion_form!r}")
        if last_step not in LAST_STEPS:
            raise ValueError(f"last_step must be one of {list(LAST_STEPS)}, got {last_step!r}")
        if not 0 < last_step_size < 1:
            raise ValueError(f"last_step_size must be in (0, 1); use last_step=None for none, got {last_step_size}")
        if not 0 < start_time < 1 - last_step_size:
            raise ValueError(f"start_time must be in (0, 1 - last_step_size), got {start_time}")
        if prediction_type != "flow_prediction" or use_flow_sigmas is not True:
            raise ValueError(
                "this scheduler is for flow models: it needs prediction_type='flow_prediction' and "
                f"use_flow_sigmas=True, got {prediction_type!r} and {use_flow_sigmas}"
            )
        # from_config drops values that were left at their default; these two must reach the multistep solvers.
        defaults = self.config.get("_use_default_values", [])
        self.register_to_config(
            _use_default_values=[key for key in defaults if key not in ("prediction_type", "use_flow_sigmas")]
        )
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._set_times(
            torch.linspace(0.0, 1.0, num_train_timesteps + 1, dtype=torch.float64)[:-1].tolist(), 1.0, None
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load from a folder or the Hub, as every scheduler of diffusers."""
        check_source(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def known_fields(cls, config: Mapping[str, Any]) -> set[str]:
        """Its own fields, and those of diffusers' schedulers, which it keeps for them."""
        known = super().known_fields(config)
        if set(config) <= known:
            return known
        others = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
        return known.union(*(inspect.signature(other).parameters for other in others))

    @classmethod
    def check_config_file(cls, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read a saved config, and check its values."""
        config = super().check_config_file(path)
        own = inspect.signature(cls).parameters
        with refusing(path):
            cls(**{name: value for name, value in config.items() if name in own})
        return config

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def step_index(self) -> int | None:
        """Index of the coming step; `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, if it was set by `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this step instead of looking up the first timestep (which would wait for the device)."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the steps.

        Args:
            num_inference_steps: N, the number of steps and of model calls.
            device: of `timesteps`; `sigmas` stay on the CPU.
            sigmas: `1 - t` at the begin of every step, falling, in (0, 1), instead of the uniform ones; the last
                step goes from the last of them to the data.

        Raises:
            ValueError: fewer than one step, or sigmas that do not fall from below 1 to above 0.
        """
        if sigmas is None and num_inference_steps is None:
            raise ValueError("num_inference_steps or sigmas is needed, got neither")
        if sigmas is not None:
            times = [1.0 - float(sigma) for sigma in sigmas]
            if num_inference_steps is not None and num_inference_steps != len(times):
                raise ValueError(f"num_inference_steps is {num_inference_steps}, but {len(times)} sigmas were given")
            if not times or any(not a < b for a, b in zip([0.0, *times], [*times, 1.0])):
                raise ValueError(f"sigmas must fall strictly inside of (0, 1), got {[float(s) for s in sigmas]}")
        else:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
            times = self._uniform_times(num_inference_steps)
        end = 1.0 if self.config.last_step is not None else max(1.0 - self.config.start_time, times[-1])
        self.num_inference_steps = len(times)
        self._set_times(times, end, device)

    def _uniform_times(self, num_steps: int) -> list[float]:
        first = self.config.start_time
        if self.config.last_step is None:
            step = (1.0 - 2 * first) / num_steps
            return [first + i * step for i in range(num_steps)]
        last = 1.0 - self.config.last_step_size
        if num_steps == 1:
            return [first]
        step = (last - first) / (num_steps - 1)
        return [first + i * step for i in range(num_steps - 1)] + [last]

    def _set_times(self, times: list[float], end: float, device: str | torch.device | None) -> None:
        # Kept as Python floats: near t = 0 the coefficients go with 1 / t, and 1 - sigma in float32 has lost the
        # digits of t; and a step then needs no value back from the device.
        self._times = [*times, end]
        sigmas = 1.0 - torch.tensor(self._times, dtype=torch.float64)
        self.sigmas = sigmas.to(torch.float32)
        self.timesteps = (sigmas[:-1] * self.config.num_train_timesteps).to(device=device, dtype=torch.float32)
        self._step_index = None
        self._begin_index = None

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """The sample as it is: a flow model needs no scaling."""
        return sample

    def index_for_timestep(self, timestep: torch.Tensor | float) -> int:
        """Index of the step that begins at `timestep`.

        Raises:
            ValueError: it is not one of `timesteps`.
        """
        matches = (self.timesteps.cpu() == torch.as_tensor(timestep).cpu()).nonzero()
        if len(matches) == 0:
            raise ValueError(f"timestep must be one of scheduler.timesteps, got {timestep}")
        return int(matches[0].item())

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchSDESchedulerOutput | tuple[torch.Tensor]:
        """One step towards the data.

        Args:
            model_output: `noise - data` as predicted by the model, of the shape of `sample`.
            timestep: the one of `timesteps` that the model was given.
            sample: x at this step.
            generator: of the noise; a list has one for each sample of the batch.
            variance_noise: standard normal noise to be used instead of drawing it.
            return_dict: return an output object instead of a tuple.

        Returns:
            `.prev_sample`: x at the next step, computed in float32, in the dtype of `model_output`.

        Raises:
            ValueError: no steps were set, more steps than were set, or an unknown timestep at the first one.
        """
        if self.num_inference_steps is None:
            raise ValueError("set_timesteps must be called before step")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        num_steps = len(self._times) - 1
        if self._step_index >= num_steps:
            raise ValueError(f"all {num_steps} steps were taken; call set_timesteps before sampling again")
        t, t_next = self._times[self._step_index], self._times[self._step_index + 1]
        is_last = self._step_index == num_steps - 1 and self.config.last_step is not None

        x, v, dt = sample.to(torch.float32), -model_output.to(torch.float32), t_next - t
        if is_last and self.config.last_step == "euler":
            x = x + v * dt
        elif is_last and self.config.last_step == "tweedie":
            x = x / t + (1 - t) ** 2 / t * score(x, v, t)
        else:
            D = diffusion_coefficient(t, self.config.diffusion_form, self.config.diffusion_norm)
            x = x + (v + D * score(x, v, t)) * dt
            if not is_last:
                if variance_noise is None:
                    w = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                else:
                    w = variance_noise.to(device=x.device, dtype=x.dtype)
                x = x + math.sqrt(2 * D * dt) * w
        self._step_index += 1

        prev_sample = x.to(model_output.dtype)
        if not return_dict:
            return (prev_sample,)
        return FlowMatchSDESchedulerOutput(prev_sample=prev_sample)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor | float, noise: torch.Tensor) -> torch.Tensor:
        """The forward path at any timestep: `sigma noise + (1 - sigma) sample`.

        Args:
            sample: `(B, ...)` data.
            timestep: 1000 sigma, one number or `(B,)`; need not be one of `timesteps`.
            noise: of the shape of `sample`.
        """
        sigma = torch.as_tensor(timestep, device=sample.device).to(torch.float32) / self.config.num_train_timesteps
        sigma = sigma.reshape(-1, *[1] * (sample.ndim - 1))
        return (sigma * noise + (1 - sigma) * sample).to(sample.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | float
    ) -> torch.Tensor:
        """`scale_noise` with the arguments in the order of diffusers' training scripts."""
        return self.scale_noise(original_samples, timesteps, noise)
