"""Which requests are recorded: what ``OTEL_TRACES_SAMPLER`` says, whatever the caller wishes."""

from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.semconv.attributes.url_attributes import URL_PATH
from opentelemetry.trace import Link, SpanKind, TraceState
from opentelemetry.util.types import Attributes

from service.config.settings import Settings

PROBES = frozenset({"/health", "/health/detailed"})


class ExceptProbes(Sampler):
    """Leaves out the server spans of the health routes, and decides like another sampler on the rest.

    Probes come every few seconds and say nothing; unrecorded they cost little and keep their header.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def should_sample(  # noqa: PLR0913, PLR0917 - the SDK's interface
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """The decision for one span that is about to start."""
        if kind is SpanKind.SERVER and attributes and attributes.get(URL_PATH) in PROBES:
            return SamplingResult(Decision.DROP, None, trace_state)
        return self._sampler.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        """What the sampler calls itself."""
        return f"ExceptProbes({self._sampler.get_description()})"


def sampler_from(settings: Settings) -> Sampler:
    """The sampler that the standard settings name.

    A remote parent's flag is not obeyed: both branches sample as a root would, or a caller could switch the
    recording of their own requests off. A local parent's decision is followed.
    """
    if settings.otel_sdk_disabled:
        return ALWAYS_OFF
    chosen = settings.otel_traces_sampler.removeprefix("parentbased_")
    root: Sampler = {
        "always_on": ALWAYS_ON,
        "always_off": ALWAYS_OFF,
        "traceidratio": TraceIdRatioBased(settings.otel_traces_sampler_arg),
    }[chosen]
    return ExceptProbes(ParentBased(root, remote_parent_sampled=root, remote_parent_not_sampled=root))
