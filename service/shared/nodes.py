"""Clients of one Valkey server, of a cluster, or of the servers that sentinels watch.

In a cluster each key is on one of the servers, and behind sentinels all keys are on the master.
``RoutedClient`` asks who has them in a task of its own: a caller waits for that as long as it waits for
anything, and the next one finds the answer. The library's own clients for both ask and try again on the
caller's time, with pauses of a quarter of a second; that for clusters also loses a connection with each
caller who stops waiting, and forgets the addresses that it was given.
"""

import asyncio
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

from valkey import exceptions
from valkey.asyncio import ConnectionPool, Valkey
from valkey.asyncio.cluster import ClusterParser
from valkey.asyncio.connection import Connection, DefaultParser, SSLConnection
from valkey.asyncio.retry import Retry
from valkey.backoff import NoBackoff
from valkey.crc import key_slot

from service.config.valkey_url import ValkeyAddress

MAX_CONNECTIONS: Final = 4
"""Of each client to a server: the batches of counts use one, and the check of the server another; the reader
of news uses one, and the writer another."""

MAX_REDIRECTIONS: Final = 3
"""How often a command follows the servers' hints before its answer is that it was sent elsewhere."""

ASK_S: Final = 2.0
"""How long a server or a sentinel may take to say who has the keys; nobody waits so long."""

CLOSE_S: Final = 1.0
"""How long closing the connections to one server may take."""

MAX_KNOWN_ASKED: Final = 8
"""Nodes of a cluster that are asked beside those in the URL."""

LAST_SLOT: Final = 16_383

UNREACHABLE: Final = "unreachable"
CLUSTER_DOWN: Final = "cluster_down"
NOT_PERMITTED: Final = "not_permitted"

Node = tuple[str, int]
Command = Sequence[str | int | bytes]


class UnavailableError(Exception):
    """Nobody is known who has the keys; ``reason`` is one of a few words."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Client(Protocol):
    """Sends commands to whoever has their keys."""

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands at once; an answer of each, which may be an error. Raises what else happens."""
        ...

    async def execute_command(self, *words: str | int | bytes) -> Any:  # noqa: ANN401 - what a server sent
        """Send one command and return its answer; raises the error that it is."""
        ...


@asynccontextmanager
async def open_client(address: ValkeyAddress) -> AsyncIterator[Client]:
    """Open a client; nothing is sent until it is used, and leaving the block closes the connections."""
    if address.kind == "server":
        (node,) = address.nodes
        client = _connect(address, node)
        try:
            yield ServerClient(client)
        finally:
            await client.aclose()
        return
    find = _find_in_cluster if address.kind == "cluster" else _find_by_sentinels
    routed = RoutedClient(partial(_connect, address, parser=ClusterParser), partial(find, address))
    try:
        yield routed
    finally:
        await routed.aclose()


def _connect(address: ValkeyAddress, node: Node, parser: type[Any] = DefaultParser) -> Valkey:
    return Valkey.from_pool(_pool(address, node, parser))


def _pool(address: ValkeyAddress, node: Node, parser: type[Any] = DefaultParser) -> ConnectionPool:
    host, port = node
    tls: dict[str, Any] = {}
    if address.tls:
        # The client's default accepts any host's certificate.
        tls = {"connection_class": SSLConnection, "ssl_check_hostname": True}
    return ConnectionPool(
        **{"connection_class": Connection} | tls,
        max_connections=MAX_CONNECTIONS,
        host=host,
        port=port,
        db=address.database,
        username=address.username,
        password=address.password,
        parser_class=parser,
        # The older protocol: the newer one begins with a round trip, and nothing here needs it.
        protocol=2,
        # Who asks limits the time, and nobody can wait for a second attempt.
        socket_timeout=None,
        socket_connect_timeout=None,
        retry=Retry(NoBackoff(), 0),
        # It would say its name and version in two more commands on each connection.
        lib_name=None,
        lib_version=None,
    )


async def _pipelined(client: Valkey, commands: Iterable[Command]) -> list[Any]:
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    return list(await pipeline.execute(raise_on_error=False))


class ServerClient:
    """Sends everything to one server.

    Args:
        client: The library's client.
    """

    def __init__(self, client: Valkey) -> None:
        self._client: Any = client  # its methods have no types

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands at once."""
        return await _pipelined(self._client, commands)

    async def execute_command(self, *words: str | int | bytes) -> Any:  # noqa: ANN401 - what a server sent
        """Send one command."""
        return await self._client.execute_command(*words)


@dataclass(frozen=True, slots=True)
class Owners:
    """Who has which keys.

    Args:
        slots: First and last slot of the keys, and the server that has them, in the order of the slots.
    """

    slots: tuple[tuple[int, int, Node], ...]

    @property
    def nodes(self) -> frozenset[Node]:
        """All of them."""
        return frozenset(node for _first, _last, node in self.slots)

    def of(self, slot: int) -> Node:
        """The one that has the keys of a slot; raises ``UnavailableError``."""
        at = bisect_right(self.slots, slot, key=lambda one: one[0]) - 1
        if at < 0 or slot > self.slots[at][1]:
            raise UnavailableError(CLUSTER_DOWN)
        return self.slots[at][2]


@dataclass(frozen=True, slots=True)
class Target:
    """Where a command is sent.

    Args:
        node: The server.
        asking: Whether it is only about to get the keys, and must be told that this is known.
    """

    node: Node
    asking: bool = False


IGNORED: Final = -1
"""Place of an answer that nobody reads."""

STALE: Final = (
    exceptions.ConnectionError,
    exceptions.ReadOnlyError,
    exceptions.ClusterDownError,
    exceptions.MovedError,
    OSError,
)
"""Errors after which it is asked again who has the keys."""


def _is_moved(error: object) -> bool:
    return isinstance(error, exceptions.MovedError)


def slot_of(command: Command) -> int:
    """The slot of a command's keys, which are all in the same one."""
    match command[0]:
        case "EVALSHA" | "EVAL":
            key = command[3]
        case "XREAD":
            key = command[command.index("STREAMS") + 1]
        case _:
            key = command[1]
    return key_slot(str(key).encode())


class RoutedClient:
    """Sends each command to the server that has its keys.

    Args:
        connect: Makes a client of a server.
        find: Asks who has the keys, given the servers that had them; raises ``UnavailableError``.
    """

    def __init__(
        self,
        connect: Callable[[Node], Valkey],
        find: Callable[[frozenset[Node]], Awaitable[Owners]],
    ) -> None:
        self._connect = connect
        self._find = find
        self._owners: Owners | None = None
        self._known: frozenset[Node] = frozenset()
        self._moved: dict[int, Node] = {}
        self._clients: dict[Node, Valkey] = {}
        self._finding: asyncio.Task[str] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def execute_command(self, *words: str | int | bytes) -> Any:  # noqa: ANN401 - what a server sent
        """Send one command."""
        (answer,) = await self.send([words])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands at once, to each server its own."""
        answers: list[Any] = [None] * len(commands)
        owners = await self._found()
        slots = [slot_of(command) for command in commands]
        targets = {at: Target(self._moved.get(slot) or owners.of(slot)) for at, slot in enumerate(slots)}
        for _ in range(1 + MAX_REDIRECTIONS):
            await self._exchange(commands, targets, answers)
            targets = {
                at: Target((error.host or before.node[0], error.port), not _is_moved(error))
                for at, before in targets.items()
                if isinstance(error := answers[at], exceptions.AskError)
            }
            if not targets:
                break
            for at, target in targets.items():
                if not target.asking:
                    self._moved[slots[at]] = target.node
        return answers

    async def _exchange(
        self,
        commands: Sequence[Command],
        targets: Mapping[int, Target],
        answers: list[Any],
    ) -> None:
        """Send commands to their servers, and fill in the answers."""
        batches: dict[Node, list[tuple[int, Command]]] = {}
        for at, target in targets.items():
            batch = batches.setdefault(target.node, [])
            if target.asking:
                # Without it the server would send the command back to the one that sent it here.
                batch.append((IGNORED, ("ASKING",)))
            batch.append((at, commands[at]))
        sent = [self._exchange_with(node, batch, answers) for node, batch in batches.items()]
        try:
            if len(sent) == 1:
                await sent[0]
            else:
                await asyncio.gather(*sent)
        except asyncio.CancelledError:
            # A server that is silent may have been replaced.
            self._ask()
            raise
        stale = [answer for answer in answers if isinstance(answer, STALE)]
        if stale:
            if not all(map(_is_moved, stale)):
                self._owners = None
            self._ask()

    async def _exchange_with(
        self, node: Node, batch: Sequence[tuple[int, Command]], answers: list[Any]
    ) -> None:
        """Send commands to one server, and fill in the answers, which may all be the same error."""
        received: list[Any]
        try:
            received = await _pipelined(self._client(node), [command for _at, command in batch])
        except Exception as error:  # noqa: BLE001 - whatever it is, the other servers' answers count
            received = [error] * len(batch)
        for (at, _command), answer in zip(batch, received, strict=True):
            if at != IGNORED:
                answers[at] = answer

    def _client(self, node: Node) -> Valkey:
        if node not in self._clients:
            self._clients[node] = self._connect(node)
        return self._clients[node]

    async def _found(self) -> Owners:
        """Who has the keys, as far as is known; else as it is found out now."""
        if self._owners is None:
            # A caller who stops waiting does not stop this.
            reason = await asyncio.shield(self._ask())
            if self._owners is None:
                raise UnavailableError(reason)
        return self._owners

    def _ask(self) -> "asyncio.Task[str]":
        """Find out who has the keys, unless that is under way; the task returns why it could not."""
        if self._finding is None or self._finding.done():
            self._finding = self._start(self._ask_once())
        return self._finding

    async def _ask_once(self) -> str:
        try:
            owners = await self._find(self._known)
        except UnavailableError as error:
            return error.reason
        self._owners, self._known = owners, owners.nodes
        self._moved.clear()
        for node in self._clients.keys() - owners.nodes:
            self._start(_close(self._clients.pop(node)))
        return ""

    def _start(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def aclose(self) -> None:
        """End what is under way, and close all connections."""
        if self._finding is not None:
            self._finding.cancel()
        # The others close connections, and must not be stopped before they have.
        while self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.gather(*map(_close, self._clients.values()))


async def _close(client: Valkey) -> None:
    with suppress(OSError, exceptions.ValkeyError):
        async with asyncio.timeout(CLOSE_S):
            await client.aclose()


async def _find_in_cluster(address: ValkeyAddress, known: frozenset[Node]) -> Owners:
    """Ask the nodes in the URL, and some of those that had keys, for the slots of all."""

    async def ask(node: Node) -> Owners:
        answer = await _answer(address, node, "CLUSTER", "SLOTS")
        found = []
        for first, last, (host, port, *_), *_replicas in answer:
            name = (host or b"").decode() or node[0]
            # Its name is preferred, but not set.
            if name != "?":
                found.append((int(first), int(last), (name, int(port))))
        if not found:
            raise UnavailableError(CLUSTER_DOWN)
        return Owners(tuple(sorted(found)))

    nodes = [*address.nodes, *sorted(known - {*address.nodes})[:MAX_KNOWN_ASKED]]
    return await _most([ask(node) for node in nodes], "not_a_cluster")


async def _find_by_sentinels(address: ValkeyAddress, known: frozenset[Node]) -> Owners:
    """Ask the sentinels for the master of the service."""
    del known

    async def of(found: ValkeyAddress, node: Node) -> Owners:
        answer = await _answer(found, node, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.service)
        if answer is None:
            raise UnavailableError("unknown_service")
        host, port = answer
        return Owners(((0, LAST_SLOT, (host.decode(), int(port))),))

    async def ask(node: Node) -> Owners:
        sentinel = replace(address, database=0)
        try:
            return await of(sentinel, node)
        except exceptions.AuthenticationError:
            # Many sentinels ask for no password where their servers do, and refuse one.
            return await of(replace(sentinel, username=None, password=None), node)

    return await _most([ask(node) for node in address.nodes], "not_a_sentinel")


async def _answer(address: ValkeyAddress, node: Node, *words: str) -> Any:  # noqa: ANN401 - what a server sent
    """Ask one question on a connection of its own."""
    pool: Any = _pool(address, node)  # its methods have no types
    connection = pool.make_connection()
    try:
        async with asyncio.timeout(ASK_S):
            await connection.connect()
            await connection.send_command(*words)
            return await connection.read_response()
    finally:
        # It does not wait, so that nothing stops it half way.
        await connection.disconnect(nowait=True)


async def _most(questions: Sequence[Coroutine[Any, Any, Owners]], other: str) -> Owners:
    """What most of those say who answer: one of them may be cut off from the others, and not know it.

    Args:
        questions: Each asks one.
        other: The reason where one does not know the question.

    Raises:
        UnavailableError: Nobody knows.
    """
    votes: Counter[Owners] = Counter()
    reasons = {UNREACHABLE}
    tasks = [asyncio.create_task(question) for question in questions]
    try:
        for answered in asyncio.as_completed(tasks):
            try:
                votes[await answered] += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, others may know
                reasons.add(_reason(error, other))
            if votes and max(votes.values()) > len(tasks) / 2:
                break
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if not votes:
        raise UnavailableError(next(iter(sorted(reasons - {UNREACHABLE})), UNREACHABLE))
    return votes.most_common(1)[0][0]


def _reason(error: Exception, other: str) -> str:
    match error:
        case UnavailableError():
            return error.reason
        case exceptions.AuthenticationError() | exceptions.NoPermissionError():
            return NOT_PERMITTED
        case exceptions.ConnectionError() | OSError():
            return UNREACHABLE
        case exceptions.ResponseError():
            return other
    return "nonsense"
