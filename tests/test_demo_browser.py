# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The page of pipelines/demo.py in a browser, with tiny models of random weights.

Chromium is the system's, driven by playwright: nothing is downloaded. Nothing here depends on how fast the machine is:
every step waits for the number of the patch that the page shows.
"""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from tiny_pipeline import make_pipeline, make_vae

from gpstoken_hf.visualization import tensor_to_pil
from pipelines import demo_state as state

pytest.importorskip("gradio", reason='needs gradio: pip install "gpstoken-hf[demo]"')
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_MS = 180_000


def picture(seed, height=96, width=96):
    """Noise on the left, a flat colour on the right."""
    random = np.random.default_rng(seed)
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[:] = random.integers(60, 200, 3)
    pixels[:, : width // 2] = random.integers(0, 255, (height, width // 2, 3))
    return PIL.Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints and pictures."""
    folder = tmp_path_factory.mktemp("page")
    model = make_vae()
    torch.nn.init.normal_(model.encoder.gaussian_head.weight, std=0.3)  # so that refinement moves the Gaussians
    model.save_pretrained(folder / "model")
    make_pipeline("both").save_pretrained(folder / "pipeline")
    for name, seed in (("one", 1), ("two", 2)):
        picture(seed).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / "damaged.png").write_bytes((folder / "one.png").read_bytes()[:2000])
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """A running page."""
    (folder / "temporary").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "TMPDIR": str(folder / "temporary"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pipelines.command_line", "demo", "--device", "cpu"]
    command += ["--model", str(folder / "model"), "--pipeline", str(folder / "pipeline")]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        log = []
        for line in process.stdout:
            log.append(line)
            if found := re.search(r"the page is at (http://\S+)", line):
                break
        else:
            pytest.fail("".join(log))
        # Read on, so that the pipe never fills.
        reader = threading.Thread(target=lambda: log.extend(process.stdout), daemon=True)
        reader.start()
        yield found[1]
        process.terminate()
        process.wait(60)
        reader.join(60)
    assert "Traceback" not in "".join(log), "".join(log)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # Containers have no sandbox for the browser.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Visitor:
    """One visitor with a browser session, and what the visitor sees and does."""

    def __init__(self, browser, address):
        self.context = browser.new_context(viewport={"width": 1360, "height": 1250}, accept_downloads=True)
        self.context.set_default_timeout(TIMEOUT_MS)
        self.page = self.context.new_page()
        self.hosts, self.faults = set(), []
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#stage-photo .gps-line")
        self.kind = "photo"

    def part(self, selector):
        return self.page.locator(f"#stage-{self.kind} {selector}")

    def serial(self):
        return int(self.part(".gps-stage").get_attribute("data-serial") or 0)

    def wait_for_patch(self, before):
        """Wait until the page shows a later patch than `before` and waits for none."""
        self.page.wait_for_function(
            "([kind, before]) => { const data = document.querySelector(`#stage-${kind} .gps-stage`).dataset;"
            " return Number(data.serial || 0) > before && data.busy !== 'true'; }",
            arg=[self.kind, before],
        )

    def after(self, action):
        """Do something, and wait for the answer."""
        before = self.serial()
        action()
        self.wait_for_patch(before)

    def upload(self, path):
        self.after(lambda: self.page.locator("#upload input[type=file]").set_input_files(str(path)))

    def set_number(self, name, value):
        field = self.page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Enter")

    def picture(self, panel):
        """The pixels of a panel."""
        data = self.part(f"[data-panel={panel}] img").get_attribute("src").partition(",")[2]
        with PIL.Image.open(io.BytesIO(base64.b64decode(data))) as image:
            return np.array(image)

    def centres(self, panel):
        """The centres of all ellipses of a panel, `(L, 2)` in pixels of the image, in the order of tokens."""
        found = self.part(f"[data-panel={panel}] ellipse").evaluate_all(
            "nodes => nodes.map(node => [Number(node.dataset.index),"
            " ...node.getAttribute('transform').match(/translate\\(([^ ]+) ([^)]+)\\)/).slice(1).map(Number)])"
        )
        return np.array([row[1:] for row in sorted(found)])

    def radii(self, index):
        node = self.part(f".gps-editor ellipse[data-index='{index}']")
        return float(node.get_attribute("rx")), float(node.get_attribute("ry"))

    def drag(self, locator, dx, dy):
        """Press the middle of an element, move by pixels of the screen, release."""
        locator.scroll_into_view_if_needed()
        box = locator.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + dx, y + dy, steps=4)
        self.page.mouse.up()

    def line(self):
        return self.part(".gps-line").inner_text()

    def close(self):
        assert self.hosts <= {"127.0.0.1", "localhost", None}, self.hosts  # None: `data:` and `blob:`
        assert self.faults == []
        self.context.close()


@pytest.fixture
def visitors(browser, address):
    """A function that opens the page once more."""
    opened = []

    def visit():
        opened.append(Visitor(browser, address))
        return opened[-1]

    yield visit
    for visitor in opened:
        visitor.close()


def test_a_photograph_is_encoded_as_the_model_does(visitors, folder):
    visitor = visitors()
    visitor.upload(folder / "one.png")
    assert "one.png: 96 × 96, 256 tokens" in visitor.line()
    model = state.GPSTokenModel.from_pretrained(folder / "model").eval()
    photo = state.photo_of("one.png", picture(1))
    state.encode(photo, model, 256, 256, 30)
    with torch.no_grad():
        decoded = model.decode(photo.tokens, (96, 96)).sample
    difference = visitor.picture("decoded").astype(int) - np.asarray(tensor_to_pil(decoded[0])).astype(int)
    assert np.abs(difference).max() <= 1  # another process may round one level away
    assert np.array_equal(visitor.picture("edit"), np.asarray(picture(1)))
    assert len(visitor.centres("edit")) == len(visitor.centres("initial")) == 256
    expected = (photo.tokens[0, :, 3:5].numpy() * 95 + 96) / 2  # aligned corners
    assert np.abs(visitor.centres("edit") - expected).max() < 0.01
    before = visitor.centres("initial")
    visitor.after(lambda: visitor.set_number("tokens", 40))
    assert len(visitor.centres("initial")) == 40 != len(before)


def test_painted_importance_draws_tokens(visitors, folder):
    visitor = visitors()
    visitor.upload(folder / "one.png")
    visitor.after(lambda: visitor.set_number("tokens", 40))
    visitor.after(lambda: visitor.set_number("strength", 500))
    before = visitor.centres("initial")
    visitor.part("[data-mode=paint]").click()
    box = visitor.part("canvas").bounding_box()

    def stroke():
        visitor.page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.2 * box["height"])
        visitor.page.mouse.down()
        for step in range(1, 6):
            visitor.page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + (0.2 + 0.12 * step) * box["height"])
        visitor.page.mouse.up()

    visitor.after(stroke)
    after = visitor.centres("initial")
    assert len(after) == len(before)
    assert (after[:, 0] > 48).sum() > (before[:, 0] > 48).sum() + 3  # the right half is flat
    visitor.after(lambda: visitor.part("[data-action=clear]").click())
    assert np.array_equal(visitor.centres("initial"), before)


def test_a_gaussian_is_dragged_resized_and_turned(visitors, folder):
    visitor = visitors()
    visitor.upload(folder / "one.png")
    visitor.after(lambda: visitor.set_number("tokens", 30))
    original, centres = visitor.picture("decoded"), visitor.centres("edit")
    scale = visitor.part(".gps-editor").bounding_box()["width"] / 96
    # The last one is drawn on top. It may lie at the edge, so it goes towards the middle.
    ellipse = visitor.part(".gps-editor ellipse").last
    index = int(ellipse.get_attribute("data-index"))
    step = np.where(centres[index] < 48, 10, -10)
    visitor.after(lambda: visitor.drag(ellipse, *(step * scale)))
    moved = visitor.centres("edit")
    assert np.abs(moved[index] - centres[index] - step).max() < 1.5
    assert np.array_equal(np.delete(moved, index, 0), np.delete(centres, index, 0))
    dragged = visitor.picture("decoded")
    assert not np.array_equal(dragged, original)

    radii = visitor.radii(index)
    visitor.after(lambda: visitor.drag(visitor.part("[data-handle=turn]"), 30, 45))
    assert visitor.radii(index) == pytest.approx(radii, abs=0.05)
    turned = visitor.picture("decoded")
    assert not np.array_equal(turned, dragged)
    visitor.after(lambda: visitor.drag(visitor.part("[data-handle=major]"), 40, 40))
    assert visitor.radii(index) != pytest.approx(radii, abs=0.5)
    assert not np.array_equal(visitor.picture("decoded"), turned)
    visitor.after(lambda: visitor.page.keyboard.press("ArrowLeft"))

    visitor.after(lambda: visitor.part("[data-action=undo]").click())
    assert np.array_equal(visitor.picture("decoded"), original)
    assert np.array_equal(visitor.centres("edit"), centres)


def test_tokens_are_downloaded_and_uploaded_again(visitors, folder, tmp_path):
    visitor = visitors()
    visitor.upload(folder / "one.png")
    visitor.after(lambda: visitor.set_number("tokens", 30))
    visitor.after(lambda: visitor.drag(visitor.part(".gps-editor ellipse").last, 15, -10))
    shown, centres = visitor.picture("decoded"), visitor.centres("edit")
    with visitor.page.expect_download() as download:
        visitor.part("[data-action=download]").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name == "one.safetensors"
    assert load_file(file)["tokens"].shape == (1, 30, 9)
    other = visitors()
    other.upload(file)
    assert np.array_equal(other.picture("decoded"), shown)
    assert np.array_equal(other.centres("edit"), centres)
    assert not other.part("[data-panel=error]").is_visible()  # there is no photograph to compare with


def test_bad_files_are_one_sentence(visitors, folder):
    visitor = visitors()
    visitor.upload(folder / "notes.txt")
    assert visitor.line() == "The file must be a photograph or tokens (.safetensors, .gpst), got notes.txt"
    assert visitor.part(".gps-problem").is_visible()
    visitor.upload(folder / "one.png")
    assert visitor.part(".gps-problem").count() == 0
    shown = visitor.picture("decoded")
    visitor.upload(folder / "damaged.png")
    assert visitor.line().startswith("Image must be a readable file")
    assert np.array_equal(visitor.picture("decoded"), shown)
    visitor.after(lambda: visitor.set_number("tokens", 20))  # the photograph before is still there
    assert len(visitor.centres("edit")) == 20


def test_a_photograph_that_the_settings_do_not_fit_is_kept(visitors, folder):
    visitor = visitors()
    visitor.upload(folder / "one.png")
    picture(3, 16, 16).save(folder / "small.png")
    visitor.upload(folder / "small.png")
    assert visitor.line().startswith("Num_tokens must be at most 16")
    assert not visitor.part("[data-panel=edit]").is_visible()  # that of another photograph
    visitor.after(lambda: visitor.set_number("tokens", 12))
    assert visitor.line().startswith("small.png: 16 × 16, 12 tokens")
    assert np.array_equal(visitor.picture("edit"), np.asarray(picture(3, 16, 16)))


def test_a_quality_that_is_typed_is_searched_for(visitors, folder):
    visitor = visitors()
    visitor.upload(folder / "one.png")
    visitor.after(lambda: visitor.set_number("tokens", 20))
    visitor.after(lambda: visitor.set_number("quality", 40))
    assert "falls short of 40 dB" in visitor.line()
    visitor.after(lambda: visitor.set_number("quality", 0.5))
    assert "reaches 0.5 dB" in visitor.line()


def test_visitors_do_not_see_each_other(visitors, folder):
    first, second = visitors(), visitors()
    first.upload(folder / "one.png")
    second.upload(folder / "two.png")
    first.after(lambda: first.set_number("tokens", 30))
    decoded = second.picture("decoded")
    first.after(lambda: first.drag(first.part(".gps-editor ellipse").last, 15, -10))
    second.after(lambda: second.set_number("tokens", 31))
    assert np.array_equal(first.picture("edit"), np.asarray(picture(1)))
    assert np.array_equal(second.picture("edit"), np.asarray(picture(2)))
    assert (len(first.centres("edit")), len(second.centres("edit"))) == (30, 31)
    assert not np.array_equal(second.picture("decoded"), decoded)
    third = visitors()
    assert third.line().startswith("Drop a photograph")
    (uploads,) = (folder / "temporary").glob("gpstoken-demo-*")
    assert [path for path in uploads.rglob("*") if path.is_file() and path.stat().st_size] == []


def test_an_image_is_generated_in_two_stages(visitors):
    visitor = visitors()
    visitor.kind = "draft"
    visitor.page.get_by_role("tab", name="Generate").click()
    visitor.after(lambda: visitor.page.locator("#make-layout").click())
    assert visitor.line() == "layout of 8 Gaussians for class 0: cat"
    centres = visitor.centres("edit")
    assert len(centres) == 8
    visitor.set_number("steps", 3)
    visitor.after(lambda: visitor.page.locator("#draw-texture").click())
    plain = visitor.picture("decoded")
    assert plain.shape == (32, 32, 3)
    ellipse = visitor.part(".gps-editor ellipse").last
    index = int(ellipse.get_attribute("data-index"))
    scale = visitor.part(".gps-editor").bounding_box()["width"] / 32
    step = np.where(centres[index] < 16, 5, -5)
    visitor.after(lambda: visitor.drag(ellipse, *(step * scale)))
    assert np.abs(visitor.centres("edit")[index] - centres[index] - step).max() < 1
    visitor.after(lambda: visitor.page.locator("#draw-texture").click())
    assert not np.array_equal(visitor.picture("decoded"), plain)
    visitor.after(lambda: visitor.part("[data-action=undo]").click())
    visitor.after(lambda: visitor.page.locator("#draw-texture").click())
    assert np.array_equal(visitor.picture("decoded"), plain)
    visitor.page.locator("#source").get_by_text("from the bank").click()
    visitor.after(lambda: visitor.page.locator("#make-layout").click())
    assert not np.array_equal(visitor.centres("edit"), centres)
