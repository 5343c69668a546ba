"""A grid file: axes whose product makes the cells, training seeds, metrics, published numbers.

```yaml
# Question: what is asked.
# Published: what the published answer is.
base: {env: takecover}                 # configuration keys of every cell
axes:                                  # a list of values of a configuration key, or named points
  controller.temperature: [0.5, 1.0]   # that set any keys
  sees: {z alone: {controller.features: z}, z and h: {controller.features: zh}}
seeds: [0, 1, 2]
metrics: [dream/mean, eval/mean]       # facts of stages
pictures: memory/futures.png           # of a stage: every cell's for the first seed, in one picture
published:                             # at: the axes' values that a row belongs to
  - {by: who, at: {controller.temperature: 1.0}, eval/mean: 868 ± 511}
at: {smoke: {seeds: [0]}}              # what is different at a scale; of axes, those it names
```

Where a value on an axis is a mapping, the cell's game or value on another axis chooses:
`collect.episodes: {takecover: 3, carracing: 6}`.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import ListConfig

from wm.config import ConfigError, dotlist, merge, read_yaml

HEADINGS = ("# Question: ", "# Published: ")  # of the first two lines


@dataclass(frozen=True)
class Grid:
    """What a grid file says; see above."""

    base: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    metrics: list[str] = field(default_factory=lambda: ["eval/mean"])
    published: list[dict[str, Any]] = field(default_factory=list)
    pictures: str = ""  # stage/file: shown cell below cell, of the first seed
    at: dict[str, Any] = field(default_factory=dict)
    name: str = ""  # the file's, as the two that follow
    question: str = ""
    answer: str = ""


@dataclass(frozen=True, eq=False)
class Cell:
    """A combination of the axes' values, and the `key=value` words that set them."""

    values: Mapping[str, str]  # by axis, as shown
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return ", ".join(
            f"{axis.split('.')[-1]} {value}" if "." in axis or value.isdigit() else value
            for axis, value in self.values.items()
        )


def read_grid(path: Path) -> Grid:
    """Read a grid file.

    Raises:
        ConfigError: if it is not there, has an unknown key, or lacks its two headings.
    """
    tree = read_yaml(path)
    try:
        grid = merge(Grid, tree)
    except ConfigError as error:
        raise ConfigError(f"{path} is no grid: {error}") from None
    lines = path.read_text().splitlines()[:2]
    for line, heading in itertools.zip_longest(lines, HEADINGS, fillvalue=""):
        if not line.startswith(heading):
            raise ConfigError(f"{path} must begin with a line '{heading}...', not '{line}'")
    if not grid.axes or not all(grid.axes.values()):
        raise ConfigError(f"{path} has no axes, or one without points")
    if not grid.seeds:
        raise ConfigError(f"{path} has no seeds")
    texts = (line.removeprefix(head) for line, head in zip(lines, HEADINGS, strict=True))
    return replace(grid, **dict(zip(("question", "answer"), texts, strict=True)), name=path.stem)


def at_scale(grid: Grid, scale: str) -> Grid:
    """The grid with what is different at a scale."""
    known = replace(grid, axes={}, published=[], at={})
    changes = merge(Grid, known, grid.at.get(scale, {}))
    axes = grid.axes | changes.axes  # an axis that the scale does not name stays as it is
    return replace(changes, axes=axes, published=grid.published, at={})


def choose(grid: Grid, whole: Grid, words: Sequence[str]) -> Grid:
    """The grid with those points of its axes alone that words name.

    Args:
        grid: at a scale.
        whole: as its file says it: here are the points that the scale leaves out.
        words: as `env=carracing` or `vision.beta=[0.1,1]`.

    Raises:
        ConfigError: if an axis has no such point.
    """
    axes = dict(grid.axes)
    for word in words:
        axis, _, text = word.partition("=")
        points = dict(_points(axis, whole.axes[axis])) | dict(_points(axis, grid.axes[axis]))
        value = dotlist([f"value={text}"]).value
        wanted = value if isinstance(value, ListConfig) else [value]
        chosen = [name for want in wanted for name in points if _same(name, want)]
        if len(chosen) < max(1, len(wanted)):
            raise ConfigError(f"axis {axis} has no point {text}, but {', '.join(points)}")
        axes[axis] = {name: points[name] for name in chosen}
    return replace(grid, axes=axes)


def cells(grid: Grid, words: Sequence[str] = ()) -> list[Cell]:
    """All combinations of the axes' values; `words` win over the base, not over the axes.

    Raises:
        ConfigError: if a word sets what an axis does, or if the seed is set.
    """
    given = dict(word.split("=", 1) for word in words)
    axes = [_points(axis, values) for axis, values in grid.axes.items()]
    made = []
    for combination in itertools.product(*axes):
        settings = {key: value for _, keys in combination for key, value in keys.items()}
        if taken := given.keys() & settings.keys():
            raise ConfigError(f"{min(taken)} is set by an axis of {grid.name}, not by a word")
        if "seed" in grid.base | given | settings:
            raise ConfigError("the seeds of a grid are chosen together: seeds=[0,1,2]")
        shown = dict(zip(grid.axes, (label for label, _ in combination), strict=True))
        here = [*shown.values(), str((grid.base | given | settings).get("env"))]
        set_here = [_word(key, value, here) for key, value in settings.items()]
        made.append(Cell(shown, (*base_words(grid, words), *set_here)))
    return made


def base_words(grid: Grid, words: Sequence[str]) -> list[str]:
    """The words of the base and then others, which win."""
    given = dict(word.split("=", 1) for word in words)
    return [*(_word(key, value) for key, value in grid.base.items() if key not in given), *words]


def common_words(grid: Grid, words: Sequence[str]) -> list[str]:
    """The words of all cells."""
    first, *others = cells(grid, words)
    return [word for word in first.words if all(word in cell.words for cell in others)]


def matches(row: Mapping[str, Any], cell: Cell) -> bool:
    """Whether a published row belongs to a cell."""
    at = row.get("at", {}).items()
    return all(axis in cell.values and _same(cell.values[axis], value) for axis, value in at)


def published(grid: Grid, cell: Cell, metric: str) -> dict[str, str]:
    """The published scores of a cell by author, as written."""
    rows = [row for row in grid.published if metric in row and matches(row, cell)]
    return {row.get("by", "published"): str(row[metric]) for row in rows}


def _points(axis: str, values: Any) -> list[tuple[str, dict[str, Any]]]:
    """The points of an axis: how each is shown, and the keys that it sets."""
    if isinstance(values, Mapping):
        for name, keys in values.items():
            if not isinstance(keys or {}, Mapping):
                raise ConfigError(f"point '{name}' of axis {axis} sets no keys: {keys}")
        return [(str(name), dict(keys or {})) for name, keys in values.items()]
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ConfigError(f"axis {axis} is neither a list of values nor of named points: {values}")
    points: list[tuple[str, dict[str, Any]]] = []
    for value in values:
        points += _points(axis, value) if isinstance(value, Mapping) else [_point(axis, value)]
    return points


def _point(axis: str, value: Any) -> tuple[str, dict[str, Any]]:
    return str(value), {axis: value}


def _same(point: str, value: Any) -> bool:
    """Whether a point of an axis is what is meant: 1 is 1.0."""
    try:
        return float(point) == float(str(value))
    except ValueError:
        return point == str(value)


def _word(key: str, value: Any, here: Sequence[str] = ()) -> str:
    """`key=value`; of a mapping that value which belongs to one of the names here."""
    if isinstance(value, Mapping):
        chosen = [choice for name, choice in value.items() if str(name) in here]
        if not here:
            raise ConfigError(f"{key}: {value} may stand on an axis only, whose cells can choose")
        if len(chosen) != 1:
            raise ConfigError(f"{key} has no value of its own for {', '.join(here)}: {value}")
        (value,) = chosen
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"
