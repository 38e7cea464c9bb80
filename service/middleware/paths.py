"""Rewrites the paths under ``/v1`` that clients make of a base URL, before anything else reads them.

A base URL with or without ``/v1`` or a slash at its end, and Azure's paths with the deployment in them, all
lead to the same routes. A rewritten path is what spans, limits and routes see.
"""

import re
from typing import Final

from starlette.types import Scope

from service.context import DEPLOYMENT

SLASHES: Final = re.compile(r"/{2,}")
REPEATED: Final = re.compile(r"^(?:/v1){2,}(?=/|$)")
AZURE: Final = re.compile(r"^/openai/deployments/([!-+\-.0-~](?:[ -+\-.0-~]{0,198}[!-+\-.0-~])?)(?=/)")
"""A deployment is the name of one model, as in a body: up to 200 printable ASCII characters, no comma."""

AZURE_OTHER: Final = re.compile(r"^/openai(?:/v1)?(?=/)")
"""Azure's paths without a deployment: those of its newer API, and of responses in the older one."""


def rewrite_path(scope: Scope) -> None:
    """Rewrite a request's path where it means one under ``/v1``."""
    path: str = scope["path"]
    if path.startswith("/v1/") and "//" not in path and not path.endswith("/") and "/v1/v1" not in path:
        # Nearly every request.
        return
    found = SLASHES.sub("/", path)
    azure = AZURE.match(found)
    if azure is not None:
        scope[DEPLOYMENT] = azure[1]
        found = "/v1" + found[azure.end() :]
    found = REPEATED.sub("/v1", AZURE_OTHER.sub("/v1", found))
    if not found.startswith("/v1/"):
        return
    scope["path"] = found.rstrip("/") or "/"
    scope["raw_path"] = scope["path"].encode()
