"""Counting and telling in a Valkey cluster and behind sentinels: as in one server, whoever has the keys."""

import asyncio
import logging
import secrets
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from valkey.crc import key_slot

from deploy.ports import unused_port
from service.config.valkey_url import parse_valkey_url
from service.errors import UpstreamError
from service.shared.counts import Limit
from service.shared.exchange import BREAKER_FAILURES, BREAKER_S
from service.shared.news import NEWS
from service.shared.nodes import open_client
from service.shared.valkey import PREFIX, ValkeyLog, open_log
from service.utils.rates import Rate
from tests.fakes.tls import PrivateAuthority
from tests.unit.conftest import Lines
from tests.unit.resilience import Readable
from tests.unit.test_shared_counts import Instance, answering, opened
from tests.valkey import SERVICE, Valkey, ValkeyCluster, ValkeySentinels, until

FAILOVER_LIMIT_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[ValkeyCluster]:
    with ValkeyCluster(3, 1) as found:
        yield found


@pytest.fixture(scope="module")
def sentinels() -> Iterator[ValkeySentinels]:
    with ValkeySentinels() as found:
        yield found


@pytest.fixture(params=["cluster", "sentinels"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param).url)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it, and look for tasks and connections that are left."""

    async def whole() -> None:
        here = asyncio.current_task()
        await scenario()
        assert asyncio.all_tasks() == {here}

    asyncio.run(whole())


def told(lines: Lines) -> list[str]:
    return [line["message"] for line in lines.all if line["logger"] == "service.shared.exchange"]


async def outcome(metrics: Readable, url: str) -> str:
    """What the check says of a URL, at which no call may fail."""
    async with opened(metrics, url) as here:
        assert (await here.counts.count([Limit(Rate("1/minute"), secrets.token_hex())])).allowed
        (ping,) = here.shared.pings.values()
        try:
            await ping()
        except UpstreamError as error:
            return error.label.removeprefix("the server: ")
    return "up"


async def shared(one: Instance, other: Instance, name: str) -> bool:
    """Whether two processes count together, when their breakers let them try again."""
    # A limit holds what its process has counted.
    limits = {instance: Limit(Rate("1000/minute"), name) for instance in (one, other)}
    for instance in limits:
        if instance.breaker.state != "closed":
            instance.clock.advance(BREAKER_S)
    left = [
        (await instance.counts.count([limits[instance]])).windows[0].remaining
        for instance in (one, other, one, other)
    ]
    return left == sorted(left, reverse=True) and left[0] - left[3] == 3


# ---- Counting and telling ----


def test_counts_are_exact_over_processes(url: str, metrics: Readable) -> None:
    async def scenario() -> None:
        async with opened(metrics, url) as one, opened(metrics, url) as other:
            calls = [
                instance.counts.count([Limit(Rate("30/minute"), "both"), Limit(Rate("1000/minute"), "team")])
                for _ in range(30)
                for instance in (one, other)
            ]
            assert sum([counted.allowed for counted in await asyncio.gather(*calls)]) == 30
            assert metrics.value("llmops.shared.fallback") == 0

    run(scenario)


def test_news_are_told_and_heard(url: str) -> None:
    async def scenario() -> None:
        async with open_log(url, NEWS) as one, open_log(url, NEWS) as other:
            await one.append([{"topic": "first"}])
            ((first, _),) = await other.read("0-0", 0.0)
            heard = asyncio.create_task(other.read(first, 30.0))
            await asyncio.sleep(0)
            await one.append([{"topic": "second"}])
            ((_, entry),) = await heard
            assert entry == {"topic": "second"}

    run(scenario)


def test_commands_for_several_servers_are_sent_at_once(cluster: ValkeyCluster) -> None:
    async def scenario() -> None:
        async with open_client(parse_valkey_url(cluster.url)) as client:
            keys = [f"llmops:{number}" for number in range(30)]
            assert len({cluster.master_of(key).port for key in keys}) == 3
            script = "return KEYS[1] .. ARGV[1]"
            answers = await client.send([("EVAL", script, 1, key, "!") for key in keys])
            assert answers == [f"{key}!".encode() for key in keys]

    run(scenario)


# ---- Keys that move ----


def test_keys_that_move_to_another_node_are_followed(
    cluster: ValkeyCluster, metrics: Readable, lines: Lines
) -> None:
    lines.configure(logging.getLevelName(logging.INFO))
    old = cluster.master_of(PREFIX)
    new = cluster.other_than(old)
    slot = str(key_slot(PREFIX.encode()))
    names = {one.port: one.must("CLUSTER", "MYID").split(b"\r\n")[1].decode() for one in (old, new)}

    async def scenario() -> None:
        async with opened(metrics, cluster.url) as here:

            async def allowed(name: str) -> list[bool]:
                limit = Limit(Rate("2/minute"), name)
                return [(await here.counts.count([limit])).allowed for _ in range(3)]

            assert await allowed("before") == [True, True, False]
            # The slot is on its way: a key that the old node does not have is asked for at the new one.
            new.must("CLUSTER", "SETSLOT", slot, "IMPORTING", names[old.port])
            old.must("CLUSTER", "SETSLOT", slot, "MIGRATING", names[new.port])
            assert await allowed("on the way") == [True, True, False]
            assert b":0\r\n" not in new.ask("CLUSTER", "COUNTKEYSINSLOT", slot)
            for key in old.must("CLUSTER", "GETKEYSINSLOT", slot, "1000").split(b"\r\n")[2::2]:
                old.must("MIGRATE", "127.0.0.1", str(new.port), key.decode(), "0", "5000")
            for one in (new, old):
                one.must("CLUSTER", "SETSLOT", slot, "NODE", names[new.port])
            assert await allowed("before") == [False] * 3
            assert await allowed("after") == [True, True, False]

    run(scenario)
    assert told(lines) == []


# ---- Who cannot be had, or is the wrong one ----


def test_what_is_wrong_with_an_address_is_named(
    cluster: ValkeyCluster, sentinels: ValkeySentinels, metrics: Readable
) -> None:
    async def scenario() -> None:
        with Valkey() as plain, Valkey() as other:
            nobody = f"127.0.0.1:{other.port}"
            other.kill()
            found = {
                "not_a_cluster": f"valkey+cluster://127.0.0.1:{plain.port}",
                "not_a_sentinel": f"valkey+sentinel://127.0.0.1:{plain.port}/{SERVICE}",
                "unknown_service": f"valkey+sentinel://{nobody},{sentinels.addresses}/other",
                "moved": f"valkey://127.0.0.1:{cluster.replicas[0][0].port}",
            }
            for reason, url in found.items():
                assert await outcome(metrics, url) == reason
            for url in (f"valkey+cluster://{nobody}", f"valkey+sentinel://{nobody}/{SERVICE}"):
                assert await outcome(metrics, url) == "unreachable"

    run(scenario)


def test_a_cluster_that_is_not_ready_is_named(metrics: Readable) -> None:
    async def scenario() -> None:
        with ValkeyCluster(2) as cluster:
            master = cluster.master_of(PREFIX)
            other = cluster.other_than(master)
            assert await outcome(metrics, cluster.url) == "up"
            other.kill()
            # The master is there, but refuses: not all slots are served.
            until(lambda: b"cluster_state:fail" in master.ask("CLUSTER", "INFO"), "the cluster is down")
            assert await outcome(metrics, cluster.url) == "cluster_down"
        with Valkey("--cluster-enabled", "yes", "--cluster-port", str(unused_port())) as alone:
            assert await outcome(metrics, f"valkey+cluster://127.0.0.1:{alone.port}") == "cluster_down"

    run(scenario)


def test_a_password_is_for_the_servers_and_for_sentinels_that_ask_for_one(metrics: Readable) -> None:
    password = ("--requirepass", "open-sesame", "--primaryauth", "open-sesame")
    auth = f"auth-pass {SERVICE} open-sesame"

    async def scenario(pair: ValkeySentinels) -> None:
        assert await outcome(metrics, pair.url) == "not_permitted"
        assert await outcome(metrics, pair.url.replace("://", "://:open-sesame@")) == "up"
        assert await outcome(metrics, pair.url.replace("://", "://:wrong@")) == "not_permitted"

    with ValkeySentinels(*password, lines=(auth,)) as pair:
        run(lambda: scenario(pair))
        for sentinel in pair.sentinels:
            sentinel.must("ACL", "SETUSER", "default", "resetpass", ">open-sesame")
        run(lambda: scenario(pair))


@pytest.mark.parametrize("form", ["valkey+cluster://{}", "valkey+sentinel://{}/counts"])
def test_who_is_silent_is_waited_for_no_longer_than_anybody(
    metrics: Readable, lines: Lines, form: str
) -> None:
    """It is asked for longer than a request waits, and nothing of that is left at the end."""
    lines.configure(logging.getLevelName(logging.INFO))

    async def scenario() -> None:
        async with answering(None) as (url, _received):
            where = form.format(url.partition("://")[2])
            async with opened(metrics, where, timeout_s=0.1) as here:
                limit = Limit(Rate("5/minute"), "user anna")
                found = [await here.counts.count([limit]) for _ in range(8)]
                assert [counted.allowed for counted in found] == [True] * 5 + [False] * 3

    run(scenario)
    assert told(lines) == ["Valkey fails: slow. Each process counts by itself"]


def test_an_answer_that_comes_after_its_caller_has_left_is_the_next_ones(metrics: Readable) -> None:
    asked: list[int] = []
    answers = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while sent := await reader.read(1 << 16):
                if b"SLOTS" in sent:
                    asked.append(1)
                    await answers.wait()
                    writer.write(slots(b"", port))
                else:
                    writer.write(COUNTED)
        finally:
            writer.close()

    port = 0

    async def scenario() -> None:
        nonlocal port
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with opened(metrics, f"valkey+cluster://127.0.0.1:{port}", timeout_s=0.3) as here:
            limit = Limit(Rate("9/minute"), "x")
            assert (await here.counts.count([limit])).windows[0].remaining == 8
            answers.set()
            assert (await here.counts.count([limit])).windows[0].remaining == 3
            assert len(asked) == 1
        server.close()
        await server.wait_closed()

    run(scenario)


SLOTS = b"*1\r\n*3\r\n:0\r\n:16383\r\n*3\r\n$%d\r\n%b\r\n:%d\r\n$1\r\nx\r\n"
COUNTED = b"*3\r\n:1\r\n:3\r\n:0\r\n"


@asynccontextmanager
async def scripted(
    answer: Callable[[bytes, int], bytes], tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A server that answers what a function says, given what was sent and its port; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(answer(data, port))
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    port: int = server.sockets[0].getsockname()[1]
    try:
        yield port
    finally:
        server.close()
        await server.wait_closed()


def slots(host: bytes, port: int) -> bytes:
    return SLOTS % (len(host), host, port)


LIES: dict[str, tuple[Callable[[bytes, int], bytes], str]] = {
    "no slots": (lambda _sent, _port: b"*0\r\n", "cluster_down"),
    "nonsense": (lambda _sent, _port: b"*1\r\n:7\r\n", "nonsense"),
    "a text": (lambda _sent, _port: b"+OK\r\n", "nonsense"),
    "a name that is not set": (lambda _sent, port: slots(b"?", port), "cluster_down"),
    "itself again and again": (
        lambda sent, port: slots(b"", port) if b"SLOTS" in sent else b"-MOVED 5 127.0.0.1:%d\r\n" % port,
        "moved",
    ),
    "asking again and again": (
        lambda sent, port: (
            slots(b"", port)
            if b"SLOTS" in sent
            else b"+OK\r\n" * (b"ASKING" in sent) + b"-ASK 5 :%d\r\n" % port
        ),
        "moved",
    ),
    "nowhere": (
        lambda sent, port: slots(b"", port) if b"SLOTS" in sent else b"-MOVED secret-of-a-server\r\n",
        "nonsense",
    ),
    "not now": (
        lambda sent, port: slots(b"", port) if b"SLOTS" in sent else b"-TRYAGAIN Multiple keys\r\n",
        "moved",
    ),
    "down": (
        lambda sent, port: slots(b"", port) if b"SLOTS" in sent else b"-CLUSTERDOWN The cluster is down\r\n",
        "cluster_down",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_whatever_a_node_says_no_caller_sees_an_error(metrics: Readable, lines: Lines, name: str) -> None:
    lines.configure(logging.getLevelName(logging.INFO))
    answer, reason = LIES[name]

    async def scenario() -> None:
        async with scripted(answer) as port, opened(metrics, f"valkey+cluster://127.0.0.1:{port}") as here:
            limit = Limit(Rate("5/minute"), "user anna")
            found = [await here.counts.count([limit]) for _ in range(8)]
            assert [counted.allowed for counted in found] == [True] * 5 + [False] * 3

    run(scenario)
    assert told(lines) == [f"Valkey fails: {reason}. Each process counts by itself"]
    assert "secret-of-a-server" not in str(lines.all)


def test_a_sentinel_that_is_cut_off_is_outvoted(sentinels: ValkeySentinels, metrics: Readable) -> None:
    async def scenario() -> None:
        with Valkey("--replicaof", "127.0.0.1", str(sentinels.master.port)) as stale:
            host = b"127.0.0.1"
            said = b"*2\r\n$9\r\n%b\r\n$%d\r\n%d\r\n" % (host, len(str(stale.port)), stale.port)
            async with scripted(lambda _sent, _port: said) as port:
                url = f"valkey+sentinel://127.0.0.1:{port},{sentinels.addresses}/{SERVICE}"
                assert await outcome(metrics, url) == "up"

    run(scenario)


def test_certificates_must_be_for_the_hosts_that_the_cluster_names(
    metrics: Readable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = PrivateAuthority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))

    async def counts(scheme: str, named: bytes) -> bool:
        def answer(sent: bytes, port: int) -> bytes:
            return slots(named, port) if b"SLOTS" in sent else COUNTED

        async with (
            scripted(answer, authority.server()) as port,
            opened(metrics, f"{scheme}://localhost:{port}") as here,
        ):
            return (await here.counts.count([Limit(Rate("9/minute"), "x")])).windows[0].remaining == 3

    async def scenario() -> None:
        assert await counts("valkeys+cluster", b"localhost")
        assert await counts("rediss+cluster", b"")
        assert not await counts("valkeys+cluster", b"127.0.0.1")
        assert not await counts("valkey+cluster", b"localhost")

    run(scenario)


# ---- Servers that fail ----


async def goes_on(one: Instance, other: Instance, name: str) -> None:
    """Count until both processes count together again; no call fails."""
    async with asyncio.timeout(FAILOVER_LIMIT_S):
        while not await shared(one, other, name):  # noqa: ASYNC110 - servers of another process
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("kind", [lambda: ValkeyCluster(3, 1), ValkeySentinels], ids=["cluster", "sentinels"])
def test_a_master_that_is_killed_costs_a_moment_of_fallback(
    metrics: Readable, lines: Lines, kind: Callable[[], ValkeyCluster | ValkeySentinels]
) -> None:
    lines.configure(logging.getLevelName(logging.INFO))

    async def scenario(servers: ValkeyCluster | ValkeySentinels) -> None:
        async with AsyncExitStack() as stack:
            one, other = [
                await stack.enter_async_context(opened(metrics, servers.url, timeout_s=2.0)) for _ in range(2)
            ]
            told, heard = [await stack.enter_async_context(open_log(servers.url, NEWS)) for _ in range(2)]
            assert await shared(one, other, "user anna")
            await told.append([{"topic": "before"}])
            ((before, _),) = await heard.read("0-0", 0.0)
            for port, master in {
                each.port: each for each in map(servers.master_of, (PREFIX, NEWS.key))
            }.items():
                master.kill()
                await goes_on(one, other, f"after {port}")
            async with asyncio.timeout(FAILOVER_LIMIT_S):
                while not await tells(told):  # noqa: ASYNC110 - as above
                    await asyncio.sleep(0.1)
                found: list[Any] = []
                while not found:
                    found = await reads(heard, before)
            assert found[-1][1] == {"topic": "after"}
            assert (one.breaker.state, other.breaker.state) == ("closed", "closed")
            assert metrics.value("llmops.shared.fallback") == 0
            for member in servers.members:
                member.kill()
            limit = Limit(Rate("1000/minute"), "in the end")
            found = [await one.counts.count([limit]) for _ in range(BREAKER_FAILURES + 1)]
            assert all(counted.allowed for counted in found)

    async def tells(log: ValkeyLog) -> bool:
        with suppress(Exception):
            async with asyncio.timeout(2):
                await log.append([{"topic": "after"}])
                return True
        return False

    async def reads(log: ValkeyLog, after: str) -> list[Any]:
        with suppress(Exception):
            async with asyncio.timeout(2):
                return list(await log.read(after, 0.1))
        return []

    with kind() as servers:
        run(lambda: scenario(servers))
    assert "Valkey works again. The processes count together" in told(lines)
    assert told(lines)[-1] == "Valkey fails: unreachable. Each process counts by itself"


@pytest.mark.parametrize("kind", [lambda: ValkeyCluster(3, 1), ValkeySentinels], ids=["cluster", "sentinels"])
def test_a_planned_failover_is_followed(
    metrics: Readable, kind: Callable[[], ValkeyCluster | ValkeySentinels]
) -> None:
    """The old master goes on, as a replica: it must not be asked any more."""

    async def scenario(servers: ValkeyCluster | ValkeySentinels) -> None:
        master = servers.master_of(PREFIX)
        async with (
            opened(metrics, servers.url, timeout_s=2.0) as one,
            opened(metrics, servers.url, timeout_s=2.0) as other,
        ):
            assert await shared(one, other, "user anna")
            servers.fail_over(PREFIX)
            until(lambda: b"role:slave" in master.ask("INFO", "replication"), "the master is a replica")
            await goes_on(one, other, "user anna")

    with kind() as servers:
        run(lambda: scenario(servers))
