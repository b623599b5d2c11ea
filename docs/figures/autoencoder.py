# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Draw docs/figures/autoencoder.png: an image on its cells, its tokens, latents and the decoded image.

python docs/figures/autoencoder.py
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage import data

from gpstoken_hf import AutoencoderGPSToken, bundled
from gpstoken_hf.visualization import colors_of, draw_gaussians, tensor_to_pil

SCALE, GAP = 2, 12
CHANNELS = ((0, "width, as a logit"), (3, "x, as a logit"), (5, "first texture channel"))


def with_lines(picture: Image.Image, step: int, every: int) -> Image.Image:
    """Lines between cells of `step` pixels; those between tiles of `every` cells are brighter."""
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    lines = [(index, (index * step, 0, index * step, height)) for index in range(1, width // step)]
    lines += [(index, (0, index * step, width, index * step)) for index in range(1, height // step)]
    for index, line in lines:
        is_edge = index % every == 0
        draw.line(line, fill="white" if is_edge else (150, 150, 150), width=3 if is_edge else 1)
    return picture


@torch.no_grad()
def main() -> None:
    pixels = torch.tensor(data.astronaut()[0:256, 64:448].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    pixels = torch.nn.functional.interpolate(pixels, scale_factor=0.5, mode="area")  # 128 x 192
    vae = AutoencoderGPSToken.from_pretrained(bundled("gpstoken-nano"))
    vae.measure_statistics([pixels])
    latents = vae.encode(pixels).latent_dist.mode()
    decoded = vae.decode(latents).sample[0].clamp(-1, 1)
    size = (192 * SCALE, 128 * SCALE)
    image = tensor_to_pil(pixels[0]).resize(size, Image.Resampling.LANCZOS)
    tokens = vae.latents_to_tokens(latents)[0]
    step = vae.spatial_compression_ratio * SCALE
    parts = [
        ("image, f x f pixels per cell", with_lines(image, step, vae.grid.side)),
        ("its Gaussians, 2 per cell", draw_gaussians(image, tokens[:, :5])),
        ("decode(latents)", tensor_to_pil(decoded).resize(size, Image.Resampling.LANCZOS)),
    ]
    for channel, name in CHANNELS:
        values = latents[0, channel].clamp(-2, 2).add(2).div(4).numpy()
        colors = Image.fromarray(np.asarray(colors_of(values.flatten())).reshape(*values.shape, 3).astype(np.uint8))
        parts.append((f"latent {channel}: {name}", colors.resize(size, Image.Resampling.NEAREST)))
    sheet = Image.new("RGB", (3 * size[0] + 4 * GAP, 2 * (size[1] + 20) + 3 * GAP), "white")
    for index, (title, part) in enumerate(parts):
        x, y = GAP + index % 3 * (size[0] + GAP), GAP + index // 3 * (size[1] + 20 + GAP)
        ImageDraw.Draw(sheet).text((x, y), title, fill="black", font_size=15)
        sheet.paste(part, (x, y + 20))
    sheet.quantize(128).save(Path(__file__).with_name("autoencoder.png"), optimize=True)


if __name__ == "__main__":
    main()
