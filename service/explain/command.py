"""The command ``explain``: what became of an id, in a terminal.

With the address of a running service it asks that, which remembers failed requests too. Without one it reads
the spool and MLflow by the operator's own settings, and needs no running service.
"""

import argparse
import asyncio
import json
import logging
import sys
from dataclasses import asdict
from http import HTTPStatus
from http.client import HTTPException
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pydantic import TypeAdapter, ValidationError

from service.config.env_validator import read_settings
from service.config.logging import configure_logging
from service.config.settings import ClientSettings, Settings, prepare_environment
from service.errors import ServiceError
from service.explain.explainer import open_explainer
from service.explain.page import page
from service.explain.report import Explanation
from service.explain.text import text
from service.recording.recent import RecentRequests
from service.recording.request_key import RequestKey

FOUND: Final = 0
NOT_FOUND: Final = 1
NOT_ASKED: Final = 2
"""The exit statuses: it is known, it is not, and nobody could be asked, or not like this."""

TIMEOUT_S: Final = 15.0
MAX_ANSWER_BYTES: Final = 8_388_608

logger = logging.getLogger(__name__)


def add_parser(commands: Any) -> None:  # noqa: ANN401 - argparse does not name this type
    """Add the command to a parser's."""
    explain = commands.add_parser("explain", help="say what became of a request, by one of its ids")
    explain.add_argument(
        "id", type=_key, help="a request id, an incident_id (inc_…), or a record's id (tr-…)"
    )
    explain.add_argument(
        "--url",
        help="the running service to ask (default: LLMOPS_URL; without it, the spool and MLflow are read)",
    )
    explain.add_argument("--token", help="a token or an API key; better in LLMOPS_TOKEN, which no list shows")
    form = explain.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", dest="form", const="json", help="print JSON")
    form.add_argument("--html", action="store_const", dest="form", const="html", help="print the page")


def _key(given: str) -> RequestKey:
    try:
        return RequestKey.parse(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    client = ClientSettings()
    url = arguments.url or client.llmops_url
    try:
        if url:
            token = arguments.token or client.llmops_token.get_secret_value()
            sys.stdout.write(_ask(url, token, arguments))
            return FOUND
        return _read(arguments)
    except _NotAnsweredError as error:
        logger.error("Error: %s", error)  # noqa: TRY400 - no bug
        return error.status
    except ServiceError as error:
        logger.error("Error: %s", error.message)  # noqa: TRY400 - no bug
        return NOT_FOUND if error.status == HTTPStatus.NOT_FOUND else NOT_ASKED


def _read(arguments: argparse.Namespace) -> int:
    """Look into the spool and MLflow."""
    report = read_settings()
    configure_logging(stream=sys.stderr)
    for problem in report.errors:
        logger.error("Error: %s", problem)
    if report.settings is None:
        return NOT_ASKED
    prepare_environment(report.settings)
    sys.stdout.write(_formed(asyncio.run(_found(report.settings, arguments.id)), arguments.form))
    return FOUND


async def _found(settings: Settings, key: RequestKey) -> Explanation:
    return await open_explainer(settings, {}, RecentRequests()).explain(key, "", sees_all=True)


def _formed(explanation: Explanation, form: str | None) -> str:
    """An explanation as it is to be printed."""
    match form:
        case "json":
            return json.dumps(asdict(explanation)) + "\n"
        case "html":
            return page(explanation)
        case _:
            return text(explanation)


class _NoRedirect(HTTPRedirectHandler):
    """Follows no redirect: the token is for the address that was given."""

    def redirect_request(self, *_arguments: object) -> None:
        """Return nothing, so that the answer itself is returned."""


class _NotAnsweredError(Exception):
    """The service was not asked, or did not say what became of the id.

    Args:
        problem: What is wrong, for people.
        status: The command's exit status.
    """

    def __init__(self, problem: str, status: int = NOT_ASKED) -> None:
        self.status = status
        super().__init__(problem)


def _ask(url: str, token: str, arguments: argparse.Namespace) -> str:
    """Ask a running service; what is to be printed.

    Raises:
        _NotAnsweredError: It does not know the id, or cannot be asked.
    """
    try:
        return _formed(
            TypeAdapter(Explanation).validate_json(_fetch(url, token, arguments.id)), arguments.form
        )
    except ValidationError:
        raise _NotAnsweredError(f"{url} is not this service, or another version of it.") from None


def _fetch(url: str, token: str, key: RequestKey) -> bytes:
    try:
        address = urlsplit(url)
        valid = address.scheme in {"http", "https"} and bool(address.hostname)
    except ValueError:
        valid = False
    if not valid:
        raise _NotAnsweredError(f"{url} is not a URL: write http://host:port or https://host:port.")
    if not token:
        raise _NotAnsweredError("LLMOPS_TOKEN must hold a token or an API key.")
    request = Request(  # noqa: S310 - the scheme is looked at above
        f"{url.rstrip('/')}/requests/{key.text}",
        headers={"Authorization": f"Bearer {token}", "Accept": "application/json"},
    )
    try:
        with build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S) as answer:
            return bytes(answer.read(MAX_ANSWER_BYTES))
    except HTTPError as error:
        with error:
            said = _message(error.read(MAX_ANSWER_BYTES))
        unknown = error.code == HTTPStatus.NOT_FOUND and bool(said)
        problem = f"{url} answered {error.code}: {said or 'not in the words of this service'}"
        raise _NotAnsweredError(problem, NOT_FOUND if unknown else NOT_ASKED) from None
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else type(error).__name__
        raise _NotAnsweredError(f"{url} cannot be asked: {reason}") from None


def _message(body: bytes) -> str:
    """The message of an error's body; empty where it is none of this service's."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return ""
