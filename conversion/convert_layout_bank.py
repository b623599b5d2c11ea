# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Convert the authors' layout bank (`initg.pickle`) to a GaussianLayoutBank folder, and back.

    python -m conversion.convert_layout_bank initg.pickle --output bank
    python -m conversion.convert_layout_bank bank --output initg.pickle --reverse

No code from the pickle is run, see `conversion.array_pickle`.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from conversion.array_pickle import load_array_pickle
from conversion.folders import load_layout_bank
from conversion.model_cards import layout_bank_card
from gpstoken_hf.gaussians import NUM_GAUSSIAN_PARAMS
from gpstoken_hf.layout_bank import GaussianLayoutBank
from pipelines.shared.outputs import atomic_directory, atomic_file
from pipelines.shared.programs import ProgramError, run_program
from pipelines.shared.publishing import add_push_options, check_push_options, push_written


def read_layouts(path: Path) -> dict[int, list[torch.Tensor]]:
    """Read the layouts from a pickle of the authors' format.

    The pickle holds a dict of class id -> list of float arrays `(tokens, >= 5)`. Columns after the fifth are texture
    features of the image that a layout comes from. They are dropped.

    Args:
        path (`Path`): the pickle file.

    Returns:
        `dict[int, list[torch.Tensor]]`: class id -> layouts, each `(tokens, 5)` float32.

    Raises:
        ValueError: if the pickle is refused, or holds something else.
        OSError: if the file cannot be read.
    """
    content = load_array_pickle(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold a dict of class id -> layouts, got {_describe(content)}")
    layouts: dict[int, list[torch.Tensor]] = {}
    for label, arrays in content.items():
        if not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(f"class ids in {path} must be integers, got {label!r}")
        if not isinstance(arrays, (list, tuple, np.ndarray)) or np.ndim(arrays) == 0:
            raise ValueError(f"class {label} in {path} must have a list of arrays, got {_describe(arrays)}")
        layouts[label] = [_layout(array, f"layout {i} of class {label} in {path}") for i, array in enumerate(arrays)]
    return layouts


def _layout(array: object, name: str) -> torch.Tensor:
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 2:
        raise ValueError(f"{name} must be a float array (tokens, >= {NUM_GAUSSIAN_PARAMS}), got {_describe(array)}")
    if array.shape[1] < NUM_GAUSSIAN_PARAMS:
        raise ValueError(f"{name} must have at least {NUM_GAUSSIAN_PARAMS} columns, got {array.shape[1]}")
    # PyTorch takes native byte order only. Values beyond float32 become infinite, which the bank refuses.
    with np.errstate(over="ignore"):
        return torch.from_numpy(array[:, :NUM_GAUSSIAN_PARAMS].astype(np.float32))


def write_layouts(bank: GaussianLayoutBank, path: Path) -> None:
    """Write the bank as a pickle of the authors' format, with the five columns of a Gaussian."""
    content = {
        label: [layout.numpy() for layout in layouts] for label, layouts in bank.cpu().layouts_by_class().items()
    }
    with atomic_file(path, overwrite=False) as staging, open(staging, "wb") as file:
        pickle.dump(content, file, protocol=4)


def verify(bank: GaussianLayoutBank, layouts: dict[int, list[torch.Tensor]]) -> float:
    """Return the largest absolute difference between the bank's layouts and those of the pickle.

    Raises:
        ValueError: if the classes, the number of layouts or their lengths differ.
    """
    stored = bank.layouts_by_class()
    expected = {label: items for label, items in layouts.items() if items}
    if stored.keys() != expected.keys():
        raise ValueError(f"the classes of the bank must be {sorted(expected)}, got {sorted(stored)}")
    worst = 0.0
    for label, items in expected.items():
        if [len(item) for item in stored[label]] != [len(item) for item in items]:
            raise ValueError(
                f"the layouts of class {label} must have {[len(item) for item in items]} tokens, "
                f"got {[len(item) for item in stored[label]]}"
            )
        worst = max(worst, *[(a - b).abs().max().item() for a, b in zip(stored[label], items)])
    return worst


def convert(arguments: argparse.Namespace) -> None:
    layouts = read_layouts(arguments.source)
    bank = GaussianLayoutBank.from_layouts(layouts)
    with atomic_directory(arguments.output) as staging:
        bank.save_pretrained(staging)
        name = arguments.source.name
        card = layout_bank_card(bank, f"converted from `{name}`", f"the source of `{name}`")
        (staging / "README.md").write_text(card, encoding="utf-8")
        if arguments.verify:
            error = verify(GaussianLayoutBank.from_pretrained(staging), layouts)
            print(f"verified: largest error against {arguments.source.name}: {error:g}")
            if error > 0:
                raise ProgramError(f"the written bank must equal the pickle, got a largest error of {error:g}")
    counts = bank.class_counts
    print(
        f"wrote {arguments.output}: {len(bank)} layouts of {len(counts)} classes "
        f"({min(counts.values())} to {max(counts.values())} per class), "
        f"tokens per layout {sorted(bank.token_counts)}"
    )
    push_written(arguments.output, arguments)


def reverse(arguments: argparse.Namespace) -> None:
    bank = load_layout_bank(arguments.source)
    write_layouts(bank, arguments.output)
    print(f"wrote {arguments.output}: {len(bank)} layouts, without the texture columns that conversion drops")
    if arguments.verify:
        print(f"verified: largest error {verify(bank, read_layouts(arguments.output)):g}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="conversion.convert_layout_bank", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, help="pickle (with --reverse: folder of a bank)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write (with --reverse: pickle to write)")
    parser.add_argument("--reverse", action="store_true", help="convert a folder back to a pickle")
    parser.add_argument("--verify", action="store_true", help="read the output back and compare it with the input")
    add_push_options(parser)
    arguments = parser.parse_args(argv)
    check_push_options(parser, arguments)
    if arguments.reverse:
        if arguments.push_to_hub:
            parser.error("--push_to_hub must not be given with --reverse")
        reverse(arguments)
    else:
        convert(arguments)
    return 0


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    return type(value).__name__


if __name__ == "__main__":
    raise SystemExit(run_program(main))
