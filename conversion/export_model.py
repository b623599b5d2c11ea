# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Export a GPSTokenModel as programs that run without this package.

    python -m conversion.export_model --model gpstoken-nano --output exported
    python exported/run_exported.py

Parts: `decode` (tokens -> image), `encode_regions` (image and regions -> tokens, the encoder after the partition) and
`encode` (image -> tokens). Formats: `onnx`, `torch` (torch.export) and `aoti` (an AOTInductor package, compiled for
this machine). Batch, tokens and image size stay free. Every program is run on an example of another size than it was
traced with, and compared with the model. The example and a script that runs all programs on it lie beside them.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from conversion import run_exported
from conversion.run_exported import INPUTS, TOLERANCE, run_onnx, run_torch
from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from pipelines.shared.checkpoints import DEFAULT_MODEL, load_tokenizer
from pipelines.shared.outputs import atomic_directory
from pipelines.shared.programs import ProgramError, make_parser, progress, run_program

PROGRAM = "conversion.export_model"
FILES = {"onnx": "{}.onnx", "torch": "{}.pt2", "aoti": "{}.aoti.pt2"}
# What has no form outside of PyTorch or of this package, and why.
REFUSED = {
    ("encode", "onnx"): "the partition is an op of gpstoken_hf; export encode_regions and give it the regions",
    ("encode", "aoti"): "the partition is an op of gpstoken_hf; export encode_regions and give it the regions",
    ("encode_regions", "aoti"): "RoIAlign is an op of torchvision, which a compiled package does not hold; use torch",
}
EXPORTABLE = tuple((part, form) for part in INPUTS for form in FILES if (part, form) not in REFUSED)
# Above this, the weights lie in a file beside the ONNX file, whose format ends at 2 GB.
MAX_ONNX_BYTES = 1_500_000_000


def without(model: GPSTokenModel, name: str) -> GPSTokenModel:
    """The same model without one of its modules, whose weights a program would carry along unused."""
    lean = copy.copy(model)
    lean._modules = {key: module for key, module in model._modules.items() if key != name}
    return lean


class Decode(nn.Module):
    """Tokens -> image. The splat is the plain formula, so that the program holds PyTorch operations alone."""

    def __init__(self, model: GPSTokenModel):
        super().__init__()
        self.model = without(model, "encoder")

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
        return self.model.decode(tokens, (canvas.shape[0], canvas.shape[1]), attention_mask).sample


class EncodeRegions(nn.Module):
    """Image, regions and their Gaussians -> tokens."""

    def __init__(self, model: GPSTokenModel):
        super().__init__()
        self.model = without(model, "decoder")

    def forward(
        self, pixel_values: torch.Tensor, boxes: torch.Tensor, gaussians: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        layout = GaussianLayout(gaussians, boxes, attention_mask)
        return self.model.encode(pixel_values, layout=layout).tokens


class Encode(nn.Module):
    """Image -> tokens, boxes and Gaussians of the regions."""

    def __init__(self, model: GPSTokenModel):
        super().__init__()
        self.model = without(model, "decoder")

    def forward(self, pixel_values: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        encoded = self.model.encode(pixel_values, num_tokens)
        return encoded.tokens, encoded.layout.boxes, encoded.layout.gaussians


PARTS: dict[str, Callable[[GPSTokenModel], nn.Module]] = {
    "decode": Decode,
    "encode_regions": EncodeRegions,
    "encode": Encode,
}
# Free axes of every input. An integer is free as a whole.
FREE_AXES: dict[str, Any] = {
    "pixel_values": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},
    "boxes": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
    "gaussians": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
    "attention_mask": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
    "tokens": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
    "canvas": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
    "num_tokens": Dim.DYNAMIC,
}


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    asked = [(part, form) for part in args.parts for form in args.formats]
    wanted = [pair for pair in asked if pair in EXPORTABLE]
    _check_packages({form for _, form in wanted})
    model = load_tokenizer(args.model, "cpu").float().requires_grad_(False)
    model.renderer.backend = "reference"
    # Traced with one batch, size and number of tokens, run with another. No two sizes of a trace are equal, because
    # equal ones would be taken for one.
    traced = example_of(model, 3, (5, 6), [8, 7, 8])
    example = example_of(model, 2, (6, 4), [11, 9])
    with atomic_directory(args.output, args.overwrite, PROGRAM) as folder:
        programs: dict[str, ExportedProgram] = {}
        for part, form in progress(wanted, "program"):
            if part not in programs:
                programs[part] = trace(PARTS[part](model), part, traced)
            path = folder / FILES[form].format(part)
            write(programs[part], form, path, part)
            error = check(path, part, example)
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, largest difference from the model {error:.1e}")
        shutil.copyfile(run_exported.__file__, folder / "run_exported.py")
        np.savez(folder / "example.npz", **example)  # type: ignore[arg-type]
        save_picture(example["decode.output"], folder / "example.png")
    for part, form in asked:
        if (part, form) in REFUSED:
            print(f"{part} cannot be exported as {form}: {REFUSED[part, form]}")
    print(f"wrote {args.output}; run it with: python {args.output / 'run_exported.py'}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder, Hub repository or bundled checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["decode", "encode_regions"])
    parser.add_argument(
        "--formats", nargs="+", choices=FILES, default=["onnx", "torch"], help="aoti takes minutes and a C++ compiler"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder of this program")
    args = parser.parse_args(argv)
    for form in args.formats:
        # A format that none of the parts has is a mistake. One that some lack is written for the others.
        if not any((part, form) in EXPORTABLE for part in args.parts):
            part = args.parts[0]
            raise ProgramError(f"{part} cannot be exported as {form}: {REFUSED[part, form]}")
    return args


def _check_packages(forms: set[str]) -> None:
    """Raise a ProgramError that names what is missing, before anything is traced."""
    if "onnx" in forms:
        for package, version in (("onnx", "1.17"), ("onnxscript", "0.5"), ("onnxruntime", "1.20")):
            try:
                importlib.import_module(package)
            except ImportError:
                raise ProgramError(
                    f"--formats onnx needs {package} >= {version}, which is not installed: pip install {package}"
                ) from None
    if "aoti" in forms and not hasattr(torch._inductor, "aoti_compile_and_package"):
        raise ProgramError(f"--formats aoti needs torch >= 2.6 with AOTInductor, got torch {torch.__version__}")


def example_of(
    model: GPSTokenModel, batch_size: int, map_size: tuple[int, int], counts: list[int]
) -> dict[str, np.ndarray]:
    """Inputs of all parts and the model's outputs, as `part.name`. The images have odd sides."""
    scale = model.config.map_scale
    # A side that is no multiple of the map's scale, and large enough for the tokens.
    factor = -(-max(counts) * model.config.min_region_size // (scale * min(map_size)))
    height, width = (side * factor * scale + 1 for side in map_size)
    generator = torch.Generator().manual_seed(0)
    waves = torch.rand(batch_size, 3, 4, 4, generator=generator) * 2 - 1
    images = nn.functional.interpolate(waves, (height, width), mode="bicubic").clamp(-1, 1)
    with torch.no_grad():
        encoded = model.encode(images, counts)
        whole = model.encode(images, max(counts))
        canvas = torch.zeros(height, width, dtype=torch.uint8)
        sample = model.decode(encoded.tokens, (height, width), encoded.attention_mask).sample
    layout = encoded.layout
    values: dict[str, dict[str, Any]] = {
        "encode_regions": {
            "pixel_values": images,
            "boxes": layout.boxes,
            "gaussians": layout.gaussians,
            "attention_mask": layout.attention_mask,
            "output": encoded.tokens,
        },
        "decode": {
            "tokens": encoded.tokens,
            "attention_mask": encoded.attention_mask,
            "canvas": canvas,
            "output": sample,
        },
        "encode": {"pixel_values": images, "num_tokens": max(counts), "output": whole.tokens},
    }
    return {f"{part}.{name}": np.asarray(value) for part, named in values.items() for name, value in named.items()}


def trace(module: nn.Module, part: str, example: dict[str, np.ndarray]) -> ExportedProgram:
    """The program of a part, with free axes."""
    inputs = [example[f"{part}.{name}"] for name in INPUTS[part]]
    arguments = tuple(value.item() if value.ndim == 0 else torch.from_numpy(value) for value in inputs)
    shapes = {name: FREE_AXES[name] for name in INPUTS[part]}
    with _refusal(f"{part} cannot be exported"), torch.no_grad():
        return torch.export.export(module.eval(), arguments, dynamic_shapes=shapes, strict=False)


def write(program: ExportedProgram, form: str, path: Path, part: str) -> None:
    """Write a traced program in one of the formats."""
    with _refusal(f"{part} cannot be exported as {form}"), warnings.catch_warnings():
        # Exporters warn of what they approximate. `check` measures it.
        warnings.simplefilter("ignore", UserWarning)
        if form == "torch":
            torch.export.save(program, path)
        elif form == "aoti":
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        else:
            converted = torch.onnx.export(
                program, dynamo=True, input_names=list(INPUTS[part]), output_names=["output"], verbose=False
            )
            size = sum(tensor.nbytes for tensor in program.state_dict.values())
            converted.save(path, external_data=size > MAX_ONNX_BYTES)


def check(path: Path, part: str, example: dict[str, np.ndarray]) -> float:
    """The largest difference of a written program from the model.

    Raises:
        ProgramError: if it is above the tolerance, or the program does not run.
    """
    inputs = {name: example[f"{part}.{name}"] for name in INPUTS[part]}
    with _refusal(f"{path.name} does not run"):
        output = (run_onnx if path.suffix == ".onnx" else run_torch)(path, inputs)
    error = float(np.abs(output - example[f"{part}.output"]).max())
    if not error <= TOLERANCE:
        raise ProgramError(f"the output of {path.name} must be within {TOLERANCE:g} of the model's, got {error:.2g}")
    return error


@contextmanager
def _refusal(what: str) -> Iterator[None]:
    """Turn whatever an exporter raises into one sentence with the version that raised it."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ProgramError(f"{what} with torch {torch.__version__}: {type(error).__name__}: {lines[0]}") from error


def save_picture(images: np.ndarray, path: Path) -> None:
    """The first of images `(B, 3, H, W)` in [-1, 1] as a PNG file."""
    from gpstoken_hf.visualization import tensor_to_pil

    tensor_to_pil(torch.from_numpy(images[0])).save(path)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
