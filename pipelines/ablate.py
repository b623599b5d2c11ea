# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What each part of a tokenizer is worth, without retraining: Tables 6 and 7 and Figure 6 of the paper.

    python -m pipelines.ablate --model gpstoken-m128 --data imagenet_val/ --resolution 256 --tokens 64 128 256
    python -m pipelines.ablate images.parquet --resolution 64 --lambdas 0 2.5 5 --output ablation/

Everything that the model does at inference is varied, one thing at a time; the rest stays as its config says:

    layout and refinement   regions by complexity or equally large (lambda 0); Gaussians as refined by the encoder or
                            as the regions say
    lambda                  the exponent of the complexity (Eq. 4)
    support                 of the splat, in standard deviations
    s_min                   the smallest side of a region in pixels
    tokens                  with regions by complexity and equally large

The paper trained a model for each row of its Tables 6 and 7. Here one trained model is used for all: the differences
are what it loses when a part is taken away. Images, metrics and outputs are those of evaluate_reconstruction, and so
are resuming and --feature_network and --lpips_network. The output folder also holds:

    tokens.png      PSNR over the number of tokens, with regions by complexity and equally large
    curve.png       PSNR over the number of floats, beside the thumbnail
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.regions import max_regions

from .shared.autoencoders import Candidate, load_candidates, measure_latents
from .shared.checkpoints import DEFAULT_MODEL
from .shared.image_sets import ImageSet
from .shared.outputs import own_directory
from .shared.programs import (
    ProgramError,
    make_parser,
    non_negative_float,
    positive_float,
    positive_int,
    run_program,
)
from .shared.reconstruction_methods import Method, make_baselines
from .shared.reconstruction_report import ReconstructionReport
from .shared.reconstruction_scoring import Evaluation, add_options, check_options
from .shared.reports import Block, Curve, Heading, Picture, draw_curves

PROGRAM = "pipelines.ablate"
UNIFORM = 0.0  # with lambda 0 the largest region is halved first
GROUPS = {
    "parts": "Layout and refinement (Table 6)",
    "lambda": "Exponent of the complexity, lambda (Table 7)",
    "support": "Support of the splat (Table 7)",
    "s_min": "Smallest region, s_min",
    "tokens": "Number of tokens (Figure 6)",
    "uniform": "Number of tokens, equally large regions",
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    images = ImageSet(args.data, args.image_column, args.resolution, args.max_images, args.resample)
    candidates = load_candidates(args.model[0], args.device, args.tokens)
    if not candidates[0].is_ours:
        raise ProgramError(f"--model must be a GPSToken tokenizer, got {args.model[0]}")
    for candidate in candidates:
        measure_latents(candidate, args.resolution)
    models = make_variations(candidates, args)
    methods = [*models, *make_baselines(candidates, args.baselines, args.resolution)]
    evaluation = Evaluation(PROGRAM, args, images, models, methods, AblationReport)
    with own_directory(args.output, PROGRAM) as folder:
        evaluation.run(folder, argv)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__)
    parser.add_argument("--model", nargs=1, default=[DEFAULT_MODEL], help="folder, Hub repository, or the bundled one")
    parser.add_argument("--tokens", type=positive_int, nargs="+", help="numbers of tokens; default: the model's")
    parser.add_argument(
        "--lambdas", type=non_negative_float, nargs="*", default=[0.0, 1.0, 2.5, 5.0], help="exponents of Eq. 4"
    )
    parser.add_argument(
        "--supports", type=positive_float, nargs="*", default=[1.0, 2.0, 3.0, 5.0], help="in standard deviations"
    )
    parser.add_argument("--min_region_sizes", type=positive_int, nargs="*", default=[4, 8, 16], help="s_min in pixels")
    add_options(parser, Path("out/ablate"))
    # What the shared code also knows.
    parser.set_defaults(baselines=["thumbnail"], focus=None, focus_weight=0.0, tile_size=None)
    args = parser.parse_args(argv)
    check_options(args)
    return args


# ------------------------------------------------------------------------------------------------------ variations


@contextmanager
def varied(model: GPSTokenModel, **changes: Any) -> Iterator[None]:
    """Change fields of the model's config for a while. They are read at every call."""
    before = {name: getattr(model.config, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(model.config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)


@torch.inference_mode()
def reconstruct_varied(
    model: GPSTokenModel, images: torch.Tensor, num_tokens: int, is_refined: bool = True, **changes: Any
) -> torch.Tensor:
    """Encode `(B, 3, H, W)` and decode it with fields of the config changed, clamped to [-1, 1].

    Without refinement the tokens keep their texture and get the Gaussians of their regions.
    """
    with varied(model, **changes):
        encoded = model.encode(images, num_tokens=num_tokens)
        tokens = encoded.tokens
        if not is_refined:
            tokens = torch.cat([encoded.layout.gaussians.to(tokens.dtype), tokens[..., 5:]], dim=-1)
        size = (images.shape[-2], images.shape[-1])
        return model.decode(tokens, size, attention_mask=encoded.attention_mask).sample.float().clamp(-1, 1)


def make_variations(candidates: Sequence[Candidate], args: argparse.Namespace) -> list[Method]:
    """The rows of all tables. Tables 6 and 7 take the number of tokens that is nearest to the model's own."""
    model: Any = candidates[0].model
    config = model.config
    own = min(candidates, key=lambda candidate: abs((candidate.tokens or 0) - config.num_tokens))
    rows: list[Method] = []

    def add(group: str, name: str, candidate: Candidate, **options: Any) -> None:
        count = candidate.tokens
        assert count is not None
        rows.append(
            Method(
                name,
                "model",
                lambda images, places: list(reconstruct_varied(model, images, count, **options)),
                candidate.floats,
                candidate.bits,
                candidate,
                group=group,
            )
        )

    add("parts", "equal regions, not refined", own, is_refined=False, complexity_exponent=UNIFORM)
    add("parts", "equal regions, refined", own, complexity_exponent=UNIFORM)
    add("parts", "regions by complexity, not refined", own, is_refined=False)
    add("parts", "regions by complexity, refined", own)
    for value in args.lambdas:
        add("lambda", f"lambda {value:g}", own, complexity_exponent=value)
    for value in args.supports:
        add("support", f"support {value:g}", own, splat_support=value)
    for value in args.min_region_sizes:
        if max_regions(args.resolution, args.resolution, value) >= (own.tokens or 0):
            add("s_min", f"s_min {value}", own, min_region_size=value)
    for candidate in candidates:
        add("tokens", f"{candidate.tokens} tokens", candidate)
    for candidate in candidates:
        add("uniform", f"{candidate.tokens} tokens, equal regions", candidate, complexity_exponent=UNIFORM)
    return rows


class AblationReport(ReconstructionReport):
    """A table for each thing that was varied, and the curves over tokens and floats."""

    title = "Ablation"
    picture_files = ("tokens.png", "curve.png", "examples.png")

    def tables(
        self, results: Sequence[dict[str, Any]], baselines: Sequence[dict[str, Any]], warnings: Sequence[str]
    ) -> list[Block]:
        """One table for each group."""
        blocks: list[Block] = []
        by_name = {entry["name"]: entry for entry in results}
        for group, title in GROUPS.items():
            names = [method.name for method in self.models if method.group == group]
            if not names:
                continue
            rest = baselines if group == "tokens" else ()
            made = super().tables([by_name[name] for name in names], rest, warnings if not blocks else ())
            blocks += [*(made[:1] if not blocks else ()), Heading(title), *made[1:]]
        return blocks

    def pictures(
        self,
        output: Path,
        results: Sequence[dict[str, Any]],
        baselines: Sequence[dict[str, Any]],
        rows: Sequence[dict[str, dict[str, Any]]],
    ) -> list[Block]:
        """The curves, and examples at all numbers of tokens."""
        points = {
            group: [
                (entry["tokens"], entry["floats"], entry["psnr"])
                for method, entry in zip(self.models, results)
                if method.group == group
            ]
            for group in ("tokens", "uniform")
        }
        labels = {"tokens": "regions by complexity", "uniform": "equal regions"}
        title = f"{len(self.images)} images, {self.args.resolution} x {self.args.resolution}"
        over_tokens = [Curve(labels[group], [(x, y) for x, _, y in found]) for group, found in points.items()]
        draw_curves(output / "tokens.png", over_tokens, "tokens", "PSNR (dB)", title, is_log=True)
        over_floats = [Curve(labels[group], [(x, y) for _, x, y in found]) for group, found in points.items()]
        thumbnails = [(entry["floats"], entry["psnr"]) for entry in baselines]
        over_floats.append(Curve("bicubic thumbnail", thumbnails, "s--"))
        draw_curves(output / "curve.png", over_floats, "floats per image", "PSNR (dB)", title, is_log=True)
        shown = [method for method in self.models if method.group in ("parts", "tokens")]
        self.draw_examples(output / "examples.png", shown)
        return [
            Heading("Pictures"),
            Picture("tokens.png", "PSNR over the number of tokens."),
            Picture("curve.png", "PSNR over the number of floats, beside the thumbnail of as many."),
            Picture("examples.png", "The first images with parts taken away, and at every number of tokens."),
        ]


if __name__ == "__main__":
    raise SystemExit(run_program(main))
