"""Noise prediction under controls, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from counterpoint.control.attach import taking_in
from counterpoint.control.keys import Lending
from counterpoint.control.stack import Branch, Watch, run_stack
from counterpoint.control.subject import finding_subjects
from counterpoint.models.compiling import closed_by
from counterpoint.models.halves import decoding, encode
from counterpoint.models.openvino import PortedUNet
from counterpoint.sampling.economy import ENCODER, Economy
from counterpoint.sampling.guides import Guide
from counterpoint.sampling.readout import Readings
from counterpoint.types import Fusion, Latents, Moment

_Ask = Callable[..., list[Tensor]]
_GoOn = Callable[[Sequence[Tensor]], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class ControlledDenoiser:
    """A host UNet, a stack of control branches and the rule that fuses them.

    Attributes:
        unet: the host.
        branches: the controls.
        fusion: the rule.
        text: prompt embeddings, one a sample.
        negative: unconditional embeddings, or ``None`` for no guidance.
        guidance_scale: weight of the difference between the two (Ho and Salimans 2022, arXiv:2207.12598).
        lending: KV-injection, if the rule has it.
        watch: hears what the rule makes of the controls.
        added: what SDXL reads besides the text, for the whole guided batch: ``text_embeds`` and ``time_ids``.
        guide: says what a layout means to the host, if it has an adapter.
        economy: what is foretold in place of being computed, if anything.
        readings: what is read from the host's features, if anything, and pushes the prediction.
    """

    unet: UNet2DConditionModel | PortedUNet
    branches: Sequence[Branch]
    fusion: Fusion
    text: Float[Tensor, "b t d"]
    negative: Float[Tensor, "b t d"] | None = None
    guidance_scale: float = 1.0
    lending: Lending | None = None
    watch: Watch | None = None
    added: Mapping[str, Tensor] | None = None
    guide: Guide | None = None
    economy: Economy | None = None
    readings: Readings | None = None

    def __call__(self, latents: Latents, moment: Moment) -> Latents:
        """The guided prediction for ``latents`` as the scheduler scaled them."""
        prediction = self._guided(latents, moment)
        return prediction if self.readings is None else self.readings.pushed(prediction)

    def _guided(self, latents: Latents, moment: Moment) -> Latents:
        if self.negative is None:
            return self._predict(latents, moment, self.text)
        count = len(latents)
        if self.economy is not None and self.guide is None and self.economy.skips_guidance(moment):
            conditional = self._predict(latents, moment, self.text, range(count, 2 * count))
            return conditional + (self.guidance_scale - 1) * self.economy.difference()
        both = self._predict(torch.cat([latents] * 2), moment, torch.cat([self.negative, self.text]))
        unconditional, conditional = both.chunk(2)
        if self.economy is not None:
            self.economy.learn(moment, conditional - unconditional)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _predict(self, latents: Latents, moment: Moment, text: Tensor, half: range | None = None) -> Latents:
        """The host's prediction; for the conditional half of a guided batch alone, ``half`` are its rows."""
        fusion = self.fusion.during(moment.progress)
        branches, added = self.branches, self.added
        if half is not None:
            branches = [branch.conditional() for branch in branches]
            added = None if added is None else {name: value[half.start :] for name, value in added.items()}
        reuse = None if self.economy is None else self.economy.controls[half is not None]
        residuals = run_stack(branches, fusion, latents, moment, text, self.lending, self.watch, added, reuse, half)
        with (
            self._encoding(latents, moment, text, added, half),
            taking_in(self.unet, residuals, fusion.inject) as extra,
            finding_subjects(self.unet, self.lending, (latents.shape[2], latents.shape[3])),
            nullcontext({}) if self.guide is None else self.guide(moment) as told,
        ):

            def host(seen: Tensor) -> Tensor:
                prediction: Tensor = self.unet(
                    seen,
                    moment.timestep,
                    encoder_hidden_states=text,
                    return_dict=False,
                    **{"added_cond_kwargs": added, **extra, **told},
                )[0]
                return prediction

            return host(latents) if self.readings is None else self.readings.predict(host, latents, moment)

    @cached_property
    def _halves(self) -> tuple[_Ask, _GoOn] | None:
        """How the host's encoder is asked and its decoder goes on, where nothing else reaches into it; features are
        read from the decoder, but what pushes wants its slope through both."""
        if self.lending or self.guide or (self.readings and self.readings.strengths):
            return None
        if isinstance(self.unet, PortedUNet):
            return self.unet.encode, self.unet.decoding
        return None if closed_by(self.unet) else (partial(encode, self.unet), partial(decoding, self.unet))

    def _encoding(
        self, latents: Latents, moment: Moment, text: Tensor, added: Mapping[str, Tensor] | None, half: range | None
    ) -> AbstractContextManager[None]:
        """The host with what its encoder says or is foretold to say, or as it is."""
        economy = self.economy
        if economy is None or self._halves is None:
            return nullcontext()
        ask, go_on = self._halves

        def compute(few: list[int]) -> list[Tensor]:
            extra = None if added is None else {name: value[few] for name, value in added.items()}
            return ask(latents[few], moment.timestep, text[few], extra)

        reuse, rows = economy.encoder[half is not None], half or range(len(latents))
        return go_on(reuse.ask(ENCODER, moment.time, rows, compute))
