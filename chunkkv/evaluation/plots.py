"""Pictures of a run: quality against what is kept and stored, and where needles are found.

Colours follow the method, in the order of the presets, whatever a run compares; no two methods of
one picture look alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

from chunkkv.evaluation.methods import FULL
from chunkkv.evaluation.records import Record
from chunkkv.evaluation.report import Summary, summarize
from chunkkv.evaluation.tune import Curve, Tuned
from chunkkv.presets import PRESETS

mpl.use("Agg")

from matplotlib import pyplot as plt  # after the choice of a backend

_SHARES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_INK: Final = "#333333"
_QUIET: Final = "#8a8a8a"
_COLORS: Final = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f3c8d", "#56b4e9",
    "#a5662b", "#e69f00", "#5b6c1d", "#bb0040", "#005f5f", "#9aa31b",
)  # fmt: skip
_MARKERS: Final = "osD^vPX<>ph*"
_STYLE: Final[Any] = {
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def write_plots(folder: Path, records: Iterable[Record]) -> list[Path]:
    """Write all pictures that the records give into a folder; return their paths."""
    records = sorted(records, key=lambda record: record.key)
    written = []
    with mpl.rc_context(_STYLE):
        for task in sorted({record.task for record in records}):
            of_task = [record for record in records if record.task == task]
            name = task.replace("/", "-")
            summaries = summarize(of_task, by_length=False)
            pictures = {
                f"{name}-quality.png": _curves(task, summaries, against="keep_ratio"),
                f"{name}-bytes.png": _curves(task, summaries, against="stored_share"),
            }
            for visible, kind in ((False, "unseen"), (True, "seen")):
                grid = _heat_maps(task, of_task, visible=visible)
                if grid is not None:
                    pictures[f"{name}-depth-{kind}.png"] = grid
            for file, figure in pictures.items():
                # Without the version of matplotlib in it, the bytes depend on the picture alone.
                figure.savefig(folder / file, dpi=130, metadata={"Software": None})
                plt.close(figure)
                written.append(folder / file)
    return written


def _curves(task: str, summaries: Sequence[Summary], *, against: str) -> Any:
    """Draw the mean grade of each method; one panel without the question and one with it."""
    shown = [v for v in (False, True) if any(_is_method(s, v) for s in summaries)] or [False]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(2.0 + 4.3 * len(shown), 4.2), sharey=True, squeeze=False
    )
    full = next((s.graded for s in summaries if s.method == FULL), None)
    names = sorted({s.method for s in summaries} - {FULL}, key=_order)
    handles = {}
    for axis, visible in zip(axes[0], shown, strict=True):
        if full is not None:
            handles["full cache"] = axis.axhline(full, color=_QUIET, linewidth=1, linestyle="--")
        for name in names:
            points = sorted(
                (getattr(s, against), s.graded)
                for s in summaries
                if _is_method(s, visible) and s.method == name
            )
            if points:
                color, marker = _look(name, names)
                [handles[name]] = axis.plot(
                    *zip(*points, strict=True),
                    color=color,
                    marker=marker,
                    markersize=4.5,
                    linewidth=1.4,
                    label=name,
                )
        _ratio_axis(axis, summaries, against)
        axis.set_title(f"question {'seen' if visible else 'not seen'} at compression")
    axes[0][0].set_ylabel("mean grade of answers")
    axes[0][0].set_ylim(-0.03, 1.05)
    num_questions = max((s.num_questions for s in summaries), default=0)
    figure.suptitle(f"{task}: {num_questions} questions", x=0.01, ha="left", fontsize=12)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9
    )
    figure.set_layout_engine("constrained")
    return figure


def _ratio_axis(axis: Any, summaries: Sequence[Summary], against: str) -> None:
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    # Ratios double from one to the next, more or less: on a straight axis the small ones collide.
    axis.set_xscale("log")
    axis.minorticks_off()  # their labels would lie over ours
    if against == "keep_ratio":
        ratios = sorted({s.keep_ratio for s in summaries if s.method != FULL})
        axis.set_xlabel("share of tokens kept")
    else:
        shares = [s.stored_share for s in summaries if s.method != FULL] or [1.0]
        ratios = [step for step in _SHARES if min(shares) / 2 <= step <= max(shares) * 2]
        axis.set_xlabel("stored bytes, share of the full cache")
    axis.set_xticks(
        ratios, [f"{ratio:.0%}" if ratio >= 0.01 else f"{ratio:.1%}" for ratio in ratios]
    )


def _heat_maps(task: str, records: Sequence[Record], *, visible: bool) -> Any:
    """Draw the grade by length and depth, a panel for each method, at the ratio in the middle."""
    placed = [
        record
        for record in records
        if all(extra.get("depth") is not None and extra.get("length") for extra in record.extras)
        and (record.is_question_visible == visible or record.method == FULL)
    ]
    ratio = _middle([r.keep_ratio for r in placed if r.method != FULL])
    names = sorted({r.method for r in placed if r.method != FULL}, key=_order)
    if ratio is None:
        return None
    names = [FULL, *names] if any(r.method == FULL for r in placed) else names
    lengths = sorted({int(extra["length"]) for r in placed for extra in r.extras})
    columns = min(4 if len(names) <= 8 else 5, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1.2 + 2.1 * columns, 1.3 + 1.9 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    image: Any = None
    for axis, name in zip(axes.flat, names, strict=False):
        wanted = [r for r in placed if r.method == name and r.keep_ratio in (ratio, 1.0)]
        image = axis.imshow(
            _by_depth(wanted, lengths), vmin=0, vmax=1, cmap="viridis", aspect="auto"
        )
        axis.set_title("full cache" if name == FULL else name, fontsize=9.5)
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set_yticks(range(_DEPTHS), _DEPTH_LABELS)
        axis.tick_params(length=0, labelsize=8.5)
        axis.spines[:].set_visible(False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for column in range(columns):
        last = axes[(len(names) - 1 - column) // columns][column]
        last.tick_params(labelbottom=True)
        last.set_xlabel("tokens", fontsize=9)
    figure.supylabel("depth of the answer in the text", fontsize=9.5)
    question = "seen" if visible else "not seen"
    figure.suptitle(
        f"{task}: {100 * ratio:.3g} % kept, question {question} at compression",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    figure.set_layout_engine("constrained")
    figure.colorbar(image, ax=axes, label="mean grade", shrink=0.8)
    return figure


_DEPTHS: Final = 5
_DEPTH_LABELS: Final = ("0–20 %", "20–40 %", "40–60 %", "60–80 %", "80–100 %")


def _by_depth(records: Sequence[Record], lengths: Sequence[int]) -> list[list[float]]:
    """Return mean grades, a row for each fifth of the text; NaN where nothing was asked."""
    grades: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for record in records:
        for grade, extra in zip(record.graded, record.extras, strict=True):
            depth = min(int(float(extra["depth"]) * _DEPTHS), _DEPTHS - 1)
            grades[depth, lengths.index(int(extra["length"]))].append(grade)
    return [
        [
            sum(found) / len(found) if (found := grades[depth, column]) else float("nan")
            for column in range(len(lengths))
        ]
        for depth in range(_DEPTHS)
    ]


def _middle(ratios: Iterable[float]) -> float | None:
    """Return the ratio in the middle: at the ends methods hardly differ."""
    different = sorted(set(ratios))
    return different[len(different) // 2] if different else None


def _is_method(summary: Summary, visible: bool) -> bool:
    return summary.method != FULL and summary.is_question_visible == visible


def _order(name: str) -> tuple[int, str]:
    known = list(PRESETS)
    base = name.partition(":")[0]
    return (known.index(base) if base in known else len(known), name)


def _look(name: str, names: Sequence[str]) -> tuple[str, str]:
    known = list(PRESETS)
    place = known.index(name) if name in known else len(known) + list(names).index(name)
    return _COLORS[place % len(_COLORS)], _MARKERS[(place + place // 12) % len(_MARKERS)]


def write_curve(path: Path, outcome: Tuned, target: float) -> None:
    """Draw what ``tune`` measured: all curves faintly, the best one and the point chosen on it."""
    with mpl.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(6.4, 4.2))
        for curve in outcome.curves:
            if curve is not outcome.best:
                axis.plot(*_line(curve), color="#d0d0d0", linewidth=0.9, zorder=1)
        axis.plot(*_line(outcome.best), color=_COLORS[0], marker="o", markersize=4.5, zorder=3)
        axis.axhline(target, color=_QUIET, linewidth=1, linestyle="--", zorder=2)
        chosen = outcome.chosen.fidelity
        axis.plot(
            [chosen.stored_share], [chosen.agreement], color=_COLORS[1], marker="o", markersize=9,
            zorder=4,
        )  # fmt: skip
        axis.annotate(
            f"{outcome.chosen.policy.keep_ratio:.3g} kept",
            (chosen.stored_share, chosen.agreement),
            xytext=(8, -14),
            textcoords="offset points",
        )
        shares = [s for curve in outcome.curves for s in _line(curve)[0]]
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.set_xscale("log")
        steps = [s for s in _SHARES if min(shares) / 1.3 <= s <= max(shares) * 1.3]
        axis.set_xticks(steps, [f"{100 * s:.3g} %" for s in steps])
        axis.minorticks_off()
        axis.set_xlabel("stored bytes, share of the full cache")
        axis.set_ylabel("next tokens that stay the same")
        axis.set_title(f"{len(outcome.curves)} candidates; target {target:.3g}")
        figure.set_layout_engine("constrained")
        figure.savefig(path, dpi=130, metadata={"Software": None})
        plt.close(figure)


def _line(curve: Curve) -> tuple[list[float], list[float]]:
    found = [point.fidelity for point in curve.points]
    return [f.stored_share for f in found], [f.agreement for f in found]
