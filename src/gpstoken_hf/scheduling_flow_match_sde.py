# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""FlowMatchSDEScheduler: Euler-Maruyama sampling of a flow model on the linear path (SiT's SDE sampler).

The paper's time runs from t = 0 (noise) to t = 1 (data), with `x_t = t x_1 + (1 - t) x_0` and the velocity
`v = x_1 - x_0`. The score is then `s = (t v - x) / (1 - t)`, and for any diffusion coefficient D(t) >= 0 the
stochastic equation

    dx = (v + D s) dt + sqrt(2 D) dw

has the same marginals as the flow. In diffusers `sigma = 1 - t`, `timestep = 1000 sigma`, and the model returns
`noise - data = -v`.
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

from .file_checks import (
    MAX_TRAIN_TIMESTEPS,
    SCHEDULER_CONFIG,
    check_number,
    check_source,
    refusing,
    require_file,
)
from .loading import CheckedConfigMixin
from .pushing import PushWithCardMixin, save_with_card

DIFFUSION_FORMS = ("sbdm", "constant", "sigma", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = ("mean", "tweedie", "euler", None)


def diffusion_coefficient(t: float, form: str = "sbdm", norm: float = 1.0) -> float:
    """The diffusion coefficient D(t) of the SDE.

    Args:
        t (`float`): the paper's time, from 0 (noise) to 1 (data); above 0 for `"sbdm"`.
        form (`str`, *optional*, defaults to `"sbdm"`): `"sbdm"` for `(1 - t) / t`, as in score-based diffusion models;
            `"constant"` for 1; `"sigma"` or `"linear"` for `1 - t`, the same on the linear path; `"decreasing"` for
            `(norm cos(pi t) + 1)^2 / 4`; `"increasing-decreasing"` for `sin(pi t)^2`.
        norm (`float`, *optional*, defaults to 1.0): factor of D, except for `"decreasing"`, which has it inside the
            square.

    Raises:
        ValueError: if `form` is unknown.
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
    raise ValueError(f"form must be one of {list(DIFFUSION_FORMS)}, got {form!r}")


def score(x: torch.Tensor, v: torch.Tensor, t: float) -> torch.Tensor:
    """The score of the linear path at time t < 1, from sample and velocity: `(t v - x) / (1 - t)`."""
    return (t * v - x) / (1 - t)


@dataclass
class FlowMatchSDESchedulerOutput(BaseOutput):
    """Output of `FlowMatchSDEScheduler.step`.

    Args:
        prev_sample (`torch.Tensor` of the shape of `sample`): the sample at the next, less noisy step.
    """

    prev_sample: torch.Tensor


class FlowMatchSDEScheduler(PushWithCardMixin, CheckedConfigMixin, SchedulerMixin, ConfigMixin):
    """SiT's stochastic sampler: Euler-Maruyama steps and a different last step (paper Sec. 3.3).

    `set_timesteps(N)` makes N steps, each with one call of the model. N - 1 Euler-Maruyama steps are uniform from
    `start_time` to `1 - last_step_size`; the last step leads from there to the data. With `last_step=None` all N are
    Euler-Maruyama steps and end at `1 - start_time`.

    `from_config` takes the configs of diffusers' flow schedulers, and theirs takes ours.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000): the timestep of pure noise;
            `timestep = num_train_timesteps sigma`.
        diffusion_form (`str`, *optional*, defaults to `"sbdm"`): form of D(t), see `diffusion_coefficient`.
        diffusion_norm (`float`, *optional*, defaults to 1.0): norm of D(t), at least 0.
        last_step (`str`, *optional*, defaults to `"mean"`): `"mean"` follows the drift `v + D s` without noise,
            `"tweedie"` takes `x / t + (1 - t)^2 / t s`, `"euler"` follows the flow `v`, `None` makes no last step.
        last_step_size (`float`, *optional*, defaults to 0.04): time that the last step covers, in (0, 1).
        start_time (`float`, *optional*, defaults to 1e-3): t of the first step, in (0, 1 - last_step_size). At 0 the D
            of `"sbdm"` would be infinite.
        prediction_type (`str`, *optional*, defaults to `"flow_prediction"`): no other value is possible; multistep
            solvers of diffusers made from this config need it.
        use_flow_sigmas (`bool`, *optional*, defaults to `True`): likewise.

    Raises:
        ValueError: if an argument is out of its range.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import FlowMatchSDEScheduler

        >>> scheduler = FlowMatchSDEScheduler(last_step="euler")
        >>> scheduler.set_timesteps(10)
        >>> data = torch.full((1, 2), 0.5)
        >>> generator = torch.Generator().manual_seed(0)
        >>> sample = torch.randn(1, 2, generator=generator)
        >>> for timestep in scheduler.timesteps:
        ...     model_output = (sample - data) * 1000 / timestep  # a perfect model: noise - data
        ...     sample = scheduler.step(model_output, timestep, sample, generator=generator).prev_sample
        >>> torch.allclose(sample, data, atol=1e-5)
        True

        ```
    """

    # Flow models are sampled by these, made by `from_config` of this scheduler's config.
    _compatibles = [  # noqa: RUF012 - diffusers reads a list
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "SASolverScheduler",
    ]
    order = 1
    init_noise_sigma = 1.0
    save_pretrained = save_with_card(SchedulerMixin.save_pretrained)

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
            raise ValueError(f"last_step_size must be in (0, 1), got {last_step_size}")
        if not 0 < start_time < 1 - last_step_size:
            raise ValueError(f"start_time must be in (0, 1 - last_step_size), got {start_time}")
        if prediction_type != "flow_prediction" or use_flow_sigmas is not True:
            raise ValueError(
                "prediction_type and use_flow_sigmas must be 'flow_prediction' and True, "
                f"got {prediction_type!r} and {use_flow_sigmas}"
            )
        # `from_config` of another class drops values that are marked as defaults. Multistep solvers need two of them.
        # A config that was loaded has no such marks, and gets none.
        if "_use_default_values" in self.config:
            defaults = set(self.config["_use_default_values"]) - {"prediction_type", "use_flow_sigmas"}
            self.register_to_config(_use_default_values=sorted(defaults))
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._set_times(
            torch.linspace(0.0, 1.0, num_train_timesteps + 1, dtype=torch.float64)[:-1].tolist(), 1.0, None
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load from a folder or the Hub, as every scheduler of diffusers."""
        source = pretrained_model_name_or_path
        check_source(source)
        # Without a network diffusers says that the repository lacks the file.
        if not os.path.isfile(source):
            require_file(source, SCHEDULER_CONFIG, kwargs)
        return super().from_pretrained(source, *args, **kwargs)

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
        """Index of the next step; `None` before the first call of `step`."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, if `set_begin_index` has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the index of the first step. `step` then need not look it up, which would synchronise.

        Args:
            begin_index (`int`, *optional*, defaults to 0): index into `timesteps`.
        """
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the steps.

        Args:
            num_inference_steps (`int`, *optional*): N, the number of steps and of model calls, at least 1. Defaults to
                the number of `sigmas`.
            device (`torch.device`, *optional*): device of `timesteps`; `sigmas` stay on the CPU.
            sigmas (`Sequence[float]`, *optional*): `1 - t` at the start of every step, decreasing inside (0, 1); the
                last step leads from the last sigma to the data. Uniform steps by default.

        Raises:
            ValueError: if `num_inference_steps` is below 1, not the number of `sigmas`, or missing without `sigmas`;
                if `sigmas` do not decrease inside (0, 1).
        """
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
            times = self._uniform_times(num_inference_steps)
        else:
            times = [1.0 - float(sigma) for sigma in sigmas]
            if num_inference_steps not in (None, len(times)):
                raise ValueError(
                    f"num_inference_steps must be the number of sigmas, {len(times)}, got {num_inference_steps}"
                )
            if not times or any(not a < b for a, b in zip([0.0, *times], [*times, 1.0])):
                raise ValueError(f"sigmas must decrease strictly inside (0, 1), got {[float(s) for s in sigmas]}")
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
        # Steps compute with these Python floats. Near t = 0 coefficients grow as 1 / t, and 1 - sigma in float32 has
        # lost digits of t. Also, a step then reads nothing back from the device.
        self._times = [*times, end]
        sigmas = 1.0 - torch.tensor(self._times, dtype=torch.float64)
        self.sigmas = sigmas.to(torch.float32)
        # Cast before the move: not every device has float64.
        self.timesteps = (sigmas[:-1] * self.config.num_train_timesteps).to(torch.float32).to(device)
        self._step_index = None
        self._begin_index = None

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """Return the sample unchanged: a flow model needs no scaling."""
        return sample

    def index_for_timestep(self, timestep: torch.Tensor | float) -> int:
        """The index of the step that starts at `timestep`. Synchronises.

        Args:
            timestep (`float` or `torch.Tensor`): one of `timesteps`.

        Raises:
            ValueError: if it is not one of `timesteps`.
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
        """Take one step towards the data.

        Args:
            model_output (`torch.Tensor` of the shape of `sample`): `noise - data` as the model predicts it.
            timestep (`float` or `torch.Tensor`): the timestep that the model was given, one of `timesteps`.
            sample (`torch.Tensor` of shape `(B, ...)`): x at this timestep.
            generator (`torch.Generator` or list of B of them, *optional*): source of the noise, for the batch or per
                sample.
            variance_noise (`torch.Tensor` of the shape of `sample`, *optional*): standard normal noise to use instead
                of drawing it.
            return_dict (`bool`, *optional*, defaults to `True`): return an output object instead of a tuple.

        Returns:
            [`FlowMatchSDESchedulerOutput`] or `tuple`: `.prev_sample`, x at the next timestep, computed in float32 and
            returned in the dtype of `model_output`.

        Raises:
            ValueError: if `set_timesteps` was not called, all steps were taken, or the first timestep is unknown.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps must be set by set_timesteps before step, got None")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        num_steps = len(self._times) - 1
        if self._step_index >= num_steps:
            raise ValueError(f"step must be called at most {num_steps} times after set_timesteps, got one call more")
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
        """Noise a sample: `sigma noise + (1 - sigma) sample`.

        Args:
            sample (`torch.Tensor` of shape `(B, ...)`): data.
            timestep (`float` or `torch.Tensor` of shape `(B,)`): `num_train_timesteps sigma`; need not be one of
                `timesteps`.
            noise (`torch.Tensor` of the shape of `sample`): standard normal noise.

        Returns:
            `torch.Tensor` of the shape and dtype of `sample`.
        """
        sigma = torch.as_tensor(timestep).to(torch.float32).to(sample.device) / self.config.num_train_timesteps
        sigma = sigma.reshape(-1, *[1] * (sample.ndim - 1))
        return (sigma * noise + (1 - sigma) * sample).to(sample.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | float
    ) -> torch.Tensor:
        """`scale_noise` with its arguments in the order of diffusers' training scripts."""
        return self.scale_noise(original_samples, timesteps, noise)
