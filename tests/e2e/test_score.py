"""The request matrix on real processes: everything is declared, and the Instrumentation Score is 100."""

import pytest

from tests.score.__main__ import report
from tests.score.declared import Comparison
from tests.score.matrix import play

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NOT_MADE_TO_HAPPEN = {
    "event llmops.identity.store.failed",
    "event llmops.identity.store.recovered",
    "attribute writes",
    "attribute llmops.upstream.code",
    "attribute step",
    "attribute gen_ai.conversation.id",
    "attribute place",
    "attribute problem",
    "attribute exception.message",
    "attribute k8s.cluster.name",
}
"""What takes a database that fails, an odd answer of the upstream, or a step that hangs."""


def test_everything_that_is_seen_is_declared_and_the_score_is_100() -> None:
    capture = play()
    text, good = report(capture)
    assert good, text
    # A new declaration is seen in the matrix, or is said here to be seen elsewhere.
    assert set(Comparison(capture).unseen) <= NOT_MADE_TO_HAPPEN
