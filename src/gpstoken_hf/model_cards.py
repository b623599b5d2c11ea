# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what a model is, how to load and use it, how it was trained, its scores, licence and limits.

The model knows the first two; [`CardDetails`] holds the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

PAPER_NAME = "GPSToken: Gaussian Parameterized Spatially-adaptive Tokenization"
PAPER_URL = "https://arxiv.org/abs/2509.01109"
PAPER = f"[{PAPER_NAME}]({PAPER_URL})"
PLACEHOLDER = "path/or/repo"


@dataclass(frozen=True)
class Score:
    """One measured score.

    Args:
        metric (`str`): its name, such as `"PSNR"`.
        value (`float`): its value, in the unit that `protocol` names.
        dataset (`str`): the data that it was measured on.
        protocol (`str`): how it was measured: the command, the size and number of images, the unit.
        source_name, source_url (`str`, *optional*): who reports it, if it was not measured with these weights.
    """

    metric: str
    value: float
    dataset: str
    protocol: str
    source_name: str | None = None
    source_url: str | None = None


@dataclass(frozen=True)
class CardDetails:
    """What a model card says and a model does not know.

    Args:
        license (`str`, *optional*): licence of the weights by its id on the Hub, such as `"apache-2.0"`.
        training_data (`str`, *optional*): the data that the model was trained on.
        training_command (`str`, *optional*): the command that trained it.
        scores (`Sequence[Score]`, *optional*): measured scores, which also become the `model-index` of the card.
        limits (`str`, *optional*): what the model cannot do.
    """

    license: str | None = None
    training_data: str | None = None
    training_command: str | None = None
    scores: Sequence[Score] = ()
    limits: str | None = None


def front_matter(
    library: str,
    tags: Sequence[str],
    pipeline_tag: str | None = None,
    license: str | None = None,
    model_name: str = "gpstoken",
    scores: Sequence[Score] = (),
    base_model: str | None = None,
) -> str:
    """The YAML block of a model card.

    Args:
        library (`str`): the Hub's `library_name`.
        tags (`Sequence[str]`): the tags.
        pipeline_tag (`str`, *optional*): the task on the Hub.
        license (`str`, *optional*, defaults to `"unknown"`): licence of the weights by its id on the Hub.
        model_name (`str`, *optional*, defaults to `"gpstoken"`): name of the model in the `model-index`.
        scores (`Sequence[Score]`, *optional*): the entries of the `model-index`.
        base_model (`str`, *optional*): repository of the model that this one was made of.

    Returns:
        `str`: the block between its two lines of dashes.
    """
    results = [
        EvalResult(
            task_type=pipeline_tag or "other",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", score.dataset.lower()).strip("-"),
            dataset_name=score.dataset,
            metric_type=score.metric.lower(),
            metric_name=score.metric,
            metric_value=score.value,
            source_name=score.source_name,
            source_url=score.source_url,
        )
        for score in scores
    ]
    data = ModelCardData(
        license=license or "unknown",
        library_name=library,
        pipeline_tag=pipeline_tag,
        tags=list(dict.fromkeys(["gpstoken", *tags, "arxiv:2509.01109"])),
        base_model=base_model,
        model_name=model_name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml().strip()}\n---\n"


# -- what the classes say of themselves


@dataclass(frozen=True)
class _Kind:
    """One class: the front matter, title and text of its card."""

    library: str
    tags: tuple[str, ...]
    pipeline_tag: str | None
    title: str
    summary: str
    code: str
    table: Mapping[str, Any]
    limits: str


def _tokenizer(model: Any, repo: str) -> _Kind:
    config = model.config
    return _Kind(
        "transformers",
        ("image-tokenizer",),
        "image-to-image",
        f"GPSToken tokenizer, {config.num_tokens} tokens of 5 + {config.texture_channels} numbers",
        "A GPSToken tokenizer encodes an image as 2D Gaussian tokens, which are denser where the image is complex, "
        "and decodes them.",
        f"""\
from PIL import Image
from gpstoken_hf import GPSTokenImageProcessor, GPSTokenModel

model = GPSTokenModel.from_pretrained("{repo}").eval()
size = {{"height": {config.image_size}, "width": {config.image_size}}}
processor = GPSTokenImageProcessor(do_resize=True, size=size)
inputs = processor(Image.open("photo.jpg"), return_tensors="pt")
tokens = model.encode(inputs["pixel_values"]).tokens  # (1, {config.num_tokens}, {5 + config.texture_channels})
image = processor.post_process(model.decode(tokens).sample.detach())[0]
image.save("reconstruction.png")""",
        {
            "images": f"{config.image_size} x {config.image_size} pixels in training",
            "tokens": f"{config.num_tokens} of 5 + {config.texture_channels} numbers",
            "encoder": f"{config.num_hidden_layers} blocks, width {config.hidden_size}",
        },
        f"It was made for images of {config.image_size} x {config.image_size} pixels. Encode and decode larger ones "
        f"with `tile_size={config.image_size}`.",
    )


def _autoencoder(model: Any, repo: str) -> _Kind:
    config = model.config
    return _Kind(
        "diffusers",
        ("image-tokenizer", "autoencoder"),
        "image-to-image",
        f"GPSToken autoencoder, {config.num_tokens} tokens of 5 + {config.texture_channels} numbers",
        "A GPSToken tokenizer with the interface of the autoencoders of diffusers: latents are the tokens of an image "
        "on a grid.",
        f"""\
import torch
from gpstoken_hf import AutoencoderGPSToken

vae = AutoencoderGPSToken.from_pretrained("{repo}")
images = torch.rand(1, 3, {config.image_size}, {config.image_size}) * 2 - 1
with torch.no_grad():
    latents = vae.encode(images).latent_dist.mode()
    reconstructions = vae.decode(latents).sample""",
        {
            "images": f"{config.image_size} x {config.image_size} pixels in training",
            "tokens": f"{config.num_tokens} of 5 + {config.texture_channels} numbers",
            "scaling": f"`scaling_factor` {config.scaling_factor:g}, "
            + ("no statistics" if config.latents_channel_mean is None else "standardised by its statistics"),
        },
        f"It was made for images of {config.image_size} x {config.image_size} pixels.",
    )


def _transformer(model: Any, repo: str) -> _Kind:
    config = model.config
    condition = config.condition_channels
    given = f", encoder_condition=torch.rand(1, {config.sample_size}, {condition})" if condition else ""
    role = "texture for a given layout" if condition else "layouts" if config.in_channels == 5 else "whole tokens"
    return _Kind(
        "diffusers",
        ("sit", "flow-matching"),
        None,
        f"SiT generator for GPSToken, {config.sample_size} tokens of {config.in_channels} channels",
        f"A class-conditional flow-matching transformer over the tokens of an image. It generates {role}.",
        f"""\
import torch
from gpstoken_hf import SiTTransformer1DModel

transformer = SiTTransformer1DModel.from_pretrained("{repo}")
noised = torch.randn(1, {config.sample_size}, {config.in_channels})
labels = torch.tensor([0])
with torch.no_grad():
    difference = transformer(noised, 500.0, labels{given}).sample  # noise - data""",
        {
            "size": f"{config.num_layers} blocks, width {config.num_attention_heads * config.attention_head_dim}",
            "classes": f"0 to {config.num_classes - 1}; {config.num_classes} means no class",
            "condition": f"initial Gaussians, {condition} channels" if condition else "none",
            "time": "`timestep` is 1000 sigma; 1000 is noise",
        },
        "Its latents belong to the tokenizer that it was trained with. Use no other.",
    )


def _bank(bank: Any, repo: str) -> _Kind:
    counts = bank.class_counts
    lengths = ", ".join(map(str, sorted(bank.token_counts)))
    return _Kind(
        "diffusers",
        ("layout-bank",),
        None,
        "Layout bank for GPSToken",
        "Layouts of images by class, which can take the place of a layout generator. A layout is a set of 2D "
        "Gaussians, one for each token of an image.",
        f"""\
import torch
from gpstoken_hf import GaussianLayoutBank

bank = GaussianLayoutBank.from_pretrained("{repo}")
layouts = bank.sample([{bank.class_ids[0]}, {bank.class_ids[-1]}], generator=torch.Generator().manual_seed(0))
layouts.gaussians  # (B, L, 5): sigma_x, sigma_y, rho, mu_x, mu_y
layouts.attention_mask  # (B, L): 1 for a token, 0 for padding""",
        {
            "layouts": f"{len(bank)}, of {lengths} tokens",
            "classes": f"{len(counts)}, with {min(counts.values())} to {max(counts.values())} layouts each",
        },
        "It repeats layouts of training images; nothing is generated.",
    )


def _scheduler(scheduler: Any, repo: str) -> _Kind:
    return _Kind(
        "diffusers",
        ("scheduler", "flow-matching"),
        None,
        "FlowMatchSDEScheduler",
        "A sampler of flow-matching models: the Euler and the SDE steps of SiT.",
        f"""\
from gpstoken_hf import FlowMatchSDEScheduler

scheduler = FlowMatchSDEScheduler.from_pretrained("{repo}")
scheduler.set_timesteps(50)""",
        {},
        "It samples flow-matching models only.",
    )


def _processor(processor: Any, repo: str) -> _Kind:
    return _Kind(
        "transformers",
        ("image-processor",),
        None,
        "GPSTokenImageProcessor",
        "Turns images of any kind into the inputs of a GPSToken tokenizer, and its outputs into images.",
        f"""\
from PIL import Image
from gpstoken_hf import GPSTokenImageProcessor

processor = GPSTokenImageProcessor.from_pretrained("{repo}")
inputs = processor(Image.open("photo.jpg"), return_tensors="pt")
inputs["pixel_values"]  # (1, 3, H, W), in [-1, 1]""",
        {},
        "It has no weights.",
    )


def _pipeline(pipeline: Any, repo: str) -> _Kind:
    vae, transformer = pipeline.vae.config, pipeline.transformer.config
    sources = ["a layout transformer with calibration"] if pipeline.layout_transformer is not None else []
    if pipeline.layout_bank is not None:
        sources.append(f"a bank of {len(pipeline.layout_bank)} layouts")
    layouts = " and ".join(sources) or ("generated with the texture" if pipeline.is_one_stage else "the caller's")
    return _Kind(
        "diffusers",
        ("class-conditional",),
        "unconditional-image-generation",
        "GPSToken pipeline",
        "Generates images of class labels: first a layout of 2D Gaussians, then their texture.",
        f"""\
import torch
from gpstoken_hf import GPSTokenPipeline

pipe = GPSTokenPipeline.from_pretrained("{repo}")
output = pipe([0, 1], num_inference_steps=50, generator=torch.Generator().manual_seed(0))
output.images[0].save("image.png")""",
        {
            "images": f"{vae.image_size} x {vae.image_size} pixels",
            "tokens": f"{transformer.sample_size} of 5 + {vae.texture_channels} numbers",
            "classes": transformer.num_classes,
            "layouts": layouts,
            "sampler": type(pipeline.scheduler).__name__,
        },
        "It generates its classes and nothing else.",
    )


KINDS: dict[str, Callable[[Any, str], _Kind]] = {
    "GPSTokenModel": _tokenizer,
    "AutoencoderGPSToken": _autoencoder,
    "SiTTransformer1DModel": _transformer,
    "GaussianLayoutBank": _bank,
    "FlowMatchSDEScheduler": _scheduler,
    "GPSTokenImageProcessor": _processor,
    "GPSTokenPipeline": _pipeline,
}


def model_card(
    model: Any, repo_id: str | None = None, details: CardDetails | None = None, tags: Sequence[str] = ()
) -> str:
    """The card of a model, scheduler, processor or pipeline of this package, as Markdown with a YAML block.

    Args:
        model: an object of one of the classes that `from_pretrained` loads.
        repo_id (`str`, *optional*): where its code loads it from. A placeholder stands there by default.
        details ([`CardDetails`], *optional*): training, scores, licence and limits. What is missing is said to be.
        tags (`Sequence[str]`, *optional*): more tags.

    Returns:
        `str`: the text of a README.md.

    Raises:
        ValueError: if `model` is of no class of this package.

    Examples:
        ```python
        >>> from gpstoken_hf import FlowMatchSDEScheduler
        >>> from gpstoken_hf.model_cards import model_card

        >>> 'FlowMatchSDEScheduler.from_pretrained("owner/name")' in model_card(FlowMatchSDEScheduler(), "owner/name")
        True

        ```
    """
    names = [cls.__name__ for cls in type(model).__mro__ if cls.__name__ in KINDS]
    if not names:
        raise ValueError(f"model must be one of {', '.join(KINDS)}, got {type(model).__name__}")
    kind = KINDS[names[0]](model, repo_id or PLACEHOLDER)
    details = details or CardDetails()
    name = (repo_id or kind.title).rpartition("/")[2]
    source = loaded_from(model)
    base_model = source if source not in (None, repo_id) and _is_repo_id(str(source)) else None
    matter = front_matter(
        kind.library, [*kind.tags, *tags], kind.pipeline_tag, details.license, name, details.scores, base_model
    )
    rows = "".join(f"| {key} | {value} |\n" for key, value in kind.table.items())
    table = f"\n| | |\n|---|---|\n{rows}" if rows else ""
    return f"""{matter}
# {kind.title}

{kind.summary} See {PAPER}.

## Use

```python
{kind.code}
```
{table}
{_training(details)}
## Scores

{_scores(details.scores)}
## Licence

{_licence(details.license)} The code of gpstoken-hf is under the Apache License 2.0.

## Limits

{kind.limits}{f" {details.limits}" if details.limits else ""}
"""


def _training(details: CardDetails) -> str:
    data = details.training_data or "Not stated by the uploader."
    command = f"\n```bash\n{details.training_command}\n```\n" if details.training_command else ""
    return f"## Training\n\nData: {data}\n{command}"


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return "None were given by the uploader.\n"
    rows = [
        f"| {score.metric} | {score.value:g} | {score.dataset} | {score.protocol}"
        + (f" (reported by {score.source_name}, not measured with these weights)" if score.source_name else "")
        + " |\n"
        for score in scores
    ]
    return "| metric | value | data | protocol |\n|---|---|---|---|\n" + "".join(rows)


def _licence(license: str | None) -> str:
    return f"The weights are under `{license}`." if license else "The uploader states no licence of the weights."


def remote_code_section(class_name: str, repo_id: str | None = None) -> str:
    """The part of a card that says how to load the remote-code edition without this package.

    Args:
        class_name (`str`): `"GPSTokenModel"`, `"DiffusionPipeline"` or a class that `diffusers.AutoModel` loads.
        repo_id (`str`, *optional*): where the code loads from. A placeholder stands there by default.
    """
    repo = repo_id or PLACEHOLDER
    if class_name == "GPSTokenModel":
        code = f"""\
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{repo}", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("{repo}", trust_remote_code=True)"""
    else:
        loader = "DiffusionPipeline" if class_name == "DiffusionPipeline" else "AutoModel"
        name = "pipe" if class_name == "DiffusionPipeline" else "model"
        code = f"""\
from diffusers import {loader}

{name} = {loader}.from_pretrained("{repo}", trust_remote_code=True)"""
    return f"""
## Without the package

This repository carries its code. It loads where transformers, diffusers, torch and torchvision are installed and
gpstoken-hf is not. Read the code before you trust it.

```python
{code}
```
"""


def loaded_from(model: Any) -> str | None:
    """The folder or repository that a model was loaded from."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or None


def _is_repo_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
