"""What a grid comes to: table.csv, table.md, figure.png and, where asked for, pictures.png."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import numpy as np

from wm import figures
from wm.evaluate import CONFIDENCE, PARTS, Score
from wm.files import write_atomically
from wm.grid import Cell, Grid, matches, published
from wm.tracking import git_commit
from wm.trials import RETURNS, Trial, difference, returns_by_seed, together

PICTURES = "pictures.png"
RANDOM = "random/mean"  # drawn as a line beside the agents' scores
SCORE = "eval/mean"
TITLES = {  # of a figure's panels
    "eval/mean": "return in the game",
    "dream/mean": "return in its own dreams",
    "best/real_score": "return on validation seeds",
    "eval/reconstruction_error": "V's squared error, of a pixel",
    "vision/val_reconstruction": "V's squared error, of a picture",
    "vision/val_kl": "KL of a picture, nats",
    "vision/active_latents": "active latents",
    "memory/val_nll": "M's NLL of a latent, nats",
    "memory/error_by_horizon": "M's error, left alone for 25 steps",
    "cost/real_steps": "steps of the game",
    "cost/seconds": "seconds of all stages",
}
NOT_SAID = ("trainer.", "runs=", "scale=")  # where a cell's words are shown


class Row:
    """A cell, its trials, and the scores of all metrics over the finished ones."""

    def __init__(self, cell: Cell, trials: Sequence[Trial], metrics: Sequence[str]):
        self.cell, self.trials = cell, trials
        self.scores = {metric: together(trials, metric) for metric in metrics}
        self.finished = sum(trial.finished for trial in trials)

    @property
    def seeds(self) -> str:
        count = len(self.trials)
        return str(count) if self.finished == count else f"{self.finished} of {count}"


def write_results(grid: Grid, trials: Sequence[Trial], command: str, folder: Path) -> list[Path]:
    """Write everything into a folder; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = dict.fromkeys([*grid.metrics, RANDOM])
    by_cell: dict[Cell, list[Trial]] = {}
    for trial in trials:
        by_cell.setdefault(trial.cell, []).append(trial)
    rows = [Row(cell, its, list(metrics)) for cell, its in by_cell.items()]
    write_atomically(folder / "table.csv", table_csv(grid, rows))
    write_atomically(folder / "table.md", table_md(grid, rows, command))
    files = [folder / "table.csv", folder / "table.md"]
    files.append(figures.save(draw(grid, rows), folder / "figure.png"))
    if grid.pictures and (shown := pictures(grid, rows)):
        files.append(figures.save_small(figures.stacked(shown), folder / PICTURES))
    return files


def table_csv(grid: Grid, rows: Sequence[Row]) -> str:
    """One line a cell: axes, finished seeds, episodes of each, five columns a metric."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = [f"{metric} {part}" for metric in grid.metrics for part in (*PARTS, "published")]
    table.writerow([*grid.axes, "seeds", "episodes", *names])
    for row in rows:
        line = [*row.cell.values.values(), row.finished, row.trials[0].episodes]
        for metric in grid.metrics:
            score = row.scores[metric]
            line += [getattr(score, part) for part in PARTS] if score else [""] * len(PARTS)
            line.append(said(published(grid, row.cell, metric)))
        table.writerow(line)
    return text.getvalue()


def table_md(grid: Grid, rows: Sequence[Row], command: str) -> str:
    """Question, caption, table, and what did not finish."""
    beside = {m for m in grid.metrics if any(published(grid, row.cell, m) for row in rows)}
    heads = [*grid.axes]
    for metric in grid.metrics:
        heads += [metric, f"{metric}, published"] if metric in beside else [metric]
    lines = [_line([*heads, "seeds"]), _line(["---"] * (len(heads) + 1))]
    for row in rows:
        line = [*row.cell.values.values()]
        for metric in grid.metrics:
            line.append(shown(row.scores[metric]))
            if metric in beside:
                line.append(said(published(grid, row.cell, metric)) or "-")
        lines.append(_line([*line, row.seeds]))
    parts = [
        f"# {grid.name}",
        f"Question: {grid.question}",
        f"Published: {grid.answer}",
        "\n".join(lines),
        caption(rows),
        settings(rows),
        *told_apart(rows),
        *_elsewhere(grid, rows),
        *(f"**Not finished:** {t.name}" for row in rows for t in row.trials if not t.finished),
        f"```\n{command}\n```",
        origin(rows),
    ]
    return "\n\n".join(parts) + "\n"


def said(by_author: Mapping[str, str]) -> str:
    """Published scores in a table's cell."""
    return "; ".join(
        f"{score} ({author})" if author != "published" else score
        for author, score in by_author.items()
    )


def caption(rows: Sequence[Row]) -> str:
    """How many seeds and episodes a number stands for, and what is written around it."""
    seeds = [trial.seed for trial in rows[0].trials]
    return (
        f"Training seeds: {len(seeds)} ({', '.join(map(str, seeds))}), {episodes(rows)} each. "
        "Scores: mean ± standard deviation over episodes, and the "
        f"{CONFIDENCE:.0%} bootstrap interval of the mean over seeds and episodes. Other numbers: "
        "mean ± standard deviation over seeds, and their bootstrap interval where there are three "
        "(of three it is from the least to the greatest). With so few seeds every interval is a "
        "least width."
    )


def episodes(rows: Sequence[Row]) -> str:
    """How many a score is of."""
    counts = sorted({trial.episodes for row in rows for trial in row.trials})
    return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} episodes"


def settings(rows: Sequence[Row]) -> str:
    """The words of all cells, and of each what its name does not say."""
    words = {row.cell.name: _words(row.cell) for row in rows}
    common = [word for word in words[rows[0].cell.name] if all(word in w for w in words.values())]
    lines = [f"In every cell: `{' '.join(common) or 'the defaults'}`."]
    for row in rows:
        axes = {f"{axis}={value}" for axis, value in row.cell.values.items()}
        own = [word for word in words[row.cell.name] if word not in axes.union(common)]
        if own:
            lines.append(f"- {row.cell.name}: `{' '.join(own)}`")
    return "\n".join(lines)


def _words(cell: Cell) -> list[str]:
    """Of each key the last, which holds."""
    last = {word.partition("=")[0]: word for word in cell.words}
    return [word for word in last.values() if not word.startswith(NOT_SAID)]


def told_apart(rows: Sequence[Row]) -> list[str]:
    """Which cells of a game differ by more than chance; [] where there are none to compare."""
    games: dict[str | None, dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        cells = games.setdefault(row.cell.values.get("env"), {})
        cells[row.cell.name] = returns_by_seed(row.trials, SCORE)
    pairs, apart, below = 0, 0, {}
    for cells in games.values():
        for one, other in combinations(cells, 2):
            by = difference(cells[one], cells[other])
            if by and by.ci_high < 0:
                one, other, by = other, one, difference(cells[other], cells[one])
            if by and by.ci_low > 0:
                below.setdefault(one, []).append(f"{other} by {shown(by)}")
                apart += 1
            pairs += by is not None
    head = (
        f"Told apart by {SCORE}: {apart} of {pairs} pairs. A pair is where the "
        f"{CONFIDENCE:.0%} bootstrap interval of its difference, seed by seed and game by game, "
        f"excludes zero; by chance alone at least one in {round(1 / (1 - CONFIDENCE))} is. "
        "Differences: mean ± standard deviation over episodes, and that interval."
    )
    lines = [f"- {lower} is below {'; '.join(others)}" for lower, others in below.items()]
    return ["\n".join([head, *lines])] if pairs else []


def origin(rows: Sequence[Row]) -> str:
    """What the stages took, and the commits of this table and of theirs."""
    trials = [trial for row in rows for trial in row.trials]
    distinct = {stage.fingerprint: stage for t in trials for stage in t.pipeline.stages}
    records = [record for stage in distinct.values() if (record := stage.record)]
    minutes = sum(record["seconds"] for record in records) / 60
    made_at = sorted({record["versions"]["commit"] for record in records})
    took = f"Its {len(records)} stages took {minutes:,.0f} minutes, added up. "
    where = f"Table at commit {git_commit()}; stages made at {', '.join(made_at) or 'none'}."
    return took + where + (" A + marks uncommitted changes." if "+" in where else "")


def _elsewhere(grid: Grid, rows: Sequence[Row]) -> list[str]:
    """Published numbers that stand beside no cell."""
    lonely = [line for line in grid.published if not any(matches(line, r.cell) for r in rows)]
    return [
        "Published, without a cell here: "
        + ", ".join(f"{k} {v}" for k, v in {**line.get("at", {}), **line}.items() if k != "at")
        for line in lonely
    ]


def _line(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"


def shown(score: Score | None) -> str:
    """A mean, with what is known of its uncertainty; the smaller, the more decimals."""
    if score is None:
        return "-"
    size = abs(score.mean)
    decimals = 0 if size >= 1e4 else 1 if size >= 10 else 5 if 0 < size < 0.1 else 3
    numbers = [f"{getattr(score, part):,.{decimals}f}" for part in PARTS]
    if np.isnan(score.ci_low):
        return numbers[0]
    return f"{numbers[0]} ± {numbers[1]} [{numbers[2]}, {numbers[3]}]"


def draw(grid: Grid, rows: Sequence[Row]) -> figures.Figure:
    """A panel for each metric over the last axis, a colour for each combination of the others.

    What the random policy scores is drawn beside the agents' scores, or else has its own panel.
    """
    *others, last = grid.axes
    labels = list(dict.fromkeys(row.cell.values[last] for row in rows))
    with suppress(ValueError):  # of names
        labels.sort(key=float)
    series: dict[str, dict[str, Row]] = {}
    for row in rows:
        name = ", ".join(row.cell.values[axis] for axis in others if several(rows, axis))
        series.setdefault(name, {})[row.cell.values[last]] = row
    drawn = [metric for metric in grid.metrics if metric != RANDOM or SCORE not in grid.metrics]
    titles = {metric: TITLES.get(metric, metric) for metric in drawn}
    panels = {
        title: {
            name: series_of(grid, metric, [at[label] for label in labels])
            for name, at in series.items()
        }
        for metric, title in titles.items()
    }
    says = (
        f"{len(rows[0].trials)} training seeds (rings), {episodes(rows)} each; "
        f"bars: {CONFIDENCE:.0%} intervals"
    )
    returns = [title for metric, title in titles.items() if metric in RETURNS]
    return figures.panels(panels, labels, last.split(".")[-1], says, returns)


def several(rows: Sequence[Row], axis: str) -> bool:
    """Whether cells differ in an axis."""
    return len({row.cell.values[axis] for row in rows}) > 1


def series_of(grid: Grid, metric: str, rows: Sequence[Row]) -> figures.Series:
    """A metric of some cells; beside the agents' scores those of others and of random play."""
    y, low, high = (
        np.array([_part(row.scores[metric], part) for row in rows])
        for part in ("mean", "ci_low", "ci_high")
    )
    random = [_part(row.scores[RANDOM], "mean") if metric == SCORE else np.nan for row in rows]
    by_seed = [[t.fact(metric) if t.finished else None for t in row.trials] for row in rows]
    by_cell = [published(grid, row.cell, metric) for row in rows]
    authors = {
        author: np.array([first_number(by.get(author, "")) for by in by_cell])
        for author in dict.fromkeys(author for by in by_cell for author in by)
    }
    return figures.Series(y, low, high, np.array(by_seed, float), authors, np.array(random))


def _part(score: Score | None, part: str) -> float:
    return getattr(score, part) if score else np.nan


def first_number(text: str) -> float:
    """The mean of a published `mean ± deviation`; NaN of nothing."""
    found = re.match(r"\s*(-?[\d.]+)", text)
    return float(found[1]) if found else float("nan")


def pictures(grid: Grid, rows: Sequence[Row]) -> dict[str, Path]:
    """The grid's picture of each cell's first trial; once, where cells have the same."""
    stage_name, _, file = grid.pictures.partition("/")
    cells: dict[Path, list[Cell]] = {}
    for row in rows:
        named = [s for s in row.trials[0].pipeline.stages if s.name == stage_name]
        for stage in named[-1:]:  # of the last round
            if (stage.folder / file).is_file():
                cells.setdefault(stage.folder / file, []).append(row.cell)
    every = [row.cell for row in rows]
    return {in_common(its, every): path for path, its in cells.items()}


def in_common(cells: Sequence[Cell], every: Sequence[Cell]) -> str:
    """A name of some cells of all: the axes in which they agree, where no others do."""
    first, *others = (cell.values for cell in cells)
    common = {item for item in first.items() if all(item in its.items() for its in others)}
    if [cell for cell in every if common <= cell.values.items()] != list(cells):
        return "; ".join(cell.name for cell in cells)
    values = {axis: value for axis, value in first.items() if (axis, value) in common}
    return Cell(values, ()).name or "every cell"
