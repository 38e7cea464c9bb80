"""Every query of the dashboard "Who spends?", as Grafana's own user, against a real PostgreSQL.

`deploy/postgres/init.sql` makes the users and databases, and the API's migrations the tables, as in
docker-compose.yml. What is expected is computed from the rows here, not by SQL.
"""

import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

from deploy.backends import ROOT
from grafana.spending import ROWS, TOP
from service.identity.database import make_engine, migrate
from service.identity.principal import NO_LIMITS, Budget, Limits, Period, Unit
from tests.harness import make_settings
from tests.postgresql import PostgreSql
from tests.stack.queries import Query, of_panels

READABLE: Final = {"usage_by_day", "budget_spent", "teams", "users", "api_keys"}
PASSWORDS: Final = {
    f"POSTGRES_{name}_PASSWORD": f"of-{name.lower()}-'quoted'" for name in ("API", "MLFLOW", "GRAFANA")
}
PANELS: Final = {
    query.where.removeprefix("spending: ").removesuffix(" A"): query
    for query in of_panels()
    if query.datasource == "grafana-postgresql-datasource"
}
MACRO: Final = re.compile(r"\$(\w+)\(([^)]*)\)")
"""As the datasource finds its macros."""

FROM, TO = date(2026, 11, 3), date(2026, 11, 5)
USAGE_COLUMNS: Final = (
    *("day", "user_name", "team", "key_id", "model"),
    *("calls", "cached", "errors", "unpriced"),
    *("prompt_tokens", "completion_tokens", "cost_nano", "saved_cost_nano"),
)
USAGE: Final[list[tuple[Any, ...]]] = [
    (FROM, "ann", "red", "KEYannAAAAAA", "gpt", 100, 20, 3, 0, 5_000, 900, 1_234_567_891, 200_000_000),
    (FROM, "ann", "red", "", "gpt", 10, 0, 10, 0, 0, 0, 0, 0),
    (FROM, "bob", "", "", "local", 7, 0, 0, 7, 700, 70, 0, 0),
    (TO, "ann", "red", "KEYannAAAAAA", "claude", 4, 1, 0, 0, 40_000, 4_000, 9_000_000_000, 50_000_000),
    (TO, "o'hara", "blue", "KEYgone00000", "gpt", 1, 0, 0, 1, 10, 5, 1, 0),
    # Outside of the time range, by a day.
    (FROM - timedelta(days=1), "ann", "red", "", "gpt", 1_000, 0, 0, 0, 1, 1, 10**12, 1),
    (TO + timedelta(days=1), "eve", "red", "", "gpt", 1_000, 0, 0, 9, 1, 1, 10**12, 0),
    # More users on one day than fit into a graph or a table; each spent less than those above.
    *(
        (FROM, f"user{number:03}", "many", "", "gpt", 1, 0, 0, 0, 1, 0, 1_000 + number, 0)
        for number in range(120)
    ),
]


def expanded(query: Query, start: str, end: str) -> str:
    """The SQL as Grafana sends it for a time range."""

    def value(match: re.Match[str]) -> str:
        return {"__timeFrom": f"'{start}'", "__timeTo": f"'{end}'"}[match[1]]

    text = MACRO.sub(value, query.expr)
    assert "$" not in text, text
    return text


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSql]:
    with PostgreSql() as server:
        server.execute_file(ROOT / "deploy/postgres/init.sql", PASSWORDS)
        _migrate(server)
        yield server


def _migrate(server: PostgreSql) -> None:
    url = SecretStr(server.url_of("llmops", "llmops"))
    engine = make_engine(make_settings(database_url=url))
    try:
        migrate(engine)
    finally:
        engine.dispose()


def _insert(api: psycopg.Connection[Any], table: str, columns: tuple[str, ...], rows: list[Any]) -> None:
    """Insert rows; numbers that no panel reads, and that must be there, are 0."""
    others = api.execute(
        "SELECT column_name FROM information_schema.columns WHERE table_schema = 'public' AND table_name = %s"
        " AND is_nullable = 'NO' AND column_default IS NULL AND data_type = 'bigint'"
        " AND NOT column_name = ANY(%s)",
        (table, list(columns)),
    ).fetchall()
    columns += tuple(name for (name,) in others)
    rows = [(*row, *(0 for _ in others)) for row in rows]
    statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join(sql.Placeholder() * len(columns)),
    )
    with api.cursor() as cursor:
        cursor.executemany(statement, rows)


@pytest.fixture
def api(server: PostgreSql) -> Iterator[psycopg.Connection[Any]]:
    """A connection of the API's user, with empty tables."""
    with psycopg.connect(server.url_of("llmops", "llmops"), autocommit=True) as connection:
        connection.execute("TRUNCATE usage_by_day, budget_spent, teams, users, api_keys CASCADE")
        yield connection


@pytest.fixture
def grafana(server: PostgreSql) -> Iterator[psycopg.Connection[Any]]:
    """A connection of Grafana's user."""
    with psycopg.connect(server.url_of("grafana", "llmops"), autocommit=True) as connection:
        yield connection


@pytest.fixture
def used(api: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    """The API's connection, with usage in the tables."""
    key = ("id", "name", "owner", "role", "limits", "created_at")
    _insert(api, "api_keys", key, [("KEYannAAAAAA", "laptop", "ann", "user", "{}", 1)])
    _insert(api, "usage_by_day", USAGE_COLUMNS, USAGE)
    return api


def ask(
    grafana: psycopg.Connection[Any],
    panel: str,
    start: str = "2026-11-03T22:15:00.5Z",
    end: str = "2026-11-05T01:00:00Z",
) -> list[dict[str, Any]]:
    """The rows that a panel shows; by default for a range that begins and ends within its days."""
    cursor = grafana.cursor(row_factory=psycopg.rows.dict_row)
    return cursor.execute(expanded(PANELS[panel], start, end)).fetchall()


def number(grafana: psycopg.Connection[Any], panel: str, **span: str) -> float:
    """The one number that a panel shows."""
    (row,) = ask(grafana, panel, **span)
    assert isinstance(row["value"], float)
    return row["value"]


def in_range() -> list[dict[str, Any]]:
    """The rows of the time range."""
    rows = [dict(zip(USAGE_COLUMNS, row, strict=True)) for row in USAGE]
    return [row for row in rows if FROM <= row["day"] <= TO]


def summed(column: str) -> int:
    """The sum of a column in the time range."""
    return sum(row[column] for row in in_range())


# ---- Numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("panel", "expected"),
    [
        ("Spent", summed("cost_nano") / 1e9),
        ("Calls of all callers", summed("calls")),
        ("Tokens of all callers", summed("prompt_tokens") + summed("completion_tokens")),
        ("From the cache", summed("cached") / summed("calls")),
        ("Cost that the cache saved", summed("saved_cost_nano") / 1e9),
        ("Without a price", summed("unpriced")),
        ("Failed", summed("errors") / summed("calls")),
    ],
)
@pytest.mark.usefixtures("used")
def test_a_total_is_that_of_the_days_in_the_time_range(
    grafana: psycopg.Connection[Any], panel: str, expected: float
) -> None:
    assert number(grafana, panel) == pytest.approx(expected, rel=1e-12)
    # The first of these days alone, and the day before too.
    assert number(grafana, panel, end="2026-11-03T23:00:00Z") != expected
    assert number(grafana, panel, start="2026-11-02T23:59:59Z", end="2026-11-06T00:00:00Z") != expected


def name_of(row: dict[str, Any], heading: str) -> str:
    """What stands for a row in a panel by team, user, key or model."""
    if heading == "key":
        keys = {"": "(no key)", "KEYannAAAAAA": "laptop KEYannAAAAAA"}
        return keys.get(row["key_id"], str(row["key_id"]))
    column = {"user": "user_name"}.get(heading, heading)
    return str(row[column] or "(no team)")


@pytest.mark.parametrize("heading", ["team", "user", "key", "model"])
@pytest.mark.usefixtures("used")
def test_days_show_those_who_spent_most_and_the_others(
    grafana: psycopg.Connection[Any], heading: str
) -> None:
    names = Counter[str]()
    for row in in_range():
        names[name_of(row, heading)] += row["cost_nano"]
    top = {name for name, _ in sorted(names.items(), key=lambda one: (-one[1], one[0]))[:TOP]}
    expected: dict[tuple[datetime, str], int] = defaultdict(int)
    for row in in_range():
        name = name_of(row, heading)
        midnight = datetime(row["day"].year, row["day"].month, row["day"].day, tzinfo=UTC)
        expected[midnight, name if name in top else "(others)"] += row["cost_nano"]
    rows = ask(grafana, f"Spent by {heading}")
    # Three columns of these names: Grafana then names a series by `metric` alone.
    assert list(rows[0]) == ["time", "metric", "value"]
    got = {(row["time"].astimezone(UTC), row["metric"]): row["value"] for row in rows}
    assert got == pytest.approx({key: cost / 1e9 for key, cost in expected.items()})
    assert len(got) == len(rows)
    assert ("(others)" in {name for _, name in got}) == (heading == "user")


@pytest.mark.usefixtures("used")
def test_days_show_tokens_and_how_calls_ended(grafana: psycopg.Connection[Any]) -> None:
    expected: dict[str, dict[date, Counter[str]]] = {"tokens": {}, "calls": {}}
    for row in in_range():
        tokens = expected["tokens"].setdefault(row["day"], Counter())
        tokens += Counter(prompts=row["prompt_tokens"], answers=row["completion_tokens"])
        calls = expected["calls"].setdefault(row["day"], Counter())
        calls += Counter({"from the cache": row["cached"], "failed": row["errors"]})
        calls["by a model"] += row["calls"] - row["cached"] - row["errors"]
    for panel, by_day in (("Tokens by day", expected["tokens"]), ("Calls by day", expected["calls"])):
        rows = ask(grafana, panel)
        assert {row.pop("time").astimezone(UTC).date(): Counter(row) for row in rows} == by_day


@pytest.mark.parametrize("heading", ["team", "user", "key", "model"])
@pytest.mark.usefixtures("used")
def test_a_table_shows_who_spent_it(grafana: psycopg.Connection[Any], heading: str) -> None:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in in_range():
        groups[name_of(row, heading)].append(row)
    expected = []
    for name, rows in groups.items():
        total = {column: sum(row[column] for row in rows) for column in USAGE_COLUMNS[5:]}
        expected.append(
            {
                heading: name,
                **({"owner": "ann" if name.startswith("laptop") else ""} if heading == "key" else {}),
                "spent": total["cost_nano"] / 1e9,
                "calls": total["calls"],
                "tokens": total["prompt_tokens"] + total["completion_tokens"],
                "from the cache": total["cached"] / total["calls"],
                "saved": total["saved_cost_nano"] / 1e9,
                "failed": total["errors"] / total["calls"],
                "without a price": total["unpriced"],
            }
        )
    expected.sort(key=lambda row: (-row["spent"], -row["tokens"], row[heading]))
    got = ask(grafana, f"By {heading}")
    assert len(got) == min(len(expected), ROWS)
    for row, wanted in zip(got, expected, strict=False):
        assert list(row) == list(wanted)
        assert row == pytest.approx(wanted)


# ---- Budgets -------------------------------------------------------------------------------------------


def limits(amount: float, unit: Unit, period: Period) -> str:
    """The limits of a budget as they are stored."""
    return Limits(("a",), "60/minute", Budget(amount, unit, period)).to_json()


def _set_budgets(api: psycopg.Connection[Any]) -> datetime:
    """Set budgets and what was spent of them; the time for which this holds."""
    now = datetime.now(UTC)
    day, month = f"{now:%Y-%m-%d}", f"{now:%Y-%m}"
    past, future = int(now.timestamp()) - 60, int(now.timestamp()) + 3_600
    key = ("id", "name", "owner", "role", "limits", "created_at", "expires_at", "revoked_at")
    used_up = limits(1, "usd", "day")
    _insert(
        api,
        "api_keys",
        key,
        [
            ("AAAAAAAAAAAA", "ci", "ann", "user", limits(2.5, "usd", "day"), 1, future, None),
            ("BBBBBBBBBBBB", "old", "ann", "user", used_up, 1, past, None),
            ("CCCCCCCCCCCC", "gone", "ann", "user", used_up, 1, None, past),
            ("DDDDDDDDDDDD", "free", "ann", "user", NO_LIMITS.to_json(), 1, None, None),
        ],
    )
    _insert(
        api,
        "users",
        ("name", "limits", "disabled"),
        [
            ("ann", limits(1_000, "tokens", "month"), False),
            ("off", used_up, True),
            # PostgreSQL's JSON takes no NUL: this row must not hide all others.
            ("odd", '{"models": ["\\u0000"], "rate": null, "budget": [1, "usd", "day"]}', False),
        ],
    )
    _insert(
        api,
        "teams",
        ("name", "limits"),
        [
            ("red", limits(10, "usd", "month")),
            ("blue", limits(0, "tokens", "day")),
            ("new", limits(5, "usd", "day")),
        ],
    )
    _insert(
        api,
        "budget_spent",
        ("scope", "name", "period", "cost_nano", "tokens"),
        [
            ("key", "AAAAAAAAAAAA", day, 3_000_000_000, 5),
            ("key", "AAAAAAAAAAAA", month, 99_000_000_000, 5),
            ("key", "BBBBBBBBBBBB", day, 3_000_000_000, 5),
            ("key", "CCCCCCCCCCCC", day, 3_000_000_000, 5),
            ("user", "ann", month, 7_000_000_000, 799),
            ("user", "off", day, 7_000_000_000, 5),
            # Of other holders with the same name, and of another period.
            ("team", "ann", month, 1, 10**9),
            ("team", "red", month, 8_000_000_000, 10**9),
            ("team", "red", day, 99_000_000_000, 10**9),
            ("team", "red", "2020-01", 99_000_000_000, 10**9),
        ],
    )
    return now


def test_budgets_show_what_is_spent_of_those_in_force(
    api: psycopg.Connection[Any], grafana: psycopg.Connection[Any]
) -> None:
    now = _set_budgets(api)
    rows = ask(grafana, "Budgets")
    assert datetime.now(UTC).date() == now.date(), "a day ended during this test: run it again"
    tomorrow = datetime(now.year, now.month, now.day, tzinfo=UTC) + timedelta(days=1)
    next_month = datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=UTC)
    columns = ("of", "name", "used", "spent", "budget", "left", "unit", "per", "renews at")
    assert [tuple(row.values()) for row in rows] == [
        ("key", "ci AAAAAAAAAAAA", 1.2, 3, 2.5, 0, "usd", "day", tomorrow),
        ("team", "blue", 1, 0, 0, 0, "tokens", "day", tomorrow),
        ("team", "red", 0.8, 8, 10, 2, "usd", "month", next_month),
        ("user", "ann", 0.799, 799, 1_000, 201, "tokens", "month", next_month),
        ("team", "new", 0, 0, 5, 5, "usd", "day", tomorrow),
    ]
    assert tuple(rows[0]) == columns
    assert number(grafana, "Budgets near their limit") == 1
    assert number(grafana, "Budgets spent") == 2


# ---- A new system --------------------------------------------------------------------------------------


@pytest.mark.parametrize("panel", sorted(PANELS))
@pytest.mark.usefixtures("api")
def test_a_panel_of_a_new_system_is_empty_or_zero(grafana: psycopg.Connection[Any], panel: str) -> None:
    rows = ask(grafana, panel)
    assert rows in ([], [{"value": 0.0}])


def test_each_panel_has_a_test_of_its_numbers() -> None:
    by = {f"{what} {name}" for what in ("By", "Spent by") for name in ("team", "user", "key", "model")}
    totals = {
        "Spent",
        "Calls of all callers",
        "Tokens of all callers",
        "From the cache",
        "Cost that the cache saved",
    }
    totals |= {"Without a price", "Failed", "Budgets near their limit", "Budgets spent"}
    assert set(PANELS) == by | totals | {"Tokens by day", "Calls by day", "Budgets"}


# ---- Who may read what ---------------------------------------------------------------------------------


def tables(api: psycopg.Connection[Any]) -> set[str]:
    """The tables in the API's database."""
    rows = api.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    return {name for (name,) in rows}


def test_grafana_reads_the_tables_of_its_panels_and_no_other(
    api: psycopg.Connection[Any], grafana: psycopg.Connection[Any]
) -> None:
    everything = tables(api)
    assert {"api_key_secrets", "usage_records", "response_owners", "identity_changes"} < everything
    refused = set()
    for name in everything:
        try:
            grafana.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(name)))
        except psycopg.errors.InsufficientPrivilege:
            refused.add(name)
    assert everything - refused == READABLE


def test_grafana_changes_nothing(api: psycopg.Connection[Any], grafana: psycopg.Connection[Any]) -> None:
    grafana.execute("SET default_transaction_read_only = off")  # a user may, so the privileges have to hold
    for name in tables(api):
        for statement in ("DELETE FROM {}", "TRUNCATE {}", "DROP TABLE {}"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                grafana.execute(sql.SQL(statement).format(sql.Identifier(name)))
    for statement in ("CREATE TABLE public.mine ()", "CREATE TEMPORARY TABLE mine ()", "CREATE SCHEMA mine"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            grafana.execute(statement)


def test_a_table_that_a_later_migration_makes_is_closed_and_one_that_is_made_again_is_open(
    api: psycopg.Connection[Any], grafana: psycopg.Connection[Any]
) -> None:
    with api.transaction(force_rollback=True):
        api.execute("CREATE TABLE later (secret text)")
        # As Alembic changes a table where it cannot be altered in place.
        api.execute("CREATE TABLE teams_new (name text)")
        api.execute("DROP TABLE teams")
        api.execute("ALTER TABLE teams_new RENAME TO teams")
        api.execute("CREATE SCHEMA aside")
        api.execute("CREATE TABLE aside.users (secret text)")
        rows = api.execute(
            "SELECT name, has_table_privilege('grafana', name, 'SELECT')"
            " FROM unnest(ARRAY['later', 'teams', 'aside.users', 'users', 'api_key_secrets']) AS name"
        ).fetchall()
        assert dict(rows) == {
            "later": False,
            "teams": True,
            "aside.users": False,
            "users": True,
            "api_key_secrets": False,
        }
    assert grafana.execute("SELECT count(*) FROM teams").fetchone() is not None


def test_each_user_has_a_password_and_one_database(server: PostgreSql) -> None:
    with psycopg.connect(server.url, autocommit=True) as connection:
        passwords = connection.execute(
            "SELECT rolname, rolpassword FROM pg_authid WHERE rolcanlogin AND rolname <> 'postgres'"
        ).fetchall()
        assert {name for name, _ in passwords} == {"llmops", "mlflow", "grafana"}
        assert all(stored.startswith("SCRAM-SHA-256$") for _, stored in passwords)
        allowed = connection.execute(
            "SELECT rolname, datname FROM pg_roles, pg_database WHERE rolname = ANY(%s) AND datname = ANY(%s)"
            " AND has_database_privilege(rolname, datname, 'CONNECT')",
            (["llmops", "mlflow", "grafana"], ["llmops", "mlflow"]),
        ).fetchall()
        assert set(allowed) == {("llmops", "llmops"), ("mlflow", "mlflow"), ("grafana", "llmops")}
        rights = connection.execute(
            "SELECT rolname FROM pg_roles WHERE rolname IN ('llmops', 'mlflow', 'grafana')"
            " AND (rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls)"
        ).fetchall()
        assert rights == []


def test_the_migrations_run_a_second_time(server: PostgreSql, api: psycopg.Connection[Any]) -> None:
    before = tables(api)
    _migrate(server)
    assert tables(api) == before


def test_a_missing_password_makes_no_user() -> None:
    with PostgreSql() as server:
        others = {name: value for name, value in PASSWORDS.items() if name != "POSTGRES_API_PASSWORD"}
        with pytest.raises(subprocess.CalledProcessError):
            server.execute_file(ROOT / "deploy/postgres/init.sql", others)
        with psycopg.connect(server.url) as connection:
            found = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = 'llmops'").fetchall()
        assert found == []
