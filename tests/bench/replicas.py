"""Whether three replicas behind a balancer act as one: `python -m tests.bench.replicas`.

Each proof prints one line with numbers; the exit status is 1 where one does not hold. Everything is on the
loopback address: real processes of the service, a real Valkey and a real PostgreSQL, HAProxy where it is
installed (else a balancer of our own, `--balancer builtin`), and a real MLflow for the proof that counts
records (MLFLOW_BIN, as `make replicas` sets it). LiteLLM and Qdrant are the tests' fakes: failures
must happen on demand. `--only NAME` runs some proofs, `--write` keeps the lines in REPLICAS.md.

Each function in ``PROOFS`` or ``RECORDED`` is a proof: a further one is one more function there.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Protocol

from tests.bench.balancer import BUILT_IN, HAPROXY, has_haproxy
from tests.bench.fleet import BROKEN_MODELS, CALL_TOKENS, Fleet, Order, fleet
from tests.bench.http_load import COUNTER, Load, Measured, Plan
from tests.bench.money import Trace, read_ledger
from tests.bench.report import write_section
from tests.bench.rolling import CHAT, Callers
from tests.e2e.recording import until
from tests.e2e.servers import MlflowServer
from tests.harness import ServiceProcess
from tests.postgresql import PostgreSql

REPLICAS: Final = 3
CONNECTIONS: Final = 24
EXPERIMENT: Final = "replicas"
DELIVERY_LIMIT_S: Final = 300.0
"""For what the spools have: a real MLflow takes some ten records a second on a busy machine."""

LOGIN_NAME_LIMIT: Final = 10
LOGIN_ADDRESS_LIMIT: Final = 50
BREAKER_FAILURES: Final = 5

MAX_ASKED: Final = 50
CIRCUIT_CHANGED: Final = '"llmops.circuit_breaker.state_changed"'
FALLBACK_STARTED: Final = '"llmops.shared.fallback.started"'
FALLBACK_ENDED: Final = '"llmops.shared.fallback.ended"'


@dataclass(frozen=True)
class Size:
    """How much is asked.

    Args:
        allowed: Calls of one user that are allowed.
        attempts: Calls that the user makes.
        pace_s: The time between two calls of a connection.
        rounds: Pairs of rounds that compare a killed Valkey with a living one.
        round_s: How long each of them is.
        p99_ratio: What the 99th percentile may grow to, as the median of the rounds; infinite where only
            failures count.
        equal: Equal calls at the same time.
        bursts: How many times.
        clearings: How often the cache is cleared.
        clear_limit_s: When the others must have forgotten what was cleared.
        circuits: How many circuits are opened.
        callers: How many call during the rolling restart.
    """

    allowed: int = 1_000
    attempts: int = 6_000
    pace_s: float = 0.12
    rounds: int = 3
    round_s: float = 10.0
    p99_ratio: float = 1.2
    equal: int = 300
    bursts: int = 3
    clearings: int = 100
    clear_limit_s: float = 1.0
    circuits: int = 20
    callers: int = 8


@dataclass(frozen=True)
class Shown:
    """What a proof has shown.

    Args:
        name: Of the proof.
        holds: Whether what was to be proven holds.
        line: What was seen, with numbers.
    """

    name: str
    holds: bool
    line: str

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'FAILS'}  {self.name}: {self.line}"


def variables() -> dict[str, str]:
    """The settings of all replicas that the proofs rely on."""
    return {
        "LOGIN_FAILURES_PER_NAME": f"{LOGIN_NAME_LIMIT}/hour",
        "LOGIN_FAILURES_PER_ADDRESS": f"{LOGIN_ADDRESS_LIMIT}/hour",
        "BREAKER_FAILURE_THRESHOLD": f"{BREAKER_FAILURES}",
        # Longer than the 50 ms by default: on a busy machine a replica stands still for longer, and a count
        # that comes too late is made in its memory too.
        "VALKEY_TIMEOUT_S": "2",
    }


# ---- Limits ----------------------------------------------------------------------------------------------


def one_rate(running: Fleet, size: Size) -> Iterator[Shown]:
    """Of a user's allowed calls exactly so many pass, whichever replica gets them."""
    key = running.key("anna", f"{size.allowed}/hour")
    before = running.served(CHAT)
    with Load() as load:
        measured = load.measure(_plan(running.port, key, size.pace_s, 600.0, size.attempts))
    served = [after - then for after, then in zip(running.served(CHAT), before, strict=True)]
    refused = measured.failures.get("429", 0)
    others = measured.failures.keys() - {"429"}
    holds = (
        abs(measured.calls - size.allowed) <= REPLICAS
        and measured.calls + refused == size.attempts
        and not others
        and min(served) > size.attempts / REPLICAS / 2
    )
    yield Shown(
        "one rate",
        holds,
        f"{size.attempts} calls of one user in {measured.seconds:.0f} s, {size.allowed} an hour allowed: "
        f"{measured.calls} passed, {refused} got 429, others {_failures(measured, '429')}; "
        f"by replica {_by_replica(served)}",
    )


def one_count_of_sign_ins(running: Fleet, size: Size) -> Iterator[Shown]:
    """Failed sign-ins are limited over all replicas: by name, and by address."""
    del size

    def attempt(name: str, address: str) -> int:
        body = {"username": name, "password": "wrong"}
        headers = {"X-Forwarded-For": address}
        return running.call("POST", "/auth/login", body=body, headers=headers).status

    # One after the other: those in flight may exceed the limit by one for each thread that hashes.
    by_name = Counter(attempt("user", "192.0.2.8") for _ in range(3 * LOGIN_NAME_LIMIT))
    with ThreadPoolExecutor(6) as pool:
        made = [pool.submit(attempt, f"nobody{at}", "192.0.2.7") for at in range(2 * LOGIN_ADDRESS_LIMIT)]
        by_address = Counter(one.result() for one in made)
    holds = by_name == {401: LOGIN_NAME_LIMIT, 429: 2 * LOGIN_NAME_LIMIT} and by_address == {
        401: LOGIN_ADDRESS_LIMIT,
        429: LOGIN_ADDRESS_LIMIT,
    }
    yield Shown(
        "one count of failed sign-ins",
        holds,
        f"of {by_name.total()} to one name {by_name[401]} were tried and {by_name[429]} got 429 "
        f"({LOGIN_NAME_LIMIT} an hour allowed); of {by_address.total()} from one address {by_address[401]} "
        f"and {by_address[429]} ({LOGIN_ADDRESS_LIMIT})",
    )


def valkey_killed(running: Fleet, size: Size) -> Iterator[Shown]:
    """Valkey is killed in the middle of the load: no call fails, and none waits."""
    key = running.key("bert")
    with Load() as load:

        def one_round(*, kill: bool) -> Measured:
            timer = threading.Timer(size.round_s / 2, running.valkey.kill)
            if kill:
                timer.start()
            try:
                return load.measure(_plan(running.port, key, size.pace_s, size.round_s))
            finally:
                if kill:
                    timer.join()
                    running.valkey.start()
                    _wait_for_valkey(running, key)

        one_round(kill=False)  # not counted: memory and connections are new
        pairs = []
        for number in range(size.rounds):
            # In turns, so that what else happens on the machine hits both alike.
            order = (False, True) if number % 2 else (True, False)
            found = {kill: one_round(kill=kill) for kill in order}
            pairs.append((found[False], found[True]))
    fallen = [replica.text().count(FALLBACK_STARTED) for replica in running.replicas]
    ratios = [killed.p99_s / lived.p99_s for lived, killed in pairs]
    failed = [_failures(killed) for _, killed in pairs]
    ratio = statistics.median(ratios)
    yield Shown(
        "Valkey killed under load",
        not any(lived.failures or killed.failures for lived, killed in pairs)
        and min(fallen) >= size.rounds
        and ratio <= size.p99_ratio,
        f"{size.rounds} rounds of {size.round_s:.0f} s: {sum(killed.calls for _, killed in pairs)} calls, "
        f"failed {sum(sum(one.values()) for one in failed)}; p99 {_ms(pairs, 1)} ms, without the kill "
        f"{_ms(pairs, 0)} ms, ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"fall-backs by replica {_by_replica(fallen)}",
    )


def _ms(pairs: Sequence[tuple[Measured, Measured]], at: int) -> str:
    values = [pair[at].p99_s * 1e3 for pair in pairs]
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def _wait_for_valkey(running: Fleet, key: str) -> None:
    """Wait until all replicas count together again; only a call makes them try."""

    def is_back(replica: ServiceProcess) -> bool:
        assert replica.call("GET", "/auth/me", token=key).status == 200
        text = replica.text()
        return text.count(FALLBACK_STARTED) == text.count(FALLBACK_ENDED)

    for replica in running.replicas:
        until(lambda replica=replica: is_back(replica), "Valkey to count")  # type: ignore[misc]


def one_budget(running: Fleet, size: Size) -> Iterator[Shown]:
    """A key's budget is one for all replicas, but for the calls in flight."""
    allowed, attempts = max(1, size.allowed // 5), size.allowed // 5 * 2
    admin = running.token("admin")
    budget = {"amount": allowed * CALL_TOKENS, "unit": "tokens", "period": "month"}
    fields = {"name": "client", "owner": "emma", "budget": budget}
    made = running.call("POST", "/keys", body=fields, token=admin)
    assert made.status == 201, made.body

    def ask(_number: int) -> int:
        body = {"model": "demo", "messages": [{"role": "user", "content": Order().prompt}]}
        return running.call("POST", CHAT, body=body, token=made.json["key"]).status

    with ThreadPoolExecutor(REPLICAS) as pool:
        found = Counter(pool.map(ask, range(attempts)))
    yield Shown(
        "one budget",
        allowed <= found[200] <= allowed + REPLICAS and found[200] + found[429] == attempts,
        f"of {attempts} calls with a budget of {allowed}, {REPLICAS} at a time, {found[200]} passed and "
        f"{found[429]} got 429",
    )


# ---- News ------------------------------------------------------------------------------------------------


def one_cache(running: Fleet, size: Size) -> Iterator[Shown]:
    """What is cleared through one replica is forgotten by the others."""
    user, admin = running.token(), running.token("admin")
    taken: list[float] = []

    def hits(number: int, question: str) -> bool:
        answer = running.replicas[number].call("POST", "/llm/generate", body={"prompt": question}, token=user)
        assert answer.status == 200, answer.body
        return answer.headers["x-cache"] == "HIT"

    for clearing in range(size.clearings):
        # A question of each replica alone: the others do not store its answer again.
        questions = [f"question {clearing} of {number}" for number in range(REPLICAS)]
        for number, question in enumerate(questions):
            until(lambda at=number, what=question: hits(at, what), "the answer to be stored")  # type: ignore[misc]
        through = clearing % REPLICAS
        cleared = running.replicas[through].call("DELETE", "/llm/cache", token=admin)
        assert cleared.status == 200, cleared.body
        began = time.monotonic()
        for other in {0, 1, 2} - {through}:
            asked = time.monotonic()
            while hits(other, questions[other]):
                asked = time.monotonic()
            taken.append(asked - began)
    known = sum(one <= size.clear_limit_s for one in taken)
    yield Shown(
        "one cache",
        known == len(taken),
        f"{size.clearings} clearings through one, seen by both others within {size.clear_limit_s:g} s: "
        f"{known} of {len(taken)}; the last one asked after {max(taken) * 1e3:.0f} ms",
    )


def one_call(running: Fleet, size: Size) -> Iterator[Shown]:
    """Equal calls at the same time, over all replicas, are one call to the upstream."""
    token = running.token()

    def ask(question: str) -> tuple[int, str]:
        answer = running.call("POST", "/llm/generate", body={"prompt": question}, token=token)
        return answer.status, str(answer.json.get("response", answer.json))

    upstream_calls = []
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for number in range(size.bursts):
            question = Order(delay_s=2.0, question=f"{number}").prompt
            upstream_calls.append(set(pool.map(ask, [question] * size.equal)))
    statuses = {status for answers in upstream_calls for status, _ in answers}
    yield Shown(
        "one call",
        statuses == {200} and all(len(answers) == 1 for answers in upstream_calls),
        f"{size.bursts} times {size.equal} equal calls, {CONNECTIONS} at a time: calls to the upstream "
        f"{_by_replica([len(answers) for answers in upstream_calls])}; statuses {sorted(statuses)}",
    )


def one_circuit(running: Fleet, size: Size) -> Iterator[Shown]:
    """A circuit that opens in one replica: the others send at most one call each before they know."""
    fails = Order(delay_s=0.1, fails=True)
    key = running.key("carl")
    sent: Counter[int] = Counter()
    waited: list[float] = []
    unexpected: Counter[int] = Counter()

    def ask(number: int, model: str) -> int:
        body = {"model": model, "messages": [{"role": "user", "content": fails.prompt}]}
        status = running.replicas[number].call("POST", CHAT, body=body, token=key).status
        unexpected[status] += status not in {502, 503}
        return status

    def until_turned_away(number: int, model: str) -> list[float]:
        """When a replica was asked, again and again; the last one was turned away."""
        asked = [time.time()]
        while ask(number, model) != 503 and len(asked) < MAX_ASKED:
            asked.append(time.time())
        return asked

    with ThreadPoolExecutor(BREAKER_FAILURES + REPLICAS) as pool:
        for circuit in range(size.circuits):
            first = circuit % REPLICAS
            # Two callers who are turned away from a model would open it for everybody.
            model = BROKEN_MODELS[circuit]
            opening = [pool.submit(ask, first, model) for _ in range(BREAKER_FAILURES)]
            # The others are asked while it opens, and not only when that is seen here: they may know by then.
            wait(opening, return_when=FIRST_COMPLETED)
            asking = [pool.submit(until_turned_away, at, model) for at in {0, 1, 2} - {first}]
            found = [one.result() for one in asking]
            wait(opening)
            opened_s = _last_opened(running.replicas[first])
            unexpected[0] += ask(first, model) != 503
            for asked in found:
                sent[sum(moment > opened_s for moment in asked[:-1])] += 1
                waited.append(max(0.0, asked[-1] - opened_s))
    yield Shown(
        "one circuit",
        max(sent) <= 1 and not +unexpected,
        f"{size.circuits} circuits opened in one: calls that each other one was sent after that, before it "
        f"knew: {', '.join(f'{calls} ({times} times)' for calls, times in sorted(sent.items()))}; the first "
        f"one that was turned away came {statistics.median(waited) * 1e3:.0f} ms after the opening (at most "
        f"{max(waited) * 1e3:.0f}); a failing call takes {fails.delay_s * 1e3:.0f} ms",
    )


def _last_opened(replica: ServiceProcess) -> float:
    """When a circuit has last opened in a replica, as its log line says."""
    lines = [line for line in replica.text().splitlines() if CIRCUIT_CHANGED in line and '"open"' in line]
    return datetime.fromisoformat(json.loads(lines[-1])["timestamp"]).timestamp()


# ---- The rolling restart ---------------------------------------------------------------------------------


class Records(Protocol):
    """A server of records that can be ended and started."""

    def end(self) -> None:
        """End it as if it crashed."""
        ...

    def begin(self) -> None:
        """Start it again; it may take a while."""
        ...

    def ids(self) -> list[str]:
        """The request ids of all records."""
        ...


class RealRecords:
    """A real MLflow server."""

    def __init__(self, server: MlflowServer) -> None:
        self._server = server

    def end(self) -> None:
        """End it as if it crashed."""
        self._server.kill()

    def begin(self) -> None:
        """Start it again."""
        self._server.start()

    def ids(self) -> list[str]:
        """The request ids of all records."""
        self._server.wait_ready()
        return [Trace.of(info).trace_id for info in self._server.traces(EXPERIMENT)]


def rolling_restart(running: Fleet, size: Size, records: Records) -> Iterator[Shown]:
    """All replicas are restarted one after the other, and MLflow dies in between: nothing is lost."""
    key = running.key("dora")
    callers = Callers(running.port, key, size.callers)
    statuses = []
    with callers.running() as made:
        until(lambda: made.calls >= size.callers, "the load")
        began, before = time.monotonic(), made.calls
        statuses.append(running.restart(0))
        records.end()
        dead_since, dead_before = time.monotonic(), made.calls
        statuses.append(running.restart(1))
        records.begin()
        # A real one takes some seconds to serve, so that the next process stops without it, too.
        dead_s, dead_calls = time.monotonic() - dead_since, made.calls - dead_before
        statuses.extend(running.restart(number) for number in range(2, len(running.replicas)))
        took_s, during = time.monotonic() - began, made.calls - before
        until(lambda: made.calls >= before + during + 2 * size.callers, "calls after the restart")
    until(lambda: not _spooled(running), "the spools to be delivered", DELIVERY_LIMIT_S)
    found = Counter(records.ids())
    answered = {*made.whole, *made.streamed}
    missing, twice = answered - found.keys(), sum(times > 1 for times in found.values())
    usage, _spent = read_ledger(running.variables["DATABASE_URL"])
    booked = sum(row.calls for row in usage if row.user_name == "dora")
    lost = Counter(made.lost.values())
    yield Shown(
        "a rolling restart",
        not made.lost
        and not missing
        and not twice
        and booked == len(answered)
        and statuses == [0] * len(running.replicas)
        and 0 < during < made.calls,
        f"{len(made.whole)} calls and {len(made.streamed)} streams, {during} of them during the restart of "
        f"{took_s:.0f} s, {made.opened} connections: {len(made.lost)} lost"
        f"{''.join(f'; {times} times {what}' for what, times in lost.most_common(3))}; exit statuses "
        f"{statuses}; MLflow dead for {dead_s:.0f} s and {dead_calls} calls: {len(missing)} records lost, "
        f"{twice} twice, {booked} calls in the ledger",
    )


def _spooled(running: Fleet) -> bool:
    return any(list(running.spool(at).glob("*.jsonl")) for at in range(len(running.replicas)))


# ---- All of it -------------------------------------------------------------------------------------------

Proof = Callable[[Fleet, Size], Iterator[Shown]]

PROOFS: Final[Mapping[str, Proof]] = {
    "rate": one_rate,
    "sign-ins": one_count_of_sign_ins,
    "budget": one_budget,
    "call": one_call,
    "cache": one_cache,
    "circuit": one_circuit,
    "killed": valkey_killed,
}
"""Those for which records do not matter: their replicas have no MLflow."""

RECORDED: Final[Mapping[str, Callable[[Fleet, Size, Records], Iterator[Shown]]]] = {
    "rolling": rolling_restart,
}
"""Those that count records."""


def _plan(port: int, key: str, every_s: float, seconds: float, calls: int = 0) -> Plan:
    # Without a question that is asked again: the cache is not what is proven.
    body = {"model": "demo", "messages": [{"role": "user", "content": f"What is a trace? {COUNTER}"}]}
    headers = [{"Authorization": f"Bearer {key}"}]
    # A call that is refused before its body is read ends its connection.
    return Plan(
        *(port, "POST", CHAT, headers, json.dumps(body), CONNECTIONS, seconds, calls),
        every_s=every_s,
        reconnects=True,
    )


def _failures(measured: Measured, *expected: str) -> dict[str, int]:
    return {what: times for what, times in measured.failures.items() if what not in expected}


def _by_replica(counts: Sequence[int]) -> str:
    return " + ".join(map(str, counts))


@contextmanager
def _real_mlflow(folder: Path) -> Iterator[tuple[str, Records]]:
    place = folder / "mlflow"
    place.mkdir()
    with MlflowServer(place) as server:
        yield server.url, RealRecords(server)


def prove(  # noqa: PLR0913, PLR0917 - what takes part in it
    kind: str,
    size: Size,
    names: Sequence[str],
    folder: Path,
    database: str,
    mlflow: Callable[[Path], Any] = _real_mlflow,
) -> Iterator[Shown]:
    """Run proofs.

    Args:
        kind: Which balancer.
        size: How much is asked.
        names: Of the proofs.
        folder: For files.
        database: The URL of the replicas' database.
        mlflow: Runs a server of records; its URL and how to handle it.
    """
    plain = [PROOFS[name] for name in names if name in PROOFS]
    recorded = [RECORDED[name] for name in names if name in RECORDED]
    if plain:
        with fleet(kind, REPLICAS, folder, database, variables()) as running:
            for proof in plain:
                yield from proof(running, size)
    if recorded:
        with mlflow(folder) as (url, records):
            more = {
                **variables(),
                "MLFLOW_TRACKING_URI": url,
                "MLFLOW_EXPERIMENT_NAME": EXPERIMENT,
                "MLFLOW_TIMEOUT_S": "20",
            }
            with fleet(kind, REPLICAS, folder, database, more) as running:
                for recording in recorded:
                    yield from recording(running, size, records)


def main() -> int:
    """Prove, print, and write where that is asked for; 1 where something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.replicas", description=__doc__)
    parser.add_argument("--balancer", choices=(HAPROXY, BUILT_IN), default="")
    parser.add_argument("--only", action="append", choices=(*PROOFS, *RECORDED), default=[])
    parser.add_argument("--write", action="store_true", help="write the lines to REPLICAS.md")
    asked = parser.parse_args()
    kind = asked.balancer or (HAPROXY if has_haproxy() else BUILT_IN)
    names = asked.only or [*PROOFS, *RECORDED]
    began = time.monotonic()
    shown = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        database = stack.enter_context(PostgreSql()).url
        for one in prove(kind, Size(), names, Path(name), database):
            shown.append(one)
            sys.stdout.write(f"[{time.monotonic() - began:5.1f} s] {one}\n")
            sys.stdout.flush()
    good = all(one.holds for one in shown)
    verdict = (
        f"{sum(one.holds for one in shown)} of {len(shown)} hold: {REPLICAS} replicas behind "
        f"{'HAProxy' if kind == HAPROXY else 'our own balancer'}, {time.monotonic() - began:.0f} s."
    )
    sys.stdout.write(f"{verdict}\n")
    if asked.write:
        write_section("Proofs", [*(f"- {one}." for one in shown), "", verdict])
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
