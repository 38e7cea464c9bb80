"""Asks Prometheus each query, and compares."""

from collections.abc import Mapping
from dataclasses import dataclass

from tests.stack.api import Api, QueryError
from tests.stack.queries import Query
from tests.stack.verdicts import Expected, show


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    where: str
    expected: str
    got: str
    differences: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """Whether they agree."""
        return "; ".join(self.differences) or "equal"


def ask(api: Api, query: Query, expected: Expected | None, at: float) -> Row:
    """Ask one query."""
    if expected is None:
        return Row(query.where, "?", "", ("nobody says what it should show",))
    try:
        got = api.query(query.filled, at)
    except QueryError as error:
        return Row(query.where, expected.shown(), "", (str(error),))
    # A series without labels that is 0 is what stands for nothing at all.
    return Row(query.where, expected.shown(), show(got), tuple(expected.differences(got)))


def ask_all(api: Api, queries: list[Query], expected: Mapping[str, Expected], at: float) -> list[Row]:
    """Ask all of them; an expectation for a query that does not exist is a row, too."""
    rows = [ask(api, query, expected.get(query.where), at) for query in queries]
    unasked = expected.keys() - {query.where for query in queries}
    return [*rows, *(Row(where, "?", "", ("no such query",)) for where in sorted(unasked))]


def table(rows: list[Row]) -> str:
    """Write the rows down, one a line."""
    lines = ["| query | expected | got | |", "|---|---|---|---|"]
    lines += [f"| {row.where} | {row.expected} | {row.got} | {row.verdict} |" for row in rows]
    return "\n".join(lines) + "\n"
