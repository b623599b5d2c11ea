# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""transformers' common config tests on GPSTokenConfig."""

import unittest

from transformers_suite import load_suite

from gpstoken_hf.configuration_gpstoken import PRESETS, GPSTokenConfig

common = load_suite("configuration", "ConfigTester")


class GPSTokenConfigTest(unittest.TestCase):
    def setUp(self):
        # to_json_string is compared with what was given: JSON knows no tuples
        tiny = {key: list(value) if isinstance(value, tuple) else value for key, value in PRESETS["tiny"].items()}
        self.config_tester = common.ConfigTester(
            self, config_class=GPSTokenConfig, has_text_modality=False, common_properties=None, **tiny
        )

    def test_config(self):
        self.config_tester.run_common_tests()
