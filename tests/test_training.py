# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The parts of the training programs: options, data order, average, schedule, signals, and what imports what."""

import argparse
import ast
import io
import itertools
import json
import math
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

import gpstoken_hf
from pipelines.shared.programs import ProgramError, run_program
from training import (
    ablate_training,
    cache_tokens,
    compare_recipes,
    compare_stages,
    make_digits,
    profile_training,
    train_sit,
    train_tokenizer,
)
from training.data import (
    BatchPlan,
    ImageBatches,
    PartitionSettings,
    RowOrder,
    TokenCounts,
    batch_loader,
    batches_of,
    load_image_dataset,
    load_validation_images,
)
from training.ema import ExponentialMovingAverage
from training.estimates import measure
from training.optimization import learning_rate_factor, run_progress
from training.options import parse_options
from training.pictures import center_crop, decode_image, image_to_array, native_crop, random_resized_crop
from training.records import MetricLog, plot_metrics, read_metrics
from training.streams import ImageStream, ShuffledStream
from training.task import StopRequest
from training.trackers import Meter
from training.train_sit import noised_condition

PARTITION = PartitionSettings(complexity_exponent=2.5, min_region_size=4, sigma_scale=2 / 3)


def stripes(size=(40, 48), seed=0):
    """A picture with something to partition: blocks of random colours under a gradient."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 200, size=(5, 6, 3)).repeat(size[0] // 5, 0).repeat(size[1] // 6, 1)
    return (blocks + np.linspace(0, 55, size[1])[None, :, None]).astype(np.uint8)


class Rows:
    """The part of a dataset that the loader uses."""

    def __init__(self, num_rows):
        self.images = [stripes(seed=index) for index in range(num_rows)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": index % 3}


def plan(source, **changes):
    settings = {
        "seed": 5,
        "resolutions": [16, 32],
        "weights": [1, 1],
        "base_resolution": 16,
        "batch_size": 8,
        **changes,
    }
    return BatchPlan(source, **settings)


def image_batches(source, **changes):
    settings = {
        "image_column": "image",
        "seed": 5,
        "crop": "random_resized",
        "min_crop_scale": 0.3,
        "flip": "random",
        "token_counts": TokenCounts(4, 8, 16, per_image=True),
        "partition": PARTITION,
        **changes,
    }
    return ImageBatches(source, **settings)


def take(iterable, count):
    return list(itertools.islice(iter(iterable), count))


# --------------------------------------------------------------------------------------------------------- options


def test_preset_file_gives_defaults_and_the_command_line_wins(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        "preset: tiny\nconfig_overrides: {num_tokens: 6, decoder_channel_multipliers: [1, 2]}\n"
        "resolutions: [32, 48]\nrandom_flip: false\nuse_ema: true\nlearning_rate: 1.0e-3\nmax_train_steps: 7\n"
    )
    options = parse_options(
        train_tokenizer.make_parser(),
        ["--config", str(preset), "--learning_rate", "0.5", "--resolutions", "64", "--output_dir", "out"],
    )
    assert options.learning_rate == 0.5
    assert options.resolutions == [64]
    assert options.random_flip is False
    assert options.use_ema is True
    assert options.max_train_steps == 7
    config = train_tokenizer.resolve_config(options)
    assert (config.num_tokens, list(config.decoder_channel_multipliers)) == (6, [1, 2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "got 'learning_rat'"),
        ("- a\n- b", "must hold a mapping"),
        ("a: [1", "must be valid YAML"),
        ("learning_rate: true", "must have a value, got True"),
    ],
)
def test_bad_preset_files_are_refused(tmp_path, text, message):
    preset = tmp_path / "preset.yaml"
    preset.write_text(text)
    with pytest.raises(ProgramError, match=message):
        parse_options(train_tokenizer.make_parser(), ["--config", str(preset), "--output_dir", "out"])


def test_shipped_presets_resolve():
    for name, parser in (
        ("nano", train_tokenizer),
        ("nano_mixed", train_tokenizer),
        ("s64", train_tokenizer),
        ("m128", train_tokenizer),
        ("l256", train_tokenizer),
        ("layout_s", train_sit),
        ("texture_xl", train_sit),
        ("digits_tokenizer", train_tokenizer),
        ("digits_sit", train_sit),
    ):
        extra = ["--tokens_dir", "t"] if parser is train_sit else []
        if name == "digits_sit":
            extra += ["--stage", "layout"]
        if name == "nano_mixed":
            extra += ["--pretrained_model_name_or_path", gpstoken_hf.bundled("gpstoken-nano")]
        options = parse_options(
            parser.make_parser(), ["--config", f"training/presets/{name}.yaml", "--output_dir", "out", *extra]
        )
        if parser is train_tokenizer:
            config = train_tokenizer.resolve_config(options)
            assert train_tokenizer.Sizes.of(options, config).validation


def test_switches_have_one_spelling(tmp_path):
    parser = train_tokenizer.make_parser()
    command = ["--output_dir", str(tmp_path)]
    assert parser.parse_args(command).random_flip is True
    assert parser.parse_args([*command, "--no_random_flip"]).random_flip is False
    assert parser.parse_args([*command, "--no_random_flip", "--random_flip"]).random_flip is True
    programs = (train_tokenizer, train_sit, cache_tokens, make_digits, profile_training)
    for program in (*programs, ablate_training, compare_recipes, compare_stages):
        options = [name for action in program.make_parser()._actions for name in action.option_strings]
        # argparse makes --help; --dry-run is an alias.
        assert [name for name in options if "-" in name.lstrip("-")] in ([], ["--dry-run"])


def test_programs_import_no_other_program():
    folder = Path(train_sit.__file__).parent
    sources = {path.stem: ast.parse(path.read_text()) for path in folder.glob("*.py")}
    programs = {
        name
        for name, tree in sources.items()
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    }
    assert programs == {
        *("train_tokenizer", "train_sit", "cache_tokens", "make_digits", "profile_training"),
        *("ablate_training", "compare_recipes", "compare_stages", "train_dit"),
    }
    for name, tree in sources.items():
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            assert not {f"training.{program}" for program in programs} & set(modules), name


def test_dry_run_prints_the_resolved_configuration_and_writes_nothing(tmp_path, capsys):
    code = train_tokenizer.main(
        ["--preset", "tiny", "--max_train_steps", "3", "--output_dir", str(tmp_path / "run"), "--dry-run"]
    )
    printed = yaml.safe_load(capsys.readouterr().out)
    assert code == 0
    assert printed["max_train_steps"] == 3
    assert printed["model_config"]["hidden_size"] == 32
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("preset", "parameters", "phases"),
    [
        ("m128", 128.5, ["reconstruction", "all_losses"]),
        ("layout_s", 32.7, ["training"]),
        ("texture_xl", 676.2, ["training"]),
    ],
)
def test_dry_run_of_the_papers_recipes_estimates_memory_and_time(preset, parameters, phases, capsys):
    program = train_sit if phases == ["training"] else train_tokenizer
    assert program.main(["--config", f"training/presets/{preset}.yaml", "--dry-run"]) == 0
    estimate = yaml.safe_load(capsys.readouterr().out)["estimate"]
    assert estimate["parameters_million"] == pytest.approx(parameters, rel=0.01)
    assert {"device", "peak_teraflops", "efficiency"} <= estimate["assumptions"].keys()
    for count in (1, 8):
        section = estimate[f"gpus_{count}"]
        assert [name for name in section if isinstance(section[name], dict)] == phases
        for name in phases:
            assert estimate["weights_gradients_optimizer_average_gib"] < section[name]["memory_gib"] < 80
            images = section[name]["images_at_a_time"] * section[name]["gradient_accumulation_steps"]
            assert images >= section["images_per_gpu"]
    speedup = estimate["gpus_1"]["hours"] / estimate["gpus_8"]["hours"]
    assert 4 < speedup <= 8.3


def test_counted_costs_are_those_of_the_operations():
    """A linear layer: 2 n m operations a row; backward keeps its input, and the sigmoid its output."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = torch.nn.Sequential(torch.nn.Linear(100, 300), torch.nn.Sigmoid())

        def forward(size):
            layer(torch.empty(size, 100, requires_grad=True))

        cost = measure(forward, "no")
        assert cost.operations == 2 * 100 * 300
        assert cost.saved_bytes == 4 * (100 + 300)
        assert measure(forward, "bf16").saved_bytes < cost.saved_bytes


def test_a_run_needs_a_folder_unless_it_is_dry(capsys):
    assert run_program(train_tokenizer.main, ["--preset", "tiny", "--max_train_steps", "3"]) == 2
    assert capsys.readouterr().err == "error: --output_dir must be given, got none\n"


# -------------------------------------------------------------------------------------------------------- schedule


def test_progress_is_steps_or_time_whichever_is_further():
    assert run_progress(25, 0.0, 100, None) == 0.25
    assert run_progress(25, 60.0, 100, 2.0) == 0.5
    assert run_progress(75, 60.0, 100, 2.0) == 0.75
    assert run_progress(10**9, 0.0, 100, None) == 1.0


def test_schedules_are_those_of_transformers():
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    total = 40
    for name, make in (("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        reference = make(optimizer, num_warmup_steps=0, num_training_steps=total)
        for step in range(total):
            ours = learning_rate_factor(name, step, run_progress(step, 0.0, total, None), 0, 0.0)
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
            optimizer.step()
            reference.step()


def test_warmup_and_final_ratio():
    assert learning_rate_factor("constant", 0, 0.0, 10, 0.0) == 1
    assert learning_rate_factor("constant_with_warmup", 4, 0.5, 10, 0.0) == 0.5
    assert learning_rate_factor("cosine", 100, 1.0, 10, 0.1) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="cosin'"):
        learning_rate_factor("cosin", 0, 0.0, 0, 0.0)


# ------------------------------------------------------------------------------------------------------ data order


def test_row_order_visits_every_row_once_per_epoch_in_another_order():
    order = RowOrder(7, seed=3)
    epochs = [[order[epoch * 7 + place] for place in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [RowOrder(7, seed=3)[7 + place] for place in range(7)] == epochs[1]
    assert [RowOrder(7, seed=4)[place] for place in range(7)] != epochs[0]


def test_plan_resumes_where_it_was():
    source = Rows(11)
    whole = take(plan(source), 12)
    for first in (1, 5, 11):
        assert take(plan(source, first_batch=first), 12 - first) == whole[first:]


def test_processes_share_the_samples_and_the_resolution():
    source = Rows(11)
    ranks = [take(plan(source, rank=rank, world_size=3), 10) for rank in range(3)]
    positions = sorted(p for batches in ranks for batch in batches for p in batch.positions)
    assert positions == list(range(len(positions)))
    for parts in zip(*ranks):
        assert len({part.resolution for part in parts}) == 1


def test_batches_keep_their_pixels():
    batches = take(plan(Rows(11)), 30)
    assert {batch.resolution for batch in batches} == {16, 32}
    assert {batch.resolution**2 * len(batch.rows) for batch in batches} == {16 * 16 * 8}


def test_loader_gives_the_same_batches_whatever_its_workers():
    source = Rows(11)
    alone = take(batch_loader(image_batches(source), plan(source), 0, False), 5)
    with batches_of(batch_loader(image_batches(source), plan(source, first_batch=2), 2, False)) as batches:
        shared = take(batches, 3)
    for expected, got in zip(alone[2:], shared):
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            assert torch.equal(value, got[name]), name


def test_loader_leaves_the_global_generator_alone():
    """A resumed run makes a new loader; were it to draw from the global generator, what follows would differ."""
    source = Rows(3)
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    next(iter(batch_loader(image_batches(source), plan(source), 0, False)))
    assert torch.equal(torch.get_rng_state(), expected)


def test_batch_contents():
    source = Rows(11)
    batch = image_batches(source, label_column="label")[take(plan(source, resolutions=[32], weights=[1]), 1)[0]]
    images, mask = batch["pixel_values"], batch["attention_mask"]
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert mask.sum(1).min() >= 16  # 4 to 8 tokens at 16 x 16, four times that at 32 x 32
    assert mask.sum(1).max() <= 32
    assert batch["boxes"].shape == (2, mask.shape[1], 4)
    assert batch["init_gaussians"].shape == (2, mask.shape[1], 5)
    assert batch["labels"].tolist() == [
        row % 3 for row in take(plan(source, resolutions=[32], weights=[1]), 1)[0].rows
    ]


def test_a_number_of_tokens_per_batch_needs_no_padding_and_is_one_for_all_processes():
    source = Rows(11)
    batches = image_batches(source, token_counts=TokenCounts(4, 12, 16, per_image=False))
    ranks = [take(plan(source, rank=rank, world_size=2), 12) for rank in range(2)]
    densities = set()
    for requests in zip(*ranks):
        first, second = (batches[request] for request in requests)
        assert first["attention_mask"].all()
        assert first["attention_mask"].shape == second["attention_mask"].shape
        densities.add(first["attention_mask"].shape[1] / first["pixel_values"].shape[-1] ** 2)
    assert len(densities) > 4
    assert 4 / 16**2 <= min(densities) <= max(densities) <= 12 / 16**2


def test_flip_and_center_crop():
    source = Rows(1)
    request = take(plan(source, resolutions=[16], weights=[1], batch_size=1), 1)[0]
    plain = image_batches(source, crop="center", flip="never")[request]["pixel_values"]
    flipped = image_batches(source, crop="center", flip="always")[request]["pixel_values"]
    assert torch.equal(flipped, plain.flip(-1))
    expected = image_to_array(Image.fromarray(source.images[0][:, 4:44]).resize((16, 16), Image.Resampling.BICUBIC))
    # Worst error seen: one level of 255, in a few pixels; Pillow's resize of a box is not that of the cut-out.
    torch.testing.assert_close(plain[0], torch.from_numpy(expected), atol=1.01 / 127.5, rtol=0)


def test_native_crops_are_parts_of_the_image():
    pixels = stripes((40, 48))
    rng = np.random.default_rng(0)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (16, 16), axis=(0, 1)).reshape(-1, 3, 16, 16)
    places = set()
    for _ in range(20):
        crop = np.asarray(native_crop(Image.fromarray(pixels), 16, rng)).transpose(2, 0, 1)
        (found,) = np.nonzero((windows == crop).all(axis=(1, 2, 3)))
        assert len(found)
        places.add(int(found[0]))
    assert len(places) > 10
    # Smaller images are enlarged.
    assert native_crop(Image.fromarray(pixels), 64, rng).size == (64, 64)


def test_native_and_resized_crops_are_mixed():
    source = Rows(1)
    request = take(plan(source, resolutions=[16], weights=[1], batch_size=64), 1)[0]
    mixed, resized = (
        image_batches(source, crop="center", flip="never", native_crop_prob=prob)[request]["pixel_values"]
        for prob in (0.25, 0.0)
    )
    share = (mixed != resized).flatten(1).any(1).float().mean().item()
    assert 0.1 < share < 0.45


def test_crops_stay_inside_of_narrow_images():
    rng = np.random.default_rng(0)
    for size in ((1, 9), (9, 1), (3, 3), (200, 31)):
        image = Image.fromarray(np.zeros((*size, 3), np.uint8))
        assert random_resized_crop(image, 16, rng, 0.01).size == (16, 16)
        assert center_crop(image, 16).size == (16, 16)


def test_token_counts_are_log_uniform_and_scale_with_the_area():
    counts = TokenCounts(4, 64, 16, per_image=True)
    drawn = np.array(counts.draw(16, 4000, np.random.default_rng(0)))
    assert (drawn.min(), drawn.max()) == (4, 64)
    assert abs(np.mean(drawn <= 16) - 0.5) < 0.05  # 16 is the geometric middle
    assert counts.bounds(32) == (16, 256)
    per_batch = TokenCounts(4, 64, 16, per_image=False).draw(16, 9, np.random.default_rng(0))
    assert len(per_batch) == 9
    assert len(set(per_batch)) == 1


def test_an_unreadable_row_is_named():
    with pytest.raises(ProgramError, match="row 3 must be a readable image"):
        decode_image({"bytes": b"not an image", "path": None}, "row 3")


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_by_name_with_splits(tmp_path, streaming):
    """A folder that load_dataset understands goes the way of a name on the Hub."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.Value("int64")})
    for split, count in (("train", 5), ("test", 2)):
        rows = [{"photo": Image.fromarray(stripes(seed=seed)), "label": seed} for seed in range(count)]
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / f"{split}-0.parquet")
    # Said aloud: left to itself, load_dataset finds "test" in the name of this test's folder.
    files = "".join(f"  - {{split: {split}, path: data/{split}-*.parquet}}\n" for split in ("train", "test"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    options = parse_options(
        train_tokenizer.make_parser(),
        [
            *("--dataset_name", str(tmp_path), "--image_column", "photo", "--max_train_samples", "3"),
            *("--cache_dir", str(tmp_path / "cache"), "--output_dir", "out"),
            *(["--streaming"] if streaming else []),
        ],
    )
    train, held_out = load_image_dataset(options), load_image_dataset(options, split="test")
    assert [row["label"] for row in train] == [0, 1, 2]
    images = load_validation_images(held_out, "photo", 9, 16)
    assert images.shape == (2, 3, 16, 16)
    with pytest.raises(ProgramError, match="got 'image'"):
        load_image_dataset(argparse.Namespace(**{**vars(options), "image_column": "image"}))


def numbered_stream(num_rows, num_shards):
    datasets = pytest.importorskip("datasets")
    rows = [{"number": number} for number in range(num_rows)]
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=num_shards)


def numbers(batches):
    return [row["number"] for batch in batches for _, row in batch.rows]


@pytest.mark.parametrize("shuffle_buffer_size", [1, 7, 100])
def test_streams_resume_at_their_place(shuffle_buffer_size):
    stream = numbered_stream(23, 3)
    settings = {"shuffle_buffer_size": shuffle_buffer_size}
    first = plan(stream, **settings)
    iterator, whole, places = iter(first), [], []
    for number in range(12):
        whole.append(next(iterator))
        if number > 2:  # workers fetch ahead of what is used
            places.append(first.place_of(number - 2))
    for number, place in enumerate(places, 1):
        place = json.loads(json.dumps(place))
        resumed = plan(stream, first_batch=number, place=place, **settings)
        assert resumed.place_of(number) == place
        assert take(resumed, 12 - number) == whole[number:]
        # Without a place, as from a checkpoint of an older version, the stream is read from its beginning.
        assert take(plan(stream, first_batch=number, **settings), 12 - number) == whole[number:]
    seen = numbers(whole)
    assert sorted(seen[:23]) == sorted(seen[23:46]) == list(range(23))
    assert seen[:23] not in (seen[23:46], list(range(23)))


def test_a_resumed_stream_reads_one_shard_and_one_block():
    reads = []

    class Stream(ImageStream):
        def rows(self, shard, start=0):
            for place, row in super().rows(shard, start):
                reads.append((shard, place))
                yield place, row

    stream = Stream(numbered_stream(40, 4))
    whole = ShuffledStream(stream, 0, 0, 1, 5)
    rows = [whole[index] for index in range(38)]
    start = whole.start_before(37)
    reads.clear()
    resumed = ShuffledStream(stream, 0, 0, 1, 5, start)
    assert resumed[37] == rows[37]
    assert len(reads) <= 6


@pytest.mark.parametrize(("num_shards", "world_size"), [(4, 2), (3, 2), (1, 2), (2, 3)])
def test_processes_share_a_stream(num_shards, world_size):
    """With as many turns as shards an epoch is shared exactly; with fewer shards each takes every N-th row."""
    stream = numbered_stream(24, num_shards)
    seen = []
    for rank in range(world_size):
        rows = ShuffledStream(ImageStream(stream), 3, rank, world_size, 5)
        seen.append([rows[index][1]["number"] for index in range(24 * (2 if num_shards == 3 else 1) // world_size)])
    together = sorted(number for part in seen for number in part)
    if num_shards != 3:
        assert together == list(range(24))
    else:  # six turns of two epochs, three for each process
        assert together == sorted([*range(24)] * 2)
    assert seen[0] != seen[1]


def test_held_out_rows_are_not_in_the_stream():
    rows, rest = ImageStream(numbered_stream(12, 3)).hold_out(5)
    assert [row["number"] for row in rows] == [0, 1, 2, 3, 4]
    assert sorted(numbers(take(plan(rest, resolutions=[16], weights=[1], batch_size=7), 1))) == list(range(5, 12))
    assert ImageStream(numbered_stream(3, 1)).hold_out(9)[1].held_out == [3]


@pytest.mark.parametrize(("num_rows", "world_size"), [(0, 1), (2, 3)])
def test_a_stream_without_rows_for_a_process_is_refused(num_rows, world_size):
    stream = ImageStream(numbered_stream(3, 1), held_out=[3 - num_rows])
    with pytest.raises(ProgramError, match=f"holds no rows for process {world_size - 1} of {world_size}"):
        ShuffledStream(stream, 0, world_size - 1, world_size, 4)[0]


def test_webdataset_archives_are_streamed(tmp_path):
    """Two tar files as any tar makes them; the label is text, which `cls` decodes to a number."""
    pytest.importorskip("datasets")
    files = []
    for shard in range(2):
        files.append(tmp_path / f"images-{shard}.tar")
        with tarfile.open(files[-1], "w") as archive:
            for index in range(4):
                picture = io.BytesIO()
                Image.fromarray(stripes(seed=index)).save(picture, format="PNG")
                for name, data in (
                    (f"{shard}{index}.png", picture.getvalue()),
                    (f"{shard}{index}.cls", b"%d" % index),
                ):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    command = ["--train_data_files", *map(str, files), "--streaming", "--image_column", "png", "--output_dir", "out"]
    options = parse_options(train_tokenizer.make_parser(), [*command, "--cache_dir", str(tmp_path / "cache")])
    stream = load_image_dataset(options)
    assert ImageStream(stream).num_shards == 2
    batches = image_batches(None, image_column="png", label_column="cls")
    requests = take(plan(stream, resolutions=[16], weights=[1], batch_size=8), 3)
    assert all(sorted(batches[request]["labels"].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3] for request in requests)
    assert requests[0].rows != requests[1].rows


# -------------------------------------------------------------------------------------------------- unusable samples


def encoded(image, format="PNG"):
    data = io.BytesIO()
    image.save(data, format=format)
    return {"bytes": data.getvalue(), "path": None}


def unusable_images():
    whole = encoded(Image.fromarray(stripes()))["bytes"]
    return {
        "must be a readable image": {"bytes": b"rubbish", "path": None},
        "readable image, got: image file is truncated": {"bytes": whole[: len(whole) // 2], "path": None},
        "got 1 x 40": encoded(Image.new("RGB", (1, 40))),
        "got 40 x 1": encoded(Image.new("RGB", (40, 1))),
        "mode I(;16)?": encoded(Image.new("I;16", (40, 40))),
        "mode F": encoded(Image.new("F", (40, 40)), "TIFF"),
        "readable image": None,
    }


@pytest.mark.parametrize("what", unusable_images())
def test_an_unusable_sample_is_named(what):
    with pytest.raises(ProgramError, match=f"row 3 .*{what}"):
        decode_image(unusable_images()[what], "row 3")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_of_8_bits_are_used(mode):
    image = Image.fromarray(stripes()).convert(mode)
    assert decode_image(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), "row 3").mode == "RGB"


class PartlyUnusable(Rows):
    """Rows whose numbers divide by 3 are unusable."""

    def __getitem__(self, index):
        return {"image": np.zeros((1, 9, 3), np.uint8), "label": 0} if index % 3 == 0 else super().__getitem__(index)


def test_an_unusable_sample_is_replaced_by_one_that_follows():
    source = PartlyUnusable(11)
    requests = take(plan(source, resolutions=[16], weights=[1]), 3)
    batches = image_batches(source, label_column="label")
    for request in requests:
        bad = [row for row in [*request.rows, *request.spares] if row % 3 == 0]
        batch = batches[request]
        assert len(batch["pixel_values"]) == len(batch["labels"]) == 8
        reported = [int(text.split()[1]) for text in batch["unusable"]]
        assert reported
        assert set(reported) <= set(bad)
        assert {row for row in request.rows if row % 3 == 0} <= set(reported)
        assert all(torch.equal(value, batches[request][name]) for name, value in batch.items() if name != "unusable")
    kept = image_batches(source, replace_unusable=False)[requests[0]]
    assert len(kept["pixel_values"]) == sum(row % 3 != 0 for row in requests[0].rows)
    nothing = replace(requests[0], rows=[0, 3], positions=[0, 1], spares=[6])
    assert batches[nothing].keys() == {"unusable"}
    assert len(batches[nothing]["unusable"]) == 3


@pytest.mark.parametrize("label", [None, -1, "cat", 1.5, True])
def test_a_label_that_is_no_class_makes_a_sample_unusable(label):
    class Labelled(Rows):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "label": label}

    request = take(plan(Labelled(3)), 1)[0]
    (text, *_) = image_batches(Labelled(3), label_column="label")[request]["unusable"]
    assert f"must have a label that is an integer >= 0, got {label!r}" in text


# --------------------------------------------------------------------------------------------------------- average


def test_average_follows_its_recursion_and_leaves_the_module_as_it_was():
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2).double()
    ema = ExponentialMovingAverage(module, decay=0.5)
    expected = module.weight.detach().clone()
    for update in range(6):
        with torch.no_grad():
            module.weight.add_(torch.randn_like(module.weight))
        rate = min(0.5, (1 + update) / (10 + update))
        expected = rate * expected + (1 - rate) * module.weight.detach()
        ema.update(module)
    own = module.weight.detach().clone()
    with ema.applied_to(module):
        # The average is kept in float32.
        torch.testing.assert_close(module.weight.detach(), expected, atol=1e-6, rtol=0)
    assert torch.equal(module.weight, own)


def test_average_is_saved_and_loaded(tmp_path):
    module = torch.nn.Linear(3, 2)
    ema = ExponentialMovingAverage(module, decay=0.9)
    with torch.no_grad():
        module.weight.mul_(2)
    ema.update(module)
    other = ExponentialMovingAverage(torch.nn.Linear(3, 2), decay=0.9)
    ema.save(tmp_path / "ema.safetensors")
    other.load(tmp_path / "ema.safetensors")
    assert other.num_updates == 1
    assert torch.equal(other.shadow["weight"], ema.shadow["weight"])
    for module in (torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(4, 2)):
        with pytest.raises(ValueError, match="must be of this module"):
            ExponentialMovingAverage(module, 0.9).load(tmp_path / "ema.safetensors")


# ---------------------------------------------------------------------------------------------- records and signals


def test_metric_log_forgets_what_comes_after_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, resumed_step=0)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 4, "train')  # cut short by a crash
    MetricLog(path, resumed_step=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert all(math.isfinite(json.loads(line)["train/loss"]) for line in path.read_text().splitlines())


def test_curves_are_drawn(tmp_path):
    rows = [{"step": step, "train/loss": 1 / step, "validation/psnr": 20.0 + step} for step in range(1, 30)]
    plot_metrics(rows, tmp_path / "curves.png")
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5


def test_the_first_signal_asks_and_the_second_ends():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().listening() as stop:
        assert stop.signal is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        for number in (signal.SIGINT, signal.SIGTERM):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert signal.getsignal(signal.SIGTERM) is before


def test_meter_keeps_the_step_of_every_scalar():
    meter = Meter()
    meter.add(1, {"loss": torch.tensor(2.0), "mse": torch.tensor(1.0)})
    meter.add(2, {"loss": torch.tensor(4.0)})
    accelerator = Accelerator(cpu=True)
    assert meter.read(accelerator) == {"loss": [(1, 2.0), (2, 4.0)], "mse": [(1, 1.0)]}
    meter.reset()
    assert meter.read(accelerator) == {}


# ------------------------------------------------------------------------------------------------- condition noise


def test_condition_noise_units():
    layout = torch.tensor([[[0.25, 0.5, 0.1, -0.5, 0.5]]])
    noise = torch.full_like(layout, 2.0)
    std = torch.tensor([0.1, 0.2, 1.0, 0.5, 0.6])
    added = {
        unit: (noised_condition(layout, noise, 0.5, unit, std) - layout).flatten().tolist()
        for unit in train_sit.CONDITION_NOISE_UNITS
    }
    assert added["absolute"] == pytest.approx([1.0] * 5)
    assert added["channel_std"] == pytest.approx(std.tolist())
    assert added["region"] == pytest.approx([0.25, 0.5, 0.0, 0.25, 0.5])
    with pytest.raises(ValueError, match="'pixels'"):
        noised_condition(layout, noise, 0.5, "pixels", std)


def test_worker_count_does_not_change_the_type():
    """The plan is a sampler without a length; DataLoader must go on accepting that."""
    assert isinstance(batch_loader(image_batches(Rows(2)), plan(Rows(2)), 0, False), DataLoader)


def test_resolved_sit_configuration_needs_classes():
    statistics = {
        "num_tokens": 4,
        "class_names": None,
        "channels": {"layout": {"mean": [0.0] * 5, "std": [1.0] * 5}},
    }
    options = argparse.Namespace(
        stage="layout",
        gaussian_target=None,
        size="S",
        config_overrides=[],
        condition_injection="input",
        class_dropout_prob=0.1,
    )
    with pytest.raises(ProgramError, match="num_classes"):
        train_sit.resolve_config(options, statistics)
    options.config_overrides = [("num_classes", 3)]
    assert train_sit.resolve_config(options, statistics)["num_classes"] == 3
    options.gaussian_target = "offset"
    with pytest.raises(ProgramError, match="--stage must be texture"):
        train_sit.resolve_config(options, statistics)
