"""Pictures to look at instead of numbers: grids of frames, curves, filmstrips, videos."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

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

    y: np.ndarray  # [labels]
    low: np.ndarray  # of the interval
    high: np.ndarray
    seeds: np.ndarray  # [labels, seeds], whose mean y is
    published: Mapping[str, np.ndarray]  # by author
    random: np.ndarray  # of the random policy


def panels(
    by_metric: Mapping[str, Mapping[str, Series]],
    labels: Sequence[str],
    axis_label: str,
    title: str = "",
    alike: Sequence[str] = (),
) -> Figure:
    """A panel for each metric: its series by name over the labels, intervals as bars.

    Labels that are numbers are placed as such, from left to right, logarithmically where they span
    a factor above WIDE, as values are; names stand below each other. The metrics `alike` have one
    scale.
    """
    places, names = _places(labels)
    columns = {4: 2}.get(len(by_metric), min(len(by_metric), 3))
    rows = -(-len(by_metric) // columns)
    width, height = (3.6, 1.2 + 0.3 * len(labels)) if names else (3.6, 3.1)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1 + width * columns, 1.2 + height * rows),
        squeeze=False,
        layout="constrained",
        sharey=names,
    )
    for axis in axes.flat[len(by_metric) :]:
        axis.axis("off")
    known = dict(zip(by_metric, axes.flat, strict=False))
    for metric in alike[1:]:
        (known[metric].sharex if names else known[metric].sharey)(known[alike[0]])
    for metric, axis in known.items():
        beside = alike if metric in alike else [metric]
        wide_values = wide(np.concatenate([_values(by_metric[m]) for m in beside]))
        _panel(axis, by_metric[metric], places, labels, names, wide_values)
        axis.set(title=metric, xlabel="" if names else axis_label)
    if names:
        axes[0, 0].set_ylim(len(labels) - 0.5, -0.5)  # the first on top
        for axis in axes[:, 0]:
            axis.set_ylabel(axis_label)
    shown = {}
    for axis in axes.flat:
        handles, its = axis.get_legend_handles_labels()
        shown |= dict(zip(its, handles, strict=True))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def wide(values: np.ndarray) -> bool:
    """Whether positive values span so much that only a logarithmic axis shows them all."""
    known = values[np.isfinite(values)]
    return bool(len(known) and known.min() > 0 and known.max() / known.min() > WIDE)


def _places(labels: Sequence[str]) -> tuple[np.ndarray, bool]:
    """Where labels stand, and whether they are names."""
    try:
        return np.array([float(label) for label in labels]), False
    except ValueError:
        return np.arange(len(labels), dtype=float), True


def _values(series: Mapping[str, Series]) -> np.ndarray:
    """All points that are drawn of them."""
    drawn = [
        part.ravel()
        for its in series.values()
        for part in (its.y, its.seeds, its.random, *its.published.values())
    ]
    return np.concatenate(drawn)


def _panel(
    axis: Axes,
    series: Mapping[str, Series],
    places: np.ndarray,
    labels: Sequence[str],
    names: bool,
    wide_values: bool,
) -> None:
    """Series over labels: from left to right, or below each other where these are names."""
    along, across = (axis.yaxis, axis.xaxis) if names else (axis.xaxis, axis.yaxis)
    set_scale = axis.set_xscale if names else axis.set_yscale
    values = np.concatenate([its.y for its in series.values()])
    if wide_values:
        set_scale("log")
    if wide(places) and not names:
        axis.set_xscale("log")
    for number, (name, its) in enumerate(series.items()):
        _draw(axis, _aside(places, number, names), its, name, f"C{number}", names)
    if np.nanmax(np.abs(values), initial=0) >= 1e4:
        across.set_major_formatter(EngFormatter(sep=""))
        across.set_major_locator(MaxNLocator(5))
    along.set_ticks(places, labels)
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _aside(places: np.ndarray, number: int, names: bool) -> np.ndarray:
    """Where the so manieth series stands: a little aside, so that no bar hides another."""
    if names:
        return places + 0.12 * number
    if wide(places):
        return places * (places.max() / places.min()) ** (0.012 * number)
    return places + 0.012 * number * max(np.ptp(places), 1.0)


def _draw(axis: Axes, places: np.ndarray, its: Series, name: str, colour: str, names: bool) -> None:
    """A series under its name; one without a name is the only one, and ours."""

    def plot(values: np.ndarray, style: str, **how: Any) -> None:
        axis.plot(*((values, places) if names else (places, values)), style, **how)

    if np.isfinite(its.random).any():
        plot(its.random, "|" if names else ":", color="grey", markersize=12, label="random policy")
    for (author, values), marker in zip(its.published.items(), "Dsv^", strict=False):
        whose = f"{name}, {author}" if name else author
        plot(values, marker, color=colour, alpha=0.4, markersize=7, label=whose)
    plot(its.y, "o" if names else "o-", color=colour, label=name or "ours", markersize=6)
    for values in its.seeds.T:
        plot(values, "o", color=colour, markerfacecolor="white", markersize=3)
    span = axis.hlines if names else axis.vlines
    known = np.isfinite(its.low)
    span(places[known], its.low[known], its.high[known], color=colour, linewidth=1.5)


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
