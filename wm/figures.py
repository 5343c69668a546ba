"""Pictures to look at instead of numbers: grids of frames, curves, filmstrips, videos."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import imageio.v3 as iio
import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
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


def futures(
    frame: np.ndarray, following: np.ndarray, sampled: Sequence[np.ndarray], weights: np.ndarray
) -> Figure:
    """A real frame, the real next one, sampled next ones, and the mixture weights [K]."""
    pictures = [frame, following, *sampled]
    size = (1.6 * len(pictures) + 2, 1.9)
    figure, axes = plt.subplots(1, len(pictures) + 1, figsize=size, layout="constrained")
    titles = ["now", "next, real", *(f"next, dream {i + 1}" for i in range(len(sampled)))]
    for axis, picture, title in zip(axes, pictures, titles, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    axes[-1].bar(np.arange(1, len(weights) + 1), weights, color="tab:blue")
    axes[-1].set_title("mixture weights", fontsize=9)
    axes[-1].set_ylim(0, 1)
    axes[-1].set_xticks(np.arange(1, len(weights) + 1))
    return figure


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    title: str = "",
) -> Figure:
    """Lines by name: (x, y)."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for name, (x, y) in lines.items():
        axis.plot(x, y, label=name, marker="o" if len(x) < 20 else None, markersize=3)
    axis.set(xlabel=x_label, ylabel=y_label, title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def video(frames: np.ndarray, path: Path, fps: float, scale: int = 4) -> Path:
    """uint8 frames [T,H,W,3] as an mp4, each pixel enlarged to a square."""
    large = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    iio.imwrite(path, large, fps=fps, codec="libx264", macro_block_size=1)
    return path
