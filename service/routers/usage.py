"""What was used: calls, tokens and cost, as JSON or CSV; one's own, or, for administrators, all."""

import time
from collections.abc import Iterable
from datetime import UTC, date, datetime
from typing import Annotated, Final, cast

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from service.dependencies import CurrentUser, ServicesDep, only_query
from service.errors import AuthenticationError, PermissionDeniedError, ValidationError
from service.identity.ledger import DIMENSIONS, Dimension, UsageQuery, UsageRow
from service.routers.bodies import refuse
from service.routers.keys import UNAVAILABLE
from service.routers.schemas import UsageBody, errors
from service.utils.accept import preferred

CSV: Final = "text/csv"
VARY: Final = {"Vary": "Accept"}
JSON: Final = "application/json"
FORMULAS: Final = ("=", "+", "-", "@", "\t", "\r")
"""How a text begins that a spreadsheet takes for a formula (OWASP, CSV injection)."""

router = APIRouter(tags=["accounts"])


@router.get(
    "/usage",
    response_model=UsageBody,
    responses=errors(AuthenticationError, PermissionDeniedError, ValidationError, *UNAVAILABLE)
    | {200: {"content": {CSV: {"schema": {"type": "string"}}}, "description": "The usage"}},
)
async def usage(
    request: Request,
    user: CurrentUser,
    services: ServicesDep,
    _query: Annotated[None, Depends(only_query("from", "to", "by", "user"))],
    since: Annotated[date | None, Query(alias="from", description="The first day, in UTC.")] = None,
    until: Annotated[date | None, Query(alias="to", description="The last day, in UTC.")] = None,
    by: Annotated[str, Query(max_length=100, description=", ".join(DIMENSIONS))] = "day",
    username: Annotated[str | None, Query(alias="user", max_length=256)] = None,
) -> Response:
    """Calls, tokens and cost, by day, model, user, team and key; one's own, or, for administrators, all.

    From the first of this month to today unless said otherwise. `Accept: text/csv` gives CSV. The model of a
    failed call is `other` where the upstream does not list it.
    """
    if user.role != "admin":
        if username not in {None, user.username}:
            raise PermissionDeniedError("Only an administrator sees the usage of others.", param="user")
        username = user.username
    today = datetime.fromtimestamp(time.time(), UTC).date()
    last = until or today
    query = UsageQuery(since or min(last, today).replace(day=1), last, _dimensions(by), username)
    if query.since > query.until:
        refuse("query.from", "must not be after query.to")
    rows, total = await services.ledger.usage(query)
    if preferred(request.headers.get("accept", ""), JSON, CSV) == CSV:
        return PlainTextResponse(_as_csv(rows, total, query.by), media_type=CSV, headers=VARY)
    return JSONResponse(
        {"from": query.since.isoformat(), "to": query.until.isoformat(), "rows": rows, "total": total},
        headers=VARY,
    )


def _dimensions(text: str) -> tuple[Dimension, ...]:
    asked = [part.strip() for part in text.split(",") if part.strip()]
    for part in asked:
        if part not in DIMENSIONS:
            refuse("query.by", f"must be some of {', '.join(DIMENSIONS)}, separated by commas")
    return tuple(dict.fromkeys(cast("list[Dimension]", asked)))


def _as_csv(rows: Iterable[UsageRow], total: UsageRow, by: Iterable[str]) -> str:
    """The rows as RFC 4180 has them."""
    names = [*by, *total]
    lines: list[list[object]] = [list(names), *([row[name] for name in names] for row in rows)]  # type: ignore[list-item]
    return "".join(",".join(_cell(value) for value in line) + "\r\n" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.9f}".rstrip("0").rstrip(".")
    text = str(value)
    if text.startswith(FORMULAS):
        text = f"'{text}"
    return '"' + text.replace('"', '""') + '"' if any(char in text for char in ',"\r\n') else text
