# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Photographs -> Gaussian tokens -> photographs, with pictures of what the tokens do.

    python -m pipelines.reconstruct photo.jpg more.png folder/ --tokens 256 --output out/
    python -m pipelines.reconstruct photo.jpg --focus 120,40,260,200 --output out/
    python -m pipelines.reconstruct --from_tokens out/photo/tokens.safetensors --output out/

Without an image it takes four sample photographs that scikit-image ships with. Every image gets a folder of its own:

    reconstruction.png          what the decoder makes of the tokens
    initial_gaussians.png       the Gaussians of the regions, one sigma, over the image
    refined_gaussians.png       the same after refinement by the encoder
    error.png                   where the reconstruction errs, in 8-bit levels
    panel.png                   all of these side by side
    tokens.safetensors          tokens, initial Gaussians and regions; --from_tokens decodes them again
    scores.json                 PSNR, SSIM, tokens, floats and the settings

A folder appears only when it is complete. Running the same command again goes on where it was stopped: images that
are done are named and skipped, and outputs of other settings are an error unless --overwrite replaces them. The exit
code is 0 when every image was reconstructed and 2 when at least one could not be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import gpstoken_hf
from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor, open_image
from gpstoken_hf.metrics import SSIM_WINDOW, psnr, ssim
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.visualization import contact_sheet, draw_boxes, draw_error_map, draw_gaussians, panel, tensor_to_pil
from pipelines.shared.programs import (
    EXIT_BAD_INPUT,
    atomic_directory,
    atomic_file,
    make_parser,
    non_negative_float,
    non_negative_int,
    one_line,
    positive_int,
    run_program,
)

DEFAULT_MODEL = "gpstoken-nano"
SAMPLES = ("astronaut", "chelsea", "coffee", "rocket")
TOKENS_FILE, SCORES_FILE = "tokens.safetensors", "scores.json"
DRAWN_SIDE = 512  # small images are drawn enlarged, to about this many pixels
MAX_PANELS_IN_OVERVIEW = 16

Box = tuple[int, int, int, int]


@dataclass
class Source:
    """One image to reconstruct: where it comes from and the folder, under the output, that its results go to."""

    label: str
    folder: str
    read: Callable[[], PIL.Image.Image]
    digest: Callable[[], str]


@dataclass
class Photograph:
    """An image as the model takes it, and how it was reduced from the original."""

    pixel_values: torch.Tensor  # (1, 3, H, W)
    original_size: tuple[int, int]  # (H, W)

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.pixel_values.shape[-2:]
        return height, width


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    if args.from_tokens:
        if args.images or args.focus or args.importance or args.tokens:
            raise ValueError(
                "--from_tokens decodes what is stored: expected no images, --tokens, --focus, --importance"
            )
        return _decode_files(args)

    sources = collect_sources(args.images)
    settings = {
        "version": gpstoken_hf.__version__,
        "model": args.model,
        "tokens": args.tokens,
        "focus": args.focus,
        "focus_weight": args.focus_weight,
        "importance": args.importance and _digest(Path(args.importance)),
        "tile_size": args.tile_size,
        "max_side": args.max_side,
    }
    mask = None if args.importance is None else read_mask(args.importance)
    model = load_model(args.model, args.device)
    settings["weights"] = weights_digest(model)

    failures: list[str] = []
    scores: dict[str, dict[str, Any]] = {}
    for source in _progress(sources, "images"):
        try:
            scores[source.label] = _reconstruct_source(model, source, mask, settings, args)
        except (ValueError, OSError) as error:
            failures.append(source.label)
            tqdm.write(f"error: {source.label}: {one_line(error)}", file=sys.stderr)
    if len(scores) > 1:
        _write_overview(args.output, [args.output / source.folder for source in sources if source.label in scores])
        print(
            f"{len(scores)} images: mean PSNR {_mean(scores, 'psnr'):.2f} dB, mean SSIM {_mean(scores, 'ssim'):.4f}, "
            f"see {args.output / 'overview.png'}"
        )
    if failures and len(sources) > 1:
        print(f"{len(failures)} of {len(sources)} images not reconstructed: {', '.join(failures)}", file=sys.stderr)
    return EXIT_BAD_INPUT if failures else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("pipelines.reconstruct", __doc__)
    parser.add_argument("images", nargs="*", type=Path, help="image files and folders of them (searched recursively)")
    parser.add_argument(
        "--tokens", type=positive_int, help="tokens of an image; default: as many per pixel as in the model's training"
    )
    parser.add_argument(
        "--focus",
        type=parse_box,
        action="append",
        default=[],
        metavar="x0,y0,x1,y1",
        help="more tokens in this box of the original image, inclusive pixels; may be repeated",
    )
    parser.add_argument("--importance", metavar="MASK", help="image of the size of the photograph: white, more tokens")
    parser.add_argument(
        "--focus_weight",
        type=non_negative_float,
        default=30.0,
        help="importance per pixel of a focus box or a white mask; much more splits its flat parts, too",
    )
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"folder or Hub repository; default: the bundled {DEFAULT_MODEL}"
    )
    parser.add_argument("--tile_size", type=positive_int, help="encode and decode in tiles of this side, in pixels")
    parser.add_argument(
        "--max_side", type=non_negative_int, default=640, help="reduce larger images to this side; 0: keep every size"
    )
    parser.add_argument(
        "--from_tokens", type=Path, nargs="+", metavar=TOKENS_FILE, help="decode stored tokens; needs no image"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--overwrite", action="store_true", help="make outputs anew that are there already")
    return parser.parse_args(argv)


def parse_box(text: str) -> Box:
    """An argparse type: `x0,y0,x1,y1`, inclusive pixels."""
    try:
        x0, y0, x1, y1 = (int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected four integers x0,y0,x1,y1, got {text!r}") from None
    if not (0 <= x0 <= x1 and 0 <= y0 <= y1):
        raise argparse.ArgumentTypeError(f"expected 0 <= x0 <= x1 and 0 <= y0 <= y1, got {text!r}")
    return x0, y0, x1, y1


# ---------------------------------------------------------------------------------------------------------- inputs


def collect_sources(paths: Sequence[Path]) -> list[Source]:
    """Files, and the images of folders in alphabetical order -> sources, each with an output folder of its own.

    Raises:
        ValueError: a path does not exist, or a folder holds no image.
    """
    if not paths:
        return [_sample(name) for name in SAMPLES]
    found: list[tuple[Path, Path]] = []  # the file, and its name within what was asked for
    for path in paths:
        if path.is_dir():
            known = PIL.Image.registered_extensions()
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in known and file.is_file())
            if not files:
                raise ValueError(f"expected images in the folder {path}, found none")
            found += [(file, file.relative_to(path)) for file in files]
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise ValueError(f"expected an image file or a folder, found no such file: {path}")
    stems = [name.with_suffix("").as_posix() for _, name in found]
    # photo.jpg and photo.png would share a folder: these go by their full names, numbered where even those are equal.
    folders = [stem if stems.count(stem) == 1 else name.as_posix() for stem, (_, name) in zip(stems, found)]
    counts: dict[str, int] = {}
    sources = []
    for (file, _), folder in zip(found, folders):
        counts[folder] = counts.get(folder, 0) + 1
        unique = folder if counts[folder] == 1 else f"{folder}-{counts[folder]}"
        sources.append(Source(str(file), unique, partial(open_image, file), partial(_digest, file)))
    return sources


def _sample(name: str) -> Source:
    def read() -> PIL.Image.Image:
        try:
            import skimage.data
        except ImportError as error:
            raise ValueError(
                "the sample photographs come with scikit-image: pip install gpstoken-hf[demo], or name an image file"
            ) from error
        return PIL.Image.fromarray(getattr(skimage.data, name)())

    return Source(f"sample {name}", name, read, lambda: f"skimage.data.{name}")


def read_photograph(image: PIL.Image.Image, max_side: int) -> Photograph:
    """An image of any mode -> `pixel_values`, reduced until its longer side is `max_side` (0: never)."""
    original = (image.height, image.width)
    processor = GPSTokenImageProcessor()
    reduced = reduced_size(original, max_side)
    resize = {} if reduced == original else {"do_resize": True, "size": {"height": reduced[0], "width": reduced[1]}}
    return Photograph(processor(image, return_tensors="pt", **resize).pixel_values, original)


def reduced_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(H, W) with the longer side at most `max_side`, the shape kept; 0 keeps everything."""
    longest = max(size)
    if not max_side or longest <= max_side:
        return size
    height, width = (max(1, round(side * max_side / longest)) for side in size)
    return height, width


def read_mask(path: str) -> torch.Tensor:
    """A mask image -> (1, H, W) in [0, 1], the mean of its channels."""
    mask = GPSTokenImageProcessor(do_normalize=False)(open_image(path), return_tensors="pt").pixel_values
    return mask.mean(dim=1)


def importance_map(
    photograph: Photograph, mask: torch.Tensor | None, boxes: Sequence[Box], weight: float
) -> torch.Tensor | None:
    """Mask and boxes, in pixels of the original -> (1, H, W) importance of the image as the model takes it.

    Raises:
        ValueError: the mask has another size than the original, or a box reaches beyond it.
    """
    height, width = photograph.original_size
    total = torch.zeros(1, height, width)
    if mask is not None:
        if mask.shape != total.shape:
            raise ValueError(
                f"expected an importance mask of the image's {width} x {height} pixels, "
                f"got {mask.shape[2]} x {mask.shape[1]}"
            )
        total += weight * mask
    for x0, y0, x1, y1 in boxes:
        if x1 >= width or y1 >= height:
            raise ValueError(
                f"expected a focus box inside the image's {width} x {height} pixels, got {x0},{y0},{x1},{y1}"
            )
        total[:, y0 : y1 + 1, x0 : x1 + 1] += weight
    if mask is None and not boxes:
        return None
    if photograph.size != photograph.original_size:
        total = torch.nn.functional.interpolate(total[None], photograph.size, mode="area")[0]
    return total


# -------------------------------------------------------------------------------------------------- reconstruction


def load_model(name: str, device: str) -> GPSTokenModel:
    """A folder, a Hub repository or the bundled checkpoint -> the model, ready to run.

    Raises:
        ValueError: there is no such checkpoint, or its weights are not those of the model.
    """
    if not Path(name).is_dir() and name != DEFAULT_MODEL and name.count("/") != 1:
        raise ValueError(f"expected {DEFAULT_MODEL}, a checkpoint folder or a Hub repository owner/name, got {name}")
    path = gpstoken_hf.bundled(name) if name == DEFAULT_MODEL and not Path(name).is_dir() else name
    with _quiet_loading():
        model = GPSTokenModel.from_pretrained(path)
    return model.eval().to(device)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No bar and no table of keys from transformers: what is wrong with a checkpoint is said in one line."""
    shows_bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bar:
            transformers_logging.enable_progress_bar()


def default_num_tokens(model: GPSTokenModel, size: tuple[int, int]) -> int:
    """As many tokens per pixel as in training."""
    return max(1, round(model.config.num_tokens * size[0] * size[1] / model.config.image_size**2))


def _reconstruct_source(
    model: GPSTokenModel, source: Source, mask: torch.Tensor | None, settings: dict, args: argparse.Namespace
) -> dict[str, Any]:
    folder = args.output / source.folder
    settings = {**settings, "source": source.digest()}
    if not args.overwrite and (folder / SCORES_FILE).exists():
        known = json.loads((folder / SCORES_FILE).read_text())
        if known.get("settings") != json.loads(json.dumps(settings)):
            raise ValueError(f"{folder} holds the outputs of other settings; choose another --output, or --overwrite")
        tqdm.write(f"{source.label}: done before, skipped (--overwrite makes it anew): {folder}")
        return known

    photograph = read_photograph(source.read(), args.max_side)
    if photograph.size != photograph.original_size:
        (old_h, old_w), (new_h, new_w) = photograph.original_size, photograph.size
        tqdm.write(f"{source.label}: reduced from {old_w} x {old_h} to {new_w} x {new_h} (--max_side {args.max_side})")
    importance = importance_map(photograph, mask, args.focus, args.focus_weight)
    num_tokens = args.tokens or default_num_tokens(model, photograph.size)
    pixel_values = photograph.pixel_values.to(model.device)
    with torch.inference_mode():
        encoded = model.encode(
            pixel_values,
            num_tokens=num_tokens,
            importance=None if importance is None else importance.to(model.device),
            tile_size=args.tile_size,
        )
        sample = model.decode(
            encoded.tokens, photograph.size, attention_mask=encoded.attention_mask, tile_size=args.tile_size
        ).sample
    reconstruction = sample.float().clamp(-1, 1)
    scores = _scores(pixel_values, reconstruction, encoded)
    boxes = [_scaled_box(box, photograph) for box in args.focus]
    if boxes:
        scores["psnr_in_focus"] = [
            psnr(pixel_values[..., y0 : y1 + 1, x0 : x1 + 1], reconstruction[..., y0 : y1 + 1, x0 : x1 + 1]).item()
            for x0, y0, x1, y1 in boxes
        ]
    with atomic_directory(folder, overwrite=args.overwrite) as staging:
        images = pixel_values[0].cpu(), reconstruction[0].cpu()
        _write_pictures(staging, source.folder, *images, encoded, scores, boxes)
        save_tokens(staging / TOKENS_FILE, encoded, photograph.size, args.tile_size, args.model)
        (staging / SCORES_FILE).write_text(json.dumps({**scores, "settings": settings}, indent=2) + "\n")
    tqdm.write(f"{source.label}: {_in_words(scores)} -> {folder}")
    return scores


def _scores(pixel_values: torch.Tensor, reconstruction: torch.Tensor, encoded: Any) -> dict[str, Any]:
    height, width = pixel_values.shape[-2:]
    num_tokens = int(encoded.attention_mask.sum())
    large_enough = min(height, width) >= SSIM_WINDOW
    return {
        "width": width,
        "height": height,
        "tokens": num_tokens,
        "floats": num_tokens * encoded.tokens.shape[-1],
        "psnr": psnr(reconstruction, pixel_values).item(),
        "ssim": ssim(reconstruction, pixel_values).item() if large_enough else None,
    }


def _in_words(scores: dict[str, Any]) -> str:
    share = scores["floats"] / (3 * scores["width"] * scores["height"])
    words = [
        f"{scores['width']} x {scores['height']}",
        f"PSNR {scores['psnr']:.2f} dB",
        "SSIM -" if scores["ssim"] is None else f"SSIM {scores['ssim']:.4f}",
        f"{scores['tokens']} tokens",
        f"{scores['floats']} floats ({share:.1%} of the image's)",
    ]
    words += [f"PSNR in focus {value:.2f} dB" for value in scores.get("psnr_in_focus", [])]
    return ", ".join(words)


def _scaled_box(box: Box, photograph: Photograph) -> Box:
    """A box in pixels of the original -> the pixels of the image as the model takes it that it touches."""
    scale_y, scale_x = (new / old for new, old in zip(photograph.size, photograph.original_size))
    x0, y0, x1, y1 = box
    right, bottom = math.ceil((x1 + 1) * scale_x) - 1, math.ceil((y1 + 1) * scale_y) - 1
    return int(x0 * scale_x), int(y0 * scale_y), right, bottom


# --------------------------------------------------------------------------------------------------------- outputs


def _write_pictures(
    folder: Path,
    name: str,
    image: torch.Tensor,
    reconstruction: torch.Tensor,
    encoded: Any,
    scores: dict[str, Any],
    focus: Sequence[Box],
) -> None:
    original, decoded = tensor_to_pil(image), tensor_to_pil(reconstruction)
    zoom = max(1, round(DRAWN_SIDE / max(original.size)))
    mask = encoded.attention_mask[0].cpu()
    initial = draw_gaussians(original, encoded.layout.gaussians[0].cpu(), mask, zoom=zoom)
    refined = draw_gaussians(original, encoded.tokens[0, :, :5].cpu(), mask, zoom=zoom)
    error = draw_error_map(image, reconstruction, zoom=zoom)
    decoded.save(folder / "reconstruction.png")
    initial.save(folder / "initial_gaussians.png")
    refined.save(folder / "refined_gaussians.png")
    error.save(folder / "error.png")
    shown = draw_boxes(original, torch.tensor(focus), zoom=zoom) if focus else _enlarged(original, zoom)
    pictures = [shown, initial, refined, _enlarged(decoded, zoom), error]
    titles = [
        "image and its focus" if focus else "image",
        "initial Gaussians",
        "refined Gaussians",
        "reconstruction",
        "error (8-bit levels)",
    ]
    panel(pictures, titles, footer=f"{name}: {_in_words(scores)}").save(folder / "panel.png")


def _enlarged(picture: PIL.Image.Image, zoom: int) -> PIL.Image.Image:
    return picture.resize((picture.width * zoom, picture.height * zoom), PIL.Image.Resampling.NEAREST)


def _write_overview(output: Path, folders: Sequence[Path]) -> None:
    panels = []
    for folder in folders[:MAX_PANELS_IN_OVERVIEW]:
        with PIL.Image.open(folder / "panel.png") as picture:
            picture.thumbnail((1600, 1600))
            panels.append(picture.copy())
    with atomic_file(output / "overview.png") as staging:
        contact_sheet(panels, columns=1).save(staging)


def save_tokens(path: Path, encoded: Any, size: tuple[int, int], tile_size: int | None, model: str) -> None:
    """Writes what `load_tokens` reads: tokens, where they came from, and the size to decode to."""
    tensors = {
        "tokens": encoded.tokens.float(),
        "init_gaussians": encoded.layout.gaussians.float(),
        "boxes": encoded.layout.boxes,
        "attention_mask": encoded.attention_mask,
    }
    metadata = {
        "format": "gpstoken_hf tokens",
        "height": str(size[0]),
        "width": str(size[1]),
        "tile_size": "" if tile_size is None else str(tile_size),
        "model": model,
    }
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


@dataclass
class StoredTokens:
    """Tokens of one image and how to decode them."""

    tokens: torch.Tensor  # (1, L, 5 + C)
    attention_mask: torch.Tensor  # (1, L)
    size: tuple[int, int]  # (H, W)
    tile_size: int | None


def load_tokens(path: Path) -> StoredTokens:
    """Reads a file of `save_tokens`.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"expected a file of tokens, found no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tokens, attention_mask = file.get_tensor("tokens"), file.get_tensor("attention_mask")
        size = int(metadata["height"]), int(metadata["width"])
        tile_size = int(metadata["tile_size"]) if metadata["tile_size"] else None
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"expected tokens as this program writes them, cannot read {path}: {error}") from error
    return StoredTokens(tokens, attention_mask, size, tile_size)


def _decode_files(args: argparse.Namespace) -> int:
    model = load_model(args.model, args.device)
    failures = 0
    for path in _progress(args.from_tokens, "files"):
        try:
            stored = load_tokens(path)
            with torch.inference_mode():
                sample = model.decode(
                    stored.tokens.to(model.device),
                    stored.size,
                    attention_mask=stored.attention_mask.to(model.device),
                    tile_size=stored.tile_size,
                ).sample
            decoded = tensor_to_pil(sample[0].float())
            name = path.parent.resolve().name if path.name == TOKENS_FILE else path.stem
            folder = args.output / f"{name}-from-tokens"
            zoom = max(1, round(DRAWN_SIDE / max(decoded.size)))
            with atomic_directory(folder, overwrite=args.overwrite) as staging:
                decoded.save(staging / "reconstruction.png")
                drawn = draw_gaussians(decoded, stored.tokens[0, :, :5], stored.attention_mask[0], zoom=zoom)
                drawn.save(staging / "refined_gaussians.png")
            count = int(stored.attention_mask.sum())
            height, width = stored.size
            floats = count * stored.tokens.shape[-1]
            tqdm.write(f"{path}: {width} x {height}, {count} tokens, {floats} floats -> {folder}")
        except (ValueError, OSError) as error:
            failures += 1
            tqdm.write(f"error: {path}: {one_line(error)}", file=sys.stderr)
    return EXIT_BAD_INPUT if failures else 0


# ---------------------------------------------------------------------------------------------------- small helpers


def weights_digest(model: torch.nn.Module) -> str:
    """A fingerprint of all weights, so that a changed checkpoint is not taken for the one used before."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _progress(items: Sequence[Any], unit: str) -> Iterator[Any]:
    # disable=None: no bar where standard error is not a terminal
    return iter(tqdm(items, unit=f" {unit}", disable=True if len(items) == 1 else None))


def _mean(scores: dict[str, dict[str, Any]], key: str) -> float:
    values = [entry[key] for entry in scores.values() if entry[key] is not None]
    return sum(values) / len(values) if values else math.nan


if __name__ == "__main__":
    sys.exit(run_program(main))
