"""What happens when something on the page is touched."""

from __future__ import annotations

import html
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import PIL.Image

from counterpoint.apps.record import read_recipe
from counterpoint.apps.replay import request_of
from counterpoint.apps.request import ControlRequest, GenerateRequest, build
from counterpoint.apps.run import conditions, is_out_of_memory, open_request
from counterpoint.apps.studio.form import (
    SLOTS,
    Form,
    Offer,
    Slot,
    called,
    keep,
    keep_layout,
    labelled,
    layout_content,
    requests,
)
from counterpoint.apps.studio.work import Made, Progress, StoppedError, Workshop, spoken
from counterpoint.conditions.image import read_image
from counterpoint.conditions.layout import Layout, draw_layout, parse_layout, read_layout
from counterpoint.control.weight import Weight
from counterpoint.types import Image, UserError

NONE = "none"
"""A control's kind if the control is not used."""
BOARD = 256
"""Side of the picture on which boxes are clicked."""
CANVAS = 384
"""Side of what is drawn on, in pixels."""
_LOG = logging.getLogger(__name__)
_Values = Mapping[str, Any]


@dataclass
class Actions:
    """The handlers that need the workshop.

    Attributes:
        workshop: makes the pictures.
        offer: with what.
        kinds: of control that the page offers.
        adapters: likewise.
        names: of the fields, in the page's order.
        stops: what stops the work of each open page.
    """

    workshop: Workshop
    offer: Offer
    kinds: Sequence[str] = ()
    adapters: Sequence[str] = ()
    names: list[str] = field(default_factory=list)
    stops: dict[str, threading.Event] = field(default_factory=dict)

    def _form(self, values: _Values) -> Form:
        slots = []
        for i in range(1, SLOTS + 1):
            kind = None if values[f"kind{i}"] == NONE else values[f"kind{i}"]
            image = _read(values[f"image{i}"]) if kind else None
            how = (values[f"{name}{i}"] for name in ("photo", "weight", "start", "end", "mode", "mask"))
            slots.append(Slot(kind, image, *how))
        rest = {name: values[name] for name in Form.__dataclass_fields__ if name not in {"slots", "reference"}}
        for name in ("seed", "n", "size"):
            if rest[name] is None:
                raise UserError(f"{name} is empty: give a whole number")
        return Form(**{**rest, "reference": _read(values["reference"])}, slots=slots)

    def make(self, values: _Values, session: str) -> Iterator[Any]:
        """Fields -> status, gallery, pages, who won where, history, and which buttons can be pressed."""
        stop = self.stops[session] = threading.Event()
        busy = gr.update(interactive=False), gr.update(interactive=True)
        free = gr.update(interactive=True), gr.update(interactive=False)
        skip = gr.skip()
        shown: list[tuple[Any, str]] = []
        pages: list[str] = []
        seconds = 0.0
        try:
            wanted = requests(self._form(values), self.workshop.folder, self.offer)
            yield "Loading the model …", [], [], "", skip, *busy
            for event in self.workshop.make(wanted, stop):
                if isinstance(event, str):
                    gr.Warning(event)
                elif isinstance(event, Progress):
                    rule = wanted[event.request].fusion
                    done = f"{rule}: " if len(wanted) > 1 else ""
                    preview = [] if event.preview is None else [(event.preview, f"{rule}, step {event.step}")]
                    gallery = [*shown, *preview] if preview else skip
                    yield f"{done}step {event.step} of {event.steps}", gallery, skip, skip, skip, *busy
                else:
                    shown += [(str(one.path), _caption(one)) for one in event]
                    pages += [one.page for one in event]
                    seconds += event[0].seconds
                    yield f"made {len(shown)} in {seconds:.1f} s", shown, pages, _frame(pages[0]), self.kept(), *busy
            yield skip, skip, skip, skip, skip, *free
        except StoppedError:
            yield "cancelled", shown, pages, skip, self.kept(), *free
        except UserError as error:
            gr.Warning(str(error), title="That does not work")
            yield f"**{error}**", skip, skip, skip, skip, *free
        except Exception as error:  # a fault of ours: the page says so, and its buttons can be pressed again
            _LOG.exception("a picture could not be made")
            said = "out of memory: make fewer or smaller pictures" if is_out_of_memory(error) else _fault(error)
            yield f"**{said}**", shown, pages, skip, self.kept(), *free
        finally:
            self.stops.pop(session, None)

    def stop(self, request: gr.Request) -> None:
        """End the work of an open page within one step."""
        if stop := self.stops.get(str(request.session_hash)):
            stop.set()

    def see(self, kind: str, photo: bool, image: str | None) -> Any:
        """A control's image as its network will see it."""
        if image is None or kind in (NONE, None):
            return None
        try:
            path = keep(_read(image), self.workshop.folder)
            control = build(ControlRequest, label=kind, image=path, photo=bool(photo))
            request = build(GenerateRequest, prompt="", model=self.offer.model, controls=(control,))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                seen = conditions(open_request(request), self.offer.size, self.offer.size)[kind]
            for warning in spoken(caught):
                gr.Warning(warning.replace(str(path), "this image"))
            return seen
        except UserError as error:
            gr.Warning(str(error), title="That does not work")
            return None

    def drawing(self, canvas: Mapping[str, Any] | None) -> str | None:
        """A drawing as a control's image."""
        if canvas is None or canvas["background"] is None:
            gr.Warning("draw something first")
            return None
        ground = canvas["background"][..., :3]
        ground = np.zeros_like(ground) if (ground == 255).all() else ground  # so an editor is when it was cleared
        return str(keep(_over(ground, canvas), self.workshop.folder))

    def kept(self) -> list[tuple[str, str]]:
        """The pictures so far, newest first, under their names."""
        return [(str(path), path.name) for path in self.workshop.history()]

    def choose(self, event: gr.SelectData) -> tuple[str, str]:
        """A picture of the history, and what it is; it may have gone since the page was loaded."""
        path = self.workshop.folder / Path(event.value["caption"]).name
        try:
            request = request_of(read_recipe(path), {}, path.name)
        except UserError as error:
            return "", html.escape(str(error))
        controls = ", ".join(one.label for one in request.controls) or "no controls"
        return str(path), f"**{path.name}**: {html.escape(request.prompt)}; {controls}; {request.fusion}"

    def open_layout(self, path: str) -> tuple[Any, Any, Any]:
        """The tables and the reference that a layout file says."""
        try:
            layout = read_layout(Path(path), within=self.workshop.folder)
            found = layout_fields(layout, self.workshop.folder)
        except UserError as error:
            gr.Warning(str(error).replace(path, Path(path).name), title="That does not work")
            return gr.skip(), gr.skip(), gr.skip()
        if layout.reference is not None and (layout.reference.weight != 1 or layout.reference.mask is not None):
            gr.Warning("the page takes the reference everywhere and at weight 1")
        return found["boxes"], found["actions"], found["reference"]

    def save_layout(self, boxes: list[list[Any]], actions: list[list[Any]], reference: str | None) -> Any:
        """The tables and the reference as a layout file."""
        try:
            path = keep_layout(boxes, actions, _read(reference), self.workshop.folder)
        except UserError as error:
            gr.Warning(str(error), title="That does not work")
            return gr.skip()
        return gr.update(value=str(path), visible=True)

    def again(self, chosen: str) -> str:
        """What came of making a kept picture again."""
        if not chosen:
            return "Choose a picture first."
        try:
            found = self.workshop.again(Path(chosen))
        except UserError as error:
            return f"**{error}**"
        except Exception as error:
            _LOG.exception("a picture could not be made again")
            return f"**{_fault(error)}**"
        if not found.differences and found.distance == 0:
            return f"{Path(chosen).name} was made again: every pixel is the same."
        listed = "; ".join(found.differences) or "nothing that the recipe names differs"
        return f"{Path(chosen).name} was made again; pixels differ by up to {found.distance} of 255. {listed}"

    def reuse(self, chosen: str) -> list[Any]:
        """Fields that say what a kept picture's recipe says."""
        if not chosen:
            gr.Warning("choose a picture first")
            return [gr.skip()] * len(self.names)
        try:
            recipe = read_recipe(Path(chosen))
            request = request_of(recipe, {}, Path(chosen).name)
            found = self._fields(request, recipe.get("seed", request.seed))
        except (UserError, OSError) as error:
            gr.Warning(str(error), title="That does not work")
            return [gr.skip()] * len(self.names)
        return [found.get(name, gr.skip()) for name in self.names]

    def _fields(self, request: GenerateRequest, seed: Any) -> dict[str, Any]:
        same = ("prompt", "negative_prompt", "scheduler", "quality", "steps", "guidance_scale")
        found: dict[str, Any] = {name: getattr(request, name) for name in same}
        found |= {"fusions": [request.fusion], "seed": seed, "n": 1, "size": request.width or self.offer.size}
        found["gate_silence"] = "silent" if request.gated else "heard"
        found["subject"] = words(request.prompt, request.subject[0].split() if request.subject else [])
        found["adapters"] = [name for name in request.aggregate if name in self.adapters]
        found |= {"boxes": [], "actions": [], "reference": None}
        if request.layout is not None:
            found |= layout_fields(read_layout(request.layout), self.workshop.folder)
        controls = [one for one in request.controls if one.image.is_file() and one.kind in self.kinds][:SLOTS]
        if len(controls) < len(request.controls):
            gr.Warning("not every control of this picture could be put back: its image is gone, or there is no room")
        foreground = request.foreground[0] if request.foreground else None
        found["foreground"] = labels(foreground, *(one.kind for one in controls))
        for i in range(1, SLOTS + 1):
            found |= {f"kind{i}": NONE, f"image{i}": None, f"mask{i}": None}
            if i <= len(controls):
                one = controls[i - 1]
                weight = Weight.parse(one.weight)
                if len(weight.knots) > 1:
                    gr.Warning(f"the weight schedule {one.weight} of {one.label} is {weight.at(0.0):g} throughout here")
                if one.steered:
                    gr.Warning(f"the push towards {one.label} as a probe reads it cannot be put back here")
                mask = read_image(one.mask) if one.mask else None
                kind = one.label if one.label in self.kinds else one.kind
                found |= {f"kind{i}": kind, f"weight{i}": weight.at(0.0), f"mask{i}": mask}
                found |= dict(zip((f"start{i}", f"end{i}"), one.window, strict=True))
                found |= {f"image{i}": str(one.image), f"photo{i}": one.photo, f"mode{i}": one.mode}
        return found


def layout_fields(layout: Layout, folder: Path) -> dict[str, Any]:
    """A layout as the fields that would say it."""
    names = called([one.phrase for one in layout.instances])
    return {
        "boxes": [[one.phrase, *one.box] for one in layout.instances],
        "actions": [[names[one.subject], one.action, names[one.object]] for one in layout.interactions],
        "reference": None if layout.reference is None else str(keep(layout.reference.image, folder)),
    }


def drawn_over(gallery: list[tuple[str, Any]] | None, boxes: list[list[Any]], actions: list[list[Any]]) -> Any:
    """The boxes, drawn over the first picture that was made."""
    if not gallery:
        gr.Warning("make a picture first")
        return gr.skip()
    with PIL.Image.open(gallery[0][0]) as made:
        return drawn_layout(boxes, actions, np.asarray(made.convert("RGB").resize((BOARD, BOARD))))


def _fault(error: Exception) -> str:
    return f"internal error: {type(error).__name__}; the terminal says more"


def _read(path: str | None) -> Image | None:
    """An uploaded file, by our own reader: what is wrong with one is said in its words."""
    if path is None:
        return None
    try:
        return read_image(Path(path))
    except UserError as error:
        raise UserError(str(error).replace(path, Path(path).name)) from None


def ground() -> dict[str, Any]:
    """What is drawn on: black, which means "no control" wherever anything does."""
    black = np.zeros((CANVAS, CANVAS, 3), np.uint8)
    return {"background": black, "layers": [], "composite": black}


def _over(ground: Image, canvas: Mapping[str, Any]) -> Image:
    """A drawing's strokes over a picture."""
    whole = PIL.Image.fromarray(ground).convert("RGBA")
    for layer in canvas["layers"]:
        whole.alpha_composite(PIL.Image.fromarray(layer))
    return np.asarray(whole.convert("RGB"))


def painted(canvas: Mapping[str, Any] | None) -> Image | None:
    """A drawing's strokes as a mask, whatever they were painted over."""
    if canvas is None or not any(layer[..., 3].any() for layer in canvas["layers"]):
        gr.Warning("paint something first")
        return None
    return _over(np.zeros_like(canvas["layers"][0][..., :3]), canvas)


def blank() -> Image:
    """What boxes are clicked on."""
    return np.full((BOARD, BOARD, 3), 245, np.uint8)


def corner(event: gr.SelectData, first: Any, phrase: str, boxes: list[list[Any]]) -> tuple[Any, Any]:
    """The first click remembers, the second one adds a box."""
    place = [value / BOARD for value in event.index]
    if not phrase.strip():
        gr.Warning("say what stands there first")
        return None, gr.skip()
    if first is None:
        return place, gr.skip()
    (left, right), (top, bottom) = (sorted(pair) for pair in zip(first, place, strict=True))
    rows = [row for row in boxes if str(row[0] or "").strip()]
    return None, [*rows, [phrase, *(round(value, 3) for value in (left, top, right, bottom))]]


def drawn_layout(boxes: list[list[Any]], actions: list[list[Any]], ground: Image | None = None) -> Any:
    """The boxes, drawn; while a row is being typed, as they were."""
    try:
        layout = parse_layout(layout_content(boxes, actions), Path())
        return draw_layout(blank() if ground is None else ground, layout)
    except (UserError, ValueError, TypeError):
        return gr.skip()


def words(prompt: str, chosen: Sequence[str]) -> Any:
    """The prompt's words, as choices of the subject."""
    words = ["".join(letter for letter in word if letter.isalnum() or letter in "'-") for word in prompt.split()]
    words = [word for word in dict.fromkeys(words) if word]
    return gr.update(choices=words, value=[word for word in words if word in chosen])


def labels(chosen: str | None, *kinds: str) -> Any:
    """The controls in use, as choices of the foreground."""
    slots = [
        Slot(None if kind == NONE else kind, np.zeros((1, 1, 3), np.uint8), False, 1, 0, 1, "balanced", None)
        for kind in kinds
    ]
    labels = list(labelled(slots))
    return gr.update(choices=labels, value=chosen if chosen in labels else None)


def _caption(one: Made) -> str:
    parts = ", ".join(f"{name} {share:.0%}" for name, share in one.shares.items())
    return f"{one.fusion} ({parts})" if len(one.shares) > 1 else one.fusion


def _frame(page: str) -> str:
    return f'<iframe srcdoc="{html.escape(page)}" title="Who won where"></iframe>' if page else ""


def who(event: gr.SelectData, pages: list[str]) -> str:
    """The page about the picture that was clicked."""
    return _frame(pages[event.index]) if event.index < len(pages) else ""
