"""What happens when something on the page is touched."""

from __future__ import annotations

import html
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
from counterpoint.apps.request import ControlRequest, GenerateRequest, build
from counterpoint.apps.run import conditions, open_request
from counterpoint.apps.studio.form import SLOTS, Form, Offer, Slot, keep, labelled, requests
from counterpoint.apps.studio.work import Made, Progress, StoppedError, Workshop, spoken
from counterpoint.conditions.image import read_image
from counterpoint.conditions.layout import draw_layout, parse_layout
from counterpoint.types import Image, UserError, kind_of

NONE = "none"
"""A control's kind if the control is not used."""
BOARD = 256
"""Side of the picture on which boxes are clicked."""
_Values = Mapping[str, Any]


@dataclass
class Actions:
    """The handlers that need the workshop.

    Attributes:
        workshop: makes the pictures.
        offer: with what.
        names: of the fields, in the page's order.
        stops: what stops the work of each open page.
    """

    workshop: Workshop
    offer: Offer
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
        picture = None if canvas is None else canvas["composite"]
        if picture is None:
            gr.Warning("draw something first")
            return None
        return str(keep(_flat(picture), self.workshop.folder))

    def kept(self) -> list[tuple[str, str]]:
        """The pictures so far, newest first, under their names."""
        return [(str(path), path.name) for path in self.workshop.history()]

    def choose(self, event: gr.SelectData) -> tuple[str, str]:
        """A picture of the history, and what it is; it may have gone since the page was loaded."""
        path = self.workshop.folder / Path(event.value["caption"]).name
        try:
            request = read_recipe(path)["request"]
        except (UserError, KeyError) as error:
            return "", str(error)
        controls = ", ".join(one["label"] for one in request["controls"]) or "no controls"
        return str(path), f"**{path.name}**: {html.escape(request['prompt'])}; {controls}; {request['fusion']}"

    def again(self, chosen: str) -> str:
        """What came of making a kept picture again."""
        if not chosen:
            return "Choose a picture first."
        try:
            found = self.workshop.again(Path(chosen))
        except UserError as error:
            return f"**{error}**"
        if not found.differences and found.distance == 0:
            return f"{Path(chosen).name} was made again: every pixel is the same."
        listed = "; ".join(found.differences) or "nothing that the recipe names differs"
        return f"{Path(chosen).name} was made again; pixels differ by up to {found.distance} of 255. {listed}"

    def reuse(self, chosen: str) -> list[Any]:
        """Fields that say what a kept picture's recipe says."""
        if not chosen:
            gr.Warning("choose a picture first")
            return [gr.skip()] * len(self.names)
        recipe = read_recipe(Path(chosen))
        request, size = recipe["request"], self.offer.size
        same = ("prompt", "negative_prompt", "gate_silence", "scheduler", "steps", "guidance_scale")
        found: dict[str, Any] = {name: request[name] for name in same}
        found |= {"fusions": [request["fusion"]], "seed": recipe["seed"], "n": 1, "size": request["width"] or size}
        found["subject"] = request["subject"][0].split() if request["subject"] else []
        controls = [one for one in request["controls"] if Path(one["image"]).is_file()]
        for i in range(1, SLOTS + 1):
            found |= {f"kind{i}": NONE, f"image{i}": None, f"mask{i}": None}
            if i <= len(controls):
                one = controls[i - 1]
                mask = read_image(Path(one["mask"])) if one["mask"] else None
                found |= {f"kind{i}": kind_of(one["label"]), f"weight{i}": float(one["weight"]), f"mask{i}": mask}
                found |= dict(zip((f"start{i}", f"end{i}"), one["window"], strict=True))
                found |= {f"{name}{i}": one[name] for name in ("image", "photo", "mode")}
        return [found.get(name, gr.skip()) for name in self.names]


def _read(path: str | None) -> Image | None:
    """An uploaded file, by our own reader: what is wrong with one is said in its words."""
    if path is None:
        return None
    try:
        return read_image(Path(path))
    except UserError as error:
        raise UserError(str(error).replace(path, Path(path).name)) from None


def _flat(picture: np.ndarray) -> Image:
    """A canvas on black, which means "no control" wherever anything does."""
    rgba = PIL.Image.fromarray(picture).convert("RGBA")
    return np.asarray(PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB"))


def painted(canvas: Mapping[str, Any] | None) -> Image | None:
    """A drawing as a mask."""
    if canvas is None or canvas["composite"] is None:
        gr.Warning("paint something first")
        return None
    return _flat(canvas["composite"])


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


def drawn_layout(boxes: list[list[Any]], actions: list[list[Any]]) -> Any:
    """The boxes, drawn; while a row is being typed, as they were."""
    try:
        instances = [{"phrase": str(row[0]), "box": [float(edge) for edge in row[1:]]} for row in boxes if row[0]]
        done = [{"subject": a, "action": b, "object": c} for a, b, c in actions if b]
        return draw_layout(blank(), parse_layout({"instances": instances, "interactions": done}, Path()))
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
