"""What the parts of a loss would do before anything is trained: how long each one's gradient is, how far it is the same
from batch to batch, and how far two parts want the same (ours).

A weight is chosen by lengths; a part whose batches have nothing in common teaches nothing, whatever its loss says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from counterpoint.training.config import TrainConfig
from counterpoint.training.order import Draws, sample_index
from counterpoint.training.stage import Job, to_device
from counterpoint.types import UserError

PLAIN = "diffusion"
"""What is left of a loss whose weighed parts weigh nothing."""


@dataclass(frozen=True)
class Pull:
    """One part of a loss.

    Attributes:
        length: of its gradient for one batch, weight included: the root of the mean square.
        agreement: the cosine between the gradients of two batches, 1 for what every batch asks for, 0 for noise.
        beside: other part -> the cosine between the two parts' mean gradients.
    """

    length: float
    agreement: float
    beside: Mapping[str, float]


def pulls(
    job: Job, config: TrainConfig, batches: int, listen: Callable[[int, int], None] | None = None
) -> dict[str, Pull]:
    """The parts of a job's loss over its first batches, in float32; no weight is changed.

    Args:
        job: a stage that trains a denoiser, and its samples.
        config: how large batches are, the seed, and the step up to which weights grow.
        batches: how many, at least two.
        listen: hears ``(batches done, batches in all)``.

    Raises:
        UserError: the loss has one part only, or there are too few samples.
    """
    weights = {part: float(getattr(job.stage, name)) for part, name in job.stage.weighed.items()}
    weights = {part: weight for part, weight in weights.items() if weight}
    if not weights:
        raise UserError("this loss has one part: there is nothing to compare its gradient with")
    if len(job.samples) < batches * config.train_batch_size:
        raise UserError(
            f"{batches} batches of {config.train_batch_size} want as many samples, and there are {len(job.samples)}"
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    stage, size = job.stage.to(device), config.train_batch_size
    stage.requires_grad_(False)
    parameters = []
    for module in stage.trained_modules().values():
        learnt = [one for name, one in module.train().named_parameters() if stage.learns(name)]
        parameters += [one.requires_grad_() for one in learnt]

    def slope(only: str | None, start: int) -> Tensor:
        for part, weight in weights.items():
            setattr(stage, stage.weighed[part], weight if part == only else 0.0)
        ordinals = range(start, start + size)
        batch = job.samples.batch([sample_index(one, len(job.samples), config.seed) for one in ordinals])
        loss, _ = stage(to_device(batch, device), Draws(config.seed, ordinals, device), config.max_train_steps)
        found = torch.autograd.grad(loss, parameters, materialize_grads=True)
        return torch.cat([one.flatten() for one in found])

    sums: dict[str, Tensor] = {}
    squares = dict.fromkeys([PLAIN, *weights], 0.0)
    for number in range(batches):
        plain = slope(None, number * size)
        for part in squares:
            mine = plain if part == PLAIN else slope(part, number * size) - plain
            sums[part] = mine + sums.get(part, 0)
            squares[part] += float(mine.double().square().sum())
        if listen is not None:
            listen(number + 1, batches)
    for part, weight in weights.items():
        setattr(stage, stage.weighed[part], weight)
    long = {part: float(one.double().norm()) for part, one in sums.items()}
    return {
        part: Pull(
            (squares[part] / batches) ** 0.5,
            _share(long[part] ** 2 - squares[part], (batches - 1) * squares[part]),
            {
                other: _share(float(torch.dot(sums[part].double(), sums[other].double())), long[part] * long[other])
                for other in sums
                if other != part
            },
        )
        for part in sums
    }


def _share(one: float, whole: float) -> float:
    return one / whole if whole else 0.0
