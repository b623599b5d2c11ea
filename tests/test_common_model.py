# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""transformers' common model tests on GPSTokenModel."""

import unittest
from copy import deepcopy
from unittest.mock import patch

import torch
import torch.nn.functional as F
from transformers_suite import NOT_APPLICABLE, ListedSkips, load_suite

from gpstoken_hf.configuration_gpstoken import GPSTokenConfig
from gpstoken_hf.layout import GaussianLayout
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.partition import partition_images

common = load_suite("modeling", "ModelTesterMixin")


class GPSTokenModelTester:
    """A tiny model and a batch of noise, as the suite wants them."""

    def __init__(self, parent):
        self.parent = parent
        self.batch_size = 3
        self.image_size = 16
        self.num_hidden_layers = 2
        self.hidden_size = 32
        self.num_attention_heads = 2
        # As many tokens as columns: the suites of transformers 5.4 make an attention mask as long as an image is wide.
        self.seq_length = self.image_size
        self.is_training = True

    def get_config(self):
        return GPSTokenConfig.preset(
            "tiny",
            image_size=self.image_size,
            num_tokens=self.seq_length,
            num_hidden_layers=self.num_hidden_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
        )

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        pixel_values = torch.rand(self.batch_size, 3, self.image_size, self.image_size, generator=generator) * 2 - 1
        return self.get_config(), {"pixel_values": pixel_values}


class GPSTokenModelWithLoss(GPSTokenModel):
    """With the plainest loss: the suite trains models that return one, and a tokenizer's loss is its trainer's."""

    def forward(self, pixel_values, **kwargs):
        output = super().forward(pixel_values, **kwargs)
        output.loss = F.mse_loss(output.sample, pixel_values)
        return output


class GPSTokenModelTest(ListedSkips, common.ModelTesterMixin, unittest.TestCase):
    suite = "modeling"
    all_model_classes = (GPSTokenModel,)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = GPSTokenModelTester(self)
        # The suite sets every config field with `_std` in its name to a tiny number, to quiet initialisers. Ours,
        # `latents_std`, is a list of statistics, and its type is checked.
        self._apply(patch.object(common, "_config_zero_init", deepcopy, create=True))
        # It also gives every config the fields `norm_eps` and the like. A saved config of ours may not hold them.
        self._apply(patch.object(common, "set_config_for_less_flaky_test", lambda config: None, create=True))
        # Tests are adapted by name rather than overridden, so that a test that transformers drops is not called.
        test = self._testMethodName
        if test == "test_model_get_set_embeddings":
            self.skipTest(NOT_APPLICABLE["modeling"][test])
        if test.startswith("test_training"):
            self.all_model_classes = (GPSTokenModelWithLoss,)
        if test == "test_model_forward_default_config_values":
            # The suite runs it only for the models that transformers itself ships.
            self._apply(patch.dict(common.MODEL_MAPPING_NAMES, {"gpstoken": "GPSTokenModel"}))

    def _apply(self, patcher):
        patcher.start()
        self.addCleanup(patcher.stop)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        mask = inputs.pop("attention_mask", None)
        if mask is not None:
            # The mask of tokens is part of a layout here.
            layout = partition_images(
                inputs["pixel_values"].float(),
                self.model_tester.seq_length,
                min_region_size=self.model_tester.get_config().min_region_size,
            )
            inputs["layout"] = GaussianLayout(layout.gaussians, layout.boxes, mask)
        return inputs
