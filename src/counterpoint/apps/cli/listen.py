"""Where the web edges listen."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

from counterpoint.types import UserError


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens: who is early waits until the server is up.

    Raises:
        UserError: the port is taken, or the address is not this machine's.
    """
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
        probe.listen(128)
    except OSError as error:
        probe.close()
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from None
    return probe


def secrets_in(path: Path | None, what: str) -> list[str]:
    """The lines of a file of keys or logins, without empty ones; none without a file.

    Raises:
        UserError: it cannot be read; messages say what it should hold.
    """
    if path is None:
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the {what} {path}: {error}") from None


def loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
