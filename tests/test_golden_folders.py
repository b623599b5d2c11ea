# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Folders that version 0.1 saved go on loading, with the outputs that they had. This must stay green for ever."""

import golden_folders
import pytest
import torch
from diffusers import DiffusionPipeline
from golden_folders import FOLDERS
from safetensors.torch import load_file
from transformers import AutoModel

from gpstoken_hf import (
    AutoencoderGPSToken,
    GaussianLayoutBank,
    GPSTokenImageProcessor,
    GPSTokenModel,
    GPSTokenPipeline,
    SiTTransformer1DModel,
)

# Float32 with and without numba, and on other versions of PyTorch. Measured 2e-6 without numba, 0 with.
TOLERANCE = 1e-4
PIPELINE = FOLDERS / "pipeline"


@pytest.mark.parametrize(
    ("cls", "folder", "expected"),
    [
        (GPSTokenPipeline, PIPELINE, GPSTokenPipeline),
        (DiffusionPipeline, PIPELINE, GPSTokenPipeline),
        (GPSTokenModel, PIPELINE / "vae", GPSTokenModel),
        (AutoModel, PIPELINE / "vae", GPSTokenModel),
        (SiTTransformer1DModel, PIPELINE / "transformer", SiTTransformer1DModel),
        (SiTTransformer1DModel, PIPELINE / "layout_transformer", SiTTransformer1DModel),
        (GaussianLayoutBank, PIPELINE / "layout_bank", GaussianLayoutBank),
        (AutoencoderGPSToken, FOLDERS / "autoencoder", AutoencoderGPSToken),
        (GPSTokenImageProcessor, PIPELINE / "image_processor", GPSTokenImageProcessor),
    ],
)
def test_a_saved_folder_loads(cls, folder, expected):
    assert type(cls.from_pretrained(folder)) is expected


def test_the_outputs_are_those_that_were_recorded():
    outputs = golden_folders.outputs(
        GPSTokenPipeline.from_pretrained(PIPELINE),
        AutoencoderGPSToken.from_pretrained(FOLDERS / "autoencoder"),
        GPSTokenImageProcessor.from_pretrained(PIPELINE / "image_processor"),
    )
    recorded = load_file(FOLDERS / "outputs.safetensors")
    assert set(outputs) == set(recorded)
    for name, expected in recorded.items():
        assert outputs[name].shape == expected.shape, name
        assert torch.isfinite(expected).all(), name
        assert expected.std() > 1e-3, name
        assert (outputs[name] - expected).abs().max() <= TOLERANCE, name
