# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""The picture of the page: `skimage.data.astronaut`, its face painted as important, one Gaussian turned and drawn out.

python docs/figures/page.py

It needs the `demo` extra, playwright and a Chromium of the system.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
ROOT = Path(__file__).resolve().parents[2]
STAGE = "#stage-photo "


def settled(page: Page) -> None:
    """Wait until the page shows the answer."""
    page.wait_for_timeout(1500)
    page.wait_for_function("document.querySelector('#stage-photo .gps-stage').dataset.busy !== 'true'")
    page.wait_for_timeout(500)


def drag(page: Page, start: tuple[float, float], *stops: tuple[float, float]) -> None:
    """Press at the first place, pass the others, release at the last."""
    page.mouse.move(*start)
    page.mouse.down()
    for stop in stops:
        page.mouse.move(*stop, steps=4)
    page.mouse.up()
    settled(page)


def middle(page: Page, selector: str) -> tuple[float, float]:
    """Middle of an element, in pixels of the screen."""
    box = page.locator(STAGE + selector).last.bounding_box()
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def take_picture(address: str, path: Path) -> None:
    """Paint, drag and turn on the page, then save a picture of it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1360, "height": 1250})
        page.goto(address)
        page.wait_for_selector(STAGE + ".gps-line")
        page.get_by_text("astronaut", exact=True).first.click()
        settled(page)
        page.locator(STAGE + "[data-mode=paint]").click()
        box = page.locator(STAGE + "canvas").bounding_box()
        assert box is not None
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in ((0.42, 0.15), (0.42, 0.32))]
        drag(page, *places)
        page.locator(STAGE + "[data-mode=move]").click()
        x, y = middle(page, ".gps-editor ellipse")
        drag(page, (x, y), (x - 40, y - 60))
        x, y = middle(page, "[data-handle=major]")
        drag(page, (x, y), (x + 30, y + 50))
        x, y = middle(page, "[data-handle=turn]")
        drag(page, (x, y), (x + 30, y + 30))
        page.screenshot(path=path)
        browser.close()


def main() -> None:
    """Open the page with the bundled checkpoints."""
    path = Path(__file__).with_name("page.png")
    command = [sys.executable, "-m", "pipelines.demo", "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"the page is at (http://\S+)", line):
                take_picture(found[1], path)
                break
        process.terminate()
    with Image.open(path) as image:
        smaller = image.convert("RGB").quantize(255)
    smaller.save(path, optimize=True)


if __name__ == "__main__":
    main()
