"""A wire tap: passes bytes between a client and a server, and keeps what the client sent."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self


class Tap:
    """Listens on a loopback port and connects each client to the server's port."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._sent = bytearray()
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_exception: object) -> None:
        # A closed listener does not wake the thread that waits on it; an ended one does.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for connection in (*self._open, self._listener):
            connection.close()

    @property
    def sent(self) -> bytes:
        """All bytes that clients have sent so far."""
        with self._lock:
            return bytes(self._sent)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="tap")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._open += [client, server]
                self._start(self._pass, client, server, self._sent)
                self._start(self._pass, server, client, bytearray())

    def _pass(self, source: socket.socket, target: socket.socket, kept: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                with self._lock:
                    kept += data
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
