"""What can be told before a model is loaded: whether the libraries are there, and the address free."""

from __future__ import annotations

import socket

from sft.utils.errors import UserError


def check_installed() -> None:
    """Raise UserError where the libraries of the extra `serve` aren't installed."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        text = f"sft serve needs FastAPI and uvicorn ({error}): pip install 'sambay-sft[serve]'"
        raise UserError(text) from None


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, on which nobody is answered yet; port 0: any free one.

    Raises:
        UserError: it can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, UnicodeError) as error:
        raise UserError(f"can't serve at {host}:{port}: {error}; see --host and --port") from None
    return made
