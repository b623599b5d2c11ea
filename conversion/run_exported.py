# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Run the programs that `python -m conversion.export_model` has written beside this file.

    python run_exported.py

Needs NumPy and Pillow, and ONNX Runtime for the `.onnx` files or PyTorch for the `.pt2` files (with torchvision for
`encode_regions.pt2`). Only `encode.pt2` needs gpstoken_hf. A program whose packages are not installed is skipped. Each
program runs on the example in `example.npz`. Its output is compared with the one that the model gave, and decoded
images are saved as PNG files.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np

# The inputs of every program, in order. Batch, tokens, height and width of all of them are free.
INPUTS = {
    # image (B, 3, H, W) in [-1, 1]; regions (B, L, 4), inclusive pixels; their Gaussians (B, L, 5); mask (B, L)
    "encode_regions": ("pixel_values", "boxes", "gaussians", "attention_mask"),
    # tokens (B, L, 5 + C); mask (B, L), 0 for padding; any uint8 array (H, W): its shape is the size of the images
    "decode": ("tokens", "attention_mask", "canvas"),
    "encode": ("pixel_values", "num_tokens"),
}
TOLERANCE = 1e-4


def missing_packages(path):
    """The packages of others that a program needs and that are not installed, with their versions."""
    if path.suffix == ".onnx":
        needed = {"onnxruntime": "1.20"}
    else:
        needed = {"torch": "2.7"} | ({"torchvision": "0.22"} if path.name.startswith("encode_regions") else {})
    return [f"{name} >= {version}" for name, version in needed.items() if importlib.util.find_spec(name) is None]


def run_onnx(path, inputs):
    """The first output of an ONNX file, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def run_torch(path, inputs):
    """The first output of an exported or compiled PyTorch program."""
    import torch

    if path.name.startswith("encode_regions"):
        import torchvision  # noqa: F401 - RoIAlign is its op
    if path.name == "encode.pt2":
        import gpstoken_hf  # noqa: F401 - the partition is its op
    if path.name.endswith(".aoti.pt2"):
        program = torch._inductor.aoti_load_package(str(path))
    else:
        program = torch.export.load(path).module()
    tensors = [value.item() if value.ndim == 0 else torch.from_numpy(value) for value in inputs.values()]
    output = program(*tensors)
    return (output if isinstance(output, torch.Tensor) else output[0]).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="default: that of this file")
    folder = parser.parse_args().folder
    example = np.load(folder / "example.npz")
    errors = []
    for path in sorted([*folder.glob("*.onnx"), *folder.glob("*.pt2")]):
        part = path.name.split(".")[0]
        if path.name == "encode.pt2" and importlib.util.find_spec("gpstoken_hf") is None:
            print(f"{path.name}: skipped, its partition is an op of gpstoken_hf, which is not installed")
            continue
        if missing := missing_packages(path):
            print(f"{path.name}: skipped, it needs {' and '.join(missing)}, not installed here")
            continue
        inputs = {name: example[f"{part}.{name}"] for name in INPUTS[part]}
        output = (run_onnx if path.suffix == ".onnx" else run_torch)(path, inputs)
        errors.append(float(np.abs(output - example[f"{part}.output"]).max()))
        print(f"{path.name}: output {output.shape}, largest difference from the model {errors[-1]:.1e}")
        if part == "decode":
            from PIL import Image

            pixels = ((output[0].transpose(1, 2, 0).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{path.name}.png")
    return 0 if errors and all(error <= TOLERANCE for error in errors) else 1


if __name__ == "__main__":
    raise SystemExit(main())
