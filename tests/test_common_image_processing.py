# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""transformers' common image processor tests on GPSTokenImageProcessor."""

import unittest

from transformers_suite import ListedSkips, load_suite

from gpstoken_hf.image_processing_gpstoken import GPSTokenImageProcessor

common = load_suite("image_processing", "ImageProcessingTester", "ImageProcessingTestMixin")


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


class GPSTokenImageProcessingTest(ListedSkips, common.ImageProcessingTestMixin, unittest.TestCase):
    suite = "image_processing"
    image_processor_tester_class = GPSTokenImageProcessingTester

    def setUp(self):
        super().setUp()
        if self._testMethodName == "test_call_numpy_4_channels":
            # The suites before transformers 5.22 expect four channels to stay four.
            self.image_processor_tester.do_convert_rgb = False
