"""The service in front of a real LiteLLM proxy, whose models answer by themselves: for client libraries.

As a program, ``python -m tests.e2e.clients.world``, it prints one line of JSON with the base URL, the key and
the models, and runs until its standard input ends or SIGTERM arrives. ``LITELLM_BIN`` names LiteLLM.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.e2e.servers import litellm_server
from tests.fakes.provider import ModelProvider
from tests.harness import ServiceProcess

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CHAT: Final = "gpt-5.4"
MODELS: Final[Mapping[str, str]] = {
    CHAT: "openai",
    "gpt-5.4-mini": "openai",
    "claude-sonnet-5-5": "anthropic",
    "claude-haiku-5-5": "anthropic",
    "gpt-3.5-turbo-instruct": "text-completion-openai",
    "text-embedding-3-small": "openai",
    "text-embedding-ada-002": "openai",
    "omni-moderation-latest": "openai",
    "gpt-image-1": "openai",
    "tts-1": "openai",
    "gpt-4o-mini-tts": "openai",
    "whisper-1": "openai",
    "gpt-4o-transcribe": "openai",
    "rerank": "hosted_vllm",
}
"""The models by name, and LiteLLM's provider for each."""

WILDCARDS: Final[Mapping[str, str]] = {"gpt-*": "openai", "claude-*": "anthropic", "codex-*": "openai"}
"""Families of models, for clients that name one of their own."""

MODES: Final[Mapping[str, str]] = {
    "text-embedding-3-small": "embedding",
    "text-embedding-ada-002": "embedding",
    "gpt-image-1": "image_generation",
    "tts-1": "audio_speech",
    "gpt-4o-mini-tts": "audio_speech",
    "whisper-1": "audio_transcription",
    "gpt-4o-transcribe": "audio_transcription",
    "rerank": "rerank",
}


@dataclass(frozen=True)
class World:
    """What a client must know, and what stands behind it.

    Args:
        service: The service.
        provider: Answers the models.
        token: The key for the service.
    """

    service: ServiceProcess
    provider: ModelProvider
    token: str

    @property
    def url(self) -> str:
        """The service's URL, without /v1."""
        return f"http://127.0.0.1:{self.service.port}"

    def environment(self) -> dict[str, str]:
        """The variables with which clients of both vendors need no further configuration."""
        return {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": self.token,
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_API_KEY": self.token,
        }


def litellm_config(provider_url: str) -> dict[str, Any]:
    """LiteLLM's configuration: every model asks this provider."""

    def entry(name: str, vendor: str) -> dict[str, Any]:
        # LiteLLM adds /v1 to Anthropic's base alone.
        base = provider_url if vendor == "anthropic" else f"{provider_url}/v1"
        params = {"model": f"{vendor}/{name}", "api_key": "none", "api_base": base, "max_retries": 0}
        mode = {"model_info": {"mode": MODES[name]}} if name in MODES else {}
        return {"model_name": name, "litellm_params": params, **mode}

    return {
        "model_list": [entry(*model) for model in (*MODELS.items(), *WILDCARDS.items())],
        "general_settings": {"master_key": "os.environ/LITELLM_API_KEY"},
        "router_settings": {"num_retries": 0, "disable_cooldowns": True},
        "litellm_settings": {"drop_params": False, "request_timeout": 35},
    }


@contextmanager
def running_world(folder: Path, variables: Mapping[str, str] | None = None) -> Iterator[World]:
    """Start provider, LiteLLM and the service; stop them when the block ends.

    Args:
        folder: For LiteLLM's configuration and output.
        variables: Settings of the service.
    """
    with ModelProvider() as provider:
        config = folder / "litellm.yaml"
        config.write_text(json.dumps(litellm_config(provider.url)))  # JSON is YAML
        proxy, upstream = litellm_server(folder, config)
        with (
            proxy,
            ServiceProcess(
                {
                    **upstream,
                    "DEFAULT_MODEL": CHAT,
                    # The clients' own retries are looked at, so the service makes none.
                    "RETRY_MAX": "0",
                    "BREAKER_FAILURE_THRESHOLD": "1000",
                    "JWT_TTL_S": "86400",
                    **(variables or {}),
                }
            ) as service,
        ):
            service.wait_ready()
            yield World(service, provider, service.api_key())


def _stop(*_arguments: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run until told to stop."""
    signal.signal(signal.SIGTERM, _stop)
    with (
        contextlib.suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory() as folder,
        running_world(Path(folder)) as world,
    ):
        facts = {
            "url": world.url,
            "base_url": f"{world.url}/v1",
            "key": world.token,
            "provider_url": world.provider.url,
            "service_pid": world.service.process.pid if world.service.process else None,
            "models": [*MODELS, *WILDCARDS],
        }
        print(json.dumps(facts), flush=True)  # noqa: T201 - read by whoever started it
        sys.stdin.read()


if __name__ == "__main__":
    main()
