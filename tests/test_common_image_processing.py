# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""transformers' common image processor tests on GPSTokenImageProcessor.

| what of the suite does not run | why |
|---|---|
| `test_backends_equivalence*`, `test_save_load_backends*`, `test_pil_can_run_without_torchvision` | one backend |
| `test_image_processor_preprocess_arguments` | it looks for two validations older than transformers 5 |
| `test_override_instance_attributes_...` | for image_mean as a list; transformers 5 itself keeps a tuple |
| `test_cast_dtype_device` | runs only for processors of text models (`test_cast_dtype`) |
| `test_can_compile_torchvision_backend` | marked slow, and needs an accelerator |
| `PostProcessSemanticSegmentationTestMixin`, `AnnotationFormatTestMixin` | no segmentation, no annotations |
"""

import unittest

from transformers_suite import load_suite

from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor

common = load_suite("image_processing")


class GPSTokenImageProcessingTester(common.ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("do_resize", True)
        kwargs.setdefault("size", {"shortest_edge": 20})
        kwargs.setdefault("do_center_crop", True)
        kwargs.setdefault("crop_size", {"height": 18, "width": 18})
        kwargs.setdefault("max_resolution", 80)
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"torchvision": GPSTokenImageProcessor}


class GPSTokenImageProcessingTest(common.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = GPSTokenImageProcessingTester

    def test_every_test_that_should_run_is_listed_in_the_suite(self):
        for name in ("test_call_pil", "test_call_numpy", "test_call_pytorch", "test_call_numpy_4_channels"):
            assert hasattr(common.ImageProcessingTestMixin, name)
