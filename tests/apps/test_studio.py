"""Behind the studio's page: fields become requests, pictures are previewed, kept and made again."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from counterpoint import load
from counterpoint.apps.record import read_recipe, save_png
from counterpoint.apps.studio.actions import Actions, painted
from counterpoint.apps.studio.form import Form, Offer, Slot, labelled, requests
from counterpoint.apps.studio.work import Made, Progress, StoppedError, Workshop, expected
from counterpoint.conditions.image import read_image
from counterpoint.conditions.layout import Interaction, read_layout
from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.render import SPLITS, scene
from counterpoint.types import UserError

OFFER = Offer("tiny", 128, 3.0, {}, "cpu", "fp32")
SCENE = scene(SPLITS["test"].start)
EMPTY = Slot(None, None, False, 1, 0, 1, "balanced", None)


def slot(kind: str, **changes: Any) -> Slot:
    return replace(Slot(kind, control_map(SCENE, kind), False, 0.75, 0.1, 0.9, "prompt", None), **changes)


def form(**changes: Any) -> Form:
    plain = Form(
        prompt="a red ball on a meadow", negative_prompt="", slots=[EMPTY] * 4, fusions=["sum"],
        gate_silence="as the rule has it", foreground=None, subject=[], adapters=[], boxes=[], actions=[],
        reference=None, scheduler="unipc", quality="exact", steps=4, guidance_scale=3.0, seed=5, n=1, size=128,
    )  # fmt: skip
    return replace(plain, **changes)


def test_fields_become_requests(tmp_path: Path) -> None:
    mask = np.full((16, 16, 3), 255, np.uint8)
    given = form(
        slots=[slot("canny"), EMPTY, slot("canny", mask=mask), slot("pose")], fusions=["sum", "cross"],
        subject=["red", "ball"], foreground="pose", gate_silence="silent",
    )  # fmt: skip
    plain, cross = requests(given, tmp_path, OFFER)
    assert [one.label for one in plain.controls] == ["canny", "canny:2", "pose"]
    assert plain.controls[0].weight == "0.75"
    assert plain.controls[0].window == (0.1, 0.9)
    assert plain.controls[0].mode == "prompt"
    assert plain.controls[0].image == plain.controls[1].image, "one file for the same pixels"
    assert plain.controls[1].mask.is_file()
    assert (plain.subject, plain.foreground) == ((), ()), "a sum lends nothing"
    assert requests(form(quality="fast"), tmp_path, OFFER)[0].quality == "fast"
    assert (cross.subject, cross.foreground) == (("red ball",), ("pose",))
    assert cross.model_copy(update={"fusion": "sum", "subject": (), "foreground": ()}) == plain


def test_boxes_become_a_layout(tmp_path: Path) -> None:
    boxes = [["a person", 0.1, 0.1, 0.4, 0.9], ["a ball", 0.5, 0.6, 0.7, 0.8], ["", None, None, None, None]]
    given = form(adapters=["interact"], boxes=boxes, actions=[["a person", "kicking", "a ball"], ["", "", ""]])
    (request,) = requests(given, tmp_path, OFFER)
    assert request.scheduler == "ddim"
    assert '"kicking"' in request.layout.read_text()
    with pytest.raises(UserError, match="two opposite corners"):
        requests(replace(given, boxes=[["a cup", 0.1, None, None, None]]), tmp_path, OFFER)
    with pytest.raises(UserError, match="a dog"):
        requests(replace(given, actions=[["a dog", "kicking", "a ball"]]), tmp_path, OFFER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"slots": [slot("pose", image=None)]}, r"control 1 \(pose\) has no image"),
        ({"slots": [slot("pose", start=0.9, end=0.1)]}, "a window is START:END"),
        ({"fusions": ["wish"]}, "unknown fusion"),
        ({"steps": 0}, "--steps"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        requests(form(**changes), tmp_path, OFFER)


def test_pictures_are_watched_kept_and_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counterpoint.apps.studio.work._LOOK_EVERY", 0.0)
    monkeypatch.setattr("counterpoint.apps.studio.work._LOOK_SHARE", 1e9)
    workshop = Workshop(tmp_path)
    wanted = requests(form(slots=[slot("seg")], fusions=["sum", "mean"]), tmp_path, OFFER)
    events = list(workshop.make(wanted, threading.Event()))
    steps = [one for one in events if isinstance(one, Progress)]
    assert [(one.request, one.step, one.steps) for one in steps] == [(r, s, 4) for r in (0, 1) for s in (1, 2, 3, 4)]
    assert [one.preview is not None for one in steps] == [False, True, True, True] * 2
    made = [one for event in events if isinstance(event, list) for one in event]
    assert all(isinstance(one, Made) for one in made)
    assert [one.fusion for one in made] == ["sum", "mean"]
    assert made[0].shares == pytest.approx({"seg": 1.0})
    assert "Who won where" in made[0].page
    assert [path.name for path in workshop.history()] == ["000002.png", "000001.png"]
    assert read_recipe(made[0].path)["seed"] == 5
    loaded = workshop.models.pipe
    assert workshop.again(made[1].path).distance == 0
    assert workshop.models.pipe is loaded, "of a large model there is no room for two"


def canvas(ground: int, at: slice | None = slice(2, 5), ink: tuple[int, ...] = (255, 255, 255)) -> dict[str, Any]:
    """What gradio's editor says: an opaque ground, and strokes on a layer that is clear elsewhere."""
    layer = np.zeros((8, 8, 4), np.uint8)
    if at is not None:
        layer[at, at] = (*ink, 255)
    return {"background": np.full((8, 8, 4), (ground,) * 3 + (255,), np.uint8), "layers": [layer], "composite": None}


@pytest.mark.parametrize("ground", [0, 255])
def test_a_drawing_is_on_black_also_on_a_canvas_that_was_cleared(tmp_path: Path, ground: int) -> None:
    do = Actions(Workshop(tmp_path), OFFER, ["canny"], [])
    drawn = read_image(Path(do.drawing(canvas(ground))))
    assert (drawn[2:5, 2:5] == 255).all()
    assert drawn.sum() == 9 * 3 * 255


def test_a_drawing_is_over_the_picture_and_a_mask_is_its_strokes(tmp_path: Path) -> None:
    do = Actions(Workshop(tmp_path), OFFER, ["canny"], [])
    assert set(np.unique(read_image(Path(do.drawing(canvas(90, ink=(0, 0, 0))))))) == {0, 90}
    mask = painted(canvas(90))
    assert (mask[2:5, 2:5] == 255).all()
    assert mask.sum() == 9 * 3 * 255
    for nothing in (None, canvas(90, None)):
        with pytest.warns(UserWarning, match="paint something first"):
            assert painted(nothing) is None


def test_stopping_takes_a_step_and_the_next_picture_is_whole(tmp_path: Path) -> None:
    workshop, stop = Workshop(tmp_path), threading.Event()
    events = workshop.make(requests(form(steps=200), tmp_path, OFFER), stop)
    next(events)
    stop.set()
    with pytest.raises(StoppedError):
        list(events)
    assert workshop.history() == []
    assert len(list(workshop.make(requests(form(), tmp_path, OFFER), threading.Event()))) == 5


def test_who_leaves_stops_the_work(tmp_path: Path) -> None:
    events = Workshop(tmp_path).make(requests(form(steps=200), tmp_path, OFFER), threading.Event())
    next(events)
    events.close()
    assert not [one for one in threading.enumerate() if one.name == "studio"]


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "unipc"])
def test_a_preview_is_what_the_step_promises(scheduler: str) -> None:
    """Exact where the noise really is constant; at the last step it is the picture itself."""
    pipe = load("tiny", scheduler=scheduler)
    seen: list[torch.Tensor] = []

    def heard(_: Any, __: int, ___: Any, state: dict) -> dict:
        seen.append(state["latents"].clone())
        return {}

    final = pipe("a red ball", num_inference_steps=6, generator=torch.manual_seed(0), output_type="latent",
                 callback_on_step_end=heard).images  # fmt: skip
    torch.testing.assert_close(expected(pipe.scheduler, 5, seen[4], seen[5]), final, rtol=1e-4, atol=1e-4)
    early = expected(pipe.scheduler, 2, seen[1], seen[2])
    assert (early - final).square().mean() < (seen[2] / pipe.scheduler.init_noise_sigma - final).square().mean()
    if scheduler == "ddim":
        clean, noise = torch.randn(2, 1, 4, 4, 4)
        a, b = (float(pipe.scheduler.alphas_cumprod[int(t)]) for t in pipe.scheduler.timesteps[2:4])
        before, after = (x**0.5 * clean + (1 - x) ** 0.5 * noise for x in (a, b))
        torch.testing.assert_close(expected(pipe.scheduler, 2, before, after), clean, rtol=1e-3, atol=1e-3)


def test_labels_of_a_kind_differ() -> None:
    assert list(labelled([slot("pose"), EMPTY, slot("pose"), slot("pose")])) == ["pose", "pose:2", "pose:3"]


def page(folder: Path, names: list[str]) -> Any:
    from counterpoint.apps.studio.actions import Actions

    return Actions(Workshop(folder), OFFER, ["pose", "seg"], ["interact"], names)


def fields() -> dict[str, Any]:
    """The page as it opens."""
    plain = form()
    values = {name: getattr(plain, name) for name in Form.__dataclass_fields__ if name != "slots"}
    for i in range(1, 5):
        empty = {"kind": "none", "image": None, "photo": False, "weight": 1, "start": 0, "end": 1, "mode": "balanced"}
        values |= {f"{name}{i}": value for name, value in {**empty, "mask": None}.items()}
    return values


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError("a fault of ours"), "internal error: ZeroDivisionError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    ],
)
def test_a_fault_leaves_the_buttons_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("counterpoint.apps.studio.work.run", broken)
    *_, last = page(tmp_path, []).make(fields(), "session")
    assert said in last[0]
    generate, cancel = last[-2:]
    assert (generate["interactive"], cancel["interactive"]) == (True, False)


@pytest.mark.filterwarnings("ignore::UserWarning")  # what the page would show
def test_a_kept_picture_fills_the_page(tmp_path: Path) -> None:
    """Schedules by what they begin with, a layout as boxes; what the picture had not is cleared."""
    boxes, done = (
        [["a person", 0.1, 0.1, 0.4, 0.9], ["a ball", 0.5, 0.6, 0.7, 0.8]],
        [["a person", "kicking", "a ball"]],
    )
    given = form(
        adapters=["interact"], boxes=boxes, actions=done, slots=[slot("seg")], reference=control_map(SCENE, "seg")
    )
    (request,) = requests(given, tmp_path, OFFER)
    control = request.controls[0].model_copy(update={"weight": "0:0.5,1:1"})
    gone = control.model_copy(update={"label": "pose", "image": tmp_path / "gone.png"})
    request = request.model_copy(update={"controls": (control, gone), "subject": ("red ball",)})
    names = ["prompt", "seed", "kind1", "weight1", "kind2", "adapters", "boxes", "actions", "reference", "subject"]
    kept = tmp_path / "1.png"
    for asked, layout in ((request, True), (requests(form(), tmp_path, OFFER)[0], False)):
        save_png(PIL.Image.new("RGB", (8, 8)), kept, {"request": asked.model_dump(mode="json"), "seed": 9})
        found = dict(zip(names, page(tmp_path, names).reuse(str(kept)), strict=True))
        assert (found["prompt"], found["seed"], found["kind2"]) == (asked.prompt, 9, "none")
        assert (found["kind1"], found.get("weight1")) == ("seg", 0.5) if layout else (found["kind1"] == "none")
        assert found["adapters"] == (["interact"] if layout else [])
        assert (found["boxes"], found["actions"]) == ((boxes, done) if layout else ([], []))
        assert (found["reference"] is not None) == layout
        assert found["subject"]["value"] == (["red", "ball"] if layout else [])


@pytest.mark.filterwarnings("ignore::UserWarning")  # what the page would show
@pytest.mark.parametrize("recipe", [{}, {"request": {"prompt": 5, "controls": []}}, {"request": {"controls": [[1]]}}])
def test_a_recipe_of_somebody_else_is_refused_in_words(tmp_path: Path, recipe: dict) -> None:
    from types import SimpleNamespace

    save_png(PIL.Image.new("RGB", (8, 8)), tmp_path / "1.png", recipe)
    actions = page(tmp_path, ["prompt", "seed"])
    assert [one["__type__"] for one in actions.reuse(str(tmp_path / "1.png"))] == ["update", "update"]
    assert actions.choose(SimpleNamespace(value={"caption": "1.png"}))[0] == ""


@pytest.mark.filterwarnings("ignore::UserWarning")  # what gradio says outside an app
def test_a_layout_file_goes_in_and_out_and_over_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from counterpoint.apps.studio.actions import BOARD, drawn_over

    actions = page(tmp_path, [])
    boxes = [["a person", 0.1, 0.1, 0.4, 0.9], ["a ball", 0.5, 0.6, 0.7, 0.8]]
    done = [["a person", "kicking", "a ball"]]
    style = tmp_path / "style.png"
    PIL.Image.new("RGB", (8, 8), (9, 8, 7)).save(style)
    saved = Path(actions.save_layout(boxes, done, str(style))["value"])
    found_boxes, found_done, reference = actions.open_layout(str(saved))
    assert (found_boxes, found_done) == (boxes, done)
    assert np.asarray(PIL.Image.open(reference)).tolist() == np.asarray(PIL.Image.open(style)).tolist()
    twins = {"instances": [{"phrase": "a person", "box": box, "name": name}
                           for name, box in (("left", [0, 0, 0.5, 1]), ("right", [0.5, 0, 1, 1]))],
             "interactions": [{"subject": "right", "action": "kicking", "object": "left"}]}  # fmt: skip
    (tmp_path / "twins.json").write_text(json.dumps(twins))
    two, act, _ = actions.open_layout(str(tmp_path / "twins.json"))
    assert act == [["a person 2", "kicking", "a person 1"]], "who looks alike is numbered"
    again = read_layout(Path(actions.save_layout(two, act, None)["value"]))
    assert again.interactions == (Interaction(1, "kicking", 0),)
    PIL.Image.new("RGB", (128, 128), (77, 77, 77)).save(tmp_path / "made.png")
    over = drawn_over([(str(tmp_path / "made.png"), "sum")], boxes, done)
    assert over.shape == (BOARD, BOARD, 3)
    assert (over == 77).all(-1).any()
    assert (over[26:230, 25] != 77).any(-1).all(), "the person's left edge"
    elsewhere = tmp_path.parent / f"{tmp_path.name}-private.png"
    PIL.Image.new("RGB", (8, 8)).save(elsewhere)
    (tmp_path / "foreign.json").write_text(json.dumps({"reference": str(elsewhere)}))
    assert all(one["__type__"] == "update" for one in actions.open_layout(str(tmp_path / "foreign.json")))
    saved.write_text("{")
    assert all(one["__type__"] == "update" for one in actions.open_layout(str(saved))), "refused in words"
