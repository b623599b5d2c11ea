# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Measure the time that the sampling loop of GPSTokenPipeline adds to its model calls.

    python -m pipelines.benchmark_sampling
    python -m pipelines.benchmark_sampling --width 384 --layers 12 --heads 6 --tokens 128 --device cuda

The models have random weights, on which time does not depend. The schedulers sample in turn, `--repeats` times after a
warm-up, with guidance in its default interval. The time in the transformer's forward is subtracted from the time of
the loop around it, within the same run, so that the load of the machine affects both. The program prints medians. The
exit code is 1 if the texture loop of any scheduler adds more than `--limit` percent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from tqdm import tqdm

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline
from gpstoken_hf.scheduling_flow_match_sde import FlowMatchSDEScheduler
from gpstoken_hf.transformer_sit import SiTTransformer1DModel

from .shared.costs import clock
from .shared.outputs import atomic_directory
from .shared.programs import ProgramError, make_parser, positive_float, positive_int, run_program

PROGRAM = "pipelines.benchmark_sampling"
SCHEDULERS = {
    "sde": FlowMatchSDEScheduler,
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
}
NUM_CLASSES = 1000


class TimedPipeline(GPSTokenPipeline):
    """Records the seconds of each loop, by stage, and of the forward passes inside it."""

    loop_s: dict[str, float]
    model_s: dict[str, float]

    def _sample(self, stage: str, *args: Any, **kwargs: Any) -> Any:
        transformer: SiTTransformer1DModel = getattr(
            self, "layout_transformer" if stage == "layout" else "transformer"
        )
        device = next(transformer.parameters()).device
        inside, begun = 0.0, 0.0

        def begin(*_: Any) -> None:
            nonlocal begun
            begun = clock(device)

        def end(*_: Any) -> None:
            nonlocal inside
            inside += clock(device) - begun

        hooks = [transformer.register_forward_pre_hook(begin), transformer.register_forward_hook(end)]
        start = clock(device)
        result = super()._sample(stage, *args, **kwargs)
        self.loop_s[stage] = clock(device) - start
        self.model_s[stage] = inside
        for hook in hooks:
            hook.remove()
        return result


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    if args.output is None:
        results = benchmark(args)
    else:
        with atomic_directory(args.output, args.overwrite, PROGRAM) as staging:
            results = benchmark(args)
            settings = {key: value for key, value in vars(args).items() if key not in ("output", "overwrite")}
            report = json.dumps({"settings": settings, "results": results}, indent=2)
            (staging / "results.json").write_text(report + "\n")
            (staging / "results.md").write_text(table(results) + "\n")
    print(table(results))
    above = [name for name, result in results.items() if result["overhead_percent"] > args.limit]
    if above:
        print(f"above the limit of {args.limit:g} %: {', '.join(above)}")
    return 1 if above else 0


def benchmark(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure each scheduler; returns figures by name."""
    pipeline = make_pipeline(args)
    labels = [label % NUM_CLASSES for label in range(args.batch_size)]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.schedulers}
    for repeat in tqdm(range(args.repeats + 1), unit="round"):
        for name in args.schedulers:  # in turn, so that a slow minute falls on all of them
            pipeline.scheduler = SCHEDULERS[name]()
            pipeline.loop_s, pipeline.model_s = {}, {}
            device = pipeline.device
            start = clock(device)
            generators = [torch.Generator().manual_seed(seed) for seed in range(args.batch_size)]
            pipeline(labels, num_inference_steps=args.steps, generator=generators, output_type="pt")
            total = clock(device) - start
            if repeat:  # the first round warms up
                runs[name].append(
                    {
                        "total_s": total,
                        "layout_model_s": pipeline.model_s["layout"],
                        "layout_loop_s": pipeline.loop_s["layout"],
                        "texture_model_s": pipeline.model_s["texture"],
                        "texture_loop_s": pipeline.loop_s["texture"],
                    }
                )
    return {name: summarise(measured, args) for name, measured in runs.items()}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("--layers", type=positive_int, default=4, help="layers of the texture transformer")
    parser.add_argument("--width", type=positive_int, default=256)
    parser.add_argument("--heads", type=positive_int, default=4)
    parser.add_argument("--tokens", type=positive_int, default=64)
    parser.add_argument("--batch_size", type=positive_int, default=8)
    parser.add_argument("--steps", type=positive_int, default=20)
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=list(SCHEDULERS))
    parser.add_argument(
        "--limit", type=positive_float, default=3.0, help="largest share that the loop may add, in percent"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="new folder for results.md and results.json; default: print only")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder of this program")
    args = parser.parse_args(argv)
    if args.width % args.heads:
        raise ProgramError(f"--width must be a multiple of --heads, got {args.width} and {args.heads}")
    return args


def make_pipeline(args: argparse.Namespace) -> TimedPipeline:
    """A pipeline of random weights. Its layout transformer has half the layers of the texture transformer."""
    torch.manual_seed(0)
    vae = GPSTokenModel(GPSTokenConfig.preset("nano", num_tokens=args.tokens)).eval()
    size = {"num_attention_heads": args.heads, "attention_head_dim": args.width // args.heads}
    shared = {"sample_size": args.tokens, "num_classes": NUM_CLASSES, **size}
    texture = SiTTransformer1DModel(
        in_channels=vae.config.token_channels, condition_channels=5, num_layers=args.layers, **shared
    )
    layout = SiTTransformer1DModel(in_channels=5, num_layers=max(1, args.layers // 2), **shared)
    pipeline = TimedPipeline(
        vae=vae,
        transformer=texture.eval(),
        scheduler=FlowMatchSDEScheduler(),
        layout_transformer=layout.eval(),
        layout_scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(args.device, getattr(torch, args.dtype))


def summarise(runs: Sequence[dict[str, float]], args: argparse.Namespace) -> dict[str, float]:
    """Medians over the runs. The overhead is the median of the ratios of single runs."""
    overheads = [100 * (run["texture_loop_s"] / run["texture_model_s"] - 1) for run in runs]
    outside = [run["texture_loop_s"] - run["texture_model_s"] for run in runs]
    return {
        "images_per_s": args.batch_size / median(run["total_s"] for run in runs),
        "model_ms_per_step": 1000 * median(run["texture_model_s"] for run in runs) / args.steps,
        "loop_ms_per_step": 1000 * median(outside) / args.steps,
        "overhead_percent": median(overheads),
        "layout_stage_ms": 1000 * median(run["layout_loop_s"] for run in runs),
        "rest_ms": 1000 * median(r["total_s"] - r["layout_loop_s"] - r["texture_loop_s"] for r in runs),
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """One line for each scheduler."""
    lines = ["| scheduler | images/s | model ms/step | loop ms/step | loop adds | layout ms | rest ms |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, r in results.items():
        lines.append(
            f"| {name} | {r['images_per_s']:.2f} | {r['model_ms_per_step']:.2f} | {r['loop_ms_per_step']:.3f} "
            f"| {r['overhead_percent']:.2f} % | {r['layout_stage_ms']:.1f} | {r['rest_ms']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
