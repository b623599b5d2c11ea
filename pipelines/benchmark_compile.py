# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Compare torch.compile with eager execution: encode, decode and a transformer, both sides in turn in one run.

    python -m pipelines.benchmark_compile --output results
    python -m pipelines.benchmark_compile --output results --preset m128 --image_size 256 --device cuda

The weights are random; time does not depend on them. Compiling takes minutes and is timed apart. The program writes
medians with their ranges.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from gpstoken_hf.configuration_gpstoken import PRESETS, GPSTokenConfig
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.transformer_sit import SiTTransformer1DModel

from .shared.costs import clock
from .shared.outputs import atomic_directory
from .shared.programs import make_parser, positive_int, run_program

PROGRAM = "pipelines.benchmark_compile"
Case = tuple[Callable[[], object], Callable[[], object]]


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    with atomic_directory(args.output, args.overwrite, PROGRAM) as folder:
        results = benchmark(args)
        settings = {key: value for key, value in vars(args).items() if key not in ("output", "overwrite")}
        settings |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        report = json.dumps({"settings": settings, "results": results}, indent=2)
        (folder / "results.json").write_text(report + "\n")
        (folder / "results.md").write_text(table(results) + "\n")
        draw(results, folder / "speed.png")
    print(table(results))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="nano")
    parser.add_argument("--image_size", type=positive_int, help="default: that of the preset")
    parser.add_argument("--batch_size", type=positive_int, default=4)
    parser.add_argument("--repeats", type=positive_int, default=11)
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output", type=Path, required=True, help="new folder for results.md, results.json and a plot"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder of this program")
    return parser.parse_args(argv)


def make_cases(args: argparse.Namespace) -> dict[str, Case]:
    """For every case the eager and the compiled call."""
    torch.manual_seed(0)
    config = GPSTokenConfig.preset(args.preset)
    side = args.image_size or config.image_size
    model = GPSTokenModel(config).eval().to(args.device)
    sit = SiTTransformer1DModel(
        sample_size=config.num_tokens,
        in_channels=config.token_channels,
        condition_channels=5,
        num_layers=6,
        num_attention_heads=6,
        attention_head_dim=64,
    )
    sit = sit.eval().to(args.device)
    images = (torch.rand(args.batch_size, 3, side, side) * 2 - 1).to(args.device)
    tokens = model.encode(images).tokens
    condition = tokens[..., :5].contiguous()
    labels = torch.zeros(args.batch_size, dtype=torch.int64, device=args.device)
    times = torch.full((args.batch_size,), 500.0, device=args.device)
    functions: dict[str, tuple[Callable, tuple]] = {
        "encode": (model.encode, (images,)),
        "decode": (model.decode, (tokens, side)),
        "SiT, 6 layers of width 384": (sit, (tokens, times, labels, condition)),
    }

    def case(function: Callable, arguments: tuple) -> Case:
        compiled = torch.compile(function, backend=args.backend, fullgraph=True)
        return (lambda: function(*arguments)), (lambda: compiled(*arguments))

    return {name: case(function, arguments) for name, (function, arguments) in functions.items()}


@torch.no_grad()
def benchmark(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure every case; returns figures by name."""
    device = torch.device(args.device)
    results = {}
    for name, (eager, compiled) in tqdm(make_cases(args).items(), unit="case"):
        start = clock(device)
        compiled()
        compile_s = clock(device) - start
        eager()
        runs: dict[str, list[float]] = {"eager": [], "compiled": []}
        for _ in range(args.repeats):
            for side, call in (("eager", eager), ("compiled", compiled)):  # in turn
                start = clock(device)
                call()
                runs[side].append(1000 * (clock(device) - start))
        ratios = [before / after for before, after in zip(runs["eager"], runs["compiled"])]
        results[name] = {
            "compile_s": compile_s,
            "eager_ms": median(runs["eager"]),
            "compiled_ms": median(runs["compiled"]),
            "speedup": median(ratios),
            "speedup_min": min(ratios),
            "speedup_max": max(ratios),
        }
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """One line for each case."""
    lines = ["| case | eager, ms | compiled, ms | speedup (range) | first call, s |", "|---|---|---|---|---|"]
    for name, r in results.items():
        lines.append(
            f"| {name} | {r['eager_ms']:.1f} | {r['compiled_ms']:.1f} "
            f"| {r['speedup']:.2f}x ({r['speedup_min']:.2f}x to {r['speedup_max']:.2f}x) | {r['compile_s']:.0f} |"
        )
    return "\n".join(lines)


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    """A bar for the speedup of every case, with its range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1 + 0.6 * len(results)), layout="constrained")
    axes = figure.subplots()
    speedups = [r["speedup"] for r in results.values()]
    below = [r["speedup"] - r["speedup_min"] for r in results.values()]
    above = [r["speedup_max"] - r["speedup"] for r in results.values()]
    axes.barh(list(results), speedups, xerr=[below, above], color="#4878a8", capsize=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("eager time / compiled time, median and range")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
