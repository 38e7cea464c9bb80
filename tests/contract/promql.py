"""What a PromQL expression reads: its series, their labels and the values asked for."""

from collections.abc import Iterator
from typing import Any

import promql_parser

CHILDREN = ("expr", "lhs", "rhs", "vector_selector", "param")


def selectors(expr: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Each selector's series and matchers (label, operator, value); ValueError for what is no PromQL."""
    yield from _walk(promql_parser.parse(expr))


def _walk(node: Any) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    if isinstance(node, promql_parser.VectorSelector):
        matchers = [(one.name, str(one.op), one.value) for one in node.matchers.matchers]
        yield node.name or "", matchers
        return
    for name in CHILDREN:
        child = getattr(node, name, None)
        if child is not None and not isinstance(child, str | float):
            yield from _walk(child)
    for child in getattr(node, "args", ()):
        yield from _walk(child)
