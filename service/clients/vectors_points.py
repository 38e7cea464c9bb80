"""Points, and the few requests about them that are made of more than a name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qdrant_client import models

from service.clients.vectors_embedded import Work

KEYWORD = models.KeywordIndexType.KEYWORD
INDEXES: Final = {
    "tenant": models.KeywordIndexParams(type=KEYWORD, is_tenant=True),
    "scope": models.PayloadSchemaType.KEYWORD,
    "model": models.PayloadSchemaType.KEYWORD,
    "expires": models.PayloadSchemaType.FLOAT,
    "created": models.PayloadSchemaType.FLOAT,
}


@dataclass(frozen=True, slots=True)
class Point:
    """A point: its id (a UUID), what it carries, its vector where its collection has any."""

    id: str
    payload: Mapping[str, Any]
    vector: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A point that was found, and how like it is (cosine, 1 for the same)."""

    id: str
    payload: Mapping[str, Any]
    score: float


def index(collection: str, name: str, schema: object) -> Work:
    """Make an index over a field of the payload."""
    return lambda client: client.create_payload_index(collection, name, field_schema=schema)


def _vector(point: Point) -> dict[str, Any] | list[float]:
    return {} if point.vector is None else list(point.vector)


def filter_of(equal: Mapping[str, str]) -> models.Filter:
    """Lets through what says exactly this."""
    return models.Filter(
        must=[
            models.FieldCondition(key=name, match=models.MatchValue(value=value))
            for name, value in equal.items()
        ]
    )


def structs(points: Sequence[Point]) -> list[models.PointStruct]:
    """The points as the client takes them."""
    return [models.PointStruct(id=p.id, payload=dict(p.payload), vector=_vector(p)) for p in points]


def upsert(collection: str, points: list[models.PointStruct]) -> Work:
    """Write points, and wait until they are written."""
    return lambda client: client.upsert(collection, points=points, wait=True)
