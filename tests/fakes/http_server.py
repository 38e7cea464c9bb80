"""A threading HTTP server that ends in order: what several fakes listen with."""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class EndingHttpServer(ThreadingHTTPServer):
    """Unlike its base it can end its connections, and waits for their threads.

    Args:
        port: Where it listens on loopback; 0 takes a free one.
        handler: What serves a connection.
    """

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection before its thread starts."""
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget the connection before it is closed."""
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        """Wake the threads that are reading from a connection by ending it."""
        with self._lock:
            for connection in self._open:
                with suppress(OSError):  # its client has reset it
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over a client that has gone; that is part of every test with a timeout."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)
