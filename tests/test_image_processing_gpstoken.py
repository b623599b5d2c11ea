# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSTokenImageProcessor: every kind of picture in, [-1, 1] out, and back."""

import base64
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch

from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor, open_image, pil_to_array


@pytest.fixture
def processor():
    return GPSTokenImageProcessor()


@pytest.fixture
def picture():
    """A colour picture (31, 45, 3) uint8 with smooth parts and edges."""
    y, x = np.mgrid[:31, :45]
    channels = [x * 5 % 256, y * 8 % 256, (x + y) // 7 % 2 * 255]
    return np.stack(channels, axis=-1).astype(np.uint8)


def expected_pixels(rgb):
    """(H, W, 3) in [0, 255] -> (1, 3, H, W), the convention of the project."""
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)[None])).float() / 127.5 - 1.0


def pixels_of(processor, images, **kwargs):
    return processor(images, return_tensors="pt", **kwargs).pixel_values


# ------------------------------------------------------------------------------------------------------ the range


def test_all_byte_values_become_x_over_127_5_minus_1_to_the_last_bit(processor):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = pixels_of(processor, np.stack([values] * 3, axis=-1))
    expected = (torch.arange(256, dtype=torch.float32) / 127.5 - 1.0).reshape(16, 16)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels[0], expected.expand(3, -1, -1))
    assert pixels.min() == -1.0
    assert pixels.max() == 1.0


def test_size_is_kept_by_default(processor, picture):
    assert pixels_of(processor, PIL.Image.fromarray(picture)).shape == (1, 3, 31, 45)


@pytest.mark.parametrize("size", [(1, 1), (2, 301), (37, 301), (192, 320), (3, 3)])
def test_any_size(processor, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert torch.equal(pixels_of(processor, PIL.Image.fromarray(image)), expected_pixels(image))
    assert torch.equal(pixels_of(processor, image), expected_pixels(image))
    assert torch.equal(pixels_of(processor, torch.from_numpy(image.transpose(2, 0, 1).copy())), expected_pixels(image))


# ------------------------------------------------------------------------------------------------ kinds of picture


def test_arrays_and_tensors_in_either_layout(processor, picture):
    last, first = picture, picture.transpose(2, 0, 1)
    for image in (last, first, torch.from_numpy(last), torch.from_numpy(first.copy()), last[::-1][::-1]):
        assert torch.equal(pixels_of(processor, image), expected_pixels(picture))


def test_layout_that_could_be_either_follows_the_type_or_the_argument(processor):
    image = np.random.default_rng(1).integers(0, 256, (3, 20, 3), dtype=np.uint8)
    as_last = pixels_of(processor, image)
    as_first = pixels_of(processor, torch.from_numpy(image))
    assert as_last.shape == (1, 3, 3, 20)
    assert as_first.shape == (1, 3, 20, 3)
    assert torch.equal(pixels_of(processor, image, input_data_format="channels_first"), as_first)
    assert torch.equal(pixels_of(processor, torch.from_numpy(image), input_data_format="channels_last"), as_last)


def test_batches_lists_and_nesting(processor, picture):
    single = expected_pixels(picture)
    batch = np.stack([picture, 255 - picture])
    expected = torch.cat([single, expected_pixels(255 - picture)])
    for images in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2), list(batch), [[batch[0]], [batch[1]]]):
        assert torch.equal(pixels_of(processor, images), expected)
    mixed = [PIL.Image.fromarray(picture), torch.from_numpy(255 - picture)]
    assert torch.equal(pixels_of(processor, mixed), expected)


def test_grey(processor, picture):
    grey = picture[..., 0]
    expected = expected_pixels(np.stack([grey] * 3, axis=-1))
    for image in (grey, grey[..., None], grey[None], torch.from_numpy(grey), PIL.Image.fromarray(grey)):
        assert torch.equal(pixels_of(processor, image), expected)


def test_one_bit(processor, picture):
    dark = picture[..., 0] > 99
    expected = expected_pixels(np.stack([dark * np.uint8(255)] * 3, axis=-1))
    for image in (PIL.Image.fromarray(dark), dark, torch.from_numpy(dark)):
        assert torch.equal(pixels_of(processor, image), expected)


def test_16_bit_keeps_more_than_8_bits(processor):
    grey = np.array([[0, 1, 257], [300, 40000, 65535]], dtype=np.uint16)
    expected = torch.from_numpy(grey.astype(np.float64) / 65535 * 2 - 1).float().expand(1, 3, 2, 3)
    images = [PIL.Image.fromarray(grey), PIL.Image.fromarray(grey.astype(np.int32)), grey, torch.from_numpy(grey)]
    assert images[0].mode == "I;16"
    assert images[1].mode == "I"
    for image in [*images, grey.astype(">u2")]:
        assert torch.allclose(pixels_of(processor, image), expected, rtol=0, atol=2e-7)


def test_16_bit_grey_with_a_transparent_value(processor):
    grey = np.array([[0, 1000], [1000, 65535]], dtype=np.uint16)
    image = PIL.Image.fromarray(grey)
    image.info["transparency"] = 1000
    pixels = pixels_of(processor, image)[0, 0]
    assert torch.equal(pixels, torch.tensor([[-1.0, 1.0], [1.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_are_in_the_unit_range(processor, picture, dtype):
    unit = (torch.from_numpy(picture).double() / 255).to(dtype)
    expected = unit.float().permute(2, 0, 1)[None] * 2 - 1
    assert torch.allclose(pixels_of(processor, unit), expected, rtol=0, atol=5e-7)
    if dtype not in (torch.bfloat16,):
        assert torch.allclose(pixels_of(processor, unit.numpy()), expected, rtol=0, atol=5e-7)
    assert torch.allclose(pixels_of(processor, unit, do_rescale=False), expected, rtol=0, atol=5e-7)


def test_float_pil_image(processor):
    image = PIL.Image.fromarray(np.array([[0.0, 0.25], [0.5, 1.0]], dtype=np.float32))
    assert image.mode == "F"
    expected = torch.tensor([[-1.0, -0.5], [0.0, 1.0]]).expand(1, 3, 2, 2)
    assert torch.allclose(pixels_of(processor, image), expected, rtol=0, atol=1e-7)


def test_alpha_is_composed_onto_white(processor, picture):
    alpha = np.linspace(0, 255, 31 * 45).round().astype(np.uint8).reshape(31, 45)
    rgba = np.dstack([picture, alpha])
    share = alpha[..., None] / 255.0
    expected = torch.from_numpy((picture * share + 255 * (1 - share)) / 127.5 - 1).float().permute(2, 0, 1)[None]
    for image in (rgba, torch.from_numpy(rgba).permute(2, 0, 1), PIL.Image.fromarray(rgba), rgba / 255.0):
        assert torch.allclose(pixels_of(processor, image), expected, rtol=0, atol=1e-6)
    assert (pixels_of(processor, rgba)[0, :, 0, 0] == 1.0).all()


def test_grey_with_alpha(processor, picture):
    grey, alpha = picture[..., 0], np.full((31, 45), 51, dtype=np.uint8)
    two = np.dstack([grey, alpha])
    expected = torch.from_numpy((grey * 0.2 + 255 * 0.8) / 127.5 - 1).float().expand(1, 3, 31, 45)
    for image in (two, two.transpose(2, 0, 1), PIL.Image.fromarray(two)):
        assert torch.allclose(pixels_of(processor, image), expected, rtol=0, atol=1e-6)
    assert PIL.Image.fromarray(two).mode == "LA"


def test_palette(processor, picture):
    palette = PIL.Image.fromarray(picture).quantize(16)
    assert palette.mode == "P"
    assert torch.equal(pixels_of(processor, palette), expected_pixels(np.asarray(palette.convert("RGB"))))


def test_transparent_palette_and_colour_show_white(tmp_path, processor):
    palette = PIL.Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "p.png", transparency=1)
    pixels = pixels_of(processor, str(tmp_path / "p.png"))
    opaque = torch.tensor([10, 20, 30]) / 127.5 - 1
    assert torch.equal(pixels[0, :, 0, 0], opaque)
    assert (pixels[0, :, 0, 1] == 1.0).all()

    colour = np.zeros((1, 2, 3), dtype=np.uint8)
    colour[0, 1] = (9, 8, 7)
    PIL.Image.fromarray(colour).save(tmp_path / "rgb.png", transparency=(9, 8, 7))
    pixels = pixels_of(processor, tmp_path / "rgb.png")
    assert (pixels[0, :, 0, 0] == -1.0).all()
    assert (pixels[0, :, 0, 1] == 1.0).all()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX", "PA", "La", "RGBa"])
def test_other_modes(processor, picture, mode):
    image = PIL.Image.fromarray(picture)
    if mode in ("PA", "La", "RGBa"):
        image = image.convert({"PA": "PA", "La": "LA", "RGBa": "RGBA"}[mode])
    image = image.convert(mode)
    assert image.mode == mode
    rgb = image.convert("LA").convert("RGB") if mode == "La" else image.convert("RGBA").convert("RGB")
    assert torch.equal(pixels_of(processor, image), expected_pixels(np.asarray(rgb)))


# --------------------------------------------------------------------------------------------------------- files


def test_files_and_addresses(tmp_path, processor, picture):
    path = tmp_path / "picture.png"
    PIL.Image.fromarray(picture).save(path)
    address = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for source in (path, str(path), address, [str(path)]):
        assert torch.equal(pixels_of(processor, source), expected_pixels(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, processor, picture, orientation):
    upright = PIL.Image.fromarray(picture)
    undo = {
        2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Image.Transpose.ROTATE_180,
        4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Image.Transpose.TRANSPOSE,
        6: PIL.Image.Transpose.ROTATE_90,
        7: PIL.Image.Transpose.TRANSVERSE,
        8: PIL.Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    stored.save(path, exif=exif)
    assert torch.equal(pixels_of(processor, path), expected_pixels(picture))
    with PIL.Image.open(path) as image:
        assert torch.equal(pixels_of(processor, image), expected_pixels(picture))


def test_unreadable_files(tmp_path, processor, picture):
    with pytest.raises(ValueError, match=r"no such file: .*absent\.png"):
        processor(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"must be a readable file, got .*text\.png"):
        processor(tmp_path / "text.png")
    whole = tmp_path / "whole.jpg"
    PIL.Image.fromarray(picture).resize((200, 200)).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"must be a readable file, got .*cut\.jpg: ."):
        open_image(tmp_path / "cut.jpg")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be a readable file, got .*empty\.png"):
        open_image(tmp_path / "empty.png")
    with pytest.raises(ValueError, match="must be a readable file, got"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="must be a readable file, got data:image"):
        open_image("data:image/png;base64,???")
    with (
        PIL.Image.open(tmp_path / "cut.jpg") as lazy,
        pytest.raises(ValueError, match=r"got bytes that cannot be decoded: ."),
    ):
        processor(lazy)  # Pillow finds out when the pixels are needed


# ---------------------------------------------------------------------------------------------------- bad pictures


@pytest.mark.parametrize("channels", [5, 7])
def test_wrong_channel_count(processor, channels):
    with pytest.raises(ValueError, match=f"got {channels}"):
        processor(np.zeros((9, 9, channels), dtype=np.uint8), input_data_format="channels_last")
    with pytest.raises(ValueError, match="channels"):
        processor(np.zeros((9, 9, channels), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"3 channels .* got 1"):
        processor(np.zeros((9, 9), dtype=np.uint8), do_convert_rgb=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_pixels(processor, value):
    image = np.full((4, 4, 3), 0.5, dtype=np.float32)
    image[1, 2, 0] = value
    for bad in (image, torch.from_numpy(image)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            processor(bad)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 3), 1.5), r"\[0, 1\], got values from 1.5 to 1.5"),
        (np.full((4, 4, 3), -0.1, dtype=np.float32), r"\[0, 1\], got values from -0.1"),
        (np.full((4, 4, 3), 256), r"\[0, 255\], got values from 256"),
        (np.full((4, 4, 3), -1, dtype=np.int8), r"\[0, 255\], got values from -1"),
        (PIL.Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), r"\[0, 65535\], got values from 70000"),
        (np.full((4, 4, 3), 1j), "complex128"),
        (np.full((4, 4, 3), "a"), "boolean, integer or floating"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "empty"),
        (torch.zeros(3, 0, 4), "empty"),
        (PIL.Image.new("RGB", (0, 5)), "empty"),
        (np.zeros(4, dtype=np.uint8), "2 or 3 axes"),
        (np.zeros((1, 1, 1, 4, 4), dtype=np.uint8), "2 or 3 axes"),
        ([], "at least one image"),
        ([[]], "at least one image"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_bad_pictures(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor(image)


def test_without_rescaling_pixels_must_be_in_the_unit_range(processor, picture):
    with pytest.raises(ValueError, match="do_rescale=False"):
        processor(picture, do_rescale=False)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        processor(picture.astype(np.float32), do_rescale=False)


def test_sizes_that_differ(processor, picture):
    images = [picture, picture[:20]]
    with pytest.raises(ValueError, match="20x45, 31x45"):
        processor(images, return_tensors="pt")
    separate = processor(images).pixel_values
    assert [tuple(image.shape) for image in separate] == [(3, 31, 45), (3, 20, 45)]
    cropped = pixels_of(processor, images, do_center_crop=True, crop_size=16)
    assert cropped.shape == (2, 3, 16, 16)


def test_channels_last_output_is_refused(processor, picture):
    with pytest.raises(ValueError, match="channels_first"):
        processor(picture, data_format="channels_last")


# ------------------------------------------------------------------------------------------------ resize and crop


def test_resize_is_the_shortest_side_then_the_crop_is_the_middle(processor, picture):
    image = PIL.Image.fromarray(picture).resize((200, 100), PIL.Image.Resampling.BICUBIC)
    resized = pixels_of(processor, image, do_resize=True, size=64)
    assert resized.shape == (1, 3, 64, 128)
    # Pillow's own antialiased bicubic, on float channels: in 8 bits it also rounds and clips between its two passes
    channels = [PIL.Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(np.asarray(image), -1, 0)]
    reference = np.stack([channel.resize((128, 64), PIL.Image.Resampling.BICUBIC) for channel in channels], -1)
    # worst seen 7.2e-07
    assert torch.allclose(resized, expected_pixels(reference.clip(0, 255)), rtol=0, atol=2e-6)
    cropped = pixels_of(processor, image, do_resize=True, size=64, do_center_crop=True, crop_size=64)
    assert torch.equal(cropped, resized[..., 32:96])


def test_an_image_does_not_depend_on_its_batch(processor, picture):
    images = [picture, picture.astype(np.uint16) * 257, picture / 255.0, 255 - picture]
    options = {"do_resize": True, "size": 20, "do_center_crop": True, "crop_size": 20}
    together = pixels_of(processor, images, **options)
    for number, image in enumerate(images):
        assert torch.equal(together[number : number + 1], pixels_of(processor, image, **options))


@pytest.mark.parametrize("do_rescale", [True, False])
def test_overshoot_of_the_cubic_filter_stays_in_range(processor, do_rescale):
    edge = np.zeros((32, 32, 3), dtype=np.float32)
    edge[:, 16:] = 1.0
    pixels = pixels_of(processor, edge, do_resize=True, size=48, do_rescale=do_rescale)
    assert pixels.min() == -1.0
    assert pixels.max() == 1.0


# ---------------------------------------------------------------------------------------------------- and back again


def test_round_trip_of_bytes(processor, picture):
    pixels = pixels_of(processor, [picture, 255 - picture])
    back = processor.post_process(pixels)
    assert [image.mode for image in back] == ["RGB", "RGB"]
    assert np.array_equal(np.asarray(back[0]), picture)
    assert np.array_equal(np.asarray(back[1]), 255 - picture)
    assert np.array_equal(np.asarray(processor.post_process(pixels[0])[0]), picture)
    arrays = processor.post_process(pixels, output_type="np")
    assert arrays.dtype == np.float32
    assert arrays.shape == (2, 31, 45, 3)
    assert np.allclose(arrays[0], picture / 255.0, rtol=0, atol=1e-7)
    tensors = processor.post_process(pixels, output_type="pt")
    assert torch.allclose(tensors, (pixels + 1) / 2, rtol=0, atol=1e-7)
    assert torch.allclose(pixels_of(processor, tensors), pixels, rtol=0, atol=5e-7)


def test_output_is_rounded_and_clamped(processor):
    pixels = torch.tensor([-3.0, -1.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1, 1.0, 1.2]).expand(1, 3, 1, 6)
    back = np.asarray(processor.post_process(pixels)[0])
    assert back[0, :, 0].tolist() == [0, 0, 100, 101, 255, 255]
    assert processor.post_process(pixels, output_type="pt").max() == 1.0


def test_half_precision_output(processor, picture):
    pixels = pixels_of(processor, picture).to(torch.bfloat16)
    back = np.asarray(processor.post_process(pixels)[0]).astype(int)
    assert np.abs(back - picture).max() <= 1  # bfloat16 holds 8 bits of a value in [-1, 1]


def test_resize_is_undone(processor):
    y, x = np.mgrid[:90, :130]
    smooth = np.stack([127 + 100 * np.sin(x / 20), 127 + 100 * np.cos(y / 25), x + y], -1).round().astype(np.uint8)
    small = np.ascontiguousarray(smooth[:60, :70])
    pixels = processor([smooth, small], do_resize=True, size=48).pixel_values
    back = processor.post_process(pixels, target_sizes=[(90, 130), (60, 70)])
    assert [image.size for image in back] == [(130, 90), (70, 60)]
    for image, original in zip(back, (smooth, small)):
        error = np.asarray(image).astype(float)[4:-4, 4:-4] - original[4:-4, 4:-4]
        assert np.sqrt((error**2).mean()) < 1.0
    lists = processor.post_process(pixels, output_type="np", target_sizes=[(90, 130), (60, 70)])
    assert [array.shape for array in lists] == [(90, 130, 3), (60, 70, 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(1, 3, 4, 4), "output_type": "jpg"}, "'jpg'"),
        ({"images": torch.zeros(1, 4, 4, 4)}, r"\(3, H, W\), got \(4, 4, 4\)"),
        ({"images": torch.zeros(4, 4)}, r"\(B, 3, H, W\)"),
        ({"images": torch.full((1, 3, 4, 4), torch.nan)}, "NaN"),
        ({"images": torch.zeros(2, 3, 4, 4), "target_sizes": [(4, 4)]}, "target_sizes must hold 2 sizes, .* got 1"),
    ],
)
def test_bad_output(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor.post_process(**arguments)


def test_other_constants_are_undone_too(picture):
    processor = GPSTokenImageProcessor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    pixels = pixels_of(processor, picture)
    assert pixels.max() > 1.0
    assert np.array_equal(np.asarray(processor.post_process(pixels)[0]), picture)


def test_saving(tmp_path, picture):
    processor = GPSTokenImageProcessor(do_resize=True, size=24, do_center_crop=True, crop_size=24)
    processor.save_pretrained(tmp_path)
    again = GPSTokenImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert torch.equal(pixels_of(again, picture), pixels_of(processor, picture))


def test_pil_to_array_keeps_what_the_mode_holds():
    assert pil_to_array(PIL.Image.new("L", (3, 2))).shape == (2, 3, 1)
    assert pil_to_array(PIL.Image.new("RGB", (3, 2))).shape == (2, 3, 3)
    assert pil_to_array(PIL.Image.new("LA", (3, 2))).shape == (2, 3, 4)
    assert pil_to_array(PIL.Image.new("I;16", (3, 2))).dtype == np.uint16


# ------------------------------------------------------------------------------------------------------ the network


@pytest.fixture
def server(picture, monkeypatch):
    """The address of a server with a picture, a way round to it, a text, and nothing else."""
    data = BytesIO()
    PIL.Image.fromarray(picture).save(data, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = {"/picture.png": data.getvalue(), "/text": b"no picture"}.get(self.path, b"")
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/picture.png")
            else:
                self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_pictures_from_the_network(processor, picture, server):
    """With the standard library alone."""
    for name in ("picture.png", "moved"):
        assert torch.equal(pixels_of(processor, f"{server}/{name}"), expected_pixels(picture))


@pytest.mark.parametrize("name", ["nothing.png", "text"])
def test_bad_addresses_name_themselves(processor, server, name):
    with pytest.raises(ValueError, match=f"must be a readable file, got {server}/{name}"):
        processor(f"{server}/{name}")


def test_a_server_out_of_reach(processor):
    with pytest.raises(ValueError, match=r"must be a readable file, got http://127\.0\.0\.1:1/a\.png"):
        processor("http://127.0.0.1:1/a.png")
