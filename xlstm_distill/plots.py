"""Figures, for files and for the report.

Each function returns a matplotlib Figure; `save` writes it, `save_all` several under names that
`file_name` made of any words, `svg` and `png` give its bytes. Colours
are Okabe and Ito's palette, which colour-blind readers tell apart; lines differ in style and marker
as well, so that a black and white print still reads. No display is needed.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .evaluate.comparison import Comparison
    from .evaluate.divergence import DistanceMeasure
    from .evaluate.fidelity import Fidelity
    from .evaluate.wintie import WinTie

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
FORMATS = (".svg", ".png", ".pdf")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
_STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "path",
    # Element ids that do not change from run to run.
    "svg.hashsalt": "xlstm_distill",
}


def _axes(width: float = 6.4, height: float = 3.6) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots()


def _style(i: int) -> dict[str, Any]:
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": _LINES[i % len(_LINES)],
        "marker": _MARKERS[i % len(_MARKERS)],
    }


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the format is the path's ending, one of FORMATS."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(_bytes(figure, target.suffix.removeprefix(".") or "svg"))
    return target


def file_name(words: str, taken: Iterable[str]) -> str:
    """A file's name without its ending, made of words that users chose. It differs from those that
    are taken, also where a file system does not tell capitals: "a b" and "A_b" get numbers."""
    name, others = re.sub(r"\W+", "_", words), {other.casefold() for other in taken}
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if n.casefold() not in others)


def save_all(
    figures: Mapping[str, tuple[str, Figure]], folder: str | Path, endings: Sequence[str]
) -> list[Path]:
    """Write figures (name without ending -> what it shows, and the figure) with each ending."""
    return [
        save(figure, Path(folder) / f"{name}{ending}")
        for name, (_, figure) in figures.items()
        for ending in endings
    ]


def svg(figure: Figure) -> str:
    """The figure as an <svg> element, to stand inside a page."""
    text = _bytes(figure, "svg").decode()
    return text[text.index("<svg") :]


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    return _bytes(figure, "png")


def _bytes(figure: Figure, form: str) -> bytes:
    buffer = io.BytesIO()
    # No date and no maker in the file: the same data give the same bytes, and nothing links out.
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) if form == "svg" else None
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format=form, metadata=metadata)
    return buffer.getvalue()


def loss_curves(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], title: str, unit: str
) -> Figure:
    """Loss against step, one line per name; a logarithmic axis where values span a decade."""
    figure, axes = _axes()
    positive = True
    values: list[float] = []
    for i, (name, (steps, losses)) in enumerate(curves.items()):
        style = _style(i)
        if len(steps) >= 30:
            style["marker"] = None
        axes.plot(steps, losses, label=name, markersize=3, linewidth=1.4, **style)
        values += [v for v in losses if math.isfinite(v)]
        positive = positive and all(v > 0 for v in losses)
    if values and positive and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.legend()
    return figure


def by_position(result: Fidelity, metric: str, models: Sequence[str], title: str) -> Figure:
    """`metric` ("kl", "agree" or "perplexity") of each bucket of positions, mean of the domains."""
    labels = [f"{lo}–{hi}" for lo, hi in result.buckets]
    lines = {
        name: {label: getattr(result.mean(name, b), metric) for b, label in enumerate(labels)}
        for name in models
    }
    words = {"kl": "KL(teacher ‖ model), nats", "agree": "top-1 agreement"}
    figure, axes = _by_range(lines, title)
    axes.set(xlabel="position in the window", ylabel=words.get(metric, metric))
    if metric != "agree":
        axes.set_ylim(bottom=0)
    return figure


def by_distance(
    students: Mapping[str, Sequence[DistanceMeasure]], metric: str, title: str
) -> Figure:
    """`metric` ("kl" or "perplexity", which the teacher has, too) of each student by how far back
    the next token could be copied from; new ones last."""
    measures = list(itertools.chain.from_iterable(students.values()))
    ends = {m.range: math.inf if m.low is None else m.low for m in measures}
    places = sorted(ends, key=lambda name: ends[name])
    lines = {name: {m.range: getattr(m, metric) for m in of} for name, of in students.items()}
    words = {"kl": "KL(teacher ‖ model), nats"}
    if metric == "perplexity":
        lines = {"teacher": {m.range: m.teacher_perplexity for m in measures}, **lines}
    ordered = {name: {p: of[p] for p in places if p in of} for name, of in lines.items()}
    figure, axes = _by_range(ordered, title, places)
    axes.set(xlabel="distance in tokens", ylabel=words.get(metric, metric))
    if metric == "perplexity":
        axes.set_yscale("log")  # new tokens are many times as hard as repeated ones
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.set_ylim(bottom=0)
    return figure


def _by_range(
    lines: Mapping[str, Mapping[str, float]], title: str, labels: Sequence[str] = ()
) -> tuple[Figure, Axes]:
    """A line a model over ranges: name -> range -> value; labels: all ranges, in order."""
    figure, axes = _axes()
    places = labels or list(next(iter(lines.values()), {}))
    for i, (name, of) in enumerate(lines.items()):
        at = [places.index(label) for label in of]
        axes.plot(at, list(of.values()), label=name, markersize=4, **_style(i))
    axes.set_xticks(range(len(places)), places)
    axes.set(title=title)
    axes.legend()
    return figure, axes


def gate_map(values: Sequence[Sequence[float | None]], title: str) -> Figure:
    """Output gates by layer and head, 0 attention to 1 mLSTM; None is blank."""
    data = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=np.float64)
    return head_map(data, title, "0 attention, 1 mLSTM")


def head_map(values: ArrayLike, title: str, label: str, log: bool = False) -> Figure:
    """Values by layer (rows) and head (columns), of 0 to 1 or with `log` positive on a logarithmic
    scale; what is not finite is blank."""
    data = np.ma.masked_invalid(np.asarray(values, dtype=np.float64))
    figure, axes = _axes(1.8 + 0.42 * max(6, data.shape[1]), 1.2 + 0.16 * max(8, data.shape[0]))
    axes.grid(False)
    axes.set_facecolor("#dddddd")
    norm = LogNorm() if log else Normalize(0, 1)
    image = axes.imshow(data, norm=norm, cmap="cividis", aspect="auto")
    axes.set(title=title, xlabel="head", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label=label)
    return figure


def needle_grid(grid: Mapping[str, Mapping[int, Sequence[float]]], title: str) -> Figure:
    """Score by length and depth of the needle, a panel per task; NaN is blank.

    grid: `evaluate.needle_grid`. The numbers stand in the cells, for print and colour-blind eyes.
    """
    columns = min(4, len(grid))
    rows = -(-len(grid) // columns)
    lengths = max(len(of) for of in grid.values())
    with matplotlib.rc_context(_STYLE):
        size = (columns * (1.1 + 0.5 * lengths), 0.6 + 2.0 * rows)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for (task, of), axes in zip(grid.items(), panels, strict=False):
            data = np.array([of[length] for length in sorted(of)]).T
            image = axes.imshow(
                np.ma.masked_invalid(data), vmin=0, vmax=1, cmap="cividis", aspect="auto"
            )
            for (row, column), value in np.ndenumerate(data):
                if np.isfinite(value):
                    colour = "white" if value < 0.5 else "black"
                    text = f"{value:.2f}".removeprefix("0") if value < 1 else "1"
                    axes.text(column, row, text, ha="center", va="center", color=colour, size=7)
            axes.grid(False)
            axes.set_facecolor("#dddddd")
            labels = [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in sorted(of)]
            axes.set_xticks(range(len(labels)), labels)
            step = 100 // len(data)
            depths = [f"{n * step}–{n * step + step} %" for n in range(len(data))]
            axes.set_yticks(range(len(data)), depths if len(data) > 1 else ["all"])
            axes.set(title=task, xlabel="length, tokens", ylabel="depth of the needle")
        for axes in panels:
            axes.set_axis_off()
        figure.colorbar(image, ax=figure.axes, label="values found")
        figure.suptitle(title)
    return figure


def coverage_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str
) -> Figure:
    """Win-and-Tie: coverage against tolerance as steps; curves are (alphas, coverages)."""
    figure, axes = _axes()
    for i, (name, (alphas, coverages)) in enumerate(curves.items()):
        style = _style(i)
        axes.step(
            alphas,
            coverages,
            where="post",
            label=name,
            markersize=4,
            linewidth=1.6,
            **style,
        )
    axes.axhline(0.5, color="#666666", linewidth=0.8)
    axes.set(title=f"Win-and-Tie: {title}", xlabel="tolerance α", ylabel="coverage C(α)")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.02, 1.05))
    axes.legend(loc="lower right")
    return figure


def win_tie_curves(result: WinTie) -> Figure:
    """Coverage curves of all students of a Win-and-Tie result."""
    kind = "likelihood" if result.lower_is_better else "accuracy"
    return coverage_curves(
        {name: result.curve(name) for name in result.students},
        f"{kind}, {len(result.tasks)} benchmarks",
    )


def recovery_bars(comparison: Comparison) -> Figure:
    """Recovery rate of each benchmark with its interval, a bar for each student; what does not
    exist has no bar."""
    students, benchmarks = comparison.students, comparison.benchmarks
    figure, axes = _axes(6.4, 1.4 + 0.17 * len(benchmarks) * len(students))
    height = 0.8 / len(students)
    for i, name in enumerate(students):
        rows = np.arange(len(benchmarks)) + (i - (len(students) - 1) / 2) * height
        of = [b.students[name] for b in benchmarks]
        rates = np.array([np.nan if s.recovery is None else s.recovery for s in of])
        ends = np.array([s.recovery_interval or (np.nan, np.nan) for s in of])
        axes.barh(
            rows,
            rates,
            height,
            label=name,
            color=COLOURS[i % len(COLOURS)],
            hatch=_HATCHES[i % len(_HATCHES)],
            edgecolor="white",
            linewidth=0.5,
        )
        axes.hlines(rows, ends[:, 0], ends[:, 1], color="#000000", linewidth=0.9)
    axes.axvline(1, color="#000000", linewidth=0.8)
    less = [b.kind != "accuracy" for b in benchmarks]
    ratio = "teacher / student" if all(less) else "student / teacher"
    mixed = any(less) and not all(less)
    names = [b.name + " ↓" * (mixed and lower) for b, lower in zip(benchmarks, less, strict=True)]
    axes.set_yticks(range(len(benchmarks)), names)
    axes.set_ylim(len(benchmarks) - 0.5, -0.5)
    axes.grid(False, axis="y")
    label = ratio + ", of ↓ (less is better) teacher / student" * mixed
    axes.set(title="Recovery (1 = teacher), 95 % intervals", xlabel=label)
    figure.legend(loc="outside lower center", ncols=min(4, len(students)))
    return figure


def context_costs(costs: Mapping[str, Mapping[str, Mapping[int, float]]], title: str) -> Figure:
    """Speed or work, and memory of the state, against the length of the context.

    costs: `bench.context_costs` or `bench.counted_costs`.
    """
    words = {
        "reads": "reading, tokens/s",
        "writes": "generating, tokens/s",
        "work": "multiply-adds a token",
        "memory": "state of one row, MiB",
    }
    panels = {what: words[what] for what in words if what in next(iter(costs.values()))}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.2 * len(panels), 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(1, len(panels))
        for axes, (what, label) in zip(grid, panels.items(), strict=True):
            for i, (who, of) in enumerate(costs.items()):
                contexts = sorted(of[what])
                values = [of[what][c] for c in contexts]
                axes.plot(contexts, values, label=who, markersize=4, **_style(i))
            axes.set(xlabel="context, tokens", ylabel=label, xscale="log", yscale="log")
            ticks = sorted({c for of in costs.values() for c in of[what]})
            axes.set_xticks(ticks, [f"{c // 1024}K" if c >= 1024 else str(c) for c in ticks])
            axes.minorticks_off()
        axes.legend()
        figure.suptitle(title)
    return figure


def layer_errors(layers: Sequence[int], before: Sequence[float], after: Sequence[float]) -> Figure:
    """Stage I: relative error of each trained layer before and after, logarithmic."""
    figure, axes = _axes()
    for i, (name, values) in enumerate((("before", before), ("after", after))):
        axes.plot(layers, values, label=name, markersize=4, **_style(i))
    if all(v > 0 for v in itertools.chain(before, after)):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        title="Stage I: error of the attention outputs by layer",
        xlabel="layer",
        ylabel="relative squared error",
    )
    axes.legend()
    return figure


def sweep(series: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> Figure:
    """A panel a metric, a line of points a recipe: the mean of the seeds, their standard deviation
    as a bar, and each seed as a dot.

    series: metric ("kl", "agree" or "perplexity") -> name -> recipe -> a value a seed.
    """
    names = list(dict.fromkeys(p for of in series.values() for own in of.values() for p in own))
    words = {"kl": "KL(teacher ‖ student), nats", "agree": "top-1 agreement"}
    with matplotlib.rc_context(_STYLE):
        height = 1.6 + 0.3 * len(names)
        figure = Figure(figsize=(3.4 * len(series) + 1.6, height), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(series), sharey=True, squeeze=False)[0]
        for axes, (metric, of) in zip(panels, series.items(), strict=True):
            for i, (label, own) in enumerate(of.items()):
                rows = np.array([names.index(p) for p in own]) + 0.5 * (i + 1) / (len(of) + 1)
                means = [float(np.mean(values)) for values in own.values()]
                spreads = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in own.values()]
                style = {**_style(i), "linestyle": "none"}
                axes.errorbar(
                    means, rows, xerr=spreads, label=label, markersize=5, capsize=2, **style
                )
                for row, values in zip(rows, own.values(), strict=True):
                    axes.plot(values, [row] * len(values), ".", color=style["color"], markersize=2)
            axes.set(xlabel=words.get(metric, metric))
        panels[0].set_yticks(np.arange(len(names)) + 0.25, names)
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure
