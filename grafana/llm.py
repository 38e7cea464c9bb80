"""The dashboard "What does it cost?": calls, tokens, cost, latency, and the savings of the cache."""

from typing import Final

from grafana_foundation_sdk.models import dashboard

from grafana.panels import (
    QUARTER,
    THIRD,
    PanelText,
    Query,
    graph,
    increase,
    number,
    page,
    rate,
    traces,
    zeroed,
)
from grafana.series import SERVICE, bucket, by, label, value
from grafana.standard import MODEL
from service.telemetry import names

SERVICE_PAGE: Final = ("Are users hurting?", "/d/llmops-service?${__url_time_range}&${service:queryparam}")
DEPENDENCIES: Final = (
    "Whose fault is it?",
    "/d/llmops-dependencies?${__url_time_range}&${service:queryparam}",
)
SPENDING: Final = ("Who spends?", "/d/llmops-spending?from=now-30d&to=now")
_HIT_OR_MISS: Final = '=~"hit|miss"'
_INPUT: Final = f"llmops:gen_ai_input_tokens:rate5m{{{SERVICE}}}"
_OUTPUT: Final = f"llmops:gen_ai_output_tokens:rate5m{{{SERVICE}}}"
_DURATION: Final = f"llmops:gen_ai_duration_seconds_bucket:rate5m{{{SERVICE}}}"


def _by_scope(metric: names.Metric, function: str = "rate") -> Query:
    per_scope = f"{function}({value(metric)}[$__rate_interval])"
    return Query(zeroed(f"sum by ({by(metric, 'scope')}) ({per_scope})"), "{{scope}}")


def llm() -> dashboard.Dashboard:
    """Return the dashboard: calls, tokens, cost and latency by model, savings of the cache."""
    sums = [
        number(
            PanelText(
                "Calls",
                "Completed model calls, with cached and failed ones.",
                "this panel is never red; a drop to 0 at a busy hour is an outage in front of the service.",
            ),
            Query(zeroed(f"sum({increase(value(names.LLM_CALLS))})"), ""),
            unit="short",
            decimals=0,
            links=[SERVICE_PAGE],
        ),
        number(
            PanelText(
                "Cost",
                "The cost of the calls, as LiteLLM reports it. A model without a price costs 0.",
                "find the model in “Cost by model”, then its callers in MLflow.",
            ),
            Query(zeroed(f"sum({increase(value(names.LLM_COST))})"), ""),
            unit="currencyUSD",
            decimals=4,
            links=[SERVICE_PAGE],
        ),
        number(
            PanelText(
                "Hits of the cache",
                "The share of look-ups that found an answer. Look-ups that callers declined are left out.",
                "0 with traffic: Qdrant is down (see “Whose fault is it?”), or no request repeats.",
            ),
            Query(
                f"sum({increase(value(names.CACHE_LOOKUPS, result='hit'))})"
                f" / (sum({increase(value(names.CACHE_LOOKUPS, result=_HIT_OR_MISS))}) > 0) or on ()"
                f" vector(0)",
                "",
            ),
            unit="percentunit",
            decimals=1,
            links=[DEPENDENCIES],
        ),
        number(
            PanelText(
                "Saved",
                "The original cost of the answers that came from the cache.",
                "compare with the cost beside it: a cache that saves nothing still costs a look-up for "
                "each call.",
            ),
            Query(zeroed(f"sum({increase(value(names.CACHE_SAVED_COST))})"), ""),
            unit="currencyUSD",
            decimals=4,
            links=[DEPENDENCIES],
        ),
        number(
            PanelText(
                "Tokens saved",
                "Tokens of the answers that came from the cache.",
                "as for the hit ratio: few hits save few tokens.",
            ),
            Query(zeroed(f"sum({increase(value(names.CACHE_SAVED_TOKENS))})"), ""),
            unit="short",
            decimals=0,
            links=[DEPENDENCIES],
        ),
    ]
    calls = [
        graph(
            PanelText(
                "Calls by how they ended",
                "Model calls per second by outcome: success, cached, error, cancelled by the caller.",
                "“error”: see “Whose fault is it?”; more “cancelled”: callers do not wait, see the time to "
                "first piece.",
            ),
            [
                Query(
                    zeroed(f"sum by ({by(names.LLM_CALLS, 'outcome')}) ({rate(value(names.LLM_CALLS))})"),
                    "{{outcome}}",
                )
            ],
            unit="ops",
            stacked=True,
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        graph(
            PanelText(
                "Calls by model",
                "Model calls per second by model. Names that LiteLLM does not list count as `other`.",
                "an unexpected model: MLflow has its callers.",
            ),
            [
                Query(
                    zeroed(f"sum by ({by(names.LLM_CALLS, 'model')}) ({rate(value(names.LLM_CALLS))})"),
                    "{{model}}",
                )
            ],
            unit="ops",
            stacked=True,
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Errors by model",
                "Failed model calls per second by model and error.",
                "only one model: its provider; all models: LiteLLM or the network.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(names.LLM_CALLS, 'model', 'error.type')})"
                        f" ({rate(value(names.LLM_CALLS, outcome='error'))})"
                    ),
                    "{{model}} {{error_type}}",
                )
            ],
            unit="ops",
            width=THIRD,
            links=[DEPENDENCIES],
        ),
    ]
    money = [
        graph(
            PanelText(
                "Tokens by model: input",
                "Tokens sent to the models, per second.",
                "a jump without more calls: someone sends longer prompts.",
            ),
            [Query(zeroed(f"sum by ({label(MODEL)}) ({_INPUT})"), "{{gen_ai_request_model}}")],
            unit="short",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Tokens by model: output",
                "Tokens received from the models, per second.",
                "a jump without more calls: longer answers and a higher bill; see `max_tokens`.",
            ),
            [Query(zeroed(f"sum by ({label(MODEL)}) ({_OUTPUT})"), "{{gen_ai_request_model}}")],
            unit="short",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Cost by model",
                "Dollars per hour, by model.",
                "compare with the tokens: more tokens, or a more expensive model.",
            ),
            [
                Query(
                    zeroed(f"sum by ({by(names.LLM_COST, 'model')}) ({rate(value(names.LLM_COST))}) * 3600"),
                    "{{model}}",
                )
            ],
            unit="currencyUSD",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
    ]
    speed = [
        graph(
            PanelText(
                "Attempts by model: p95",
                "Duration of attempts by model, to the last byte.",
                "only one model: its provider is slow; all models: LiteLLM or the network to it.",
            ),
            [
                Query(
                    zeroed(f"histogram_quantile(0.95, sum by ({label(MODEL)}, le) ({_DURATION})) >= 0"),
                    "{{gen_ai_request_model}}",
                )
            ],
            unit="s",
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        graph(
            PanelText(
                "Time to first piece by model: p95",
                "Streamed calls: time from the request to the first chunk, by model.",
                "users of chats notice this most; a smaller model answers sooner.",
            ),
            [
                Query(
                    zeroed(
                        f"histogram_quantile(0.95, sum by ({by(names.LLM_FIRST_CHUNK, 'model')}, le)"
                        f" ({rate(bucket(names.LLM_FIRST_CHUNK))})) >= 0"
                    ),
                    "{{model}}",
                    exemplars=True,
                )
            ],
            unit="s",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Likeness of semantic hits",
                "Median similarity of semantic hits. Empty while the semantic cache is off.",
                "near the threshold answers may not fit: raise CACHE_SIMILARITY, or switch the semantic "
                "look-up off.",
            ),
            [
                Query(
                    zeroed(
                        f"histogram_quantile(0.5, sum by (le) ({rate(bucket(names.CACHE_SIMILARITY))})) >= 0",
                    ),
                    "median",
                )
            ],
            unit="percentunit",
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        graph(
            PanelText(
                "Saved by the cache",
                "Tokens per second of answers from the cache, by kind of look-up.",
                "a drop without fewer calls: the cache was cleared, is down, or the requests changed.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(names.CACHE_SAVED_TOKENS, 'kind')})"
                        f" ({rate(value(names.CACHE_SAVED_TOKENS))})"
                    ),
                    "{{kind}}",
                )
            ],
            unit="short",
            width=QUARTER * 2,
            links=[DEPENDENCIES],
        ),
    ]
    budgets = [
        graph(
            PanelText(
                "Calls refused by a budget",
                "Calls per second that got `BudgetExceededError`, by whose budget is spent.",
                "“Budgets” on the page “Who spends?” names it, and says when it renews.",
            ),
            [_by_scope(names.BUDGET_EXCEEDED)],
            unit="ops",
            width=THIRD,
            links=[SPENDING],
        ),
        graph(
            PanelText(
                "Budgets that came near their limit",
                "Budgets that came to 80 %, within the interval of the graph; once in each of their periods.",
                "their callers are refused soon: “Budgets” on the page “Who spends?” names them, and the "
                "event `llmops.budget.near_limit` in the log.",
            ),
            [_by_scope(names.BUDGET_NEAR_LIMIT, "increase")],
            unit="short",
            width=THIRD,
            links=[SPENDING],
        ),
        graph(
            PanelText(
                "Calls that a budget could not count",
                "Calls per second without a price, of callers with a budget in dollars: they cost that "
                "budget nothing.",
                "“By model” on the page “Who spends?” says which model; give it a price in LiteLLM's "
                "configuration.",
            ),
            [_by_scope(names.BUDGET_UNPRICED)],
            unit="ops",
            width=THIRD,
            links=[SPENDING],
        ),
    ]
    evidence = [
        traces(
            PanelText(
                "Model calls",
                "The newest traces with a model call; click an id to open one.",
                "the record in MLflow, linked in the trace's logs, has tokens, cost and user.",
            ),
            '{resource.service.name=~"$service" && span.gen_ai.operation.name != nil && kind=client}',
            links=[SERVICE_PAGE],
        )
    ]
    return page(
        "llmops-llm",
        "LLM: what does it cost?",
        "Calls, tokens, cost and latency by model, the savings of the cache, and budgets.",
        [
            ("Totals", sums),
            ("Calls", calls),
            ("Tokens and cost", money),
            ("Latency and cache", speed),
            ("Budgets", budgets),
            ("Evidence", evidence),
        ],
    )
