# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Drawings of tokens: Gaussians and regions over an image, error maps, panels and contact sheets.

Shapes: L tokens, P points of an outline, H x W pixels of an image.

Pillow draws everything at several times the size and then reduces it, so thin outlines stay smooth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch

from .gaussians import check_gaussians

RGB = tuple[int, int, int]

BACKGROUND: RGB = (255, 255, 255)
INK: RGB = (24, 24, 27)
MAX_CANVAS_PIXELS = 40_000_000

# Equally spaced colours of two perceptually uniform maps of matplotlib (CC0).
COLOR_MAPS: dict[str, tuple[RGB, ...]] = {
    "viridis": (
        *((68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137)),
        *((53, 183, 121), (110, 206, 88), (181, 222, 43), (253, 231, 37)),
    ),
    "magma": (
        *((0, 0, 4), (24, 15, 61), (68, 15, 118), (114, 31, 129), (158, 47, 127), (205, 64, 113)),
        *((241, 96, 93), (253, 150, 104), (254, 202, 141), (252, 253, 191)),
    ),
}


# ------------------------------------------------------------------------------------------------ numbers to shapes


def gaussians_to_pixels(
    gaussians: torch.Tensor, image_size: tuple[int, int], align_corners: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussians in normalised coordinates -> means and covariances in pixels.

    Along an axis of n pixels one unit is `(n - 1) / 2` pixels, or `n / 2` without `align_corners`.

    Args:
        gaussians (`torch.Tensor` of shape `(L, 5)`): `[sigma_x, sigma_y, rho, mu_x, mu_y]`.
        image_size (`tuple[int, int]`): `(H, W)` in pixels.
        align_corners (`bool`, *optional*, defaults to `True`): `align_corners` of the model's config.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: means `(L, 2)` as `(x, y)`, with pixel centres at whole numbers, and
        covariances `(L, 2, 2)` in square pixels.

    Raises:
        ValueError: if a Gaussian is not legal, a shape does not fit, or H or W is below 1.
    """
    height, width = image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size must be at least 1 x 1 pixels, got {height} x {width}")
    if gaussians.ndim != 2:
        raise ValueError(f"gaussians must be of shape (L, 5), got {tuple(gaussians.shape)}")
    check_gaussians(gaussians)
    unit = (np.array([width, height]) - align_corners) / 2.0
    values = gaussians.detach().cpu().double().numpy()
    sigma, rho, mu = values[:, :2] * unit, values[:, 2], values[:, 3:5]
    means = mu * unit + np.array([width - 1, height - 1]) / 2.0  # pixels around the centre of the image
    cross = rho * sigma[:, 0] * sigma[:, 1]
    covariances = np.stack([np.stack([sigma[:, 0] ** 2, cross], -1), np.stack([cross, sigma[:, 1] ** 2], -1)], -2)
    return means, covariances


def ellipse_outlines(
    means: np.ndarray, covariances: np.ndarray, num_sigmas: float = 1.0, num_points: int = 48
) -> np.ndarray:
    """Points at Mahalanobis distance `num_sigmas` from each mean: `(L, 2)` and `(L, 2, 2)` -> `(L, P, 2)`.

    At `num_sigmas = splat_support` the ellipse touches all four sides of the rectangle that the splat fills.
    """
    sigma_x = np.sqrt(covariances[:, 0, 0])
    sigma_y = np.sqrt(covariances[:, 1, 1])
    safe = np.where(sigma_x > 0, sigma_x, 1.0)
    lower = covariances[:, 1, 0] / safe  # Cholesky factor [[sigma_x, 0], [lower, rest]]
    rest = np.sqrt(np.maximum(sigma_y**2 - lower**2, 0.0))
    angle = np.linspace(0.0, 2.0 * np.pi, num_points, endpoint=False)
    cos, sin = np.cos(angle), np.sin(angle)
    x = sigma_x[:, None] * cos
    y = lower[:, None] * cos + rest[:, None] * sin
    return means[:, None, :] + num_sigmas * np.stack([x, y], axis=-1)


def colors_of(values: np.ndarray, color_map: str = "viridis") -> np.ndarray:
    """Numbers in [0, 1] of any shape -> uint8 colours `(..., 3)`."""
    if color_map not in COLOR_MAPS:
        raise ValueError(f"color_map must be one of {sorted(COLOR_MAPS)}, got {color_map!r}")
    table = np.array(COLOR_MAPS[color_map], dtype=np.float64)
    position = np.clip(values, 0.0, 1.0) * (len(table) - 1)
    low = np.minimum(position.astype(int), len(table) - 2)
    share = (position - low)[..., None]
    return np.round(table[low] * (1.0 - share) + table[low + 1] * share).astype(np.uint8)


def tensor_to_pil(image: torch.Tensor) -> PIL.Image.Image:
    """An image `(3, H, W)` in [-1, 1] -> 8-bit RGB, clamped and rounded to nearest."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be of shape (3, H, W), got {tuple(image.shape)}")
    levels = ((image.detach().to("cpu", torch.float32) + 1.0) * 127.5).round().clamp(0, 255)
    return PIL.Image.fromarray(levels.to(torch.uint8).permute(1, 2, 0).numpy())


# ------------------------------------------------------------------------------------------------- over an image


def draw_gaussians(
    image: PIL.Image.Image,
    gaussians: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    num_sigmas: Sequence[float] = (1.0,),
    zoom: int = 1,
    color: RGB | None = None,
    fill_opacity: float = 0.18,
    align_corners: bool = True,
) -> PIL.Image.Image:
    """Draw Gaussians as ellipses over an image.

    Args:
        image (`PIL.Image.Image`): the image; it is not changed.
        gaussians (`torch.Tensor` of shape `(L, 5)`): in the normalised coordinates of the image.
        attention_mask (`torch.Tensor` of shape `(L,)`, *optional*): 1 for a token, 0 for padding, which is not drawn.
        num_sigmas (`Sequence[float]`, *optional*, defaults to `(1.0,)`): radii of the ellipses of each Gaussian in
            sigmas, above 0. The first is filled and drawn in full colour, the others are faint outlines. Use
            `(1.0, 3.0)` to see the support of the splat too.
        zoom (`int`, *optional*, defaults to 1): whole factor of enlargement.
        color (`tuple[int, int, int]`, *optional*): colour of all Gaussians. By default colours show the logarithm of
            the area, from yellow for the smallest to blue-green for the largest.
        fill_opacity (`float`, *optional*, defaults to 0.18): opacity of the fill in [0, 1]; 0 draws outlines only.
        align_corners (`bool`, *optional*, defaults to `True`): `align_corners` of the model's config.

    Returns:
        `PIL.Image.Image`: the drawing, `zoom` times the size of the image.

    Raises:
        ValueError: if a Gaussian is not legal, a shape does not fit, or `num_sigmas` or `zoom` is out of its range.

    Examples:
        ```python
        >>> import PIL.Image
        >>> import torch
        >>> from gpstoken_hf.visualization import draw_gaussians

        >>> image = PIL.Image.new("RGB", (64, 48))
        >>> gaussians = torch.tensor([[0.3, 0.2, 0.5, 0.0, 0.0], [0.1, 0.1, 0.0, -0.5, 0.5]])
        >>> draw_gaussians(image, gaussians, zoom=2).size
        (128, 96)

        ```
    """
    if attention_mask is not None:
        gaussians = gaussians[attention_mask.to(gaussians.device).bool()]
    if not num_sigmas or min(num_sigmas) <= 0:
        raise ValueError(f"num_sigmas must hold numbers above 0, got {tuple(num_sigmas)}")
    means, covariances = gaussians_to_pixels(gaussians, (image.height, image.width), align_corners)
    area = np.sqrt(np.maximum(np.linalg.det(covariances), 1e-12))
    if color is None:
        rank = np.log(area)
        spread = float(np.ptp(rank)) if len(rank) else 0.0
        share = (rank - rank.min()) / spread if spread > 0 else np.zeros(len(rank))
        colors = colors_of(1.0 - 0.65 * share)  # without the dark end, which dark pixels would hide
    else:
        colors = np.tile(np.array(color, dtype=np.uint8), (len(area), 1))

    outlines = [ellipse_outlines(means, covariances, reach) for reach in num_sigmas]
    canvas = _Canvas(image, zoom)
    for index in np.argsort(-area, kind="stable"):  # small ones on top of large ones
        tint = tuple(int(level) for level in colors[index])
        for order, outline in enumerate(outlines):
            opaque = order == 0
            canvas.polygon(outline[index], (*tint, 255 if opaque else 70), round(255 * fill_opacity) if opaque else 0)
    return canvas.finish()


def draw_boxes(
    image: PIL.Image.Image,
    boxes: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    zoom: int = 1,
    color: RGB = (255, 214, 10),
) -> PIL.Image.Image:
    """Draw regions as boxes over an image.

    Args:
        image (`PIL.Image.Image`): the image; it is not changed.
        boxes (`torch.Tensor` of shape `(L, 4)`): inclusive pixel indices `[x0, y0, x1, y1]`.
        attention_mask (`torch.Tensor` of shape `(L,)`, *optional*): 1 for a region, 0 for padding, which is not drawn.
        zoom (`int`, *optional*, defaults to 1): whole factor of enlargement.
        color (`tuple[int, int, int]`, *optional*, defaults to yellow): colour of the outlines.

    Returns:
        `PIL.Image.Image`: the drawing, `zoom` times the size of the image.

    Raises:
        ValueError: if `boxes` has another shape or `zoom` is below 1.

    Examples:
        ```python
        >>> import PIL.Image
        >>> import torch
        >>> from gpstoken_hf.visualization import draw_boxes

        >>> image = PIL.Image.new("RGB", (64, 48))
        >>> draw_boxes(image, torch.tensor([[0, 0, 31, 47], [32, 0, 63, 47]]), zoom=4).size
        (256, 192)

        ```
    """
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must be of shape (L, 4), got {tuple(boxes.shape)}")
    if attention_mask is not None:
        boxes = boxes[attention_mask.to(boxes.device).bool()]
    canvas = _Canvas(image, zoom)
    for x0, y0, x1, y1 in boxes.detach().cpu().double().numpy():
        corners = np.array([[x0, y0], [x1 + 1, y0], [x1 + 1, y1 + 1], [x0, y1 + 1]]) - 0.5
        canvas.polygon(corners, (*color, 255), 0)
    return canvas.finish()


class _Canvas:
    """An enlarged copy of an image to draw on, in pixel coordinates of the image with centres at whole numbers."""

    def __init__(self, image: PIL.Image.Image, zoom: int):
        if zoom < 1:
            raise ValueError(f"zoom must be at least 1, got {zoom}")
        self.size = (image.width * zoom, image.height * zoom)
        pixels = self.size[0] * self.size[1]
        self.oversampling = max(1, min(3, math.isqrt(max(1, MAX_CANVAS_PIXELS // pixels))))
        self.scale = zoom * self.oversampling
        large = (image.width * self.scale, image.height * self.scale)
        self.picture = image.convert("RGB").resize(large, PIL.Image.Resampling.NEAREST)
        self.pen = PIL.ImageDraw.Draw(self.picture, "RGBA")
        self.line_width = max(1, round(self.oversampling * 1.4 * max(1.0, min(self.size) / 700)))

    def polygon(self, corners: np.ndarray, outline: tuple[int, ...], fill_alpha: int) -> None:
        points = [(float(x), float(y)) for x, y in (corners + 0.5) * self.scale - 0.5]
        if fill_alpha:
            self.pen.polygon(points, fill=(*outline[:3], fill_alpha))
        closed = [*points, points[0], points[1]]
        shade = (0, 0, 0, outline[3] // 3)  # makes bright outlines visible on bright pixels
        self.pen.line(closed, fill=shade, width=self.line_width + 2 * self.oversampling)
        self.pen.line(closed, fill=outline, width=self.line_width)

    def finish(self) -> PIL.Image.Image:
        if self.oversampling == 1:
            return self.picture
        return self.picture.resize(self.size, PIL.Image.Resampling.BOX)


# ----------------------------------------------------------------------------------------------------- error maps


def pixel_errors(image: torch.Tensor, reconstruction: torch.Tensor) -> np.ndarray:
    """The error of every pixel: two images `(3, H, W)` in [-1, 1] -> root mean square over channels, `(H, W)`.

    The unit is one level of an 8-bit image, so the largest error is 255. `reconstruction` is clamped.
    """
    if image.shape != reconstruction.shape or image.ndim != 3:
        raise ValueError(
            "image and reconstruction must have one shape (3, H, W), "
            f"got {tuple(image.shape)} and {tuple(reconstruction.shape)}"
        )
    difference = image.detach().cpu().double() - reconstruction.detach().cpu().double().clamp(-1, 1)
    return (difference.square().mean(dim=0).sqrt() * 127.5).numpy()


def draw_error_map(
    image: torch.Tensor,
    reconstruction: torch.Tensor,
    max_error: float | None = None,
    zoom: int = 1,
    color_map: str = "magma",
) -> PIL.Image.Image:
    """Draw the error of every pixel in colour, with a colour bar in levels of an 8-bit image.

    Args:
        image, reconstruction (`torch.Tensor` of shape `(3, H, W)`): in [-1, 1]; `reconstruction` is clamped.
        max_error (`float`, *optional*): error of the last colour in 8-bit levels, above 0; larger errors have the same
            colour. Set it to compare several maps. Defaults to the 99.5th percentile, rounded up to a multiple of 5.
        zoom (`int`, *optional*, defaults to 1): whole factor of enlargement.
        color_map (`str`, *optional*, defaults to `"magma"`): `"magma"` or `"viridis"`.

    Returns:
        `PIL.Image.Image`: the map and its colour bar.

    Raises:
        ValueError: if the shapes differ, or another argument is out of its range.

    Examples:
        ```python
        >>> import torch
        >>> from gpstoken_hf.visualization import draw_error_map

        >>> image = torch.zeros(3, 48, 64)
        >>> draw_error_map(image, image + 0.1, max_error=20).height
        48

        ```
    """
    errors = pixel_errors(image, reconstruction)
    if max_error is None:
        max_error = max(5.0, math.ceil(float(np.percentile(errors, 99.5)) / 5) * 5.0)
    if not max_error > 0:
        raise ValueError(f"max_error must be above 0, got {max_error}")
    picture = PIL.Image.fromarray(colors_of(errors / max_error, color_map))
    picture = picture.resize((picture.width * zoom, picture.height * zoom), PIL.Image.Resampling.NEAREST)
    return _with_color_bar(picture, max_error, color_map)


def _with_color_bar(picture: PIL.Image.Image, maximum: float, color_map: str) -> PIL.Image.Image:
    text_px = _text_size(picture.height)
    font = PIL.ImageFont.load_default(text_px)
    labels = [f"{maximum * share:g}" for share in (1.0, 0.5, 0.0)]
    labels[0] += "+"  # larger errors have this colour too
    bar, gap = max(8, text_px), max(4, text_px // 2)
    text_width = max(math.ceil(font.getlength(label)) for label in labels)
    sheet = PIL.Image.new("RGB", (picture.width + 3 * gap + bar + text_width, picture.height), BACKGROUND)
    sheet.paste(picture, (0, 0))
    ramp = colors_of(np.linspace(1.0, 0.0, picture.height), color_map)[:, None].repeat(bar, axis=1)
    sheet.paste(PIL.Image.fromarray(ramp), (picture.width + gap, 0))
    pen = PIL.ImageDraw.Draw(sheet)
    x = picture.width + 2 * gap + bar
    for label, y, anchor in zip(labels, (0, picture.height // 2, picture.height - 1), ("la", "lm", "ld")):
        pen.text((x, y), label, fill=INK, font=font, anchor=anchor)
    return sheet


# ------------------------------------------------------------------------------------------------ several pictures


def contact_sheet(
    pictures: Sequence[PIL.Image.Image],
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    gap: int = 12,
    footer: str | None = None,
) -> PIL.Image.Image:
    """Arrange pictures in rows on one sheet.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): at least one, of any sizes; they are not resized.
        titles (`Sequence[str]`, *optional*): one per picture, shown above it.
        columns (`int`, *optional*): pictures per row, at least 1. By default about as many as rows.
        gap (`int`, *optional*, defaults to 12): pixels between pictures and around the sheet.
        footer (`str`, *optional*): a line of text below all pictures.

    Returns:
        `PIL.Image.Image`: the sheet. Every row is as high as its highest picture.

    Raises:
        ValueError: if there is no picture, the number of titles is not that of pictures, or `columns` is below 1.

    Examples:
        ```python
        >>> import PIL.Image
        >>> from gpstoken_hf.visualization import contact_sheet

        >>> contact_sheet([PIL.Image.new("RGB", (40, 30))] * 6, columns=3, gap=10).size
        (160, 90)

        ```
    """
    if not pictures:
        raise ValueError("pictures must hold at least one picture, got none")
    if titles is not None and len(titles) != len(pictures):
        raise ValueError(f"titles must hold {len(pictures)} titles, one per picture, got {len(titles)}")
    columns = math.ceil(math.sqrt(len(pictures))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    columns = min(columns, len(pictures))
    text_px = _text_size(max(picture.height for picture in pictures))
    font = PIL.ImageFont.load_default(text_px)
    title_height = 0 if titles is None else round(text_px * 1.6)

    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    widths = [max(pictures[i].width for i in range(column, len(pictures), columns)) for column in range(columns)]
    heights = [max(pictures[i].height for i in row) for row in rows]
    if titles is not None:
        for column in range(columns):
            lengths = [font.getlength(titles[i]) for i in range(column, len(pictures), columns)]
            widths[column] = max(widths[column], math.ceil(max(lengths)))
    width = sum(widths) + gap * (columns + 1)
    if footer is not None:
        width = max(width, math.ceil(font.getlength(footer)) + 2 * gap)
    height = sum(heights) + (gap + title_height) * len(rows) + gap
    footer_height = 0 if footer is None else round(text_px * 1.6)
    sheet = PIL.Image.new("RGB", (width, height + footer_height), BACKGROUND)
    pen = PIL.ImageDraw.Draw(sheet)
    y = gap
    for row, row_height in zip(rows, heights):
        x = gap
        for column, i in enumerate(row):
            if titles is not None:
                pen.text((x, y), titles[i], fill=INK, font=font)
            sheet.paste(pictures[i].convert("RGB"), (x, y + title_height))
            x += widths[column] + gap
        y += title_height + row_height + gap
    if footer is not None:
        pen.text((gap, y - gap // 3), footer, fill=INK, font=font)
    return sheet


def panel(
    pictures: Sequence[PIL.Image.Image], titles: Sequence[str] | None = None, footer: str | None = None
) -> PIL.Image.Image:
    """Arrange pictures side by side: `contact_sheet` with one row."""
    return contact_sheet(pictures, titles, columns=max(1, len(pictures)), footer=footer)


def _text_size(picture_height: int) -> int:
    return int(np.clip(picture_height // 24, 11, 40))
