"""What the service is compared with: FastAPI answering by itself, and FastAPI with the SDK and nothing else.

Run by uvicorn with ``BENCH_UPSTREAM_URL`` in its environment.
"""

import os
from typing import Any

import httpx2
from fastapi import FastAPI, Request, Response
from openai import AsyncOpenAI

from service.upstream.transport import UpstreamTransport

UPSTREAM = os.environ.get("BENCH_UPSTREAM_URL", "http://127.0.0.1:9") + "/v1"

app = FastAPI(telemetry={"tracing": False, "metrics": False, "logs": False})
client = AsyncOpenAI(api_key="none", base_url=UPSTREAM, max_retries=0)
lowest = AsyncOpenAI(
    api_key="none",
    base_url=UPSTREAM,
    max_retries=0,
    http_client=httpx2.AsyncClient(transport=UpstreamTransport(1_000, 10_000_000)),
)


@app.post("/noop")
async def noop() -> dict[str, str]:
    """Answer."""
    return {"status": "ok"}


@app.post("/v1/chat/completions")
async def chat(body: dict[str, Any]) -> Any:
    """Ask the model with the SDK, and answer what it says."""
    return await client.chat.completions.create(**body)


@app.post("/lowest")
async def at_the_lowest(request: Request) -> Response:
    """Pass the bytes on through the SDK's lowest public layer and this service's transport."""
    answer = await lowest.post(
        "/chat/completions", content=await request.body(), cast_to=httpx2.Response, options={}
    )
    return Response(answer.content, media_type="application/json")
