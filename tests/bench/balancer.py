"""A balancer in front of replicas, in a process of its own: HAProxy, or a small one of connections.

Both send to the replicas in turns, and leave out those whose readiness probe fails, as Kubernetes does:
``/health/detailed`` every 0.2 s, two failures in a row. HAProxy chooses for each request, as an Ingress does.
The small one, ``python -m tests.bench.balancer PORT REPLICA...``, chooses for each connection, as a Service
does, so that a client stays where it is until its connection ends.
"""

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import uvloop

from deploy.ports import unused_port
from tests.harness import ROOT, request

BUILT_IN: Final = "builtin"
HAPROXY: Final = "haproxy"
HOST: Final = "127.0.0.1"
PROBE: Final = "/health/detailed"
PROBE_S: Final = 0.2
PROBE_TIMEOUT_S: Final = 5.0
FAILURES: Final = 2
START_LIMIT_S: Final = 60.0

HAPROXY_CONFIGURATION: Final = """
global
  maxconn 2000
defaults
  mode http
  timeout connect 5s
  timeout client 90s
  timeout server 90s
frontend all
  bind {host}:{port}
  default_backend replicas
backend replicas
  balance roundrobin
  option httpchk GET {probe}
  http-check expect status 200
  timeout check {timeout_ms}ms
  default-server inter {inter_ms}ms fall {failures} rise 1
"""


def has_haproxy() -> bool:
    """Whether HAProxy is installed here."""
    return shutil.which(HAPROXY) is not None


@contextmanager
def balancer(kind: str, replicas: Sequence[int]) -> Iterator[int]:
    """A balancer in front of these ports, until the block ends; its port, where a replica answers.

    Args:
        kind: ``BUILT_IN`` or ``HAPROXY``.
        replicas: The ports of the replicas.
    """
    port = unused_port()
    with tempfile.TemporaryDirectory() as folder:
        if kind == HAPROXY:
            configuration = Path(folder, "haproxy.cfg")
            configuration.write_text(_haproxy_configuration(port, replicas))
            command = [HAPROXY, "-db", "-f", str(configuration)]
        else:
            command = [sys.executable, "-m", "tests.bench.balancer", str(port), *map(str, replicas)]
        with Path(folder, "output").open("wb") as output:
            running = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            end = time.monotonic() + START_LIMIT_S
            while not _answers(port):
                if running.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(Path(folder, "output").read_text())
                time.sleep(0.05)
            yield port
        finally:
            running.kill()
            running.wait()


def _answers(port: int) -> bool:
    with suppress(OSError):
        return request(port, "GET", PROBE, timeout_s=5).status == 200
    return False


def _haproxy_configuration(port: int, replicas: Sequence[int]) -> str:
    head = HAPROXY_CONFIGURATION.format(
        host=HOST,
        port=port,
        probe=PROBE,
        timeout_ms=round(PROBE_TIMEOUT_S * 1e3),
        inter_ms=round(PROBE_S * 1e3),
        failures=FAILURES,
    )
    servers = (f"  server replica-{at} {HOST}:{replica} check" for at, replica in enumerate(replicas))
    return "\n".join([head.strip(), *servers, ""])


class _Replica:
    def __init__(self, port: int) -> None:
        self.port = port
        self.ready = False

    async def watch(self) -> None:
        """Probe it for ever."""
        failures = FAILURES
        while True:
            failures = 0 if await self._probe() else failures + 1
            self.ready = failures < FAILURES
            await asyncio.sleep(PROBE_S)

    async def _probe(self) -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(HOST, self.port)
                try:
                    writer.write(
                        f"GET {PROBE} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode()
                    )
                    return b" 200 " in await reader.readline()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False


class _Side(asyncio.Protocol):
    """One of the two connections of a client; what arrives here is sent on the other one."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = transport  # type: ignore[assignment]  # a TCP connection's is a Transport

    def join(self, other: "_Side") -> None:
        """Send what has arrived, and all that will, to the other side."""
        self.other = other
        for data in self._early:
            self.data_received(data)
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        """Pass it on."""
        if self.other is None:
            self._early.append(data)
        elif self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        """Let the other side wait until this one has taken what it was given."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Let the other side go on."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, _error: Exception | None) -> None:
        """End the other side, after what it has yet to send."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class _Client(_Side):
    """The client's side: looks for a replica, and joins the two."""

    def __init__(self, balancing: "_Balancing") -> None:
        super().__init__()
        self._balancing = balancing

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Look for a replica."""
        super().connection_made(transport)
        task = asyncio.get_running_loop().create_task(self._find())
        self._balancing.tasks.add(task)
        task.add_done_callback(self._balancing.tasks.discard)

    async def _find(self) -> None:
        assert self.transport is not None
        for port in self._balancing.in_turn():
            with suppress(OSError):
                _, side = await asyncio.get_running_loop().create_connection(_Side, HOST, port)
                side.join(self)
                self.join(side)
                if self.transport.is_closing() and side.transport is not None:
                    side.transport.close()
                return
        self.transport.close()


class _Balancing:
    def __init__(self, ports: Sequence[int]) -> None:
        self.replicas = [_Replica(port) for port in ports]
        self.tasks: set[asyncio.Task[None]] = set()
        self._turn = 0

    def in_turn(self) -> list[int]:
        """The ports of those that are ready, beginning with the one whose turn it is."""
        ready = [replica.port for replica in self.replicas if replica.ready]
        self._turn += 1
        at = self._turn % max(1, len(ready))
        return ready[at:] + ready[:at]

    async def serve(self, port: int) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            for replica in self.replicas:
                tasks.create_task(replica.watch())
            server = await loop.create_server(lambda: _Client(self), HOST, port, backlog=1_000)
            tasks.create_task(server.serve_forever())


def main() -> None:
    """Balance until killed."""
    port, *replicas = map(int, sys.argv[1:])
    uvloop.run(_Balancing(replicas).serve(port))


if __name__ == "__main__":
    main()
