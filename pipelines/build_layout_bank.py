# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Build a GaussianLayoutBank: the layouts of real images, by class, from a labelled dataset.

    python -m pipelines.build_layout_bank --train_data_dir photos/ --num_tokens 128 --output_dir bank/
    python -m pipelines.build_layout_bank --train_data_files train.parquet --tokenizer owner/name --output_dir bank/

Images are cropped to their central square, resized and partitioned as by the tokenizer. Finished parts are kept in
`<output_dir>.parts`, so the same command resumes an interrupted run. The output appears when it is complete. It holds
the bank, a model card and `layouts.png`, a sheet of some layouts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from conversion.model_cards import layout_bank_card
from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.layout_bank import GaussianLayoutBank
from gpstoken_hf.partition import partition_images
from gpstoken_hf.visualization import contact_sheet, draw_gaussians
from training.data import center_crop, decode_image, image_to_array, load_image_dataset
from training.options import add_dataset_options, describe_options, parse_options

from .shared.checkpoints import find_checkpoint
from .shared.outputs import OwnDirectory, atomic_directory, atomic_file, own_directory
from .shared.programs import (
    ProgramError,
    make_parser,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    printable,
    run_program,
)
from .shared.publishing import add_push_options, check_push_options, push_written

PROGRAM = "pipelines.build_layout_bank"
SETTINGS = ("resolution", "num_tokens", "complexity_exponent", "min_region_size", "sigma_scale")
SHEET_LAYOUTS = 16
SHEET_SIDE = 192


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("--config", type=Path, help="YAML file of defaults for these options; the command line wins")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--tokenizer", help="folder, Hub repository or bundled tokenizer whose config gives the defaults"
    )
    parser.add_argument(
        "--resolution", type=positive_int, help="side of the resized squares, in pixels; default: the tokenizer's"
    )
    parser.add_argument(
        "--num_tokens",
        type=positive_int,
        nargs="+",
        help="tokens per layout; several numbers: as many layouts per image",
    )
    parser.add_argument("--complexity_exponent", type=non_negative_float, help="lambda of the partition")
    parser.add_argument("--min_region_size", type=positive_int, help="s_min of the partition, in pixels")
    parser.add_argument("--sigma_scale", type=positive_float, help="initial sigma / extent of a region")
    parser.add_argument("--images_per_class", type=positive_int, default=50, help="drawn at random without repetition")
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--batch_size", type=positive_int, default=32)
    parser.add_argument("--part_size", type=positive_int, default=1024, help="images between two saved parts")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved options and stop")
    add_push_options(parser)
    add_dataset_options(parser)
    return parser


def resolve_settings(options: argparse.Namespace) -> None:
    """Complete the options from the tokenizer's config, or from the defaults of `GPSTokenConfig` without one."""
    config = GPSTokenConfig()
    if options.tokenizer is not None:
        config = GPSTokenConfig.from_pretrained(find_checkpoint(options.tokenizer, "--tokenizer"))
    defaults = {name: getattr(config, {"resolution": "image_size"}.get(name, name)) for name in SETTINGS}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, [value] if name == "num_tokens" else value)
    if len(set(options.num_tokens)) != len(options.num_tokens):
        raise ProgramError(f"--num_tokens must be different numbers, got {options.num_tokens}")


def choose_rows(labels: Sequence[Any], per_class: int, seed: int) -> list[int]:
    """Up to `per_class` rows of every class, drawn at random without repetition, in ascending order.

    Raises:
        ProgramError: If a label is not a class id.
    """
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise ProgramError(f"labels must be class ids >= 0, got {label!r} in row {row}")
        rows.setdefault(label, []).append(row)
    chosen: list[int] = []
    for label, members in rows.items():
        # One generator per class, so that the choice does not depend on the other classes.
        order = np.random.default_rng([seed, label]).permutation(len(members))
        chosen += [members[place] for place in order[:per_class]]
    return sorted(chosen)


def layouts_of(images: Sequence[PIL.Image.Image], options: argparse.Namespace) -> list[torch.Tensor]:
    """The layouts `(L, 5)` of square images, one for each image and number of tokens."""
    pixel_values = torch.from_numpy(np.stack([image_to_array(image) for image in images]))
    settings = {name: getattr(options, name) for name in ("complexity_exponent", "min_region_size", "sigma_scale")}
    columns = [partition_images(pixel_values, count, **settings).gaussians for count in options.num_tokens]
    return [column[row] for row in range(len(images)) for column in columns]


def build_part(dataset: Any, rows: Sequence[int], options: argparse.Namespace, bar: tqdm) -> dict[str, torch.Tensor]:
    """Layouts of some rows: `gaussians` (T, 5), `lengths` (N,) and `class_labels` (N,)."""
    layouts: list[torch.Tensor] = []
    labels: list[int] = []
    for start in range(0, len(rows), options.batch_size):
        batch = [dataset[row] for row in rows[start : start + options.batch_size]]
        images = [
            center_crop(decode_image(sample[options.image_column], f"row {row}"), options.resolution)
            for row, sample in zip(rows[start:], batch)
        ]
        layouts += layouts_of(images, options)
        labels += [sample[options.label_column] for sample in batch for _ in options.num_tokens]
        bar.update(len(batch))
    return {
        "gaussians": torch.cat(layouts),
        "lengths": torch.tensor([len(layout) for layout in layouts]),
        "class_labels": torch.tensor(labels),
    }


def build_parts(dataset: Any, rows: Sequence[int], options: argparse.Namespace, folder: OwnDirectory) -> list[Path]:
    """Write the parts that do not exist yet; returns the files of all parts.

    Raises:
        ProgramError: If existing parts were made with other options.
    """
    resolved = json.dumps({"rows": list(rows), **{name: getattr(options, name) for name in SETTINGS}})
    record = folder.path / "options.json"
    if record.exists() and record.read_text(encoding="utf-8", errors="replace") != resolved:
        raise ProgramError(
            f"{folder.path} holds parts made with other options or data: finish with those, or delete it"
        )
    parts = [rows[start : start + options.part_size] for start in range(0, len(rows), options.part_size)]
    files = [folder.path / f"{part[0]:08d}-{len(part)}.safetensors" for part in parts]
    folder.expect([record.name, *(file.name for file in files)])
    with atomic_file(record) as staging:
        staging.write_text(resolved, encoding="utf-8")
    with tqdm(total=len(rows), unit="image", desc="layouts", disable=None, file=sys.stderr) as bar:
        for part, file in zip(parts, files):
            if file.exists():
                bar.update(len(part))
            else:
                tensors = build_part(dataset, part, options, bar)
                with atomic_file(file) as staging:
                    save_file(tensors, staging)
    return files


def read_parts(files: Sequence[Path]) -> Iterator[tuple[int, torch.Tensor]]:
    """Class and layout of every image of all parts."""
    for file in files:
        try:
            part = load_file(file)
        except SafetensorError as error:
            raise ProgramError(f"{file} must be a whole part, got a damaged one; delete it and run again") from error
        layouts = part["gaussians"].split(part["lengths"].tolist())
        yield from zip(part["class_labels"].tolist(), layouts)


def draw_layouts(bank: GaussianLayoutBank) -> PIL.Image.Image:
    """Draw layouts on grey, evenly spaced over all classes."""
    places = np.unique(np.linspace(0, len(bank) - 1, SHEET_LAYOUTS).round().astype(int))
    ground = PIL.Image.new("RGB", (SHEET_SIDE, SHEET_SIDE), (40, 40, 44))
    pictures = [draw_gaussians(ground, bank.gaussians_of(int(place)), zoom=1) for place in places]
    titles = [
        f"class {bank.class_labels[place].item()}, {len(bank.gaussians_of(int(place)))} tokens" for place in places
    ]
    return contact_sheet(pictures, titles)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parse_options(parser, argv)
    check_push_options(parser, options)
    resolve_settings(options)
    if options.dry_run:
        print(describe_options(options), end="")
        return 0
    if options.streaming:
        raise ProgramError("--streaming must be off, because classes are counted before images are read, got on")
    dataset = load_image_dataset(options)
    if options.label_column not in dataset.column_names:
        raise ProgramError(
            f"--label_column must be one of {', '.join(dataset.column_names)}, got {options.label_column!r}"
        )
    rows = choose_rows(dataset[options.label_column][:], options.images_per_class, options.seed)
    if not rows:
        raise ProgramError("the dataset must have rows, got none")

    parts = options.output_dir.parent / f"{options.output_dir.name}.parts"
    with own_directory(parts, PROGRAM) as folder:
        make_bank(dataset, rows, options, folder)
        folder.remove()
    push_written(options.output_dir, options)
    return 0


def make_bank(dataset: Any, rows: Sequence[int], options: argparse.Namespace, folder: OwnDirectory) -> None:
    """Write the bank, its sheet and its card to the output folder. Parts are kept in `folder`."""
    with atomic_directory(options.output_dir, program=PROGRAM) as staging:
        files = build_parts(dataset, rows, options, folder)
        layouts: dict[int, list[torch.Tensor]] = {}
        for label, layout in read_parts(files):
            layouts.setdefault(label, []).append(layout)
        bank = GaussianLayoutBank.from_layouts(layouts)
        bank.save_pretrained(staging)
        draw_layouts(bank).save(staging / "layouts.png")
        source = options.dataset_name or options.train_data_dir or ", ".join(options.train_data_files)
        card = layout_bank_card(bank, f"taken from images of `{printable(Path(source).name)}`", "that dataset")
        settings = ", ".join(f"{name} {getattr(options, name)}" for name in SETTINGS)
        card += f"\nPartition: {settings}.\n\n![some of the layouts](layouts.png)\n"
        (staging / "README.md").write_text(card, encoding="utf-8")
    counts = bank.class_counts.values()
    print(
        f"wrote {printable(options.output_dir)}: {len(bank)} layouts of {len(counts)} classes "
        f"({min(counts)} to {max(counts)} per class), tokens per layout {sorted(bank.token_counts)}"
    )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
