"""Pictures as inline SVG: they take the page's text colour, so that they suit light and dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLORS = (
    "#3b7dc4", "#d9822b", "#3f9b63", "#c8524a", "#8a6fc0",
    "#9a6b4f", "#cf6fa6", "#7f8a3b", "#3aa3a8", "#b99a2e",
)  # fmt: skip
"""One a series or class; readable on white and on black."""
OTHERS = "#8d969e"
_MARKERS = (".", "x", "+")
_INK = "#010203"  # stands for the page's text colour until the SVG is written
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "tldist",  # the same input gives the same file
    "text.parse_math": False,  # a class may be called $x$
    "axes.unicode_minus": False,
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
}
_DROPPED = (
    re.compile(r"^.*?(?=<svg)", re.DOTALL),  # XML declaration and document type
    re.compile(r"<metadata>.*?</metadata>", re.DOTALL),
    re.compile(r' xmlns(:\w+)?="[^"]*"'),  # HTML knows the name spaces of inline SVG
    re.compile(r' id="[A-Za-z][\w.]*_\d+"'),  # matplotlib's group names would repeat from picture to picture
    re.compile(r"<!--.*?-->", re.DOTALL),
)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ylabel: str,
    *,
    xlabel: str = "step",
    mark: float | None = None,
    mark_label: str = "",
) -> str:
    """Lines.

    Args:
        series: x and y values by name; short ones get markers. Values that are not finite are left out.
        ylabel, xlabel: of the axes.
        mark: an x value to mark.
        mark_label: what it is.
    """
    with _axes(3.2, 2.3) as (figure, axes):
        for color, (name, (x, y)) in zip(COLORS, series.items()):
            xs, ys = _finite(x, y)
            axes.plot(xs, ys, color=color, label=name, marker="o" if len(xs) <= 30 else "", markersize=3)
        if mark is not None:
            axes.axvline(mark, color=OTHERS, linewidth=0.8, linestyle="--", label=mark_label)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.margins(x=0.02)
        if len(series) > 1 or mark is not None:
            axes.legend()
        return _svg(figure)


def bars(names: Sequence[str], means: Sequence[float], deviations: Sequence[float], label: str) -> str:
    """Horizontal bars with their standard deviation, the first at the top."""
    with _axes(6.4, 0.75 + 0.34 * len(names)) as (figure, axes):
        places = np.arange(len(names))[::-1]
        axes.barh(places, means, height=0.62, color=COLORS[0], xerr=deviations, ecolor=OTHERS, capsize=2.5)
        for place, mean, deviation in zip(places, means, deviations):
            axes.annotate(
                f"{mean:.4f}", (mean + deviation, place), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(places, [shorten(name) for name in names])
        axes.set_xlabel(label)
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
        return _svg(figure)


def ranking(names: Sequence[str], series: Mapping[str, Sequence[float | None]], label: str) -> str:
    """One row a name with a dot for each series: the first at the top, the first series largest.

    Args:
        names: of the rows.
        series: values by name, one a row; None: none there.
        label: of the values' axis.
    """
    with _axes(6.8, 0.9 + 0.26 * len(names)) as (figure, axes):
        places = np.arange(len(names))[::-1]
        axes.hlines(
            places, 0, 1, color=OTHERS, linewidth=0.4, alpha=0.5, transform=axes.get_yaxis_transform()
        )
        for number, (color, (name, values)) in enumerate(zip(COLORS, series.items())):
            points = [(value, place) for value, place in zip(values, places) if value is not None]
            xs, ys = zip(*points) if points else ((), ())
            axes.scatter(xs, ys, s=30 if number == 0 else 14, color=color, label=name, linewidth=0, zorder=3)
        axes.set_yticks(places, [shorten(name, 48) for name in names])
        axes.set_xlabel(label)
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), handletextpad=0.2)
        return _svg(figure)


def as_file(svg: str) -> str:
    """An inline picture as a file of its own: on white, with the name spaces that a file needs."""
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg", f'<svg {spaces} style="background:#fff;color:#222;font-family:sans-serif"', 1)


def agreement(pairs: np.ndarray, xlabel: str, ylabel: str) -> str:
    """Scatter of (N, 2) pairs that should be equal, with the diagonal."""
    with _axes(3.4, 3.2) as (figure, axes):
        low, high = float(pairs.min()), float(pairs.max())
        axes.plot([low, high], [low, high], color=OTHERS, linewidth=0.8)
        axes.scatter(pairs[:, 0], pairs[:, 1], s=7, color=COLORS[0], alpha=0.6, linewidth=0, rasterized=True)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        return _svg(figure)


def plane(points: np.ndarray, labels: Sequence[str] | None, kinds: Sequence[str] | None = None) -> str:
    """Points (N, 2), coloured by label; of many labels the largest have colours, the others share grey.

    Args:
        points: coordinates.
        labels: one for each point; None: one colour.
        kinds: a second label for each point, of at most three, which chooses its marker; None: dots.
    """
    assert len(set(kinds or ())) <= len(_MARKERS)
    with _axes(6.2, 4.4) as (figure, axes):
        shapes = dict(zip(dict.fromkeys(kinds or [""]), _MARKERS))
        for name, color, chosen in _groups(len(points), labels):
            for kind, marker in shapes.items():
                rows = chosen if kinds is None else [row for row in chosen if kinds[row] == kind]
                axes.scatter(
                    points[rows, 0],
                    points[rows, 1],
                    s=9 if marker == "." else 16,
                    color=color,
                    alpha=0.7,
                    marker=marker,
                    linewidth=0 if marker == "." else 0.8,
                    label=name if marker == "." else None,
                    rasterized=True,
                )
        for kind, marker in shapes.items() if kinds is not None else ():
            axes.scatter([], [], s=16, color=OTHERS, marker=marker, linewidth=0.8, label=shorten(kind))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("first component")
        axes.set_ylabel("second component")
        if labels is not None or kinds is not None:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), markerscale=1.8, handletextpad=0.2)
        return _svg(figure)


def shorten(text: str, most: int = 32) -> str:
    """Text for an axis: one line of printable characters, not too long."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


def _groups(count: int, labels: Sequence[str] | None) -> Iterator[tuple[str, str, np.ndarray]]:
    """(name, colour, positions) of the groups to draw, the grey one first so that it lies below."""
    if labels is None:
        yield "", COLORS[0], np.arange(count)
        return
    values = np.array(labels, dtype=str)
    names, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shown = {str(name) for name in names[order[: len(COLORS)]]}
    others = len(names) - len(shown)
    if others:
        yield f"{others} others", OTHERS, np.flatnonzero([label not in shown for label in labels])
    colored = [name for name in dict.fromkeys(labels) if name in shown]
    for color, name in zip(COLORS, colored):
        yield shorten(name), color, np.flatnonzero(values == name)


def _finite(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    kept = np.isfinite(xs) & np.isfinite(ys)
    return xs[kept], ys[kept]


@contextmanager
def _axes(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of width x height inches in the page's style; no global state of matplotlib is changed."""
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with warnings.catch_warnings():
        # The page's own font draws the text, whatever matplotlib's lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    for pattern in _DROPPED:
        text = pattern.sub("", text)
    return text.replace(_INK, "currentColor").strip()
