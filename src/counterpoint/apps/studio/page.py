"""The page: its fields, and which action follows which touch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from counterpoint.apps.studio import actions
from counterpoint.apps.studio.actions import CANVAS, NONE, Actions
from counterpoint.apps.studio.form import GATES, SLOTS, Offer
from counterpoint.apps.studio.work import Workshop
from counterpoint.data.scenes.maps import SEG_PALETTE
from counterpoint.fusion import FUSIONS
from counterpoint.sampling.controls import MODES
from counterpoint.sampling.economy import QUALITIES
from counterpoint.types import CONTROL_KINDS, DEFAULT_FUSION

THEME = gr.themes.Base(
    primary_hue="violet",
    neutral_hue="slate",
    radius_size="lg",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.gradio-container { width: 100% !important; max-width: 1480px !important; margin: 0 auto !important }
#title h1 { font-size: 1.7rem; letter-spacing: -.02em; margin-bottom: .1rem }
#title p { color: var(--body-text-color-subdued); margin: 0 }
#who iframe { width: 100%; height: 46rem; border: 0; border-radius: 12px }
#result, #result .grid-wrap { height: auto !important; max-height: none !important }
#status { min-height: 1.6rem }
#history .grid-container { grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)) !important }
"""
KEYS = """
<script>
document.addEventListener("keydown", (event) => {
  const press = (id) => { const one = document.getElementById(id); if (one && !one.disabled) one.click(); };
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
    event.preventDefault();
    event.stopPropagation();
    press("generate");
  }
  if (event.key === "Escape") press("cancel");
}, true);  // before a field makes something else of the key
</script>
"""
_COLOURS = ["#ffffff", "#000000", *(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in SEG_PALETTE.tolist())]
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_PICTURE: dict[str, Any] = {"format": "png", "buttons": [], "min_width": 150}
_WHOLE: dict[str, Any] = {"precision": 0, "min_width": 90}


class Page:
    """Builds the page.

    Args:
        workshop: makes the pictures.
        offer: with what.
        folder: of the model's files.
    """

    def __init__(self, workshop: Workshop, offer: Offer, folder: Path) -> None:
        self.kinds = sorted({*offer.networks, *map(_label, _inside(folder / "controls"))})
        self.adapters = _inside(folder / "adapters")
        self.offer, self.do = offer, Actions(workshop, offer, self.kinds, self.adapters)
        self.fields: dict[str, Any] = {}

    def build(self) -> gr.Blocks:
        """The page, ready to be launched."""
        about = "# Counterpoint\nMany controls, one image. Ctrl+Enter generates, Escape cancels."
        with gr.Blocks(title="Counterpoint", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            gr.Markdown(about, elem_id="title")
            with gr.Row():
                with gr.Column(scale=5, min_width=340):
                    self._wishes()
                with gr.Column(scale=6, min_width=340):
                    self._results()
            self._wire(page)
        page.queue(max_size=32, default_concurrency_limit=1)
        return page

    def _wishes(self) -> None:
        add = self.fields
        add["prompt"] = gr.Textbox("a photo of a person on a meadow", label="Prompt", lines=2, elem_id="prompt")
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
            self.cancel = gr.Button("Cancel", elem_id="cancel", scale=1, interactive=False)
        self.status = gr.Markdown("", elem_id="status")
        with gr.Tabs(elem_id="controls"):
            for number in range(1, SLOTS + 1):
                with gr.Tab(f"Control {number}"):
                    self._slot(number)
        with gr.Accordion("How the controls become one"):
            self._rules()
        with gr.Accordion("Layout", open=False, visible=bool(self.adapters), elem_id="layout-panel"):
            self._layout()
        with gr.Accordion("Sampling", open=False, elem_id="sampling-panel"):
            with gr.Row():
                add["seed"] = gr.Number(0, label="Seed", minimum=0, elem_id="seed", **_WHOLE)
                add["n"] = gr.Number(1, label="Pictures", minimum=1, maximum=16, elem_id="n", **_WHOLE)
                add["size"] = gr.Number(self.offer.size, label="Side in pixels", minimum=8, step=8, **_WHOLE)
            with gr.Row():
                add["steps"] = gr.Slider(1, 100, 20, step=1, label="Steps", elem_id="steps")
                add["guidance_scale"] = gr.Slider(1, 15, self.offer.guidance, step=0.5, label="Guidance")
            add["scheduler"] = gr.Dropdown(
                ["unipc", "ddim", "euler", "euler-a", "dpm++", "dpm++:use_karras_sigmas=true"],
                label="Scheduler",
                allow_custom_value=True,
            )
            levels = [(f"{name}: {level.summary}", name) for name, level in QUALITIES.items()]
            add["quality"] = gr.Dropdown(levels, value="exact", label="Quality", elem_id="quality")
            add["negative_prompt"] = gr.Textbox("", label="Negative prompt")

    def _slot(self, i: int) -> None:
        add, uploads = self.fields, ["upload", "clipboard", "webcam"]
        with gr.Row():
            add[f"kind{i}"] = gr.Dropdown([NONE, *self.kinds], value=NONE, label="Kind", elem_id=f"kind-{i}")
            choices = [("a condition image", False), ("a photo to extract from", True)]
            add[f"photo{i}"] = gr.Radio(choices, value=False, label="The image is", elem_id=f"photo-{i}")
        with gr.Row():
            add[f"image{i}"] = _upload(label="Image", sources=uploads, height=230, elem_id=f"image-{i}", **_PICTURE)
            seen = gr.Image(
                label="As the network sees it", interactive=False, height=230, elem_id=f"seen-{i}", **_PICTURE
            )
        add[f"weight{i}"] = gr.Slider(0, 2, 1, step=0.05, label="Weight", elem_id=f"weight-{i}")
        with gr.Row():
            add[f"start{i}"] = gr.Slider(0, 1, 0, step=0.05, label="Speaks from", min_width=170)
            add[f"end{i}"] = gr.Slider(0, 1, 1, step=0.05, label="until", min_width=170)
        modes = [(f"{name}: {summary}", name) for name, summary in MODES.items()]
        add[f"mode{i}"] = gr.Dropdown(modes, value="balanced", label="What comes first")
        with gr.Accordion("Draw it, or paint where it speaks", open=False, elem_id=f"paint-{i}"):
            gr.Markdown("Draw the condition image; or paint white where this control may speak.")
            canvas = gr.ImageEditor(
                actions.ground(),
                label="Canvas",
                type="numpy",
                sources=["upload"],
                transforms=(),
                layers=False,
                canvas_size=(CANVAS, CANVAS),
                brush=gr.Brush(default_size=8, colors=_COLOURS, default_color=_COLOURS[0]),
                elem_id=f"canvas-{i}",
                format="png",
            )
            with gr.Row():
                drawn = gr.Button("Use the drawing", size="sm")
                region = gr.Button("Speak only here", size="sm")
                everywhere = gr.Button("Speak everywhere", size="sm")
            add[f"mask{i}"] = gr.Image(
                label="Where it speaks", interactive=False, height=130, elem_id=f"mask-{i}", **_PICTURE
            )
        given = [add[f"{name}{i}"] for name in ("kind", "photo", "image")]
        gr.on([one.change for one in given], self.do.see, given, seen, show_progress="minimal", **_PRIVATE)
        drawn.click(self.do.drawing, canvas, add[f"image{i}"], **_PRIVATE)
        region.click(actions.painted, canvas, add[f"mask{i}"], **_PRIVATE)
        everywhere.click(lambda: None, None, add[f"mask{i}"], **_PRIVATE)
        canvas.clear(actions.ground, None, canvas, **_PRIVATE)

    def _rules(self) -> None:
        add = self.fields
        add["fusions"] = gr.Dropdown(
            [(f"{name}: {rule.summary}", name) for name, rule in FUSIONS.items()],
            value=[DEFAULT_FUSION],
            multiselect=True,
            label="Rules",
            info="Several are made side by side with the same seed.",
            elem_id="fusions",
        )
        add["gate_silence"] = gr.Radio(
            list(GATES),
            value=next(iter(GATES)),
            label="Black of edges and poses",
            info="Silent, it says nothing where others speak. By default so, but not under sum and minimal-impact.",
            elem_id="gate",
        )
        add["subject"] = gr.CheckboxGroup(
            [], label="Subject", info="For cross: the words of the prompt that the foreground shows.", elem_id="subject"
        )
        add["foreground"] = gr.Dropdown(
            [], label="Foreground", info="For cross: the control that shows the subject.", elem_id="foreground"
        )

    def _layout(self) -> None:
        add = self.fields
        about = "Several are aggregated; the picture is the first one's."
        add["adapters"] = gr.CheckboxGroup(self.adapters, label="Models that read it", info=about, elem_id="adapters")
        with gr.Row():
            with gr.Column(min_width=180):
                phrase = gr.Textbox(label="What stands there", placeholder="a red ball", elem_id="phrase")
                board = gr.Image(
                    actions.blank(), label="Click two opposite corners", interactive=False, elem_id="board", **_PICTURE
                )
            with gr.Column(min_width=180):
                add["reference"] = _upload(label="Style reference", sources=["upload", "clipboard"], **_PICTURE)
        add["boxes"] = _table("Boxes", ["phrase", "left", "top", "right", "bottom"], "boxes")
        add["actions"] = _table("Who does what", ["who", "does what", "to whom"], "actions")
        with gr.Row():
            opened = gr.UploadButton("Open a layout file", file_types=[".json"], size="sm", elem_id="open-layout")
            save = gr.Button("Save as a file", size="sm", elem_id="save-layout")
            self.over = gr.Button("Draw it over the picture", size="sm", elem_id="over")
        saved = gr.File(label="Layout file", visible=False, elem_id="layout-file")
        corner, tables = gr.State(None), [add["boxes"], add["actions"]]
        self.board, fields = board, [*tables, add["reference"]]
        opened.upload(self.do.open_layout, opened, fields, **_PRIVATE)
        save.click(self.do.save_layout, fields, saved, **_PRIVATE)
        board.select(actions.corner, [corner, phrase, add["boxes"]], [corner, add["boxes"]], **_PRIVATE)
        gr.on([table.change for table in tables], actions.drawn_layout, tables, board, **_PRIVATE)

    def _results(self) -> None:
        self.gallery = gr.Gallery(
            label="Pictures",
            columns=2,
            fit_columns=False,
            height="auto",
            object_fit="contain",
            elem_id="result",
            format="png",
            interactive=False,
        )
        self.pages = gr.State([])
        with gr.Accordion("Who won where", open=False, elem_id="who-panel"):
            self.who = gr.HTML("Generate with a control: this shows which one was heard where.", elem_id="who")
        with gr.Accordion("History", open=False, elem_id="history-panel"):
            self.history = gr.Gallery(
                label="Newest first", show_label=False, columns=6, height=220, allow_preview=False,
                elem_id="history", interactive=False,
            )  # fmt: skip
            self.chosen = gr.State("")
            self.verdict = gr.Markdown("Choose a picture.", elem_id="verdict")
            with gr.Row():
                self.replay = gr.Button("Make it again", size="sm", elem_id="replay")
                self.reuse = gr.Button("Use its settings", size="sm", elem_id="reuse")

    def _wire(self, page: gr.Blocks) -> None:
        self.do.names, values = list(self.fields), list(self.fields.values())
        outputs = [self.status, self.gallery, self.pages, self.who, self.history, self.generate, self.cancel]

        def start(request: gr.Request, *given: Any) -> Iterator[Any]:
            yield from self.do.make(dict(zip(self.fields, given, strict=True)), str(request.session_hash))

        self.generate.click(start, values, outputs, concurrency_id="model", scroll_to_output=True,
                            show_progress="minimal", show_progress_on=self.gallery, **_PRIVATE)  # fmt: skip
        self.cancel.click(self.do.stop, None, None, queue=False, **_PRIVATE)
        page.unload(self.do.stop)
        words = [self.fields["prompt"], self.fields["subject"]]
        gr.on([self.fields["prompt"].change, page.load], actions.words, words, words[1], **_PRIVATE)
        page.load(self.do.kept, None, self.history, **_PRIVATE)
        kinds = [self.fields[f"kind{number}"] for number in range(1, SLOTS + 1)]
        front = self.fields["foreground"]
        gr.on([kind.change for kind in kinds], actions.labels, [front, *kinds], front, **_PRIVATE)
        tables = [self.gallery, self.fields["boxes"], self.fields["actions"]]
        self.over.click(actions.drawn_over, tables, self.board, **_PRIVATE)
        self.gallery.select(actions.who, self.pages, self.who, **_PRIVATE)
        self.history.select(self.do.choose, None, [self.chosen, self.verdict], **_PRIVATE)
        self.replay.click(self.do.again, self.chosen, self.verdict, concurrency_id="model", **_PRIVATE)
        self.reuse.click(self.do.reuse, self.chosen, values, **_PRIVATE)
        self._remember(page)

    def _remember(self, page: gr.Blocks) -> None:
        """Let a tab keep what was typed and chosen when its page loads again, as it does after the studio was away."""
        plain = (gr.Textbox, gr.Number, gr.Slider, gr.Dropdown, gr.Radio)
        kept = [field for name, field in self.fields.items() if isinstance(field, plain) and name != "foreground"]
        place = json.dumps(f"counterpoint {self.offer.model} {len(kept)}")
        gr.on([one.change for one in kept], None, kept, None, **_PRIVATE,
              js=f"(...all) => {{ sessionStorage.setItem({place}, JSON.stringify(all)) }}")  # fmt: skip
        page.load(None, kept, kept, **_PRIVATE, js=f"(...all) => JSON.parse(sessionStorage.getItem({place})) ?? all")


def _label(name: str) -> str:
    """What a request calls a model's own ControlNet: ``depth:inner`` for ``depth-inner``, another one of its kind."""
    kind, dash, which = name.partition("-")
    return f"{kind}:{which}" if dash and kind in CONTROL_KINDS and name not in CONTROL_KINDS else name


def _upload(**settings: Any) -> gr.Image:
    """A picture field that hands its file on unread: our own reader says what is wrong with one. No class of its own,
    because gradio writes an interface file beside the source of every class."""
    field = gr.Image(type="filepath", **settings)
    field.preprocess = lambda payload: None if payload is None else str(payload.path)
    return field


def _table(label: str, headers: list[str], name: str) -> gr.Dataframe:
    return gr.Dataframe(
        headers=headers,
        column_count=len(headers),
        type="array",
        label=label,
        interactive=True,
        elem_id=name,
        buttons=[],
    )


def _inside(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
