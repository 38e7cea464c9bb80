"""Whose fault is it? Callers, us, or what we depend on; and what the resilience layers do about it."""

from typing import Final

from grafana_foundation_sdk.models import dashboard

from grafana.panels import (
    FULL,
    RED_FROM_ONE,
    Query,
    Words,
    graph,
    increase,
    log_lines,
    number,
    page,
    rate,
    timeline,
    traces,
    zeroed,
)
from grafana.parties import PARTIES
from grafana.series import FAILED, SERVICE, bucket, by, count, label, value
from grafana.standard import CLIENT_DURATION, OPERATION, SERVER_DURATION
from service.telemetry import names

SERVICE_PAGE: Final = ("Are users hurting?", "/d/llmops-service?${__url_time_range}&${service:queryparam}")
_NOT_CACHED: Final = '!="cached"'
TELEMETRY: Final = (
    "Is the telemetry sound?",
    "/d/llmops-telemetry?${__url_time_range}&${service:queryparam}",
)


def _errors_of(party: str) -> Query:
    chosen = count(SERVER_DURATION, error_type='=~"' + "|".join(PARTIES[party]) + '"')
    return Query(zeroed(f"sum({rate(chosen)})"), party)


def dependencies() -> dashboard.Dashboard:
    """Whose fault is it: errors by party, attempts, breaker, health, cache."""
    fault = [
        graph(
            Words(
                "Whose fault",
                "Failed requests per second by whose fault they are: callers' mistakes, the upstream (an"
                " open breaker"
                " included), or us.",
                "“the upstream”: the breaker and attempts below; “us”: the log at the end of the page;"
                " “callers”: tell"
                " them, by the error's name.",
            ),
            [_errors_of(party) for party in PARTIES],
            unit="reqps",
            stacked=True,
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Attempts by what came after",
                "Attempts at the model's side per second: answered, retried, or given up, and why.",
                "“exhausted” and “deadline” reach callers; “budget” means that so many calls fail that"
                " retrying them all"
                " would only add load.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(names.RETRY_ATTEMPTS, 'outcome')})"
                        f" ({rate(value(names.RETRY_ATTEMPTS))})"
                    ),
                    "{{outcome}}",
                )
            ],
            unit="ops",
            stacked=True,
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Failed attempts by error",
                "Attempts that failed, per second, by error; a call with three failed attempts counts"
                " three times.",
                "UpstreamTimeoutError: no answer or no connection; UpstreamError: 5xx, nonsense, or our"
                " key refused;"
                " RateLimitError: the provider's limit.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(names.RETRY_ATTEMPTS, 'error.type')})"
                        f" ({rate(value(names.RETRY_ATTEMPTS, error_type=FAILED))})"
                    ),
                    "{{error_type}}",
                )
            ],
            unit="ops",
            links=[SERVICE_PAGE],
        ),
        number(
            Words(
                "Attempts per call",
                "Attempts divided by calls that ended; 1 when nothing has to be retried.",
                "above 1.2 the retry budget is about to say no: find out what fails in “Failed attempts by"
                " error”.",
            ),
            Query(
                f"sum({increase(value(names.RETRY_ATTEMPTS))})"
                f" / (sum({increase(value(names.LLM_CALLS, outcome=_NOT_CACHED))}) > 0) or on () vector(1)",
                "",
            ),
            unit="none",
            decimals=2,
            thresholds=((None, "green"), (1.1, "orange"), (1.2, "red")),
            links=[SERVICE_PAGE],
        ),
        number(
            Words(
                "Turned away by the breaker",
                "Attempts that an open breaker answered at once.",
                "each is a caller who got CircuitOpenError; the timeline below shows since when.",
            ),
            Query(zeroed(f"sum({increase(value(names.BREAKER_REJECTIONS))})"), ""),
            unit="short",
            decimals=0,
            thresholds=RED_FROM_ONE,
            links=[SERVICE_PAGE],
        ),
    ]
    breaker = by(names.BREAKER_STATE, "breaker")
    state_open = value(names.BREAKER_STATE, state="open")
    half_open = value(names.BREAKER_STATE, state="half_open")
    states = [
        timeline(
            Words(
                "Breakers",
                "Each breaker's state, that of the worst process: closed, half open (one call tries), open.",
                "open: what is behind it fails five times in a row; look at its health below, then at its"
                " own logs.",
            ),
            Query(
                f"max by ({breaker}) (2 * {state_open} + ignoring (state) {half_open})",
                "{{breaker}}",
            ),
            [(0, "closed", "green"), (1, "half open", "orange"), (2, "open", "red")],
            links=[SERVICE_PAGE],
        ),
        timeline(
            Words(
                "Dependencies",
                "What the background checks found, that of the worst process.",
                "litellm: no call works; qdrant: calls work without a cache; mlflow: records wait on disk.",
            ),
            Query(
                f"min by ({by(names.HEALTH_STATUS, 'dependency')}) ({value(names.HEALTH_STATUS)})",
                "{{dependency}}",
            ),
            [(0, "down", "red"), (1, "up", "green")],
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Changes of the breakers",
                "How often each breaker changed to a state, within the window of the graph.",
                "a breaker that opens and closes all the time has a flapping upstream behind it, or a"
                " threshold that"
                " is too low.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(names.BREAKER_TRANSITIONS, 'breaker', 'to')})"
                        f" (increase({value(names.BREAKER_TRANSITIONS)}[$__rate_interval]))"
                    ),
                    "{{breaker}} → {{to}}",
                )
            ],
            unit="short",
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Health checks",
                "How long checks take (p95), and how old the oldest result is.",
                "a check near HEALTH_TIMEOUT_S is about to fail; an age above HEALTH_TTL_S means that"
                " nobody checks.",
            ),
            [
                Query(
                    zeroed(
                        f"histogram_quantile(0.95, sum by"
                        f" ({by(names.HEALTH_CHECK_DURATION, 'dependency')}, le)"
                        f" ({rate(bucket(names.HEALTH_CHECK_DURATION))})) >= 0"
                    ),
                    "{{dependency}} p95",
                ),
                Query(
                    zeroed(f"max by ({by(names.HEALTH_AGE, 'dependency')}) ({value(names.HEALTH_AGE)})"),
                    "{{dependency}} age",
                ),
            ],
            unit="s",
            links=[TELEMETRY],
        ),
    ]
    behind = [
        graph(
            Words(
                "Attempts at the model: p95",
                "How long single attempts take, failed ones included, by operation.",
                "slow here is slow at LiteLLM or the provider: the trace goes on in LiteLLM's own spans.",
            ),
            [
                Query(
                    zeroed(
                        f"histogram_quantile(0.95, sum by ({label(OPERATION)}, le)"
                        f" (llmops:gen_ai_duration_seconds_bucket:rate5m{{{SERVICE}}})) >= 0"
                    ),
                    "{{gen_ai_operation_name}}",
                )
            ],
            unit="s",
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "HTTP behind us",
                "Requests to LiteLLM and Qdrant that were answered, per second, by host and status.",
                "a status of LiteLLM's that callers do not see was retried; 401 and 403 mean that our key"
                " is refused.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(CLIENT_DURATION, 'server.address', 'http.response.status_code')})"
                        f" ({rate(count(CLIENT_DURATION))})"
                    ),
                    "{{server_address}} {{http_response_status_code}}",
                )
            ],
            unit="reqps",
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Cache look-ups",
                "Look-ups per second by how they ended. An error is no failed call: the model is asked"
                " instead.",
                "“error”: look at qdrant above; fewer hits after a release: the key changed.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(names.CACHE_LOOKUPS, 'kind', 'result')})"
                        f" ({rate(value(names.CACHE_LOOKUPS))})",
                    ),
                    "{{kind}} {{result}}",
                )
            ],
            unit="ops",
            links=[("What it saves", "/d/llmops-llm?${__url_time_range}&${service:queryparam}")],
        ),
        graph(
            Words(
                "Cache look-up time",
                "How long look-ups take (p95), by kind.",
                "every call pays this first: near QDRANT_TIMEOUT_S the cache costs more than it saves.",
            ),
            [
                Query(
                    zeroed(
                        f"histogram_quantile(0.95, sum by ({by(names.CACHE_LOOKUP_DURATION, 'kind')}, le)"
                        f" ({rate(bucket(names.CACHE_LOOKUP_DURATION))})) >= 0"
                    ),
                    "{{kind}}",
                )
            ],
            unit="s",
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Cache writes",
                "Answers on their way into the store, per second: stored, dropped because too many waited,"
                " or failed.",
                "“failed”: look at qdrant above; “dropped”: the store is slower than the answers come.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(names.CACHE_WRITES, 'outcome')}) ({rate(value(names.CACHE_WRITES))})"
                    ),
                    "{{outcome}}",
                )
            ],
            unit="ops",
            links=[SERVICE_PAGE],
        ),
    ]
    evidence = [
        traces(
            Words(
                "Retried, or touched by the breaker",
                "Traces with a retry or breaker event; all of them are kept.",
                "open one: each attempt is a span, and the events between them say why the next came.",
            ),
            '{resource.service.name=~"$service" && event:name=~"llmops\\\\.(retry|circuit_breaker)\\\\..*"}',
            width=FULL,
            links=[SERVICE_PAGE],
        ),
        log_lines(
            Words(
                "What the resilience layers said",
                "Retries, breaker and health changes in the order in which they happened.",
                "find the first `llmops.health.changed` or `state_changed`: what came after follows from it.",
            ),
            '{service_name=~"$service"}'
            ' | event_name=~"llmops\\\\.(retry|circuit_breaker|health|cache)\\\\..*"',
            links=[SERVICE_PAGE],
        ),
    ]
    return page(
        "llmops-dependencies",
        "Dependencies & resilience: whose fault is it?",
        "Errors by whose fault they are; attempts, breakers, health, and what is behind the service.",
        [
            ("Whose fault", fault),
            ("State", states),
            ("Behind us", behind),
            ("Evidence", evidence),
        ],
    )
