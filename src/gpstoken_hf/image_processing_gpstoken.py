# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GPSTokenImageProcessor: images of any kind -> `pixel_values` in [-1, 1], and back.

Shapes: B images, C channels, H x W pixels of an image.
"""

from __future__ import annotations

import base64
import binascii
import os
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

# diffusers looks in the module of a pipeline component for the base class that loads it: ImageProcessingMixin.
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict

from .file_checks import check_json_files, check_number, refusing
from .pushing import PushWithCardMixin, save_with_card

# How long a server may stay silent.
DOWNLOAD_SECONDS = 30
# All that Pillow raises for a file that it cannot read.
PILLOW_READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, PIL.Image.DecompressionBombError)


def open_image(source: str | os.PathLike) -> PIL.Image.Image:
    """Read a whole image and turn it upright by its EXIF orientation.

    Args:
        source (`str` or `os.PathLike`): a file, or an `http(s)://` or base64 `data:image/` address.

    Returns:
        `PIL.Image.Image`: the image in the mode of the file.

    Raises:
        ValueError: if the file does not exist, is not an image, or is damaged.
    """
    name = os.fspath(source)
    if not isinstance(name, str):
        raise ValueError(f"image must be a file name of type str, got {type(name).__name__}")
    shown = name if len(name) <= 200 else name[:100] + "..."
    try:
        with PIL.Image.open(_open_stream(name)) as image:
            image.load()
            return PIL.ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise ValueError(f"image must be a readable file, got no such file: {shown}") from error
    except PILLOW_READ_ERRORS as error:
        raise ValueError(f"image must be a readable file, got {shown}: {error}") from error


def _open_stream(name: str) -> str | BytesIO:
    if name.startswith(("http://", "https://")):
        try:
            # Some servers refuse clients without a name.
            request = urllib.request.Request(name, headers={"User-Agent": "gpstoken-hf"})
            with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as response:
                return BytesIO(response.read())
        except (OSError, HTTPException) as error:
            raise ValueError(str(error)) from error
    if name.startswith("data:image/"):
        try:
            return BytesIO(base64.b64decode(name.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise ValueError(f"not base64: {error}") from error
    return name


class GPSTokenImageProcessor(PushWithCardMixin, TorchvisionBackend):
    """Turns images into inputs of a [`GPSTokenModel`], and its outputs into images.

    Takes a PIL image, a NumPy array, a torch tensor, a file name or address, or a (nested) list of these. An array or
    tensor with four axes is a batch. Every kind of image becomes RGB:

    | input | values |
    |---|---|
    | uint8 and other integers | [0, 255] |
    | uint16, PIL `I;16` and `I` | [0, 65535] |
    | float16, bfloat16, float32, float64, PIL `F` | [0, 1] |
    | bool, PIL `1` | black and white |
    | 1 channel, or no channel axis | grey |
    | 2 or 4 channels, PIL `LA`, `PA`, `RGBA`, a transparent palette or colour | composed onto white |
    | PIL `P`, `CMYK`, `YCbCr`, `HSV` | converted by Pillow |

    PIL images and files are turned upright by their EXIF orientation. The channel axis of an array or tensor is the
    first or the last axis, whichever has 1 to 4 entries. If both have, `input_data_format` decides; by default it is
    the last axis of an array and the first of a tensor.

    Images keep their size by default. Pixels become `x / 127.5 - 1`, computed in float32.

    Args:
        do_convert_rgb (`bool`, *optional*, defaults to `True`): convert to RGB. If `False`, images must have
            `len(image_mean)` channels.
        do_resize (`bool`, *optional*, defaults to `False`): resize to `size` with antialiasing, and clamp overshoot.
        size (`dict`, *optional*, defaults to `{"shortest_edge": 256}`): target in pixels; also `{"height": h,
            "width": w}`.
        resample (`PILImageResampling`, *optional*, defaults to `BICUBIC`): filter of the resize.
        do_center_crop (`bool`, *optional*, defaults to `False`): crop the centre to `crop_size`. Smaller images are
            padded with black.
        crop_size (`dict`, *optional*, defaults to `{"height": 256, "width": 256}`): size of the crop in pixels.
        do_rescale (`bool`, *optional*, defaults to `True`): bring pixels of every type to [0, 1]. If `False`, they
            must be floating point in [0, 1].
        do_normalize (`bool`, *optional*, defaults to `True`): map [0, 1] to [-1, 1] by `image_mean` and `image_std`.
        image_mean, image_std (`list[float]`, *optional*, defaults to `[0.5, 0.5, 0.5]`): statistics for
            `do_normalize`.

    Raises:
        ValueError: when called, if pixels are not finite or leave the range of their type; if an image is empty, does
            not have 1 to 4 channels, or cannot be read; if images of several sizes shall become one tensor.

    Examples:
        ```python
        >>> import numpy as np
        >>> from gpstoken_hf import GPSTokenImageProcessor

        >>> processor = GPSTokenImageProcessor()
        >>> image = np.zeros((48, 64, 3), dtype=np.uint8)
        >>> pixel_values = processor(image, return_tensors="pt").pixel_values
        >>> pixel_values.shape, pixel_values.min().item()
        (torch.Size([1, 3, 48, 64]), -1.0)
        >>> processor.post_process(pixel_values)[0].size
        (64, 48)

        ```
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    do_convert_rgb = True
    do_resize = False
    size: ClassVar[dict[str, int]] = {"shortest_edge": 256}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_center_crop = False
    crop_size: ClassVar[dict[str, int]] = {"height": 256, "width": 256}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean: ClassVar[list[float]] = [0.5, 0.5, 0.5]
    image_std: ClassVar[list[float]] = [0.5, 0.5, 0.5]

    save_pretrained = save_with_card(ImageProcessingMixin.save_pretrained)

    # -------------------------------------------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load from a folder, a file or the Hub, as every image processor of transformers.

        Raises:
            ValueError: if the file is malformed, or a setting has a wrong type or leaves its range.
            OSError: if there is no such file.
        """
        names = (kwargs.get("image_processor_filename", "preprocessor_config.json"), "processor_config.json")
        check_json_files(pretrained_model_name_or_path, names, kwargs)
        with refusing(f"the image processor of {pretrained_model_name_or_path}"):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            processor = loaded[0] if isinstance(loaded, tuple) else loaded
            processor.check_settings()
        return loaded

    def check_settings(self) -> None:
        """Check what a file may have set.

        Raises:
            ValueError: if a switch is no boolean, a side is not from 1 to 65536 pixels, or a factor is not finite.
        """
        for name in ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("size", "crop_size"):
            for side, value in vars(getattr(self, name)).items():
                if value is not None:
                    check_number(f"{side} of {name}", value, 1, 2**16)
        if self.resample is not None:
            PILImageResampling(self.resample)
        check_number("rescale_factor", self.rescale_factor, 1e-6, 1e6)
        for name, low in (("image_mean", -1e6), ("image_std", 1e-6)):
            values = getattr(self, name)
            values = values if isinstance(values, list | tuple) else [values]
            check_number(f"the number of channels of {name}", len(values), 1, 4)
            for value in values:
                check_number(f"every entry of {name}", value, low, 1e6)

    # ----------------------------------------------------------------------------------------------- images in

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list:
        flat = _flatten(images)
        if not flat:
            raise ValueError("images must hold at least one image, got an empty list")
        return flat

    def process_image(
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: torch.device | str | None = None,
        do_rescale: bool | None = None,
        image_mean: Sequence[float] | float | None = None,
        do_normalize: bool | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One image of any kind -> `(C, H, W)` float32 in [0, 255], or in [0, 1] without `do_rescale`."""
        if isinstance(image, PIL.Image.Image):
            array = pil_to_array(image)
            input_data_format = ChannelDimension.LAST
            prefers_last = True
        else:
            array = image
            prefers_last = isinstance(image, np.ndarray)
        if 0 in array.shape:
            raise ValueError(f"image must have pixels, got an empty one of shape {tuple(array.shape)}")
        pixels = _to_float_pixels(_to_tensor(array), unit_range=not do_rescale)
        pixels = _channels_first(pixels, input_data_format, prefers_last)
        if device is not None:
            pixels = pixels.to(device)
        if do_convert_rgb:
            return _to_rgb(pixels, white=255.0 if do_rescale else 1.0)
        if do_normalize and isinstance(image_mean, Sequence) and len(image_mean) != pixels.shape[0]:
            raise ValueError(
                f"image must have {len(image_mean)} channels with do_convert_rgb=False, got {pixels.shape[0]}"
            )
        return pixels

    def _preprocess(
        self,
        images: list[torch.Tensor],
        do_resize: bool | None,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_center_crop: bool | None,
        crop_size: SizeDict,
        do_rescale: bool | None,
        rescale_factor: float,
        do_normalize: bool | None,
        image_mean: Sequence[float] | float | None,
        image_std: Sequence[float] | float | None,
        do_pad: bool | None = None,
        pad_size: SizeDict | None = None,
        data_format: str | ChannelDimension | None = None,
        disable_grouping: bool | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if data_format not in (None, ChannelDimension.FIRST, ChannelDimension.FIRST.value):
            raise ValueError(f"data_format must be 'channels_first', got {data_format!r}")
        groups, index = group_images_by_shape(images, disable_grouping=disable_grouping)
        for shape, batch in groups.items():
            if do_resize:
                batch = self.resize(batch, size=size, resample=resample)
                batch = batch.clamp(0.0, 255.0 if do_rescale else 1.0)  # cubic filters overshoot at edges
            if do_center_crop:
                batch = self.center_crop(batch, crop_size)
            groups[shape] = self.rescale_and_normalize(
                batch, bool(do_rescale), rescale_factor, bool(do_normalize), image_mean, image_std
            )
        images = reorder_images(groups, index)
        if do_pad:
            images = self.pad(images, pad_size=pad_size, disable_grouping=disable_grouping)
        sizes = sorted({tuple(image.shape[-2:]) for image in images})
        if return_tensors is not None and len(sizes) > 1:
            raise ValueError(
                f"images must have one size for return_tensors={return_tensors!r} (use do_resize and do_center_crop), "
                f"got height x width {', '.join(f'{h}x{w}' for h, w in sizes)}"
            )
        return BatchFeature(data={"pixel_values": images}, tensor_type=return_tensors)

    def rescale_and_normalize(
        self,
        images: torch.Tensor,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Sequence[float] | float | None,
        image_std: Sequence[float] | float | None,
    ) -> torch.Tensor:
        """`(B, C, H, W)` in [0, 255] -> [-1, 1]; with the default constants exactly `x / 127.5 - 1`."""
        halves = all(np.all(np.asarray(value) == 0.5) for value in (image_mean, image_std))
        if do_rescale and do_normalize and halves and rescale_factor == 1 / 255:
            return images / 127.5 - 1.0
        return super().rescale_and_normalize(
            images, do_rescale, rescale_factor, do_normalize, _as_tuple(image_mean), _as_tuple(image_std)
        )

    # ---------------------------------------------------------------------------------------------- images out

    def post_process(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        output_type: str = "pil",
        target_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[PIL.Image.Image] | np.ndarray | list[np.ndarray] | torch.Tensor | list[torch.Tensor]:
        """Undo the preprocessing: output of the model in [-1, 1] -> images.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)` or `(3, H, W)`, or sequence of the latter): in the range of
                `pixel_values`, to which values are clamped, because decoders overshoot a little.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.
            target_sizes (sequence of `tuple[int, int]`, *optional*): the original `(H, W)` of every image, to undo
                `do_resize` (with antialiasing and the filter `resample`). A centre crop cannot be undone.

        Returns:
            For `"pil"` a list of 8-bit RGB images, rounded to nearest. For `"np"` an array `(B, H, W, 3)`, for `"pt"`
            a tensor `(B, 3, H, W)`, both float32 in [0, 1], or lists of single images if their sizes differ.

        Raises:
            ValueError: if `output_type` is unknown, an image does not have 3 channels or is not finite, or the number
                of target sizes is not that of images.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}")
        if isinstance(images, torch.Tensor) and images.ndim == 3:
            images = images[None]
        if isinstance(images, torch.Tensor) and images.ndim != 4:
            raise ValueError(f"images must be of shape (B, 3, H, W), got {tuple(images.shape)}")
        if target_sizes is not None and len(target_sizes) != len(images):
            raise ValueError(f"target_sizes must hold {len(images)} sizes, one per image, got {len(target_sizes)}")

        restored = []
        for number, image in enumerate(images):
            if image.ndim != 3 or image.shape[0] != 3:
                raise ValueError(f"image {number} must be of shape (3, H, W), got {tuple(image.shape)}")
            image = self._to_unit_range(image.to(torch.float32))
            if not bool(torch.isfinite(image).all()):
                raise ValueError(f"image {number} must be finite, got NaN or infinite values")
            image = image.clamp(0.0, 1.0)
            if target_sizes is not None:
                height, width = (int(side) for side in target_sizes[number])
                image = self.resize(image, SizeDict(height=height, width=width), resample=self.resample)
                image = image.clamp(0.0, 1.0)
            restored.append(image)

        same_size = len({image.shape for image in restored}) == 1
        if output_type == "pt":
            return torch.stack(restored) if same_size else restored
        if output_type == "np":
            arrays = [image.permute(1, 2, 0).cpu().numpy() for image in restored]
            return np.stack(arrays) if same_size else arrays
        return [
            PIL.Image.fromarray((image * 255.0).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
            for image in restored
        ]

    def _to_unit_range(self, image: torch.Tensor) -> torch.Tensor:
        if self.do_normalize:
            mean, std = (
                torch.as_tensor(value, dtype=torch.float32, device=image.device).reshape(-1, 1, 1)
                for value in (self.image_mean, self.image_std)
            )
            return image * std + mean
        return image


# ------------------------------------------------------------------------------------------ one image, step by step


def _flatten(images: Any) -> list:
    """Nested images -> a flat list of PIL images, arrays and tensors. Reads files and splits batches."""
    if isinstance(images, (str, os.PathLike)):
        return [open_image(images)]
    if isinstance(images, PIL.Image.Image):
        return [images]
    if isinstance(images, (np.ndarray, torch.Tensor)):
        if images.ndim == 4:
            return list(images)
        if images.ndim in (2, 3):
            return [images]
        raise ValueError(f"images must have 2 or 3 axes, or 4 for a batch, got shape {tuple(images.shape)}")
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in _flatten(entry)]
    raise ValueError(f"images must be PIL images, arrays, tensors or file names, got {type(images).__name__}")


def pil_to_array(image: PIL.Image.Image) -> np.ndarray:
    """An image of any PIL mode -> an upright array `(H, W, C)` of 1 (grey), 2 (grey and alpha), 3 or 4 channels.

    16-bit grey is uint16, mode `F` is float32, mode `1` is bool, all else is uint8.

    Raises:
        ValueError: if Pillow cannot decode the image, or a pixel of a 16-bit mode leaves [0, 65535].
    """
    try:
        image = PIL.ImageOps.exif_transpose(image)
        mode, key = image.mode, image.info.get("transparency")
        if mode == "1":
            return np.asarray(image)[..., None]
        if mode == "F":
            return np.asarray(image)[..., None]
        if mode == "I" or mode.startswith("I;16"):
            grey = np.asarray(image).astype(np.int64)
            if grey.size and not 0 <= grey.min() <= grey.max() <= 65535:
                raise ValueError(
                    f"pixels of mode {mode!r} must be in [0, 65535], got values from {grey.min()} to {grey.max()}"
                )
            grey = grey.astype(np.uint16)
            if isinstance(key, int):
                return np.stack([grey, np.where(grey == key, 0, 65535).astype(np.uint16)], axis=-1)
            return grey[..., None]
        if mode == "La":  # Pillow does not convert premultiplied grey to RGBA
            image = image.convert("LA")
        if {"A", "a"} & set(image.getbands()) or key is not None:
            return np.asarray(image.convert("RGBA"))
        if mode == "L":
            return np.asarray(image)[..., None]
        return np.asarray(image.convert("RGB"))
    except ValueError:
        raise
    except (OSError, SyntaxError, EOFError) as error:  # Pillow decodes a file when its pixels are read
        raise ValueError(f"image must be a readable file, got bytes that cannot be decoded: {error}") from error


def _to_tensor(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array
    if array.dtype.kind not in "buif" or array.dtype == np.longdouble:
        raise ValueError(f"pixels must be boolean, integer or floating point, got {array.dtype}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # A copy, because PIL's buffers are read-only and flipped views have negative strides.
    return torch.from_numpy(array.copy())


def _to_float_pixels(pixels: torch.Tensor, unit_range: bool) -> torch.Tensor:
    """Pixels of any type -> float32 in [0, 255]; with `unit_range`, floating point in [0, 1] -> float32 in [0, 1]."""
    dtype = pixels.dtype
    if pixels.is_complex() or pixels.is_quantized:
        raise ValueError(f"pixels must be boolean, integer or floating point, got {dtype}")
    if unit_range and not pixels.is_floating_point():
        raise ValueError(f"pixels must be floating point in [0, 1] with do_rescale=False, got {dtype}")
    values = pixels.to(torch.float32)
    if pixels.is_floating_point() and not bool(torch.isfinite(values).all()):
        raise ValueError("pixels must be finite, got NaN or infinite values")
    limit = 1 if dtype == torch.bool or pixels.is_floating_point() else 65535 if dtype == torch.uint16 else 255
    low, high = (float(value) for value in torch.aminmax(values))
    if low < 0 or high > limit:
        raise ValueError(f"{dtype} pixels must be in [0, {limit}], got values from {low:g} to {high:g}")
    if limit == 65535:
        return values / 257.0  # 65535 = 255 * 257
    return values if limit == 255 or unit_range else values * 255.0


def _channels_first(
    pixels: torch.Tensor, data_format: str | ChannelDimension | None, prefers_last: bool
) -> torch.Tensor:
    """`(H, W)`, `(H, W, C)` or `(C, H, W)` -> `(C, H, W)` with 1 to 4 channels."""
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise ValueError(f"image must have 2 or 3 axes, got shape {tuple(pixels.shape)}")
    allowed = (1, 2, 3, 4)
    if data_format is None:
        first, last = pixels.shape[0] in allowed, pixels.shape[-1] in allowed
        data_format = ChannelDimension.LAST if last and (prefers_last or not first) else ChannelDimension.FIRST
    if ChannelDimension(data_format) == ChannelDimension.LAST:
        pixels = pixels.permute(2, 0, 1)
    if pixels.shape[0] not in allowed:
        raise ValueError(
            "image must have 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA) channels, "
            f"got {pixels.shape[0]} in shape {tuple(pixels.shape)}, channels first"
        )
    return pixels.contiguous()


def _to_rgb(pixels: torch.Tensor, white: float) -> torch.Tensor:
    """1 to 4 channels `(C, H, W)` in [0, white] -> RGB `(3, H, W)`, composed onto white."""
    colour = pixels
    if pixels.shape[0] in (2, 4):
        colour, alpha = pixels[:-1], pixels[-1:] / white
        colour = colour * alpha + white * (1.0 - alpha)
    return colour.expand(3, -1, -1).contiguous()


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
