"""The paper's stages in order: collect, vision, memory, controller; then evaluate and report.

`rounds` repeats the first four with the newest controller as collector: all data is kept, V and M
go on from the last round, and C from its last mean. A choice between the rounds' agents is then
made on validation seeds. If `tuning` lets C go on in the real game, the tuned one is evaluated
without a choice, and with `controller.keep=mean` the last.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from wm import WMError
from wm.collect import CollectConfig
from wm.config import ConfigError, bounded, covered, load, plain
from wm.envpool import require_envpool
from wm.envs import EnvConfig, validation_seeds
from wm.evaluate import PARTS, EvaluateConfig
from wm.files import sha256
from wm.ranks import gather, leads
from wm.stages import Stage, run_stage
from wm.tracking import Silence, Tracker, ui_command
from wm.training import TrainerConfig, require_accelerator
from wm.workers import RandomPlayer, Workers
from wm.worldmodels import report, work
from wm.worldmodels.agent import FILES, Agent, AgentConfig, AgentPlayer, find_agent
from wm.worldmodels.controller import ControllerConfig, TuningConfig
from wm.worldmodels.mdnrnn import MemoryConfig
from wm.worldmodels.vae import VisionConfig
from wm.worlds import ORDINARY, require_world

PARITY_SEEDS = 20
MOST_WEIGHTS = 10_000  # of CMA-ES, whose covariance of these takes 0.8 GB
REPAIR = "--repair"
SCORING = ("evaluate", "trainer", "scale", "runs")  # sections that matter to an agent that is there
VERSIONS = {  # raised when a stage's code changes what the stage makes
    "collect": 2,
    "vision": 2,
    "memory": 2,
    "controller": 4,
    "choice": 1,
    "baseline": 2,
    "agent": 1,
    "evaluate": 4,
    "report": 1,
}


@dataclass(frozen=True)
class Config:
    env: EnvConfig = field(default_factory=EnvConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    scale: str = "laptop"
    rounds: int = bounded(1, 1, 10)
    choice_episodes: int = bounded(48, 1)  # on validation seeds, of every round's agent
    tuning: TuningConfig = field(default_factory=TuningConfig)  # of C, after the last round
    seed: int = bounded(0, 0, 1999)
    runs: str = "runs"  # the folder of everything that is made
    minutes: int = bounded(0, 0)  # measured on 2 cores and said up front; 0: not measured

    @property
    def agent(self) -> AgentConfig:
        return AgentConfig(self.env, self.vision, self.memory, self.controller)

    @property
    def tuned(self) -> AgentConfig:
        """Of the agent that goes on in the real game."""
        real = replace(self.controller, fitness="real", **asdict(self.tuning))
        return replace(self.agent, controller=real)

    def __post_init__(self) -> None:
        agent = self.tuned if self.tuning.generations else self.agent  # which refuse, too
        if self.controller.optimizer == "cma" and agent.parameters > MOST_WEIGHTS:
            raise ConfigError(
                f"controller.optimizer=cma keeps the covariance of at most {MOST_WEIGHTS} weights, "
                f"and here are {agent.parameters}: controller.hidden=0 makes C linear"
            )
        if self.collect.simulator == "envpool":
            require_envpool(self.env)
        require_world(self.env.name, self.evaluate.world)


def stages(config: Config) -> list[Stage]:
    """The pipeline as a graph, in order; what a stage is given is what its fingerprint covers."""
    env, seed = config.env, config.seed
    make = partial(_stage, config)
    graph: list[Stage] = []
    data, V, M, C = {}, {}, {}, {}  # the newest stages by role: all data, one of each model
    for r in range(config.rounds):
        now = config if r else without_later(config)
        vision, memory = now.vision, now.memory
        collection = {"env": env, "collection": now.collect, "seed": seed, "round": r}
        collect = make("collect", work.collect_episodes, C, collection, r)
        data = {**data, collect.label: collect}
        seen = {"vision": vision, "seed": seed}
        V = {"vision": make("vision", work.train_vision, data | V, seen, r)}
        remembered = {"env": env, "vision": vision, "memory": memory, "seed": seed}
        M = {"memory": make("memory", work.train_memory, data | V | M, remembered, r)}
        evolved = {"config": now.agent, "seed": seed, "round": r}
        C = {"controller": make("controller", work.evolve_controller, data | V | M | C, evolved, r)}
        graph += [collect, V["vision"], M["memory"], C["controller"]]
    if config.tuning.generations:
        r = config.rounds
        evolved = {"config": now.tuned, "seed": seed, "round": r}
        C = {"controller": make("controller", work.evolve_controller, data | V | M | C, evolved, r)}
        graph.append(C["controller"])
    elif config.rounds > 1 and config.controller.keep == "best":
        every = {stage.label: stage for stage in graph if stage.name == "controller"}
        before = config.controller.validation_episodes
        choice = {"env": env, "before": before, "episodes": config.choice_episodes}
        C = {"controller": make("choice", work.choose_round, every, choice)}
        graph.append(C["controller"])
    evaluation = {"env": env, "evaluation": config.evaluate}
    graph.append(make("baseline", work.play_baseline, {}, baseline(config)))
    graph.append(make("evaluate", work.evaluate_agent, C, evaluation))
    everything = {stage.label: stage for stage in graph}
    shown = {"config": result_config(config)}
    page = make("report", report.write_report, everything, shown)
    return [*graph, replace(page, reads=report.READS)]


def without_later(config: Config) -> Config:
    """With the defaults of what concerns later rounds only, so that the first can be shared."""
    later = {"later_episodes": CollectConfig.later_episodes, "noise": CollectConfig.noise}
    return replace(
        config,
        collect=replace(config.collect, **later),
        vision=replace(config.vision, later_steps=VisionConfig.later_steps),
        memory=replace(config.memory, later_steps=MemoryConfig.later_steps),
    )


def baseline(config: Config) -> dict[str, Any]:
    """What the random policy is given: as in the published tables, it holds no action."""
    return {"env": replace(config.env, repeat=1), "evaluation": config.evaluate}


def _stage(
    config: Config,
    name: str,
    do: Callable,
    inputs: Mapping[str, Stage],
    given: Mapping[str, Any],
    round: int | None = None,
) -> Stage:
    record = {key: covered(part) if is_dataclass(part) else part for key, part in given.items()}
    root = Path(config.runs) / config.env.name
    task = partial(do, trainer=config.trainer, **given)
    return Stage(name, VERSIONS[name], record, task, root, inputs, round)


def result_config(config: Config) -> dict[str, Any]:
    """The configuration without what only says where the work is done."""
    kept = covered(config)
    return {key: kept[key] for key in kept if key not in ("trainer", "runs", "minutes")}


def run(words: Sequence[str]) -> None:
    """All stages; those that are done are skipped. Ends with the table of scores."""
    config, words, repair = begin(words, ("vision", "memory"))
    graph = stages(config)
    if not graph[-1].done:
        measured = f"scale={config.scale} takes about {config.minutes} minutes on 2 cores"
        print(measured if config.minutes else "how long this takes has not been measured")
        print("each stage shows the time it still needs; after Ctrl-C the same command goes on")
    with open_tracker(config, graph) as tracker:
        for stage in graph:
            run_stage(stage, tracker, words, repair, wait=True)
        tracker.summarise(summary(graph), scored_controller(graph))
    print_results(config, graph)


def run_only(name: str, words: Sequence[str]) -> None:
    """The stages of one name, as far as their inputs are there.

    Raises:
        WMError: if there are none, or not even the first can be done, saying which command makes
            what is missing.
    """
    config, words, repair = begin(words, (name,))
    graph = stages(config)
    names = (name, "baseline") if name == "evaluate" else (name,)
    chosen = [stage for stage in graph if stage.name in names]
    if not chosen:
        raise WMError(
            f"there is no {name} in this pipeline: it needs rounds=2 or more, controller.keep=best "
            "and no tuning"
        )
    chosen.sort(key=lambda stage: names.index(stage.name))  # first what may lack its input
    with open_tracker(config, graph) as tracker:
        for stage in chosen:
            missing = [needed.label for needed in stage.inputs.values() if not needed.done]
            if stage.round and missing:
                print(f"{stage.label}: not begun, as {missing[0]} is not there; `wm run` makes it")
                return
            run_stage(stage, tracker, words, repair)
        if all(stage.done for stage in graph):  # episodes may have been deleted since
            tracker.summarise(summary(graph), scored_controller(graph))
    if name == "evaluate":
        print_results(config, graph)


def begin(words: Sequence[str], names: Sequence[str]) -> tuple[Config, list[str], bool]:
    """The configuration, the words without `--repair`, and whether it was among them.

    With several devices it comes to this in as many processes.

    Args:
        names: of stages; V and M have batches, which the devices must be able to share.
    """
    repair, words = REPAIR in words, [word for word in words if word != REPAIR]
    config = load(Config, words)
    ranks = config.trainer.devices * config.trainer.num_nodes
    for name, batch in (("vision", config.vision.batch), ("memory", config.memory.batch)):
        if name in names and batch % ranks:
            raise ConfigError(f"{ranks} devices cannot share {name}.batch={batch} evenly")
    if repair and ranks > 1:
        raise WMError(f"{REPAIR} works alone: leave out trainer.devices and trainer.num_nodes")
    require_accelerator(config.trainer.accelerator)
    gather(config.trainer.devices, config.trainer.num_nodes)
    return config, words, repair


def run_labelled(label: str, words: Sequence[str]) -> None:
    """One stage of a pipeline whose inputs are there; with the last, its run shows the scores."""
    config = load(Config, words)
    graph = stages(config)
    stage = next(stage for stage in graph if stage.label == label)
    with open_tracker(config, graph) as tracker:
        run_stage(stage, tracker, words, wait=True)
        if stage is graph[-1]:
            tracker.summarise(summary(graph), scored_controller(graph))


def evaluate_run(run: str, words: Sequence[str]) -> None:
    """Score the agent of a finished MLflow run, or of a folder, on the held-out seeds.

    Raises:
        WMError: if there is no such agent, or a word would change it.
    """
    settings, words, repair = begin(words, ())
    source = find_agent(run, Path(settings.runs))
    its = Agent.load(source).config
    require_scoring(words, its.env.name)
    config = replace(
        settings, env=its.env, vision=its.vision, memory=its.memory, controller=its.controller
    )
    parts = {name: sha256(source / name) for name in FILES}
    agent = _stage(config, "agent", work.import_agent, {}, {"hashes": parts})
    agent = replace(agent, work=partial(agent.work, source=source))
    evaluation = {"env": config.env, "evaluation": config.evaluate}
    graph = [
        agent,
        _stage(config, "baseline", work.play_baseline, {}, baseline(config)),
        _stage(config, "evaluate", work.evaluate_agent, {"controller": agent}, evaluation),
    ]
    run_id = None if Path(run).is_dir() else run
    name = f"{its.env.name}, {source.parent.name}/{source.name}"
    shown = {"agent": run, **plain(its), "evaluate": covered(config.evaluate)}
    with open_tracker(config, graph, run_id, shown, name) as tracker:
        for stage in graph:
            run_stage(stage, tracker, [f"run={run}", *words], repair)
        if not run_id:  # a pipeline's run keeps the scores that it has
            tracker.summarise(scores(graph))
    print_results(config, graph)


def require_scoring(words: Sequence[str], game: str) -> None:
    """Refuse what an agent brings with it.

    Raises:
        ConfigError: naming the first word that would change nothing.
    """
    for word in words:
        if word.partition("=")[0].partition(".")[0] not in SCORING and word != f"env={game}":
            raise ConfigError(
                f"{word} would change nothing: the agent is of {game} and brings its own settings; "
                f"free are {', '.join(SCORING)}"
            )


def compare_simulators(run: str | None, words: Sequence[str]) -> None:
    """Print how CarRacing in EnvPool differs from the official game, for an agent too if given.

    Raises:
        WMError: if EnvPool is not installed, or there is no such agent of CarRacing.
    """
    from wm.parity import table  # pygame and Box2D, which no other command needs here

    config = load(Config, ["env=carracing", *words])
    env, players = config.env, {"random walk": RandomPlayer("brownian")}
    if run:
        require_scoring(words, "carracing")
        folder = find_agent(run, Path(config.runs))
        env, players["agent"] = Agent.load(folder).config.env, AgentPlayer(folder)
    require_envpool(env)
    print(f"{PARITY_SEEDS} validation seeds, each the same track in both", flush=True)
    with Workers(config.trainer.workers) as workers:
        for line in table(env, players, validation_seeds(PARITY_SEEDS), workers):
            print(line, flush=True)


def open_tracker(
    config: Config,
    graph: Sequence[Stage],
    run_id: str | None = None,
    shown: dict[str, Any] | None = None,
    name: str | None = None,
) -> Tracker | Silence:
    """The parent run of these stages, one for each fingerprint of the last; see Tracker.

    shown: in place of the configuration.
    """
    if not leads():
        return Silence()
    shown, last = shown or result_config(config), graph[-1]
    return Tracker(
        Path(config.runs),
        shown,
        last.fingerprint,
        run_id,
        name=name,
        all_done=lambda: last.done,
    )


def scored_controller(graph: Sequence[Stage]) -> Stage:
    """The stage whose agent `evaluate` has scored."""
    (evaluate,) = (stage for stage in graph if stage.name == "evaluate")
    return evaluate.inputs["controller"]


def summary(graph: Sequence[Stage]) -> dict[str, float]:
    """What the parent run shows: the scores, the real steps and the wall time."""
    return scores(graph) | report.costs([stage.record for stage in graph])


def scores(graph: Sequence[Stage]) -> dict[str, float]:
    facts = [stage.record["facts"] for stage in graph if stage.name in ("baseline", "evaluate")]
    return {key: value for part in facts for key, value in part.items()}


def print_results(config: Config, graph: Sequence[Stage]) -> None:
    record = {stage.name: stage.record for stage in graph}
    rows = {"random policy": ("baseline", "random"), "our agent": ("evaluate", "eval")}
    where = "" if config.evaluate.world == ORDINARY else f", {config.evaluate.world}"
    print(f"\n{config.env.name}, {config.evaluate.episodes} held-out episodes{where}")
    print(f"{'':16}{'mean':>9}{'std':>9}   95 % interval of the mean")
    for title, (stage, name) in rows.items():
        facts = record[stage]["facts"]
        mean, std, low, high = (facts[f"{name}/{part}"] for part in PARTS)
        print(f"{title:16}{mean:9.1f}{std:9.1f}   [{low:.1f}, {high:.1f}]")
    if record.get("report"):
        print(f"\nreport:  {graph[-1].folder / 'report.html'}")
    print(f"runs:    {ui_command(Path(config.runs))}")
