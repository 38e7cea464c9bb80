"""Unused ports for programs that need some seconds to start before they listen."""

import random
import socket

from deploy.api import HOST

FIRST, LAST = 15_000, 32_000
"""Below the ephemeral ports (Linux from 32768, others from 49152): an outgoing connection could take one of
those before the program listens."""

TRIES = 100


def unused_port() -> int:
    """Return a port of the loopback address that is not in use.

    Raises:
        OSError: No unused port was found.
    """
    for _ in range(TRIES):
        port = random.randint(FIRST, LAST)  # noqa: S311 - so that two searches at the same time rarely collide
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise OSError(f"No free port was found between {FIRST} and {LAST}")
