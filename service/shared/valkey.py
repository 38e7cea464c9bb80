"""What is asked of a Valkey server, or of one that speaks its protocol.

It and ``service/shared/nodes.py``, which reaches the servers, are the only importers of ``valkey``. They are
imported where ``VALKEY_URL`` is set.
"""

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from valkey import exceptions

from service.config.valkey_url import parse_valkey_url
from service.errors import UpstreamError
from service.shared.counts import Counted, Limit
from service.shared.nodes import CLUSTER_DOWN, Client, UnavailableError, open_client
from service.utils.rates import Rate, Window

PREFIX: Final = "llmops:{rates}:"
"""Begins each key. What is in braces is the hash tag."""

SCRIPT: Final = Path(__file__).with_name("count.lua").read_text(encoding="utf-8")
MICROSECONDS: Final = 1_000_000

NEWS: Final = "llmops:news"
MAX_NEWS: Final = 100_000
"""Entries that the log keeps, of some 200 bytes each. A process that starts reads all of them."""

READ_AT_ONCE: Final = 500

REASONS: Final[Sequence[tuple[type[Exception], str]]] = (
    (exceptions.AuthenticationError, "not_permitted"),
    (exceptions.NoPermissionError, "not_permitted"),
    (exceptions.BusyLoadingError, "loading"),
    (exceptions.ReadOnlyError, "read_only"),
    (exceptions.OutOfMemoryError, "out_of_memory"),
    (exceptions.ClusterDownError, CLUSTER_DOWN),
    (exceptions.AskError, "moved"),
    (exceptions.TryAgainError, "moved"),
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
    """Open the counts; nothing is sent until they are used, and leaving the block closes the connections.

    Args:
        url: Of a server, a cluster or sentinels, as ``VALKEY_URL`` has it.
        script: Counts a call.
    """
    async with open_client(parse_valkey_url(url)) as client:
        yield ValkeyServer(client, script)


@asynccontextmanager
async def open_log(url: str) -> AsyncIterator["ValkeyLog"]:
    """Open the log of news, as ``open_valkey`` opens the counts."""
    async with open_client(parse_valkey_url(url)) as client:
        yield ValkeyLog(client)


class ValkeyServer:
    """Counts calls by a script in the server, which is sent once and then named by its digest.

    Args:
        client: The client.
        script: Counts a call.
    """

    def __init__(self, client: Client, script: str) -> None:
        self._client = client
        self._script = script
        self._pinged = Limit(Rate("1/second"), "ping", "alone")
        self._digest = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()

    async def exchange(self, calls: Sequence[Sequence[Limit]]) -> list[Counted]:
        """Count several calls in one round trip, or in two where the server does not know the script.

        Raises:
            Exception: Whatever the client raises, and ``ValueError`` for an answer that is none.
        """
        commands = [self._command(limits) for limits in calls]
        answers = await self._send(commands)
        missed = [at for at, answer in enumerate(answers) if isinstance(answer, exceptions.NoScriptError)]
        if missed:
            again = await self._send([("SCRIPT", "LOAD", self._script), *(commands[at] for at in missed)])
            for at, answer in zip(missed, again[1:], strict=True):
                answers[at] = answer
        return [_counted(answer, limits) for answer, limits in zip(answers, calls, strict=True)]

    def _command(self, limits: Sequence[Limit]) -> tuple[str | int, ...]:
        values: list[str | int] = []
        for limit in limits:
            rate = limit.rate
            values += (limit.how, rate.amount, rate.period_s * MICROSECONDS, int(rate.exact))
        return ("EVALSHA", self._digest, len(limits), *map(key_of, limits), *values)

    async def _send(self, commands: Sequence[tuple[str | int, ...]]) -> list[Any]:
        return await self._client.send(commands)

    async def ping(self) -> None:
        """Count a call of nobody's, which a server that only reads refuses; raises ``UpstreamError`` then."""
        try:
            await self.exchange([[self._pinged]])
        except Exception as error:  # noqa: BLE001 - whatever the client raises, the server is down
            raise UpstreamError(label=f"the server: {self.reason_of(error)}") from None

    def reason_of(self, error: Exception) -> str:
        """Name a refusal, or what went wrong on the wire."""
        if isinstance(error, UnavailableError):
            return error.reason
        for kind, reason in REASONS:
            if isinstance(error, kind):
                return reason
        if isinstance(error, exceptions.ResponseError):
            return REFUSALS.get(str(error).partition(" ")[0], "refused")
        return "nonsense"


def _counted(answer: Any, limits: Sequence[Limit]) -> Counted:  # noqa: ANN401 - what a server sent
    """Read the script's answer; raises the server's error, or ``ValueError`` for what no script answers."""
    if isinstance(answer, Exception):
        raise answer
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
    """A log of news, as a stream in the server.

    Args:
        client: The client.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    async def append(self, entry: Mapping[str, str]) -> None:
        """Add an entry; the oldest of too many are removed."""
        fields = [part for item in entry.items() for part in item]
        await self._client.execute_command("XADD", NEWS, "MAXLEN", "~", MAX_NEWS, "*", *fields)

    async def read(self, after: str, wait_s: float) -> list[tuple[str, dict[str, str]]]:
        """The entries behind one, with their ids; waits for the next one where there are none."""
        waits = ("BLOCK", round(wait_s * 1_000)) if wait_s else ()
        answer = await self._client.execute_command(
            "XREAD", "COUNT", READ_AT_ONCE, *waits, "STREAMS", NEWS, after
        )
        # One stream was asked for; an entry that was removed meanwhile has no fields.
        entries = answer[0][1] if answer else []
        return [
            (_text(identifier), {_text(name): _text(value) for name, value in (fields or {}).items()})
            for identifier, fields in entries
        ]


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
