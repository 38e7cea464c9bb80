"""The dashboard "Who spends?": cost, tokens and calls by user, team, key and model, and the state of budgets.

It reads the ledger in the API's PostgreSQL database (`service/identity/`), because names of users and teams
stand on no metric. The ledger has one row for each day in UTC, so the page shows whole days.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from grafana_foundation_sdk.models import dashboard

from grafana.panels import (
    FULL,
    RED_FROM_ONE,
    THIRD,
    Column,
    PanelText,
    page,
    sql_bars,
    sql_number,
    sql_table,
)
from service.identity.budgets import NANO, NEAR_PERCENT

LLM_PAGE: Final = ("What does it cost?", "/d/llmops-llm?${__url_time_range}")
DEPENDENCIES: Final = ("Whose fault is it?", "/d/llmops-dependencies?${__url_time_range}")

NEAR: Final = NEAR_PERCENT / 100

TOP: Final = 10
ROWS: Final = 100
"""How many series a graph has, and how many rows a table; graphs put the rest into one more."""

IN_RANGE: Final = "day BETWEEN $__timeFrom()::date AND $__timeTo()::date"
MIDNIGHT: Final = "day::timestamp AT TIME ZONE 'UTC'"


def dollars(column: str) -> str:
    """Return the sum of a column of nano-dollars, in dollars."""
    return f"(coalesce(sum({column}), 0) / {NANO}.0)::float8"


def share(part: str, whole: str) -> str:
    """Return one sum divided by another; 0 where there is nothing."""
    return f"coalesce(sum({part})::float8 / nullif(sum({whole}), 0), 0)"


TOKENS: Final = "prompt_tokens + completion_tokens"


@dataclass(frozen=True)
class Dimension:
    """What spending is grouped by.

    Args:
        of: The expression over `usage_by_day` and, for keys, `api_keys`.
        joined: The join that it needs.
        about: Further columns of the table, by their names.
    """

    of: str
    joined: str = ""
    about: Mapping[str, str] | None = None


USER: Final = Dimension("user_name")
TEAM: Final = Dimension("coalesce(nullif(usage_by_day.team, ''), '(no team)')")
MODEL: Final = Dimension("model")
KEY: Final = Dimension(
    "coalesce(api_keys.name || ' ' || key_id, nullif(key_id, ''), '(no key)')",
    "LEFT JOIN api_keys ON api_keys.id = key_id",
    {"owner": "coalesce(min(api_keys.owner), '')"},
)


def total(value: str) -> str:
    """Return a query for one number over the time range."""
    return f"SELECT {value} AS value\nFROM usage_by_day\nWHERE {IN_RANGE}"


def spent_by_day(by: Dimension) -> str:
    """Return a query for the cost of each day: the series that spent most in the time range, and the rest."""
    return f"""\
WITH spent AS (
    SELECT day, {by.of} AS name, sum(cost_nano) AS cost_nano
    FROM usage_by_day {by.joined}
    WHERE {IN_RANGE}
    GROUP BY 1, 2
), ranked AS (
    SELECT name, row_number() OVER (ORDER BY sum(cost_nano) DESC, name) AS place
    FROM spent
    GROUP BY name
)
SELECT
    {MIDNIGHT} AS time,
    CASE WHEN place <= {TOP} THEN name ELSE '(others)' END AS metric,
    {dollars("cost_nano")} AS value
FROM spent JOIN ranked USING (name)
GROUP BY 1, 2
ORDER BY 1, 2"""


def spent_in_all(heading: str, by: Dimension) -> str:
    """Return a query for a table: who spent most in the time range, and how."""
    about = "".join(f'    {column} AS "{name}",\n' for name, column in (by.about or {}).items())
    return f"""\
SELECT
    {by.of} AS "{heading}",
{about}    {dollars("cost_nano")} AS "spent",
    sum(calls)::float8 AS "calls",
    sum({TOKENS})::float8 AS "tokens",
    {share("cached", "calls")} AS "from the cache",
    {dollars("saved_cost_nano")} AS "saved",
    {share("errors", "calls")} AS "failed",
    sum(unpriced)::float8 AS "without a price"
FROM usage_by_day {by.joined}
WHERE {IN_RANGE}
GROUP BY 1
ORDER BY "spent" DESC, "tokens" DESC, 1
LIMIT {ROWS}"""


SPENT_COLUMNS: Final[Mapping[str, Column]] = {
    "spent": Column("currencyUSD", 4),
    "calls": Column("short"),
    "tokens": Column("short"),
    "from the cache": Column("percentunit", 1),
    "saved": Column("currencyUSD", 4),
    "failed": Column("percentunit", 1, ((None, "transparent"), (0.05, "orange"), (0.2, "red"))),
    "without a price": Column("short", None, ((None, "transparent"), (1, "orange"))),
}

# Limits that are no JSON for PostgreSQL, which takes no NUL in a string, leave out one row, not all.
BUDGETS: Final = f"""\
WITH holders AS (
    SELECT 'key' AS scope, id AS holder, name || ' ' || id AS name, limits
    FROM api_keys
    WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > extract(epoch FROM now()))
    UNION ALL SELECT 'user', name, name, limits FROM users WHERE NOT disabled
    UNION ALL SELECT 'team', name, name, limits FROM teams
), given AS (
    SELECT
        scope, holder, name,
        CASE WHEN pg_input_is_valid(limits, 'jsonb') THEN limits::jsonb -> 'budget' END AS budget
    FROM holders
), budgets AS (
    SELECT
        scope, holder, name,
        (budget ->> 0)::float8 AS amount,
        budget ->> 1 AS unit,
        budget ->> 2 AS period,
        now() AT TIME ZONE 'UTC' AS utc
    FROM given
    WHERE jsonb_typeof(budget) = 'array'
), states AS (
    SELECT
        budgets.*,
        coalesce(CASE unit WHEN 'usd' THEN cost_nano / {NANO}.0 ELSE tokens END, 0)::float8 AS spent
    FROM budgets LEFT JOIN budget_spent
        ON budget_spent.scope = budgets.scope
        AND budget_spent.name = holder
        AND budget_spent.period = to_char(
            utc, CASE budgets.period WHEN 'day' THEN 'YYYY-MM-DD' ELSE 'YYYY-MM' END
        )
), used AS (
    SELECT *, CASE WHEN amount > 0 THEN spent / amount ELSE 1 END AS used FROM states
)"""


def budgets_from(low: float, high: float | None = None) -> str:
    """Return a query for the number of budgets that are used from one share on, and not up to another."""
    below = "" if high is None else f" AND used < {high:g}"
    return f"{BUDGETS}\nSELECT count(*)::float8 AS value\nFROM used\nWHERE used >= {low:g}{below}"


def spending() -> dashboard.Dashboard:
    """Return the dashboard: totals, days, who spent it, budgets."""
    sums = [
        sql_number(
            PanelText(
                "Spent",
                "The cost of all calls in the time range, as LiteLLM reports it. Whole days in UTC.",
                "this panel is never red; the tables below show who spent it.",
            ),
            total(dollars("cost_nano")),
            unit="currencyUSD",
            decimals=4,
            width=THIRD,
            links=[LLM_PAGE],
        ),
        sql_number(
            PanelText(
                "Calls of all callers",
                "Recorded model calls, with cached, failed and cancelled ones.",
                "this panel is never red; 0 with traffic: the ledger is not written, see “Whose fault is "
                "it?”, “Database transactions”.",
            ),
            total("coalesce(sum(calls), 0)::float8"),
            unit="short",
            decimals=0,
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        sql_number(
            PanelText(
                "Tokens of all callers",
                "Tokens of prompts and answers together.",
                "this panel is never red; more tokens with as many calls: longer prompts or answers.",
            ),
            total(f"coalesce(sum({TOKENS}), 0)::float8"),
            unit="short",
            width=THIRD,
            links=[LLM_PAGE],
        ),
        sql_number(
            PanelText(
                "From the cache",
                "The share of calls that were answered from the cache.",
                "0 with traffic: Qdrant is down, or no request repeats; see “Whose fault is it?”.",
            ),
            total(share("cached", "calls")),
            unit="percentunit",
            decimals=1,
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        sql_number(
            PanelText(
                "Cost that the cache saved",
                "What the answers from the cache cost when they were first given.",
                "compare with “Spent” beside it; a small number is a reason to look at `CACHE_SAMPLED` and "
                "`CACHE_TTL_S`.",
            ),
            total(dollars("saved_cost_nano")),
            unit="currencyUSD",
            decimals=4,
            width=THIRD,
            links=[LLM_PAGE],
        ),
        sql_number(
            PanelText(
                "Without a price",
                "Calls whose cost LiteLLM did not report. Their tokens count; their cost is 0 here and in "
                "budgets.",
                "“By model” shows which model has no price: add `input_cost_per_token` and "
                "`output_cost_per_token` to it in LiteLLM's configuration. A stream without token counts has "
                "no price either (`STREAM_USAGE`).",
            ),
            total("coalesce(sum(unpriced), 0)::float8"),
            unit="short",
            decimals=0,
            thresholds=RED_FROM_ONE,
            width=THIRD,
            links=[LLM_PAGE],
        ),
        sql_number(
            PanelText(
                "Failed",
                "The share of calls that ended with an error.",
                "the tables below show whose calls fail; one caller alone sends what the model refuses. For "
                "all callers, see “Whose fault is it?”.",
            ),
            total(share("errors", "calls")),
            unit="percentunit",
            decimals=1,
            thresholds=((None, "green"), (0.05, "orange"), (0.2, "red")),
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        sql_number(
            PanelText(
                "Budgets near their limit",
                f"Budgets of keys, users and teams that are used to {NEAR:.0%} or more and not used up, now.",
                "“Budgets” at the end of the page names them: raise the budget (`PUT /teams/{name}`, `PUT "
                "/users/{name}`), or tell its owner.",
            ),
            budgets_from(NEAR, 1),
            unit="short",
            decimals=0,
            thresholds=((None, "green"), (1, "orange")),
            width=THIRD,
            links=[LLM_PAGE],
        ),
        sql_number(
            PanelText(
                "Budgets spent",
                "Budgets that are used up, now. Their callers get `BudgetExceededError` until the budget "
                "renews.",
                "“Budgets” at the end of the page names them, and when they renew; an administrator can "
                "raise them at once.",
            ),
            budgets_from(1),
            unit="short",
            decimals=0,
            thresholds=RED_FROM_ONE,
            width=THIRD,
            links=[LLM_PAGE],
        ),
    ]
    days = [
        sql_bars(
            PanelText(
                "Spent by team",
                f"Dollars per day, by team: the {TOP} that spent most, and the others together. A call "
                "belongs to the team that its caller had then.",
                "this panel is never red; “By team” shows what a team's calls were, and `PUT "
                "/teams/{name}` sets its budget.",
            ),
            spent_by_day(TEAM),
            unit="currencyUSD",
            links=[LLM_PAGE],
        ),
        sql_bars(
            PanelText(
                "Spent by user",
                f"Dollars per day, by user: the {TOP} that spent most, and the others together.",
                "this panel is never red; “By key” shows which program of a user it is.",
            ),
            spent_by_day(USER),
            unit="currencyUSD",
            links=[LLM_PAGE],
        ),
        sql_bars(
            PanelText(
                "Spent by key",
                f"Dollars per day, by API key: the {TOP} that spent most, and the others together. “(no "
                "key)” are calls with a token.",
                "a key that spends without its owner's knowledge has leaked: `DELETE /keys/{id}` ends it at "
                "once; `POST /keys/{id}/rotate` replaces its secret.",
            ),
            spent_by_day(KEY),
            unit="currencyUSD",
            links=[LLM_PAGE],
        ),
        sql_bars(
            PanelText(
                "Spent by model",
                f"Dollars per day, by model: the {TOP} that cost most, and the others together.",
                "this panel is never red; `models` of a key, a user or a team keeps them from an expensive "
                "one.",
            ),
            spent_by_day(MODEL),
            unit="currencyUSD",
            links=[LLM_PAGE],
        ),
        sql_bars(
            PanelText(
                "Tokens by day",
                "Tokens of prompts and of answers per day.",
                "this panel is never red; prompts that grow alone are conversations or documents that are "
                "sent again with each call.",
            ),
            f"""\
SELECT
    {MIDNIGHT} AS time,
    sum(prompt_tokens)::float8 AS "prompts",
    sum(completion_tokens)::float8 AS "answers"
FROM usage_by_day
WHERE {IN_RANGE}
GROUP BY day
ORDER BY 1""",
            unit="short",
            links=[LLM_PAGE],
        ),
        sql_bars(
            PanelText(
                "Calls by day",
                "Calls per day: answered by a model (or left by the caller), from the cache, failed.",
                "more “failed”: see “Whose fault is it?” for that day.",
            ),
            f"""\
SELECT
    {MIDNIGHT} AS time,
    sum(calls - cached - errors)::float8 AS "by a model",
    sum(cached)::float8 AS "from the cache",
    sum(errors)::float8 AS "failed"
FROM usage_by_day
WHERE {IN_RANGE}
GROUP BY day
ORDER BY 1""",
            unit="short",
            links=[DEPENDENCIES],
        ),
    ]
    who = [
        sql_table(
            PanelText(
                f"By {heading}",
                f"The {ROWS} {heading}s that spent most in the time range: cost, calls, tokens, what the "
                "cache answered and saved, failed calls, calls without a price.",
                f"“failed”: this {heading}'s calls are refused or break, see “Whose fault is it?”; “without "
                "a price”: the model has none in LiteLLM.",
            ),
            spent_in_all(heading, by),
            SPENT_COLUMNS,
            width=FULL,
            links=[DEPENDENCIES],
        )
        for heading, by in (("team", TEAM), ("user", USER), ("key", KEY), ("model", MODEL))
    ]
    budgets = [
        sql_table(
            PanelText(
                "Budgets",
                "The budgets that are in force now, the most used first, whatever the time range: what is "
                "spent in their period, in dollars or tokens, and when it renews. Keys that are revoked or "
                "expired and disabled users are left out.",
                f"orange from {NEAR:.0%}, red when it is used up: its callers get `BudgetExceededError` "
                "until it renews. Raise it with `PUT /teams/{name}` or `PUT /users/{name}`; for a key, make "
                "another one. All budgets hold together, so look at the team's too.",
            ),
            f"""\
{BUDGETS}
SELECT
    scope AS "of",
    name AS "name",
    used::float8 AS "used",
    spent AS "spent",
    amount AS "budget",
    greatest(amount - spent, 0) AS "left",
    unit AS "unit",
    period AS "per",
    (date_trunc(period, utc) + ('1 ' || period)::interval) AT TIME ZONE 'UTC' AS "renews at"
FROM used
ORDER BY "used" DESC, 1, 2
LIMIT {ROWS}""",
            {
                "used": Column("percentunit", 1, ((None, "transparent"), (NEAR, "orange"), (1, "red"))),
                "spent": Column(),
                "budget": Column(),
                "left": Column(),
                "renews at": Column("dateTimeAsIso"),
            },
            width=FULL,
            links=[LLM_PAGE],
        )
    ]
    return page(
        "llmops-spending",
        "Who spends?",
        "Cost, tokens and calls by team, user, key and model, and the state of budgets. Days are in UTC.",
        [
            ("Totals", sums),
            ("By day", days),
            ("Who", who),
            ("Budgets", budgets),
        ],
        since="now-30d",
        refresh="1m",
        timezone="utc",
        by_service=False,
    )
