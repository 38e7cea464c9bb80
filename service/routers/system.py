"""Liveness, readiness, and the documentation."""

import re
from base64 import b64encode
from functools import lru_cache
from hashlib import sha256
from typing import Final

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from service.dependencies import ServicesDep
from service.routers.schemas import DependencyHealth, DetailedHealth, HealthResponse, errors

ASSETS = "/docs-assets"
INLINE_SCRIPT: Final = re.compile(rb"<script>(.*?)</script>", re.DOTALL)

router = APIRouter(tags=["system"])


@router.head("/", status_code=307, response_class=RedirectResponse, include_in_schema=False)
@router.get("/", status_code=307, response_class=RedirectResponse, responses=errors())
async def root() -> str:
    """Redirect to the documentation."""
    return "/docs"


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=errors())
async def health() -> HealthResponse:
    """Liveness: 200 while the process serves, whatever its dependencies do."""
    return HealthResponse()


@router.head("/health/detailed", include_in_schema=False)
@router.get(
    "/health/detailed",
    responses={**errors(), 503: {"model": DetailedHealth, "description": "Degraded, or draining."}},
)
async def health_detailed(services: ServicesDep) -> JSONResponse:
    """Readiness. Results older than a second are renewed, which takes no longer than ``HEALTH_TIMEOUT_S``.

    At most one check of a dependency runs at a time, and at most one a second is caused by those who ask.
    """
    required = services.health_required
    if not services.drain.draining:
        await services.health.refresh(required)
    found = services.health.health()
    ready = all(found[name].up for name in required if name in found)
    status = "draining" if services.drain.draining else "healthy" if ready else "degraded"
    body = DetailedHealth(
        status=status,
        checks={name: health.up for name, health in found.items()},
        details={
            name: DependencyHealth(
                error=health.error,
                latency_ms=None if health.latency_s is None else round(health.latency_s * 1_000, 1),
                age_s=None if health.age_s is None else round(health.age_s, 1),
                required=name in required,
            )
            for name, health in found.items()
        },
    )
    return JSONResponse(body.model_dump(), status_code=200 if status == "healthy" else 503)


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """Swagger UI with its files from this process, so that it works without internet access."""
    page, policy = _docs_page(request.scope.get("root_path", ""))
    return HTMLResponse(page, headers={"Content-Security-Policy": policy})


@lru_cache(8)
def _docs_page(prefix: str) -> tuple[bytes, str]:
    """The page below a prefix of paths, and the policy that lets it load its own files and nothing else."""
    page = bytes(
        get_swagger_ui_html(
            openapi_url=f"{prefix}/openapi.json",
            title="LLM API",
            swagger_js_url=f"{prefix}{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{prefix}{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{prefix}{ASSETS}/favicon.png",
        ).body
    )
    digests = [b64encode(sha256(script).digest()).decode() for script in INLINE_SCRIPT.findall(page)]
    scripts = " ".join(["'self'", *(f"'sha256-{digest}'" for digest in digests)])
    # Swagger UI sets styles on elements, and its style sheet holds images.
    return page, (
        f"default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def docs_assets() -> Mount:
    """The files that the documentation page loads."""
    return Mount(ASSETS, StaticFiles(packages=[("fastapi_offline", "static")]))
