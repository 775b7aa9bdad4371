"""Training the denoiser itself, and ControlNets on a frozen one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from counterpoint.control.attach import taking_in
from counterpoint.fusion.minimal_impact import trained_injection
from counterpoint.models.strength import strength_of, strengthen
from counterpoint.models.trained_for import remember_kind
from counterpoint.training.losses.diffusion import add_noise, diffusion_loss, snr_weight, target
from counterpoint.training.losses.reward import logged, masked_mean
from counterpoint.training.order import Draws
from counterpoint.training.stage import Stage
from counterpoint.types import Batch, Residuals


class Noisy(NamedTuple):
    """A batch on its way to noise: clean latents, noise, timesteps, their noise levels, text embeddings, and what is
    predicted; see :mod:`counterpoint.training.losses.diffusion`."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    level: Tensor
    text: Tensor
    prediction_type: str

    @property
    def x_t(self) -> Tensor:
        """The noisy latents."""
        return add_noise(self.x0, self.noise, self.level, self.prediction_type)


class DiffusionStage(Stage):
    """Text-conditional denoising of latents.

    Args:
        unet: the denoiser.
        text_encoder: frozen.
        tokenizer: of the text encoder.
        scheduler: its noise schedule and prediction type; a flow has no schedule but the share of its timesteps.
        proportion_empty_prompts: share of samples whose caption is dropped, for classifier-free guidance.
        snr_gamma: Min-SNR weight of the loss; ``None`` weighs all timesteps alike.
        debiased: whether noisy timesteps weigh more (:func:`snr_weight`).
        noises_per_sample: how often each sample of a batch is made noisy, every time with its own noise and timestep;
            of a ControlNet, the condition image is encoded once for all of them.
    """

    trained: tuple[str, ...] = ("unet",)

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDPMScheduler,
        *,
        proportion_empty_prompts: float = 0.1,
        snr_gamma: float | None = 5.0,
        debiased: bool = False,
        noises_per_sample: int = 1,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.tokenizer, self.scheduler = unet, text_encoder, tokenizer, scheduler
        self.proportion_empty_prompts, self.snr_gamma = proportion_empty_prompts, snr_gamma
        self.debiased, self.noises_per_sample = debiased, noises_per_sample

    def forward(self, batch: Batch, draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        noisy = self._noisy(batch, draws)
        losses = self._losses(noisy, self._denoise(noisy, batch))
        late = noisy.t < 300
        extra = {
            name: logged(masked_mean(losses, rows), rows.sum()) for name, rows in (("late", late), ("early", ~late))
        }
        return self._weighted(noisy, losses), {"diffusion": losses.detach().mean(), **extra}

    def _noisy(self, batch: Batch, draws: Draws) -> Noisy:
        times = self.noises_per_sample
        x0 = batch["latents"].float().repeat_interleave(times, 0)
        noise = draws.normal(times, *x0.shape[1:]).flatten(0, 1)
        t = draws.integers(self.scheduler.config.num_train_timesteps, times).flatten()
        text = self._text([caption for caption in batch["caption"] for _ in range(times)], draws)
        return Noisy(x0, noise, t, self._level(t), text, self.scheduler.config.prediction_type)

    def _level(self, t: Tensor) -> Tensor:
        if self.scheduler.config.prediction_type == "flow_prediction":
            return (t + 1) / (self.scheduler.config.num_train_timesteps + 1)
        return self.scheduler.alphas_cumprod.to(t.device)[t]

    def _denoise(self, noisy: Noisy, batch: Batch) -> Tensor:
        return self._predict(noisy.x_t, noisy.t, noisy.text, batch).float()

    def _losses(self, noisy: Noisy, prediction: Tensor) -> Tensor:
        """Of each sample."""
        return diffusion_loss(prediction, target(noisy.x0, noisy.noise, noisy.level, noisy.prediction_type))

    def _weighted(self, noisy: Noisy, losses: Tensor) -> Tensor:
        """Their mean, weighted."""
        weight = snr_weight(noisy.level, self.snr_gamma, noisy.prediction_type, self.debiased)
        return (losses * weight).mean()

    def _predict(self, x: Tensor, t: Tensor, text: Tensor, batch: Batch) -> Tensor:
        return self.unet(x, t, text).sample

    @torch.no_grad()
    def _text(self, captions: list[str], draws: Draws) -> Tensor:
        drop = draws.uniform(self.noises_per_sample).flatten() < self.proportion_empty_prompts
        captions = ["" if empty else caption for caption, empty in zip(captions, drop.tolist(), strict=True)]
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(tokens.to(draws.device)).last_hidden_state

    def export(self, folder: Path) -> None:
        self.unet.save_pretrained(folder)


class ControlNetStage(DiffusionStage):
    """The diffusion loss with a trainable ControlNet on a frozen denoiser (Zhang et al. 2023, arXiv:2302.05543).

    A network that was trained with an injection is taken in by it again, and one that was strengthened since goes on as
    it was trained; what is exported is as strong as what came in.
    Of a ControlNet with a LoRA (:func:`add_lora`), the LoRA alone learns; it is exported beside the merged network.

    Args:
        controlnet: the network to train.
        kind: field of the batch, ``control:<kind>``, that holds the condition images.
    """

    trained = ("controlnet",)

    def __init__(self, controlnet: ControlNetModel, kind: str, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.controlnet, self.field = controlnet, f"control:{kind}"
        self.inject, self.strength = trained_injection(controlnet), strength_of(controlnet)
        strengthen(controlnet, 1 / self.strength)
        if self.noises_per_sample > 1:
            times = self.noises_per_sample
            encoder = controlnet.controlnet_cond_embedding
            encoder.register_forward_hook(lambda _, __, code: code.repeat_interleave(times, 0))

    @property
    def reaches_inside(self) -> bool:
        return self.inject is not torch.add

    def _predict(self, x: Tensor, t: Tensor, text: Tensor, batch: Batch) -> Tensor:
        down, mid = self.controlnet(x, t, text, self._hint(batch), return_dict=False)
        with taking_in(self.unet, Residuals(tuple(down), mid), self.inject) as extra:
            return self.unet(x, t, text, **extra).sample

    def _hint(self, batch: Batch) -> Tensor:
        hint: Tensor = batch[self.field].permute(0, 3, 1, 2).float().div(255)
        return hint

    def learns(self, parameter: str) -> bool:
        return "lora_" in parameter or not self._has_lora

    def export(self, folder: Path) -> None:
        if self._has_lora:
            self._copy().save_lora_adapter(folder)
        self.merged().save_pretrained(folder)

    def merged(self) -> ControlNetModel:
        """A plain copy of the network as it is now."""
        network = self._copy()
        if self._has_lora:
            network.fuse_lora()
            network.unload_lora()
        return network

    def _copy(self) -> ControlNetModel:
        if self._has_lora:
            network = copy.deepcopy(self.controlnet)
        else:  # what is compiled is not copied
            network = ControlNetModel.from_config(self.controlnet.config)
            network.load_state_dict(self.controlnet.state_dict())
        strengthen(network, self.strength)
        remember_kind(network, self.field.removeprefix("control:"))
        return network.to(memory_format=torch.contiguous_format)  # nothing else is saved

    @property
    def _has_lora(self) -> bool:
        return any("lora_" in name for name, _ in self.controlnet.named_parameters())


def add_lora(network: ControlNetModel, rank: int) -> None:
    """Give every linear layer and convolution a low-rank addition, which starts at zero (Hu et al. 2021,
    arXiv:2106.09685)."""
    layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
