# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Classifier-free guidance: the output of a SiT with a class label, without one, or extrapolated from both.

Shapes: B batch, L tokens, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from .layout import GaussianLayout
from .transformer_sit import SiTTransformer1DModel

# A step at the end of the guidance interval must count as inside, though its timestep was rounded to float32.
TIME_TOLERANCE = 1e-6


def guide(output_null: torch.Tensor, output_class: torch.Tensor, w: float) -> torch.Tensor:
    """Classifier-free guidance, `v_null + w (v_class - v_null)`. The sign of v does not matter."""
    return output_null + w * (output_class - output_null)


def check_guidance(scale: float, interval: Sequence[float]) -> None:
    """Raise a ValueError unless the scale is at least 0 and the interval lies in [0, 1]."""
    if not scale >= 0:
        raise ValueError(f"guidance_scale must be at least 0, got {scale}")
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, got {tuple(interval)}")


def guidance_at(t: float, scale: float, interval: Sequence[float]) -> float:
    """w at the paper's time t: `scale` inside the interval, ends included, and 1 outside."""
    return scale if interval[0] - TIME_TOLERANCE <= t <= interval[1] + TIME_TOLERANCE else 1.0


def mask_of(layout: GaussianLayout | None) -> torch.Tensor | None:
    """The attention mask of a padded layout, else `None`: attention and splat are faster without a mask."""
    return layout.attention_mask if layout is not None and layout.is_padded else None


class GuidedPredictor:
    """Calls a transformer with or without guidance. Prepares once what all steps share.

    Args:
        transformer ([`SiTTransformer1DModel`]): the model.
        labels (`torch.Tensor` of shape `(B,)`): class ids.
        layout ([`GaussianLayout`], *optional*): the condition, for a model with one.
        attention_kwargs (`dict`, *optional*): `attention_kwargs` of the model.
    """

    def __init__(
        self,
        transformer: SiTTransformer1DModel,
        labels: torch.Tensor,
        layout: GaussianLayout | None,
        attention_kwargs: dict[str, Any] | None = None,
    ):
        self.transformer, self.dtype, self.layout = transformer, transformer.dtype, layout
        self.kwargs = {} if not attention_kwargs else {"attention_kwargs": attention_kwargs}
        # A cache context walks through all modules, so it is set only if a module has a hook that reads it.
        self.has_hooks = any(hasattr(module, "_diffusers_hook") for module in transformer.modules())
        self.batch_size: int | None = None
        null = torch.full_like(labels, transformer.config.num_classes)
        condition = None if layout is None else layout.gaussians.to(self.dtype)
        mask = mask_of(layout)
        twice = [None if value is None else torch.cat([value, value]) for value in (condition, mask)]
        self.inputs = {
            "class": (labels, condition, mask),
            "null": (null, condition, mask),
            "both": (torch.cat([null, labels]), *twice),
        }

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, w: float) -> torch.Tensor:
        """Predict `noise - data` with guidance w, in float32. Runs a batch of 2 B only if w needs it.

        Args:
            x (`torch.Tensor` of shape `(B, L, C)`): noised latents.
            timestep (`torch.Tensor`): 1000 sigma, one number.
            w (`float`): 1 for the output with the label, 0 for the output without, any other number for `guide`.
        """
        if w in (0.0, 1.0):
            return self.predict("class" if w else "null", x, timestep)
        output_null, output_class = self.predict("both", x, timestep).chunk(2)
        return guide(output_null, output_class, w)

    def predict(self, condition: str, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Predict `noise - data`, in float32 and 0 at padding, with labels, without or both.

        Args:
            condition (`str`): `"class"`, `"null"`, or `"both"` for a batch of 2 B, first without labels.
            x (`torch.Tensor` of shape `(B, L, C)`): noised latents.
            timestep (`torch.Tensor`): 1000 sigma, one number.
        """
        labels, gaussians, mask = self.inputs[condition]
        x = x.to(self.dtype)
        x = torch.cat([x, x]) if condition == "both" else x
        if self.has_hooks and self.batch_size not in (None, len(x)):
            # Not every cache of diffusers is kept per context, and none fits a batch of another size.
            self.transformer._reset_stateful_cache()
        self.batch_size = len(x)
        with self.transformer.cache_context(condition) if self.has_hooks else nullcontext():
            output = self.transformer(
                x, timestep, labels, encoder_condition=gaussians, attention_mask=mask, return_dict=False, **self.kwargs
            )[0].float()
        return output if mask is None else output * mask.unsqueeze(-1)
