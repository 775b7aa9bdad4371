"""Suites with the models that they need, and the folder in which a run's results lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import Tensor

import counterpoint
from counterpoint.api import find_device, load
from counterpoint.apps.cluster import its_device, on_ray
from counterpoint.apps.readers import FIND, READ, check_named, family_readers, of_one, user_readers, weights_file
from counterpoint.apps.record import SCHEMA, versions, write_json
from counterpoint.apps.run import several
from counterpoint.data import pairs
from counterpoint.data.layouts import Levels, read_mig_bench, scene_actions, scene_levels
from counterpoint.data.published import PublishedCases, check_sets, open_sets
from counterpoint.evaluation.make import Executor, in_turn
from counterpoint.evaluation.suite import KINDS, Method, Readers, Suite, Task, stack
from counterpoint.evaluation.suites import fusion
from counterpoint.evaluation.suites.conservativity import Conservativity
from counterpoint.evaluation.suites.layout import LayoutSuite
from counterpoint.evaluation.suites.style import StyleSuite
from counterpoint.evaluation.suites.tiny_quality import TinyQuality
from counterpoint.fusion import get_fusion
from counterpoint.models.load import load_controlnet, locate
from counterpoint.models.openvino import Ported
from counterpoint.sampling.amdm import Aggregation
from counterpoint.sampling.pipeline import Pipeline
from counterpoint.types import Image, UserError


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model of a suite and what it is shown, as a user named them; a worker elsewhere builds the same from it.

    Attributes:
        model: as :func:`counterpoint.load` takes it.
        controls: kind -> ControlNet; on scenes, in place of the family's own.
        data: published set -> its folder.
        layouts: a COCO-MIG file.
        readers: what is read -> network; from pictures, and from photos where no map was published.
        clip: a CLIP model.
        inception: file with the Inception weights.
        steps: of sampling.
        guidance_scale: likewise; default the model's own.
        negative_prompt: what no picture should show.
        scheduler: likewise.
        device: where models run.
        dtype: of the model.
    """

    model: str = "tiny"
    controls: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Path] = field(default_factory=dict)
    layouts: Path | None = None
    readers: Mapping[str, Path] = field(default_factory=dict)
    clip: Path | None = None
    inception: Path | None = None
    steps: int = 20
    guidance_scale: float | None = None
    negative_prompt: str = ""
    scheduler: str = "unipc"
    device: str = "cpu"
    dtype: str = "fp32"

    @property
    def published(self) -> bool:
        """Whether it is about pictures of the world, not scenes."""
        return bool(self.data or self.layouts)

    def pipeline(self) -> Pipeline:
        """The model with its controls."""
        own = {} if self.published else {kind: locate(self.model) / "controls" / kind for kind in KINDS}
        family = {kind: place for kind, place in own.items() if place.is_dir()}
        controls = {kind: str(place) for kind, place in {**family, **self.controls}.items()}
        return load(self.model, controls, scheduler=self.scheduler, device=self.device, dtype=self.dtype)

    def maker(self) -> PipelineMaker:
        """What makes pictures."""
        return PipelineMaker(self.pipeline(), self.steps, self.guidance_scale, self.negative_prompt)


@dataclass(frozen=True, eq=False)
class Bench:
    """What a suite runs on.

    Attributes:
        maker: makes pictures with the model.
        readers: what looks at them.
        cases: what they are of.
        levels: layouts by their number of instances.
        identity: what two runs must have in common to be one: hashes of weights, folders of data, settings.
    """

    maker: PipelineMaker
    readers: Readers
    cases: fusion.Cases
    levels: Levels
    identity: dict[str, Any]

    @property
    def pipe(self) -> Pipeline:
        """The model."""
        return self.maker.pipe


SUITES: dict[str, Callable[[Bench], Suite]] = {
    "conflicting": lambda bench: fusion.conflicting(bench.cases).only(bench.pipe.controls),
    "complementary": lambda bench: fusion.complementary(bench.cases).only(bench.pipe.controls),
    "silent": lambda bench: fusion.silent(bench.cases).only(bench.pipe.controls),
    "single": lambda bench: fusion.single(bench.cases, bench.pipe.native_size).only(bench.pipe.controls),
    "layout": lambda bench: LayoutSuite(bench.levels, scene_actions() if bench.cases is pairs else None),
    "style": lambda bench: _style(bench),
    "conservativity": lambda bench: Conservativity(bench.pipe, bench.cases, bench.maker.network),
    "tiny-quality": lambda bench: _tiny_quality(bench),
}
"""Name -> suite on a bench; sorts of cases whose controls the model lacks are left out."""


class PipelineMaker:
    """Makes the pictures of tasks with one model; each picture has its own generator, so batches change nothing but
    how numbers are rounded."""

    def __init__(self, pipe: Pipeline, steps: int, guidance_scale: float | None, negative_prompt: str = "") -> None:
        self.pipe, self.steps, self.negative_prompt = pipe, steps, negative_prompt
        self.guidance_scale = pipe.guidance_scale if guidance_scale is None else guidance_scale
        self.model = lru_cache(maxsize=None)(self._model)
        self.network = lru_cache(maxsize=8)(self._network)

    def __call__(self, tasks: Sequence[Task]) -> list[Image]:
        """One picture a task; all have the same controls, method and subject."""
        method, labels, subject = tasks[0].method, list(tasks[0].images), tasks[0].subject
        rule = get_fusion(method.fusion)
        lends = rule.keys is not None and subject != ""
        own = {**self.pipe.controls, **{label: self.network(place) for label, place in method.networks}}
        pipe = replace(self.pipe, controls={label: own[label] for label in labels})
        pipe = pipe if not method.models else self.model(method.models, method.aggregation)
        output = pipe(
            [task.prompt for task in tasks],
            [stack([task.images[label] for task in tasks]) for label in labels],
            fusion=rule if lends else replace(rule, keys=None),
            subject=subject if lends else None,
            gate_silence=method.gated,
            quality=method.quality,
            layout=[task.layout for task in tasks] if any(model.adapter for model in pipe.models) else None,
            controlnet_conditioning_scale=[method.weights.get(label, 1.0) for label in labels],
            readout_guidance_scale=[method.steer.get(label, 0.0) for label in labels],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt or None,
            generator=[torch.Generator().manual_seed(task.seed) for task in tasks],
            output_type="np",
        )
        if not np.isfinite(output.images).all():
            raise UserError(
                f"{method.name}: the model made a picture of values that are no numbers; try another --dtype"
            )
        return list(np.rint(output.images * 255).astype(np.uint8))

    def _network(self, place: str) -> ControlNetModel:
        return load_controlnet(place, self.pipe.unet, self.pipe.unet.dtype).to(self.pipe.device)

    def _model(self, names: tuple[str, ...], aggregation: str) -> Pipeline:
        return several(replace(self.pipe, controls={}), names, aggregation)


def make_bench(source: Source) -> Bench:
    """Load what a source names.

    A family comes with its own ControlNets, judge and towers, on procedural scenes; any other model is shown published
    photos or layouts, with ControlNets and readers that the user names.

    Raises:
        UserError: something is missing; the message names it.
    """
    return _published(source) if source.published else _family(source)


def _family(source: Source) -> Bench:
    if source.readers or source.clip or source.inception:
        raise UserError("--reader, --clip and --inception belong to --data or --layouts; scenes bring their own")
    if unknown := sorted(set(source.controls) - set(KINDS)):
        raise UserError(f"--controlnet {unknown[0]}: on scenes there are {', '.join(KINDS)}")
    folder = locate(source.model)
    readers = family_readers(folder, find_device(source.device))
    maker = source.maker()
    weights = [folder, *(locate(place) for _, place in sorted(source.controls.items()))]
    return Bench(maker, readers, pairs, scene_levels(), _identity(source, maker, weights))


def _published(source: Source) -> Bench:
    check_sets(source.data)
    if source.data and (source.clip is None or not source.controls):
        raise UserError("published photos need --controlnet KIND=FOLDER, once a control, and --clip FOLDER")
    if source.clip is None or (source.layouts and not set(FIND) <= set(source.readers)):
        raise UserError("--layouts needs --clip FOLDER and --reader detect=FOLDER --reader segment=FOLDER")
    check_named(source.readers, READ + FIND)
    source = replace(
        source,
        readers={kind: locate(str(place)) for kind, place in sorted(source.readers.items())},
        clip=locate(str(source.clip)),
        inception=source.inception and weights_file(source.inception),
    )
    levels = {} if source.layouts is None else read_mig_bench(source.layouts)
    looks = user_readers(source.readers, source.clip, source.inception, find_device(source.device))
    maker = source.maker()
    size = maker.pipe.native_size
    extract = {kind: of_one(looks.maps[kind]) for kind in ("canny", "hed", "lineart", "depth", "seg")}
    cases = PublishedCases(open_sets(source.data, size), extract)
    weights = [locate(place) for place in (source.model, *source.controls.values())]
    return Bench(maker, looks, cases, levels, _identity(source, maker, weights))


def _identity(source: Source, maker: PipelineMaker, weights: Sequence[Path]) -> dict[str, Any]:
    places = {**source.data, **({} if source.layouts is None else {"layouts": source.layouts})}
    readers = [*source.readers.values(), *(place for place in (source.clip, source.inception) if place)]
    found = versions()
    return {
        "versions": {name: found[name] for name in ("counterpoint", "diffusers", "torch", "transformers")},
        "code": _code(),
        "weights": _hash(weights),
        **({"readers": _hash(readers)} if readers else {}),
        **{name: str(place) for name, place in places.items()},
        "steps": maker.steps,
        "guidance_scale": maker.guidance_scale,
        **({"negative_prompt": source.negative_prompt} if source.negative_prompt else {}),
        "scheduler": source.scheduler,
        "dtype": source.dtype,
        "device": source.device.partition(":")[0],
    }


def _code() -> str:
    """Tells what makes pictures from other versions of it: a rule that was changed does not go on with old ones."""
    home = Path(counterpoint.__file__).parent
    files = [
        path for room in ("control", "fusion", "models", "sampling") for path in sorted((home / room).rglob("*.py"))
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def identity(bench: Bench, methods: Sequence[Method]) -> dict[str, Any]:
    """What two runs with these methods must have in common to be one."""
    others = {
        method.name: {label: _hash([locate(place)]) for label, place in method.networks}
        for method in methods
        if method.networks
    }
    adapters = {name: Path(name) for method in methods for name in method.models if Path(name).exists()}
    ways = {method.name: str(Aggregation.parse(method.aggregation)) for method in methods if len(method.models) > 1}
    return {
        **bench.identity,
        **({"versus": others} if others else {}),
        **({"adapters": {name: _hash([place]) for name, place in adapters.items()}} if adapters else {}),
        **({"aggregations": ways} if ways else {}),
    }


def make_suite(name: str, bench: Bench, methods: Sequence[Method]) -> Suite:
    """A suite by name.

    Raises:
        UserError: the bench has nothing for it.
    """
    if any(method.models for method in methods) and name not in {"layout", "style"}:
        raise UserError("--aggregate belongs to evaluate layout and style")
    told = [method for method in methods if method.models]  # a wrong name is said before any picture is made
    pictured = [method for method in told if _reads_reference(bench.maker.model(method.models, method.aggregation))]
    if pictured and bench.cases is not pairs:
        raise UserError(
            f"{pictured[0].name}: an IP-Adapter reads a reference picture, and COCO-MIG's layouts have none: leave it "
            "out of --aggregate, or leave out --layouts to measure on scenes, which have one"
        )
    if not pictured and any(method.weights for method in told):
        raise UserError("--weight reference: none of these models reads a reference, an IP-Adapter such as style does")
    for label, place in (own for method in methods for own in method.networks):
        if isinstance(bench.pipe.unet, Ported):
            raise UserError("--versus compares networks in torch: leave --device openvino away")
        if label not in bench.pipe.controls:
            raise UserError(f"--versus {label}: there is no such control; there are {', '.join(bench.pipe.controls)}")
        bench.maker.network(place)
    readable = bench.pipe.readouts
    if unread := [label for method in methods for label in method.steer if label not in readable]:
        raise UserError(f"--steer {unread[0]}: no probe reads it; the model's read {', '.join(readable) or 'nothing'}")
    if name == "layout" and not bench.levels:
        raise UserError("this suite needs --layouts mig_bench.json, or scenes")
    if name == "conservativity" and (
        bench.pipe.text_encoder_2 is not None or not set(KINDS) & set(bench.pipe.controls)
    ):
        raise UserError(f"conservativity is measured on SD1.5's layout with ControlNets for {', '.join(KINDS)}")
    suite = SUITES[name](bench)
    return suite.about(methods) if isinstance(suite, fusion.FusionSuite) else suite


def _reads_reference(pipe: Pipeline) -> bool:
    return any(one.adapter and one.adapter.kind == "ip-adapter" for one in pipe.models)


def rehearse(suite: Suite, bench: Bench, n: int, methods: Sequence[Method]) -> None:
    """Score up to three pictures of noise under one method: what a suite misses is said before hours of work.

    Raises:
        UserError: a reader that it needs has not been named, or a measure wants more cases.
    """
    size = bench.pipe.native_size
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    with torch.no_grad():
        for row in suite.score(lambda _: noise, min(n, 3), methods[:1], bench.readers):
            for metric in row.metrics:
                metric.compute()


def pin(path: Path, name: str, suite: Suite, n: int) -> None:
    """Write down which pictures a suite's cases are made of, or hold them against what was written down.

    Raises:
        UserError: a case differs, or the suite is not one of photos.
    """
    if not isinstance(suite, fusion.FusionSuite):
        raise UserError(f"--manifest lists pictures that controls come from; {name} has none")
    made = {"schema": SCHEMA, "suite": name, "sorts": suite.contents(n)}
    if not path.exists():
        write_json(path, made)
        return
    try:
        kept = {**json.loads(path.read_text())}
        sorts = {sort: [*cases] for sort, cases in kept["sorts"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        kept, sorts = {}, {}
    if any(kept.get(key) != made[key] for key in ("schema", "suite")):
        raise UserError(f"{path} is no manifest of {name} of this version")
    for sort, cases in made["sorts"].items():
        listed = sorts.get(sort, [])
        if len(listed) < n:
            raise UserError(f"{path} lists {len(listed)} cases of {sort}, {n} are asked for")
        for case, wanted in zip(cases, listed, strict=False):
            if case != wanted:
                raise UserError(f"{path}: case {case['seed']} of {sort} is {wanted}, here {case}")


def executor(source: Source, maker: PipelineMaker, ray: str | None) -> Executor:
    """Who makes a suite's pictures: this process, or workers of a Ray cluster."""
    device = find_device(source.device)
    if ray is None:
        return in_turn(maker, device)
    elsewhere = replace(source, device=its_device(source.device))
    return on_ray(ray, partial(Source.maker, elsewhere), torch.device(device.type))


def _tiny_quality(bench: Bench) -> Suite:
    if bench.cases is not pairs:
        raise UserError("tiny-quality measures the tiny family on its own scenes; it takes no --data")
    return TinyQuality(round_trip(bench.pipe), kinds=[kind for kind in KINDS if kind in bench.pipe.controls])


def _style(bench: Bench) -> Suite:
    if bench.cases is not pairs:
        raise UserError("style is measured on scenes; it takes no --data")
    return StyleSuite()


def round_trip(pipe: Pipeline) -> Callable[[Tensor], Tensor]:
    """Encodes and decodes pictures in 0..1."""

    @torch.no_grad()
    def after(pictures: Tensor) -> Tensor:
        return pipe.decode(pipe.encode(pictures * 2 - 1), "pt").float().cpu()

    return after


def _hash(places: Sequence[Path]) -> str:
    """Tells networks by their weights and configurations."""
    total = hashlib.sha256()
    for place in places:
        inside = [path for name in ("*.safetensors", "*config.json") for path in sorted(place.rglob(name))]
        for path in inside if place.is_dir() else [place]:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]
