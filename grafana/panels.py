"""The kinds of panels. Each has a unit, a description with what to do when red, and 0 instead of no data.

Datasources are named by the uids in `provisioning/datasources/`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import (
    logs,
    loki,
    prometheus,
    stat,
    statetimeline,
    table,
    tempo,
    timeseries,
)
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.tempo import SearchTableType

PROMETHEUS: Final = common.DataSourceRef(type_val="prometheus", uid="prometheus")
TEMPO: Final = common.DataSourceRef(type_val="tempo", uid="tempo")
LOKI: Final = common.DataSourceRef(type_val="loki", uid="loki")

HALF, THIRD, QUARTER, FULL = 12, 8, 6, 24
TALL, LOW = 8, 4

Links = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Query:
    """One PromQL query, and the legend of its series."""

    expr: str
    legend: str
    exemplars: bool = False


@dataclass(frozen=True)
class PanelText:
    """A panel's title, what it shows, and what to do when it is red."""

    title: str
    shows: str
    when_red: str

    @property
    def description(self) -> str:
        """The text behind the panel's (i)."""
        return f"{self.shows}\n\n**When it is red:** {self.when_red}"


def zeroed(expr: str) -> str:
    """Return a query that yields 0 instead of no series, so that panels of a new system are not empty."""
    return f"{expr} or on () vector(0)"


def rate(selector: str) -> str:
    """Return the rate per second, over the window that Grafana chooses."""
    return f"rate({selector}[$__rate_interval])"


def increase(selector: str) -> str:
    """Return the increase over the time range of the dashboard."""
    return f"increase({selector}[$__range])"


def steps(*values: tuple[float | None, str]) -> builders.ThresholdsConfig:
    """Return thresholds; each colour applies from its value upwards."""
    return (
        builders.ThresholdsConfig()
        .mode(dashboard.ThresholdsMode.ABSOLUTE)
        .steps([dashboard.Threshold(value=value, color=color) for value, color in values])
    )


RED_FROM_ONE: Final = ((None, "green"), (0.000001, "red"))
ALWAYS_BLUE: Final = ((None, "blue"),)


def _targets(queries: Sequence[Query], *, instant: bool) -> list[Any]:
    built = []
    for number, query in enumerate(queries):
        target = (
            prometheus.Dataquery()
            .datasource(PROMETHEUS)
            .ref_id(chr(ord("A") + number))
            .expr(query.expr)
            .legend_format(query.legend)
            .exemplar(query.exemplars)
        )
        built.append(target.instant() if instant else target.range())
    return built


def _links(links: Links) -> list[Any]:
    return [builders.DashboardLink(title).url(url).target_blank(target_blank=False) for title, url in links]


def _labelled(panel: Any, text: PanelText, links: Links, width: int, height: int) -> Any:  # noqa: ANN401 - each kind of panel has its own builder
    return (
        panel.title(text.title).description(text.description).span(width).height(height).links(_links(links))
    )


def number(
    text: PanelText,
    query: Query,
    *,
    unit: str,
    thresholds: Sequence[tuple[float | None, str]] = ALWAYS_BLUE,
    decimals: int | None = None,
    width: int = QUARTER,
    links: Links = (),
) -> stat.Panel:
    """Return a panel with one number over the time range of the dashboard."""
    panel: stat.Panel = _labelled(stat.Panel(), text, links, width, LOW)
    panel = (
        panel.datasource(PROMETHEUS)
        .targets(_targets([query], instant=True))
        .unit(unit)
        .no_value("0")
        .thresholds(steps(*thresholds))
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.NONE)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]).values(values=False))
    )
    return panel if decimals is None else panel.decimals(decimals)


def graph(
    text: PanelText,
    queries: Sequence[Query],
    *,
    unit: str,
    width: int = HALF,
    stacked: bool = False,
    thresholds: Sequence[tuple[float | None, str]] = (),
    links: Links = (),
) -> timeseries.Panel:
    """Return a panel with lines over time."""
    panel: timeseries.Panel = _labelled(timeseries.Panel(), text, links, width, TALL)
    panel = (
        panel.datasource(PROMETHEUS)
        .targets(_targets(queries, instant=False))
        .unit(unit)
        .no_value("0")
        .min(0)
        .fill_opacity(20 if stacked else 5)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(show_legend=True)
            .placement(common.LegendPlacement.BOTTOM)
            .display_mode(common.LegendDisplayMode.TABLE)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    )
    if stacked:
        panel = panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    if thresholds:
        panel = panel.thresholds(steps(*thresholds)).thresholds_style(
            common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.LINE)
        )
    return panel


def timeline(
    text: PanelText,
    query: Query,
    states: Sequence[tuple[int, str, str]],
    *,
    width: int = HALF,
    links: Links = (),
) -> statetimeline.Panel:
    """Return a panel with states over time; each state is a value, its name and its colour."""
    panel: statetimeline.Panel = _labelled(statetimeline.Panel(), text, links, width, TALL)
    mapping = dashboard.ValueMap(
        options={
            str(value): dashboard.ValueMappingResult(text=text, color=color, index=index)
            for index, (value, text, color) in enumerate(states)
        }
    )
    return (
        panel.datasource(PROMETHEUS)
        .targets(_targets([query], instant=False))
        .unit("none")
        .no_value("0")
        .mappings([mapping])
        .merge_values(merge_values=True)
        .show_value(common.VisibilityMode.NEVER)
    )


def log_lines(text: PanelText, expr: str, *, width: int = FULL, links: Links = ()) -> logs.Panel:
    """Return a panel with log records from Loki, newest first."""
    panel: logs.Panel = _labelled(logs.Panel(), text, links, width, TALL)
    target = loki.Dataquery().datasource(LOKI).ref_id("A").expr(expr).max_lines(100)
    return (
        panel.datasource(LOKI)
        .with_target(target)
        .show_time(show_time=True)
        .enable_log_details(enable_log_details=True)
        .sort_order(common.LogsSortOrder.DESCENDING)
    )


def traces(text: PanelText, query: str, *, width: int = FULL, links: Links = ()) -> table.Panel:
    """Return a panel with traces from Tempo; a click on an id opens the trace."""
    panel: table.Panel = _labelled(table.Panel(), text, links, width, TALL)
    target = (
        tempo.Dataquery()
        .datasource(TEMPO)
        .ref_id("A")
        .query_type("traceql")
        .query(query)
        .limit(20)
        .table_type(SearchTableType.TRACES)
    )
    return panel.datasource(TEMPO).with_target(target)


Section = tuple[str, Sequence[Any]]


def page(uid: str, title: str, description: str, sections: Sequence[Section]) -> dashboard.Dashboard:
    """Return a dashboard of panels in sections, with links to the other dashboards."""
    board = (
        builders.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["llmops"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .readonly()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .link(
            builders.DashboardLink("Other dashboards")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags(["llmops"])
            .include_vars(include_vars=True)
            .keep_time(keep_time=True)
        )
        .with_variable(
            builders.QueryVariable("service")
            .label("Service")
            .datasource(PROMETHEUS)
            .query("label_values(llmops_requests_in_flight, service_name)")
            .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
            .multi(multi=True)
            .include_all(include_all=True)
            .all_value(".+")
            .current(dashboard.VariableOption(text="All", value="$__all", selected=True))
        )
    )
    for name, panels in sections:
        board = board.with_row(builders.Row(name))
        for panel in panels:
            board = board.with_panel(panel)
    return board.build()


Board = Callable[[], dashboard.Dashboard]
