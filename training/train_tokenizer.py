# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Train a GPSToken tokenizer on any image dataset.

    python -m training.train_tokenizer --config training/presets/nano.yaml --train_data_files images.parquet \\
        --output_dir runs/nano

The workers of the loader crop and partition the images. With `--min_tokens` and `--max_tokens` the number of tokens
varies, with `--resolutions` every batch has its own size, so that one checkpoint serves all of them.

The loss is the sum of absolute and squared errors, LPIPS, the distance of a frozen network's pooled features and an
adversarial term (PatchGAN). Each has its weight, and all but the first two start at a step of their own. When the
adversarial term has started, steps of discriminator and tokenizer alternate.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.shared.programs import ProgramError, run_program
from training.estimates import tokenizer_estimate
from training.loop import run_training
from training.options import check_run_options, describe_options, parse_options
from training.tokenizer_task import Sizes, TokenizerTask, make_parser, resolve_config

PROGRAM = "training.train_tokenizer"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_options(make_parser(), argv)
    check_run_options(options)
    if not options.l1_weight and not options.mse_weight:
        raise ProgramError("--l1_weight or --mse_weight must be > 0, got 0 and 0")
    config = resolve_config(options)
    sizes = Sizes.of(options, config)
    if options.dry_run:
        estimate = tokenizer_estimate(options, config, max(sizes.resolutions))
        print(describe_options(options, model_config=config.to_diff_dict(), estimate=estimate), end="")
        return 0
    return run_training(options, lambda accelerator: TokenizerTask(options, config, accelerator), PROGRAM)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
