"""Work on a Ray cluster: a suite's pictures, or anything that is done item by item."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from counterpoint.evaluation.make import Executor, Made, made_by
from counterpoint.evaluation.suite import Maker, Task
from counterpoint.types import UserError

_BLOCKS = 4096
"""Of a run's items, at most: results come block by block, and what a kill interrupts is a block."""


class _Worker:
    """Builds its own maker; counts in as many threads as the caller, so that sums come out the same."""

    def __init__(self, build: Callable[[], Maker], device: torch.device, threads: int) -> None:
        torch.set_num_threads(threads)
        self.maker, self.device = build(), device

    def make(self, tasks: Sequence[Task]) -> Made:
        return made_by(self.maker, self.device, tasks)


def on_ray(address: str, build: Callable[[], Maker], device: torch.device) -> Executor:
    """An executor on a Ray cluster.

    Args:
        address: ``HOST:PORT`` of the cluster, or ``"local"`` for one on this machine that ends with the run.
        build: makes the maker, on every worker.
        device: where the model runs there. On a CPU a worker takes as many cores as this process has threads, on
            CUDA a whole GPU.

    Raises:
        UserError: Ray is not installed, no cluster answers, or it has no room for a worker.
    """

    def execute(batches: Sequence[Sequence[Task]]) -> Iterator[Made]:
        with cluster(address) as ray:
            threads = torch.get_num_threads()
            needs = {"CPU": 1.0, "GPU": 1.0} if device.type == "cuda" else {"CPU": float(threads)}
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            room = sum(min(int(node.get(name, 0) // amount) for name, amount in needs.items()) for node in nodes)
            if not room:
                wanted = ", ".join(f"{amount:g} {name}" for name, amount in needs.items())
                raise UserError(f"--ray {address}: no room for a worker, which takes {wanted}")
            worker = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0))(_Worker)
            pool = ray.util.ActorPool([worker.remote(build, device, threads) for _ in range(min(room, len(batches)))])
            yield from pool.map_unordered(lambda actor, batch: actor.make.remote(batch), batches)

    return execute


def map_on_ray(
    address: str, build: Callable[[], Callable[[str], str | None]], items: Sequence[str], device: str = "cpu"
) -> Iterator[tuple[str, str | None]]:
    """``(item, result)`` in any order, by Ray Data on every core, or every GPU, of a cluster.

    Args:
        address: as :func:`on_ray` has it.
        build: makes what an item is given to, once a core or GPU.
        items: all of them.
        device: where the work is done there.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """
    with cluster(address) as ray:
        unit = "GPU" if device.startswith("cuda") else "CPU"
        cores = int(ray.cluster_resources().get(unit, 0))
        if not cores:
            raise UserError(f"--ray {address}: no room for a worker, which takes 1 {unit}")
        ray.data.DataContext.get_current().enable_progress_bars = False
        blocks = min(len(items), max(_BLOCKS, 8 * cores))
        rows = ray.data.from_items([{"item": item} for item in items], override_num_blocks=blocks)
        actors = ray.data.ActorPoolStrategy(size=min(cores, len(items)))
        needs = {"num_cpus": 1} | ({"num_gpus": 1} if unit == "GPU" else {})
        for row in rows.map(_Mapped, fn_constructor_args=(build,), compute=actors, **needs).iter_rows():
            yield row["item"], row["result"] or None


class _Mapped:
    def __init__(self, build: Callable[[], Callable[[str], str | None]]) -> None:
        self.work = build()

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        return {"item": row["item"], "result": self.work(row["item"]) or ""}


def its_device(device: str) -> str:
    """What a worker calls the device that is ``device`` here: of GPUs it sees one, which Ray chose."""
    return "cuda" if device.startswith("cuda:") else device


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """Ray, connected.

    Args:
        address: ``HOST:PORT`` of a cluster, or ``"local"`` for one on this machine that ends with the block.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        import ray.data
        import ray.util
        from ray.exceptions import RayError
    except ImportError:
        raise UserError("--ray needs Ray: pip install 'counterpoint[ray]'") from None
    if address == "local":
        ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    else:
        _check_answers(address)
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"--ray {address}: this is no cluster of this version ({error})") from None
    try:
        yield ray
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"--ray {address}: a worker could not do its part ({reason})") from error
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes where nobody listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise UserError(f"--ray {address}: no cluster answers at this HOST:PORT ({error})") from None
