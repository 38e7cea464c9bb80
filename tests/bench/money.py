"""Whether the money adds up: `python -m tests.bench.money`, with MLFLOW_BIN set as `make money` does.

20 keys of 10 users in 4 teams make 2,000 calls: whole and streamed, from the cache, failed, retried, and left
by their callers. Budgets of keys and teams run out on the way, and the process is killed with SIGKILL five
times in the middle of it, and started again on the same database, spool and cache. In the end, these must be
equal to the token and to the billionth of a dollar, for each key, user and team:

- what callers saw, and what was recorded of calls whose callers saw no whole answer,
- the records in MLflow,
- the ledger: its usage, what it has for budgets, and what ``GET /usage`` says.

Each answer that a caller saw has one record, a refused call has none, and no budget is exceeded by more than
the calls in flight. The exit status is 1 where anything differs.

The service is the real process and MLflow the real server; the database is SQLite, or a real PostgreSQL
with ``--postgresql``. The upstream is the tests' fake, with LiteLLM's prices in its header and in a stream's
usage: failures, retries and calls that are left must happen on demand. ``--write`` keeps the result in
MONEY.md.
"""

import argparse
import json
import secrets
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import sqlalchemy as sa

from service.identity.budgets import NANO, nano
from service.identity.database import make_engine
from service.identity.ledger import SPENT, USAGE
from tests.bench.money_calls import KINDS, Callers, Key, PricedUpstream, Seen, Service, plan
from tests.e2e.recording import until
from tests.e2e.servers import MlflowServer
from tests.fakes.upstream import FakeUpstream
from tests.harness import make_settings
from tests.postgresql import PostgreSql

KEYS: Final = 20
TEAMS: Final = 4
CALLERS: Final = 2
"""Calls that a key has in flight at most."""

KEY_BUDGETS: Final = {
    0: ("usd", 0.7),
    1: ("tokens", 0.6),
    4: ("usd", 0.5),
    5: ("tokens", 2.0),
    9: ("usd", 2.0),
    12: ("tokens", 0.5),
    13: ("usd", 0.6),
}
TEAM_BUDGETS: Final = {2: ("usd", 0.7), 3: ("tokens", 0.8)}
"""The budgets, as shares of what the calls would cost: those below 1 run out."""

EXPERIMENT: Final = "money"
BOOKED_CALLS: Final = 10
LIMIT_S: Final = 170.0
RESULTS: Final = Path(__file__).with_name("MONEY.md")
ABOUT: Final = """Of the calls,

- "cached", "failed" and "retried" are among those that were "answered", to the end;
- "refused" were answered with 429 `BudgetExceededError`, and must have no record;
- "left" and "cut" had no whole answer, because the caller left or the process was killed. They may be
  recorded, and are then in MLflow and in the ledger; "of these recorded" counts them. In the second table,
  "callers" is what callers saw, and what these cost."""
ENDS: Final = ("answered", "refused", "left", "cut")


@dataclass
class Sums:
    """Sums over calls."""

    calls: int = 0
    prompt: int = 0
    completion: int = 0
    cost_nano: int = 0

    def add(self, calls: int, prompt: int, completion: int, cost_nano: int) -> None:
        """Add some calls."""
        self.calls += calls
        self.prompt += prompt
        self.completion += completion
        self.cost_nano += cost_nano

    def __str__(self) -> str:
        return f"{self.calls} calls, {self.prompt}+{self.completion} tokens, {usd(self.cost_nano)} USD"


def usd(amount_nano: int) -> str:
    """An amount in US dollars, to the last digit that is counted."""
    return f"{amount_nano // NANO}.{amount_nano % NANO:09d}"


@dataclass(frozen=True)
class Trace:
    """What MLflow has of a call."""

    trace_id: str
    key: str
    team: str
    user: str
    outcome: str
    tokens: tuple[int, int]
    cost_nano: int

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> "Trace":
        """Read what the API says of a trace."""
        tags, about = info["tags"], info["trace_metadata"]
        usage = json.loads(about.get("mlflow.trace.tokenUsage", "{}"))
        cost = json.loads(about.get("mlflow.trace.cost", "{}"))
        return cls(
            tags["request_id"],
            tags.get("key_id", ""),
            tags.get("team", ""),
            about.get("mlflow.trace.user", ""),
            tags["outcome"],
            (int(usage.get("input_tokens", 0)), int(usage.get("output_tokens", 0))),
            nano(cost.get("total_cost")),
        )


@dataclass
class Result:
    """What has come of a run: everything that is compared."""

    keys: list[Key]
    team_budgets: Mapping[str, Mapping[str, Any]]
    kills: int
    traces: list[Trace]
    usage: list[Any]
    spent: list[Any]
    route: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def seen(self) -> Iterator[tuple[Key, Seen]]:
        """Every call that was made, with its key."""
        return ((key, seen) for key in self.keys for seen in key.seen)


def make_keys(random: Random, calls: int) -> tuple[list[Key], dict[str, dict[str, Any]]]:
    """The keys with their calls and budgets, and the budgets of the teams."""
    keys = []
    for number in range(KEYS):
        user = f"app-{number // 2}"
        keys.append(Key(f"key-{number}", user, f"team-{number % TEAMS}", plan(random, user, calls // KEYS)))
    for number, (unit, share) in KEY_BUDGETS.items():
        keys[number].budget = _budget(unit, share, [keys[number]])
    teams = {
        f"team-{number}": _budget(unit, share, [key for key in keys if key.team == f"team-{number}"])
        for number, (unit, share) in TEAM_BUDGETS.items()
    }
    return keys, teams


def _budget(unit: str, share: float, keys: list[Key]) -> dict[str, Any]:
    paid = [call for key in keys for call in key.calls if call.answered]
    if unit == "usd":
        return {"amount": sum(call.cost_nano for call in paid) * share / NANO, "unit": unit, "period": "day"}
    tokens = sum(call.prompt_tokens + call.completion_tokens for call in paid)
    return {"amount": int(tokens * share), "unit": unit, "period": "month"}


def environment(folder: Path, upstream: FakeUpstream, mlflow: MlflowServer, database: str) -> dict[str, str]:
    """The variables of every process."""
    return {
        "LITELLM_URL": upstream.url,
        "MLFLOW_TRACKING_URI": mlflow.url,
        "MLFLOW_EXPERIMENT_NAME": EXPERIMENT,
        "MLFLOW_TIMEOUT_S": "20",
        "DATABASE_URL": database,
        "SPOOL_PATH": str(folder / "spool"),
        "QDRANT_PATH": str(folder / "qdrant"),
        "CACHE_ENABLED": "true",
        "HEALTH_REQUIRED": "qdrant,litellm",
        "RATE_LIMIT": "1000000/minute",
        "RETRY_MAX": "2",
        "RETRY_BASE_DELAY_S": "0.02",
        "RETRY_BUDGET_FLOOR": "10000",
        # Calls that fail by order must not keep others from the upstream.
        "BREAKER_FAILURE_THRESHOLD": "1000",
        "JWT_SECRET_KEY": secrets.token_hex(32),
        "AUTH_ADMIN_PASSWORD": f"admin-{secrets.token_hex(8)}",
        "AUTH_USER_PASSWORD": f"user-{secrets.token_hex(8)}",
    }


def set_up(service: Service, keys: list[Key], teams: Mapping[str, Mapping[str, Any]]) -> str:
    """Make teams and keys at the service's own routes; the administrator's token, which outlives a start."""
    process = service.process
    token = process.token("admin")
    for name, budget in teams.items():
        answer = process.call("PUT", f"/teams/{name}", body={"budget": budget}, token=token)
        assert answer.status == 200, answer.body
    for key in keys:
        fields: dict[str, Any] = {"name": key.name, "owner": key.owner, "team": key.team}
        if key.budget is not None:
            fields["budget"] = key.budget
        answer = process.call("POST", "/keys", body=fields, token=token)
        assert answer.status == 201, answer.body
        key.id, key.secret = answer.json["id"], answer.json["key"]
    return token


def run(  # noqa: PLR0913 - what a run consists of
    folder: Path,
    mlflow: MlflowServer,
    database: str,
    *,
    calls: int,
    kills: int,
    seed: int,
    say: Callable[[str], None] = lambda _line: None,
) -> Result:
    """Make the calls, kill the service in between, and compare."""
    began = time.monotonic()
    keys, teams = make_keys(Random(seed), calls)  # noqa: S311 - no secret
    priced = PricedUpstream()
    with ExitStack() as stack:
        upstream = stack.enter_context(FakeUpstream())
        upstream.default = priced
        service = Service(environment(folder, upstream, mlflow, database))
        stack.callback(service.end)
        service.start()
        token = set_up(service, keys, teams)
        callers = Callers(service, priced, keys, CALLERS)
        with callers.running():
            for number in range(1, kills + 1):
                kill_on_the_way(
                    service, callers, mlflow, token=token, after=calls * number // (kills + 1), number=number
                )
                made = sum(len(key.seen) for key in keys)
                say(f"[{time.monotonic() - began:5.1f} s] killed, after {made} calls")
                service.start()
            callers.wait_for(calls, LIMIT_S)
        say(f"[{time.monotonic() - began:5.1f} s] {calls} calls made")
        problems = [service.stop()]
        # What a stop could not deliver, the next process does; and what is counted outlives a start.
        service.start()
        until(lambda: not list((folder / "spool").glob("*.jsonl")), "MLflow to have all records", LIMIT_S)
        process = service.process
        route = process.call("GET", "/usage?by=key,team,user", token=process.token("admin")).json
        problems.append(service.stop())
        traces = [Trace.of(info) for info in mlflow.traces(EXPERIMENT)]
    usage, spent = read_ledger(database)
    result = Result(keys, teams, kills, traces, usage, spent, route, [line for line in problems if line])
    result.problems += compare(result)
    result.seconds = time.monotonic() - began
    return result


def kill_on_the_way(  # noqa: PLR0913 - what takes part in it
    service: Service, callers: Callers, mlflow: MlflowServer, *, token: str, after: int, number: int
) -> None:
    """Kill the service after so many calls.

    At every other kill, the spool has calls that the ledger has too, and others that it has not: MLflow takes
    none from the start of the process on, and `GET /usage` lets the ledger have the first of them.
    """
    if number % 2:
        mlflow.freeze()
        callers.wait_for_more(BOOKED_CALLS, LIMIT_S)
        answer = service.process.call("GET", "/usage", token=token)
        assert answer.status == 200, answer.body
    callers.wait_for(after, LIMIT_S)
    service.kill()
    mlflow.thaw()


def read_ledger(database: str) -> tuple[list[Any], list[Any]]:
    """The rows of usage and of what was spent, as they are in the database."""
    engine = make_engine(make_settings(database_url=database))
    try:
        with engine.connect() as connection:
            return list(connection.execute(sa.select(USAGE))), list(connection.execute(sa.select(SPENT)))
    finally:
        engine.dispose()


# ---- What is compared ------------------------------------------------------------------------------------


def compare(result: Result) -> list[str]:
    """Everything that differs."""
    return [
        *answers(result),
        *records(result),
        *sums(result),
        *budgets(result),
        *variety(result),
    ]


def answers(result: Result) -> Iterator[str]:
    """Answers that nobody expected."""
    for key, seen in result.seen:
        failed = seen.call.kind == "failed"
        wanted = {400, 502, 503} if failed else {200}
        if seen.end == "answered" and seen.status not in wanted:
            yield f"{key.name}: a {seen.call.kind} call was answered with {seen.status} {seen.error}"
        if seen.end == "answered" and seen.call.answered and not seen.cached:
            asked = (seen.call.prompt_tokens, seen.call.completion_tokens), seen.call.cost_nano
            if (seen.tokens, seen.cost_nano) != asked:
                yield f"{key.name}: the caller saw {seen.tokens}, {seen.cost_nano}; the upstream said {asked}"
    if len({seen.trace_id for _, seen in result.seen}) != sum(len(key.seen) for key in result.keys):
        yield "two calls have one trace id"


def records(result: Result) -> Iterator[str]:
    """Calls that are recorded too often, not at all, or otherwise than their callers saw them."""
    found: dict[str, list[Trace]] = defaultdict(list)
    for trace in result.traces:
        found[trace.trace_id].append(trace)
    for key, seen in result.seen:
        of = found.pop(seen.trace_id, [])
        what = f"{key.name}: a {seen.call.kind} call that was {seen.end}"
        if len(of) > 1 or (seen.end == "answered" and not of):
            yield f"{what} has {len(of)} records in MLflow"
        if seen.end == "refused" and of:
            yield f"{what} is in MLflow"
        for trace in of:
            if (trace.key, trace.team, trace.user) != (key.id, key.team, key.owner):
                yield f"{what} is recorded for {trace.user}, {trace.team}, {trace.key}"
            if seen.end == "answered" and (trace.tokens, trace.cost_nano) != (seen.tokens, seen.cost_nano):
                yield (
                    f"{what} cost {seen.tokens}, {usd(seen.cost_nano)}; "
                    f"recorded are {trace.tokens}, {usd(trace.cost_nano)}"
                )
    if found:
        yield f"MLflow has {len(found)} calls that nobody has made"


Grouped = Mapping[tuple[str, str], Sums]


def by_callers(result: Result) -> Grouped:
    """By key, team and user: what callers saw, and what is recorded of calls without a whole answer."""
    made: dict[tuple[str, str], Sums] = defaultdict(Sums)
    ends = {seen.trace_id: seen.end for _, seen in result.seen}
    for key, seen in result.seen:
        if seen.end == "answered":
            for place in (("key", key.id), ("team", key.team), ("user", key.owner)):
                made[place].add(1, *seen.tokens, seen.cost_nano)
    for place, trace in _placed(result.traces):
        if ends.get(trace.trace_id) in {"left", "cut"}:
            made[place].add(1, *trace.tokens, trace.cost_nano)
    return made


def by_mlflow(result: Result) -> Grouped:
    """By key, team and user: what the records say."""
    made: dict[tuple[str, str], Sums] = defaultdict(Sums)
    for place, trace in _placed(result.traces):
        made[place].add(1, *trace.tokens, trace.cost_nano)
    return made


def _placed(traces: list[Trace]) -> Iterator[tuple[tuple[str, str], Trace]]:
    for trace in traces:
        for scope in ("key", "team", "user"):
            yield (scope, getattr(trace, scope)), trace


def by_usage(result: Result) -> Grouped:
    """By key, team and user: the ledger's usage."""
    made: dict[tuple[str, str], Sums] = defaultdict(Sums)
    for row in result.usage:
        for place in (("key", row.key_id), ("team", row.team), ("user", row.user_name)):
            made[place].add(row.calls, row.prompt_tokens, row.completion_tokens, row.cost_nano)
    return made


def by_route(result: Result) -> Grouped:
    """By key, team and user: what ``GET /usage`` says."""
    made: dict[tuple[str, str], Sums] = defaultdict(Sums)
    for row in result.route["rows"]:
        counts = row["calls"], row["prompt_tokens"], row["completion_tokens"], round(row["cost"] * NANO)
        for scope in ("key", "team", "user"):
            made[scope, row[scope]].add(*counts)
    return made


def spent_of(result: Result, *, days: bool) -> Mapping[tuple[str, str], tuple[int, int]]:
    """By key, team and user: money and tokens that the ledger has for budgets, of all days or all months."""
    made: Counter[tuple[str, str, str]] = Counter()
    for row in result.spent:
        if (len(row.period) == len("2026-01-01")) is days:
            made[row.scope, row.name, "cost"] += row.cost_nano
            made[row.scope, row.name, "tokens"] += row.tokens
    places = {(scope, name) for scope, name, _ in made}
    return {place: (made[*place, "cost"], made[*place, "tokens"]) for place in places}


def sums(result: Result) -> Iterator[str]:
    """Sums that differ."""
    callers = by_callers(result)
    others = {
        "MLflow": by_mlflow(result),
        "the ledger": by_usage(result),
        "GET /usage": by_route(result),
    }
    names = {key.id: key.name for key in result.keys}
    for name, found in others.items():
        for place in sorted(callers.keys() | found.keys()):
            mine, its = callers.get(place, Sums()), found.get(place, Sums())
            if mine != its:
                yield f"{names.get(place[1], place[1])}: {name} has {its}; callers and records say {mine}"
    for days in (True, False):
        found_spent = spent_of(result, days=days)
        for place in sorted(callers.keys() | found_spent.keys()):
            mine = callers.get(place, Sums())
            wanted = mine.cost_nano, mine.prompt + mine.completion
            if found_spent.get(place, (0, 0)) != wanted:
                yield (
                    f"{names.get(place[1], place[1])}: the ledger has {found_spent.get(place)} for budgets; "
                    f"callers and records say {wanted}"
                )


@dataclass(frozen=True)
class Spending:
    """A budget, in billionths of a dollar or in tokens: how much it is, was spent, and may be exceeded by."""

    name: str
    unit: str
    limit: int
    spent: int
    allowed: int
    refused: int

    @property
    def over(self) -> int:
        """By how much it is exceeded."""
        return max(0, self.spent - self.limit)


def spending(result: Result) -> Iterator[Spending]:
    """Each budget. Calls in flight may exceed it by what they cost: as many as there are callers, at most."""
    recorded = by_mlflow(result)
    for key in result.keys:
        if key.budget is not None:
            yield _spending(result, key.name, key.budget, [key], recorded[("key", key.id)])
    for team, budget in result.team_budgets.items():
        members = [key for key in result.keys if key.team == team]
        yield _spending(result, team, budget, members, recorded[("team", team)])


def _spending(result: Result, name: str, budget: Mapping[str, Any], keys: list[Key], of: Sums) -> Spending:
    ids = {key.id for key in keys}
    traces = [trace for trace in result.traces if trace.key in ids]
    money = budget["unit"] == "usd"
    largest = max((trace.cost_nano if money else sum(trace.tokens) for trace in traces), default=0)
    return Spending(
        name,
        budget["unit"],
        round(budget["amount"] * (NANO if money else 1)),
        of.cost_nano if money else of.prompt + of.completion,
        CALLERS * len(keys) * largest,
        sum(seen.end == "refused" for key in keys for seen in key.seen),
    )


def budgets(result: Result) -> Iterator[str]:
    """Budgets that are exceeded by more than the calls in flight, and calls refused without a spent one."""
    spent = set()
    for of in spending(result):
        if of.over > of.allowed:
            yield f"{of.name}: the budget is exceeded by {of.over}; the calls in flight are {of.allowed}"
        if of.spent >= of.limit:
            spent.add(of.name)
    for key in result.keys:
        refused = sum(seen.end == "refused" for seen in key.seen)
        if refused and not spent & {key.name, key.team}:
            yield f"{key.name}: {refused} calls were refused, and no budget is spent"


def variety(result: Result) -> Iterator[str]:
    """What has not happened, and should have."""
    happened = {
        **{f"a {kind} call that was answered": 0 for kind in KINDS if not kind.startswith("left")},
        **dict.fromkeys(("an answer from the cache", "a retry", "a call that was left", "a refused call"), 0),
    }
    for _, seen in result.seen:
        answered = f"a {seen.call.kind} call that was answered"
        # One that was to be left is an answer that nobody expected, and reported as such.
        if seen.end == "answered" and answered in happened:
            happened[answered] += 1
        happened["an answer from the cache"] += seen.cached
        happened["a retry"] += seen.attempts > 1 and seen.status == 200
        happened["a call that was left"] += seen.end == "left"
        happened["a refused call"] += seen.end == "refused"
    yield from (f"there was not {what}" for what, times in happened.items() if not times)
    if result.kills and not any(seen.end == "cut" for _, seen in result.seen):
        yield "no call was in flight at a kill"


# ---- What is printed -------------------------------------------------------------------------------------


def table(result: Result) -> Iterator[str]:
    """The tables, and the verdict."""
    callers, mlflow, ledger = by_callers(result), by_mlflow(result), by_usage(result)
    recorded = {trace.trace_id for trace in result.traces}
    yield (
        "| key | team | calls | answered | cached | failed | retried | refused | left | cut "
        "| of these recorded |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    totals: Counter[str] = Counter()
    for key in result.keys:
        cells = Counter({name: sum(seen.end == name for seen in key.seen) for name in ENDS})
        cells["calls"] = len(key.seen)
        for seen in key.seen:
            answered = seen.end == "answered"
            cells["cached"] += answered and seen.cached
            cells["failed"] += answered and seen.status != 200
            cells["retried"] += answered and seen.status == 200 and seen.attempts > 1
            cells["recorded"] += seen.end in {"left", "cut"} and seen.trace_id in recorded
        totals += cells
        yield _row(key.name, key.team, cells)
    yield _row("all", "", totals)
    yield ""
    yield "| key | records | tokens: callers | MLflow | ledger | USD: callers | MLflow | ledger |"
    yield "|---|---|---|---|---|---|---|---|"
    whole = [Sums(), Sums(), Sums()]
    for key in result.keys:
        of = [source.get(("key", key.id), Sums()) for source in (callers, mlflow, ledger)]
        for one, total in zip(of, whole, strict=True):
            total.add(one.calls, one.prompt, one.completion, one.cost_nano)
        yield _sums_row(key.name, of)
    yield _sums_row("all", whole)
    yield ""
    yield "| budget of | unit | amount | spent | over it | calls in flight, at most | refused |"
    yield "|---|---|---|---|---|---|---|"
    for budget in spending(result):
        amounts = (budget.limit, budget.spent, budget.over, budget.allowed)
        shown = [usd(amount) if budget.unit == "usd" else f"{amount}" for amount in amounts]
        yield f"| {budget.name} | {budget.unit} | {' | '.join(shown)} | {budget.refused} |"
    yield ""
    yield from (f"DIFFERS {problem}" for problem in result.problems)
    verdict = "differs, see above" if result.problems else "adds up, for each key, user and team"
    yield f"The money {verdict}: {totals['calls']} calls, {result.kills} kills, {result.seconds:.0f} s."


def _row(name: str, team: str, cells: Mapping[str, int]) -> str:
    columns = ("calls", "answered", "cached", "failed", "retried", "refused", "left", "cut", "recorded")
    return f"| {name} | {team} | {' | '.join(str(cells[column]) for column in columns)} |"


def _sums_row(name: str, of: list[Sums]) -> str:
    tokens = " | ".join(str(one.prompt + one.completion) for one in of)
    return f"| {name} | {of[1].calls} | {tokens} | {' | '.join(usd(one.cost_nano) for one in of)} |"


def main() -> int:
    """Run, print, and write where that is asked for; 1 when anything differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.money", description=__doc__)
    parser.add_argument("--calls", type=int, default=2_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the calls' kinds and prices")
    parser.add_argument("--postgresql", action="store_true", help="keep the ledger in PostgreSQL")
    parser.add_argument("--write", action="store_true", help="write the result to MONEY.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "mlflow").mkdir()
        database = f"sqlite:///{folder}/ledger.db"
        if asked.postgresql:
            database = stack.enter_context(PostgreSql()).url
        mlflow = stack.enter_context(MlflowServer(folder / "mlflow"))

        def say(line: str) -> None:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

        result = run(folder, mlflow, database, calls=asked.calls, kills=asked.kills, seed=asked.seed, say=say)
        lines = list(table(result))
        say("\n".join(lines))
    if asked.write:
        store = "PostgreSQL" if asked.postgresql else "SQLite"
        head = ["# What `make money` saw", "", f"The ledger was in {store}. {ABOUT}", ""]
        RESULTS.write_text("\n".join([*head, *lines, ""]))
    return int(bool(result.problems))


if __name__ == "__main__":
    sys.exit(main())
