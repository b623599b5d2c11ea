# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Score tokenizers on a set of images, beside thumbnails of as many floats and JPEG and WebP of as many bytes.

    python -m pipelines.evaluate_reconstruction images.parquet --resolution 64 --tokens 16 32 64 --output results/
    python -m pipelines.evaluate_reconstruction --model gpstoken-m128 owner/vae --data folder/ --resolution 256 \
        --feature_network inception --lpips_network alex
    python -m pipelines.evaluate_reconstruction folder/ --resolution 256 --tokens 128 --focus 64,64,191,191

Every image is resized until its shortest side is the resolution, and cropped in the middle. The resize is antialiased
and bicubic unless --resample says otherwise; a softer filter makes images that every method reconstructs better.

A model is a GPSToken tokenizer, which is scored with every number of --tokens, or an autoencoder of diffusers
(AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel, AutoencoderRAE). --reconstructions names folders of what
another program has made of the same images, in the order of their names. PSNR and SSIM are means over the images, of
pixels in floating point unless --rounding 8bit. A float counts 16 bits. For every model the table also holds:

    a thumbnail     the image reduced to s x s pixels and enlarged again, both bicubic and antialiased as in Pillow, in
                    floating point, clamped; s is the smallest with `3 s² >= floats`
    JPEG and WebP   of the best quality whose file takes no more bytes than the model's latents

--feature_network adds rFID and rsFID ("inception"), or the Fréchet distance of another network's features.
--lpips_network adds LPIPS ("alex", "vgg", "squeeze"), or a perceptual distance of another network. With --focus, every
image is also encoded with that box marked as important, and the PSNR inside the box is compared with and without.

The output folder holds:

    per_image.jsonl         the scores of every image; an interrupted run resumes after the last whole batch
    per_image.parquet       the same as a table: image, method, scores
    results.json            the means, the protocol and the command
    table.md                the means as tables
    report.md, report.html  all of it with the pictures
    curve.png               PSNR over the number of floats
    examples.png            a few images, their thumbnails and their reconstructions
    extremes.png            the images that the first model, with the most tokens, reconstructs worst and best
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .shared.autoencoders import load_candidates, measure_latents
from .shared.baselines import CODECS
from .shared.checkpoints import DEFAULT_MODEL
from .shared.image_sets import ImageSet
from .shared.outputs import own_directory
from .shared.programs import (
    ProgramError,
    make_parser,
    non_negative_float,
    pixel_box,
    positive_int,
    run_program,
)
from .shared.reconstruction_methods import make_baselines, of_candidate, of_folder
from .shared.reconstruction_scoring import Evaluation, add_options, check_options

PROGRAM = "pipelines.evaluate_reconstruction"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    images = ImageSet(args.data, args.image_column, args.resolution, args.max_images, args.resample)
    candidates = [
        candidate
        for name in dict.fromkeys(args.model)
        for candidate in load_candidates(name, args.device, args.tokens, args.tile_size)
    ]
    for candidate in candidates:
        measure_latents(candidate, args.resolution)
    methods = [of_candidate(candidate) for candidate in candidates]
    methods += [of_folder(folder, images, args.resolution) for folder in args.reconstructions]
    models = list(methods)
    methods += make_baselines(candidates, args.baselines, args.resolution)
    evaluation = Evaluation(PROGRAM, args, images, models, methods)
    with own_directory(args.output, PROGRAM) as folder:
        evaluation.run(folder, argv)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("--tokens", type=positive_int, nargs="+", help="numbers of tokens; default: the model's")
    parser.add_argument("--tile_size", type=positive_int, help="encode and decode in tiles of this side in pixels")
    parser.add_argument(
        "--model",
        nargs="+",
        default=[DEFAULT_MODEL],
        help="folders, Hub repositories (owner/name or owner/name/subfolder), or the bundled checkpoint",
    )
    parser.add_argument(
        "--reconstructions", nargs="+", type=Path, default=[], help="folders of reconstructions of the same images"
    )
    parser.add_argument(
        "--baselines", nargs="*", choices=("thumbnail", *CODECS), default=["thumbnail", *CODECS], help="default: all"
    )
    parser.add_argument("--focus", type=pixel_box, metavar="x0,y0,x1,y1", help="box in pixels of the cropped images")
    parser.add_argument(
        "--focus_weight", type=non_negative_float, default=30.0, help="importance per pixel of the focus box"
    )
    add_options(parser, Path("out/evaluate_reconstruction"))
    args = parser.parse_args(argv)
    check_options(args)
    if args.focus and (args.focus[2] >= args.resolution or args.focus[3] >= args.resolution):
        raise ProgramError(
            f"--focus must lie inside {args.resolution} x {args.resolution} pixels, "
            f"got {','.join(map(str, args.focus))}"
        )
    return args


if __name__ == "__main__":
    sys.exit(run_program(main))
