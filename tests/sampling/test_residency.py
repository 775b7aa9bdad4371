"""Networks that come and go make the same pictures, and are in memory only while they are at work."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import counterpoint
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.sampling.residency import RESIDENCIES, Residency
from counterpoint.types import UserError
from tests.conftest import noise

KINDS = ["pose", "seg", "canny"]
HINTS = [noise((64, 64), sigma) for sigma in (40, 90, 60)]
STAGED = [level for level in RESIDENCIES if level != "all"]


def run(pipe: Pipeline, fusion: str = "sum", **more: object) -> torch.Tensor:
    call = {"num_inference_steps": 3, "width": 64, "height": 64, "output_type": "pt", "fusion": fusion, **more}
    return pipe("a person", HINTS, generator=torch.Generator().manual_seed(0), **call).images


def present(pipe: Pipeline) -> set[str]:
    """Names of the networks whose weights are there: a placeholder is one value."""
    named = {"vae": pipe.vae, "text": pipe.text_encoder, "unet": pipe.unet, **pipe.controls}
    return {
        name
        for name, one in named.items()
        if any(p.untyped_storage().nbytes() > p.element_size() for p in one.parameters())
    }


@pytest.mark.parametrize("level", STAGED)
def test_the_pictures_are_the_same(level: str) -> None:
    pipe, staged = counterpoint.load("tiny", KINDS), counterpoint.load("tiny", KINDS, residency=level)
    for fusion, more in (("sum", {}), ("maxfusion", {}), ("cross", {"subject": "person"})):
        assert torch.equal(run(pipe, fusion, **more), run(staged, fusion, **more)), fusion
    picture = noise((64, 64), 50)
    assert torch.equal(run(pipe, image=picture), run(staged, image=picture))
    assert present(pipe) == {"vae", "text", "unet", *KINDS}
    assert present(staged) == set()


@pytest.mark.parametrize(("level", "fusion"), [("stages", "sum"), ("controls", "sum"), ("controls", "maxfusion")])
def test_who_is_there_when(level: str, fusion: str) -> None:
    pipe = counterpoint.load("tiny", KINDS, residency=level)
    found: dict[str, set[str]] = {}
    parts = {"text": pipe.text_encoder, "unet": pipe.unet, "pose": pipe.controls["pose"].mid_block}
    for name, module in {**parts, "vae": pipe.vae.decoder}.items():
        module.register_forward_hook(lambda *_, name=name: found.__setitem__(name, present(pipe)))
    run(pipe, fusion)
    together = {"unet", *KINDS}
    by_turns = level == "controls" and fusion == "sum"
    assert found["text"] == {"text"}
    assert found["vae"] == {"vae"}
    assert found["unet"] == ({"unet"} if by_turns else together)
    assert found["pose"] == ({"unet", "pose"} if by_turns else together)


def test_some_controls_stay_while_others_come_and_go() -> None:
    pipe = counterpoint.load("tiny", KINDS, residency="controls")
    assert pipe.residency is not None
    pipe.residency.going = ("seg",)
    found: list[set[str]] = []
    for network in (pipe.unet, pipe.controls["seg"].mid_block):
        network.register_forward_pre_hook(lambda *_: found.append(present(pipe)))
    made = run(pipe)
    assert found[:2] == [{"unet", *KINDS}, {"unet", "pose", "canny"}]
    assert present(pipe) == set()
    assert torch.equal(made, run(counterpoint.load("tiny", KINDS)))


def test_a_network_leaves_when_something_fails() -> None:
    pipe = counterpoint.load("tiny", KINDS, residency="controls")

    def fails(*_: object) -> None:
        raise RuntimeError("no memory")

    hook = pipe.controls["seg"].mid_block.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="no memory"):
        run(pipe)
    assert present(pipe) == set()
    hook.remove()
    assert torch.equal(run(pipe), run(counterpoint.load("tiny", KINDS)))


@pytest.mark.parametrize("which", [0, 3])
def test_a_network_that_could_not_come_is_fetched_again(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoder is the first that comes; later ones come by hooks of the call itself."""
    pipe = counterpoint.load("tiny", KINDS, residency="controls")
    fetched = []

    def full(path: Path) -> dict[str, torch.Tensor]:
        fetched.append(path)
        if len(fetched) > which:
            raise MemoryError
        return load_file(path)

    with monkeypatch.context() as patch:
        patch.setattr("counterpoint.sampling.residency.load_file", full)
        with pytest.raises(MemoryError):
            run(pipe)
    assert torch.equal(run(pipe), run(counterpoint.load("tiny", KINDS)))


def test_on_an_accelerator_weights_wait_where_they_were() -> None:
    """With a CPU in the accelerator's place, since there may be none here: nothing is written, nothing copied back."""
    network = torch.nn.Linear(2, 2)
    weight = network.weight.data
    residency = Residency("stages", torch.device("cpu"))
    residency._folder = None
    residency.send_home(network, None)
    assert network.weight.data_ptr() == weight.data_ptr()
    with residency.present(network, None), residency.present(network):
        network.weight.data = torch.ones(2, 2)  # a copy on the accelerator
    assert network.weight.data_ptr() == weight.data_ptr()


def test_the_files_go_with_the_pipeline() -> None:
    pipe = counterpoint.load("tiny", ["pose"], residency="stages")
    assert pipe.residency is not None
    folder = pipe.residency._folder
    assert folder is not None
    assert len(list(folder.iterdir())) == 4
    del pipe
    gc.collect()
    assert not folder.exists()


def test_what_does_not_go_together_is_said() -> None:
    pipe = counterpoint.load("tiny", ["pose"], residency="stages", scheduler="ddim")
    with pytest.raises(UserError, match="come and go by themselves"):
        pipe.to("cpu")
    with pytest.raises(UserError, match="cannot be adapted"):
        pipe.adapted("interact")
    with pytest.raises(UserError, match="cannot be aggregated"):
        counterpoint.aggregate([pipe, pipe])
    with pytest.raises(UserError, match="unknown residency 'some'; there are all, stages, controls"):
        counterpoint.load("tiny", residency="some")
    with pytest.raises(UserError, match="OpenVINO keeps its networks"):
        counterpoint.load("tiny", device="openvino", residency="stages")
