"""The client of a Valkey server, or of one that speaks its protocol; the only importer of ``valkey``.

It is imported where ``VALKEY_URL`` is set.
"""

import hashlib
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from valkey import exceptions
from valkey.asyncio import ConnectionPool, Valkey
from valkey.asyncio.retry import Retry
from valkey.backoff import NoBackoff

from service.errors import UpstreamError
from service.shared.counts import Count, Counted, Limit
from service.shared.exchange import Request
from service.shared.leases import Put, Take
from service.shared.news import Stream
from service.utils.rates import Rate, Window

PREFIX: Final = "llmops:{rates}:"
"""Begins each key. What is in braces is the hash tag."""

CALL_PREFIX: Final = "llmops:call:"
"""Begins the key of a lease; it needs no hash tag, as its script has one key."""

SCRIPT: Final = Path(__file__).with_name("count.lua").read_text(encoding="utf-8")
LEASE_SCRIPT: Final = Path(__file__).with_name("lease.lua").read_text(encoding="utf-8")
MICROSECONDS: Final = 1_000_000

Command = tuple[str | int | bytes, ...]

MAX_CONNECTIONS: Final = 4
"""Of each client: the batches of counts use one, and the check of the server another; the reader of news uses
one, and the writer another."""

REASONS: Final[Sequence[tuple[type[Exception], str]]] = (
    (exceptions.AuthenticationError, "not_permitted"),
    (exceptions.NoPermissionError, "not_permitted"),
    (exceptions.BusyLoadingError, "loading"),
    (exceptions.ReadOnlyError, "read_only"),
    (exceptions.OutOfMemoryError, "out_of_memory"),
    (exceptions.ConnectionError, "unreachable"),
    (OSError, "unreachable"),
)
"""By the kind of an error, its reason; the first that fits, as some kinds are kinds of others."""

REFUSALS: Final = {"MISCONF": "misconfigured", "MOVED": "moved"}
"""By the code of an error that the client has no kind for, its reason."""


def key_of(limit: Limit) -> str:
    """The key of a limit: a limit that is changed counts anew, as in memory."""
    digest = hashlib.blake2b(limit.key.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return f"{PREFIX}{limit.rate.amount}/{limit.rate.period_s}:{digest}"


@asynccontextmanager
async def open_valkey(url: str, script: str = SCRIPT) -> AsyncIterator["ValkeyServer"]:
    """Open the server; nothing is sent until it is used, and leaving the block closes the connections.

    Args:
        url: The server's, with the scheme ``valkey``, ``valkeys``, ``redis`` or ``rediss``.
        script: Counts a call.
    """
    async with _open_client(url) as client:
        yield ValkeyServer(client, script)


@asynccontextmanager
async def open_log(url: str, stream: Stream) -> AsyncIterator["ValkeyLog"]:
    """Open a log of news, as ``open_valkey`` opens the counts."""
    async with _open_client(url) as client:
        yield ValkeyLog(client, stream)


@asynccontextmanager
async def _open_client(url: str) -> AsyncIterator[Valkey]:
    location = f"valkey{url.removeprefix('valkey').removeprefix('redis')}"
    # The client's default accepts any host's certificate.
    tls = {"ssl_check_hostname": True} if location.startswith("valkeys:") else {}
    pool = ConnectionPool.from_url(
        location,
        max_connections=MAX_CONNECTIONS,
        # The older protocol: the newer one begins with a round trip, and nothing here needs it.
        protocol=2,
        # Who asks limits the time, and nobody can wait for a second attempt.
        socket_timeout=None,
        socket_connect_timeout=None,
        retry=Retry(NoBackoff(), 0),
        # It would say its name and version in two more commands on each connection.
        lib_name=None,
        lib_version=None,
        **tls,
    )
    client = Valkey.from_pool(pool)
    try:
        yield client
    finally:
        await client.aclose()


class _Script:
    """A script, which is sent once and then named by its digest.

    Args:
        text: The script.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def command(self, keys: Sequence[str], values: Sequence[str | int | bytes], *, whole: bool) -> Command:
        """The command that runs it: by its digest, or by the whole script for a server that lacks it."""
        name, script = ("EVAL", self._text) if whole else ("EVALSHA", self._digest)
        return (name, script, len(keys), *keys, *values)


class ValkeyServer:
    """Answers requests by scripts in the server.

    Args:
        client: The client.
        script: Counts a call.
    """

    def __init__(self, client: Valkey, script: str) -> None:
        self._client = client
        self._count, self._lease = _Script(script), _Script(LEASE_SCRIPT)
        self._pinged = Count([Limit(Rate("1/second"), "ping", "alone")])

    async def exchange(self, requests: Sequence[Request[Any]]) -> list[Any]:
        """Answer several requests in one round trip, or in two where the server does not know a script.

        Raises:
            Exception: Whatever the client raises, and ``ValueError`` for an answer that is none.
        """
        answers = await self._send([self._command(request) for request in requests])
        missed = [at for at, answer in enumerate(answers) if isinstance(answer, exceptions.NoScriptError)]
        if missed:
            again = await self._send([self._command(requests[at], whole=True) for at in missed])
            for at, answer in zip(missed, again, strict=True):
                answers[at] = answer
        return [_read(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def _command(self, request: Request[Any], *, whole: bool = False) -> Command:
        if isinstance(request, Count):
            values: list[str | int | bytes] = []
            for limit in request.limits:
                rate = limit.rate
                values += (limit.how, rate.amount, rate.period_s * MICROSECONDS, int(rate.exact))
            return self._count.command([key_of(limit) for limit in request.limits], values, whole=whole)
        if isinstance(request, Take):
            what, value = "take", b""
        elif isinstance(request, Put):
            what, value = "put", request.value
        else:
            raise TypeError(type(request).__name__)
        kept_ms = max(1, round(request.kept_s * 1_000))
        return self._lease.command(
            [f"{CALL_PREFIX}{request.call}"], [what, request.own, value, kept_ms], whole=whole
        )

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return list(await pipeline.execute(raise_on_error=False))

    async def ping(self) -> None:
        """Count a call of nobody's, which a server that only reads refuses; raises ``UpstreamError`` then."""
        try:
            await self.exchange([self._pinged])
        except Exception as error:  # noqa: BLE001 - whatever the client raises, the server is down
            raise UpstreamError(label=f"the server: {self.reason_of(error)}") from None

    def reason_of(self, error: Exception) -> str:
        """Name a refusal, or what went wrong on the wire."""
        for kind, reason in REASONS:
            if isinstance(error, kind):
                return reason
        if isinstance(error, exceptions.ResponseError):
            return REFUSALS.get(str(error).partition(" ")[0], "refused")
        return "nonsense"


def _read(request: Request[Any], answer: Any) -> Any:  # noqa: ANN401 - what a server sent, and what that means
    """Read a script's answer; raises the server's error, or ``ValueError`` for what no script answers."""
    if isinstance(answer, Exception):
        raise answer
    if isinstance(request, Count):
        return _counted(answer, request.limits)
    if not isinstance(answer, bytes):
        raise ValueError("not an answer of the script")  # noqa: TRY004 - it is not the caller's type
    return answer


def _counted(answer: Any, limits: Sequence[Limit]) -> Counted:  # noqa: ANN401 - what a server sent
    if (
        not isinstance(answer, list)
        or len(answer) != 1 + 2 * len(limits)
        or not all(type(value) is int for value in answer)
        or answer[0] not in {0, 1}
    ):
        raise ValueError("not an answer of the script")
    windows = []
    for limit, left, wait_us in zip(limits, answer[1::2], answer[2::2], strict=True):
        if not (0 <= left <= limit.rate.amount and 0 <= wait_us <= limit.rate.period_s * MICROSECONDS):
            raise ValueError("not a state of the limit")
        windows.append(Window(left, wait_us / MICROSECONDS))
    return Counted(answer[0] == 1, windows)


class ValkeyLog:
    """A log, as a stream in the server.

    Args:
        client: The client.
        stream: Its key and its limits.
    """

    def __init__(self, client: Valkey, stream: Stream) -> None:
        self._client: Any = client  # its methods for streams have no types
        self._stream = stream

    async def append(self, entries: Sequence[Mapping[str, str]]) -> None:
        """Add entries; the oldest of too many are removed."""
        commands = [self._command(entry) for entry in entries]
        if len(commands) == 1:
            await self._client.execute_command(*commands[0])
            return
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        await pipeline.execute()

    def _command(self, entry: Mapping[str, str]) -> tuple[str | int, ...]:
        fields = [part for item in entry.items() for part in item]
        return ("XADD", self._stream.key, "MAXLEN", "~", self._stream.max_entries, "*", *fields)

    async def begin(self) -> str:
        """The id behind which a process that starts reads; by the server's clock, which the ids have."""
        if self._stream.kept_s == math.inf:
            return "0-0"
        newest = await self._client.execute_command("XREVRANGE", self._stream.key, "+", "-", "COUNT", 1)
        newest_ms = int(_text(newest[0][0]).partition("-")[0]) if newest else 0
        return f"{max(0, newest_ms - round(self._stream.kept_s * 1_000))}-0"

    async def read(self, after: str, wait_s: float) -> list[tuple[str, dict[str, str]]]:
        """The entries behind one, with their ids; waits for the next one where there are none."""
        waits = ("BLOCK", round(wait_s * 1_000)) if wait_s else ()
        answer = await self._client.execute_command(
            "XREAD", "COUNT", self._stream.read_at_once, *waits, "STREAMS", self._stream.key, after
        )
        # One stream was asked for; an entry that was removed meanwhile has no fields.
        entries = answer[0][1] if answer else []
        return [
            (_text(identifier), {_text(name): _text(value) for name, value in (fields or {}).items()})
            for identifier, fields in entries
        ]


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
