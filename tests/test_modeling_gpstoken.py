# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSTokenModel: sizes, token counts, padding, layouts by hand, dtypes, files, and what it refuses."""

import json

import pytest
import torch
from model_helpers import make_images, make_model, max_error
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

import gpstoken_hf
from gpstoken_hf import GaussianLayout
from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.gaussians import boxes_to_gaussians, check_gaussians
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.partition import partition_images

# A padded batch against each image alone: the attention of a shorter row is computed in another order.
TOKENS = 1e-5  # measured 1e-6
PIXELS = 1e-4  # measured 4e-6


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def images():
    return make_images(2, 32, 32)


# -- any size, any number of tokens


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "num_tokens"),
    [((192, 320), 40), ((37, 301), 33), ((1, 1), 1), ((1, 50), 5), ((50, 1), 5), ((5, 7), 2), ((32, 32), 1)],
)
@pytest.mark.parametrize("multipliers", [(1, 1), (1, 1, 2)])
def test_any_size(size, num_tokens, multipliers):
    model = make_model(decoder_channel_multipliers=multipliers)
    images = make_images(2, *size)
    output, layout = model(images, num_tokens=num_tokens), model.encode(images, num_tokens=num_tokens).layout
    assert output.sample.shape == (2, 3, *size)
    assert output.tokens.shape == (2, num_tokens, 9)
    assert layout.boxes.shape == (2, num_tokens, 4)
    assert output.attention_mask.tolist() == [[1] * num_tokens] * 2
    assert torch.isfinite(output.sample).all()
    check_gaussians(output.tokens[..., :5])
    # The regions cover the image, each pixel once.
    covered = torch.zeros(size)
    for x0, y0, x1, y1 in layout.boxes[0].tolist():
        covered[y0 : y1 + 1, x0 : x1 + 1] += 1
    assert (covered == 1).all()


@torch.no_grad()
def test_4096_tokens():
    model = make_model(min_region_size=2, num_hidden_layers=1, roi_size=2)
    images = make_images(1, 192, 192)
    output = model(images, num_tokens=4096)
    assert output.tokens.shape == (1, 4096, 9)
    assert output.sample.shape == images.shape
    assert torch.isfinite(output.sample).all()


@torch.no_grad()
def test_padding_of_the_map_does_not_move_the_image():
    # The decoded image of a size that the map does not divide is the larger one, cropped.
    model = make_model(decoder_channel_multipliers=(1, 1, 1))
    gaussian = torch.tensor([[[0.1, 0.1, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]])
    maps = []
    for side in (33, 35, 36):
        place = 2 * 16 / (side - 1) - 1  # pixel 16
        sigma = 4 * 2 / (side - 1)  # 4 pixels
        tokens = gaussian.clone()
        tokens[..., :2], tokens[..., 3:5] = sigma, place
        maps.append(model.decode(tokens, side).sample[..., :33, :33])
    assert max_error(maps[0], maps[2]) < 1e-4
    assert max_error(maps[1], maps[2]) < 1e-4


# -- batches with padding


@torch.no_grad()
def test_a_padded_batch_gives_each_image_what_it_gives_alone(model):
    images, counts = make_images(3, 40, 56), [3, 24, 11]
    batch, layout = model(images, num_tokens=counts), model.encode(images, num_tokens=counts).layout
    assert batch.attention_mask.sum(1).tolist() == counts
    assert batch.tokens.shape[1] == 24
    for index, count in enumerate(counts):
        alone = model(images[index : index + 1], num_tokens=count)
        assert torch.equal(layout[index].boxes, model.encode(images[index : index + 1], num_tokens=count).layout.boxes)
        assert max_error(batch.tokens[index, :count], alone.tokens[0]) <= TOKENS
        assert max_error(batch.sample[index], alone.sample[0]) <= PIXELS


@torch.no_grad()
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30, -3.0])
def test_padded_tokens_change_nothing_in_render_and_decode(model, images, garbage):
    encoded = model.encode(images, num_tokens=[8, 3])
    filled = torch.where(encoded.attention_mask.bool().unsqueeze(-1), encoded.tokens, garbage)
    for attention_mask in (encoded.attention_mask, encoded.attention_mask.bool()):
        rendered = model.render(filled, (16, 16), attention_mask=attention_mask)
        assert torch.equal(rendered, model.render(encoded.tokens, (16, 16), attention_mask=attention_mask))
        decoded = model.decode(filled, (30, 31), attention_mask=attention_mask).sample
        assert torch.equal(decoded, model.decode(encoded.tokens, (30, 31), attention_mask=attention_mask).sample)
    alone = model.render(encoded.tokens[1:, :3], (16, 16))
    assert max_error(rendered[1:], alone) <= TOKENS


@torch.no_grad()
@pytest.mark.parametrize("garbage", [float("nan"), -7.0])
def test_padded_layout_rows_change_nothing_in_encode(model, images, garbage):
    partition = partition_images(images, [8, 3], min_region_size=4)
    mask = partition.attention_mask
    gaussians = torch.where(mask.bool().unsqueeze(-1), partition.gaussians, garbage)
    boxes = torch.where(mask.bool().unsqueeze(-1), partition.boxes, -9)
    expected = model.encode(images, num_tokens=[8, 3])
    given = [
        GaussianLayout.from_boxes(boxes, (32, 32), mask),
        GaussianLayout.from_gaussians(gaussians, (32, 32), mask),
        GaussianLayout(gaussians, boxes, mask),
        GaussianLayout(gaussians, None, mask),
    ]
    for layout in given:
        encoded = model.encode(images, layout=layout)
        assert max_error(encoded.tokens[0], expected.tokens[0]) <= TOKENS
        assert max_error(encoded.tokens[1, :3], expected.tokens[1, :3]) <= TOKENS
        check_gaussians(encoded.tokens[..., :5])


# -- the order of tokens


@torch.no_grad()
def test_permuted_layouts_give_permuted_tokens_and_the_same_image(model, images):
    encoded = model.encode(images)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    layout = GaussianLayout(encoded.layout.gaussians[:, order], encoded.layout.boxes[:, order])
    permuted = model.encode(images, layout=layout)
    assert max_error(permuted.tokens, encoded.tokens[:, order]) <= TOKENS
    assert max_error(model.decode(permuted.tokens).sample, model.decode(encoded.tokens).sample) <= PIXELS


@torch.no_grad()
def test_importance_draws_tokens(model):
    images = make_images(1, 64, 64)
    importance = torch.zeros(1, 64, 64)
    importance[:, 40:, :24] = 1e4
    plain = model.encode(images, num_tokens=24)
    drawn = model.encode(images, num_tokens=24, importance=importance)

    def inside(encoded):
        x0, y0, x1, y1 = encoded.layout.boxes[0].unbind(-1)
        return ((x0 + x1 < 48) & (y0 + y1 > 80)).sum().item()

    assert inside(drawn) > 2 * inside(plain)
    tiled = model.encode(images, num_tokens=24, importance=importance, tile_size=32)
    assert tiled.tokens.shape == (1, 24, 9)


# -- layouts by hand


@torch.no_grad()
def test_a_layout_by_hand_is_the_partition_s_own(model, images):
    expected = model.encode(images)
    for layout in (
        expected.layout,
        GaussianLayout.from_boxes(expected.layout.boxes, (32, 32)),
        GaussianLayout.from_gaussians(expected.layout.gaussians, (32, 32)),
        GaussianLayout(expected.layout.gaussians),
    ):
        encoded = model.encode(images, layout=layout)
        assert torch.equal(encoded.layout.boxes, expected.layout.boxes)
        assert max_error(encoded.layout.gaussians, expected.layout.gaussians) < 1e-7
        assert max_error(encoded.tokens, expected.tokens) <= TOKENS


@torch.no_grad()
def test_a_layout_of_another_image_and_of_overlapping_regions(model, images):
    boxes = torch.tensor([[[0, 0, 31, 31], [4, 4, 9, 30], [5, 5, 5, 5]]])
    layout = GaussianLayout.from_boxes(boxes, (32, 32))  # of one image, for all
    encoded = model.encode(images, layout=layout)
    assert torch.equal(encoded.layout.gaussians, boxes_to_gaussians(boxes, (32, 32)).expand(2, -1, -1))
    assert encoded.attention_mask.tolist() == [[1, 1, 1]] * 2
    assert torch.isfinite(model.decode(encoded.tokens).sample).all()
    # Gaussians that no region has are refined from where they are.
    tilted = encoded.layout.gaussians.clone()
    tilted[..., 2] = 0.7
    assert (model.encode(images, layout=GaussianLayout(tilted)).tokens[..., 2] > 0.3).all()
    assert model(images, layout=layout).sample.shape == images.shape


def test_gradients_reach_pixels_and_layout(model, images):
    pixels = images.clone().requires_grad_()
    gaussians = boxes_to_gaussians(torch.tensor([[[0, 0, 15, 31], [16, 0, 31, 31]]]), (32, 32)).repeat(2, 1, 1)
    gaussians.requires_grad_()
    model(pixels, layout=GaussianLayout(gaussians)).sample.square().mean().backward()
    for grad in (pixels.grad, gaussians.grad):
        assert torch.isfinite(grad).all()
        assert grad.abs().sum() > 0
    model.zero_grad()


# -- dtypes


@torch.no_grad()
@pytest.mark.parametrize(
    # Largest and mean absolute error of an image (values up to 2) against float32: three times what was measured,
    # which is 0.034 and 0.0041 in bfloat16, 0.0049 and 0.0005 in float16.
    ("dtype", "largest", "mean"),
    [(torch.bfloat16, 0.1, 0.012), (torch.float16, 0.015, 0.0015)],
)
def test_half_precision(model, images, dtype, largest, mean):
    expected = model(images)
    half = make_model().to(dtype)
    seen = []
    hook = half.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    output = half(images.to(dtype), layout=model.encode(images).layout)
    hook.remove()
    assert output.tokens.dtype == torch.float32
    assert seen == [torch.float32]
    assert half.render(output.tokens.to(dtype), (16, 16)).dtype == torch.float32
    assert output.sample.dtype == dtype
    for value in (output.sample, output.tokens):
        assert torch.isfinite(value).all()
    difference = (output.sample.float() - expected.sample).abs()
    assert difference.max() < largest
    assert difference.mean() < mean
    # The partition sees the pixels in float32 and is the same, and so is a masked batch.
    output = half(images.to(dtype), num_tokens=[5, 2])
    assert torch.isfinite(output.sample).all()


@torch.no_grad()
def test_autocast_keeps_gaussians_in_float32(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    assert output.tokens.dtype == torch.float32
    assert torch.isfinite(output.sample).all()
    expected = model(images)
    assert max_error(output.tokens[..., :5], expected.tokens[..., :5]) < 0.02


# -- attention, checkpointing


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [8, [8, 3]])
def test_sdpa_and_eager_agree(images, num_tokens):
    model = make_model()
    outputs = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        outputs[implementation] = model(images, num_tokens=num_tokens)
    mask = outputs["sdpa"].attention_mask.bool()
    assert max_error(outputs["sdpa"].tokens[mask], outputs["eager"].tokens[mask]) <= TOKENS
    assert max_error(outputs["sdpa"].sample, outputs["eager"].sample) <= PIXELS
    recorded = model(images, num_tokens=8, output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in recorded.attentions] == [(2, 2, 8, 8)] * 2
    assert {tuple(states.shape) for states in recorded.hidden_states} == {(2, 8, 32)}


def test_gradient_checkpointing_gives_the_same_gradients(images):
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            # The name changed within transformers 5.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert all(layer.gradient_checkpointing for layer in model.encoder.layers)
        model(images, num_tokens=[8, 5]).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(grad is not None for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        assert torch.equal(gradients[1][name], grad), name


# -- files


@torch.no_grad()
@pytest.mark.parametrize("max_shard_size", ["5GB", "200KB"])
def test_save_and_load(images, tmp_path, max_shard_size):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    num_files = len(list(tmp_path.glob("*.safetensors")))
    assert num_files == 1 if max_shard_size == "5GB" else num_files > 1
    for loaded in (GPSTokenModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is GPSTokenModel
        assert not loaded.training
        assert torch.equal(loaded(images).sample, model(images).sample)


def test_load_in_another_dtype(tmp_path):
    make_model().save_pretrained(tmp_path)
    assert GPSTokenModel.from_pretrained(tmp_path).dtype == torch.float32
    half = GPSTokenModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "half", variant="bf16")
    assert (tmp_path / "half" / "model.bf16.safetensors").is_file()
    assert GPSTokenModel.from_pretrained(tmp_path / "half", variant="bf16", dtype="auto").dtype == torch.bfloat16


def test_meta_device():
    with torch.device("meta"):
        model = GPSTokenModel(GPSTokenConfig.preset("m128"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not list(model.buffers())  # nothing that from_pretrained would have to fill in


def test_auto_classes(tmp_path):
    make_model().save_pretrained(tmp_path)
    gpstoken_hf.GPSTokenImageProcessor().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is GPSTokenConfig
    assert type(AutoModel.from_config(GPSTokenConfig.preset("tiny"))) is GPSTokenModel
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is gpstoken_hf.GPSTokenImageProcessor


@pytest.fixture
def checkpoint(tmp_path):
    """A saved model, and a function that rewrites its weights."""
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"

    def rewrite(change):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return tmp_path, rewrite


HEAD = "encoder.texture_head.bias"


def test_missing_unexpected_and_mismatched_weights(checkpoint):
    folder, rewrite = checkpoint
    rewrite(lambda tensors: tensors.pop(HEAD))
    with pytest.raises(
        ValueError, match=rf"must hold exactly the weights of GPSTokenModel, got: 1 missing \({HEAD}\)$"
    ):
        GPSTokenModel.from_pretrained(folder)
    _, info = GPSTokenModel.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {HEAD}
    rewrite(lambda tensors: tensors.update({"stranger": torch.zeros(2), HEAD: torch.zeros(7)}))
    with pytest.raises(
        ValueError, match=rf"1 unexpected \(stranger\); 1 of another shape \({HEAD} \(7,\) .* \(4,\)\)"
    ):
        GPSTokenModel.from_pretrained(folder)
    assert isinstance(GPSTokenModel.from_pretrained(folder, ignore_mismatched_sizes=True), GPSTokenModel)
    with pytest.raises(ValueError, match="unexpected"):
        AutoModel.from_pretrained(folder)


def test_many_wrong_weights_are_counted_and_some_named(checkpoint):
    folder, rewrite = checkpoint

    def keep_one(tensors):
        value = tensors[HEAD]
        tensors.clear()
        tensors[HEAD] = value

    rewrite(keep_one)
    count = len(make_model().state_dict()) - 1
    with pytest.raises(ValueError, match=rf"{count} missing \(.*, and {count - 5} more\)"):
        GPSTokenModel.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 6, 1000, -10])
def test_truncated_weights(checkpoint, keep):
    folder, _ = checkpoint
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file, got a damaged one"):
        GPSTokenModel.from_pretrained(folder)


def test_missing_files(checkpoint):
    folder, _ = checkpoint
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError):  # noqa: PT011 - the words are transformers'
        GPSTokenModel.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpstoken", "num_tokens": 0}))
    with pytest.raises(ValueError, match=r"config\.json must hold legal values, got: num_tokens must be .*, got 0"):
        GPSTokenModel.from_pretrained(folder)


# -- what is validated


@torch.no_grad()
def test_pixels_may_leave_their_range_by_the_rounding_of_a_resize(model, images):
    pixels = images.clone()
    pixels[0, 0, 0, 0], pixels[1, 2, 3, 4] = 1 + 2**-17, -1 - 2**-17
    expected = model.encode(pixels.clamp(-1, 1), num_tokens=6)
    encoded = model.encode(pixels, num_tokens=6)
    assert torch.equal(encoded.layout.boxes, expected.layout.boxes)
    assert max_error(encoded.tokens, expected.tokens) < 1e-4
    pixels[0, 0, 0, 0] = 1 + 2**-16
    with pytest.raises(ValueError, match=r"pixel_values must be in \[-1, 1\]"):
        model.encode(pixels, num_tokens=6)


@torch.no_grad()
def test_validation_can_be_switched_off(images):
    model = make_model()
    model.validate_inputs = False
    assert model.encode(images * 3, num_tokens=6).tokens.shape == (2, 6, 9)
    tokens = tokens_with(1, 1.5)
    assert model.decode(tokens).sample.shape == (1, 3, 32, 32)
    model.validate_inputs = True
    with pytest.raises(ValueError, match="pixel_values must be in"):
        model.encode(images * 3, num_tokens=6)
    with pytest.raises(ValueError, match="0 < sigma < 1"):
        model.decode(tokens)


# -- bad input

LAYOUT = GaussianLayout.from_boxes(torch.tensor([[[0, 0, 31, 31]]] * 2), (32, 32))


def bad_pixel(value):
    images = torch.zeros(2, 3, 32, 32)
    images[1, 2, 3, 4] = value
    return {"pixel_values": images}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixel_values": torch.zeros(2, 1, 32, 32)}, r"\(B, 3, H, W\), got \(2, 1, 32, 32\)"),
        ({"pixel_values": torch.zeros(2, 4, 32, 32)}, r"\(B, 3, H, W\), got \(2, 4, 32, 32\)"),
        ({"pixel_values": torch.zeros(3, 32, 32)}, r"got \(3, 32, 32\)"),
        ({"pixel_values": torch.zeros(0, 3, 32, 32)}, r"at least one image, got shape \(0, 3, 32, 32\)"),
        (
            {"pixel_values": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)},
            r"floating point in \[-1, 1\] .*, got torch.uint8",
        ),
        (bad_pixel(float("nan")), "pixel_values must be finite, got 1 NaN or infinite"),
        (bad_pixel(float("-inf")), "pixel_values must be finite, got 1 NaN or infinite"),
        (bad_pixel(255.0), r"pixel_values must be in \[-1, 1\], got values from 0 to 255"),
        (bad_pixel(-1.01), r"pixel_values must be in \[-1, 1\], got values from -1.01 to 0"),
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"num_tokens": [4, 0]}, "num_tokens must be at least 1, got 0"),
        ({"num_tokens": -2}, "num_tokens must be at least 1, got -2"),
        ({"num_tokens": [4]}, "one number per image, 2, got 1"),
        ({"num_tokens": []}, "one number per image, 2, got 0"),
        ({"num_tokens": 2.5}, "an integer or one integer per image, got 2.5"),
        ({"num_tokens": [2.0, 3.0]}, "an integer or one integer per image"),
        ({"num_tokens": 65}, "at most 64, the number of regions .* got 65"),
        ({"num_tokens": [1, 4096]}, "at most 64, the number of regions .* got 4096"),
        ({"importance": torch.zeros(2, 32, 31)}, r"\(B, H, W\) = \(2, 32, 32\), got \(2, 32, 31\)"),
        ({"importance": torch.zeros(1, 32, 32)}, r"\(B, H, W\) = \(2, 32, 32\), got \(1, 32, 32\)"),
        ({"importance": torch.full((2, 32, 32), -1.0)}, "importance must be at least 0, got values from -1"),
        ({"importance": torch.full((2, 32, 32), float("nan"))}, "importance must be finite"),
        ({"tile_size": 0}, "tile_size must be a positive multiple of 2 pixels, got 0"),
        ({"tile_size": 15}, "tile_size must be a positive multiple of 2 pixels, got 15"),
        ({"tile_size": 16, "num_tokens": 3}, "at least 1 for each of the 4 tiles, got 3"),
        ({"layout": LAYOUT, "num_tokens": 4}, "num_tokens, importance and tile_size must be None with a layout"),
        ({"layout": LAYOUT, "tile_size": 16}, "num_tokens, importance and tile_size must be None with a layout"),
        ({"layout": LAYOUT.boxes}, "layout must be a GaussianLayout, got Tensor"),
        ({"layout": GaussianLayout(LAYOUT.gaussians[:1].expand(3, -1, -1))}, "layout must be of 1 or 2 images, got 3"),
        (
            {"layout": GaussianLayout(LAYOUT.gaussians, torch.tensor([[[0, 0, 32, 31]]] * 2))},
            r"inside the 32 x 32 image, got \[0, 0, 32, 31\]",
        ),
        ({"layout": GaussianLayout(torch.zeros(2, 3, 5))}, "gaussians must have 0 < sigma < 1, got sigma from 0 to 0"),
        (
            {"layout": GaussianLayout(LAYOUT.gaussians, None, torch.tensor([[1], [0]]))},
            "attention_mask must leave every image at least one token",
        ),
    ],
)
@pytest.mark.parametrize("slicing", [False, True])
def test_encode_refuses(model, images, arguments, message, slicing):
    model.use_slicing = slicing
    try:
        with pytest.raises(ValueError, match=message):
            model(**{"pixel_values": images, **arguments})
    finally:
        model.use_slicing = False


@pytest.mark.parametrize("misspelt", ["num_token", "num_tokenz", "boxes", "init_gaussians", "attention_mask"])
def test_a_misspelt_argument_is_an_error(model, images, misspelt):
    for call in (model, model.encode):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{misspelt}'"):
            call(images, **{misspelt: 5})


def tokens_with(field, value):
    tokens = torch.tensor([0.3, 0.3, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]).repeat(1, 3, 1)
    tokens[0, 1, field] = value
    return tokens


GOOD = tokens_with(0, 0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(1, 3, 8)}, r"tokens must be \(B, L, 5 \+ C = 9\), got \(1, 3, 8\)"),
        ({"tokens": torch.zeros(3, 9)}, r"tokens must be .*, got \(3, 9\)"),
        ({"tokens": torch.zeros(1, 0, 9)}, r"at least one image and one token, got \(1, 0, 9\)"),
        ({"tokens": tokens_with(0, 0.0)}, "0 < sigma < 1, got sigma from 0 to 0.3"),
        ({"tokens": tokens_with(1, -0.1)}, "0 < sigma < 1, got sigma from -0.1 to"),
        ({"tokens": tokens_with(2, 1.0)}, "-1 < rho < 1, got rho from 0 to 1"),
        ({"tokens": tokens_with(2, -1.2)}, "-1 < rho < 1, got rho from -1.2 to"),
        ({"tokens": tokens_with(3, float("nan"))}, "Gaussians of tokens must be finite"),
        ({"tokens": tokens_with(7, float("inf"))}, "texture of tokens must be finite"),
        ({"tokens": GOOD, "attention_mask": torch.ones(1, 4)}, r"attention_mask .* \(1, 3\), got \(1, 4\)"),
        ({"tokens": GOOD, "image_size": 0}, "at least 1 x 1 pixels, got 0 x 0"),
        ({"tokens": GOOD, "image_size": (32, -1)}, "at least 1 x 1 pixels, got 32 x -1"),
        ({"tokens": GOOD, "tile_size": 7}, "tile_size must be a positive multiple of 2 pixels, got 7"),
    ],
)
def test_decode_refuses(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.decode(**arguments)
    if not {"image_size", "tile_size"} & arguments.keys():
        with pytest.raises(ValueError, match=message):
            model.render(**arguments, size=(16, 16))
