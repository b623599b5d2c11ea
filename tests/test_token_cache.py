# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The files of a token cache."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.shared.programs import ProgramError
from training.token_cache import STATISTICS, load_token_dataset, read_statistics


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "data").mkdir()
    for shard in range(2):
        rows = [np.full(6, shard + row, np.float32).tolist() for row in range(4)]
        pq.write_table(pa.table({"tokens": rows}), tmp_path / "data" / f"train-{shard:05d}.parquet")
    return tmp_path


def test_rows_come_in_the_order_of_the_shards(cache, monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    rows = load_token_dataset(cache)
    assert [row["tokens"][0] for row in rows] == [0, 1, 2, 3, 1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty"])
def test_a_damaged_shard_is_one_line_that_names_the_cache(cache, damage, monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    shard = cache / "data" / "train-00001.parquet"
    content = shard.read_bytes()
    broken = {"cut": content[: len(content) // 2], "zeros": bytes(len(content)), "empty": b""}[damage]
    shard.write_bytes(broken)
    with pytest.raises(ProgramError, match="cannot read the token cache") as caught:
        load_token_dataset(cache)
    assert str(cache) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[" * 100000, "[1, 2]", "{", ""])
def test_a_damaged_description_is_one_line_that_names_it(cache, content):
    (cache / STATISTICS).write_text(content)
    with pytest.raises(ValueError, match=STATISTICS) as caught:
        read_statistics(str(cache))
    assert "\n" not in str(caught.value)
