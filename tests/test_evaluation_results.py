# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Results keep their protocol, and results of differing protocols are not compared."""

import json
import math

import pytest

from gpstoken_hf.evaluation_results import compare, make_result, protocol_differences, read_result, write_result

PROTOCOL = {
    "images": 100,
    "resolution": 64,
    "crop": "centre",
    "resize": "bicubic",
    "antialias": True,
    "rounding": "none",
    "reference": "validation.parquet",
    "reference_checksum": "a1b2",
    "features": {"network": "inception", "layer": "pool_3", "weights": "ffff"},
    "seed": 0,
}


def result(changes=None, **scores):
    entry = {"name": "model, 16 tokens", "tokens": 16, "psnr": 20.0, "note": "text", **scores}
    return make_result({**PROTOCOL, **(changes or {})}, [entry], command=["program", "--option"])


def test_a_file_holds_everything(tmp_path):
    written = result(psnr=math.inf, ssim=math.nan)
    write_result(tmp_path / "results.json", written)
    assert "NaN" not in (tmp_path / "results.json").read_text()  # plain JSON, for every reader
    found = read_result(tmp_path / "results.json")
    assert found["protocol"] == PROTOCOL
    assert found["results"][0]["psnr"] == math.inf
    assert found["results"][0]["ssim"] is None
    assert found["run"]["command"] == ["program", "--option"]
    assert {"torch", "transformers", "diffusers"} <= set(found["run"]["versions"])


def test_equal_protocols_are_compared(tmp_path):
    write_result(tmp_path / "first.json", result(psnr=20.0))
    rows = compare(tmp_path / "first.json", result(psnr=21.5))
    assert rows == [{"name": "model, 16 tokens", "metric": "psnr", "first": 20.0, "second": 21.5, "difference": 1.5}]
    assert compare(result(psnr=math.inf), result(psnr=math.inf))[0]["difference"] == 0
    renamed = result(psnr=22.0)
    renamed["results"][0]["name"] = "another model"
    assert compare(result(), renamed)[0]["difference"] == 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", 99),
        ("crop", "none"),
        ("resize", "bilinear"),
        ("antialias", False),
        ("rounding", "8 bit"),
        ("reference_checksum", "c3d4"),
        ("seed", 1),
        ("features.layer", "logits"),
        ("features.weights", "0000"),
        ("features.network", "efficientnet_lite0"),
    ],
)
def test_a_difference_is_named(field, value):
    outer, _, inner = field.partition(".")
    changed = {outer: {**PROTOCOL[outer], inner: value} if inner else value}
    old = PROTOCOL[outer][inner] if inner else PROTOCOL[outer]
    with pytest.raises(ValueError, match="protocols must be equal") as error:
        compare(result(), result(changed))
    assert str(error.value).endswith(f"got {field} {old!r} and {value!r}")
    assert compare(result(), result(changed), ignore=[field])


def test_a_field_that_one_lacks_is_a_difference():
    assert protocol_differences({"a": 1}, {"a": 1, "b": {"c": None}}) == [("b.c", "absent", None)]
    assert protocol_differences({"a": (1, 2)}, {"a": [1, 2]}) == []


def test_nothing_to_compare():
    two = make_result(PROTOCOL, [{"name": "a"}, {"name": "b"}])
    with pytest.raises(ValueError, match="same name, got model, 16 tokens and a, b"):
        compare(result(), two)
    with pytest.raises(ValueError, match="different names"):
        make_result(PROTOCOL, [{"name": "a"}, {"name": "a"}])
    with pytest.raises(ValueError, match="different names"):
        make_result(PROTOCOL, [{"psnr": 1.0}])


@pytest.mark.parametrize(
    "content", ["text", "[1]", "{}", '{"format": 1}', '{"format": 1, "protocol": {}, "results": [1]}']
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match=r"other\.json must"):
        read_result(tmp_path / "other.json")


def test_results_are_json_as_they_are():
    json.dumps(result())
