"""Ports for programs that are started here and take some seconds until they listen."""

import random
import socket

from deploy.api import HOST

FIRST, LAST = 15_000, 32_000
"""Below the ports that systems hand out to connections (Linux from 32768, others from 49152): one of those
could be taken by anybody's connection before the program listens."""

TRIES = 100


def unused_port() -> int:
    """A port of the loopback address that nobody has at the moment.

    Raises:
        OSError: None was found.
    """
    for _ in range(TRIES):
        port = random.randint(FIRST, LAST)  # noqa: S311 - two who look at the same time should not meet
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise OSError(f"No free port was found between {FIRST} and {LAST}")
