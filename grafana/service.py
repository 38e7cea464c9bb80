"""The dashboard "Are users hurting?", with which Grafana opens."""

from typing import Final

from grafana_foundation_sdk.models import dashboard

from grafana.objectives import AVAILABILITY, CALLS, LATENCY, NOT_SERVED, SLOW_S, WINDOW, Objective
from grafana.panels import (
    RED_FROM_ONE,
    THIRD,
    PanelText,
    Query,
    graph,
    increase,
    log_lines,
    number,
    page,
    rate,
    traces,
    zeroed,
)
from grafana.parties import FAILURES
from grafana.series import FAILED, SERVICE, bucket, by, count, value
from grafana.standard import SERVER_DURATION
from service.telemetry import names

DEPENDENCIES: Final = (
    "Whose fault is it?",
    "/d/llmops-dependencies?${__url_time_range}&${service:queryparam}",
)
MODELS: Final = ("Model by model", "/d/llmops-llm?${__url_time_range}&${service:queryparam}")
_SERVED: Final = {"http_route": f'!="", http_route!~"{NOT_SERVED}"'}
_CALLS: Final = {"http_route": f'=~"{CALLS}"', "error_type": '=""'}
# "Not ready" is an answer to a probe and not an error. A request that matches no route has no label.
_NOT_PROBES: Final = f'!~"{NOT_SERVED}"'
_FAILURES: Final = '=~"' + "|".join(FAILURES) + '"'
_WITHOUT_SIGN_IN: Final = '!="password"'
_REFUSED: Final = '!="success"'


def _share(bad: str, everything: str) -> str:
    """Return 1 minus the share of failures; 1 without requests."""
    return f"1 - (sum({increase(bad)}) or vector(0)) / (sum({increase(everything)}) > 0 or vector(1))"


def _budget_left(objective: Objective) -> str:
    recorded = f"max({objective.ratio(WINDOW)}{{{SERVICE}}})"
    return f"1 - ({recorded} or vector(0)) / {objective.budget}"


def _burn(objective: Objective, window: str) -> str:
    return zeroed(f"max({objective.ratio(window)}{{{SERVICE}}}) / {objective.budget}")


def service() -> dashboard.Dashboard:
    """Return the dashboard: objectives, traffic, latency, load."""
    served = count(SERVER_DURATION, **_SERVED)
    failed = count(SERVER_DURATION, **_SERVED, error_type=_FAILURES)
    answered = count(SERVER_DURATION, **_CALLS)
    in_time = bucket(SERVER_DURATION, **_CALLS, le=f'="{SLOW_S}"')
    call_buckets = bucket(SERVER_DURATION, http_route=f'=~"{CALLS}"')
    objectives = [
        number(
            PanelText(
                "Availability",
                "The share of requests that did not fail because of the service or the upstream. "
                f"Objective: {AVAILABILITY.target:.1%} over {WINDOW}.",
                "open “Errors by name” below, then “Whose fault is it?”.",
            ),
            Query(_share(failed, served), ""),
            unit="percentunit",
            decimals=2,
            thresholds=((None, "red"), (AVAILABILITY.target, "green")),
            links=[DEPENDENCIES],
        ),
        number(
            PanelText(
                "Availability budget left",
                f"The part of the error budget of {WINDOW} that is left; 100 % means that nothing failed.",
                "at 0 the objective is missed: stop risky changes and see which alert fired first.",
            ),
            Query(_budget_left(AVAILABILITY), ""),
            unit="percentunit",
            decimals=1,
            thresholds=((None, "red"), (0.1, "orange"), (0.5, "green")),
            links=[DEPENDENCIES],
        ),
        number(
            PanelText(
                f"Calls within {SLOW_S} s",
                f"The share of answered model calls that took at most {SLOW_S} s; a stream lasts to its "
                f"last byte. Objective: {LATENCY.target:.0%} over {WINDOW}.",
                "open an exemplar in “Latency of model calls” and see which attempt took the time.",
            ),
            Query(
                f"(sum({increase(in_time)}) or vector(0)) / (sum({increase(answered)}) > 0)"
                " or on () vector(1)",
                "",
            ),
            unit="percentunit",
            decimals=2,
            thresholds=((None, "red"), (LATENCY.target, "green")),
            links=[MODELS],
        ),
        number(
            PanelText(
                "Latency budget left",
                f"The part of the slow calls allowed in {WINDOW} that is left.",
                "as for the availability budget: stop risky changes until it recovers.",
            ),
            Query(_budget_left(LATENCY), ""),
            unit="percentunit",
            decimals=1,
            thresholds=((None, "red"), (0.1, "orange"), (0.5, "green")),
            links=[MODELS],
        ),
    ]
    traffic = [
        graph(
            PanelText(
                "Requests by status",
                "Requests per second by status code, without the health routes.",
                "a new 5xx comes from the service or the upstream, a new 4xx from a caller's release. See "
                "“Errors by name”.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(SERVER_DURATION, 'http.response.status_code')}) ({rate(served)})",
                    ),
                    "{{http_response_status_code}}",
                )
            ],
            unit="reqps",
            stacked=True,
            links=[DEPENDENCIES],
        ),
        graph(
            PanelText(
                "Errors by name",
                "Failed requests per second by the error name in the answer's body.",
                "service/errors.py lists the names, with whose fault each one is.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(SERVER_DURATION, 'error.type')})"
                        f" ({rate(count(SERVER_DURATION, error_type=FAILED, http_route=_NOT_PROBES))})"
                    ),
                    "{{error_type}}",
                )
            ],
            unit="reqps",
            links=[DEPENDENCIES],
        ),
        graph(
            PanelText(
                "Latency of model calls",
                "Time until callers have the whole answer: the median, p95 and p99. The dots are "
                "exemplars: each opens its trace.",
                f"above {SLOW_S} s the latency budget is used: open one of the highest dots and see which "
                "span is long.",
            ),
            [
                Query(
                    zeroed(f"histogram_quantile({quantile}, sum by (le) ({rate(call_buckets)})) >= 0"),
                    f"p{quantile * 100:g}",
                    exemplars=True,
                )
                for quantile in (0.5, 0.95, 0.99)
            ],
            unit="s",
            thresholds=((None, "transparent"), (SLOW_S, "red")),
            links=[MODELS],
        ),
        graph(
            PanelText(
                "Time to first piece",
                "Streamed calls: time from the request to the first chunk for the caller, retries and "
                "waits included.",
                "compare with “Model by model”: slow there too means the provider; slow only here means "
                "retries or waits.",
            ),
            [
                Query(
                    zeroed(
                        f"histogram_quantile({quantile}, sum by (le)"
                        f" ({rate(bucket(names.LLM_FIRST_CHUNK))})) >= 0"
                    ),
                    f"p{quantile * 100:g}",
                    exemplars=True,
                )
                for quantile in (0.5, 0.95)
            ],
            unit="s",
            links=[MODELS],
        ),
    ]
    pressure = [
        graph(
            PanelText(
                "Burn rate",
                "How many times faster than allowed the error budgets are used, over one hour and over "
                "five minutes. 1 uses exactly the budget in 30 days; 14.4 over an hour sends a page.",
                "both lines of an objective are high: the problem goes on. Only the 1 h line is high: it "
                "is over.",
            ),
            [
                Query(_burn(objective, window), f"{objective.name} {window}")
                for objective in (AVAILABILITY, LATENCY)
                for window in ("1h", "5m")
            ],
            unit="none",
            width=THIRD,
            thresholds=((None, "transparent"), (14.4, "red")),
            links=[DEPENDENCIES],
        ),
        graph(
            PanelText(
                "In flight, and turned away",
                "Model and login requests in progress, and rejected requests per second by reason.",
                "“overloaded”: start more processes or raise MAX_IN_FLIGHT; “rate_limited”: one caller "
                "sends too much, or RATE_LIMIT is too low; “draining”: a rollout.",
            ),
            [
                Query(zeroed(f"sum({value(names.REQUESTS_IN_FLIGHT)})"), "in flight"),
                Query(
                    zeroed(
                        f"sum by ({by(names.REQUESTS_REJECTED, 'reason')})"
                        f" ({rate(value(names.REQUESTS_REJECTED))})"
                    ),
                    "{{reason}} /s",
                ),
            ],
            unit="short",
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        graph(
            PanelText(
                "Sign-ins",
                "Logins per second by outcome.",
                "“wrong_credentials” or “rate_limited” rise: someone tries passwords, or a client has an "
                "old one; the log below has the addresses.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(names.AUTH_ATTEMPTS, 'outcome')})"
                        f" ({rate(value(names.AUTH_ATTEMPTS, method='password'))})"
                    ),
                    "{{outcome}}",
                )
            ],
            unit="reqps",
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        graph(
            PanelText(
                "Refused tokens and keys",
                "Requests per second whose token or API key was refused, by kind: invalid, expired or "
                "revoked, or unknown because the database does not answer.",
                "“invalid” rises: a client was not given the new key after a rotation, or someone guesses; "
                "“unavailable”: see “Database transactions”.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(names.AUTH_ATTEMPTS, 'method', 'outcome')})"
                        f" ({rate(value(names.AUTH_ATTEMPTS, method=_WITHOUT_SIGN_IN, outcome=_REFUSED))})"
                    ),
                    "{{method}} {{outcome}}",
                )
            ],
            unit="reqps",
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        number(
            PanelText(
                "Bugs",
                "Requests that ended with InternalError, which is always a bug in the service.",
                "open the trace or the log record below: it has the stack trace, without the callers' input.",
            ),
            Query(
                zeroed(f"sum({increase(count(SERVER_DURATION, error_type='InternalError'))})"),
                "",
            ),
            unit="short",
            decimals=0,
            thresholds=RED_FROM_ONE,
            links=[DEPENDENCIES],
        ),
    ]
    evidence = [
        traces(
            PanelText(
                "Failed and slow requests",
                f"Traces of requests that failed or took more than {SLOW_S} s. Tempo does not search the "
                "newest 30 s.",
                "open one: the span with the error has the upstream's answer; its logs and its MLflow "
                "record are linked.",
            ),
            '{resource.service.name=~"$service" && kind=server && (span.http.response.status_code >= 500'
            f" || duration > {SLOW_S}s)}}",
            links=[DEPENDENCIES],
        ),
        log_lines(
            PanelText(
                "Warnings and errors",
                "The service's log records of level WARNING and above. Open one for its fields; its trace "
                "id is a link.",
                "read from the bottom: the first failure is the oldest record.",
            ),
            '{service_name=~"$service"} | severity_number >= 13',
            links=[DEPENDENCIES],
        ),
    ]
    return page(
        "llmops-service",
        "Service: are users hurting?",
        "Objectives, traffic, latency, and the traces and logs of failures.",
        [
            ("Objectives", objectives),
            ("What callers see", traffic),
            ("Load", pressure),
            ("Evidence", evidence),
        ],
    )
