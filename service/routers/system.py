"""Liveness, and the documentation."""

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from service.routers.schemas import HealthResponse, errors

ASSETS = "/docs-assets"

router = APIRouter(tags=["system"])


@router.get("/", status_code=307, response_class=RedirectResponse, responses=errors())
async def root() -> str:
    """Leads to the documentation."""
    return "/docs"


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=errors())
async def health() -> HealthResponse:
    """Alive while the process serves; looks at no dependency."""
    return HealthResponse()


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """Swagger UI with its files from this process, so that it works without internet access."""
    prefix = request.scope.get("root_path", "")
    return get_swagger_ui_html(
        openapi_url=f"{prefix}/openapi.json",
        title="LLM API",
        swagger_js_url=f"{prefix}{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{prefix}{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{prefix}{ASSETS}/favicon.png",
    )


def docs_assets() -> Mount:
    """The files that the documentation page loads."""
    return Mount(ASSETS, StaticFiles(packages=[("fastapi_offline", "static")]))
