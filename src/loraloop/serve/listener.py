"""The socket that the router listens on, and what makes its process quick to answer."""

from __future__ import annotations

import socket
import sys

from loraloop.errors import ServingError

BACKLOG = 1024
SWITCH_SECONDS = 0.0005
KEEP_ALIVE_SECONDS = 75
"""For uvicorn's `timeout_keep_alive`: OpenAI's client keeps a connection for 5 s, which is uvicorn's default too, so that a call may meet
the very moment in which the router closes it. The client is to be the first."""


def favour_calls() -> None:
    """For the process of a router: a call waits for Python's lock at most half a millisecond while the recorder's threads work, not 5."""
    sys.setswitchinterval(SWITCH_SECONDS)


def open_listener(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A listening socket at `host` and `port`, 0 for any that is free; only one process may have it.

    Its protocol is named, as asyncio turns off the delay of small packets (40 ms for each answer in two parts) only for sockets that say
    they are TCP. Raises ServingError when the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise ServingError(f"cannot listen at {host}:{port}: {why}; choose another --port, or 0 for any that is free") from error
    return listener
