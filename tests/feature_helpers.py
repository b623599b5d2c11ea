# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""An Inception of torch-fidelity's class with random weights, and its weights as a file."""

import io

import pytest
import torch


def random_inception(seed=0):
    """Random weights that keep the size of features from layer to layer."""
    source = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="needs torch-fidelity")

    class Random(source.FeatureExtractorInceptionV3):
        def load_state_dict(self, state, *arguments, **options):
            """Keep the weights that the constructor has drawn."""

    file = io.BytesIO()
    torch.save({}, file)
    file.seek(0)
    torch.manual_seed(seed)
    network = Random("random", ["2048", "logits_unbiased"], feature_extractor_weights_path=file)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.1)
    return network


def save_inception(path, seed=0):
    torch.save(torch.nn.Module.state_dict(random_inception(seed)), path)
