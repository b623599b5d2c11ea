# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What the page of `demo` computes and what it keeps for each visitor, without the page itself.

A visitor has a `Photo` in the first tab and a `Draft` in the second. Every function that changes one returns a patch:
a dict of JSON values that the page merges into what it shows. Pictures are PNG files in `data:` addresses, so none of
them is ever a file that another visitor could ask for.

Shapes: L tokens, C texture channels, H x W pixels of an image, h x w pixels of a painted mask.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import torch
from safetensors.torch import load_file

from gpstoken_hf.gaussians import GAUSSIAN_FIELDS, NUM_GAUSSIAN_PARAMS, check_gaussians, clamp_gaussians
from gpstoken_hf.image_processing_gpstoken import open_image
from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.metrics import SSIM_WINDOW, psnr, ssim
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.pipeline_gpstoken import LAYOUT_SOURCES, GPSTokenPipeline
from gpstoken_hf.visualization import colors_of, pixel_errors, tensor_to_pil

from .shared.photographs import read_photograph, reduced_size, sample_photograph
from .shared.programs import ProgramError
from .shared.token_files import load_token_file, load_tokens, save_token_file, save_tokens

MAX_UPLOAD_BYTES = 20 * 2**20
MAX_UPLOAD_PIXELS = 50_000_000
MAX_MASK_CHARACTERS = 4 * 2**20
MAX_TOKENS = 1024  # the page draws two ellipses for each
MAX_STEPS = 250
MAX_PSNR = 40
# Token files that anybody can read, and smaller ones for the same model.
TOKEN_SUFFIXES = (".safetensors", ".gpst")
# A photograph is kept at this size, so that a larger side of the image can be chosen later.
KEPT_SIDE = 1024
SIDES = (64, 128, 256, 384, 512)
SAMPLES = ("astronaut", "chelsea", "coffee", "rocket")
# The part of a patch that hides the pictures.
NOTHING_SHOWN = {"width": None}
# The smallest share of the range of sigma and rho that a dragged Gaussian keeps to their ends.
EDGE = 1e-3

Patch = dict[str, Any]

# Patches are numbered, so that the page sees a change even where two patches are equal.
_serials = itertools.count(1)


@dataclass
class Photo:
    """The image of one visitor and its tokens.

    Args:
        name (`str`): what the visitor called the file.
        original (`PIL.Image.Image`, *optional*): the photograph, its longer side at most `KEPT_SIDE`; `None` where
            tokens were uploaded.
        pixel_values (`torch.Tensor` of shape `(1, 3, H, W)`, *optional*): the photograph as it was encoded.
        size (`tuple[int, int]`): `(H, W)` of the decoded image.
        layout ([`GaussianLayout`], *optional*): the Gaussians before refinement.
        encoded (`torch.Tensor` of shape `(1, L, 5 + C)`, *optional*): the tokens of the encoder.
        tokens (`torch.Tensor` of shape `(1, L, 5 + C)`, *optional*): the same after the visitor's edits.
        importance (`np.ndarray` of shape `(h, w)`, *optional*): what the visitor has painted, in [0, 1].
        target (`str`, *optional*): whether the encoder's tokens reach the quality that was asked for, in words.
    """

    name: str
    original: PIL.Image.Image | None = None
    pixel_values: torch.Tensor | None = None
    size: tuple[int, int] = (0, 0)
    layout: GaussianLayout | None = None
    encoded: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    importance: np.ndarray | None = None
    target: str | None = None


@dataclass
class Draft:
    """A layout on its way to an image, of one visitor.

    Args:
        label (`int`): the class id.
        gaussians (`torch.Tensor` of shape `(1, L, 5)`): the layout, with the visitor's edits.
        generated (`torch.Tensor` of shape `(1, L, 5)`): the layout without them.
    """

    label: int
    gaussians: torch.Tensor
    generated: torch.Tensor = field(repr=False)


# ------------------------------------------------------------------------------------------------------ photographs


def open_upload(path: Path, model: GPSTokenModel) -> Photo:
    """Read a photograph, or tokens that the page has offered for download.

    Args:
        path (`Path`): the uploaded file; one that ends in `.safetensors` or `.gpst` holds tokens.
        model ([`GPSTokenModel`]): decodes the tokens.

    Raises:
        ValueError: if the file is too large, is damaged, or holds neither.
    """
    try:
        return _read_upload(path, model)
    except (OSError, ValueError) as error:
        # The name that the visitor knows, not where the server keeps the file.
        raise ProgramError(str(error).replace(str(path), path.name)) from error


def _read_upload(path: Path, model: GPSTokenModel) -> Photo:
    size = path.stat().st_size
    if size > MAX_UPLOAD_BYTES:
        raise ProgramError(f"the file must be at most {MAX_UPLOAD_BYTES / 2**20:g} MB, got {size / 2**20:.1f} MB")
    if path.suffix.lower() in TOKEN_SUFFIXES:
        return _read_tokens(path, model)
    limit = MAX_UPLOAD_PIXELS // 10**6
    try:
        with PIL.Image.open(path) as header:
            width, height = header.size
    except PIL.Image.DecompressionBombError as error:
        raise ProgramError(f"the photograph must have at most {limit} million pixels, got far more") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ProgramError(
            f"the file must be a photograph or tokens (.safetensors, .gpst), got {path.name}"
        ) from error
    if width * height > MAX_UPLOAD_PIXELS:
        raise ProgramError(f"the photograph must have at most {limit} million pixels, got {width} x {height}")
    return photo_of(path.name, open_image(path))


def photo_of(name: str, image: PIL.Image.Image) -> Photo:
    """A `Photo` of an image of any mode and size, not encoded yet."""
    return Photo(name, tensor_to_pil(read_photograph(image, KEPT_SIDE).pixel_values[0]))


def open_sample(name: str) -> Photo:
    """A `Photo` of a photograph that scikit-image ships with."""
    return photo_of(name, sample_photograph(name))


def _read_tokens(path: Path, model: GPSTokenModel) -> Photo:
    """Tokens of a file, decoded at most at the largest side that the page offers."""
    is_packed = path.suffix.lower() == ".gpst"
    stored = load_token_file(path, model) if is_packed else load_tokens(path, model.config.token_channels)
    tokens = stored.tokens[stored.attention_mask == 1][None]
    count = tokens.shape[1]
    if not 1 <= count <= MAX_TOKENS:
        raise ProgramError(f"the file must hold 1 to {MAX_TOKENS} tokens, got {count}")
    check_gaussians(tokens[..., :NUM_GAUSSIAN_PARAMS], "the Gaussians of the file")
    initial = None if is_packed else load_file(path).get("init_gaussians")
    if initial is None or tuple(initial.shape) != (*stored.tokens.shape[:2], NUM_GAUSSIAN_PARAMS):
        gaussians = tokens[..., :NUM_GAUSSIAN_PARAMS]
    else:
        gaussians = initial.float()[stored.attention_mask == 1][None]
        check_gaussians(gaussians, "the initial Gaussians of the file")
    size = reduced_size(stored.size, max(SIDES))
    config = model.config
    layout = GaussianLayout.from_gaussians(gaussians, size, None, config.sigma_scale, config.align_corners)
    return Photo(path.name, size=size, layout=layout, encoded=tokens, tokens=tokens.clone())


@torch.inference_mode()
def encode(
    photo: Photo, model: GPSTokenModel, num_tokens: int, side: int, strength: float, target_psnr: float = 0
) -> Patch:
    """Encode the photograph. What was painted adds `strength` times its opacity to the importance of a pixel.

    Above 0, `target_psnr` in dB asks for the fewest tokens that reach it, `num_tokens` at most.

    Raises:
        ValueError: if a setting is out of its range, or the image cannot be split into so many tokens.
    """
    if photo.original is None:
        raise ProgramError("the number of tokens and the size must be those of the file for uploaded tokens")
    if num_tokens != int(num_tokens) or not 1 <= num_tokens <= MAX_TOKENS or side not in SIDES:
        raise ProgramError(f"tokens must be from 1 to {MAX_TOKENS} and the side one of {SIDES}")
    num_tokens = int(num_tokens)
    if not 0 <= target_psnr <= MAX_PSNR:
        raise ProgramError(f"the PSNR to reach must be from 0 to {MAX_PSNR} dB, got {target_psnr}")
    pixel_values = read_photograph(photo.original, side).pixel_values
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    importance = None
    if photo.importance is not None and strength > 0:
        mask = PIL.Image.fromarray(photo.importance).resize((size[1], size[0]), PIL.Image.Resampling.BILINEAR)
        importance = strength * torch.from_numpy(np.array(mask)).clamp(0, 1)[None]
    encoded = model.encode(
        pixel_values.to(model.device),
        importance=None if importance is None else importance.to(model.device),
        **({"target_psnr": target_psnr, "max_tokens": num_tokens} if target_psnr else {"num_tokens": num_tokens}),
    )
    photo.target = None
    if target_psnr:
        photo.target = f"{'reaches' if bool(encoded.reached[0]) else 'falls short of'} {target_psnr:g} dB"
    tokens = encoded.tokens.float().cpu()
    photo.pixel_values, photo.size = pixel_values, size
    photo.layout, photo.encoded, photo.tokens = encoded.layout.to("cpu"), tokens, tokens.clone()
    return show(photo, model)


@torch.inference_mode()
def show(photo: Photo, model: GPSTokenModel) -> Patch:
    """Everything that the page shows of a photo: the image, its Gaussians, the reconstruction and its error."""
    assert photo.layout is not None
    height, width = photo.size
    original = None if photo.pixel_values is None else data_address(tensor_to_pil(photo.pixel_values[0]))
    return {
        "width": width,
        "height": height,
        "align_corners": model.config.align_corners,
        "photo": original,
        "initial": _listed(photo.layout.gaussians[0]),
        "painted": photo.importance is not None,
        **_decoded(photo, model),
    }


def _decoded(photo: Photo, model: GPSTokenModel) -> Patch:
    """The part of a patch that follows from the tokens."""
    assert photo.tokens is not None
    assert photo.encoded is not None
    sample = model.decode(photo.tokens.to(model.device), photo.size).sample.float().cpu().clamp(-1, 1)
    count, channels = photo.tokens.shape[1:]
    (height, width), floats = photo.size, count * channels
    words = [f"{photo.name}: {width} × {height}", f"{count} tokens"]
    words.append(f"{floats} numbers ({floats / (3 * height * width):.1%} of the image's)")
    is_edited = not torch.equal(photo.tokens, photo.encoded)
    if photo.target is not None and not is_edited:
        words.append(photo.target)
    patch: Patch = {
        "serial": next(_serials),
        "refined": _listed(photo.tokens[0]),
        "decoded": data_address(tensor_to_pil(sample[0])),
        "edited": is_edited,
        "error_map": None,
        "error_scale": None,
        "score": None,
        "problem": None,
        "message": ", ".join(words),
    }
    if photo.pixel_values is not None:
        errors = pixel_errors(photo.pixel_values[0], sample[0])
        scale = max(5.0, math.ceil(float(np.percentile(errors, 99.5)) / 5) * 5.0)
        patch["error_map"] = data_address(PIL.Image.fromarray(colors_of(errors / scale, "magma")))
        patch["error_scale"] = f"{scale:g}"
        patch["score"] = f"PSNR {psnr(sample, photo.pixel_values).item():.2f} dB"
        if min(photo.size) >= SSIM_WINDOW:
            patch["score"] += f", SSIM {ssim(sample, photo.pixel_values).item():.3f}"
    return patch


@torch.inference_mode()
def edit(photo: Photo, model: GPSTokenModel, index: Any, gaussian: Any) -> Patch:
    """Replace one Gaussian and decode again; the encoder does not run.

    Args:
        index (`int`): the token, from 0 to L - 1.
        gaussian (sequence of 5 `float`): `[sigma_x, sigma_y, rho, mu_x, mu_y]`; clamped to what is legal.

    Raises:
        ValueError: if the token does not exist or the Gaussian is not five finite numbers.
    """
    if photo.tokens is None:
        raise ProgramError("a photograph must be encoded before its Gaussians are edited")
    photo.tokens[0, _index(index, photo.tokens.shape[1]), :NUM_GAUSSIAN_PARAMS] = _legal(gaussian)
    return _decoded(photo, model)


@torch.inference_mode()
def undo_edits(photo: Photo, model: GPSTokenModel) -> Patch:
    """Return to the tokens of the encoder."""
    if photo.encoded is None:
        raise ProgramError("a photograph must be encoded before edits are undone")
    photo.tokens = photo.encoded.clone()
    return _decoded(photo, model)


def paint(photo: Photo, mask: str | None) -> None:
    """Take what the visitor has painted as importance.

    Args:
        mask (`str`, *optional*): a PNG in a `data:` address whose opacity counts; `None` for nothing painted.

    Raises:
        ValueError: if it is no such PNG, or larger than the largest image of the page.
    """
    if not mask:
        photo.importance = None
        return
    head, _, body = str(mask).partition(",")
    if head != "data:image/png;base64" or len(body) > MAX_MASK_CHARACTERS:
        raise ProgramError("the painted mask must be a PNG of the page's size")
    try:
        with PIL.Image.open(io.BytesIO(base64.b64decode(body, validate=True)), formats=["PNG"]) as image:
            if max(image.size) > KEPT_SIDE:
                raise ProgramError(f"the painted mask must be at most {KEPT_SIDE} pixels wide, got {image.size}")
            opacity = np.asarray(image.convert("RGBA"), dtype=np.float32)[..., 3] / 255
    except (OSError, SyntaxError, binascii.Error) as error:
        raise ProgramError("the painted mask must be a PNG, got a damaged one") from error
    photo.importance = opacity if opacity.any() else None


def pack(photo: Photo, model: GPSTokenModel, model_name: str, suffix: str) -> Patch:
    """A patch that lets the page offer the tokens as a file, which `open_upload` and `decode` read.

    Args:
        suffix (`str`): one of `TOKEN_SUFFIXES`. A `.gpst` file is smaller and is read by this model only.
    """
    if photo.tokens is None:
        raise ProgramError("a photograph must be encoded before its tokens are downloaded")
    if suffix not in TOKEN_SUFFIXES:
        raise ProgramError(f"token files must end in one of {TOKEN_SUFFIXES}, got {suffix!r}")
    mask = torch.ones(photo.tokens.shape[:2], dtype=torch.int64)
    encoded = SimpleNamespace(tokens=photo.tokens, layout=photo.layout, attention_mask=mask)
    with tempfile.TemporaryDirectory(prefix="gpstoken-") as folder:  # readable by this user only
        path = Path(folder, f"tokens{suffix}")
        if suffix == ".gpst":
            save_token_file(path, encoded, photo.size, model, None, None)
        else:
            save_tokens(path, encoded, photo.size, None, model_name)
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    stem = Path(photo.name).stem or "photo"
    return {"serial": next(_serials), "problem": None, "download": {"name": f"{stem}{suffix}", "data": data}}


# ------------------------------------------------------------------------------------------------------- generation


def class_names(pipeline: GPSTokenPipeline) -> list[tuple[str, int]]:
    """`(shown name, class id)` of every class."""
    names = pipeline.config.id2label or {}
    count = pipeline.transformer.config.num_classes
    return [(f"{i}: {names[str(i)].split(',')[0]}" if str(i) in names else str(i), i) for i in range(count)]


def layout_sources(pipeline: GPSTokenPipeline) -> list[str]:
    """Where the pipeline can take a layout from: "generated", "bank", both or neither."""
    if pipeline.is_one_stage:
        return []
    return [
        source
        for source, parts in LAYOUT_SOURCES.items()
        if all(getattr(pipeline, part) is not None for part in parts)
    ]


def make_layout(pipeline: GPSTokenPipeline, label: int, seed: int, source: str) -> tuple[Draft, Patch]:
    """The first stage: a layout for a class, from the layout transformer or from the bank.

    Raises:
        ValueError: if the pipeline has no such class or source.
    """
    if source not in layout_sources(pipeline):
        raise ProgramError(f"the layout must be one of {layout_sources(pipeline)}, got {source!r}")
    layout = pipeline(label, layout=source, output_type="layout", generator=_generator(seed)).layout
    assert layout is not None
    gaussians = layout[0].gaussians.float().cpu()
    draft = Draft(label, gaussians, gaussians.clone())
    return draft, _draft_patch(pipeline, draft) | {"decoded": None, "refined": []}


def edit_layout(pipeline: GPSTokenPipeline, draft: Draft, index: Any, gaussian: Any) -> Patch:
    """Replace one Gaussian of the layout, between the stages.

    Raises:
        ValueError: if the Gaussian does not exist or is not five finite numbers.
    """
    draft.gaussians[0, _index(index, draft.gaussians.shape[1])] = _legal(gaussian)
    return _draft_patch(pipeline, draft)


def undo_layout_edits(pipeline: GPSTokenPipeline, draft: Draft) -> Patch:
    """Return to the layout as it was made."""
    draft.gaussians = draft.generated.clone()
    return _draft_patch(pipeline, draft)


def draw_texture(
    pipeline: GPSTokenPipeline,
    draft: Draft | None,
    label: int,
    seed: int,
    steps: int,
    guidance: float,
    on_step: Callable[[int, int], None] = lambda step, count: None,
) -> Patch:
    """The second stage: texture for the layout, and the image. One stage makes both and needs no draft.

    Raises:
        ValueError: if a setting is out of its range, or there is no layout yet.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ProgramError(f"steps must be from 1 to {MAX_STEPS}, got {steps}")
    if draft is None and not pipeline.is_one_stage:
        raise ProgramError("a layout must be made before its texture is drawn")

    def show_step(pipe: GPSTokenPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        on_step(step + 1, pipe.num_timesteps)
        return {}

    output = pipeline(
        label if draft is None else draft.label,
        num_inference_steps=steps,
        guidance_scale=guidance,
        layout=None if draft is None else GaussianLayout(draft.gaussians.clone()),
        generator=_generator(seed),
        callback_on_step_end=show_step,
    )
    assert isinstance(output.images, list)
    assert output.tokens is not None
    image = output.images[0]
    patch = {"initial": [], "edited": False} if draft is None else _draft_patch(pipeline, draft)
    return patch | {
        "serial": next(_serials),
        "width": image.width,
        "height": image.height,
        "align_corners": pipeline.vae.config.align_corners,
        "decoded": data_address(image),
        "refined": _listed(output.tokens[0].float().cpu()),
        "problem": None,
        "message": f"{image.width} × {image.height}, {output.tokens.shape[1]} tokens, {steps} steps, seed {seed}",
    }


def _draft_patch(pipeline: GPSTokenPipeline, draft: Draft) -> Patch:
    side, names = pipeline.vae.config.image_size, {i: name for name, i in class_names(pipeline)}
    return {
        "serial": next(_serials),
        "width": side,
        "height": side,
        "align_corners": pipeline.vae.config.align_corners,
        "initial": _listed(draft.gaussians[0]),
        "edited": not torch.equal(draft.gaussians, draft.generated),
        "problem": None,
        "message": f"layout of {draft.gaussians.shape[1]} Gaussians for class {names[draft.label]}",
    }


def _generator(seed: int) -> torch.Generator:
    if not 0 <= seed < 2**63:
        raise ProgramError(f"the seed must be an integer from 0 to 2^63 - 1, got {seed}")
    return torch.Generator().manual_seed(int(seed))


# ---------------------------------------------------------------------------------------------------------- helpers


def problem(sentence: str) -> Patch:
    """A patch that shows an error and leaves everything else."""
    return {"serial": next(_serials), "problem": sentence}


def data_address(image: PIL.Image.Image) -> str:
    """A picture as a PNG in a `data:` address."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _listed(tokens: torch.Tensor) -> list[list[float]]:
    """The Gaussians of tokens `(L, 5 + C)` as numbers, rounded to a thousandth of a pixel of 1000."""
    return [[round(value, 6) for value in row] for row in tokens[:, :NUM_GAUSSIAN_PARAMS].tolist()]


def _index(index: Any, count: int) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise ProgramError(f"the token must be from 0 to {count - 1}, got {index!r}")
    return index


def _legal(gaussian: Sequence[Any]) -> torch.Tensor:
    """Five numbers of a visitor as a legal Gaussian `(5,)`."""
    try:
        values = torch.tensor([float(value) for value in gaussian], dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise ProgramError(f"a Gaussian must be five numbers {list(GAUSSIAN_FIELDS)}, got others") from error
    if values.shape != (NUM_GAUSSIAN_PARAMS,) or not values.isfinite().all():
        raise ProgramError(f"a Gaussian must be five finite numbers {list(GAUSSIAN_FIELDS)}, got {values.tolist()}")
    return clamp_gaussians(values, eps=EDGE)
