"""`wm ablate`: a grid of pipelines to one table, one figure and one MLflow experiment.

A grid's file says what is asked (grid.py); every cell is run with every training seed (trials.py),
and the stages that these have in common once (schedule.py); results.py writes what comes of it.
"""

import dataclasses
import difflib
import math
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from wm import WMError
from wm.config import ConfigError, bounded, dotlist, load, merge, plain
from wm.grid import Grid, at_scale, base_words, cells, choose, common_words, read_grid
from wm.ranks import gather
from wm.results import PICTURES, write_results
from wm.schedule import Pipeline, Task, last_lines, missing_tasks, run_tasks
from wm.stages import Stage
from wm.tracking import Tracker, ui_command
from wm.training import require_accelerator
from wm.trials import LEAST_SEEDS, Trial
from wm.workers import Workers

DRY_RUN = "--dry-run"


class Family(Protocol):
    """The pipeline of a family of agents, as a module."""

    Config: type
    stages: Callable[[Any], list[Stage]]
    run_labelled: Callable[[str, Sequence[str]], None]


@dataclass(frozen=True)
class Options:
    """Words of the command that concern the grid and not its cells."""

    jobs: int = bounded(0, 0)  # stages side by side; 0: one for every core
    seeds: list[int] = field(default_factory=list)  # in place of the grid's
    publish: bool = False  # copy table and figure to a folder beside the grid's file


@dataclass(frozen=True)
class Plan:
    """A grid at a scale, with all that is to be done."""

    grid: Grid
    trials: list[Trial]
    config: Any  # what all cells have in common
    options: Options
    source: Path  # the grid's file
    command: str
    changes: list[str]  # words that make it another grid than the file's

    @property
    def folder(self) -> Path:
        """Of the results: NAME-SCALE, and where words change the grid a name of their own."""
        name = f"{self.grid.name}-{self.config.scale}"
        if self.changes:
            name += "-" + sha256(" ".join(sorted(self.changes)).encode()).hexdigest()[:6]
        return Path(self.config.runs) / "ablations" / name

    @property
    def fingerprint(self) -> str:
        return sha256("".join(trial.fingerprint for trial in self.trials).encode()).hexdigest()


def ablate(family: Family, words: Sequence[str]) -> None:
    """Run a grid, or say what would be run.

    Args:
        words: the grid's file, options, keys of the configuration, and perhaps --dry-run.

    Raises:
        WMError: if the file or a word is wrong, and at the end if a stage has failed.
    """
    plan = make_plan(family, [word for word in words if word != DRY_RUN])
    tasks = missing_tasks([trial.pipeline for trial in plan.trials], plan.folder / "logs")
    if DRY_RUN in words:
        print_plan(plan, tasks)
        return
    jobs, pipelines = plan.options.jobs, len(plan.trials)
    print(f"{plan.grid.name}: {pipelines} pipelines, {len(tasks)} stages; {time_left(tasks, jobs)}")
    with open_tracker(plan) as tracker:
        failed = run_all(plan, tasks, family.run_labelled, tracker)
        files = write_results(plan.grid, plan.trials, plan.command, plan.folder)
        for path in files:
            tracker.log_file(path)
        print(f"\n{(plan.folder / 'table.md').read_text()}\ntable, figure: {plan.folder}")
        print(f"runs: {ui_command(Path(plan.config.runs))}")
        for metric in unknown_metrics(plan):
            print(f"no stage has measured {metric}; see the metrics in {plan.source}")
        if failed:
            raise WMError(f"{failed} stages failed, see above; the same command tries them again")
    if plan.options.publish:
        publish(files, plan.source.with_suffix(""))


def make_plan(family: Family, words: Sequence[str]) -> Plan:
    """What the words ask for.

    Raises:
        ConfigError: if the grid or a word is wrong.
    """
    names = {option.name for option in dataclasses.fields(Options)}
    files = [word for word in words if "=" not in word]
    chosen = [word for word in words if word.partition("=")[0] in names]
    if len(files) != 1:
        raise ConfigError("name one grid, for instance ablations/temperature.yaml")
    source, whole = Path(files[0]), read_grid(Path(files[0]))
    points = [word for word in words if word.partition("=")[0] in whole.axes]
    others = [word for word in words if word not in (*files, *chosen, *points)]
    for key in (word.partition("=")[0] for word in others):
        if near := difflib.get_close_matches(key, names, n=1, cutoff=0.7):
            raise ConfigError(f"unknown key '{key}'; did you mean '{near[0]}'?")
    options = merge(Options, dotlist(chosen))
    scale = [word for word in base_words(whole, others) if word.startswith("scale=")]
    grid = choose(at_scale(whole, load(family.Config, scale).scale), whole, points)
    base = load(family.Config, common_words(grid, others))
    require_accelerator(base.trainer.accelerator)
    gather(1, 1)  # its processes are its own: ranks that others have started would do the same
    grid = replace(grid, seeds=list(dict.fromkeys(options.seeds or grid.seeds)))
    if options.publish and len(grid.seeds) < LEAST_SEEDS:
        raise ConfigError(f"what is published needs {LEAST_SEEDS} training seeds at least")
    options = replace(options, jobs=Workers(options.jobs).count)
    if base.trainer.devices * base.trainer.num_nodes > 1:
        raise ConfigError("the stages of a grid run on one device each, side by side: jobs=N")
    command = f"wm ablate {shlex.join(words)}"
    trials = make_trials(family, grid, others, options.jobs)
    where = ("scale=", "runs=", "trainer.", "jobs=", "publish=")
    changes = [word for word in (*chosen, *points, *others) if not word.startswith(where)]
    return Plan(grid, trials, base, options, source, command, changes)


def make_trials(family: Family, grid: Grid, words: Sequence[str], jobs: int) -> list[Trial]:
    """Every cell with every seed: first all cells of the first seed."""
    alone = ["trainer.workers=1"] if jobs > 1 else []  # its stages play in one process each
    made, trials = cells(grid, [*alone, *words]), []
    for seed in grid.seeds:
        for cell in made:
            said = (*cell.words, f"seed={seed}")
            config = load(family.Config, said)
            minutes = config.minutes * (2 if jobs > 1 else 1)  # on one of the 2 cores they mean
            pipeline = Pipeline(said, tuple(family.stages(config)), minutes)
            trials.append(Trial(cell, seed, config.evaluate.episodes, pipeline))
    return trials


def open_tracker(plan: Plan) -> Tracker:
    """The grid's own experiment, and its parent run: one for each fingerprint."""
    runs, name = Path(plan.config.runs), plan.grid.name
    title = f"{name}-{plan.config.scale}"
    config = {key: value for key, value in plain(plan.config).items() if key != "runs"}
    return Tracker(runs, config, plan.fingerprint, None, f"ablation-{name}", title)


def run_all(
    plan: Plan,
    tasks: Mapping[str, Task],
    run_stage: Callable[[str, Sequence[str]], None],
    tracker: Tracker,
) -> int:
    """Do all tasks and show every trial as it ends; how many tasks failed."""
    metrics, left, failed = plan.grid.metrics, dict(tasks), 0
    unfinished = [trial for trial in plan.trials if not trial.finished]
    for trial in plan.trials:
        if trial not in unfinished:
            trial.track(tracker, metrics)
    running = closing(run_tasks(tasks, run_stage, plan.options.jobs))
    with tqdm(total=len(tasks), desc=plan.grid.name, unit="stage") as progress, running as results:
        for task, done in results:
            del left[task.stage.fingerprint]
            progress.update()
            progress.set_postfix_str(time_left(left, plan.options.jobs))
            if not done:
                failed += 1
                tqdm.write(f"{task.command}\nfailed; {task.log} ends\n{last_lines(task.log)}")
            for trial in [trial for trial in unfinished if trial.finished]:
                unfinished.remove(trial)
                trial.track(tracker, metrics)
                tqdm.write(trial.line(metrics))
    for trial in unfinished:
        trial.track(tracker, [])
        print(f"{trial.name}: not finished")
    return failed


def unknown_metrics(plan: Plan) -> list[str]:
    """Metrics of the grid that no finished trial knows."""
    ended = [trial for trial in plan.trials if trial.finished]
    asked = plan.grid.metrics if ended else []
    return [name for name in asked if all(trial.fact(name) is None for trial in ended)]


def print_plan(plan: Plan, tasks: Mapping[str, Task]) -> None:
    for trial in plan.trials:
        count = len(trial.pipeline.stages)
        print(f"{trial.stages_done} of {count} stages done  {trial.name}\n    {trial.command}")
    print(f"{len(tasks)} distinct stages to do, {plan.options.jobs} at a time; ", end="")
    print(time_left(tasks, plan.options.jobs))


def time_left(tasks: Mapping[str, Task], jobs: int) -> str:
    """From finished stages like these, else from the scale's minutes.

    tasks: by fingerprint; those that others need come first.
    """
    seconds = {fingerprint: task.seconds for fingerprint, task in tasks.items()}
    unknown = [*seconds.values()].count(0)
    if unknown == len(seconds) > 0:
        return "nobody knows how long it takes"
    ends: dict[str, float] = {}  # if no stage waited for others than those that it needs
    for fingerprint, task in tasks.items():
        before = (ends.get(needed.fingerprint, 0) for needed in task.stage.inputs.values())
        ends[fingerprint] = seconds[fingerprint] + max(before, default=0)
    minutes = math.ceil(max(sum(seconds.values()) / jobs, *ends.values(), 0) / 60)
    return f"at least {minutes} min left" if unknown else f"about {minutes} min left"


def publish(files: Sequence[Path], target: Path) -> None:
    """Copy what is shown to the folder beside the grid's file."""
    target.mkdir(exist_ok=True)
    (target / PICTURES).unlink(missing_ok=True)  # of a grid that had some
    for path in files:
        shutil.copy(path, target)
    print(f"published: {target}")
