"""Pictures made again: the same pixels, or what differs in so many words; and their recipes for other tools."""

from __future__ import annotations

import ast
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from counterpoint.apps.export import to_comfyui, to_diffusers
from counterpoint.apps.record import read_recipe
from counterpoint.apps.request import ControlRequest, GenerateRequest
from counterpoint.data.scenes.maps import control_map
from counterpoint.data.scenes.render import scene
from counterpoint.models.load import TINY
from counterpoint.models.weights import fingerprint
from counterpoint.types import UserError
from tests.conftest import noise


@pytest.fixture
def made(cli, tmp_path: Path) -> Path:
    for name, sigma in (("pose", 40), ("seg", 80)):
        noise((128, 128), sigma).save(tmp_path / f"{name}.png")
    status, out, error = cli(
        "generate", "a person", "--control", "pose=pose.png", "--control", "seg=seg.png", "--fusion", "pix",
        "--weight", "pose=0:1,0.5:0.4", "--steps", 2, "--n", 2, "--out", "out", "--json",
    )  # fmt: skip
    assert status == 0, error
    return tmp_path / json.loads(out)["images"][1]


def edited(path: Path, **changes: object) -> Path:
    """A picture with another recipe inside."""
    with PIL.Image.open(path) as picture:
        recipe = json.loads(picture.text["counterpoint"])
        recipe.update(changes)
        info = PngInfo()
        info.add_itxt("counterpoint", json.dumps(recipe))
        picture.save(path, pnginfo=info)
    return path


def test_the_same_pixels(cli, made: Path) -> None:
    status, out, error = cli("replay", made, "--verify")
    assert (status, out.strip()) == (0, "identical: all 128 x 128 pixels"), error
    assert not made.with_name("seed-1.replay.png").exists(), "who verifies wants no file"
    status, out, error = cli("replay", made, "--json")
    record = json.loads(out)
    assert status == 0, error
    assert (record["identical"], record["distance"], record["differences"]) == (True, 0, [])
    again = PIL.Image.open(record["image"])
    assert np.array_equal(np.asarray(again), np.asarray(PIL.Image.open(made)))
    assert cli("replay", record["image"], "--verify")[0] == 0, "a replay can be replayed"


def test_what_differs_is_listed(cli, made: Path, tmp_path: Path) -> None:
    with PIL.Image.open(made) as picture:
        recipe = json.loads(picture.text["counterpoint"])
    noise((128, 128), 10).save(tmp_path / "pose.png")
    edited(
        made,
        weights={**recipe["weights"], "model": "0" * 16},
        versions={**recipe["versions"], "torch": "0.1"},
        platform={**recipe["platform"], "threads": 99},
    )
    status, out, error = cli("replay", made, "--verify")
    assert status == 1
    assert "not identical: pixels differ by up to" in out
    for said in (
        "version of torch: 0.1 -> ",
        f"weights of model: {'0' * 16} -> ",
        "image of pose: ",
        "threads: 99 -> ",
    ):
        assert f"differs: {said}" in error
    assert "image of seg" not in error


def test_a_changed_pixel_is_seen(cli, made: Path) -> None:
    with PIL.Image.open(made) as picture:
        info = PngInfo()
        info.add_itxt("counterpoint", picture.text["counterpoint"])
        pixels = np.array(picture)
    pixels[3, 5, 0] ^= 1
    PIL.Image.fromarray(pixels).save(made, pnginfo=info)
    status, out, _ = cli("replay", made, "--verify")
    assert status == 1
    assert "pixels differ by up to 1 of 255, and nothing that is recorded says why" in out


def test_images_that_moved(cli, made: Path, tmp_path: Path) -> None:
    (tmp_path / "pose.png").rename(tmp_path / "elsewhere.png")
    status, _, error = cli("replay", made, "--verify")
    assert status == 2
    assert "the control image pose.png" in error
    assert "give --control pose=IMAGE" in error
    assert cli("replay", made, "--verify", "--control", "pose=elsewhere.png")[0] == 0
    status, _, error = cli("replay", made, "--control", "depth=elsewhere.png")
    assert status == 2
    assert "has no control 'depth'; it has pose, seg" in error


def test_a_model_that_has_another_name_here(cli, made: Path, tmp_path: Path) -> None:
    """A service tells the name that it has there."""
    with PIL.Image.open(made) as picture:
        request = json.loads(picture.text["counterpoint"])["request"]
    edited(made, request={**request, "model": "drawn"})
    status, _, error = cli("replay", made, "--verify")
    assert status == 2
    assert "the model of " in error
    assert "there is no model 'drawn'" in error
    assert "give --model MODEL" in error
    status, out, error = cli("replay", made, "--verify", "--model", "tiny")
    assert (status, out.strip()) == (0, "identical: all 128 x 128 pixels"), error
    assert cli("replay", made, "--export", "diffusers", "--model", TINY, "--out", "script.py")[0] == 0
    assert str(TINY) in (tmp_path / "script.py").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 99}, "was made by a newer counterpoint (recipe 99, here 1)"),
        ({"schema": "1"}, "carries no counterpoint recipe"),
        ({"request": {"controls": []}}, "prompt"),
        ({"request": None}, "carries no recipe of generate"),
        ({"request": {"prompt": "a", "controls": [], "launch": "missiles"}}, "launch"),
        ({"seed": 12345}, "does not say which of its pictures it is"),
        ({"request": {"prompt": "a", "controls": [{"label": []}]}}, "label"),
        ({"request": {"prompt": "a", "controls": [[1]]}}, "carries no recipe of generate"),
    ],
)
def test_recipes_that_are_none(cli, made: Path, changes: dict, said: str) -> None:
    status, _, error = cli("replay", edited(made, **changes), "--verify")
    assert status == 2, error
    assert said in error


def test_pictures_without_a_recipe(cli, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, said in (
        ("plain.png", "carries no counterpoint recipe"),
        ("text.png", "is not a PNG"),
        ("none.png", "is n"),
    ):
        status, _, error = cli("replay", name)
        assert status == 2
        assert said in error


def png(width: int, height: int, text: bytes, pixels: bytes = b"") -> bytes:
    """A PNG with a recipe of any content."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    recipe = chunk(b"iTXt", b"counterpoint\0\0\0\0\0" + text)
    return b"\x89PNG\r\n\x1a\n" + header + recipe + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def test_hostile_pictures(cli, tmp_path: Path) -> None:
    whole = b'{"schema": 1, "seed": 0, "request": {"prompt": "a", "controls": [], "steps": 1}}'
    black = bytes(2 * (1 + 3 * 2))
    for content, said in (
        (png(30000, 30000, b"{}"), "is not a PNG"),
        (png(2, 2, b"[" * 200_000, black), "carries no counterpoint recipe"),
        (png(2, 2, b"\xff\xfe", black), "carries no counterpoint recipe"),
        (png(2, 2, whole), "is not a PNG"),
    ):
        (tmp_path / "x.png").write_bytes(content)
        status, _, error = cli("replay", "x.png", "--verify")
        assert (status, said in error) == (2, True), error


def test_every_input_counts_and_may_have_moved(cli, tmp_path: Path) -> None:
    for name in ("pose", "mask", "start"):
        noise((128, 128), 60).save(tmp_path / f"{name}.png")
    status, _, error = cli(
        "generate", "a person", "--control", "pose=pose.png", "--mask", "pose=mask.png", "--init-image", "start.png",
        "--steps", 2, "--out", "made.png",
    )  # fmt: skip
    assert status == 0, error
    recipe = read_recipe(tmp_path / "made.png")
    assert set(recipe["inputs"]) == {"mask:pose", "init-image"}
    assert recipe["scheduler"]["class"] == "UniPCMultistepScheduler"
    assert {"numpy", "pillow", "opencv-python-headless"} <= set(recipe["versions"])
    assert {"processor", "capability"} <= set(recipe["platform"])
    (tmp_path / "mask.png").rename(tmp_path / "moved.png")
    status, _, error = cli("replay", "made.png", "--verify")
    assert (status, "give --input mask:pose=FILE" in error) == (2, True), error
    status, _, error = cli("replay", "made.png", "--verify", "--input", "mask:seg=moved.png")
    assert (status, "has no input 'mask:seg'; it has mask:pose, init-image" in error) == (2, True), error
    edited(tmp_path / "made.png", safety="blurred", scheduler={**recipe["scheduler"], "beta_end": 1})
    noise((128, 128), 90).save(tmp_path / "start.png")
    status, _, error = cli("replay", "made.png", "--verify", "--input", "mask:pose=moved.png")
    assert status == 1
    for line in ("init-image: ", "scheduler's beta_end: 1 -> ", "safety: blurred -> unchecked"):
        assert f"differs: {line}" in error
    assert "mask:pose" not in error


def test_fingerprints_tell_weights_apart(tmp_path: Path) -> None:
    content = bytearray(np.random.default_rng(0).integers(0, 256, 500_000, np.uint8).tobytes())
    (tmp_path / "a.safetensors").write_bytes(content)
    before = fingerprint([tmp_path])
    assert before == fingerprint([tmp_path / "a.safetensors"])
    content[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(content)
    assert fingerprint([tmp_path]) != before
    (tmp_path / "a.safetensors").write_bytes(content[:-1])
    assert fingerprint([tmp_path]) != before


def request(saved: Path, tmp_path: Path, **more: object) -> GenerateRequest:
    controls = tuple(
        ControlRequest(
            label=kind, image=tmp_path / f"{kind}.png", controlnet=str(saved / folder), weight=weight, window=window
        )
        for kind, folder, weight, window in (
            ("pose", "controlnet", "0.7", (0.0, 1.0)),
            ("seg", "controlnet_1", "1.2", (0.0, 0.5)),
        )
    )
    given = {"prompt": "a person", "model": str(saved), "controls": controls, "fusion": "sum", "steps": 3}
    given |= {"width": 64, "height": 64}
    return GenerateRequest(**{**given, "guidance_scale": 4.0, "scheduler": "ddim", **more})


def test_the_diffusers_script_runs_and_gives_the_same_picture(
    cli, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("pose", "seg"):
        noise((64, 64), 60).save(tmp_path / f"{kind}.png")
    asked = request(saved, tmp_path)
    exported = to_diffusers(asked, 5)
    assert exported.left_out == ()
    assert "PIL.ImageOps.fit(" in exported.text
    pictures = []
    call = StableDiffusionControlNetPipeline.__call__

    def kept(self: object, *args: object, **more: object) -> object:
        output = call(self, *args, **more)
        pictures.append(np.asarray(output.images[0]))
        return output

    monkeypatch.setattr(StableDiffusionControlNetPipeline, "__call__", kept)
    monkeypatch.chdir(tmp_path)
    exec(compile(ast.parse(exported.text), "exported.py", "exec"), {})
    from counterpoint.apps.run import run

    ours = run(asked.model_copy(update={"seed": 5})).images[0]
    assert np.abs(np.asarray(ours, int) - pictures[0].astype(int)).max() <= 1
    assert (tmp_path / "seed-5-diffusers.png").exists()


def test_what_other_tools_cannot_say_is_listed(saved: Path, tmp_path: Path) -> None:
    control = ControlRequest(
        label="pose",
        image=tmp_path / "pose.png",
        weight="0:1,0.5:0.4",
        mask=tmp_path / "mask.png",
        mode="control",
        photo=True,
    )
    asked = request(saved, tmp_path, prompt="a person++", fusion="cross", gate_silence=True, subject=("person",),
                    quality="fast", resize="fit", aggregate=("interact", "migc"))  # fmt: skip
    asked = asked.model_copy(update={"controls": (control, asked.controls[1])})
    for write in (to_diffusers, to_comfyui):
        said = " | ".join(write(asked, 0).left_out)
        for word in ("fusion cross", "schedule 0:1,0.5:0.4", "mask", "mode control", "becomes the condition", "gating",
                     "quality fast", "subject", "aggregation of interact, migc", "weights and parts"):  # fmt: skip
            assert word in said
        assert ("resizing by fit" in said) == (write is to_comfyui)


def test_the_script_of_the_tiny_family_runs_by_itself(cli, tmp_path: Path) -> None:
    """In a process that knows diffusers alone, from pictures of another size and shape."""
    for name in ("pose", "seg"):
        PIL.Image.fromarray(control_map(scene(0), name)).resize((150, 130)).save(tmp_path / f"{name}.png")
    status, out, error = cli(
        "generate", "a (person)", "--control", "pose=pose.png", "--control", "seg=seg.png", "--resize", "stretch",
        "--fusion", "sum", "--steps", 2, "--seed", 7, "--out", "ours.png",
    )  # fmt: skip
    assert status == 0, error
    status, out, error = cli("replay", "ours.png", "--export", "diffusers")
    assert (status, error) == (0, ""), "nothing is left out"
    script = Path(out.strip())
    assert "counterpoint" not in script.read_text().replace(str(TINY), "")
    done = subprocess.run([sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    theirs, ours = (np.asarray(PIL.Image.open(tmp_path / name), int) for name in ("seed-7-diffusers.png", "ours.png"))
    assert theirs.shape == ours.shape
    assert np.abs(theirs - ours).mean() < 8, "but for how pictures are scaled"
    assert np.abs(theirs[::-1] - ours).mean() > 16, "and any other picture is further away"


def test_no_recipe_writes_code(tmp_path: Path) -> None:
    """Whatever stands in it, the script has the same statements."""
    evil = "x\rprint('PWNED')#\n__import__('os').abort()"
    pose = ControlRequest(label="pose:x", image=Path(evil), controlnet=evil, mask=Path(evil), weight="0:1,1:0")
    asked = GenerateRequest(
        prompt=evil, negative_prompt=evil, model=evil, config=evil, lora=(evil, f"{evil}:0.5"), controls=(pose,),
        aggregate=(evil,), init_image=Path(evil), inpaint_mask=Path(evil), device=evil, subject=(evil,),
    )  # fmt: skip
    tree = ast.parse(to_diffusers(asked, 0).text)
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {one.id if isinstance(one, ast.Name) else one.attr for one in called}
    assert "from_pretrained" in names
    assert not names & {"print", "__import__", "abort"}
    with pytest.raises(UserError, match="unknown scheduler"):
        to_diffusers(GenerateRequest(prompt="a", scheduler=f"DDIMScheduler\n{evil}Scheduler"), 0)
    for write in (to_diffusers, to_comfyui):
        with pytest.raises(UserError, match="a seed is a whole number"):
            write(GenerateRequest(prompt="a"), "0)\nprint('PWNED'")


def test_exports_fit_the_model(saved: Path, tmp_path: Path) -> None:
    pose = ControlRequest(label="pose", image=Path("p.png"))
    tiny = GenerateRequest(prompt="a (red ball)1.3 on a meadow++", controls=(pose,), device="openvino")
    script = to_diffusers(tiny, 0)
    assert repr(str(TINY / "controls" / "pose")) in script.text
    assert "prompt='a red ball on a meadow'" in script.text
    assert ".to('cpu')" in script.text
    assert [line for line in script.left_out if "OpenVINO" in line]
    compiled = tiny.model_copy(update={"compile": True})
    assert "\nfor network in controlnet.nets:\n    network.compile()\n" in to_diffusers(compiled, 0).text
    assert "compile" not in script.text
    assert [line for line in to_comfyui(compiled, 0).left_out if "compiling" in line]
    graph = json.loads(to_comfyui(tiny, 0).text)
    inputs = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert (inputs["EmptyLatentImage"]["width"], inputs["ImageScale"]["crop"]) == (128, "center")
    texts = [node["inputs"]["text"] for node in graph.values() if node["class_type"] == "CLIPTextEncode"]
    assert texts[0] == "a red ball on a meadow"
    plain = json.loads(to_comfyui(GenerateRequest(prompt="a (ball)"), 0).text)
    assert r"a \(ball\)" in [node["inputs"].get("text") for node in plain.values()]
    large = tmp_path / "xl"
    for part, content in (
        ("unet", {"sample_size": 128}), ("vae", {"block_out_channels": [1, 2, 3, 4]}), ("text_encoder_2", {}),
    ):  # fmt: skip
        (large / part).mkdir(parents=True)
        (large / part / "config.json").write_text(json.dumps(content))
    script = to_diffusers(GenerateRequest(prompt="a", model=str(large), init_image=Path("i.png")), 0)
    assert "StableDiffusionXLImg2ImgPipeline" in script.text
    assert "(1024, 1024)" in script.text
    assert "safety_checker" not in script.text
    file = str(tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(1)}, file)
    script = to_diffusers(GenerateRequest(prompt="a", model=file, config="cfg"), 0)
    assert f"from_single_file({file!r}, dtype=torch.float32, safety_checker=None, config='cfg')" in script.text
    gone = to_diffusers(GenerateRequest(prompt="a", model="owner/model", controls=(pose,)), 0)
    assert [line for line in gone.left_out if "is not here" in line]
    assert [line for line in gone.left_out if "where the ControlNet of pose is" in line]


def test_the_comfyui_graph_is_one(saved: Path, tmp_path: Path) -> None:
    graph = json.loads(to_comfyui(request(saved, tmp_path, lora=("style.safetensors:0.6",)), 5).text)
    kinds = [node["class_type"] for node in graph.values()]
    assert kinds.count("ControlNetApplyAdvanced") == 2
    for node in graph.values():
        for value in node["inputs"].values():
            if isinstance(value, list):
                source, slot = value
                assert int(source) < int(next(name for name, one in graph.items() if one is node))
                assert source in graph
                assert isinstance(slot, int)
    sampler = next(node["inputs"] for node in graph.values() if node["class_type"] == "KSampler")
    assert (sampler["seed"], sampler["steps"], sampler["cfg"], sampler["sampler_name"]) == (5, 3, 4.0, "ddim")
    strengths = [node["inputs"]["strength"] for node in graph.values() if "strength" in node["inputs"]]
    assert strengths == [0.7, 1.2]


@pytest.mark.parametrize(("steps", "strength", "made"), [(20, 0.8, 16), (10, 1.0, 10), (3, 0.1, 1)])
def test_comfyui_begins_a_picture_where_diffusers_does(
    saved: Path, tmp_path: Path, steps: int, strength: float, made: int
) -> None:
    """Its sampler is told the steps that it makes, and divides them by the strength for the schedule."""
    wish = request(saved, tmp_path, steps=steps, strength=strength, init_image=tmp_path / "pose.png")
    graph = json.loads(to_comfyui(wish, 0).text)
    sampler = next(one["inputs"] for one in graph.values() if one["class_type"] == "KSampler")
    assert (sampler["steps"], sampler["denoise"]) == (made, strength)


def test_a_rule_that_the_node_knows_is_in_the_graph(saved: Path, tmp_path: Path) -> None:
    found = to_comfyui(request(saved, tmp_path, fusion="pix:delta=0.5"), 0)
    graph = json.loads(found.text)
    (node,) = [(name, one) for name, one in graph.items() if one["class_type"] == "CounterpointFusion"]
    assert node[1]["inputs"]["fusion"] == "pix:delta=0.5"
    sampler = next(one["inputs"] for one in graph.values() if one["class_type"] == "KSampler")
    assert (sampler["positive"], sampler["negative"]) == ([node[0], 0], [node[0], 1])
    assert not [line for line in found.left_out if "fusion" in line]


def test_export_from_the_command_line(cli, made: Path) -> None:
    status, out, error = cli("replay", made, "--export", "diffusers")
    assert status == 0, error
    assert "left out: the fusion pix: the controls are added" in error
    assert Path(out.strip()).read_text().startswith("# Left out")
    status, out, _ = cli("replay", made, "--export", "comfyui", "--out", "graph.json", "--json")
    assert json.loads(out)["file"] == "graph.json"
    assert cli("replay", made, "--export", "a1111")[0] == 2
    assert cli("replay", made, "--export", "diffusers", "--verify")[0] == 2
