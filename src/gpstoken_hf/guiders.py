# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Guidance as diffusers' guiders do it, and the guidance of this package as one of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.modular_pipelines.modular_pipeline import BlockState

from .guidance import GuidedPredictor, check_guidance, guidance_at, guide
from .transformer_sit import register_blocks, timestep_to_time


class IntervalGuidance(BaseGuidance):
    """The guidance of [`GPSTokenPipeline`] as a guider of diffusers: classifier-free, in an interval of time.

    Args:
        guidance_scale (`float`, *optional*, defaults to 1.5): w of `v_null + w (v_class - v_null)`, at least 0.
        guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.2, 1.0)`): `(low, high)` with
            0 <= low <= high <= 1 in the paper's time (0 noise, 1 data). Steps outside are not guided.
        enabled (`bool`, *optional*, defaults to `True`): `False` guides no step.

    Raises:
        ValueError: if an argument is out of its range.

    Examples:
        ```python
        >>> from gpstoken_hf import GPSTokenBlocks, IntervalGuidance, bundled

        >>> pipe = GPSTokenBlocks().init_pipeline(bundled("gpstoken-digits"))
        >>> pipe.load_components()
        >>> pipe.update_components(guider=IntervalGuidance(guidance_scale=2.0, guidance_interval=(0.0, 0.8)))
        >>> pipe(class_labels="three", num_inference_steps=4, output="images")[0].size
        (32, 32)

        ```
    """

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.5,
        guidance_interval: tuple[float, float] = (0.2, 1.0),
        enabled: bool = True,
    ):
        check_guidance(guidance_scale, guidance_interval)
        super().__init__(enabled=enabled)
        self.guidance_scale, self.guidance_interval = guidance_scale, tuple(guidance_interval)

    @property
    def _w(self) -> float:
        if not self._enabled or self._timestep is None:
            return 1.0 if not self._enabled else self.guidance_scale
        return guidance_at(timestep_to_time(float(self._timestep)), self.guidance_scale, self.guidance_interval)

    @property
    def num_conditions(self) -> int:
        """Forward passes of the running step: one where a single prediction is wanted."""
        return 1 if self._w in (0.0, 1.0) else 2

    @property
    def is_conditional(self) -> bool:
        """Whether the running forward pass is the one with the class."""
        return self._count_prepared == 1 and self._w != 0.0

    def _passes(self) -> list[tuple[int, str]]:
        passes = list(enumerate(self._input_predictions))
        return passes if self.num_conditions == 2 else passes[1:] if self._w == 0.0 else passes[:1]

    def prepare_inputs(self, data: dict[str, Any]) -> list[BlockState]:
        """Inputs of the forward passes of the running step."""
        return [self._prepare_batch(data, index, name) for index, name in self._passes()]

    def prepare_inputs_from_block_state(self, data: BlockState, input_fields: dict[str, Any]) -> list[BlockState]:
        """Inputs of the forward passes of the running step, from the fields of a block's state."""
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, name) for index, name in self._passes()
        ]

    def forward(self, pred_cond: torch.Tensor | None = None, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        """The guided prediction."""
        if pred_cond is None or pred_uncond is None:
            pred = pred_uncond if pred_cond is None else pred_cond
        else:
            pred = guide(pred_uncond, pred_cond, self._w)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)


def guided_prediction(
    guider: BaseGuidance, predict: GuidedPredictor, x: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """`noise - data` as any guider of diffusers makes it, float32.

    Args:
        guider (`BaseGuidance`): the guider, its state set to the running step.
        predict ([`GuidedPredictor`]): calls the transformer.
        x (`torch.Tensor` of shape `(B, L, C)`): noised latents.
        timestep (`torch.Tensor`): 1000 sigma, one number.
    """
    passes = guider.prepare_inputs({"condition": ("class", "null")})
    changes_model = type(guider).prepare_models is not BaseGuidance.prepare_models
    if not changes_model and [one.condition for one in passes] == ["class", "null"]:
        # One call of twice the batch, as in `GPSTokenPipeline`.
        null, labelled = predict.predict("both", x, timestep).chunk(2)
        passes[0].noise_pred, passes[1].noise_pred = labelled, null
    else:
        if changes_model:
            register_blocks()
        for one in passes:
            guider.prepare_models(predict.transformer)
            one.noise_pred = predict.predict(one.condition, x, timestep)
            guider.cleanup_models(predict.transformer)
    return guider(passes)[0]
