# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Folders as version 0.1 saves them, with their outputs, for `tests/golden/folders`.

    python tests/golden_folders.py

wrote them once. They must go on loading and give these outputs: do not write them again to make a test green. A field
that a later version adds has a default, and a module that moves leaves its names behind.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FOLDERS = Path(__file__).parent / "golden" / "folders"
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "conditioner_channels": 8,
    "decoder_base_channels": 8,
    "norm_num_groups": 4,
    "num_tokens": 16,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=seeded(0)) * 2 - 1


@torch.no_grad()
def outputs(pipeline: Any, autoencoder: Any, processor: Any) -> dict[str, torch.Tensor]:
    """What the golden folders compute from seeded inputs. Layouts come from the bank: it draws no real numbers."""
    vae, transformer = pipeline.vae, pipeline.transformer
    encoded = vae.encode(images())
    noised = torch.randn(2, 16, 9, generator=seeded(1))
    condition = torch.rand(2, 16, 5, generator=seeded(2))
    pipeline.set_progress_bar_config(disable=True)
    pictures = processor(images()[0] / 2 + 0.5, return_tensors="pt")["pixel_values"]
    latents = autoencoder.encode(images()).latent_dist.mode()
    return {
        "tokens": encoded.tokens,
        "reconstructions": vae.decode(encoded.tokens).sample,
        "velocities": transformer(noised, 500.0, torch.tensor([0, 1]), encoder_condition=condition).sample,
        "layouts": pipeline.layout_bank.sample([1, 2], generator=seeded(3)).gaussians,
        "latents": latents,
        "autoencoded": autoencoder.decode(latents).sample,
        "generated": pipeline([1, "dog"], 2, layout="bank", generator=[seeded(4), seeded(5)], output_type="pt").images,
        "processed": pictures,
    }


def main() -> None:
    from tiny_pipeline import make_bank, make_pipeline, make_texture_transformer, make_transformer, make_vae

    from gpstoken_hf import AutoencoderGPSToken

    shutil.rmtree(FOLDERS, ignore_errors=True)
    small = {"num_layers": 1, "attention_head_dim": 8}
    vae = make_vae(**SMALL)
    for name in ("weight", "bias"):
        torch.nn.init.normal_(getattr(vae.encoder.gaussian_head, name), std=0.1, generator=seeded(6))
    pipeline = make_pipeline(
        "both",
        vae=vae,
        transformer=make_texture_transformer(sample_size=16, **small),
        layout_transformer=make_transformer(5, None, seed=2, sample_size=16, **small),
        layout_bank=make_bank(lengths=(16,)),
    )
    autoencoder = AutoencoderGPSToken.from_gpstoken(vae, [images()])
    pipeline.save_pretrained(FOLDERS / "pipeline")
    autoencoder.save_pretrained(FOLDERS / "autoencoder")
    save_file(
        {name: value.contiguous() for name, value in outputs(pipeline, autoencoder, pipeline.image_processor).items()},
        FOLDERS / "outputs.safetensors",
    )


if __name__ == "__main__":
    main()
