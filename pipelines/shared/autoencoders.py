# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers and autoencoders of any kind behind one call: images -> reconstruction, with what a latent costs.

Shapes: B images of H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from gpstoken_hf.autoencoder_gpstoken import AutoencoderGPSToken
from gpstoken_hf.file_checks import read_json
from gpstoken_hf.modeling_gpstoken import GPSTokenModel

from .checkpoints import find_checkpoint, load_tokenizer, quiet_loading, weights_fingerprint
from .programs import ProgramError, one_line, printable

BITS_PER_FLOAT = 16
PEERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel", "AutoencoderRAE")
# Their images are in [0, 1]; those of the others are in [-1, 1].
UNIT_RANGE = ("AutoencoderRAE",)


@dataclass
class Candidate:
    """One way to reconstruct images: a model, and for ours a number of tokens.

    Attributes:
        name (`str`): Of the row in tables.
        model (`torch.nn.Module`): In evaluation mode.
        tokens (`int`, *optional*): Tokens per image, for ours.
        tile_size (`int`, *optional*): Side of the tiles in pixels, for ours.
        floats (`int`): Numbers per image.
        bits (`int`): 16 for each number, or the bits of the codes of a VQ model.
    """

    name: str
    model: torch.nn.Module
    tokens: int | None = None
    tile_size: int | None = None
    floats: int = 0
    bits: int = 0

    @property
    def is_ours(self) -> bool:
        return isinstance(self.model, GPSTokenModel)

    @torch.inference_mode()
    def reconstruct(self, images: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """Encode `(B, 3, H, W)` in [-1, 1] and decode it, clamped to [-1, 1]."""
        if isinstance(self.model, GPSTokenModel):
            return reconstruct(self.model, images, self.tokens, importance, self.tile_size)
        return decode_peer(self.model, encode_peer(self.model, images)).clamp(-1, 1)


@torch.inference_mode()
def reconstruct(
    model: GPSTokenModel,
    images: torch.Tensor,
    num_tokens: int | None = None,
    importance: torch.Tensor | None = None,
    tile_size: int | None = None,
) -> torch.Tensor:
    """Encode `(B, 3, H, W)` in [-1, 1] as `num_tokens` tokens and decode it, clamped to [-1, 1]."""
    encoded = model.encode(images, num_tokens=num_tokens, importance=importance, tile_size=tile_size)
    size = (images.shape[-2], images.shape[-1])
    output = model.decode(encoded.tokens, size, attention_mask=encoded.attention_mask, tile_size=tile_size)
    return output.sample.float().clamp(-1, 1)


def encode_peer(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Latents of an autoencoder of diffusers for images in [-1, 1]; of a distribution its mode."""
    if type(model).__name__ in UNIT_RANGE:
        images = (images + 1) / 2
    output = model.encode(images)
    for name in ("latents", "latent"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output.latent_dist.mode()


def decode_peer(model: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images, about [-1, 1], of the latents of an autoencoder of diffusers."""
    images = model.decode(latents).sample.float()
    return images * 2 - 1 if type(model).__name__ in UNIT_RANGE else images


def load_candidates(
    name: str,
    device: str | torch.device,
    tokens: Sequence[int] | None = None,
    tile_size: int | None = None,
    option: str = "--model",
) -> list[Candidate]:
    """The ways to reconstruct with one checkpoint: for ours one for each number of tokens.

    Args:
        name (`str`): A folder, a Hub repository `owner/name` or `owner/name/subfolder`, or a bundled checkpoint.
        device (`str` or `torch.device`): Where the model runs.
        tokens (`Sequence[int]`, *optional*): Numbers of tokens, for ours; by default the model's.
        tile_size (`int`, *optional*): Side of the tiles in pixels, for ours.
        option (`str`, *optional*): Names the option in error messages.

    Raises:
        ValueError: If there is no such checkpoint, its class is not known, or its weights are not the model's.
    """
    kind = _class_of(name, option)
    if kind in PEERS:
        model = _load_peer(name, kind).eval().to(device)
        return [Candidate(printable(name), model)]
    if kind == "AutoencoderGPSToken":
        folder, subfolder = _split(name)
        with quiet_loading():
            wrapped = AutoencoderGPSToken.from_pretrained(folder, **({"subfolder": subfolder} if subfolder else {}))
        ours = wrapped.to_gpstoken().eval().to(device)
    else:
        ours = load_tokenizer(name, device, option)
    counts = sorted(set(tokens or [ours.config.num_tokens]))
    return [Candidate(f"{printable(name)}, {count} tokens", ours, count, tile_size) for count in counts]


def measure_latents(candidate: Candidate, resolution: int) -> None:
    """Fill in floats and bits, and make sure that the model takes images of this size.

    Raises:
        ProgramError: If it does not.
    """
    model: Any = candidate.model
    if isinstance(model, GPSTokenModel):
        assert candidate.tokens is not None
        candidate.floats = candidate.tokens * model.config.token_channels
        candidate.bits = candidate.floats * BITS_PER_FLOAT
        return
    images = torch.zeros(1, 3, resolution, resolution, device=next(model.parameters()).device)
    try:
        with torch.inference_mode():
            latents = encode_peer(model, images)
            size = tuple(decode_peer(model, latents).shape[-2:])
    except (RuntimeError, ValueError) as error:
        raise ProgramError(
            f"{candidate.name} cannot reconstruct images of {resolution} x {resolution} pixels: {one_line(error)}"
        ) from error
    if size != (resolution, resolution):
        raise ProgramError(
            f"{candidate.name} must return images of --resolution {resolution}, got {size[0]} x {size[1]} pixels"
        )
    candidate.floats = latents[0].numel()
    candidate.bits = candidate.floats * BITS_PER_FLOAT
    if type(model).__name__ == "VQModel":
        cells = latents[0, 0].numel()
        candidate.bits = cells * math.ceil(math.log2(model.config.num_vq_embeddings))


def describe(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """What a result records of its candidates: names and the fingerprints of their weights."""
    prints = {id(candidate.model): "" for candidate in candidates}
    for candidate in candidates:
        if not prints[id(candidate.model)]:
            prints[id(candidate.model)] = weights_fingerprint(candidate.model)
    return [{"name": candidate.name, "weights": prints[id(candidate.model)]} for candidate in candidates]


def _split(name: str) -> tuple[str, str | None]:
    """`owner/name/subfolder` -> `owner/name` and `subfolder`; a folder stays whole."""
    if Path(name).is_dir() or name.count("/") < 2 or name.startswith((".", "/")):
        return name, None
    owner, repository, subfolder = name.split("/", 2)
    return f"{owner}/{repository}", subfolder


def _class_of(name: str, option: str) -> str:
    """The class of a checkpoint by its config: one of `PEERS`, or "AutoencoderGPSToken", or "GPSTokenModel"."""
    folder, subfolder = _split(name)
    found = find_checkpoint(folder, option)
    if Path(found).is_dir():
        path = Path(found) / "config.json"
        if not path.is_file():
            more = (
                " and a model_index.json: name the folder of its vae"
                if (path.parent / "model_index.json").is_file()
                else ""
            )
            raise ProgramError(f"{option} {name} must hold a config.json, got a folder without it{more}")
    else:
        try:
            path = Path(hf_hub_download(found, "config.json", subfolder=subfolder))
        except (HfHubHTTPError, OSError) as error:
            raise ProgramError(f"{option} {name} cannot be downloaded: {one_line(error)}") from error
    config = read_json(path)
    kind = config.get("_class_name", "GPSTokenModel" if config.get("model_type") == "gpstoken" else None)
    if kind not in (*PEERS, "AutoencoderGPSToken", "GPSTokenModel"):
        raise ProgramError(
            f"{option} must be a GPSToken tokenizer or one of {', '.join(PEERS)}, "
            f"got {name} of {kind or config.get('model_type')!r}"
        )
    return str(kind)


def _load_peer(name: str, kind: str) -> torch.nn.Module:
    if not hasattr(diffusers, kind):
        raise ProgramError(f"{kind} needs a later version of diffusers, got {diffusers.__version__}")
    folder, subfolder = _split(name)
    with quiet_loading():
        return getattr(diffusers, kind).from_pretrained(folder, **({"subfolder": subfolder} if subfolder else {}))
