# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Generate images of classes, with their layouts and a contact sheet.

    python -m pipelines.generate --classes 3 7 --count 8 --output out/
    python -m pipelines.generate --pipeline owner/name --classes "golden retriever" 88 --steps 100 --scheduler heun
    accelerate launch --num_processes 4 -m pipelines.generate --pipeline owner/name --count 50 --output samples/

The output folder:

    images/<class>/<index>.png              the images
    layouts/<class>/<index>.safetensors     layout (L, 5) and tokens (L, 5 + C); --layout takes it, edited or not
    sheet.png, layouts.png                  the first images of every class, and their Gaussians
    settings.json                           the settings of all images

The noise of an image depends on the seed, its class and its index alone. It is the same image whatever the batch size,
the number of processes and the other images of the run. The same command resumes an interrupted run, and more classes
or a larger count add to the folder. Other settings are an error unless --overwrite deletes the images first. Only
files that this program has listed in `.gpstoken.json` are ever deleted. Several processes share the work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import gpstoken_hf
from gpstoken_hf.image_processing_gpstoken import open_image
from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline
from gpstoken_hf.visualization import contact_sheet, draw_gaussians

from .shared.checkpoints import DEFAULT_PIPELINE, load_pipeline, weights_fingerprint
from .shared.outputs import OwnDirectory, atomic_file, own_directory
from .shared.photographs import file_digest
from .shared.programs import (
    ProgramError,
    make_parser,
    non_negative_float,
    non_negative_int,
    positive_int,
    printable,
    run_program,
)
from .shared.sampling import DTYPES, SCHEDULERS, class_ids, swap_scheduler

PROGRAM = "pipelines.generate"
SETTINGS_FILE = "settings.json"
SHEET_COLUMNS, SHEET_ROWS = 10, 12
DRAWN_SIDE = 128  # small images are drawn enlarged, to at least this many pixels


@dataclass(frozen=True)
class Job:
    """One image to generate."""

    label: int
    index: int

    @property
    def image_file(self) -> str:
        return f"images/{self.label:04d}/{self.index:05d}.png"

    @property
    def layout_file(self) -> str:
        return f"layouts/{self.label:04d}/{self.index:05d}.safetensors"

    def generator(self, seed: int) -> torch.Generator:
        """A generator on the CPU, so that every device starts from the same noise."""
        state = np.random.SeedSequence([seed, self.label, self.index]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state) >> 1)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    state = PartialState(cpu=args.device == "cpu")
    layout = None if args.layout is None else read_layout(args.layout)
    pipeline = load_pipeline(args.pipeline, DTYPES[args.dtype], args.device or state.device)
    swap_scheduler(pipeline, args.scheduler)
    labels = class_ids(pipeline, args.classes)
    settings = {
        "version": gpstoken_hf.__version__,
        "pipeline": args.pipeline,
        "weights": weights_fingerprint(
            pipeline.vae, pipeline.transformer, pipeline.layout_transformer, pipeline.layout_bank
        ),
        "scheduler": type(pipeline.scheduler).__name__,
        "steps": args.steps,
        "layout_steps": args.layout_steps,
        "guidance_scale": args.guidance_scale,
        "guidance_interval": list(args.guidance_interval),
        "layout": _layout_setting(args.layout),
        "dtype": args.dtype,
        "seed": args.seed,
    }
    jobs = [Job(label, index) for index in range(args.count) for label in labels]
    with ExitStack() as stack:
        with state.main_process_first():
            if state.is_main_process:
                folder = stack.enter_context(own_directory(args.output, PROGRAM))
                open_output(folder, jobs, settings, args.overwrite)

        # A share depends on the list alone, not on the images that exist, so no two processes make the same one.
        share = jobs[state.process_index :: state.num_processes]
        pending = [job for job in share if not (args.output / job.image_file).exists()]
        with tqdm(
            total=len(share), initial=len(share) - len(pending), unit="image", disable=not state.is_main_process
        ) as bar:
            for start in range(0, len(pending), args.batch_size):
                batch = pending[start : start + args.batch_size]
                make_images(pipeline, batch, layout, args, bar)
                bar.update(len(batch))
        state.wait_for_everyone()
        if state.is_main_process:
            draw_sheets(pipeline, labels, args.count, args.output)
            state.print(f"{len(jobs)} images of {len(labels)} classes, see {printable(args.output / 'sheet.png')}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument(
        "--pipeline",
        default=DEFAULT_PIPELINE,
        help=f"folder or Hub repository; default: the bundled {DEFAULT_PIPELINE}",
    )
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="class ids or names; default: all classes")
    parser.add_argument("--count", type=positive_int, default=8, help="images of each class")
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--steps", type=positive_int, default=250, help="steps of the texture stage")
    parser.add_argument("--layout_steps", type=positive_int, default=5, help="steps of the layout stage")
    parser.add_argument("--guidance_scale", type=non_negative_float, default=1.5, help="1: no guidance")
    parser.add_argument(
        "--guidance_interval",
        type=non_negative_float,
        nargs=2,
        default=(0.2, 1.0),
        metavar=("LOW", "HIGH"),
        help="range of time in which guidance acts; 0 is noise, 1 is data",
    )
    parser.add_argument(
        "--scheduler", choices=SCHEDULERS, help="scheduler of the texture stage; default: the pipeline's"
    )
    parser.add_argument(
        "--layout",
        metavar="SOURCE",
        help="'generated', 'bank', an image whose layout is borrowed, or a .safetensors file with a layout; "
        "default: generated if the pipeline can, else from its bank",
    )
    parser.add_argument("--batch_size", type=positive_int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", help="default: the accelerator of this process, or the CPU")
    parser.add_argument("--output", type=Path, default=Path("out/generate"))
    parser.add_argument(
        "--overwrite", action="store_true", help="delete images of other settings from the output folder"
    )
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------- inputs


def read_layout(source: str) -> str | GaussianLayout | PIL.Image.Image:
    """The argument --layout -> what the pipeline takes: a word, a layout or an image."""
    if source in ("generated", "bank"):
        return source
    if not source.endswith(".safetensors"):
        return open_image(source)
    tensors = _read_tensors(source)
    if "gaussians" in tensors:
        layout = GaussianLayout.load(source)
        if len(layout) != 1:
            raise ValueError(f"--layout must hold one layout, got {len(layout)} in {source}")
        return layout
    if "layout" not in tensors:
        raise ValueError(
            f"{source} must hold a tensor 'layout', or be a file of GaussianLayout.save, got {sorted(tensors)}"
        )
    return GaussianLayout(tensors["layout"][None])


def _read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file, got: {error}") from error


def _layout_setting(source: str | None) -> str | None:
    if source is None or source in ("generated", "bank"):
        return source
    return file_digest(source) if Path(source).is_file() else source


def open_output(folder: OwnDirectory, jobs: Sequence[Job], settings: dict[str, Any], overwrite: bool) -> None:
    """Prepare the output folder for `jobs`. Images of the same settings stay.

    Raises:
        ProgramError: If the folder holds images of other settings, unless `overwrite`.
    """
    path = folder.path / SETTINGS_FILE
    if path.exists():
        try:
            present = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError):
            present = {"damaged": True}
        changed = sorted(key for key in {*present, *settings} if present.get(key) != settings.get(key))
        if changed and not overwrite:
            pairs = ", ".join(f"{key} {present.get(key)!r} (now {settings.get(key)!r})" for key in changed)
            raise ProgramError(
                f"{folder.path} holds images of other settings: {pairs}; choose another --output, or --overwrite"
            )
        if changed:
            folder.clear()
    files = [file for job in jobs for file in (job.image_file, job.layout_file)]
    folder.expect([SETTINGS_FILE, "sheet.png", "layouts.png", *files])
    if not path.exists():
        with atomic_file(path) as staging:
            staging.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- images


def make_images(
    pipeline: GPSTokenPipeline,
    jobs: Sequence[Job],
    layout: str | GaussianLayout | PIL.Image.Image | None,
    args: argparse.Namespace,
    bar: tqdm,
) -> None:
    """Generate and write one batch. The image is written last, so where it exists its layout does too."""

    def show_step(pipe: GPSTokenPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        bar.set_postfix_str(f"step {step + 1}/{pipe.num_timesteps}", refresh=False)
        bar.update(0)  # redraws no more often than the bar does by itself
        return {}

    output = pipeline(
        [job.label for job in jobs],
        num_inference_steps=args.steps,
        num_layout_steps=args.layout_steps,
        guidance_scale=args.guidance_scale,
        guidance_interval=tuple(args.guidance_interval),
        layout=layout,
        generator=[job.generator(args.seed) for job in jobs],
        callback_on_step_end=show_step,
    )
    for i, job in enumerate(jobs):
        tokens = output.tokens[i].cpu()
        tensors = {"tokens": tokens}
        if output.layout is not None:
            is_real = output.layout.attention_mask[i].bool().cpu()
            tensors = {"tokens": tokens[is_real], "layout": output.layout[i].gaussians[0].cpu().contiguous()}
        metadata = {"class": str(job.label), "index": str(job.index), "seed": str(args.seed)}
        with atomic_file(args.output / job.layout_file) as staging:
            save_file(tensors, staging, metadata)
        with atomic_file(args.output / job.image_file) as staging:
            output.images[i].save(staging)


def draw_sheets(pipeline: GPSTokenPipeline, labels: Sequence[int], count: int, output: Path) -> None:
    """Draw a sheet of images and a sheet of their Gaussians, one row for each of the first classes."""
    names = pipeline.config.id2label or {}
    columns = min(count, SHEET_COLUMNS)
    jobs = [Job(label, index) for label in labels[:SHEET_ROWS] for index in range(columns)]
    pictures, layouts, titles = [], [], []
    for job in jobs:
        image = open_image(output / job.image_file).convert("RGB")
        zoom = -(-DRAWN_SIDE // max(image.size))
        tensors = _read_tensors(output / job.layout_file)
        gaussians = tensors["layout"] if "layout" in tensors else tensors["tokens"][:, :5]
        pictures.append(image.resize((image.width * zoom, image.height * zoom), PIL.Image.Resampling.NEAREST))
        layouts.append(draw_gaussians(image, gaussians, zoom=zoom))
        titles.append(names.get(str(job.label), str(job.label)).split(",")[0] if job.index == 0 else "")
    for name, sheet in (("sheet.png", pictures), ("layouts.png", layouts)):
        with atomic_file(output / name) as staging:
            contact_sheet(sheet, titles, columns=columns).save(staging)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
