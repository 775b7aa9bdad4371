"""Staged residency: networks are in memory only while they are at work (ours).

On an accelerator they wait in the machine's own memory; on a CPU in files, which are mapped, so that coming costs
nothing but reading what is used, and going frees it. Weights do not change, so nothing is ever written back.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from counterpoint.types import UserError

RESIDENCIES = {
    "all": "every network stays",
    "stages": "encoders, the denoiser with its controls, and the decoder take turns",
    "controls": "encoders, denoiser and decoder take turns, and so do the controls within every step",
}
"""How much stays in memory: name -> what it means."""


class Residency:
    """Where the networks of one model are.

    Args:
        level: a key of :data:`RESIDENCIES` except ``"all"``.
        device: where networks are at work.

    Attributes:
        going: where controls take turns, the labels of those that do, while the others stay; ``None`` is all of them.

    Raises:
        UserError: there is no such level.
    """

    def __init__(self, level: str, device: torch.device) -> None:
        if level not in RESIDENCIES or level == "all":
            raise UserError(f"unknown residency {level!r}; there are {', '.join(RESIDENCIES)}")
        self.level, self.device = level, device
        self.going: Collection[str] | None = None
        self._folder: Path | None = None
        if device.type == "cpu":
            self._folder = Path(tempfile.mkdtemp(prefix="counterpoint-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._homes: dict[int, _Home] = {}
        self._uses: dict[int, int] = {}

    def send_home(self, *networks: nn.Module | None) -> None:
        """Let networks wait from now on.

        Raises:
            UserError: there is no room for the files.
        """
        for network in networks:
            if network is not None and id(network) not in self._homes:
                self._homes[id(network)] = self._home(network)
                self._leave(network)

    @contextmanager
    def present(self, *networks: nn.Module | None) -> Iterator[None]:
        """Networks are at work inside the block; those that were never sent home always are."""
        mine = [network for network in networks if network is not None and id(network) in self._homes]
        with ExitStack() as stack:
            for network in mine:
                self._come(network)
                stack.callback(self._done, network)
            yield

    @contextmanager
    def taking_turns(self, *networks: nn.Module) -> Iterator[None]:
        """Each network is at work for as long as it is called."""
        with ExitStack() as stack:
            for network in {id(one): one for one in networks if id(one) in self._homes}.values():
                stack.callback(network.register_forward_pre_hook(lambda one, *_: self._come(one)).remove)
                stack.callback(network.register_forward_hook(lambda one, *_: self._done(one), always_call=True).remove)
            yield

    def _home(self, network: nn.Module) -> _Home:
        parameters = list(network.parameters())
        weights = [parameter.data for parameter in parameters]
        if self._folder is None:
            return _Home(parameters, weights)
        path = self._folder / f"{len(self._homes)}.safetensors"
        try:
            save_file({str(number): tensor.contiguous() for number, tensor in enumerate(weights)}, path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"networks wait in {self._folder}, and there is no room: {error}; set TMPDIR") from None
        return _Home(parameters, path)

    def _come(self, network: nn.Module) -> None:
        if not self._uses.get(id(network)):
            try:
                self._fetch(network)
            except BaseException:  # out of memory, say: what has come goes home again
                self._leave(network)
                raise
        self._uses[id(network)] = self._uses.get(id(network), 0) + 1

    def _fetch(self, network: nn.Module) -> None:
        home = self._homes[id(network)]
        weights = home.weights
        if isinstance(weights, Path):
            found = load_file(weights)
            weights = [found[str(number)] for number in range(len(found))]
        for parameter, weight in zip(home.parameters, weights, strict=True):
            parameter.data = weight.to(self.device, non_blocking=True)
        for buffer in network.buffers():
            buffer.data = buffer.data.to(self.device)

    def _done(self, network: nn.Module) -> None:
        if not self._uses.get(id(network)):  # it could not come: hooks after a call are called all the same
            return
        self._uses[id(network)] -= 1
        if not self._uses[id(network)]:
            self._leave(network)

    def _leave(self, network: nn.Module) -> None:
        home = self._homes[id(network)]
        if isinstance(home.weights, Path):
            for parameter in home.parameters:  # keeps its shape and takes no room
                parameter.data = torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)
        else:
            for parameter, weight in zip(home.parameters, home.weights, strict=True):
                parameter.data = weight


@dataclass(frozen=True, eq=False)
class _Home:
    """A network's parameters, and where their values wait."""

    parameters: Sequence[nn.Parameter]
    weights: Path | Sequence[Tensor]
