# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Token files: what comes back, how large they are, and that damaged or hostile files are refused in one line."""

import base64
import hashlib
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from model_helpers import make_images, make_model

from gpstoken_hf.entropy_coding import CODERS, constriction_is_available, varint
from gpstoken_hf.layout import PADDING_GAUSSIAN, GaussianLayout
from gpstoken_hf.token_file import MAGIC, model_fingerprint, read_tokens, write_tokens

AVAILABLE = [coder for coder in CODERS if coder == "zlib" or constriction_is_available()]
needs_constriction = pytest.mark.skipif(not constriction_is_available(), reason="needs constriction")
SIZE = (64, 48)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def encoded(model):
    with torch.no_grad():
        return model.encode(make_images(2, *SIZE), [20, 13])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.gpst"


def with_padding(tokens, mask):
    """Tokens as a file returns them: padded rows hold the padding Gaussian and texture 0."""
    expected = torch.zeros_like(tokens)
    expected[..., :5] = torch.tensor(PADDING_GAUSSIAN)
    return torch.where(mask[..., None] == 1, tokens, expected)


def same_bits(a, b):
    return a.dtype == b.dtype == torch.float32 and a.numpy().tobytes() == b.contiguous().numpy().tobytes()


def signed(content):
    """Bytes with their checksum."""
    return content + struct.pack("<I", zlib.crc32(content))


# ---- What comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coder", AVAILABLE)
@pytest.mark.parametrize("step", [None, 0.5])
def test_a_batch_comes_back(model, encoded, path, coder, step):
    mask = encoded.attention_mask
    written = write_tokens(path, encoded.tokens, SIZE, model, mask, encoded.layout, step=step, coder=coder)
    stored = read_tokens(path, model)
    assert written == stored.num_bytes == path.stat().st_size
    assert stored.image_size == SIZE
    assert torch.equal(stored.attention_mask, mask)
    assert torch.equal(stored.layout.boxes, encoded.layout.boxes)
    assert torch.equal(stored.layout.gaussians, encoded.layout.gaussians)
    assert (stored.coder, stored.step, stored.tile_size) == (coder, step, None)
    assert stored.model_fingerprint == model_fingerprint(model)
    assert stored.bits_per_pixel == 8 * written / (2 * 64 * 48)
    expected = with_padding(encoded.tokens, mask)
    if step is None:
        assert same_bits(stored.tokens, expected)
    else:
        assert 0 < (stored.tokens - expected).abs().max() < 1
        assert (stored.tokens - expected)[mask == 0].abs().max() == 0
    with torch.no_grad():
        model.decode(stored.tokens, stored.image_size, stored.attention_mask)


def test_without_anything_else(encoded, path):
    write_tokens(path, encoded.tokens[:1], 64)
    stored = read_tokens(path)
    assert same_bits(stored.tokens, encoded.tokens[:1])
    assert stored.image_size == (64, 64)
    assert stored.layout is None
    assert stored.model_fingerprint is None
    assert bool(stored.attention_mask.all())


def test_a_lossless_file_in_another_process(model, encoded, path):
    write_tokens(path, encoded.tokens, SIZE, model, encoded.attention_mask, encoded.layout)
    program = (
        "import sys, hashlib\n"
        "from gpstoken_hf.token_file import read_tokens\n"
        "stored = read_tokens(sys.argv[1])\n"
        "print(hashlib.sha256(stored.tokens.numpy().tobytes()).hexdigest())\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    expected = with_padding(encoded.tokens, encoded.attention_mask)
    assert result.stdout.split()[-1] == hashlib.sha256(expected.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("coder", AVAILABLE)
def test_files_of_this_version_stay_readable(path, coder):
    """A file that was written when the format was fixed. It must decode to the same values for ever."""
    path.write_bytes(base64.b64decode(GOLDEN[coder]))
    stored = read_tokens(path)
    rng = np.random.default_rng(5)
    layout = GaussianLayout.from_boxes(torch.tensor([[[0, 0, 15, 31], [16, 0, 31, 15], [16, 16, 31, 31]]]), (32, 32))
    assert torch.equal(stored.layout.boxes, layout.boxes)
    texture = torch.from_numpy(np.round(rng.normal(0, 2, (1, 3, 4)), 2)).float()
    np.testing.assert_allclose(stored.tokens[..., :5], layout.gaussians, atol=0.03)
    np.testing.assert_allclose(stored.tokens[..., 5:], texture, atol=0.7)
    values = stored.tokens.double().sum((0, 1)).numpy()
    np.testing.assert_allclose(values, GOLDEN_SUMS, rtol=1e-6)


GOLDEN = {
    "zlib": "R1BTVAEGAAAAAAAAAAAgIAEDBAAAAIA+AQAABQF42h3FQQoAIAwDwU20KqXg/28+VXQuc9DI1rWIKb6XbGNrm0kSVcQFJDABIDYmiVE=",
    "constriction": "R1BTVAEOAAAAAAAAAAAgIAEDBAAAAIA+AQAABQGa/14GZAACAAIAIwJnAAALCqVuLskIAjh/vu26AgAANUytEw==",
}
GOLDEN_SUMS = [0.9375, 1.270833, 0.0, 0.5747228, 0.0390625, 2.102241, 0.5946035, -1.06066, -3.181981]


def test_lossy_files_are_small_and_steps_trade_size_for_error(model, encoded, path):
    raw = 4 * int(encoded.attention_mask.sum()) * encoded.tokens.shape[2]
    arguments = (encoded.tokens, SIZE, model, encoded.attention_mask)
    expected = with_padding(encoded.tokens, encoded.attention_mask)
    sizes, errors = [], []
    for step in (0.05, 0.2, 0.8, 3.2):
        sizes.append(write_tokens(path, *arguments, encoded.layout, step=step))
        errors.append((read_tokens(path).tokens - expected).square().mean().item())
        # Regions make a file smaller where they are known.
        assert write_tokens(path, *arguments, step=step) > sizes[-1]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert sizes[1] < raw / 3
    assert write_tokens(path, *arguments, lossless=False) == write_tokens(path, *arguments, step=0.5)
    assert write_tokens(path, *arguments) == write_tokens(path, *arguments, lossless=True) > raw / 2


# ---- Layouts of every origin ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [None, 0.3])
def test_tiles(model, path, step):
    with torch.no_grad():
        out = model.encode(make_images(2, *SIZE), [16, 9], tile_size=32)
    mask = out.attention_mask
    size = write_tokens(path, out.tokens, SIZE, model, mask, out.layout, tile_size=32, step=step)
    stored = read_tokens(path)
    assert stored.tile_size == 32
    assert torch.equal(stored.attention_mask, mask)
    assert torch.equal(stored.layout.boxes, out.layout.boxes)
    assert torch.equal(stored.layout.gaussians, out.layout.gaussians)
    assert size > 0
    if step is None:
        assert same_bits(stored.tokens, with_padding(out.tokens, mask))


@pytest.mark.parametrize("step", [None, 0.3])
def test_given_edited_and_focused_layouts(model, path, step):
    images = make_images(1, *SIZE)
    importance = torch.zeros(1, *SIZE)
    importance[:, :20] = 100.0
    boxes = torch.tensor([[[0, 0, 30, 40], [10, 3, 47, 63], [0, 41, 9, 63]]])
    with torch.no_grad():
        focused = model.encode(images, 12, importance=importance)
        given = model.encode(images, layout=GaussianLayout.from_boxes(boxes, SIZE))
    edited = focused.tokens.clone()
    edited[0, 2, :5] = torch.tensor([0.3, 0.02, -0.9, 1.4, -1.1])
    for tokens, layout, has_layout in (
        (focused.tokens, focused.layout, True),
        (given.tokens, given.layout, False),
        (edited, focused.layout, True),
        (edited[:, torch.randperm(12)], None, False),
        (focused.tokens[:, :1], None, False),
    ):
        write_tokens(path, tokens, SIZE, model, layout=layout, step=step)
        stored = read_tokens(path, model)
        assert (stored.layout is not None) == has_layout
        if step is None:
            assert same_bits(stored.tokens, tokens)
        else:
            assert (stored.tokens[..., 3:5] - tokens[..., 3:5]).abs().max() < 0.5 * step * 0.25
            assert (stored.tokens[..., :2].log() - tokens[..., :2].log()).abs().max() < 0.51 * step * 0.25


def test_masks_of_any_kind(encoded, path):
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, ::3] = 0
    mask[1, :7] = 0
    write_tokens(path, encoded.tokens, SIZE, attention_mask=mask)
    stored = read_tokens(path)
    assert torch.equal(stored.attention_mask, mask)
    assert same_bits(stored.tokens, with_padding(encoded.tokens, mask))


def test_half_precision_is_stored_exactly(encoded, path):
    tokens = encoded.tokens[:1].to(torch.bfloat16)
    write_tokens(path, tokens, SIZE)
    assert torch.equal(read_tokens(path).tokens, tokens.float())


# ---- What cannot be written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.rand(3, 9)}, r"tokens must be a tensor of shape \(B, L, 5 \+ C\), got \(3, 9\)"),
        ({"tokens": torch.rand(1, 3, 5)}, "tokens must be a tensor of shape"),
        ({"tokens": torch.rand(1, 3, 9).double()}, "must be float32, float16 or bfloat16, got torch.float64"),
        ({"tokens": torch.rand(1, 0, 9)}, "must hold from 1 to"),
        ({"tokens": torch.rand(1, 3, 10)}, "tokens must have 5 \\+ C = 9 values, got 10"),
        ({"tokens": torch.full((1, 3, 9), 2.0)}, "0 < sigma < 1"),
        ({"tokens": torch.tensor([0.5] * 8 + [float("nan")]).expand(1, 3, 9)}, "texture of tokens must be finite"),
        ({"image_size": (10**6, 10**6)}, "image_size must be from 1 to"),
        ({"image_size": (0, 4)}, "image_size must be from 1 to"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask must be"),
        ({"attention_mask": torch.zeros(1, 3)}, "attention_mask must hold"),
        ({"attention_mask": torch.full((1, 3), 2)}, "attention_mask must hold"),
        ({"tile_size": 0}, "tile_size must be an integer"),
        ({"step": 0.0}, "step must be a number from"),
        ({"step": float("nan")}, "step must be a number from"),
        ({"step": "1"}, "step must be a number from"),
        ({"step": 0.5, "lossless": True}, "step must be None in a lossless file"),
        ({"coder": "lzma"}, "coder must be one of"),
        ({"layout": GaussianLayout(torch.full((1, 4, 5), 0.5))}, "layout must be of"),
    ],
)
def test_bad_arguments_are_refused(model, path, changes, message):
    arguments = {"tokens": torch.full((1, 3, 9), 0.5), "image_size": (32, 32), "model": model, **changes}
    with pytest.raises(ValueError, match=message):
        write_tokens(path, **arguments)
    assert not path.exists()


# ---- What cannot be read --------------------------------------------------------------------------------------------


def refused(path, content, model=None):
    """The message with which a file is refused: one line that names the file."""
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must") as caught:
        read_tokens(path, model)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200
    return message


@pytest.fixture
def content(model, encoded, path):
    write_tokens(path, encoded.tokens, SIZE, model, encoded.attention_mask, encoded.layout, step=0.5)
    return path.read_bytes()


def test_other_files_versions_and_models(model, content, path):
    assert "begins with b'GPST', got b'GIF8'" in refused(path, b"GIF89a")
    assert "begins with" in refused(path, b"")
    assert "version 1 of the format, got version 2" in refused(path, signed(content[:4] + b"\x02" + content[5:-4]))
    assert "hold tokens of this model, whose fingerprint is" in refused(path, content, make_model(seed=1))
    assert "hold tokens of 12 values for this model, got 9" in refused(path, content, make_model(texture_channels=7))
    assert "known flags, got 255" in refused(path, signed(content[:5] + b"\xff" + content[6:-4]))
    with pytest.raises(FileNotFoundError):
        read_tokens(path.with_name("none.gpst"))


def test_truncated_files(content, path):
    for length in range(5, len(content)):
        assert "damaged or cut off" in refused(path, content[:length])
        if length < len(content) - 4:  # with the checksum of what is left
            survives(path, signed(content[:length]))


@pytest.mark.parametrize(
    "claims",
    [
        (10**6, 10**6, 1, 4, 4, 0),
        (2**40, 4, 1, 4, 4, 0),
        (64, 64, 10**9, 4, 4, 0),
        (64, 64, 1, 10**9, 4, 0),
        (64, 64, 1, 4, 10**9, 0),
        (64, 64, 10**4, 10**4, 4, 0),
        (64, 64, 1, 2**24, 1, 0),
        (8192, 8192, 1, 100, 4, 1),
        (64, 64, 0, 4, 4, 0),
        (64, 64, 1, 4, 0, 0),
    ],
)
@pytest.mark.parametrize("flags", [0, 1, 2, 3, 10, 11])
def test_hostile_claims_take_no_memory(path, claims, flags):
    if flags >= 8 and not constriction_is_available():
        pytest.skip("needs constriction")
    numbers = b"".join(map(varint, claims))
    step = b"" if flags & 1 else struct.pack("<f", 0.5)
    regions = b"\x01\x00" if flags & 2 else b""
    tail = step + regions + b"\x00" + b"\xff\xff\xff\x7f" * 2 + bytes(100)
    tracemalloc.start()
    refused(path, signed(MAGIC + bytes([1, flags]) + bytes(8) + numbers + tail))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


def survives(path, content):
    """Read a file that may be damaged; a ValueError of one line is fine."""
    path.write_bytes(content)
    try:
        stored = read_tokens(path)
    except ValueError as caught:
        message = str(caught)
    else:
        message = ""
    assert "\n" not in message
    if message:
        return False
    assert torch.isfinite(stored.tokens).all()
    return True


@pytest.mark.parametrize("coder", AVAILABLE)
@pytest.mark.parametrize("step", [None, 0.5])
def test_a_thousand_corrupted_files(encoded, path, coder, step):
    """Without a fitting checksum all of them are refused, and with one none of them does harm."""
    write_tokens(path, encoded.tokens, SIZE, None, encoded.attention_mask, encoded.layout, step=step, coder=coder)
    content = path.read_bytes()
    rng = np.random.default_rng(1)
    num_read = 0
    for _ in range(250):
        damaged = bytearray(content[:-4])
        # Half of the damage hits the header.
        for _ in range(rng.integers(1, 4)):
            end = 60 if rng.random() < 0.5 else len(damaged)
            place = int(rng.integers(5, end))
            damaged[place] = int(rng.integers(256)) if rng.random() < 0.5 else damaged[place] ^ (1 << rng.integers(8))
        if bytes(damaged) == content[:-4]:
            continue
        assert not survives(path, bytes(damaged) + content[-4:])
        num_read += survives(path, signed(bytes(damaged)))
    assert num_read < 250


def test_random_files(tmp_path):
    hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
    strategies = hypothesis.strategies
    path = tmp_path / "x.gpst"
    small = strategies.integers(0, 70)
    large = strategies.one_of(small, strategies.integers(0, 2**63))

    @hypothesis.settings(max_examples=100, deadline=None, database=None)
    @hypothesis.given(
        flags=strategies.integers(0, 15 if constriction_is_available() else 7),
        numbers=strategies.tuples(large, large, small, large, small, large),
        tail=strategies.binary(max_size=300),
    )
    def run(flags, numbers, tail):
        step = b"" if flags & 1 else struct.pack("<f", 0.5)
        head = MAGIC + bytes([1, flags]) + bytes(8) + b"".join(map(varint, numbers))
        survives(path, signed(head + step + tail))

    run()


@needs_constriction
def test_without_constriction(encoded, path, monkeypatch):
    write_tokens(path, encoded.tokens, SIZE, coder="constriction")
    monkeypatch.setitem(sys.modules, "constriction", None)
    message = refused(path, path.read_bytes())
    assert "read with constriction, which is not installed: pip install constriction" in message
    with pytest.raises(ValueError, match="'constriction', which is not installed"):
        write_tokens(path, encoded.tokens, SIZE, coder="constriction")
    write_tokens(path, encoded.tokens, SIZE)
    stored = read_tokens(path)
    assert stored.coder == "zlib"
    assert same_bits(stored.tokens, encoded.tokens)


def test_a_huge_file_is_not_read(path):
    with open(path, "wb") as file:
        file.write(MAGIC + b"\x01\x00")
    os.truncate(path, 2**30)
    with pytest.raises(ValueError, match="must be at most 135266304 bytes, got 1073741824"):
        read_tokens(path)
