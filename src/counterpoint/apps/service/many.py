"""The same service on more than one machine: replicas on Ray Serve that share the jobs' database and folder."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from counterpoint.apps.cluster import cluster
from counterpoint.apps.service.app import make_app
from counterpoint.apps.service.state import Config
from counterpoint.types import UserError


def serve_on_ray(address: str, config: Config, replicas: int, host: str, port: int, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Every replica answers requests and works on jobs. A job belongs to whoever claimed it in the database, and is
    claimed by another when its worker gives no sign of life.

    Args:
        address: of the cluster, or ``"local"``.
        config: of each replica; ``folder`` is the same on every machine.
        replicas: how many.
        host: on which every machine listens.
        port: likewise.
        ready: called when requests are answered.

    Raises:
        UserError: no cluster answers, or the service does not start there.
    """
    for check in ("READY", "HEALTH"):  # after three times 5 s Ray gives a proxy up that a busy machine has not started
        os.environ.setdefault(f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S", "60")
    with cluster(address):
        from ray import serve

        def build() -> Any:
            return make_app(config)

        needs = {"num_cpus": config.threads} | ({"num_gpus": 1} if config.device.startswith("cuda") else {})
        replica = serve.deployment(
            name="counterpoint",
            num_replicas=replicas,
            ray_actor_options=needs,
            graceful_shutdown_timeout_s=config.grace + 5,
            max_ongoing_requests=256,
        )(serve.ingress(build)())
        try:
            try:
                serve.start(http_options={"host": host, "port": port, "location": "EveryNode"})
                serve.run(replica.bind(), name="counterpoint", route_prefix="/")
            except (TimeoutError, RuntimeError) as error:
                raise UserError(f"Ray Serve does not start: {str(error).splitlines()[0]}") from None
            stop = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            ready()
            stop.wait()
        finally:
            serve.shutdown()
