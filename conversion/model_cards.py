# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The model cards that the converters write. Numbers of the paper are marked as the paper's, not as measured."""

from __future__ import annotations

from gpstoken_hf.layout_bank import GaussianLayoutBank

PAPER = "[GPSToken: Gaussian Parameterized Spatially-adaptive Tokenization](https://arxiv.org/abs/2509.01109)"


def front_matter(library: str, tags: list[str], pipeline_tag: str | None = None) -> str:
    """The YAML head of a model card. It names no licence: that of the checkpoint is not known to the converter."""
    lines = ["---", f"library_name: {library}"]
    if pipeline_tag:
        lines.append(f"pipeline_tag: {pipeline_tag}")
    lines += ["tags:", *[f"- {tag}" for tag in tags], "---", ""]
    return "\n".join(lines)


def layout_bank_card(bank: GaussianLayoutBank, source: str) -> str:
    """README.md of a converted layout bank."""
    counts = bank.class_counts
    return f"""{front_matter("diffusers", ["gpstoken", "layout-bank"])}
# Layout bank for GPSToken

{len(bank)} layouts of {len(counts)} classes ({min(counts.values())} to {max(counts.values())} per class, layouts of \
{", ".join(str(length) for length in sorted(bank.token_counts))} tokens), converted from `{source}` with \
`gpstoken_hf`. A layout is a set of 2D Gaussians that says where the tokens of an image lie; see {PAPER}.

```python
import torch
from gpstoken_hf import GaussianLayoutBank

bank = GaussianLayoutBank.from_pretrained("path/or/repo")
layouts = bank.sample([{bank.class_ids[0]}, {bank.class_ids[-1]}], generator=torch.Generator().manual_seed(0))
layouts.gaussians       # (B, L, 5): sigma_x, sigma_y, rho, mu_x, mu_y
layouts.attention_mask  # (B, L): 1 for a token, 0 for padding
```

The converter copied the numbers and did not change them; for the data and the licence ask the source of `{source}`.
"""
