"""The service: jobs end once, limits hold before work, strangers see nothing, and nothing malformed is our fault."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from fastapi.testclient import TestClient

from counterpoint.apps.run import is_out_of_memory
from counterpoint.apps.service.app import make_app
from counterpoint.apps.service.pace import Pace
from counterpoint.apps.service.safety import load_safety, safety
from counterpoint.apps.service.schema import Limits
from counterpoint.apps.service.state import Config
from counterpoint.apps.service.store import ATTEMPTS, CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job, Store
from counterpoint.apps.service.worker import Worker
from counterpoint.types import UserError
from tests.conftest import noise

KEYS = ("k" * 16, "l" * 16)
LIMITS = Limits(body=400_000, pixels=128 * 160, controls=2, steps=30, images=2, queue=6, queue_each=4, seconds=120)


def picture(size: tuple[int, int] = (128, 128), form: str = "PNG") -> str:
    file = io.BytesIO()
    noise(size, 50).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


LARGE = base64.b64encode(cv2.imencode(".png", np.zeros((128, 160, 3), np.uint8))[1].tobytes()).decode()
POSE_SEG = [{"label": label, "image": picture()} for label in ("pose", "seg")]
THING = {"phrase": "a ball", "box": [0, 0, 1, 1]}
EVEN = base64.b64encode(cv2.imencode(".png", np.zeros((400, 400, 3), np.uint8))[1].tobytes()).decode()


def headers(number: int = 0) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[number]}"}


@pytest.fixture
def opened(database: str) -> Iterator[Callable[[], Store]]:
    """Opens the same database again and again."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(closing(Store(database)))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    config = Config(
        tmp_path_factory.mktemp("service"), {"tiny": "tiny"}, {"tiny": 128}, frozenset(KEYS), limits=LIMITS, threads=1,
        grace=0,
    )  # fmt: skip
    with TestClient(make_app(config), headers=headers()) as made:
        yield made


def submit(client: TestClient, **more: Any) -> Any:
    return client.post("/v1/jobs", json={"prompt": "a red ball", "steps": 2, **more})


def ended(client: TestClient, name: str, patience: float = 90) -> dict[str, Any]:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        job = client.get(f"/v1/jobs/{name}").json()
        if job["state"] not in {"queued", "running"}:
            return job
        time.sleep(0.1)
    raise AssertionError(job)


@pytest.mark.enable_socket
def test_a_job_from_start_to_picture(client: TestClient) -> None:
    image = f"data:image/png;base64,{picture((64, 100))}"
    controls = [{"label": "pose", "image": image, "weight": "0:1,0.5:0.4"}]
    answer = submit(client, controls=controls, n=2, seed=5, width=128, height=64)
    assert answer.status_code == 202, answer.text
    accepted = answer.json()
    assert accepted["estimated_seconds"] > 0
    events = client.get(f"/v1/jobs/{accepted['id']}/events").text
    job = ended(client, accepted["id"])
    assert job["state"] == "done", job
    assert [one["seed"] for one in job["images"]] == [5, 6]
    last = json.loads(events.strip().rpartition("data: ")[2])
    assert last == job
    image = client.get(f"/v1/jobs/{job['id']}/images/1")
    with PIL.Image.open(io.BytesIO(image.content)) as made:
        assert made.size == (128, 64)
        text = made.text["counterpoint"]
    recipe = json.loads(text)
    assert recipe["seed"] == 6
    assert recipe["request"]["controls"][0]["image"] == "control-0.png"
    assert str(client.app.state.service.config.folder) not in text, "where things are here is nobody's business"
    assert recipe["safety"] == "unchecked"
    assert client.get(f"/v1/jobs/{job['id']}/images/2").status_code == 404
    assert job["id"] in [one["id"] for one in client.get("/v1/jobs").json()]


@pytest.mark.enable_socket
def test_strangers_see_nothing(client: TestClient) -> None:
    name = submit(client).json()["id"]
    other = headers(1)
    for path in ("", "/events", "/images/0"):
        assert client.get(f"/v1/jobs/{name}{path}", headers=other).status_code == 404
    assert client.delete(f"/v1/jobs/{name}", headers=other).status_code == 404
    assert name not in [one["id"] for one in client.get("/v1/jobs", headers=other).json()]
    for wrong in ({"Authorization": ""}, {"Authorization": "Bearer no"}, {"Authorization": "Basic kkk"}):
        assert client.post("/v1/jobs", json={"prompt": "a"}, headers=wrong).status_code == 401
        assert client.get("/v1/models", headers=wrong).status_code == 401
    assert ended(client, name)["state"] == "done"


@pytest.mark.enable_socket
def test_cancelled_within_a_step_and_the_next_job_runs(client: TestClient) -> None:
    running, waiting = (submit(client, steps=30, n=2).json()["id"] for _ in range(2))
    while client.get(f"/v1/jobs/{running}").json()["step"] < 1:
        time.sleep(0.05)
    assert client.get(f"/v1/jobs/{running}/images/0").status_code == 409
    for name in (waiting, running):
        assert client.delete(f"/v1/jobs/{name}").status_code == 200
    assert ended(client, running)["state"] == "cancelled"
    assert ended(client, running)["step"] < 30
    assert ended(client, waiting)["state"] == "cancelled"
    assert ended(client, submit(client).json()["id"])["state"] == "done"


@pytest.mark.enable_socket
def test_a_worker_that_dies_costs_an_attempt_and_no_job(client: TestClient) -> None:
    name = submit(client, steps=30, n=2, width=128, height=160).json()["id"]
    service = client.app.state.service
    for number in range(1, ATTEMPTS + 1):  # each death counts once it is another attempt's
        while (job := service.store.get(name, _owner(0))).attempts < number or job.state != "running" or job.step < 1:
            assert job.state in {"queued", "running"}
            time.sleep(0.05)
        service.worker.process.kill()
    job = ended(client, name)
    assert job["state"] == "failed"
    assert "its worker died 2 times" in job["reason"]
    assert ended(client, submit(client).json()["id"])["state"] == "done"


def _owner(number: int) -> str:
    import hashlib

    return hashlib.sha256(KEYS[number].encode()).hexdigest()[:32]


@pytest.mark.enable_socket
def test_full_queues_say_when(client: TestClient) -> None:
    made = [submit(client, steps=25) for _ in range(LIMITS.queue_each + 1)]
    assert [one.status_code for one in made] == [202] * LIMITS.queue_each + [429]
    assert int(made[-1].headers["Retry-After"]) >= 1
    assert "your queue is full" in made[-1].json()["detail"]
    others = [client.post("/v1/jobs", json={"prompt": "a", "steps": 1}, headers=headers(1)) for _ in range(3)]
    assert [one.status_code for one in others] == [202, 202, 429]
    assert "the queue is full" in others[-1].json()["detail"]
    for one in made[:-1]:
        client.delete(f"/v1/jobs/{one.json()['id']}")
    for one in others[:-1]:
        until = time.monotonic() + 60
        while client.get(f"/v1/jobs/{one.json()['id']}", headers=headers(1)).json()["state"] != "done":
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.mark.enable_socket
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"steps": 31}, "steps: 31 are more than this service allows, 30"),
        ({"n": 3}, "n: 3 are more"),
        ({"width": 1024, "height": 1024}, "width times height: 1,048,576 are more"),
        ({"width": 100}, "width"),
        ({"model": "/etc"}, "unknown model '/etc'; there are tiny"),
        ({"controls": [{"label": "pose", "image": "!"}]}, "control-0 is not base64"),
        ({"controls": [{"label": "pose", "image": base64.b64encode(b"text").decode()}]}, "control-0"),
        ({"controls": [{"label": "pose", "image": EVEN}]}, "has 400 x 400 pixels; the limit is 20,480"),
        ({"controls": [{"label": "smell", "image": picture()}]}, "tiny has no control 'smell'; it has canny"),
        ({"controls": [{"label": "pose:mi/../../../x", "image": picture()}]}, "a control is called kind or kind:name"),
        ({"controls": [{"label": "pose", "image": picture(), "extractor": "x"}]}, "there is no such key"),
        ({"controls": [{"label": "pose", "image": picture(), "weight": "x"}]}, "a weight is a number"),
        ({"controls": [{"label": "pose", "image": picture(), "window": [0.9, 0.1]}]}, "START < END"),
        ({"controls": [{"label": "pose", "image": picture()}] * 2}, "two controls are called 'pose'"),
        ({"controls": [{"label": f"pose:{i}", "image": picture()} for i in range(3)]}, "controls: 3 are more"),
        ({"fusion": "confusion"}, "confusion"),
        ({"aggregate": ["../../x"]}, "is no name of an adapter"),
        ({"layout": {"instances": [{"phrase": "a", "box": [0, 0, 2, 1]}]}}, "reaches outside the picture"),
        ({"layout": {"reference": {"image": 5}}}, "the reference of a layout"),
        ({"layout": {"reference": "../../etc/passwd"}, "aggregate": ["style"]}, "reference is not base64"),
        ({"layout": {"instances": [THING]}}, "nothing here reads a layout"),
        ({"aggregate": ["base", "migc"]}, "migc reads a layout, and there is none"),
        ({"aggregate": ["migc"], "layout": {"reference": picture()}}, "migc reads a layout's instances"),
        ({"aggregate": ["style"], "layout": {"instances": [THING]}}, "ip-adapter reads a layout's reference picture"),
        ({"aggregate": ["migc"], "layout": {"instances": [THING] * 31}}, "the layout has 31 instances; adapters"),
        ({"aggregate": ["migc"], "layout": {"instances": [{**THING, "phrase": "a" * 20_000}]}}, "20,000 bytes"),
        ({"subject": ["a" * 401]}, "subject"),
        ({"foreground": ["a" * 81]}, "foreground"),
        ({"aggregate": ["a" * 201]}, "at most 200 characters"),
        ({"lora": ["x.safetensors"]}, "lora"),
        ({"device": "cuda"}, "device"),
        ({"guidance_scale": "NaN"}, "guidance_scale"),
        ({"init_image": picture(), "strength": 0}, "strength"),
        ({"inpaint_mask": picture()}, "needs an init image"),
        ({"scheduler": "nonsense"}, "unknown scheduler 'nonsense'"),
        ({"controls": [{"label": "normal", "image": picture()}]}, "tiny has no control 'normal'; it has canny"),
        ({"aggregate": ["nope"]}, "'nope' is no name of an adapter; tiny has base"),
        ({"layout": {"reference": {"image": picture(), "zzz": 1}}}, "the reference of a layout"),
        ({"layout": {"reference": {"image": picture(), "weight": "x"}}}, "the weight of a reference"),
        ({"subject_mask": [picture((8, 8))] * 3}, "subject_mask: 3 are more"),
        ({"subject": ["dragon"], "fusion": "cross", "controls": POSE_SEG}, "the subject 'dragon' is not in the prompt"),
        ({"subject": ["person"], "fusion": "sum", "controls": POSE_SEG}, "foreground and subject belong to cross"),
        ({"foreground": ["depth"], "fusion": "cross", "controls": POSE_SEG}, "the foreground 'depth' is no control"),
        ({"subject": ["a", "a"], "fusion": "cross", "controls": POSE_SEG}, "2 subjects for 1 foregrounds"),
        ({"controls": [{"label": "pose", "image": LARGE, "mask": LARGE}], "init_image": LARGE, "inpaint_mask": LARGE},
         "more than 61,440 pixels together"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_before_any_work(client: TestClient, body: dict[str, Any], said: str) -> None:
    before = client.app.state.service.store.waiting()
    answer = submit(client, **body)
    assert answer.status_code == 422, answer.text
    assert said in answer.text
    assert client.app.state.service.store.waiting() == before


@pytest.mark.enable_socket
@pytest.mark.parametrize(
    "rest",
    [
        '"guidance_scale": NaN', '"guidance_scale": -Infinity', '"x": NaN', '"\\ud800": 1',
        '"negative_prompt": "\\ud800"',
        '"layout": {"\\ud800": 1}', '"layout": {"instances": [{"phrase": "\\ud800", "box": [0, 0, 1, 1]}]}',
        '"layout": {"instances": [{"phrase": "a", "box": [NaN, 0, 1, 1]}]}',
        '"layout": {"instances": [{"phrase": "a", "box": [' + "9" * 400 + ", 0, 1, 1]}]}",
        '"layout": {"reference": {"image": "", "weight": ' + "9" * 400 + "}}",
        '"seed": ' + "9" * 4000, '"layout": {"a": ' + "[" * 800 + "]" * 800 + "}",
    ],
)  # fmt: skip
def test_what_is_no_json_to_others_is_refused_in_words(client: TestClient, rest: str) -> None:
    answer = client.post("/v1/jobs", content=f'{{"prompt": "a", {rest}}}', headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"]
    assert '"input"' not in answer.text


@pytest.mark.enable_socket
def test_weights_may_be_numbers(client: TestClient) -> None:
    controls = [{"label": "pose", "image": picture((16, 16)), "weight": 0.8}]
    name = submit(client, controls=controls, steps=1).json()["id"]
    kept = client.app.state.service.store.get(name, _owner(0)).request["controls"][0]["weight"]
    assert kept == "0.8"
    ended(client, name)
    for _ in range(2):
        assert client.delete(f"/v1/jobs/{name}").status_code == 200
    left = client.app.state.service.store.get(name, _owner(0)).request
    assert (left["prompt"], left["steps"]) == ("", 1), "words are forgotten with the pictures"


@pytest.mark.enable_socket
def test_the_page_of_the_api_needs_no_other_machine(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "https://" not in page
    script = page.split('<script src="')[1].split('"')[0]
    assert client.get(script).status_code == 200
    for name, one in client.get("/openapi.json").json()["components"]["schemas"].items():
        assert one.get("examples") or name not in {"JobIn", "JobOut", "Accepted", "ExtractIn"}, name


def waits(worker: Worker, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not until() and time.monotonic() < deadline:
        assert worker.is_alive()
        time.sleep(0.02)
    assert until()


def test_a_worker_outlives_a_database_that_is_away(
    tmp_path: Path, opened: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a job whose model is gone fails with that reason; what hears of one that is done may fail too."""
    monkeypatch.setattr("counterpoint.apps.service.worker._PAUSE", 0.01)
    store = opened()
    store.add("gone", "a", {"model": "another"}, 1.0)
    claim, away = store.claim, iter([True, True])

    def now_and_then() -> Any:
        if next(away, False):
            raise RuntimeError("the database is away")
        return claim()

    monkeypatch.setattr(store, "claim", now_and_then)
    worker = Worker(store, tmp_path, 1.0, {"models": {"tiny": "tiny"}})
    worker.start()
    waits(worker, lambda: store.get("gone", "a").state == FAILED)
    assert "no longer offered" in store.get("gone", "a").reason
    worker.stop(0)


def test_a_queue_is_never_fuller_than_it_may_be(opened: Callable[[], Store]) -> None:
    stores = [opened() for _ in range(4)]
    said: list[str] = []

    def add(number: int) -> None:
        said.append(stores[number % 4].add(f"{number}", f"{number % 2}", {}, 1.0, 5, 3))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said.count("") == 5
    assert sum(stores[0].counts().values()) == 5
    assert len(stores[0].of("0", 24)) <= 3


def test_paces_are_learnt_for_each_model_and_remembered(opened: Callable[[], Store]) -> None:
    pace = Pace({"small": 128, "large": 1024})
    wish = {"model": "large", "steps": 20, "n": 1, "controls": [1, 2]}
    assert pace.estimate(wish, 600.0) == 600.0, "nothing is known: nothing is refused"
    store = opened()
    for name, model in (("a", "small"), ("b", "large"), ("c", "gone")):
        store.add(name, "a", {"model": model, "steps": 20, "n": 1, "controls": [1, 2]}, 1.0)
        store.end(claimed(store), DONE, images=[{"seed": 0, "seconds": 700.0 if model == "large" else 2.0}])
    again = Pace({"small": 128, "large": 1024}, store.done(100))
    assert again.estimate(wish, 600.0) == pytest.approx(700.0)
    assert again.estimate({**wish, "model": "small", "n": 2}, 600.0) == pytest.approx(4.0)
    together = {**wish, "model": "small", "aggregate": ["base", "migc", "style"]}
    assert again.estimate(together, 600.0) == pytest.approx(4.0)
    assert again.estimate({**together, "aggregation": "steps=5"}, 600.0) == pytest.approx(2.5)
    fast = {**wish, "model": "small", "quality": "fast"}
    assert again.estimate(fast, 600.0) == pytest.approx(2.0), "as long as an exact one until one was made"
    store.add("d", "a", fast, 1.0)
    store.end(claimed(store), DONE, images=[{"seed": 0, "seconds": 0.5}])
    again = Pace({"small": 128, "large": 1024}, store.done(100))
    assert again.estimate(fast, 600.0) == pytest.approx(0.5)
    assert again.estimate({**fast, "quality": "exact"}, 600.0) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_memory_is_told_from_other_faults(error: Exception, memory: bool) -> None:
    assert is_out_of_memory(error) == memory


def is_red(picture: PIL.Image.Image) -> bool:
    return picture.getpixel((0, 0))[0] > 200


def test_a_checker_of_your_own() -> None:
    red, black = (PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "black"))
    for checker in (is_red, f"{__name__}:is_red"):
        check = load_safety("flag", checker)
        assert (check(red)[1], check(black)[1]) == ("flagged", "safe")
    for checker, said in (
        ("no.such:thing", "No module"),
        (f"{__name__}:nothing", "has no attribute"),
        (f"{__name__}:KEYS", "is no function"),
        (lambda _: True, "cannot be given to another process"),
    ):
        with pytest.raises(UserError, match=said):
            load_safety("flag", checker)


def hungry(picture: PIL.Image.Image) -> bool:
    """Checks wide pictures in more memory than a machine can have."""
    return bool(picture.width > picture.height and torch.empty(2**50).any())


@pytest.mark.enable_socket
def test_a_job_that_runs_out_of_memory_leaves_its_worker_as_it_was(tmp_path: Path) -> None:
    config = Config(tmp_path, {"tiny": "tiny"}, {"tiny": 128}, safety="flag", checker=hungry, threads=1, grace=0)
    with TestClient(make_app(config)) as service:
        states, processes = [], set()
        for height in (128, 64, 128):
            job = ended(service, submit(service, height=height).json()["id"])
            states.append((job["state"], job["reason"]))
            processes.add(service.app.state.service.worker.process.pid)
    assert states == [(DONE, ""), (FAILED, "out of memory: ask for fewer or smaller pictures"), (DONE, "")]
    assert len(processes) == 1


@pytest.mark.enable_socket
def test_bodies(client: TestClient) -> None:
    large = json.dumps({"prompt": "a" * 500_000}).encode()
    assert client.post("/v1/jobs", content=large).status_code == 413
    assert client.post("/v1/jobs", content=(large[i : i + 9000] for i in range(0, len(large), 9000))).status_code == 413
    for content in (b"{", b"\xff\xfe"):
        assert client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"}).status_code == 422
    for content, kind in ((b"prompt=a", "text/plain"), (b'{"prompt": "a"}', "application/x-www-form-urlencoded")):
        answer = client.post("/v1/jobs", content=content, headers={"Content-Type": kind})
        assert (answer.status_code, "Content-Type: application/json" in answer.text) == (415, True)
    assert client.get("/v1/jobs/..%2f..%2fetc%2fpasswd").status_code == 404
    assert client.put("/v1/jobs").status_code == 405


@pytest.mark.enable_socket
def test_tools_and_operation(client: TestClient) -> None:
    answer = client.post("/v1/extract", json={"kind": "canny", "image": picture((60, 40), "JPEG")})
    assert answer.headers["content-type"] == "image/png"
    assert PIL.Image.open(io.BytesIO(answer.content)).size == (60, 40)
    for body, said in (
        ({"kind": "depth", "image": picture()}, "needs a model"),
        ({"kind": "x", "image": ""}, "nothing"),
    ):
        answer = client.post("/v1/extract", json=body)
        assert (answer.status_code, said in answer.text) == (422, True)
    known = client.get("/v1/models").json()
    assert known["models"] == [{"name": "tiny", "size": 128}]
    assert {"cross", "sum"} <= {one["name"] for one in known["fusions"]}
    assert client.get("/health", headers={"Authorization": ""}).json()["status"] == "ok"
    metrics = client.get("/metrics").text
    assert 'counterpoint_jobs{state="done"}' in metrics
    assert 'counterpoint_requests_total{route="/v1/models",status="200"}' in metrics
    schema = client.get("/openapi.json").json()
    assert schema["components"]["schemas"]["JobIn"]["examples"]
    for path, media in (
        ("/v1/jobs/{name}/events", "text/event-stream"),
        ("/v1/jobs/{name}/images/{number}", "image/png"),
    ):
        assert list(schema["paths"][path]["get"]["responses"]["200"]["content"]) == [media]
    for path, methods in schema["paths"].items():
        for one in methods.values() if path.startswith("/v1/") else ():
            refused = {code: told for code, told in one["responses"].items() if code.startswith("4")}
            assert "401" in refused, path
            for told in refused.values():
                assert told["content"]["application/json"]["schema"]["$ref"].endswith("/Problem"), path


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cfg_scale": 3}, "there is no such key"),
        ({"guidance": 3}, "guidance_scale?"),
        ({"strength": 0.3}, "strength says how far an init image is noised"),
        ({"inpaint_mask": picture()}, "an inpaint mask needs an init image"),
    ],
)
def test_what_nothing_would_hear_is_refused(client: TestClient, more: dict[str, object], said: str) -> None:
    answer = submit(client, **more)
    assert answer.status_code == 422
    assert said in answer.text


def claimed(store: Store) -> Job:
    job = store.claim()
    assert job is not None
    return job


def test_jobs_end_once_whoever_says_so_first(opened: Callable[[], Store], monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened()
    for name, owner in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        store.add(name, owner, {"prompt": name}, 1.0)
    first = claimed(store)
    assert (first.id, first.state, first.attempts) == ("a1", RUNNING, 1)
    second = claimed(store)
    assert second.id == "b1", "who was served last waits"
    assert store.end(first, DONE, images=[{"seed": 0}])
    assert not store.end(first, FAILED, "too late")
    assert not store.cancel("a1", "a")
    assert store.cancel("b1", "b")
    assert not store.cancel("b1", "a")
    assert store.to_cancel("b1")
    store.give_back(second, blame=True)
    assert store.get("b1", "b").state == CANCELLED
    assert store.counts() == {QUEUED: 1, RUNNING: 0, DONE: 1, CANCELLED: 1, FAILED: 0}
    store.claim()
    again = opened()
    again.recover()
    assert again.get("a2", "a").state == RUNNING, "another worker may be at it"
    monkeypatch.setattr("counterpoint.apps.service.store.LEASE", -1.0)
    again.recover()
    assert again.get("a2", "a").state == QUEUED
    again.claim()
    again.recover()
    assert again.get("a2", "a").state == FAILED
    assert again.get("a2", "a").reason == "its worker died 2 times"
    assert again.claim() is None


def test_a_job_belongs_to_whoever_claimed_it_last(opened: Callable[[], Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was silent beyond its lease, and then goes on, changes nothing."""
    store = opened()
    store.add("a", "a", {}, 1.0)
    late = claimed(store)
    assert store.alive(late)
    with monkeypatch.context() as patch:
        patch.setattr("counterpoint.apps.service.store.LEASE", -1.0)
        store.recover()
    mine = claimed(store)
    assert not store.alive(late)
    store.progress(late, 5, 9)
    store.give_back(late, blame=True)
    assert not store.end(late, DONE, images=[])
    job = store.get("a", "a")
    assert (job.state, job.step, job.attempts, job.seen) == (RUNNING, 0, 2, mine.seen)
    assert store.end(mine, DONE, images=[])


def test_safety() -> None:
    image = noise((32, 32), 80)
    assert load_safety("off", None)(image) == (image, "unchecked")
    assert safety("flag", lambda _: False)(image) == (image, "safe")
    assert safety("flag", lambda _: True)(image) == (image, "flagged")
    blurred, said = safety("blur", lambda _: True)(image)
    assert said == "blurred"
    assert np.asarray(blurred).std() < np.asarray(image).std() / 2
    with pytest.raises(UserError, match="refused"):
        safety("refuse", lambda _: True)(image)
    for action, said in (("hide", "unknown safety 'hide'"), ("blur", "wants --safety-checker")):
        with pytest.raises(UserError, match=said):
            load_safety(action, None)


@pytest.mark.enable_socket
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "is open to others: give --keys FILE"),
        (("--keys", "none.txt"), "cannot read the keys"),
        (("--keys", "short.txt"), "fewer than 16 characters"),
        (("--safety", "blur"), "wants --safety-checker"),
        (("--model", "x"), "--model wants NAME=VALUE"),
        (("--model", "x=/nowhere"), "there is no model"),
        (("--device", "gpu"), "there is no device"),
        (("--database", "nonsense"), "--database nonsense"),
        (("--database", "postgresql://u@h:x/db"), "--database postgresql://u@h:x/db: its port is no number"),
        (("--safety", "blur", "--safety-checker", "none:such"), "--safety-checker none:such"),
    ],
)
def test_serve_refuses(cli, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    (tmp_path / "short.txt").write_text("abc\n")
    status, _, error = cli("serve", "--port", 0, *arguments)
    assert status == 2
    assert said in error
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.enable_socket
@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://u:secret@127.0.0.1:1/db",
        "postgresql+psycopg://u:a@b:secret@127.0.0.1:1/db",
        "postgresql+psycopg://u:a/secret@127.0.0.1:1/db",
        "nonsense://u:secret@h/db",
    ],
)
def test_passwords_are_not_told(cli, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """And a URL may come from the environment, where others do not see it."""
    monkeypatch.setenv("COUNTERPOINT_DATABASE", url)
    status, out, error = cli("serve", "--port", 0)
    assert status == 2
    assert "--database " in error
    assert "u:***@" in error
    assert "secret" not in out + error


@pytest.mark.enable_socket
def test_a_port_in_use_is_said(cli) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, _, error = cli("serve", "--port", taken.getsockname()[1])
    assert status == 2
    assert "cannot listen on 127.0.0.1" in error
