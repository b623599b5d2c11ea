# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Make gpstoken-digits, the pipeline that ships with the package: data, training, evaluation, model card.

    python -m training.make_digits --work_dir runs/digits --output_dir src/gpstoken_hf/bundled/gpstoken-digits

The data is scikit-learn's `load_digits`, upscaled to 32 x 32, white on black. A step whose result exists is skipped
and an interrupted one resumes, so the same command can be given again.

Shapes: N images or samples, M references, D values of a vector.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor
from gpstoken_hf.metrics import psnr
from gpstoken_hf.model_cards import Score, front_matter
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline
from gpstoken_hf.transformer_sit import SiTTransformer1DModel
from pipelines.shared.outputs import atomic_directory, atomic_file, check_free
from pipelines.shared.programs import non_negative_float, non_negative_int, run_program
from pipelines.shared.programs import positive_int as positive
from training.checkpoints import checkpoints_of, read_run_state
from training.digits import (
    CLASS_NAMES,
    NUM_CLASSES,
    NUM_IMAGES,
    NUM_TEST_IMAGES,
    downscale,
    evaluate,
    fit_classifier,
    save_sheet,
    split_digits,
)
from training.experiments import run_steps
from training.options import unit_interval
from training.run_folder import claimed_folder
from training.token_cache import STATISTICS

PROGRAM = "training.make_digits"
OUTPUTS = ("data/*.parquet", "results.json", "samples-*", "training-images.png", *("tokenizer", "tokens"))
STAGES = ("layout", "texture", "one-stage")
PRESETS = Path(__file__).parent / "presets"


def make_parser() -> argparse.ArgumentParser:
    """The parser of this program."""
    parser = argparse.ArgumentParser(prog="make_digits", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--work_dir", type=Path, required=True, help="data, checkpoints and pictures")
    parser.add_argument("--output_dir", type=Path, required=True, help="the finished pipeline")
    parser.add_argument("--tokenizer_steps", type=positive, help="default: the preset's")
    parser.add_argument("--generator_steps", type=positive, help="of each of the three; default: the preset's")
    parser.add_argument("--samples_per_class", type=positive, default=50)
    parser.add_argument("--num_inference_steps", type=positive, default=50)
    parser.add_argument("--num_layout_steps", type=positive, default=5)
    parser.add_argument("--guidance_scale", type=non_negative_float, default=1.5)
    parser.add_argument("--guidance_interval", type=unit_interval, nargs=2, default=(0.2, 1.0))
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--sampling_seed", type=non_negative_int, help="of the measured samples; default: --seed")
    parser.add_argument("--threads", type=positive, help="number of CPU threads; default: torch's choice")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a pipeline that this program has written to --output_dir"
    )
    return parser


# ------------------------------------------------------------------------------------------------------------ data


def write_parquet(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Write a dataset file with the columns image (PNG) and label (named classes)."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))})
    rows = []
    for image, label in zip(images, labels):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": int(label)})
    with atomic_file(path) as staging:
        datasets.Dataset.from_list(rows, features=features).to_parquet(staging)


# -------------------------------------------------------------------------------------------------------- training


def train(options: argparse.Namespace) -> int:
    """Train tokenizer and generators; returns the exit code of the first step that did not finish, or 0."""
    work = options.work_dir
    for name, (images, labels) in split_digits(options.seed).items():
        if not (path := work / "data" / f"{name}.parquet").exists():
            write_parquet(images, labels, path)
    shared = ["--seed", str(options.seed)]
    if options.threads is not None:
        shared += ["--threads", str(options.threads)]
    steps: list[tuple[Path, str, list[str]]] = []

    command = ["--config", str(PRESETS / "digits_tokenizer.yaml"), "--output_dir", str(work / "tokenizer"), *shared]
    command += ["--train_data_files", str(work / "data" / "train.parquet")]
    command += ["--validation_data_files", str(work / "data" / "test.parquet")]
    if options.tokenizer_steps is not None:
        command += ["--max_train_steps", str(options.tokenizer_steps)]
    steps.append((work / "tokenizer" / "model", "train_tokenizer", command))

    command = ["--tokenizer", str(work / "tokenizer" / "model"), "--output_dir", str(work / "tokens")]
    command += ["--train_data_files", str(work / "data" / "train.parquet"), "--dataloader_num_workers", "0"]
    steps.append((work / "tokens" / STATISTICS, "cache_tokens", command))

    for stage in STAGES:
        command = ["--config", str(PRESETS / "digits_sit.yaml"), "--output_dir", str(work / stage), *shared]
        command += ["--stage", stage, "--tokens_dir", str(work / "tokens")]
        if options.generator_steps is not None:
            command += ["--max_train_steps", str(options.generator_steps)]
        steps.append((work / stage / "model", "train_sit", command))

    for result, program, command in steps:
        if not result.exists() and (code := run_steps([(f"training.{program}", command)])):
            return code
    return 0


def training_minutes(work: Path) -> dict[str, float]:
    """Duration of each training, interruptions not counted."""
    minutes = {}
    for name in ("tokenizer", *STAGES):
        state = read_run_state(checkpoints_of(work / name)[-1])
        minutes[name] = round(state["elapsed_seconds"] / 60, 1)
    return minutes


# -------------------------------------------------------------------------------------------------------- pipelines


def make_pipelines(work: Path) -> dict[str, GPSTokenPipeline]:
    """The two-stage pipeline and the one-stage baseline of the trained models."""
    statistics = json.loads((work / "tokens" / STATISTICS).read_text(encoding="utf-8"))
    vae = GPSTokenModel.from_pretrained(work / "tokenizer" / "model").eval()
    vae.config.latents_mean = statistics["channels"]["offset"]["mean"]
    vae.config.latents_std = statistics["channels"]["offset"]["std"]
    generators = {stage: SiTTransformer1DModel.from_pretrained(work / stage / "model").eval() for stage in STAGES}
    id2label = dict(enumerate(f"{name}, {digit}" for digit, name in enumerate(CLASS_NAMES)))
    shared = {"vae": vae, "image_processor": GPSTokenImageProcessor(), "id2label": id2label}
    return {
        "two-stage": GPSTokenPipeline(
            transformer=generators["texture"],
            scheduler=FlowMatchEulerDiscreteScheduler(),
            layout_transformer=generators["layout"],
            layout_scheduler=FlowMatchEulerDiscreteScheduler(),
            **shared,
        ),
        "one-stage": GPSTokenPipeline(
            transformer=generators["one-stage"], scheduler=FlowMatchEulerDiscreteScheduler(), **shared
        ),
    }


def forget_origin(directory: Path) -> None:
    """Remove from the configurations the folders that the components were loaded from."""
    for path in directory.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def store_as_half(directory: Path) -> None:
    """Rewrite all weights below a folder in float16. The configurations stay, so they are loaded in float32."""
    for path in directory.rglob("*.safetensors"):
        tensors = {
            name: value.half() if value.is_floating_point() else value for name, value in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
        shutil.copymode(directory / "model_index.json", path)  # safetensors makes it readable for its owner only


def sample(pipeline: GPSTokenPipeline, options: argparse.Namespace, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Samples, class by class: uint8 images (N, 32, 32, 3) and the labels (N,) that they were generated for."""
    images = []
    seed = options.seed if options.sampling_seed is None else options.sampling_seed
    pipeline.set_progress_bar_config(disable=True)
    for label in tqdm(range(NUM_CLASSES), desc=f"sampling {name}", unit="class", mininterval=5):
        generator = torch.Generator().manual_seed(seed * 1000 + label)
        batch = pipeline(
            [label] * options.samples_per_class,
            num_inference_steps=options.num_inference_steps,
            num_layout_steps=options.num_layout_steps,
            guidance_scale=options.guidance_scale,
            guidance_interval=tuple(options.guidance_interval),
            generator=generator,
        ).images
        images += [np.asarray(image) for image in batch]
    return np.stack(images), np.repeat(np.arange(NUM_CLASSES), options.samples_per_class)


# -------------------------------------------------------------------------------------------------------- evaluation


def measure(options: argparse.Namespace, pipelines: dict[str, GPSTokenPipeline]) -> dict[str, Any]:
    """All numbers of the model card. Writes the samples and their contact sheets into the work folder."""
    data = split_digits(options.seed)
    train_images, train_labels = data["train"]
    test_images, test_labels = data["test"]
    classifier = fit_classifier(train_images, train_labels)
    results: dict[str, Any] = {"held-out digits": evaluate(classifier, test_images, test_labels, train_images)}

    vae = pipelines["two-stage"].vae
    pixels = torch.from_numpy(test_images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        reconstructions = torch.cat([vae(part).sample.clamp(-1, 1) for part in pixels.split(60)])
    results["tokenizer"] = {
        "psnr": psnr(reconstructions, pixels).mean().item(),
        "accuracy": float((classifier.predict(downscale(_to_bytes(reconstructions))) == test_labels).mean()),
    }
    for name, pipeline in pipelines.items():
        images, labels = sample(pipeline, options, name)
        results[name] = evaluate(classifier, images, labels, train_images)
        results[name]["parameters"] = sum(
            parameter.numel()
            for part in (pipeline.transformer, pipeline.layout_transformer)
            if part is not None
            for parameter in part.parameters()
        )
        np.savez_compressed(options.work_dir / f"samples-{name}.npz", images=images, labels=labels)
        save_sheet(images, options.samples_per_class, options.work_dir / f"samples-{name}.png")
    save_sheet(
        np.concatenate([train_images[train_labels == digit][:20] for digit in range(NUM_CLASSES)]),
        20,
        options.work_dir / "training-images.png",
    )
    with atomic_file(options.work_dir / "results.json") as staging:
        staging.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def _to_bytes(images: torch.Tensor) -> np.ndarray:
    return ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def model_card(options: argparse.Namespace, results: dict[str, Any], minutes: dict[str, float], command: str) -> str:
    """README.md of the pipeline."""
    two, one, real = results["two-stage"], results["one-stage"], results["held-out digits"]

    def row(name: str, values: dict[str, Any]) -> str:
        recognised = f"{100 * values['accuracy']:.1f} %"
        distances = (values[f"nearest_distance_{part}"] for part in ("min", "5_percent", "median"))
        frechet = f"{values['frechet_distance']:.1f}"
        return f"| {name} | {recognised} | {frechet} | " + " | ".join(f"{value:.1f}" for value in distances) + " |"

    per_class = ", ".join(f"{digit}: {100 * value:.0f} %" for digit, value in enumerate(two["accuracy_per_class"]))
    low, high = options.guidance_interval
    sizes = {name: f"{results[name]['parameters'] / 1e6:.2f}" for name in ("two-stage", "one-stage")}
    timing = ", ".join(f"{name} {value} min" for name, value in minutes.items())
    digits, samples = "scikit-learn load_digits", f"{options.samples_per_class} samples per class"
    scores = [
        Score("accuracy", round(two["accuracy"], 3), digits, f"recognised share of {samples}"),
        Score("Frechet distance", round(two["frechet_distance"], 1), digits, f"8 x 8 pixels, {samples}"),
        Score("PSNR", round(results["tokenizer"]["psnr"], 1), digits, "dB, reconstructions of held-out digits"),
    ]
    task = "unconditional-image-generation"
    return f"""{front_matter("diffusers", ["class-conditional"], task, "apache-2.0", "gpstoken-digits", scores)}
# gpstoken-digits

A tiny `GPSTokenPipeline` that generates handwritten digits of 32 x 32 pixels: class label -> layout of 16 Gaussians ->
calibration -> texture -> image. It shows the two-stage generation of GPSToken (arXiv 2509.01109) at a size that anyone
can train on a CPU. The tests and the demo run it.

![Twenty samples of every class](samples.png)

```python
from gpstoken_hf import GPSTokenPipeline, bundled

pipe = GPSTokenPipeline.from_pretrained(bundled("gpstoken-digits"))
images = pipe(["three", 7], num_inference_steps={options.num_inference_steps}).images
```

## Training

Data: scikit-learn's `load_digits` (UCI optical recognition of handwritten digits), white on black, enlarged from 8 x 8
to 32 x 32 pixels by a bicubic filter. {NUM_IMAGES - NUM_TEST_IMAGES} images are for training, {NUM_TEST_IMAGES} are \
held out. No other data was used.

```
{command}
```

Wall time on one thread of a CPU: {timing}. The two generators of this pipeline have {sizes["two-stage"]} M parameters,
the one-stage baseline has {sizes["one-stage"]} M.

## Results

The tokenizer reconstructs the held-out digits at a PSNR of {results["tokenizer"]["psnr"]:.1f} dB. The classifier below
recognises {100 * results["tokenizer"]["accuracy"]:.1f} % of the reconstructions.

Generation: {options.samples_per_class} samples per class, Euler with {options.num_inference_steps} steps and \
{options.num_layout_steps} for the layout, guidance {options.guidance_scale:g} in the interval {low:g} to {high:g}.
All layouts are generated.

- Recognised: the share of images that a support vector machine, trained on the real training digits, assigns to the
  class that was asked for.
- Fréchet: the distance between normal distributions fitted to the images and to the training images. It depends on the
  number of images ({NUM_TEST_IMAGES} held out, {NUM_CLASSES * options.samples_per_class} generated).
- Nearest: the Euclidean distance from an image to the nearest training image. A copy would have distance 0.

All three are computed on 8 x 8 pixels from 0 to 16.

| | recognised | Fréchet | nearest, min | nearest, 5 % | nearest, median |
|---|---|---|---|---|---|
{row("real, held out", real)}
{row("two-stage (this pipeline)", two)}
{row("one-stage baseline", one)}

Per class, two-stage: {per_class}.

The one-stage baseline generates all 13 channels of the tokens at once. Its network has the size and the training of
one of the two generators here. It is not part of this folder.

## Limits

There are few training images and ten classes. Guidance makes the classes clear and narrows their variety.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.output_dir.exists() and any(options.output_dir.iterdir()) and not options.overwrite:
        print(f"{options.output_dir} exists; --overwrite makes it again", file=sys.stderr)
        return 0
    check_free(options.output_dir, overwrite=True, program=PROGRAM)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with claimed_folder(options.work_dir, PROGRAM, OUTPUTS):
        if code := train(options):
            return code
        with atomic_directory(options.output_dir, overwrite=True, program=PROGRAM) as staging:
            pipelines = make_pipelines(options.work_dir)
            pipelines["two-stage"].save_pretrained(staging)
            store_as_half(staging)
            forget_origin(staging)
            # Measure what ships.
            pipelines["two-stage"] = GPSTokenPipeline.from_pretrained(staging)
            results = measure(options, pipelines)
            command = "python -m training.make_digits " + shlex.join(
                word for word in argv or sys.argv[1:] if word != "--overwrite"
            )
            card = model_card(options, results, training_minutes(options.work_dir), command)
            shutil.copyfile(options.work_dir / "samples-two-stage.png", staging / "samples.png")
            (staging / "README.md").write_text(card, encoding="utf-8")
            size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    for name in ("held-out digits", "two-stage", "one-stage"):
        values = results[name]
        print(
            f"{name}: {100 * values['accuracy']:.1f} % recognised, distance to the nearest training image "
            f"{values['nearest_distance_median']:.1f} (median), {values['nearest_distance_min']:.1f} (minimum)"
        )
    print(f"{options.output_dir}: {size / 1e6:.1f} MB; contact sheets in {options.work_dir}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
