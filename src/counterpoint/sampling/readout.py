"""Controls read from the denoiser's inner features while it samples: how closely each is followed at every step (ours),
and guidance towards it.

Guidance by readout is Luo et al. 2024's (arXiv:2312.02150): the latents are moved so that what a probe reads from the
features comes nearer to the control. Their code moves latents with an optimizer between two steps, which schedulers
that remember steps undo; here the noise prediction is moved, as in classifier guidance (Dhariwal and Nichol 2021,
arXiv:2105.05233), by a share of its own length, so that one strength means the same to every probe, model and size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from counterpoint.control.features import Layers, collecting, embed_time
from counterpoint.control.weight import Weight
from counterpoint.models.compiling import closed_by
from counterpoint.models.probe import Probe, reversed_time
from counterpoint.sampling.controls import each
from counterpoint.types import Latents, Moment, UserError

Error = Callable[[Tensor, Float[Tensor, "b 3 h w"]], Float[Tensor, " b"]]
"""``(what was read, condition images in 0..1) -> how far they are apart``, one a picture."""


@dataclass(frozen=True, eq=False)
class Readout:
    """A trained probe for one kind of control.

    Attributes:
        probe: reads.
        layers: the features that it reads.
        error: how far a reading is from the control.
        reverse: whether the probe is told timesteps that count from the noisiest one.
    """

    probe: Probe
    layers: Layers
    error: Error
    reverse: bool = False


_SCALE = 1024.0
"""Of the error whose slope is taken: its direction alone counts, and in half precision small slopes would vanish."""


class Readings:
    """What one run reads, and where that pushes it.

    Args:
        readouts: control -> what reads it.
        hints: control -> its condition images, ``(b, 3, h, w)`` in 0..1, one a picture.
        strengths: control that pushes -> length of its push as a share of the prediction's, over the schedule.
        unet: the denoiser; it predicts noise.

    Attributes:
        errors: control -> its error at every step so far, ``(b,)`` each.

    Raises:
        UserError: there is a push for a control that nothing reads.
    """

    def __init__(
        self,
        readouts: Mapping[str, Readout],
        hints: Mapping[str, Tensor],
        strengths: Mapping[str, Weight],
        unet: UNet2DConditionModel,
    ) -> None:
        if unread := [name for name in strengths if name not in readouts]:
            raise UserError(
                f"nothing reads {unread[0]} from the model's features, so nothing pushes towards it: give a probe with "
                f"probes={{{unread[0]!r}: FOLDER}}"
            )
        self.readouts, self.hints, self.strengths, self.unet = readouts, hints, strengths, unet
        self.errors: dict[str, list[Tensor]] = {name: [] for name in readouts}
        self._push: Tensor | None = None

    def predict(self, host: Callable[[Tensor], Tensor], latents: Tensor, moment: Moment) -> Tensor:
        """The host's prediction for a batch whose last rows are the pictures' conditional ones; its features are read
        on the way.

        Args:
            host: latents -> prediction.
            latents: as the host sees them.
            moment: the step.
        """
        strengths = {name: value for name, one in self.strengths.items() if (value := one.at(moment.progress))}
        with torch.set_grad_enabled(bool(strengths)), ExitStack() as stack:
            seen = latents.detach().requires_grad_(bool(strengths))
            sorts = {readout.layers for readout in self.readouts.values()}
            features = {layers: stack.enter_context(collecting(self.unet, layers)) for layers in sorts}
            prediction = host(seen)
            errors = {name: self._error(name, features[one.layers], moment) for name, one in self.readouts.items()}
            self._push = None
            for name, strength in strengths.items():
                scaled = _SCALE * errors[name].sum()
                slope = torch.autograd.grad(scaled, seen, retain_graph=True)[0][-len(errors[name]) :]
                push = strength * slope / _length(slope).clamp(min=1e-20)
                self._push = push if self._push is None else self._push + push
        for name, error in errors.items():
            self.errors[name].append(error.detach().cpu())
        return prediction.detach()

    def pushed(self, prediction: Latents) -> Latents:
        """The guided prediction of the step that was just read, moved towards what is wanted."""
        if self._push is None:
            return prediction
        return prediction + (_length(prediction) * self._push).to(prediction.dtype)

    def _error(self, name: str, features: Sequence[Tensor], moment: Moment) -> Tensor:
        readout, hint = self.readouts[name], self.hints[name]
        t = moment.timestep.reshape(1).to(hint.device)
        time = embed_time(self.unet, reversed_time(t) if readout.reverse else t).float()
        read: Any = readout.probe([one[-len(hint) :].float() for one in features], time.expand(len(hint), -1))
        error: Tensor = readout.error(read, hint.float())
        return error


def make_readings(model: Any, hints: Mapping[str, Tensor], scale: Any, report: bool) -> Readings | None:
    """What a model's features are asked in one run, if anything is.

    Args:
        model: with its ``readouts``, ``unet`` and ``scheduler``.
        hints: control -> its condition images.
        scale: of the guidance, one for all controls or one each, each a number or a schedule.
        report: whether controls are read even where nothing is pushed.

    Raises:
        UserError: a push that nothing reads, or that the model cannot make.
    """
    scales = each("readout_guidance_scale", scale, list(hints))
    weights = {label: Weight.parse(str(one)) for label, one in zip(hints, scales, strict=True)}
    pushing = {label: weight for label, weight in weights.items() if weight.speaks}
    closed = closed_by(model.unet)
    if pushing and closed:
        raise UserError(f"readouts reach into the networks, {closed}")
    if pushing and (said := model.scheduler.config.prediction_type) != "epsilon":
        raise UserError(f"guidance by readouts is for models that predict noise, and this one says {said}")
    if closed or not (pushing or (report and model.readouts)):
        return None
    asked = hints if report else pushing
    readouts = {label: readout for label, readout in model.readouts.items() if label in asked}
    return Readings(readouts, hints, pushing, model.unet)


def _length(tensor: Tensor) -> Tensor:
    length: Tensor = tensor.float().flatten(1).norm(dim=1)
    return length[:, None, None, None]
