# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Export the splatting op as a kernel for the Hub, in the layout that the `kernels` library loads.

    python -m conversion.export_kernel --output gpstoken-splat
    python -m conversion.export_kernel --output gpstoken-splat --repo_id owner/gpstoken-splat

The folder holds the Triton and the PyTorch path under a namespace of ops of its own, a layer, a test and a card. It
imports PyTorch, and Triton where it is installed. `--repo_id` only writes the name into the card and the test.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import gpstoken_hf.splatting
from pipelines.shared.outputs import atomic_directory
from pipelines.shared.programs import ProgramError, make_parser, positive_int, run_program

PROGRAM = "conversion.export_kernel"
NAME = "gpstoken-splat"
# Every device that the library knows gets the same files: what runs is chosen by the device of the tensors.
DEVICES = ("cpu", "cuda", "rocm", "xpu", "metal")
MODULES = ("gaussians", "splatting", "splatting_torch", "splatting_triton", "triton_support")

# How splatting.py differs in the kernel: no compiled loops (Numba is no dependency that kernels may have), no NumPy,
# and ops under a namespace of their own. Each text stands in the module once, or the export stops.
EDITS = (
    ("import numpy as np\n", ""),
    ("from .numba_support import is_available as numba_is_available\n", ""),
    ("from .splatting_cpu import cpu_backward, cpu_forward\n", ""),
    ("from .gaussians import", "from ._ops import add_op_namespace_prefix, ops\nfrom .gaussians import"),
    (
        "Backends: `splatting_cpu` on the CPU (compiled loops), `splatting_triton` on CUDA (kernels, float32), and\n"
        "`splatting_torch` everywhere else (PyTorch operations by tiles).\n",
        "Backends: `splatting_triton` on CUDA (kernels, float32), and `splatting_torch` everywhere else (PyTorch\n"
        "operations by tiles).\n",
    ),
    ('BACKENDS = ("auto", "reference", "cpu", "triton")', 'BACKENDS = ("auto", "reference", "triton")'),
    ("_INTEGERS = (int, np.integer, torch.SymInt)", "_INTEGERS = (int, torch.SymInt)"),
    ("_NUMBERS = (int, float, np.integer, np.floating)", "_NUMBERS = (int, float)"),
    (
        '`"auto"` takes compiled loops on the CPU, Triton on CUDA,\n'
        "            and PyTorch operations where these are not available. "
        '`"cpu"`, `"triton"` and `"reference"` force one.\n',
        '`"auto"` takes Triton on CUDA, and PyTorch operations\n'
        '            where it is not available. `"triton"` and `"reference"` force one.\n',
    ),
    ("        >>> from gpstoken_hf import splat_gaussians\n", ""),
    ("        >>> from gpstoken_hf.splatting import splat_gaussians, splat_reference\n", ""),
    ('"""Which code runs for the option `backend`: "reference", "cpu", "tiled"', '"""What runs: "reference", "tiled"'),
    (
        '    if backend == "cpu" and device.type != "cpu":\n'
        "        raise ValueError(f\"tensors must be on the CPU for backend 'cpu', got {device}\")\n"
        '    if backend == "cpu" and not numba_is_available():\n'
        "        raise ValueError(\"backend must be one that is available, got 'cpu', which needs numba\")\n",
        "",
    ),
    (
        '    if device.type == "cpu":\n        return "cpu" if numba_is_available() else "tiled"\n',
        "",
    ),
    (
        '    if path == "cpu":\n'
        "        return cpu_forward(gaussians, features, attention_mask, height, width, support)\n",
        "",
    ),
    (
        '    if path == "cpu":\n        return cpu_backward(grad, gaussians, features, attention_mask, support)\n',
        "",
    ),
    ("torch.ops.gpstoken.splat.default(", "ops.splat.default("),
    ("maps = torch.ops.gpstoken.splat(*folded", "maps = ops.splat(*folded"),
    ("torch.ops.gpstoken.splat_backward(grad,", "ops.splat_backward(grad,"),
    ("torch.ops.gpstoken.splat_backward(*folded", "ops.splat_backward(*folded"),
    ("second derivatives of gpstoken::splat are", "second derivatives of the splat are"),
    ('hasattr(torch.ops.gpstoken, "splat")', 'hasattr(ops, "splat")'),
    ('"gpstoken::splat",', 'add_op_namespace_prefix("splat"),'),
    ('"gpstoken::splat_backward", ', 'add_op_namespace_prefix("splat_backward"),\n        '),
)

LICENCE_LINE = "# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.\n"

OPS = '''"""The namespace of this kernel's ops. It holds a hash of the sources, so that versions do not meet."""

import torch

NAMESPACE = "{namespace}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """The full name of an op of this kernel."""
    return f"{{NAMESPACE}}::{{name}}"
'''

LAYERS = '''"""The layer that transformers' `use_kernels=True` puts in the place of the renderer of a model."""

from __future__ import annotations

import torch
from torch import nn

from .splatting import splat_gaussians


class GaussianSplat(nn.Module):
    """Splats Gaussians into a map. Has neither weights nor state."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        gaussians: torch.Tensor,
        features: torch.Tensor,
        size: tuple[int, int],
        support: float = 3.0,
        attention_mask: torch.Tensor | None = None,
        align_corners: bool = True,
    ) -> torch.Tensor:
        """The arguments and the map of `splat_gaussians`."""
        return splat_gaussians(gaussians, features, size, support, "auto", attention_mask, align_corners)
'''

INIT = '''"""2D Gaussians, splatted into a feature map: one differentiable op, in Triton and in PyTorch."""

from . import layers
from .splatting import splat_gaussians, splat_reference

__all__ = ["layers", "splat_gaussians", "splat_reference"]
'''

TEST = '''"""The kernel against the formula, on the CPU and on CUDA where there is one. Run with: pytest tests"""

from pathlib import Path

import pytest
import torch
from kernels import get_local_kernel

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(scope="module")
def kernel():
    return get_local_kernel(Path(__file__).resolve().parents[1])


def tokens(device, batch=2, length=70, channels=5):
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(batch, length, 5, generator=generator)
    gaussians = torch.cat([random[..., :2] * 0.2 + 0.02, random[..., 2:] * 1.8 - 0.9], dim=-1)
    features = torch.randn(batch, length, channels, generator=generator)
    return gaussians.to(device).requires_grad_(), features.to(device).requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
def test_map_and_gradients(kernel, device, masked):
    gaussians, features = tokens(device)
    mask = torch.arange(70, device=device).expand(2, 70) < 50 if masked else None
    size = (33, 40)
    weights = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(1)).to(device)
    results = []
    for splat in (kernel.splat_gaussians, kernel.splat_reference):
        maps = splat(gaussians, features, size, attention_mask=mask)
        results.append((maps, *torch.autograd.grad((maps * weights).sum(), (gaussians, features))))
    for actual, expected in zip(*results):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_layer(kernel):
    gaussians, features = tokens("cpu")
    maps = kernel.layers.GaussianSplat()(gaussians, features, (8, 9))
    assert torch.equal(maps, kernel.splat_gaussians(gaussians, features, (8, 9)))


def test_compiles_as_one_graph(kernel):
    gaussians, features = tokens("cpu")
    compiled = torch.compile(kernel.splat_gaussians, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gaussians, features, (8, 9)), kernel.splat_gaussians(gaussians, features, (8, 9)))
'''

CARD = """---
license: apache-2.0
library_name: kernels
tags:
- kernel
- gaussian-splatting
---

# GPSToken's splatting op

Renders 2D Gaussians into a feature map: `R(x, y) = sum_i g_i(x, y) f_i`, each Gaussian cut off outside its box of
`support` sigmas. A plain sum, differentiable in Gaussians and features. Triton kernels on CUDA in float32, PyTorch
operations elsewhere. From gpstoken-hf, whose documentation describes the op, its accuracy and its figures.

```python
import torch
from kernels import get_kernel

kernel = get_kernel("{repo_id}", version={version}, trust_remote_code=True)
# (B, L, 5): sigma_x, sigma_y, rho, mu_x, mu_y
gaussians = torch.tensor([[[0.2, 0.1, 0.5, 0.0, 0.3]]], requires_grad=True)
features = torch.randn(1, 1, 16, requires_grad=True)          # (B, L, C)
maps = kernel.splat_gaussians(gaussians, features, (64, 64))  # (B, C, h, w)
maps.square().mean().backward()
```

From a folder: `get_local_kernel(Path("{name}"))`. Coordinates run from -1 to 1 along each axis, x to the right and y
down.

`layers.GaussianSplat` takes the place of the renderer of a `GPSTokenModel`, on request only:

```python
from transformers import KernelConfig

where = {{"version": {version}, "trust_remote_code": True}}
config = KernelConfig({{"GaussianSplat": ("{repo_id}:GaussianSplat", where)}})
model = GPSTokenModel.from_pretrained(folder, use_kernels=True, kernel_config=config)
```

The Triton kernels were tested in Triton's interpreter and compiled ahead of time. `tests/` runs them on a GPU.
Second derivatives and forward-mode differentiation raise; `splat_reference`, the formula itself, supports them.
"""


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    sources = kernel_sources()
    with atomic_directory(args.output, args.overwrite, PROGRAM) as folder:
        for device in DEVICES:
            variant = folder / "build" / f"torch-{device}"
            variant.mkdir(parents=True)
            for name, text in sources.items():
                (variant / name).write_text(text, encoding="utf-8")
            metadata = metadata_of(sources, device, args.version)
            (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        (folder / "tests").mkdir()
        (folder / "tests" / "test_splat.py").write_text(LICENCE_LINE + TEST, encoding="utf-8")
        card = CARD.format(repo_id=args.repo_id, version=args.version, name=args.output.name)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {args.output}; test it with: python -m pytest {args.output / 'tests'} (needs kernels >= 0.17)")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--repo_id", default=f"owner/{NAME}", help="the repository that the card names")
    parser.add_argument("--version", type=positive_int, default=1, help="version of the kernel")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder of this program")
    args = parser.parse_args(argv)
    if args.repo_id.count("/") != 1 or not all(args.repo_id.split("/")):
        raise ProgramError(f"--repo_id must be owner/name, got {args.repo_id}")
    return args


def kernel_sources() -> dict[str, str]:
    """The Python files of the kernel, by name.

    Raises:
        ProgramError: if splatting.py does not hold a text that has to be replaced exactly once.
    """
    library = Path(gpstoken_hf.splatting.__file__).parent
    sources = {f"{name}.py": (library / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    splatting = sources["splatting.py"]
    for old, new in EDITS:
        count = splatting.count(old)
        if count != 1:
            raise ProgramError(f"splatting.py must hold {old.strip()!r} once, got it {count} times")
        splatting = splatting.replace(old, new)
    sources["splatting.py"] = splatting
    sources["layers.py"] = LICENCE_LINE + LAYERS
    sources["__init__.py"] = LICENCE_LINE + INIT
    sources["_ops.py"] = LICENCE_LINE + OPS.format(namespace=f"gpstoken_splat_{digest(sources)}")
    return sources


def digest(sources: dict[str, str]) -> str:
    """Eight hexadecimal digits that stand for the sources."""
    text = "\0".join(f"{name}\0{sources[name]}" for name in sorted(sources))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def metadata_of(sources: dict[str, str], device: str, version: int) -> dict[str, object]:
    """The `metadata.json` of one variant."""
    return {
        "id": f"_gpstoken_splat_{device}_{digest(sources)}",
        "name": NAME,
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": device},
    }


if __name__ == "__main__":
    raise SystemExit(run_program(main))
