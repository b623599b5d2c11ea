# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Draw the paper's figures for any checkpoint and any images.

    python -m pipelines.figures photo.jpg --model gpstoken-m128 --resolution 256
    python -m pipelines.figures --model gpstoken-nano --resolution 64 --tokens 8 16 32 64 --focus 16,16,47,47
    python -m pipelines.figures --pipeline gpstoken --classes 207 88 --figures 8

Without images, photographs of scikit-image are drawn. Images are resized until their shortest side is the resolution
and cropped in the middle. The output folder holds, with captions in report.md and report.html:

    figure4.png     image, initial and refined Gaussians, reconstruction and error, with regions by complexity and with
                    equally large regions
    figure5.png     tokens drawn to a box by hand: layout, reconstruction and error, without and with --focus
    figure6.png     reconstructions and Gaussians at several numbers of tokens
    figure8.png     what a pipeline generates: layout, calibrated layout, refined Gaussians and image (--pipeline)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import torch

from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.metrics import psnr
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline
from gpstoken_hf.visualization import contact_sheet, draw_error_map, draw_gaussians, pixel_errors, tensor_to_pil

from .shared.checkpoints import DEFAULT_MODEL, load_pipeline, load_tokenizer
from .shared.image_sets import RESAMPLES, ImageSet
from .shared.outputs import atomic_directory
from .shared.photographs import sample_photograph
from .shared.programs import (
    PixelBox,
    ProgramError,
    make_parser,
    non_negative_float,
    non_negative_int,
    pixel_box,
    positive_int,
    printable,
    progress,
    run_program,
)
from .shared.reports import Block, Heading, Picture, Text, write_report
from .shared.sampling import class_ids

PROGRAM = "pipelines.figures"
SAMPLES = ("astronaut", "coffee", "chelsea")
DRAWN_SIDE = 224  # images are drawn enlarged, to at least this many pixels
FIGURES = (4, 5, 6, 8)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    if args.focus and max(args.focus) >= args.resolution:
        raise ProgramError(
            f"--focus must lie inside {args.resolution} x {args.resolution} pixels, "
            f"got {','.join(map(str, args.focus))}"
        )
    figures = args.figures or ([8] if args.pipeline and args.model is None and not args.images else [4, 5, 6])
    if 8 in figures and args.pipeline is None:
        raise ProgramError("--pipeline must be given for figure 8, got none")
    pictures: dict[int, tuple[PIL.Image.Image, str]] = {}
    if set(figures) - {8}:
        model = load_tokenizer(args.model or DEFAULT_MODEL, args.device)
        images = read_images(args).to(args.device)
        draw = {4: draw_parts, 5: draw_focus, 6: draw_counts}
        for figure in progress(sorted(set(figures) - {8}), "figures"):
            pictures[figure] = draw[figure](model, images, args)
    if 8 in figures:
        pictures[8] = draw_generation(args)
    with atomic_directory(args.output, args.overwrite, PROGRAM) as folder:
        blocks: list[Block] = (
            [Text(f"Drawn with {printable(args.model or DEFAULT_MODEL)}.")] if set(figures) - {8} else []
        )
        for figure, (picture, caption) in pictures.items():
            picture.save(folder / f"figure{figure}.png")
            blocks += [Heading(f"Figure {figure}"), Picture(f"figure{figure}.png", caption)]
        write_report(folder, "Figures", blocks)
    print(f"{', '.join(f'figure{figure}.png' for figure in pictures)} in {args.output}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("images", nargs="*", type=Path, help="image files, folders, parquet files; default: samples")
    parser.add_argument("--figures", type=int, choices=FIGURES, nargs="+", help="default: 4 5 6, or 8 of a --pipeline")
    parser.add_argument("--model", help=f"tokenizer: folder or Hub repository; default: the bundled {DEFAULT_MODEL}")
    parser.add_argument("--pipeline", help="folder, Hub repository or bundled pipeline, for figure 8")
    parser.add_argument("--resolution", type=positive_int, default=64)
    parser.add_argument("--resample", choices=RESAMPLES, default="bicubic")
    parser.add_argument("--image_column", default="image", help="column of parquet files")
    parser.add_argument("--max_images", type=positive_int, default=3)
    parser.add_argument(
        "--tokens", type=positive_int, nargs="+", help="for figure 6; default: 1/4 to 2 times the model's"
    )
    parser.add_argument("--focus", type=pixel_box, metavar="x0,y0,x1,y1", help="for figure 5; default: the middle")
    parser.add_argument(
        "--focus_weight", type=non_negative_float, default=30.0, help="importance per pixel of the focus box"
    )
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="for figure 8; default: the first four")
    parser.add_argument("--steps", type=positive_int, default=50, help="of the texture stage, for figure 8")
    parser.add_argument("--layout_steps", type=positive_int, default=5)
    parser.add_argument("--guidance_scale", type=non_negative_float, default=1.5)
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("out/figures"))
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder of this program")
    return parser.parse_args(argv)


def read_images(args: argparse.Namespace) -> torch.Tensor:
    """Images `(B, 3, H, W)` in [-1, 1]."""
    if args.images:
        images = ImageSet(args.images, args.image_column, args.resolution, args.max_images, args.resample)
        return images.batch(0, len(images))
    processor = ImageSet.make_processor(args.resolution, args.resample)
    return processor(
        [sample_photograph(name) for name in SAMPLES[: args.max_images]], return_tensors="pt"
    ).pixel_values


class Drawing:
    """Pictures and titles of a sheet, all enlarged by the same factor."""

    def __init__(self, resolution: int):
        self.zoom = max(1, -(-DRAWN_SIDE // resolution))
        self.pictures: list[PIL.Image.Image] = []
        self.titles: list[str] = []

    def image(self, image: torch.Tensor, title: str, box: PixelBox | None = None) -> None:
        """Add an image `(3, H, W)` in [-1, 1], with a box in pixels drawn over it."""
        picture = tensor_to_pil(image)
        size = (picture.width * self.zoom, picture.height * self.zoom)
        picture = picture.resize(size, PIL.Image.Resampling.NEAREST)
        if box is not None:
            x0, y0, x1, y1 = (value * self.zoom for value in (box[0], box[1], box[2] + 1, box[3] + 1))
            PIL.ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), outline=(255, 60, 60), width=2)
        self._add(picture, title)

    def gaussians(self, image: torch.Tensor, gaussians: torch.Tensor, title: str) -> None:
        """Add an image with Gaussians `(L, 5)` drawn over it."""
        self._add(draw_gaussians(tensor_to_pil(image), gaussians.cpu(), zoom=self.zoom), title)

    def error(self, image: torch.Tensor, sample: torch.Tensor, maximum: float) -> None:
        """Add the error of a reconstruction, in colours up to `maximum` in 8-bit levels."""
        self._add(draw_error_map(image.cpu(), sample.cpu(), max_error=maximum, zoom=self.zoom), "error")

    def _add(self, picture: PIL.Image.Image, title: str) -> None:
        self.pictures.append(picture)
        self.titles.append(title)

    def sheet(self, columns: int) -> PIL.Image.Image:
        """The sheet, row by row."""
        return contact_sheet(self.pictures, self.titles, columns=columns)


@torch.inference_mode()
def coded(
    model: GPSTokenModel, images: torch.Tensor, tokens: int | None = None, importance: torch.Tensor | None = None
) -> tuple[GaussianLayout, torch.Tensor, torch.Tensor]:
    """The layout, the tokens `(B, L, 5 + C)` and the reconstruction `(B, 3, H, W)` of images."""
    encoded = model.encode(images, num_tokens=tokens, importance=importance)
    size = (images.shape[-2], images.shape[-1])
    sample = model.decode(encoded.tokens, size, attention_mask=encoded.attention_mask).sample.float().clamp(-1, 1)
    return encoded.layout, encoded.tokens, sample


def _largest_error(image: torch.Tensor, samples: Sequence[torch.Tensor]) -> float:
    """One scale for all maps of an image, in 8-bit levels."""
    errors = [pixel_errors(image.cpu(), sample.cpu()) for sample in samples]
    largest = max(float(torch.from_numpy(one).double().quantile(0.995)) for one in errors)
    return max(5.0, -(-largest // 5) * 5.0)


def draw_parts(model: GPSTokenModel, images: torch.Tensor, args: argparse.Namespace) -> tuple[PIL.Image.Image, str]:
    """Figure 4: with regions by complexity, and with equally large regions."""
    adaptive = coded(model, images)
    before = model.config.complexity_exponent
    try:
        model.config.complexity_exponent = 0.0  # the largest region is halved first
        uniform = coded(model, images)
    finally:
        model.config.complexity_exponent = before
    drawing = Drawing(args.resolution)
    for i, image in enumerate(images):
        maximum = _largest_error(image, [adaptive[2][i], uniform[2][i]])
        for title, (layout, tokens, sample) in (("by complexity", adaptive), ("equal regions", uniform)):
            drawing.image(image, "image")
            drawing.gaussians(image, layout.gaussians[i], f"initial, {title}")
            drawing.gaussians(image, tokens[i, :, :5], "refined")
            drawing.image(sample[i], f"{psnr(sample[i : i + 1], image[None]).item():.2f} dB")
            drawing.error(image, sample[i], maximum)
    caption = (
        f"Image, initial and refined Gaussians, reconstruction and error of {len(images)} images "
        f"with {model.config.num_tokens} tokens; upper rows with regions by complexity, lower rows with equally large "
        "regions. Errors are in 8-bit levels, with one scale for both rows of an image."
    )
    return drawing.sheet(5), caption


def draw_focus(model: GPSTokenModel, images: torch.Tensor, args: argparse.Namespace) -> tuple[PIL.Image.Image, str]:
    """Figure 5: tokens drawn to a box by hand."""
    quarter = args.resolution // 4
    box = args.focus or (quarter, quarter, args.resolution - quarter - 1, args.resolution - quarter - 1)
    x0, y0, x1, y1 = box
    window = (slice(None), slice(y0, y1 + 1), slice(x0, x1 + 1))
    importance = torch.zeros(images.shape[0], *images.shape[-2:], device=images.device)
    importance[window] = args.focus_weight
    results = {"without focus": coded(model, images), "with focus": coded(model, images, None, importance)}
    drawing = Drawing(args.resolution)
    for i, image in enumerate(images):
        maximum = _largest_error(image, [sample[i] for _, _, sample in results.values()])
        for title, (_, tokens, sample) in results.items():
            inside = psnr(sample[i][window][None], image[window][None]).item()
            drawing.image(image, title, box)
            drawing.gaussians(image, tokens[i, :, :5], "refined Gaussians")
            drawing.image(sample[i], f"{inside:.2f} dB inside", box)
            drawing.error(image, sample[i], maximum)
    caption = (
        f"Tokens drawn to the box {','.join(map(str, box))} with weight {args.focus_weight:g} per pixel: image, "
        f"refined Gaussians, reconstruction with the PSNR inside the box, and error in 8-bit levels; "
        f"{model.config.num_tokens} tokens in all rows."
    )
    return drawing.sheet(4), caption


def draw_counts(model: GPSTokenModel, images: torch.Tensor, args: argparse.Namespace) -> tuple[PIL.Image.Image, str]:
    """Figure 6: several numbers of tokens."""
    own = model.config.num_tokens
    counts = sorted(set(args.tokens or [max(1, own // 4), max(1, own // 2), own, 2 * own]))
    results = [coded(model, images, count) for count in counts]
    drawing = Drawing(args.resolution)
    for i, image in enumerate(images):
        drawing.image(image, "image")
        for count, (_, _, sample) in zip(counts, results):
            drawing.image(sample[i], f"{count}: {psnr(sample[i : i + 1], image[None]).item():.2f} dB")
        drawing.image(image, "Gaussians")
        for count, (_, tokens, _) in zip(counts, results):
            drawing.gaussians(image, tokens[i, :, :5], f"{count} tokens")
    caption = (
        f"Reconstructions and refined Gaussians of {len(images)} images with {', '.join(map(str, counts))} tokens."
    )
    return drawing.sheet(len(counts) + 1), caption


class RecordingPipeline(GPSTokenPipeline):
    """Keeps the layout as it was generated, before the calibration."""

    generated: torch.Tensor | None = None  # (B, L, 5)

    def _calibrate(self, gaussians: torch.Tensor) -> GaussianLayout:
        self.generated = gaussians
        return super()._calibrate(gaussians)


def draw_generation(args: argparse.Namespace) -> tuple[PIL.Image.Image, str]:
    """Figure 8: what a pipeline generates, stage by stage."""
    loaded = load_pipeline(args.pipeline, torch.float32, args.device)
    pipeline = RecordingPipeline(**loaded.components, id2label=loaded.config.id2label)
    pipeline.set_progress_bar_config(disable=True)
    labels = class_ids(pipeline, args.classes)
    labels = labels if args.classes else labels[:4]
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(labels))]
    output = pipeline(
        labels,
        num_inference_steps=args.steps,
        num_layout_steps=args.layout_steps,
        guidance_scale=args.guidance_scale,
        generator=generators,
        output_type="pt",
    )
    images = output.images.float().cpu() * 2 - 1
    drawing = Drawing(images.shape[-1])
    names = pipeline.config.id2label or {}
    stages = 2
    for i, label in enumerate(labels):
        image, blank = images[i], torch.full_like(images[i], 1.0)
        name = names.get(str(label), str(label)).split(",")[0]
        if pipeline.generated is not None:
            drawing.gaussians(blank, pipeline.generated[i], f"{name}: generated layout")
        if output.layout is not None:
            title = "calibrated" if pipeline.generated is not None else f"{name}: layout"
            drawing.gaussians(blank, output.layout.gaussians[i], title)
        drawing.gaussians(image, output.tokens[i, :, :5], "refined Gaussians")
        drawing.image(image, "image")
        stages = len(drawing.pictures) // (i + 1)
    first = "Layout as generated, calibrated layout" if pipeline.generated is not None else "Layout"
    first = first if output.layout is not None else "One stage"
    caption = (
        f"{first}, Gaussians refined by the texture stage, and image, for classes {', '.join(map(str, labels))}; "
        f"{args.steps} steps, guidance {args.guidance_scale:g}, seed {args.seed}."
    )
    return drawing.sheet(stages), caption


if __name__ == "__main__":
    raise SystemExit(run_program(main))
