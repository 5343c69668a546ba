"""Pictures to look at instead of numbers: grids of frames, curves, filmstrips, videos."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDE = 20  # the factor that a linear axis shows
COLOURS = 64


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def save_small(figure: Figure, path: Path) -> Path:
    """A picture of many frames, in 64 colours: a third of the size, since it may be kept in git."""
    with Image.open(save(figure, path)) as image:
        small = image.convert("RGB").quantize(COLOURS)
    small.save(path, optimize=True)
    return path


def frame_rows(rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str] = ()) -> Figure:
    """Rows of 64x64 frames, each with its name to the left; titles stand above the columns."""
    columns = max(len(row) for row in rows.values())
    size = (1.1 * columns + 1, 1.15 * len(rows) + 0.3 * bool(titles))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        line[0].text(-0.1, 0.5, name, transform=line[0].transAxes, ha="right", va="center")
        for axis, frame in zip(line, row, strict=False):
            axis.imshow(frame)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=9)
    return figure


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
) -> Figure:
    """Lines by name: (x, y)."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for name, (x, y) in lines.items():
        axis.plot(x, y, label=name, marker="o" if len(x) < 20 else None, markersize=3)
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


@dataclass(frozen=True)
class Series:
    """Values over some labels; NaN where there is none."""

    y: np.ndarray
    low: np.ndarray  # of the interval
    high: np.ndarray
    published: np.ndarray
    line: float | None = None  # to be compared with


def panels(
    by_metric: Mapping[str, Mapping[str, Series]], labels: Sequence[str], x_label: str
) -> Figure:
    """A panel for each metric: its series by name over the labels, intervals as error bars.

    Labels that are numbers are placed as such, logarithmically where they span a factor above
    WIDE, as values are; others stand side by side.
    """
    columns = min(len(by_metric), 3)
    rows = -(-len(by_metric) // columns)
    size = (1 + 3.6 * columns, 0.6 + 3.1 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(by_metric) :]:
        axis.axis("off")
    for axis, (metric, series) in zip(axes.flat, by_metric.items(), strict=False):
        x, style = _place(axis, labels)
        for number, (name, values) in enumerate(series.items()):
            _draw(axis, _aside(axis, x, number), values, name, f"C{number}", style)
        if wide(np.concatenate([values.y for values in series.values()])):
            axis.set_yscale("log")
        axis.set(xlabel=x_label, title=metric)
        axis.grid(alpha=0.3)
    named = {}
    for axis in axes.flat:
        handles, names = axis.get_legend_handles_labels()
        named |= dict(zip(names, handles, strict=True))
    figure.legend(named.values(), named, loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def wide(values: np.ndarray) -> bool:
    """Whether positive values span so much that only a logarithmic axis shows them all."""
    known = values[np.isfinite(values)]
    return bool(len(known) and known.min() > 0 and known.max() / known.min() > WIDE)


def _place(axis: Axes, labels: Sequence[str]) -> tuple[np.ndarray, str]:
    """Where labels stand, and how values are drawn there: joined by a line if they are numbers."""
    style = "o-"
    try:
        x = np.array([float(label) for label in labels])
    except ValueError:
        x, style = np.arange(len(labels), dtype=float), "o"
        axis.set_xlim(-0.5, len(labels) - 0.5)
    else:
        axis.set_xscale("log" if wide(x) else "linear")
    crowded = sum(map(len, labels)) > 30
    axis.set_xticks(x, labels, rotation=30 * crowded, ha="right" if crowded else "center")
    axis.minorticks_off()
    return x, style


def _aside(axis: Axes, x: np.ndarray, number: int) -> np.ndarray:
    """Where the so manieth series stands: a little aside, so that no bar hides another."""
    share = 0.012 * number
    if axis.get_xscale() == "log":
        return x * (x.max() / x.min()) ** share
    return x + share * max(np.ptp(x), 1.0)


def _draw(axis: Axes, x: np.ndarray, values: Series, name: str, colour: str, style: str) -> None:
    """A series under its name; one without a name is the only one, and ours."""
    whose = f"{name}, " if name else ""
    axis.plot(x, values.y, style, color=colour, label=name or "ours", markersize=4)
    bars = np.isfinite(values.low)
    axis.vlines(x[bars], values.low[bars], values.high[bars], color=colour, linewidth=1.5)
    if np.isfinite(values.published).any():
        light = {"color": colour, "alpha": 0.45, "markersize": 7}
        axis.plot(x, values.published, "D", label=f"{whose}published", **light)
    if values.line is not None:
        axis.axhline(values.line, color=colour, linestyle=":", label=f"{whose}random policy")


def stacked(pictures: Mapping[str, Path]) -> Figure:
    """Pictures of about the first one's shape below each other, each under its name."""
    images = {name: iio.imread(path) for name, path in pictures.items()}
    height, width = next(iter(images.values())).shape[:2]
    size = (10, (10 * height / width + 0.3) * len(images))
    figure, axes = plt.subplots(len(images), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, (name, image) in zip(axes.flat, images.items(), strict=True):
        axis.imshow(image)
        axis.set_anchor("W")  # a short episode's is narrower
        axis.set_title(name, fontsize=9, loc="left")
        axis.axis("off")
    return figure


def video(frames: np.ndarray, path: Path, fps: float, scale: int = 4) -> Path:
    """uint8 frames [T,H,W,3] as an mp4, each pixel enlarged to a square."""
    large = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    iio.imwrite(path, large, fps=fps, codec="libx264", macro_block_size=1)
    return path
