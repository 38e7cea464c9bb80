"""The upstream of an attacked service: what it does depends on the request, so that callers do not mix."""

import json
from collections.abc import Mapping
from typing import Any, Final

from tests.fakes.streams import EndlessStream
from tests.fakes.upstream import Answer, Behaviour, Embeddings, FakeUpstream, Silent, Status, Stream
from tests.fakes.wire import Exchange

LITELLM_SAYS = "litellm.BadRequestError: OpenAIException - Invalid type for 'messages[0].content'"
REASON: Final = "".join(f"{number:03}é" for number in range(75))
"""300 characters, none of which a model's name or a secret would have."""

INPUTS = 1_947
DIMENSIONS = 768


def large_embeddings() -> bytes:
    """Return OpenAI's answer to so many inputs, of about 30 MB."""
    vector = [(-1) ** at * (at + 1) / 7919 for at in range(DIMENSIONS)]
    vectors = [{"object": "embedding", "index": at, "embedding": vector} for at in range(INPUTS)]
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    return json.dumps({"object": "list", "model": "large", "data": vectors, "usage": usage}).encode()


def error(status: int, message: str) -> Status:
    """Return LiteLLM's answer to a request that failed."""
    return Status(status, {"error": {"message": message, "type": "None", "param": None, "code": str(status)}})


CHATS: Final[Mapping[str, Behaviour]] = {
    "broken": Status(500),
    "timing-out": Status(408),
    "refusing-as-500": error(500, LITELLM_SAYS),
    "refusing": error(400, REASON),
    "silent": Silent(),
    "endless": EndlessStream(content="x" * 10_000),
    "slow": Answer(delay_s=1.0),
    "costs-1e9": Answer(cost="1e9"),
    "costs-negative": Answer(cost="-1"),
    "costs-nan": Answer(cost="nan"),
    "counts-1e30": Answer(prompt_tokens=10**30),
}
"""What each model does; any other answers, in a stream where it is asked to."""


class _ByModel:
    """Does what the model of the request does."""

    async def play(self, exchange: Exchange) -> None:
        asked: dict[str, Any] = exchange.request.json
        behaviour = CHATS.get(str(asked.get("model")))
        if behaviour is None:
            behaviour = Stream() if asked.get("stream") else Answer()
        await behaviour.play(exchange)


class _EmbeddingsByModel:
    """Answers with small vectors, or with large ones from the model ``large``."""

    def __init__(self) -> None:
        self._large = Status(200, large_embeddings())

    async def play(self, exchange: Exchange) -> None:
        large = exchange.request.json.get("model") == "large"
        await (self._large if large else Embeddings()).play(exchange)


class AttackedUpstream(FakeUpstream):
    """A LiteLLM whose models each do one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.default = _ByModel()
        self.embeddings_behaviour = _EmbeddingsByModel()
        self.unknown_model_error = False
        self.models = ["demo", "large", "listed", *CHATS]
