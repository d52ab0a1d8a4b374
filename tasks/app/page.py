"""The page: gradio's controls around `Answers`. Nothing of it leaves this machine."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before gradio is imported: it would report home, and keep what was dropped on the page for good.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from PIL import Image

from common.errors import UserError
from datamodules import draw_scene
from surgery.explanation import CaptionExplanation
from tasks.app.answers import BESIDE, Answer, Answers
from tasks.app.figures import (
    HEAT,
    MASK,
    POINTS,
    SAM,
    View,
    caption_page,
    maps_page,
    notice_page,
    token_choices,
)

log = logging.getLogger(__name__)

SCENES = (41, 3, 12, 7, 20, 33)
"""Of the world that the demo's weights have not seen, as examples."""

_COLOUR_MAPS = [
    ("viridis", "viridis"),
    ("cividis", "cividis"),
    ("gray", "gray"),
    ("jet, as in the paper", "jet"),
]
_FONT = ["system-ui", "sans-serif"]  # what the machine has: nothing is fetched
_KEPT = 1800  # seconds that an answer is kept for a page that may ask for another view of it
_LOOK = {
    "theme": gr.themes.Base(
        font=_FONT, font_mono=["ui-monospace", "monospace"], primary_hue="blue", neutral_hue="slate"
    ),
    "css_paths": Path(__file__).with_name("page.css"),
}


def serve(
    answers: Answers,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    folder: Path,
    browse: bool = False,
) -> tuple[gr.Blocks, str]:
    """Start to serve the page, in a thread.

    Args:
        answers: of the models it offers.
        host: the address that is listened on.
        port: its port; None: the first free one from 7860 on.
        folder: where examples and uploads lie as long as the page is served.
        browse: open it in the browser.

    Returns:
        The page, to be closed, and its address.

    Raises:
        OSError: the port is taken.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    blocks = build(answers, folder)
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        inbrowser=browse,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        max_file_size="64mb",
        footer_links=["settings"],
        enable_monitoring=False,
        mcp_server=False,
        **_LOOK,
    )
    return blocks, address


def build(answers: Answers, folder: Path) -> gr.Blocks:
    """The page, its first example explained already."""
    examples = _examples(folder)
    first = examples[0]
    model = answers.models[0]
    _, methods = answers.methods(model)
    chosen = [method for method in BESIDE if method in methods] or methods[:1]
    answer = answers.explain(model, first[0], first[1], chosen)
    kinds = [HEAT, MASK, POINTS, *([SAM] if answers.has_sam else [])]

    with gr.Blocks(
        title="Where does CLIP see it?", analytics_enabled=False, delete_cache=(_KEPT, _KEPT)
    ) as blocks:
        gr.HTML(
            "<h1>Where does CLIP see it?</h1><p>Drop a picture, type words: CLIP Surgery shows where "
            "they are, beside plain CLIP.</p>",
            elem_id="head",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300, elem_id="asked"):
                picture = gr.Image(
                    first[0],
                    label="Picture",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=260,
                    buttons=[],
                    elem_id="picture",
                )
                # Its file is opened by `common.pictures`, with its limits, and not by gradio.
                # (A class of its own would make gradio write a file beside this one.)
                picture.preprocess = _path_of
                words = gr.Textbox(
                    first[1], label="Words, with commas between them", max_lines=3, elem_id="words"
                )
                go = gr.Button("Show where", variant="primary", elem_id="go")
                shown_examples = gr.Dataset(
                    components=[picture],
                    samples=[[path] for path, _, _ in examples],
                    type="index",
                    label="Examples: scenes that the demo's CLIP has never seen",
                    elem_id="examples",
                )
                named = gr.Dropdown(
                    answers.models,
                    value=model,
                    allow_custom_value=answers.any_model,
                    label="Model",
                    info="Name and weights"
                    + (
                        "; any other than the demo is downloaded when it is first used"
                        if answers.any_model
                        else ""
                    ),
                    elem_id="model",
                )
                picked = gr.CheckboxGroup(
                    methods, value=chosen, label="Methods, side by side", elem_id="methods"
                )
            with gr.Column(scale=5, min_width=320):
                notice = gr.HTML(notice_page(answer.notice), elem_id="notice")
                with gr.Row(elem_id="view"):
                    kind = gr.Radio(kinds, value=HEAT, label="Show", elem_id="kind")
                    opacity = gr.Slider(0, 1, View.opacity, step=0.05, label="Opacity")
                    colours = gr.Dropdown(_COLOUR_MAPS, value=View.colour_map, label="Colours")
                    mask_from = gr.Slider(
                        0, 1, View.mask_from, step=0.01, label="Threshold", visible=False
                    )
                    points_from = gr.Slider(
                        0, 1, View.points_from, step=0.01, label="Positive from", visible=False
                    )
                with gr.Tabs():
                    with gr.Tab("Words"):
                        maps = gr.HTML(maps_page(answer, View()), elem_id="maps")
                    with gr.Tab("Caption"):
                        text = gr.Textbox(
                            first[2],
                            label="Caption: which of its words does CLIP see?",
                            elem_id="text",
                        )
                        read = gr.Button("Rank its words", elem_id="read")
                        token = gr.Radio(
                            [],
                            label="Tokens with rank and cosine; choose one to see where it is",
                            visible=False,
                            elem_id="token",
                        )
                        caption = gr.HTML(elem_id="caption")
                    with gr.Tab("CLIP's own words"):
                        steps = gr.Slider(
                            20,
                            400,
                            100,
                            step=10,
                            label="Steps of gradient ascent on text (a large model takes minutes)",
                        )
                        ask = gr.Button("Ask CLIP what it would say", elem_id="ask")
                        own = gr.HTML(elem_id="own")
        kept = {
            name: gr.State(value, time_to_live=_KEPT)
            for name, value in (("maps", answer), ("caption", None), ("own", None))
        }
        view = [kind, opacity, colours, mask_from, points_from]

        def drawn(answer: Answer | None, *seen: Any) -> str:
            if answer is None:
                return ""
            looked = View(*seen)
            masks = None
            if looked.kind == SAM:
                masks = answers.sam_masks(answer.explanation, looked.points_from)
            return maps_page(answer, looked, masks)

        def placed(found: CaptionExplanation | None, position: int | None, *seen: Any) -> str:
            return (
                ""
                if found is None or position is None
                else caption_page(found, position, View(*seen))
            )

        def place(*given: Any) -> Any:
            return "", placed(*given)

        def explain(model: str, path: str, words: str, methods: list[str], *seen: Any) -> Any:
            answer = answers.explain(model, path, words, methods)
            return notice_page(answer.notice), answer, drawn(answer, *seen)

        def rank(model: str, path: str, text: str, *seen: Any) -> Any:
            found, said = answers.caption(model, path, text)
            best = found.order[0]
            radio = gr.Radio(choices=token_choices(found), value=best, visible=True)
            return notice_page(said), found, radio, placed(found, best, *seen)

        def opine(model: str, path: str, steps: float, *seen: Any) -> Any:
            answer = answers.words(model, path, int(steps))
            return "", answer, drawn(answer, *seen)

        def switch(model: str) -> Any:
            title, methods = answers.methods(model)
            chosen = [method for method in BESIDE if method in methods] or methods[:1]
            return notice_page(f"Loaded {title}."), gr.CheckboxGroup(choices=methods, value=chosen)

        def example(index: int) -> Any:
            return examples[index]

        def redraw(answer: Any, of_caption: Any, position: Any, own: Any, *seen: Any) -> Any:
            kind = seen[0]
            return (
                notice_page(""),
                gr.Slider(visible=kind == HEAT),
                gr.Dropdown(visible=kind == HEAT),
                gr.Slider(visible=kind == MASK),
                gr.Slider(visible=kind in (POINTS, SAM)),
                drawn(answer, *seen),
                placed(of_caption, position, *seen),
                drawn(own, *seen),
            )

        def on(
            events: Any, function: Callable[..., Any], inputs: Any, outputs: Any, **more: Any
        ) -> Any:
            told = _telling(function, len(outputs))
            return gr.on(events, told, inputs, outputs, api_visibility="private", **more)

        asked = [named, picture, words, picked, *view]
        to_maps = [notice, kept["maps"], maps]
        on([go.click, words.submit, picked.input, picture.input], explain, asked, to_maps)
        to_caption = [notice, kept["caption"], token, caption]
        on([read.click, text.submit], rank, [named, picture, text, *view], to_caption)
        on([token.input], place, [kept["caption"], token, *view], [notice, caption])
        on([ask.click], opine, [named, picture, steps, *view], [notice, kept["own"], own])
        switched = on([named.input], switch, [named], [notice, picked])
        switched.success(
            _telling(explain, 3), asked, to_maps, api_visibility="private", show_progress="hidden"
        )
        chosen_one = shown_examples.click(
            example, [shown_examples], [picture, words, text], api_visibility="private"
        )
        chosen_one.then(_telling(explain, 3), asked, to_maps, api_visibility="private")
        for changed in (
            kind.input,
            opacity.input,
            colours.input,
            mask_from.input,
            points_from.input,
        ):
            on(
                [changed],
                redraw,
                [kept["maps"], kept["caption"], token, kept["own"], *view],
                [notice, opacity, colours, mask_from, points_from, maps, caption, own],
                trigger_mode="always_last",
                show_progress="hidden",
            )
    return blocks


def _path_of(payload: Any) -> str | None:
    """The path of what was dropped, as it was uploaded."""
    return None if payload is None else payload.path


def _telling(function: Callable[..., Any], outputs: int) -> Callable[..., Any]:
    """What goes wrong as a sentence in the first output, the others as they were."""

    @functools.wraps(function)
    def told(*given: Any) -> Any:
        try:
            return function(*given)
        except (UserError, OSError) as error:
            said = str(error)
        except Exception:
            log.exception("the page could not answer")
            said = "That went wrong inside the app; the terminal that it runs in says how."
        return notice_page(said, error=True), *([gr.skip()] * (outputs - 1))

    return told


def _examples(folder: Path) -> list[tuple[str, str, str]]:
    """Path, words and caption of drawn scenes."""
    found = []
    (folder / "examples").mkdir(parents=True, exist_ok=True)
    for index in SCENES:
        scene = draw_scene(2026, index, 288)
        path = folder / "examples" / f"scene-{index:02d}.png"
        Image.fromarray(scene.image).save(path)
        found.append((str(path), ", ".join(scene.nouns), scene.caption))
    return found
