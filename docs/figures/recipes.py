# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Draw docs/figures/recipes.png: photographs of scikit-image through the tokenizers of compare_recipes.

python docs/figures/recipes.py runs/recipes
"""

import sys
from pathlib import Path

import torch
from skimage import data

from gpstoken_hf import GPSTokenModel, bundled
from gpstoken_hf.visualization import contact_sheet, tensor_to_pil

SIDE, NUM_TOKENS, ZOOM = 128, 128, 2
# (photograph, top, left, side) of squares in it
CROPS = ((data.astronaut, 0, 100, 256), (data.chelsea, 40, 100, 224), (data.coffee, 60, 160, 320))
RECIPES = {
    "start": None,
    "squared error": "recipe-pixels-seed0",
    "+ features": "recipe-pixels-feature-seed0",
    "+ features + GAN": "recipe-pixels-feature-gan-seed0",
}


@torch.no_grad()
def main(run: Path) -> None:
    squares = [
        torch.tensor(photograph()[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None] / 127.5 - 1
        for photograph, top, left, side in CROPS
    ]
    images = torch.cat(
        [torch.nn.functional.interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True) for square in squares]
    )
    columns = {"image": images}
    for title, folder in RECIPES.items():
        path = bundled("gpstoken-nano") if folder is None else run / folder / "model"
        model = GPSTokenModel.from_pretrained(path, dtype=torch.float32).eval()
        tokens = model.encode(images, num_tokens=NUM_TOKENS).tokens
        columns[title] = model.decode(tokens, (SIDE, SIDE)).sample.clamp(-1, 1)
    pictures = [tensor_to_pil(part[row]) for row in range(len(images)) for part in columns.values()]
    pictures = [picture.resize((SIDE * ZOOM, SIDE * ZOOM), 0) for picture in pictures]
    sheet = contact_sheet(pictures, [*columns, *[""] * (len(pictures) - len(columns))], columns=len(columns), gap=6)
    sheet.quantize(256).save(Path(__file__).with_name("recipes.png"), optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
