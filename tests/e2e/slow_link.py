"""A link to a server that can be made slow: passes bytes on, late."""

import socket
import socketserver
import threading
from contextlib import suppress
from typing import Self


class SlowLink(socketserver.ThreadingTCPServer):
    """Listens on a loopback port; what the server sends arrives ``delay_s`` later."""

    daemon_threads = False
    allow_reuse_address = True

    def __init__(self, server_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Link)
        self.server_port = server_port
        self.port: int = self.server_address[1]
        self.delay_s = 0.0
        self.ended = threading.Event()
        self.open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, name="slow link", args=(0.01,))

    @property
    def url(self) -> str:
        """What stands in the server's place."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.ended.set()
        self.shutdown()
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.server_close()


class _Link(socketserver.BaseRequestHandler):
    """One connection."""

    server: SlowLink
    request: socket.socket

    def handle(self) -> None:
        """Pass bytes both ways until one side ends."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.server.server_port)) as far:
            self.server.open |= {self.request, far}
            back = threading.Thread(target=self._answer, args=(far,), name="slow link's way back")
            back.start()
            try:
                while data := self.request.recv(65_536):
                    far.sendall(data)
            finally:
                with suppress(OSError):
                    far.shutdown(socket.SHUT_RDWR)
                back.join()
                self.server.open -= {self.request, far}

    def _answer(self, far: socket.socket) -> None:
        with suppress(OSError):
            while data := far.recv(65_536):
                self.server.ended.wait(self.server.delay_s)
                self.request.sendall(data)
        with suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)
