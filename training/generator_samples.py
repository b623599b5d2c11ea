# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Samples of a generator while it is trained: a sheet of pictures, and the Fréchet distance to held-out data.

Shapes: B samples, L tokens, C texture channels, C' channels that the generator models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from gpstoken_hf.gaussians import NUM_GAUSSIAN_PARAMS
from gpstoken_hf.metrics import FeatureStatistics, frechet_distance
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.transformer_sit import TIMESTEP_SCALE, SiTTransformer1DModel, latents_to_tokens
from gpstoken_hf.visualization import contact_sheet, draw_gaussians, tensor_to_pil
from pipelines.shared.outputs import atomic_file

SHEET_SIZE = 36
CHUNK = 50


@torch.no_grad()
def sample_latents(
    model: SiTTransformer1DModel,
    noise: torch.Tensor,
    labels: torch.Tensor,
    condition: torch.Tensor | None,
    num_steps: int,
) -> torch.Tensor:
    """Euler steps from noise (sigma 1) to data (sigma 0), without guidance.

    Args:
        model (`SiTTransformer1DModel`): In evaluation mode.
        noise (`torch.Tensor`): Standard normal, (B, L, C').
        labels (`torch.Tensor`): (B,).
        condition (`torch.Tensor`, *optional*): Initial Gaussians for the texture generator, (B, L, 5).
        num_steps (`int`): Evaluations of the model.

    Returns:
        `torch.Tensor`: (B, L, C').
    """
    latents = noise
    for step in range(num_steps):
        sigma = torch.full((len(noise),), 1 - step / num_steps, device=noise.device)
        velocity = model(latents, sigma * TIMESTEP_SCALE, class_labels=labels, encoder_condition=condition).sample
        latents = latents - velocity / num_steps
    return latents


class GeneratorSamples:
    """Draws samples like the held-out ones: of the same classes, and for the texture stage with their layouts.

    Args:
        stage (`str`): "layout", "texture" or "one-stage".
        held_out (`dict[str, torch.Tensor]`): init_gaussians (B, L, 5), tokens (B, L, 5 + C) and labels (B,).
        num_steps (`int`): Steps of the sampler.
        seed (`int`): Determines the noise, the same at every validation.
        tokenizer (`GPSTokenModel`, *optional*): Decodes the tokens. The layout stage needs none.
        image_size (`int`, *optional*, defaults to 256): Side of the decoded images in pixels.
        images (`torch.Tensor`, *optional*): Held-out images (B, 3, H, W) in [-1, 1]. By default the decoded held-out
            tokens take their place.
        features (`Callable`, *optional*): Images -> features (B, D) for the Fréchet distance. The layout stage has
            the distance of its numbers.
    """

    def __init__(
        self,
        stage: str,
        held_out: dict[str, torch.Tensor],
        num_steps: int,
        seed: int,
        tokenizer: GPSTokenModel | None = None,
        image_size: int = 256,
        images: torch.Tensor | None = None,
        features: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.stage, self.held_out, self.num_steps, self.seed = stage, held_out, num_steps, seed
        self.tokenizer, self.image_size, self.images, self.features = tokenizer, image_size, images, features
        self._reference: FeatureStatistics | None = None

    def draw(self, model: SiTTransformer1DModel) -> torch.Tensor:
        """Tokens (B, L, 5 + C) on the CPU; (B, L, 5) for the layout stage."""
        layouts, labels = self.held_out["init_gaussians"], self.held_out["labels"]
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(*layouts.shape[:2], model.config.in_channels, generator=generator)
        mean, std = (torch.tensor(model.config[f"latents_{name}"], device=device) for name in ("mean", "std"))
        target = model.config.gaussian_target
        tokens = []
        for parts in zip(noise.split(CHUNK), labels.split(CHUNK), layouts.split(CHUNK)):
            part, label, layout = (value.to(device) for value in parts)
            latents = sample_latents(model, part, label, layout if self.stage == "texture" else None, self.num_steps)
            tokens.append(
                latents_to_tokens(latents, mean, std, target, layout if target == "offset" else None).float().cpu()
            )
        return torch.cat(tokens)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1], on the CPU."""
        assert self.tokenizer is not None
        device, size = self.tokenizer.device, (self.image_size, self.image_size)
        parts = [self.tokenizer.decode(part.to(device), image_size=size).sample for part in tokens.split(CHUNK)]
        return torch.cat([part.float().clamp(-1, 1).cpu() for part in parts])

    def evaluate(self, model: SiTTransformer1DModel, picture: Path) -> dict[str, float]:
        """The Fréchet distance, if it is asked for; writes a sheet of samples to `picture`.

        Samples that are not finite have no distance and no sheet. They give `{"samples": nan}`, which ends the run.
        """
        tokens = self.draw(model)
        if not tokens.isfinite().all():
            return {"samples": math.nan}
        if self.stage == "layout":
            save_sheet([self._layout_picture(gaussians) for gaussians in tokens[:SHEET_SIZE]], picture)
            layouts = self.held_out["init_gaussians"]
            pair = [FeatureStatistics.from_features(gaussians.flatten(1)) for gaussians in (tokens, layouts)]
            return {"frechet_layout": frechet_distance(*pair)}
        images = self.decode(tokens)
        save_sheet([tensor_to_pil(image) for image in images[:SHEET_SIZE]], picture)
        if self.features is None:
            return {}
        if self._reference is None:
            self._reference = self._statistics(
                self.decode(self.held_out["tokens"]) if self.images is None else self.images
            )
        return {"frechet": frechet_distance(self._statistics(images), self._reference)}

    @torch.no_grad()
    def _statistics(self, images: torch.Tensor) -> FeatureStatistics:
        assert self.features is not None
        return FeatureStatistics.from_features(torch.cat([self.features(part) for part in images.split(CHUNK)]))

    def _layout_picture(self, tokens: torch.Tensor) -> Image.Image:
        side = max(self.image_size, 128)
        return draw_gaussians(Image.new("RGB", (side, side), "white"), tokens[:, :NUM_GAUSSIAN_PARAMS])


def save_sheet(pictures: list[Image.Image], path: Path) -> None:
    """Write pictures as one PNG."""
    with atomic_file(path) as staging:
        contact_sheet(pictures, gap=4).save(staging)
