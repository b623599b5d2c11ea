# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The decoder, its tiles and windows, and how the model takes large images: tiles, slices, bounded memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_helpers import make_images, make_model, max_error
from torch import nn

from gpstoken_hf.decoder_gpstoken import GroupNorm, MapAttention, interpolate_tiles, tile_statistics
from gpstoken_hf.gaussians import boxes_to_gaussians, join_tokens, split_tokens
from gpstoken_hf.tiling import TileGrid, decode_in_windows, gaussians_from_frame, tiles_of_image

# One tile decoded on its own against the same tile inside of a stitched decode: frames in float32. Measured 4e-6.
PIXELS = 1e-4


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- tiles


@pytest.mark.parametrize(
    ("size", "tile_size", "rows", "columns"),
    [
        ((64, 64), 64, (0, 64), (0, 64)),
        ((64, 65), 64, (0, 64), (0, 32, 65)),
        ((37, 301), 100, (0, 37), (0, 75, 150, 225, 301)),
        ((1, 5), 2, (0, 1), (0, 1, 3, 5)),
    ],
)
def test_near_equal_tiles(size, tile_size, rows, columns):
    tiles = TileGrid.of_near_equal_tiles(size, tile_size)
    assert (tiles.row_edges, tiles.column_edges) == (rows, columns)
    assert tiles.size == size
    covered = torch.zeros(size)
    for y0, x0, h, w in tiles.boxes():
        assert 0 < h <= tile_size
        assert 0 < w <= tile_size
        covered[y0 : y0 + h, x0 : x0 + w] += 1
    assert (covered == 1).all()
    assert tiles.scaled(4).boxes() == [tuple(4 * value for value in box) for box in tiles.boxes()]


def test_group_norm_with_one_tile_is_torch_s():
    norm = GroupNorm(4, 8, eps=1e-6)
    nn.init.normal_(norm.weight)
    x = noise(2, 8, 6, 10)
    expected = F.group_norm(x, 4, norm.weight, norm.bias, 1e-6)
    assert torch.equal(norm(x), expected)
    assert torch.equal(norm(x, TileGrid((0, 6), (0, 10))), expected)
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert max_error(half, F.group_norm(x.bfloat16().float(), 4, norm.weight, norm.bias, 1e-6)) < 0.02


def test_tile_statistics_are_those_of_each_tile():
    x, tiles = noise(2, 8, 6, 10), TileGrid((0, 2, 6), (0, 5, 7, 10))
    mean, std = tile_statistics(x, tiles, 4)
    assert mean.shape == std.shape == (2, 4, 2, 3)
    part = x[1, 2:4, 2:6, 5:7]  # second group, second row, second column
    assert mean[1, 1, 1, 1] == pytest.approx(part.mean().item(), abs=1e-6)
    assert std[1, 1, 1, 1] == pytest.approx(part.std(correction=0).item(), abs=1e-6)


def test_statistics_are_interpolated_bicubically_and_stay_above_the_floor():
    values = noise(1, 2, 3, 3).abs()
    expected = F.interpolate(values, size=(12, 9), mode="bicubic", align_corners=False).unsqueeze(2)
    assert torch.equal(interpolate_tiles(values, (12, 9)), expected)
    quiet = torch.tensor([[[[1e-3, 10.0, 1e-3]]]])
    assert interpolate_tiles(quiet, (1, 30)).min() < 0
    assert interpolate_tiles(quiet, (1, 30), floor=0.5).min() == pytest.approx(5e-4)


def test_tiles_that_look_alike_are_normalised_as_one():
    norm = GroupNorm(2, 4, eps=1e-6)
    tile = noise(1, 4, 5, 5)
    whole = norm(tile.repeat(1, 1, 2, 3), TileGrid((0, 5, 10), (0, 5, 10, 15)))
    assert max_error(whole, norm(tile).repeat(1, 1, 2, 3)) < 1e-5


@torch.no_grad()
def test_attention_stays_within_its_tile():
    torch.manual_seed(0)
    attention = MapAttention(8, 2)
    x, tiles = noise(2, 8, 6, 10), TileGrid((0, 2, 6), (0, 5, 10))
    output = attention(x, tiles)
    for y0, x0, h, w in tiles.boxes():
        place = (..., slice(y0, y0 + h), slice(x0, x0 + w))
        assert max_error(output[place], attention(x[place])) < 1e-6
    # Single-head attention over all positions, written out.
    normed = attention.norm(x)
    q, k, v = (layer(normed).flatten(2) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    weights = torch.softmax(q.transpose(1, 2) @ k * 8**-0.5, dim=-1)
    expected = x + attention.out_proj((v @ weights.transpose(1, 2)).unflatten(2, (6, 10)))
    assert max_error(attention(x), expected) < 1e-5


# -- windows


@pytest.mark.parametrize("size", [(8, 8), (9, 20), (37, 5), (16, 31)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_windows_cover_and_blend_to_one(size, overlap):
    # Nearest upsampling does not look beyond a pixel, so that windows change nothing but the rounding.
    maps = noise(2, 3, *size)
    image = decode_in_windows(nn.Upsample(scale_factor=4.0), maps, window=(8, 8), overlap=(overlap, overlap), scale=4)
    assert max_error(image, nn.Upsample(scale_factor=4.0)(maps)) < 1e-5


def test_windows_are_never_larger_than_asked():
    sizes = []

    def decoder(maps):
        sizes.append(maps.shape[-2:])
        return maps[:, :3]

    decode_in_windows(decoder, noise(1, 4, 30, 19), window=(8, 8), overlap=(0.25, 0.25), scale=1)
    assert {tuple(size) for size in sizes} == {(8, 8)}


# -- tile modes of the model


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (37, 75), (33, 100)])
@pytest.mark.parametrize("num_tokens", [None, 25])
def test_stitched_tiles_are_tiles_alone(size, num_tokens):
    model = make_model(tile_decode="stitched", decoder_channel_multipliers=(1, 1, 2))
    images = make_images(2, *size)
    output = model(images, num_tokens=num_tokens, tile_size=32)
    layout = model.encode(images, num_tokens=num_tokens, tile_size=32).layout
    _, boxes = tiles_of_image(size, 32, model.config.map_scale)
    share, rest = (8, 0) if num_tokens is None else divmod(num_tokens, len(boxes))
    longest = share + (rest > 0)
    assert output.tokens.shape == (2, longest * len(boxes), 9)
    assert output.attention_mask.sum().item() == 2 * (num_tokens or 8 * len(boxes))
    for index, (y0, x0, h, w) in enumerate(boxes):
        count = share + (index < rest)
        tile = images[:, :, y0 : y0 + h, x0 : x0 + w]
        alone, alone_layout = model(tile, num_tokens=count), model.encode(tile, num_tokens=count).layout
        part = slice(index * longest, index * longest + count)
        assert output.attention_mask[:, index * longest : (index + 1) * longest].sum(1).tolist() == [count] * 2
        gaussians, texture = split_tokens(output.tokens[:, part])
        tokens = join_tokens(gaussians_from_frame(gaussians, (y0, x0, h, w), size), texture)
        assert max_error(tokens, alone.tokens) <= 1e-5
        assert torch.equal(layout.boxes[:, part], alone_layout.boxes + torch.tensor([x0, y0, x0, y0]))
        assert max_error(output.sample[:, :, y0 : y0 + h, x0 : x0 + w], alone.sample) <= PIXELS


@torch.no_grad()
def test_tile_layouts_are_in_the_image_s_frame():
    model = make_model()
    images = make_images(1, 64, 96)
    encoded = model.encode(images, tile_size=32)
    whole = boxes_to_gaussians(encoded.layout.boxes, (64, 96))
    # The merge places pixel centres by tile shares, boxes_to_gaussians by corners: they differ by part of a pixel.
    difference = (encoded.layout.gaussians - whole).abs()
    assert difference[..., :2].max() < 1e-6
    assert (difference[..., 3] * 96 / 2).max() < 1
    assert (difference[..., 4] * 64 / 2).max() < 1
    covered = torch.zeros(64, 96)
    for x0, y0, x1, y1 in encoded.layout.boxes[0].tolist():
        covered[y0 : y1 + 1, x0 : x1 + 1] += 1
    assert (covered == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("tile_decode", ["merged", "stitched"])
@pytest.mark.parametrize("size", [(64, 64), (37, 75)])
def test_counts_per_image_in_tiles(tile_decode, size):
    model = make_model(tile_decode=tile_decode)
    images = make_images(2, *size)
    batch = model(images, num_tokens=[31, 17], tile_size=32)
    assert batch.attention_mask.sum(1).tolist() == [31, 17]
    for index, count in enumerate((31, 17)):
        alone = model(images[index : index + 1], num_tokens=count, tile_size=32)
        real, real_alone = batch.attention_mask[index].bool(), alone.attention_mask[0].bool()
        assert max_error(batch.tokens[index][real], alone.tokens[0][real_alone]) <= 1e-5
        assert max_error(batch.sample[index], alone.sample[0]) <= PIXELS


@torch.no_grad()
def test_one_tile_is_the_whole_image():
    model, images = make_model(), make_images(1, 30, 32)
    assert max_error(model(images, tile_size=32).sample, model(images).sample) <= 1e-5


@torch.no_grad()
def test_single_pass_spends_tokens_where_the_image_is_busy():
    model, images = make_model(), make_images(1, 64, 64)
    images[..., :32] = 0
    single = model.encode(images, num_tokens=32)
    tiled = model.encode(images, num_tokens=32, tile_size=32)

    def on_the_left(encoded):
        return (encoded.layout.boxes[..., 2] < 32).sum().item()

    assert on_the_left(tiled) == 16
    assert on_the_left(single) < 8
    assert model.decode(single.tokens, 64).sample.shape == images.shape


def test_stitched_decode_refuses_tokens_of_no_tile():
    model = make_model(tile_decode="stitched")
    tokens = model.encode(make_images(1, 64, 64), num_tokens=9).tokens
    with pytest.raises(ValueError, match=r"as many rows for each of the 4 tiles.*got 9 rows"):
        model.decode(tokens, 64, tile_size=32)


# -- slicing and tiling


@torch.no_grad()
@pytest.mark.parametrize("tile_decode", ["merged", "stitched"])
@pytest.mark.parametrize(
    "arguments", [{}, {"num_tokens": [8, 3, 5]}, {"num_tokens": [8, 13, 9], "tile_size": 16}, {"importance": True}]
)
def test_slicing_changes_nothing(arguments, tile_decode):
    model, images = make_model(tile_decode=tile_decode), make_images(3, 32, 40)
    if "importance" in arguments:
        arguments = {"importance": torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(0))}
    expected = model(images, **arguments)
    model.enable_slicing()
    sliced = model(images, **arguments)
    assert torch.equal(sliced.attention_mask, expected.attention_mask)
    mask = expected.attention_mask.bool()
    assert max_error(sliced.tokens[mask], expected.tokens[mask]) <= 1e-5
    assert max_error(sliced.sample, expected.sample) <= PIXELS
    model.disable_slicing()
    assert not model.use_slicing


@torch.no_grad()
def test_slicing_of_a_layout_by_hand():
    model, images = make_model(), make_images(2, 32, 32)
    given = {"layout": model.encode(images, num_tokens=[8, 5]).layout}
    expected = model.encode(images, **given).tokens
    model.enable_slicing()
    assert max_error(model.encode(images, **given).tokens, expected) <= 1e-5


@torch.no_grad()
def test_tiling():
    model, images = make_model(), make_images(2, 70, 90)
    expected = model.encode(images, tile_size=32)
    model.enable_tiling(overlap=0.5)
    encoded = model.encode(images)
    assert torch.equal(encoded.tokens, expected.tokens)
    sizes = []
    hook = model.decoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    sample = model.decode(encoded.tokens, (70, 90)).sample
    hook.remove()
    assert set(sizes) == {(16, 16)}  # windows of 32 pixels
    assert sample.shape == images.shape
    assert torch.isfinite(sample).all()
    # An image no larger than a tile is not tiled.
    small = model(images[..., :32, :32]).sample
    model.disable_tiling()
    assert torch.equal(model(images[..., :32, :32]).sample, small)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_size": 0}, "positive multiple of 2 pixels, got 0"),
        ({"tile_size": 33}, "positive multiple of 2 pixels, got 33"),
        ({"overlap": 1.0}, "overlap must be at least 0 and below 1, got 1.0"),
        ({"overlap": -0.1}, "overlap must be at least 0 and below 1, got -0.1"),
    ],
)
def test_tiling_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().enable_tiling(**arguments)


PEAK_MEMORY = """
import sys, torch
from pathlib import Path
from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.modeling_gpstoken import GPSTokenModel

def status(field):  # KiB
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

torch.set_num_threads(1)
# m128's shape at a quarter of its widths.
config = GPSTokenConfig.preset(
    "m128", hidden_size=128, num_hidden_layers=2, conditioner_channels=32, decoder_base_channels=32, norm_num_groups=8
)
model = GPSTokenModel(config).eval()
image = torch.rand(1, 3, 1024, 1024) * 2 - 1
if sys.argv[1] == "tiled":
    model.enable_tiling()
with torch.no_grad():
    model(torch.zeros(1, 3, 32, 32), num_tokens=4)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which the imports have driven up
    before = status("VmRSS")
    sample = model(image, num_tokens=2048).sample
assert sample.shape == image.shape
print((status("VmHWM") - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_tiling_bounds_the_memory_of_a_large_image():
    """Peak memory above that of the loaded model for 1024 x 1024 pixels: measured 153 MiB tiled, 1047 MiB whole."""

    def peak(mode):
        result = subprocess.run(
            [sys.executable, "-c", PEAK_MEMORY, mode], capture_output=True, text=True, check=True, timeout=1800
        )
        return float(result.stdout.split()[-1])

    tiled, whole = peak("tiled"), peak("whole")
    print(f"1024 x 1024: {tiled:.0f} MiB with tiling, {whole:.0f} MiB without")
    assert tiled < whole / 2
