"""Plots as SVG in metadata: one function a plot, plain figures in, a figure out, and `svg` to show it.

matplotlib is imported inside functions: importing it costs a second, and loading the code location needs none of it. A
figure belongs to nobody's global state: no pyplot. A plot is for the metadata of one partition, never of a range: what
a range run returns is copied into the event of each partition. What is drawn is bounded, and so is its size.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg

from render_platform.clock import HOUR_US, US_PER_SECOND, WINDOW_US

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#767b84"
"""Of text and lines: at least 4 to 1 on white and on the dark theme's ground, which both shine through."""
MOST = 8
"""Models, or devices, of one plot."""
HOURS = range(24)
LONGEST_NAME = 24
NS_PER_SECOND = 1_000_000_000
TARGET_PERCENT = 70
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text as text: small, and drawn by the browser
    "svg.hashsalt": "render-platform",  # the same figures give the same bytes
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
}


def svg(figure: Figure) -> dg.MarkdownMetadataValue:
    """The figure as an image in Markdown, readable on a light and on a dark ground. The figure is used up."""
    import matplotlib as mpl
    from matplotlib.text import Text

    for axes in figure.axes:
        axes.tick_params(colors=INK, which="both")
        axes.set_facecolor("none")
        for spine in axes.spines.values():
            spine.set_color(INK)
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_color(INK)
    figure.patch.set_visible(False)
    title = re.sub(r"[^\w ]", "", figure.axes[0].get_title()) if figure.axes else ""
    out = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    figure.clear()
    data = base64.b64encode(re.sub(rb">\s+<", b"><", out.getvalue())).decode()
    return dg.MarkdownMetadataValue(f"![{title or 'plot'}](data:image/svg+xml;base64,{data})")


def new_axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """A figure of the usual size, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    _label(axes, x_label, y_label)
    return figure, axes


def gpu_seconds_by_model(used: Mapping[tuple[str, int], int]) -> Figure:
    """GPU ns by (model, hour of the day), one upon the other; all but the largest models are one."""
    figure, axes = new_axes("GPU seconds by model", "hour, UTC", "GPU seconds")
    shown = _series(used, rest="others")
    if shown:
        seconds = [[by_hour[hour] / NS_PER_SECOND for hour in HOURS] for by_hour in shown.values()]
        steps = [[*one, one[-1]] for one in seconds]  # the last hour has a width too
        axes.stackplot(range(len(HOURS) + 1), steps, labels=[_short(name) for name in shown], step="post")
    _whole_day(axes)
    _legend(axes)
    return figure


def deltas(points: Sequence[tuple[int, int, int]]) -> Figure:
    """Slow minus fast: (µs since the day's begin, events, GPU ns) of each window that a report is of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    drawn = with_gaps(points)
    hours = [at_us / HOUR_US for at_us, _, _ in drawn]
    for axes, values in (
        (above, [events for _, events, _ in drawn]),
        (below, [gpu_time_ns / NS_PER_SECOND for _, _, gpu_time_ns in drawn]),
    ):
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.plot(hours, values, linewidth=1)
    above.set_title("Slow path minus fast path, by five minutes")
    _label(above, "", "events")
    _label(below, "hour, UTC", "GPU seconds")
    _whole_day(below)
    return figure


def with_gaps(points: Sequence[tuple[int, int, int]]) -> list[tuple[float, float, float]]:
    """The points, each window to its end; nothing is drawn over a window that no report is of."""
    drawn: list[tuple[float, float, float]] = []
    for at_us, events, gpu_time_ns in points:
        if drawn and drawn[-1][0] < at_us:
            drawn.append((drawn[-1][0], math.nan, math.nan))
        elif drawn:
            drawn.pop()
        drawn += [(at_us, events, gpu_time_ns), (at_us + WINDOW_US, events, gpu_time_ns)]
    return drawn


def latency(quantiles: Sequence[tuple[str, int, int, int]]) -> Figure:
    """Time from request to answer: (model, p50, p90, p99) in µs, as many models as fit, the first on top."""
    figure, axes = new_axes("Latency by model", "seconds from request to answer", "")
    shown = list(quantiles[:MOST])[::-1]
    places = range(len(shown))
    for number, (label, marker) in enumerate((("p50", "o"), ("p90", "s"), ("p99", "D"))):
        axes.plot([max(one[1:][number], 1) / US_PER_SECOND for one in shown], places, marker, label=label)
    axes.set_yticks(list(places), [_short(name) for name, *_ in shown])
    axes.set_xscale("log")
    axes.margins(y=0.2)
    _legend(axes)
    return figure


def utilisation(used: Mapping[tuple[str, int], int]) -> Figure:
    """GPU ns by (device, hour of the day) as percent of the hour; the busiest devices."""
    figure, axes = new_axes("Utilisation by device", "hour, UTC", "% of the hour")
    for device, by_hour in _series(used, rest="").items():
        percent = [by_hour[hour] * 100 / (HOUR_US * 1_000) for hour in HOURS]
        axes.step(range(len(HOURS) + 1), [*percent, percent[-1]], where="post", linewidth=1.2, label=_short(device))
    axes.axhline(TARGET_PERCENT, color=INK, linewidth=0.8, linestyle="--")
    _whole_day(axes)
    _legend(axes)
    return figure


def windows(verdicts: Sequence[tuple[str, int, int]]) -> Figure:
    """An hour's events on both paths: (begin as HH:MM, slow, fast) of each window."""
    figure, axes = new_axes("Events by window", "window, UTC", "events")
    places = range(len(verdicts))
    for shift, label, values in (
        (-0.2, "slow path", [slow for _, slow, _ in verdicts]),
        (0.2, "fast path", [fast for _, _, fast in verdicts]),
    ):
        axes.bar([place + shift for place in places], values, width=0.4, label=label)
    axes.set_xticks(list(places), [begin for begin, _, _ in verdicts])
    _legend(axes)
    return figure


def _label(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _whole_day(axes: Axes) -> None:
    axes.set_xlim(0, len(HOURS))
    axes.set_xticks(range(0, len(HOURS) + 1, 3))


def _short(name: str) -> str:
    """A legend that is wider than the plot leaves no room for it."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _legend(axes: Axes) -> None:
    """Beside the plot; none where nothing is drawn."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")


def _series(used: Mapping[tuple[str, int], int], rest: str) -> dict[str, dict[int, int]]:
    """By name and hour, the largest first; what is more than MOST is added up as `rest`, or left out."""
    found: dict[str, dict[int, int]] = defaultdict(lambda: dict.fromkeys(HOURS, 0))
    for (name, hour), ns in used.items():
        found[name][hour] += ns
    names = sorted(found, key=lambda name: (-sum(found[name].values()), name))
    shown = {name: found[name] for name in names[:MOST]}
    if rest and names[MOST:]:
        shown[rest] = {hour: sum(found[name][hour] for name in names[MOST:]) for hour in HOURS}
    return shown
