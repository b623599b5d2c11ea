# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The model against the recorded outputs of the authors' code, stage by stage.

Tolerances are largest absolute errors in float32 on the CPU. Recorded beside each is the largest one measured on the
portable arrays (synthetic images) and on the full ones (photographs).
"""

from types import SimpleNamespace

import pytest
import torch
from conversion_helpers import GOLDEN, SHARED_GOLDEN
from safetensors.torch import load_file

from conversion import convert_gpstoken
from gpstoken_hf import GaussianLayout
from gpstoken_hf.gaussians import boxes_to_gaussians, gaussians_to_boxes, join_tokens, split_tokens
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.tiling import gaussians_to_frame

INIT_GAUSSIANS = 1e-6  # measured 0
TOKENS = 1e-5  # measured 1.4e-6
MAPS = 1e-5  # measured 2.7e-6
IMAGES = 1e-3  # measured 7e-5
MERGED_IMAGES = 2e-3  # measured 2.1e-5
SETS = {
    "portable": (GOLDEN, "tokenizer_official.safetensors", "tokenizer_io.safetensors"),
    "full": (SHARED_GOLDEN, "tokenizer_tiny_official.safetensors", "tokenizer_tiny_io.safetensors"),
}


@pytest.fixture(scope="module", params=sorted(SETS))
def recorded(request, tmp_path_factory):
    """The converted model, the recorded arrays, and the images' regions as pixel boxes."""
    root, weights, arrays = SETS[request.param]
    if not (root / weights).is_file():
        pytest.skip("the full golden arrays are not beside this repository")
    folder = tmp_path_factory.mktemp("golden") / request.param
    options = ["--num_tokens", "16", "--image_size", "64"]
    assert convert_gpstoken.main(["--checkpoint", str(root / weights), "--output", str(folder), *options]) == 0
    model = GPSTokenModel.from_pretrained(folder, dtype=torch.float32).eval()
    arrays = load_file(root / arrays)
    # Corners are recorded in [-1, 1]; every one is a whole pixel.
    pixels = (arrays["regions"].double() + 1) / 2 * 63
    boxes = pixels.round().long()
    assert (pixels - boxes).abs().max() < 1e-4
    return SimpleNamespace(model=model, boxes=boxes, **arrays)


def error(value, expected):
    assert value.shape == expected.shape
    return (value.double() - expected.double()).abs().max().item()


def set_error(values, expected):
    """The largest error of rows `(L, F)` in any order: each expected row against the nearest of ours."""
    assert values.shape == expected.shape
    return torch.cdist(expected.double(), values.double(), p=float("inf")).amin(1).max().item()


def side_by_side(images):
    """Four images `(4, 3, H, W)` as the 2 x 2 tiles of one, row by row."""
    return torch.cat([torch.cat(list(images[:2]), -1), torch.cat(list(images[2:]), -1)], -2).unsqueeze(0)


@torch.no_grad()
def test_regions_and_initial_gaussians(recorded):
    encoded = recorded.model.encode(recorded.pixel_values)
    for image, boxes in enumerate(recorded.boxes):
        ours = {tuple(box) for box in encoded.layout.boxes[image].tolist()}
        assert ours == {tuple(box) for box in boxes.tolist()}
        assert set_error(encoded.layout.gaussians[image], recorded.init_gaussians[image]) <= INIT_GAUSSIANS
    assert error(boxes_to_gaussians(recorded.boxes, (64, 64)), recorded.init_gaussians) <= INIT_GAUSSIANS
    assert torch.equal(gaussians_to_boxes(recorded.init_gaussians, (64, 64)), recorded.boxes)


@torch.no_grad()
def test_conditioner(recorded):
    if not hasattr(recorded, "conditioner_features"):
        pytest.skip("recorded only among the full arrays")
    features = recorded.model.encoder.conditioner(recorded.pixel_values[:1])
    assert error(features, recorded.conditioner_features) <= 1e-5  # measured 1.4e-6


@torch.no_grad()
def test_tokens(recorded):
    layout = GaussianLayout(recorded.init_gaussians, recorded.boxes)
    given = recorded.model.encode(recorded.pixel_values, layout=layout).tokens
    assert error(given, recorded.tokens) <= TOKENS
    ours = recorded.model.encode(recorded.pixel_values).tokens
    for tokens, expected in zip(ours, recorded.tokens):
        assert set_error(tokens, expected) <= TOKENS


@torch.no_grad()
def test_rendered_maps(recorded):
    assert error(recorded.model.render(recorded.tokens, (16, 16)), recorded.rendered) <= MAPS


@torch.no_grad()
def test_decoded_images(recorded):
    assert error(recorded.model.decode(recorded.tokens, 64).sample, recorded.decoded) <= IMAGES


@torch.no_grad()
def test_end_to_end(recorded):
    assert error(recorded.model(recorded.pixel_values).sample, recorded.decoded) <= IMAGES


@torch.no_grad()
def test_merged_tokens_and_maps(recorded):
    merged = recorded.model.encode(side_by_side(recorded.pixel_values), num_tokens=64, tile_size=64)
    assert set_error(merged.tokens[0], recorded.merged_tokens[0]) <= TOKENS
    # The merge alone, on the recorded tokens of each tile.
    gaussians, texture = split_tokens(recorded.tokens)
    places = [(0, 0, 64, 64), (0, 64, 64, 64), (64, 0, 64, 64), (64, 64, 64, 64)]
    frames = torch.stack([gaussians_to_frame(g, place, (128, 128)) for g, place in zip(gaussians, places)])
    tokens = join_tokens(frames, texture).flatten(0, 1).unsqueeze(0)
    assert error(tokens, recorded.merged_tokens) <= TOKENS
    assert error(recorded.model.render(recorded.merged_tokens, (32, 32)), recorded.merged_rendered) <= MAPS


@torch.no_grad()
def test_merged_image(recorded):
    sample = recorded.model.decode(recorded.merged_tokens, 128, tile_size=64).sample
    assert error(sample, recorded.merged_decoded) <= MERGED_IMAGES
    whole = recorded.model(side_by_side(recorded.pixel_values), num_tokens=64, tile_size=64).sample
    assert error(whole, recorded.merged_decoded) <= MERGED_IMAGES
