"""The dashboard "Whose fault is it?": errors by responsible party, and what retries and breakers do."""

from typing import Final

from grafana_foundation_sdk.models import dashboard

from grafana.panels import (
    FULL,
    RED_FROM_ONE,
    PanelText,
    Query,
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
    """Return the dashboard: errors by party, attempts, breakers, health, cache."""
    fault = [
        graph(
            PanelText(
                "Whose fault",
                "Failed requests per second by responsible party: callers, the upstream (an open breaker "
                "included), or the service (“us”).",
                "“the upstream”: see the breaker and the attempts below; “us”: see the log at the end of "
                "the page; “callers”: tell them the error's name.",
            ),
            [_errors_of(party) for party in PARTIES],
            unit="reqps",
            stacked=True,
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Attempts by what came after",
                "Attempts at the upstream per second by outcome: answered, retried, or given up with the "
                "reason.",
                "“exhausted” and “deadline” reach callers; “budget” means that so many calls fail that "
                "retrying all of them would only add load.",
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
            PanelText(
                "Failed attempts by error",
                "Failed attempts per second by error. A call with three failed attempts counts three times.",
                "UpstreamTimeoutError: no answer or no connection; UpstreamError: a 5xx, an invalid "
                "answer, or our key is refused; RateLimitError: the provider's limit.",
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
            PanelText(
                "Attempts per call",
                "Attempts divided by completed calls; 1 means that nothing is retried.",
                "above 1.2 the retry budget is nearly used up: see “Failed attempts by error”.",
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
            PanelText(
                "Turned away by the breaker",
                "Attempts that an open breaker rejected immediately.",
                "each one is a caller who got CircuitOpenError; the timeline below shows since when.",
            ),
            Query(zeroed(f"sum({increase(value(names.BREAKER_REJECTIONS))})"), ""),
            unit="short",
            decimals=0,
            thresholds=RED_FROM_ONE,
            links=[SERVICE_PAGE],
        ),
    ]
    breaker = by(names.BREAKER_STATE, "breaker", "model")
    state_open = value(names.BREAKER_STATE, state="open")
    half_open = value(names.BREAKER_STATE, state="half_open")
    states = [
        timeline(
            PanelText(
                "Breakers",
                "The state of each breaker, in the worst process: closed, half-open (one probe), open. "
                "“litellm” is the connection for all models; “model” is one model, for everybody.",
                "an open breaker's dependency failed several times in a row: look at its health below, "
                "then at its logs.",
            ),
            Query(
                f"max by ({breaker}) (2 * {state_open} + ignoring (state) {half_open})",
                "{{breaker}} {{model}}",
            ),
            [(0, "closed", "green"), (1, "half open", "orange"), (2, "open", "red")],
            links=[SERVICE_PAGE],
        ),
        timeline(
            PanelText(
                "Dependencies",
                "The result of the background health checks, in the worst process.",
                "litellm: no call works; qdrant: calls work without the cache; mlflow: records wait on disk.",
            ),
            Query(
                f"min by ({by(names.HEALTH_STATUS, 'dependency')}) ({value(names.HEALTH_STATUS)})",
                "{{dependency}}",
            ),
            [(0, "down", "red"), (1, "up", "green")],
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Changes of the breakers",
                "State changes of each breaker, within the interval of the graph.",
                "a breaker that opens and closes all the time has an unstable upstream, or a threshold "
                "that is too low.",
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
            PanelText(
                "Callers turned away from a model",
                "Callers whose own circuit for the model is open, because their calls kept failing.",
                "one caller: look at what they send; two at the same time open the model's circuit for "
                "everybody.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(names.BREAKER_OPEN_CALLERS, 'model')})"
                        f" ({value(names.BREAKER_OPEN_CALLERS)})"
                    ),
                    "{{model}}",
                )
            ],
            unit="short",
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Health checks",
                "Duration of the checks (p95), and the age of the oldest result.",
                "a check near HEALTH_TIMEOUT_S is about to fail; an age above HEALTH_TTL_S means that the "
                "checks do not run.",
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
            PanelText(
                "Attempts at the model: p95",
                "Duration of single attempts, failed ones included, by operation.",
                "LiteLLM or the provider is slow: LiteLLM's own spans in the trace show which.",
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
            PanelText(
                "HTTP behind us",
                "Answered requests to LiteLLM and Qdrant per second, by host and status code.",
                "a status of LiteLLM that callers do not see was retried; 401 and 403 mean that our key is "
                "refused.",
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
            PanelText(
                "Cache look-ups",
                "Cache look-ups per second by result. An error does not fail the call: the model is called "
                "instead.",
                "“error”: see qdrant above; fewer hits after a release: the cache key changed.",
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
            PanelText(
                "Cache look-up time",
                "Duration of look-ups (p95), by kind.",
                "every call waits for its look-up: near CACHE_TIMEOUT_S the cache costs more than it saves.",
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
            PanelText(
                "Cache writes",
                "Writes to the store per second: stored, dropped because the queue was full, or failed.",
                "“failed”: see qdrant above; “dropped”: the store is slower than the rate of new answers.",
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
    database = by(names.IDENTITY_STORE_DURATION, "operation", "outcome")
    database_time = by(names.IDENTITY_STORE_DURATION, "operation")
    shared = by(names.SHARED_OPERATION_DURATION, "operation", "outcome")
    news = by(names.SHARED_NEWS, "topic", "outcome")
    leases = by(names.SHARED_LEASES, "outcome")
    behind += [
        graph(
            PanelText(
                "Database transactions",
                "Transactions in the SQL database per second, by operation and outcome. One that fails does "
                "not fail a call; the owners of stored responses wait in memory.",
                "“error”: the event `llmops.identity.store.failed` in the log below has the reason.",
            ),
            [
                Query(
                    zeroed(f"sum by ({database}) ({rate(count(names.IDENTITY_STORE_DURATION))})"),
                    "{{operation}} {{outcome}}",
                )
            ],
            unit="ops",
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Database time",
                "Duration of transactions (p95), including the wait for a thread, by operation.",
                "each response waits for its “keep”: a slow disk, a locked file, or a PostgreSQL server far "
                "away.",
            ),
            [
                Query(
                    zeroed(
                        f"histogram_quantile(0.95, sum by ({database_time}, le)"
                        f" ({rate(bucket(names.IDENTITY_STORE_DURATION))})) >= 0"
                    ),
                    "{{operation}}",
                )
            ],
            unit="s",
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Processes that count by themselves",
                "Processes that count rates and failed sign-ins in their own memory, because Valkey cannot "
                "be had. Always 0 without `VALKEY_URL`.",
                "each of them allows what all together should: the event `llmops.shared.fallback.started` in "
                "the log below has the reason.",
            ),
            [Query(zeroed(f"sum({value(names.SHARED_FALLBACK)})"), "processes")],
            unit="short",
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Wait for Valkey",
                "Time that requests waited for Valkey (p95), by operation and outcome. `VALKEY_TIMEOUT_S` "
                "limits it.",
                "“error” near the limit: the server is slow or far away; near 0: it refuses.",
            ),
            [
                Query(
                    zeroed(
                        f"histogram_quantile(0.95, sum by ({shared}, le)"
                        f" ({rate(bucket(names.SHARED_OPERATION_DURATION))})) >= 0"
                    ),
                    "{{operation}} {{outcome}}",
                )
            ],
            unit="s",
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "News between replicas",
                "Sign-outs, clearings of the cache, circuits and what calls have spent of budgets, which "
                "processes told each other over Valkey, and what was dropped because too much waited. Always "
                "0 without `VALKEY_URL`.",
                "“heard” is “told” times the other processes; less for long: one of them does not read. "
                "“dropped”: Valkey was away for too long, and the others do not know of it; what was spent "
                "they read in the database. “unusable”: somebody else writes to Valkey, or two versions run.",
            ),
            [
                Query(
                    zeroed(f"sum by ({news}) ({rate(value(names.SHARED_NEWS))})"),
                    "{{topic}} {{outcome}}",
                )
            ],
            unit="ops",
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Equal calls over replicas",
                "Calls that replicas may share, by what the lease came to: made here (leader), made here "
                "after another replica gave no answer (taken_over), answered by another one (follower), or "
                "made here as Valkey did not say (none). Always 0 without `VALKEY_URL`.",
                "“taken_over” for long: replicas are killed in their calls, or their calls fail. “none”: "
                "Valkey is away or slow, and each replica asks the model itself.",
            ),
            [
                Query(
                    zeroed(f"sum by ({leases}) ({rate(value(names.SHARED_LEASES))})"),
                    "{{outcome}}",
                )
            ],
            unit="ops",
            links=[SERVICE_PAGE],
        ),
    ]
    evidence = [
        traces(
            PanelText(
                "Retried, or touched by the breaker",
                "Traces with a retry or breaker event. The collector keeps all of them.",
                "open one: each attempt is a span, and the events between them give the reason for the "
                "next attempt.",
            ),
            '{resource.service.name=~"$service" && event:name=~"llmops\\\\.(retry|circuit_breaker)\\\\..*"}',
            width=FULL,
            links=[SERVICE_PAGE],
        ),
        log_lines(
            PanelText(
                "What the resilience layers said",
                "Log records of retries, breaker and health changes, cache and database, newest first.",
                "find the first `llmops.health.changed` or `state_changed`: later events follow from it.",
            ),
            '{service_name=~"$service"}'
            ' | event_name=~"llmops\\\\.(retry|circuit_breaker|health|cache|identity)\\\\..*"',
            links=[SERVICE_PAGE],
        ),
    ]
    return page(
        "llmops-dependencies",
        "Dependencies & resilience: whose fault is it?",
        "Errors by responsible party, attempts, breakers, health, and the services behind this one.",
        [
            ("Whose fault", fault),
            ("State", states),
            ("LiteLLM, cache and database", behind),
            ("Evidence", evidence),
        ],
    )
