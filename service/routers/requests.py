"""What became of a request, for whoever holds one of its ids: as JSON, or as a page."""

from dataclasses import asdict
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from service.dependencies import CurrentUser, ServicesDep, only_query
from service.errors import AuthenticationError, NotFoundError, ValidationError
from service.explain.page import POLICY, page
from service.explain.report import Explanation
from service.middleware.errors import HTML, wants_page
from service.recording.request_key import PATTERN, RequestKey
from service.routers.keys import UNAVAILABLE
from service.routers.schemas import errors

VARY: Final = {"Vary": "Accept"}

router = APIRouter(tags=["requests"])


@router.get(
    "/requests/{request_id}",
    response_model=Explanation,
    responses=errors(AuthenticationError, NotFoundError, ValidationError, *UNAVAILABLE)
    | {200: {"content": {HTML: {"schema": {"type": "string"}}}, "description": "What became of it"}},
)
async def explain(
    request: Request,
    user: CurrentUser,
    services: ServicesDep,
    _query: Annotated[None, Depends(only_query())],
    request_id: Annotated[
        str,
        Path(
            pattern=PATTERN,
            description="A request id, an `incident_id`, or the `tr-` id of a record in MLflow.",
            examples=["4bf92f3577b34da6a3ce929d0e0e4736"],
        ),
    ],
) -> Response:
    """What became of a request: one's own, or, for administrators, any.

    From this process's memory, the spool on this machine, and MLflow; `searched` says what each of them said.
    Calls are known, and requests that failed. `Accept: text/html` gives a page with a time line.
    """
    found = await services.explainer.explain(
        RequestKey.parse(request_id), user.username, sees_all=user.role == "admin"
    )
    if wants_page(request.scope):
        return HTMLResponse(page(found), headers={"Content-Security-Policy": POLICY, **VARY})
    return JSONResponse(asdict(found), headers=VARY)
