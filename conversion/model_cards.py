# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards of converted models. They mark the paper's numbers as reported, not measured."""

from __future__ import annotations

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.layout_bank import GaussianLayoutBank
from gpstoken_hf.model_cards import PAPER, PAPER_URL, Score, front_matter
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline


def layout_bank_card(bank: GaussianLayoutBank, origin: str, source: str) -> str:
    """Return the README.md of a layout bank.

    Args:
        bank (`GaussianLayoutBank`): the bank.
        origin (`str`): where the layouts come from: "converted from ..." or "taken from ...".
        source (`str`): who can answer questions about data and licence.
    """
    counts = bank.class_counts
    return f"""{front_matter("diffusers", ["layout-bank"])}
# Layout bank for GPSToken

{len(bank)} layouts of {len(counts)} classes ({min(counts.values())} to {max(counts.values())} per class, layouts of \
{", ".join(str(length) for length in sorted(bank.token_counts))} tokens), {origin} with \
`gpstoken_hf`. A layout is a set of 2D Gaussians, one for each token of an image; see {PAPER}.

```python
import torch
from gpstoken_hf import GaussianLayoutBank

bank = GaussianLayoutBank.from_pretrained("path/or/repo")
layouts = bank.sample([{bank.class_ids[0]}, {bank.class_ids[-1]}], generator=torch.Generator().manual_seed(0))
layouts.gaussians       # (B, L, 5): sigma_x, sigma_y, rho, mu_x, mu_y
layouts.attention_mask  # (B, L): 1 for a token, 0 for padding
```

For the training data and the licence of the layouts, ask {source}.
"""


# Paper Table 1 (256 x 256 ImageNet validation); FID and sFID are those of generation.
PAPER_METRIC_NAMES = ("PSNR", "SSIM", "LPIPS", "rFID", "rsFID", "FID", "sFID")
PAPER_METRICS = {
    "s64": (22.18, 0.578, 0.111, 1.31, 5.42, 3.02, 4.85),
    "m128": (24.06, 0.657, 0.080, 0.65, 3.28, 2.18, 3.96),
    "l256": (28.81, 0.809, 0.043, 0.22, 1.31, 1.65, 3.77),
}


def gpstoken_card(config: GPSTokenConfig, preset: str | None, source: str) -> str:
    """Return the README.md of a converted tokenizer.

    Args:
        config (`GPSTokenConfig`): its config.
        preset (`str`, *optional*): its preset, whose numbers in the paper the card quotes.
        source (`str`): the name of the released file.
    """
    metrics = ""
    scores: list[Score] = []
    if preset in PAPER_METRICS:
        psnr, ssim, lpips, rfid, rsfid, fid, sfid = PAPER_METRICS[preset]
        scores = [
            Score(name, value, "ImageNet validation", "256 x 256 pixels", "the GPSToken paper, Table 1", PAPER_URL)
            for name, value in zip(PAPER_METRIC_NAMES, PAPER_METRICS[preset])
        ]
        metrics = f"""
## Reported by the paper

256 x 256 ImageNet validation, {config.num_tokens} tokens. **These are the paper's numbers for {preset}; they were \
not measured with this folder.** FID and sFID measure images generated with this tokenizer.

| PSNR | SSIM | LPIPS | rFID | rsFID | FID | sFID |
|---|---|---|---|---|---|---|
| {psnr:.2f} | {ssim:.3f} | {lpips:.3f} | {rfid:.2f} | {rsfid:.2f} | {fid:.2f} | {sfid:.2f} |
"""
    matter = front_matter(
        "transformers", ["image-tokenizer"], "image-to-image", model_name=preset or "gpstoken", scores=scores
    )
    return f"""{matter}
# GPSToken tokenizer, {config.num_tokens} tokens of 5 + {config.texture_channels} numbers

Converted from `{source}` with `gpstoken_hf`. The weights equal the checkpoint's bit for bit. GPSToken encodes an \
image as 2D Gaussian tokens, which are denser where the image is complex, and decodes them; see {PAPER}.

```python
from PIL import Image
from gpstoken_hf import GPSTokenImageProcessor, GPSTokenModel

model = GPSTokenModel.from_pretrained("path/or/repo").eval()
processor = GPSTokenImageProcessor.from_pretrained("path/or/repo")
inputs = processor(Image.open("photo.jpg"), do_resize=True, do_center_crop=True, return_tensors="pt")
tokens = model.encode(inputs["pixel_values"]).tokens     # (1, {config.num_tokens}, {5 + config.texture_channels})
image = processor.post_process(model.decode(tokens).sample.detach())[0]
```

| | |
|---|---|
| training images | {config.image_size} x {config.image_size}; other sizes directly, or with \
`tile_size={config.image_size}` ({config.tile_decode}) |
| encoder | {config.num_hidden_layers} blocks, width {config.hidden_size}, {config.num_attention_heads} heads, RoI \
{config.roi_size} x {config.roi_size} |
| decoder | {config.decoder_base_channels} channels x {list(config.decoder_channel_multipliers)} |
| partition | lambda {config.complexity_exponent:g}, smallest region {config.min_region_size} px, sigma scale \
{config.sigma_scale:.4g} |
{metrics}
For the training data and the licence of the weights, ask the authors of `{source}`.
"""


def sit_card(config: dict, source: str, weights: str) -> str:
    """Return the README.md of a converted generator.

    Args:
        config (`dict`): its config.
        source (`str`): the name of the released file.
        weights (`str`): which of its weights were converted.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    condition = config["condition_channels"]
    statistics = (
        "in the config (`latents_mean`, `latents_std`)"
        if config["latents_mean"] is not None
        else "not in the config; a pipeline takes those of its tokenizer"
    )
    return f"""{front_matter("diffusers", ["sit", "flow-matching"])}
# SiT generator for GPSToken, {config["sample_size"]} tokens of {config["in_channels"]} channels

Converted from `{source}` ({weights} weights) with `gpstoken_hf`. The weights equal the checkpoint's bit for bit. See \
{PAPER}.

```python
from gpstoken_hf import SiTTransformer1DModel

transformer = SiTTransformer1DModel.from_pretrained("path/or/repo")
```

| | |
|---|---|
| size | {config["num_layers"]} blocks, width {width}, {config["num_attention_heads"]} heads |
| classes | 0 to {config["num_classes"] - 1}; {config["num_classes"]} means no class |
| condition | {f"initial Gaussians, {condition} channels, added at the input" if condition else "none"} |
| target | `{config["gaussian_target"]}`; channel statistics {statistics} |
| time | `forward` takes `timestep = 1000 (1 - t)` and returns `x_0 - x_1`, minus the checkpoint's velocity |

For the training data and the licence of the weights, ask the authors of `{source}`.
"""


def pipeline_card(pipeline: GPSTokenPipeline) -> str:
    """Return the README.md of an assembled pipeline."""
    vae, transformer = pipeline.vae.config, pipeline.transformer.config
    sources = []
    if pipeline.layout_transformer is not None:
        sources.append("a layout transformer with calibration")
    if pipeline.layout_bank is not None:
        sources.append(f"a bank of {len(pipeline.layout_bank)} layouts")
    layouts = " and ".join(sources) or (
        "generated with the texture" if pipeline.is_one_stage else "given by the caller"
    )
    return f"""{front_matter("diffusers", ["class-conditional"], "unconditional-image-generation")}
# GPSToken pipeline

Generates images from class labels: first a layout, then its texture. Assembled from converted components with \
`gpstoken_hf`. See {PAPER}.

```python
import torch
from gpstoken_hf import GPSTokenPipeline

pipe = GPSTokenPipeline.from_pretrained("path/or/repo").to("cuda")
out = pipe([0, 1], num_inference_steps=250, guidance_scale=1.5, generator=torch.Generator().manual_seed(0))
out.images[0].save("image.png")
```

| | |
|---|---|
| images | {vae.image_size} x {vae.image_size} |
| tokens | {transformer["sample_size"]} of 5 + {vae.texture_channels} numbers |
| classes | {transformer["num_classes"]} |
| layouts | {layouts} |
| sampler | {type(pipeline.scheduler).__name__}, 250 steps, guidance 1.5 for t in [0.2, 1] as in the release |
"""
