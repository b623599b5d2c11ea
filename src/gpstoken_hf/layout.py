# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""GaussianLayout: where the tokens of a batch of images sit, before the encoder refines them.

Shapes: B batch, L tokens, H x W pixels of an image.

A layout is made by a partition (Alg. 1), by the calibration of a generated one (Alg. 2), drawn from a bank, or given
by hand. All of them are this class.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .file_checks import read_header
from .gaussians import NUM_GAUSSIAN_PARAMS, boxes_to_gaussians, check_gaussians, gaussians_to_boxes

if TYPE_CHECKING:
    import PIL.Image

# Padded rows hold these values everywhere in this package: a legal Gaussian, and one pixel that every image has.
PADDING_GAUSSIAN = (0.5, 0.5, 0.0, 0.0, 0.0)
PADDING_BOX = (0, 0, 0, 0)

FILE_FORMAT = "gpstoken-layout-1"

Self = TypeVar("Self", bound="GaussianLayout")


@dataclass(eq=False)
class GaussianLayout:
    r"""The layout of a batch of images: a Gaussian and a region for every token.

    Args:
        gaussians (`torch.Tensor` of shape `(B, L, 5)`): floating point `[sigma_x, sigma_y, rho, mu_x, mu_y]` in
            normalised units (see docs/conventions.md).
        boxes (`torch.Tensor` of shape `(B, L, 4)`, *optional*): the regions, inclusive pixel indices
            `[x0, y0, x1, y1]`. `encode` derives them from the Gaussians where they are `None`.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 for a token, 0 for padding. All tokens are
            real by default.

    Padded rows are overwritten with `PADDING_GAUSSIAN` and `PADDING_BOX`. `is_padded` is False where no
    mask was given, so that the mask need not be read to see that there is no padding.

    `layout[i]` is the layout of image i as a batch of one without padding; slices, index lists and boolean masks
    select several images. `len(layout)` is B.

    Raises:
        ValueError: if a shape, a dtype or a device does not fit. Values are checked by `check`.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf import GaussianLayout

        >>> boxes = torch.tensor([[[0, 0, 31, 63], [32, 0, 63, 31], [32, 32, 63, 63]]])  # three regions of 64 x 64
        >>> layout = GaussianLayout.from_boxes(boxes, image_size=(64, 64))
        >>> layout.gaussians.shape
        torch.Size([1, 3, 5])
        >>> GaussianLayout.stack([layout, layout[0]]).num_tokens.tolist()
        [3, 3]

        ```
    """

    gaussians: torch.Tensor
    boxes: torch.Tensor | None = None
    attention_mask: torch.Tensor = None  # filled in by __post_init__

    def __post_init__(self) -> None:
        gaussians, boxes, mask = self.gaussians, self.boxes, self.attention_mask
        self.is_padded = mask is not None
        _check_tensor("gaussians", gaussians, (None, None, NUM_GAUSSIAN_PARAMS))
        if not gaussians.is_floating_point():
            raise ValueError(f"gaussians must be floating point, got {gaussians.dtype}")
        shape = tuple(gaussians.shape[:2])
        if shape[0] > 0 and shape[1] == 0:
            raise ValueError(f"gaussians must hold at least 1 token per image, got shape {tuple(gaussians.shape)}")
        if boxes is not None:
            _check_tensor("boxes", boxes, (*shape, 4))
            if boxes.is_floating_point() or boxes.dtype == torch.bool:
                raise ValueError(f"boxes must be integers, inclusive pixels [x0, y0, x1, y1], got {boxes.dtype}")
            self.boxes = boxes = boxes.to(torch.int64)
        if mask is None:
            self.attention_mask = torch.ones(shape, dtype=torch.int64, device=gaussians.device)
        else:
            _check_tensor("attention_mask", mask, shape)
            self.attention_mask = mask.to(torch.int64)
        for name, tensor in (("boxes", boxes), ("attention_mask", self.attention_mask)):
            if tensor is not None and tensor.device != gaussians.device:
                raise ValueError(f"{name} must be on the device of gaussians, {gaussians.device}, got {tensor.device}")
        if mask is not None:
            is_padding = (self.attention_mask == 0).unsqueeze(-1)
            self.gaussians = _fill(gaussians, is_padding, PADDING_GAUSSIAN)
            if boxes is not None:
                self.boxes = _fill(boxes, is_padding, PADDING_BOX)

    # -- made from

    @classmethod
    def from_boxes(
        cls,
        boxes: torch.Tensor,
        image_size: tuple[int, int],
        attention_mask: torch.Tensor | None = None,
        sigma_scale: float = 2 / 3,
        align_corners: bool = True,
    ) -> GaussianLayout:
        """The layout of given regions, a Gaussian on each (Eq. 4).

        Args:
            boxes (`torch.Tensor` of shape `(B, L, 4)`): inclusive pixel indices `[x0, y0, x1, y1]`.
            image_size (`tuple[int, int]`): `(H, W)` in pixels.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 for a region, 0 for padding.
            sigma_scale (`float`, *optional*, defaults to 2/3): `sigma_scale` of the model's config.
            align_corners (`bool`, *optional*, defaults to `True`): `align_corners` of the model's config.

        Raises:
            ValueError: if a shape or dtype does not fit, or a box leaves the image.
        """
        _check_tensor("boxes", boxes, (None, None, 4))
        layout = cls(boxes_to_gaussians(boxes, image_size, sigma_scale, align_corners), boxes, attention_mask)
        layout.check(image_size)
        return layout

    @classmethod
    def from_gaussians(
        cls,
        gaussians: torch.Tensor,
        image_size: tuple[int, int],
        attention_mask: torch.Tensor | None = None,
        sigma_scale: float = 2 / 3,
        align_corners: bool = True,
    ) -> GaussianLayout:
        """The layout of given Gaussians, each with the region that it stands for.

        Args:
            gaussians (`torch.Tensor` of shape `(B, L, 5)`): `[sigma_x, sigma_y, rho, mu_x, mu_y]`.
            image_size (`tuple[int, int]`): `(H, W)` in pixels.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 for a token, 0 for padding.
            sigma_scale (`float`, *optional*, defaults to 2/3): `sigma_scale` of the model's config.
            align_corners (`bool`, *optional*, defaults to `True`): `align_corners` of the model's config.

        Raises:
            ValueError: if a shape or dtype does not fit, or a Gaussian is not legal.
        """
        layout = cls(gaussians, None, attention_mask)
        layout.check()
        return layout.with_boxes(image_size, sigma_scale, align_corners)

    @classmethod
    def stack(cls, layouts: Sequence[GaussianLayout]) -> GaussianLayout:
        """Join layouts into one batch, padded to the longest.

        Args:
            layouts (`Sequence[GaussianLayout]`): at least one; all with boxes or all without.

        Raises:
            ValueError: if there is no layout, or only some have boxes.
        """
        if not layouts:
            raise ValueError("layouts must hold at least one layout, got none")
        has_boxes = {layout.boxes is not None for layout in layouts}
        if len(has_boxes) > 1:
            raise ValueError("layouts must all have boxes or all have none, got both kinds")
        return _concatenate(layouts, dim=0)

    @classmethod
    def join(cls, layouts: Sequence[GaussianLayout]) -> GaussianLayout:
        """Join layouts of parts of the same B images into one: the tokens of the first part, then of the second, ...

        Parts are padded to the longest, so that every part has as many rows.

        Args:
            layouts (`Sequence[GaussianLayout]`): one per part, all of B images, in the frame of the whole images.
        """
        return _concatenate(layouts, dim=1)

    # -- as a batch

    def __len__(self) -> int:
        return self.gaussians.shape[0]

    def __getitem__(self: Self, index: Any) -> Self:
        if not isinstance(index, int):
            return self._map(lambda tensor: tensor[index])
        one = self._map(lambda tensor: tensor[index].unsqueeze(0))
        if not one.is_padded:
            return one
        is_real = one.attention_mask[0] == 1
        boxes = None if one.boxes is None else one.boxes[:, is_real]
        return replace(one, gaussians=one.gaussians[:, is_real], boxes=boxes, attention_mask=None)

    def __iter__(self: Self) -> Iterator[Self]:
        return (self[index] for index in range(len(self)))

    @property
    def num_tokens(self) -> torch.Tensor:
        """Real tokens of every image, `(B,)` int64."""
        return self.attention_mask.sum(1)

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.gaussians.device

    def to(self: Self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same layout on another device, its Gaussians in another dtype."""
        moved = self._map(lambda tensor: tensor.to(device))
        return moved if dtype is None else moved._map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def expand(self: Self, batch_size: int) -> Self:
        """One layout repeated for `batch_size` images; a copy that may be edited.

        Raises:
            ValueError: if the layout is neither of one image nor of `batch_size` images.
        """
        if len(self) not in (1, batch_size):
            raise ValueError(f"layout must be of 1 or {batch_size} images, got {len(self)}")
        return self._map(lambda tensor: tensor.expand(batch_size, *tensor.shape[1:]).clone())

    def with_boxes(
        self: Self, image_size: tuple[int, int], sigma_scale: float = 2 / 3, align_corners: bool = True
    ) -> Self:
        """This layout, with boxes derived from its Gaussians where it has none."""
        if self.boxes is not None:
            return self
        boxes = gaussians_to_boxes(self.gaussians, image_size, sigma_scale, align_corners)
        return replace(self, boxes=boxes, attention_mask=self.attention_mask if self.is_padded else None)

    def _map(self: Self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.is_padded:
            values["attention_mask"] = None
        return replace(self, **{name: None if value is None else function(value) for name, value in values.items()})

    # -- checked

    def check(self, image_size: tuple[int, int] | None = None) -> None:
        """Raise a ValueError unless the values are legal. Reads them, so it synchronises.

        Args:
            image_size (`tuple[int, int]`, *optional*): `(H, W)` in pixels; boxes are checked against it where given.

        Raises:
            ValueError: if the mask holds other values than 0 and 1 or leaves an image without a token, a Gaussian is
                not finite or out of range, or a box is reversed or leaves the image.
        """
        mask = self.attention_mask
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"attention_mask must hold 0 and 1, got values from {mask.min()} to {mask.max()}")
        if not mask.any(1).all():
            raise ValueError("attention_mask must leave every image at least one token, got an image with none")
        check_gaussians(self.gaussians, "gaussians")
        if self.boxes is not None:
            x0, y0, x1, y1 = self.boxes.unbind(-1)
            is_legal = (x0 >= 0) & (y0 >= 0) & (x0 <= x1) & (y0 <= y1)
            where = "with x0 <= x1 and y0 <= y1"
            if image_size is not None:
                height, width = image_size
                is_legal &= (x1 < width) & (y1 < height)
                where = f"inside the {height} x {width} image"
            if not is_legal.all():
                first = self.boxes[~is_legal][0].tolist()
                raise ValueError(f"boxes must be inclusive pixels [x0, y0, x1, y1] {where}, got {first}")

    # -- saved, loaded, drawn

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layout to a safetensors file."""
        tensors = {field.name: getattr(self, field.name) for field in fields(GaussianLayout)}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items() if value is not None}
        save_file(tensors, path, metadata={"format": FILE_FORMAT})

    @classmethod
    def load(cls, path: str | os.PathLike[str], image_size: tuple[int, int] | None = None) -> GaussianLayout:
        """Read a layout that `save` wrote, and check it.

        Args:
            path (`str` or `os.PathLike`): the file.
            image_size (`tuple[int, int]`, *optional*): `(H, W)`; boxes must lie inside.

        Raises:
            ValueError: if the file is damaged, is not a layout, or holds an illegal one.
        """
        header = read_header(path)
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            if found != FILE_FORMAT:
                raise ValueError(f"{path} must be a layout file of format {FILE_FORMAT!r}, got format {found!r}")
            allowed = {field.name for field in fields(GaussianLayout)}
            if not {"gaussians", "attention_mask"} <= set(header) <= allowed:
                raise ValueError(f"{path} must hold the tensors {sorted(allowed)}, got {sorted(header)}")
            tensors = {name: file.get_tensor(name) for name in header}
        if (tensors["attention_mask"] == 1).all():
            del tensors["attention_mask"]
        layout = GaussianLayout(**tensors)
        layout.check(image_size)
        return layout

    def draw(
        self, image: torch.Tensor | PIL.Image.Image, index: int = 0, zoom: int = 1, align_corners: bool = True
    ) -> PIL.Image.Image:
        """Draw the Gaussians of one image over it, as ellipses of one sigma.

        Args:
            image (`torch.Tensor` of shape `(3, H, W)` in [-1, 1], or `PIL.Image.Image`): the picture to draw on.
            index (`int`, *optional*, defaults to 0): which image of the batch the layout is drawn of.
            zoom (`int`, *optional*, defaults to 1): whole factor of enlargement.
            align_corners (`bool`, *optional*, defaults to `True`): `align_corners` of the model's config.

        Returns:
            `PIL.Image.Image`: the drawing.
        """
        from .visualization import draw_gaussians, tensor_to_pil

        picture = tensor_to_pil(image) if isinstance(image, torch.Tensor) else image
        gaussians = self[index].gaussians[0].float().cpu()
        return draw_gaussians(picture, gaussians, zoom=zoom, align_corners=align_corners)


def _concatenate(layouts: Sequence[GaussianLayout], dim: int) -> GaussianLayout:
    """Join layouts along images (0) or tokens (1), each padded to the longest; without padding there is no mask."""
    longest = max(layout.gaussians.shape[1] for layout in layouts)

    def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        padded = [
            torch.cat([tensor, tensor.new_zeros(tensor.shape[0], longest - tensor.shape[1], *tensor.shape[2:])], 1)
            for tensor in tensors
        ]
        return torch.cat(padded, dim)

    boxes = [layout.boxes for layout in layouts if layout.boxes is not None]
    is_padded = any(layout.is_padded or layout.gaussians.shape[1] < longest for layout in layouts)
    return GaussianLayout(
        join([layout.gaussians for layout in layouts]),
        join(boxes) if boxes else None,
        join([layout.attention_mask for layout in layouts]) if is_padded else None,
    )


def _check_tensor(name: str, value: Any, shape: tuple[int | None, ...]) -> None:
    if isinstance(value, torch.Tensor):
        fits = value.ndim == len(shape) and all(size is None or size == got for size, got in zip(shape, value.shape))
        if fits:
            return
    # Formatted on failure only: torch.compile cannot format the sizes of a dynamic graph.
    shown = f"({', '.join(str('BL'[axis] if size is None else size) for axis, size in enumerate(shape))})"
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a tensor of shape {shown}, got {type(value).__name__}")
    raise ValueError(f"{name} must have shape {shown}, got {tuple(value.shape)}")


def _fill(rows: torch.Tensor, is_padding: torch.Tensor, values: tuple[float, ...]) -> torch.Tensor:
    """`rows` `(B, L, F)` with `values` where `is_padding` `(B, L, 1)`. Nothing is copied from the host."""
    columns = [column.masked_fill(is_padding, value) for column, value in zip(rows.split(1, dim=-1), values)]
    return torch.cat(columns, dim=-1)


__all__ = ["GaussianLayout"]
