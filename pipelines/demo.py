# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""A page in the browser: encode photographs, move their Gaussians, generate images.

    python -m pipelines.demo
    python -m pipelines.demo --model owner/name --pipeline folder/ --layout_bank bank/ --open
    python -m pipelines.demo --host 0.0.0.0 --port 7860

The first tab takes a photograph and shows its initial and refined Gaussians, the reconstruction and the error. Painted
importance draws tokens. A Gaussian that is dragged, resized or turned changes the reconstruction. Tokens can be
downloaded and uploaded again. The second tab generates: a layout for a class, edited or not, then its texture.

The page needs the extra: pip install "gpstoken-hf[demo]". It asks nothing of the network but checkpoints on the Hub,
stores no pictures and keeps those of its visitors apart. This file is also the `app.py` of a Hugging Face Space whose
requirements name `gpstoken-hf[demo]`.
"""

# Annotations stay objects here (no `from __future__ import annotations`): Gradio reads those of event handlers.
import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from gpstoken_hf.layout_bank import GaussianLayoutBank
from gpstoken_hf.modeling_gpstoken import GPSTokenModel
from gpstoken_hf.pipeline_gpstoken import GPSTokenPipeline

if not __package__:  # run as a file, as a Space does
    __package__ = "gpstoken_hf.programs"

from . import demo_state as state
from .shared.checkpoints import (
    DEFAULT_MODEL,
    DEFAULT_PIPELINE,
    find_checkpoint,
    load_pipeline,
    load_tokenizer,
    quiet_loading,
)
from .shared.programs import FILE_ERRORS, ProgramError, make_parser, one_line, positive_int, run_program

PROGRAM = "pipelines.demo"
ASSETS = Path(state.__file__).parent
# A visitor's pictures are forgotten after an hour without an event. With gpstoken-nano they take about 10 MB.
MEMORY_SECONDS, MAX_VISITORS = 3600, 200
# The page itself shows that it waits. Its events are no interface for programs.
EVENT = {"show_progress": "hidden", "api_visibility": "private"}
# The page sends one event at a time. Gradio would drop one that follows an answer at once.
STAGE_EVENT = {**EVENT, "trigger_mode": "multiple"}
HINTS = {
    "photo": "Drop a photograph into the box, or take one of the samples.",
    "draft": "Choose a class and make a layout.",
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    if args.port is not None and args.port > 65535:
        raise ProgramError(f"--port must be between 1 and 65535, got {args.port}")
    if importlib.util.find_spec("gradio") is None:
        raise ProgramError('the page needs Gradio: pip install "gpstoken-hf[demo]"')
    model = load_tokenizer(args.model, args.device)
    pipeline = load_pipeline(args.pipeline, torch.float32, args.device)
    if args.layout_bank is not None:
        add_bank(pipeline, args.layout_bank)
    with tempfile.TemporaryDirectory(prefix="gpstoken-demo-") as uploads:
        prepare_gradio(uploads)
        page = build_page(model, args.model, pipeline)
        try:
            address = page.launch(
                server_name=args.host, server_port=args.port, inbrowser=args.open, **launch_options()
            )[1]
        except OSError as error:
            where = f"{args.host or 'this machine'}, port {args.port or 'from 7860'}"
            raise ProgramError(f"--host and --port must name a free address, got {where}") from error
        print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(PROGRAM, __doc__ or "")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"folder or Hub repository; default: the bundled {DEFAULT_MODEL}"
    )
    parser.add_argument(
        "--pipeline",
        default=DEFAULT_PIPELINE,
        help=f"folder or Hub repository; default: the bundled {DEFAULT_PIPELINE}",
    )
    parser.add_argument("--layout_bank", help="folder or Hub repository of a layout bank, for a pipeline without one")
    parser.add_argument("--host", help="address to listen on; default: this machine only. 0.0.0.0: the network too")
    parser.add_argument("--port", type=positive_int, help="default: the first free one from 7860")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def add_bank(pipeline: GPSTokenPipeline, name: str) -> None:
    """Give a two-stage pipeline the layout bank of a folder or a Hub repository.

    Raises:
        ValueError: if the pipeline makes its layouts in one stage, or there is no such bank.
    """
    if pipeline.is_one_stage:
        raise ProgramError("--layout_bank must come with a pipeline of two stages, got one that needs no layout")
    with quiet_loading():
        bank = GaussianLayoutBank.from_pretrained(find_checkpoint(name, "--layout_bank"))
    pipeline.register_modules(layout_bank=bank)


def prepare_gradio(uploads: str) -> None:
    """Set what Gradio reads when it is imported: no reports to its makers, and uploads in a private folder."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = uploads


def launch_options() -> dict[str, Any]:
    """What `launch` of the page is called with, beside host and port."""
    import gradio as gr

    return {
        # Names of the system's fonts, so that none is fetched.
        "theme": gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        "css": ".gradio-container { max-width: 1360px !important; width: 100%; margin: 0 auto; }",
        "prevent_thread_lock": True,
        "quiet": True,
        "max_file_size": state.MAX_UPLOAD_BYTES,
        "state_session_capacity": MAX_VISITORS,
        "ssr_mode": False,
        "share": False,
        "footer_links": [],
    }


def build_page(model: GPSTokenModel, model_name: str, pipeline: GPSTokenPipeline) -> Any:
    """The page as Gradio blocks.

    Args:
        model ([`GPSTokenModel`]): the tokenizer of the first tab.
        model_name (`str`): how downloaded tokens name it.
        pipeline ([`GPSTokenPipeline`]): the generator of the second tab.
    """
    import gradio as gr

    with gr.Blocks(title="GPSToken", analytics_enabled=False, delete_cache=(300, 600)) as page:
        gr.Markdown(
            "# GPSToken\nAn image as a few tokens that sit where it is complex: each is a 2D Gaussian and a texture."
        )
        with gr.Tab("Reconstruct"):
            _build_photo_tab(gr, model, model_name)
        with gr.Tab("Generate"):
            _build_draft_tab(gr, pipeline)
    page.queue(default_concurrency_limit=2)
    return page


def _stage(gr: Any, kind: str) -> Any:
    return gr.HTML(
        value=None,
        html_template='<div class="gps-stage"></div>',
        css_template=(ASSETS / "demo_stage.css").read_text(encoding="utf-8"),
        js_on_load=(ASSETS / "demo_stage.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=f"stage-{kind}",
        kind=kind,
        hint=HINTS[kind],
    )


def _spoken(num_kept: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn the errors of a handler into a patch that shows one sentence; its `num_kept` other outputs stay."""

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(handler)
        def call(*arguments: Any) -> Any:
            import gradio as gr

            try:
                return handler(*arguments)
            except FILE_ERRORS as error:
                patch = state.problem(_sentence(error))
                return (patch, *(gr.skip() for _ in range(num_kept))) if num_kept else patch

        return call

    return decorate


def _sentence(error: BaseException) -> str:
    sentence = one_line(error)
    return sentence[:1].upper() + sentence[1:]


def _build_photo_tab(gr: Any, model: GPSTokenModel, model_name: str) -> None:
    default_side = 256
    with gr.Row():
        with gr.Column(scale=1, min_width=270):
            upload = gr.File(label="Photograph or tokens", height=150, elem_id="upload")
            samples = []
            if importlib.util.find_spec("skimage") is not None:
                with gr.Row():
                    samples = [gr.Button(name, size="sm", min_width=60) for name in state.SAMPLES]
            tokens = gr.Slider(1, state.MAX_TOKENS, value=256, step=1, label="Tokens", elem_id="tokens")
            quality = gr.Slider(
                *(0, state.MAX_PSNR),
                value=0,
                step=0.5,
                label="PSNR to reach, in dB",
                info="with as few tokens as possible; 0: all of the tokens above",
                elem_id="quality",
            )
            side = gr.Radio(state.SIDES, value=default_side, label="Longer side, in pixels", elem_id="side")
            strength = gr.Slider(0, 500, value=100, step=1, label="Strength of the paint", elem_id="strength")
        with gr.Column(scale=3, min_width=320):
            stage = _stage(gr, "photo")
    photo_state = gr.State(None, time_to_live=MEMORY_SECONDS)
    settings = [tokens, side, strength, quality]

    @_spoken(1)
    def open_file(path: str | None, *values: Any) -> Any:
        if path is None:
            return gr.skip(), gr.skip()
        file = Path(path)
        try:
            photo = state.open_upload(file, model)
        finally:
            file.unlink(missing_ok=True)  # nothing of a visitor stays on the disk
        return (state.show(photo, model), photo) if photo.original is None else encode_first(photo, *values)

    @_spoken(1)
    def open_sample(name: str, *values: Any) -> Any:
        return encode_first(state.open_sample(name), *values)

    def encode_first(photo: state.Photo, *values: Any) -> Any:
        """A photograph that the settings do not fit is kept, so that the visitor can change them."""
        try:
            return state.encode(photo, model, *values), photo
        except ValueError as error:
            return state.problem(_sentence(error)) | state.NOTHING_SHOWN, photo

    @_spoken(1)
    def encode_again(photo: state.Photo | None, *values: Any) -> Any:
        if photo is None:
            return gr.skip(), gr.skip()
        return state.encode(photo, model, *values), photo

    @_spoken(1)
    def paint(
        photo: state.Photo | None, number: int, size: int, weight: float, target: float, event: gr.EventData
    ) -> Any:
        photo = _given(photo)
        state.paint(photo, getattr(event, "mask", None))
        return state.encode(photo, model, number, size, weight, target), photo

    @_spoken(1)
    def edit(photo: state.Photo | None, event: gr.EventData) -> Any:
        photo = _given(photo)
        return state.edit(photo, model, getattr(event, "index", None), getattr(event, "gaussian", None)), photo

    @_spoken(1)
    def undo(photo: state.Photo | None) -> Any:
        photo = _given(photo)
        return state.undo_edits(photo, model), photo

    @_spoken(0)
    def download(photo: state.Photo | None, event: gr.EventData) -> Any:
        return state.pack(_given(photo), model, model_name, str(getattr(event, "suffix", None)))

    outputs = [stage, photo_state]
    opened = upload.upload(open_file, [upload, *settings], outputs, **EVENT)
    opened.then(lambda: None, None, upload, **EVENT)  # the box is free for the next file, also after a bad one
    for sample in samples:
        sample.click(open_sample, [sample, *settings], outputs, **EVENT)
    for change in (tokens.input, side.input, strength.input, quality.input):
        change(encode_again, [photo_state, *settings], outputs, trigger_mode="always_last", **EVENT)
    stage.paint(paint, [photo_state, *settings], outputs, **STAGE_EVENT)
    stage.edit(edit, [photo_state], outputs, **STAGE_EVENT)
    stage.undo(undo, [photo_state], outputs, **STAGE_EVENT)
    stage.download(download, [photo_state], stage, **STAGE_EVENT)


def _given(value: Any) -> Any:
    """The state of a visitor, unless it has been forgotten."""
    if value is None:
        raise ProgramError("this page has been idle for too long: begin again")
    return value


def _build_draft_tab(gr: Any, pipeline: GPSTokenPipeline) -> None:
    sources = state.layout_sources(pipeline)
    classes = state.class_names(pipeline)
    with gr.Row():
        with gr.Column(scale=1, min_width=270):
            label = gr.Dropdown(classes, value=classes[0][1], label="Class", elem_id="class")
            source = gr.Radio(
                [("generated", "generated"), ("from the bank", "bank")] if "bank" in sources else sources,
                value=sources[0] if sources else None,
                label="Layout",
                visible=bool(sources),
                elem_id="source",
            )
            layout_seed = gr.Number(0, precision=0, minimum=0, label="Layout seed", visible=bool(sources))
            make = gr.Button("1. Make a layout", variant="primary", visible=bool(sources), elem_id="make-layout")
            steps = gr.Slider(1, state.MAX_STEPS, value=50, step=1, label="Texture steps", elem_id="steps")
            guidance = gr.Slider(0, 6, value=1.5, step=0.1, label="Guidance")
            seed = gr.Number(0, precision=0, minimum=0, label="Texture seed")
            draw = gr.Button(
                "2. Draw the texture" if sources else "Generate", variant="primary", elem_id="draw-texture"
            )
        with gr.Column(scale=3, min_width=320):
            stage = _stage(gr, "draft")
    draft_state = gr.State(None, time_to_live=MEMORY_SECONDS)

    @_spoken(1)
    def make_layout(class_id: int, number: float, kind: str) -> Any:
        draft, patch = state.make_layout(pipeline, class_id, _whole(number), kind)
        return patch, draft

    @_spoken(1)
    def edit(draft: state.Draft | None, event: gr.EventData) -> Any:
        draft = _given(draft)
        patch = state.edit_layout(pipeline, draft, getattr(event, "index", None), getattr(event, "gaussian", None))
        return patch, draft

    @_spoken(1)
    def undo(draft: state.Draft | None) -> Any:
        draft = _given(draft)
        return state.undo_layout_edits(pipeline, draft), draft

    @_spoken(0)
    def draw_texture(
        draft: state.Draft | None,
        class_id: int,
        number: float,
        count: int,
        scale: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how Gradio hands it over
    ) -> Any:
        def show_step(step: int, total: int) -> None:
            progress((step, total), desc="steps")

        return state.draw_texture(pipeline, draft, class_id, _whole(number), count, scale, show_step)

    # A pipeline keeps the state of its schedulers, so it serves one visitor at a time.
    one_by_one = {"concurrency_id": "pipeline", "concurrency_limit": 1, "api_visibility": "private"}
    make.click(make_layout, [label, layout_seed, source], [stage, draft_state], **one_by_one)
    draw.click(draw_texture, [draft_state, label, seed, steps, guidance], stage, **one_by_one)
    stage.edit(edit, [draft_state], [stage, draft_state], **STAGE_EVENT)
    stage.undo(undo, [draft_state], [stage, draft_state], **STAGE_EVENT)


def _whole(number: float | None) -> int:
    if number is None or number != int(number):
        raise ProgramError(f"the seed must be a whole number, got {number}")
    return int(number)


if __name__ == "__main__":
    sys.exit(run_program(main))
