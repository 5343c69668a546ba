"""What each stage does in its folder.

A stage's keyword arguments are what its fingerprint covers (see pipeline.stages); `folder`,
`inputs`, `run` and `trainer` say where the work is done.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from wm import figures
from wm.collect import CollectConfig, collect, record
from wm.data import Latents, frames_data, sequences_data
from wm.envs import (
    STEPS_PER_SECOND,
    VALIDATION_SEEDS,
    EnvConfig,
    action_space,
    as_vector,
    held_out_seeds,
    make_env,
    training_seeds,
    validation_seeds,
)
from wm.episodes import Episode, EpisodeStore
from wm.evaluate import (
    DREAMS,
    EPISODES,
    EvaluateConfig,
    play_held_out,
    play_seeds,
    read_returns,
    score,
    write_outcomes,
)
from wm.ranks import leads, rank, summed, world_size
from wm.rollout import rollout
from wm.tracking import StageRun, read_metrics
from wm.training import Busy, StepsData, TrainerConfig, device, fit
from wm.workers import Outcome, RandomPlayer, Workers
from wm.worldmodels import pictures
from wm.worldmodels.agent import (
    Agent,
    AgentConfig,
    AgentPlayer,
    load_tensors,
    read_module,
    save_tensors,
)
from wm.worldmodels.controller import initial_weights
from wm.worldmodels.encode import encode_store
from wm.worldmodels.evolution import (
    STRATEGIES,
    AskAndTell,
    Evolution,
    Fitness,
    Strategy,
    dream_fitness,
    mean_return,
)
from wm.worldmodels.mdnrnn import MDNRNN, MemoryConfig
from wm.worldmodels.ppo import PPO, Practice, practise_in_dreams, practise_in_the_game
from wm.worldmodels.starts import draw_starts
from wm.worldmodels.vae import ConvVAE, VisionConfig

EPOCH_STEPS = 250  # of V and M between validations and checkpoints
PICTURE_FRAMES = 10
ERROR_HORIZON = 25
EVOLVED = "controllers.safetensors"
NOISE_AND_CRITIC = "noise_and_critic.safetensors"  # of PPO

Inputs = dict[str, Path]
Facts = dict[str, float]
Play = Callable[[Tensor, Sequence[int]], list[list[Outcome]]]  # see play_candidates


class Evolved(NamedTuple):
    """What an evolution leaves in its folder."""

    best: Tensor  # [n], the mean with the best validation score
    mean: Tensor  # [n], the last


def evolved(folder: Path) -> Evolved:
    return Evolved(*load_tensors(folder / EVOLVED, Evolved._fields))


def collect_episodes(
    folder: Path,
    inputs: Inputs,
    run: StageRun,
    trainer: TrainerConfig,
    *,
    env: EnvConfig,
    collection: CollectConfig,
    seed: int,
    round: int,
) -> Facts:
    """Play with a random policy, in later rounds with the newest controller and noise."""
    player, episodes = RandomPlayer(collection.policy), collection.episodes
    if "controller" in inputs:
        episodes = collection.later_episodes
        player = AgentPlayer(inputs["controller"] / "agent", noise=collection.noise)
    seeds = training_seeds(seed, round, episodes)
    with Workers(trainer.workers) as workers, run.busy():
        collect(env, player, seeds, folder, workers, collection)
    if not leads():
        return {}
    facts = EpisodeStore([folder]).summary()
    facts["steps"] *= env.repeat  # of the game, a few too many where an end cut a held action
    return {f"collect/{name}": value for name, value in facts.items()}


def collected(inputs: Inputs) -> EpisodeStore:
    """The episodes of all rounds so far, in the order of the rounds."""
    return EpisodeStore([inputs[role] for role in inputs if role.startswith("collect")])


def train_vision(
    folder: Path,
    inputs: Inputs,
    run: StageRun,
    trainer: TrainerConfig,
    *,
    vision: VisionConfig,
    seed: int,
) -> Facts:
    """Train V on frames of all rounds, then encode every frame once."""
    L.seed_everything(seed, verbose=False)
    store, known = collected(inputs), None
    if "vision" in inputs:
        vision = replace(vision, steps=vision.later_steps)
    make, earlier = partial(ConvVAE, vision, seed), inputs.get("vision")
    model = read_module(make, earlier / "vision.safetensors") if earlier else make()
    if vision.steps:
        data = frames_data(store, vision, seed, EPOCH_STEPS)
        fit(model, data, folder, trainer, run.loggers, vision.precision, callbacks=[Busy(run)])
    else:  # it sees what earlier rounds have seen as they did
        known = Latents(inputs["vision"] / "latents")
    if not leads():
        return {}
    save_tensors(folder / "vision.safetensors", model.cpu().eval().state_dict())
    with run.busy():
        encode_store(model.to(device(trainer)), store, folder / "latents", known)
    draw_vision(model.cpu(), store, folder, run)
    return last_metrics(folder, "vision/val_", "vision/active")


def draw_vision(vision: ConvVAE, store: EpisodeStore, folder: Path, run: StageRun) -> None:
    _, validation = store.split()
    owned = np.concatenate(
        [store.first_frame[e] + np.arange(store.steps[e] + 1) for e in validation]
    )
    shown = owned[np.linspace(0, len(owned) - 1, PICTURE_FRAMES).astype(int)]
    frames = store.frames(shown)
    run.log_file(pictures.reconstructions(vision, frames, folder / "reconstructions.png"))
    means = np.asarray(Latents(folder / "latents").mean[owned])
    run.log_file(pictures.traversals(vision, means, folder / "traversals.png"))
    run.log_file(folder / "vision.safetensors", "checkpoint")


def train_memory(
    folder: Path,
    inputs: Inputs,
    run: StageRun,
    trainer: TrainerConfig,
    *,
    env: EnvConfig,
    vision: VisionConfig,
    memory: MemoryConfig,
    seed: int,
) -> Facts:
    """Train M on the latents of all rounds."""
    L.seed_everything(seed, verbose=False)
    store, latents = collected(inputs), Latents(inputs["vision"] / "latents")
    if "memory" in inputs:
        memory = replace(memory, steps=memory.later_steps)
    actions, earlier = action_space(env.name).shape, inputs.get("memory")
    make = partial(MDNRNN, memory, vision.latent, *actions, seed)
    model = read_module(make, earlier / "memory.safetensors") if earlier else make()
    if memory.steps:
        data = sequences_data(store, latents, memory, seed, EPOCH_STEPS)
        settings = (memory.precision, memory.clip)
        fit(model, data, folder, trainer, run.loggers, *settings, callbacks=[Busy(run)])
    if not leads():
        return {}
    save_tensors(folder / "memory.safetensors", model.cpu().eval().state_dict())
    draw_memory(load_vision(vision, inputs), model, store, latents, env.name, folder, run)
    return last_metrics(folder, "memory/val_", "memory/end")


def load_vision(config: VisionConfig, inputs: Inputs) -> ConvVAE:
    return read_module(partial(ConvVAE, config), inputs["vision"] / "vision.safetensors").eval()


def draw_memory(
    vision: ConvVAE,
    memory: MDNRNN,
    store: EpisodeStore,
    latents: Latents,
    game: str,
    folder: Path,
    run: StageRun,
) -> None:
    _, validation = store.split()
    number = max(validation, key=lambda e: store.steps[e])
    first = store.first_frame[number]
    means = np.array(latents.mean[first : first + store.steps[number] + 1])
    path = folder / "futures.png"
    run.log_file(pictures.futures(vision, memory, store[number], means, game, path))
    run.log_file(folder / "memory.safetensors", "checkpoint")
    errors = pictures.prediction_error(memory, store, latents, validation, game, ERROR_HORIZON)
    if errors:
        run.log_file(pictures.prediction_error_curve(errors, folder / "prediction_error.png"))
        for step, error in enumerate(errors[pictures.left_alone(0.1)], start=1):
            run.log_metrics({"memory/error_by_horizon": float(error)}, step)


def evolve_controller(
    folder: Path,
    inputs: Inputs,
    run: StageRun,
    trainer: TrainerConfig,
    *,
    config: AgentConfig,
    seed: int,
    round: int,
) -> Facts:
    """Evolve C, in the dream or in the real game, or train it there; save the whole agent."""
    agent, its_folder = new_agent(config, inputs, seed), folder / "agent"
    if leads():
        agent.save(its_folder)  # before `fit`, in which the ranks meet
    settings, last = config.controller, config.controller.generations
    judged = {*range(settings.validate_every, last, settings.validate_every), last}
    with Workers(trainer.workers) as workers:
        play = partial(play_candidates, workers, config.env, its_folder)
        real_game = partial(validate, play, validation_seeds(settings.validation_episodes), run)
        callbacks: list[Callback] = [Busy(run)]
        if settings.optimizer == "ppo":
            seeds = partial(generation_seeds, settings.population * settings.episodes, seed, round)
            practise = make_practice(agent, its_folder, workers, trainer)
            module = PPO(agent, practise, seeds, real_game, judged)
            if settings.fitness == "real" and "controller" in inputs:
                go_on(module, inputs["controller"])
        else:
            seeds = partial(generation_seeds, settings.episodes, seed, round)
            if settings.fitness == "real":
                fitness = real_fitness(play, seeds, run)
            else:
                how = settings.part, settings.horizon, trainer.compile, device(trainer)
                fitness = dream_fitness(workers, its_folder, seeds, *how)
            module = Evolution(agent.weights, fitness, real_game, judged)
            callbacks.insert(0, AskAndTell(partial(make_strategy, agent, seed, round)))
        data = StepsData(int, [0], last, epoch_steps=1)  # a checkpoint after each
        here = replace(trainer, accelerator="cpu")  # float64 means live there
        fit(module, data, folder, here, run.loggers, log_every=1, callbacks=callbacks)
    if not leads():
        return {}
    found = Evolved(module.best, module.mean.detach())
    save_tensors(folder / EVOLVED, found._asdict())
    if settings.optimizer == "ppo":
        save_tensors(folder / NOISE_AND_CRITIC, module.noise_and_critic)
    chosen = found.best if settings.keep == "best" else found.mean
    replace(agent, weights=chosen).save(its_folder)
    run.log_folder(its_folder, "agent")
    draw_evolution(folder, run, module.step_unit)
    return {
        "best/real_score": module.best_score.item(),
        "controller/played_steps": played_steps(folder),
    }


def make_practice(agent: Agent, folder: Path, workers: Workers, trainer: TrainerConfig) -> Practice:
    """In dreams or in the real game, with the agent that the folder holds."""
    if agent.config.controller.fitness == "real":
        return partial(practise_in_the_game, workers, agent.config.env, folder)
    return partial(practise_in_dreams, agent, trainer.compile)


def go_on(module: PPO, earlier: Path) -> None:
    """With the noise and the critic that the folder of an earlier C keeps."""
    names = list(module.noise_and_critic)
    kept = load_tensors(earlier / NOISE_AND_CRITIC, names)
    module.load_state_dict(dict(zip(names, kept, strict=True)), strict=False)


def make_strategy(agent: Agent, seed: int, round: int) -> Strategy:
    """A search from the agent's C, whose random numbers are of this training seed and round."""
    its_seed = int(np.random.SeedSequence(seed, spawn_key=(round,)).generate_state(1)[0])
    settings, mean = agent.config.controller, agent.weights.double().numpy()
    return STRATEGIES[settings.optimizer](settings, mean, its_seed)


def validate(play: Play, seeds: Sequence[int], run: StageRun, weights: Tensor) -> list[Outcome]:
    """The real game's episodes of C with weights [n]."""
    with run.busy():
        return play(weights[None], seeds)[0]


def played_steps(folder: Path) -> float:
    """Steps of the real game that C took, for validation, fitness and practice."""
    history = read_metrics(folder)
    counts = (history.get(f"controller/{name}", {}) for name in ("real_steps", "fitness_steps"))
    return sum(sum(count.values()) for count in counts)


def new_agent(config: AgentConfig, inputs: Inputs, seed: int) -> Agent:
    """V and M of this round, C's first weights or the last round's mean, and starts of dreams."""
    vision = load_vision(config.vision, inputs)
    actions = action_space(config.env.name).shape
    make_memory = partial(MDNRNN, config.memory, config.vision.latent, *actions)
    memory = read_module(make_memory, inputs["memory"] / "memory.safetensors").eval()
    latents = Latents(inputs["vision"] / "latents")
    starts = draw_starts(memory, collected(inputs), latents, config.controller.start, seed)
    agent = Agent(config, vision, memory, torch.empty(0), starts)
    if "controller" in inputs:
        return replace(agent, weights=evolved(inputs["controller"]).mean)
    first = initial_weights(config.controller, agent.config.features, agent.config.actions, seed)
    return replace(agent, weights=first)


def generation_seeds(episodes: int, seed: int, round: int, generation: int) -> list[int]:
    """Episode seeds that every candidate of a generation meets, from the training range."""
    sequence = np.random.SeedSequence(seed, spawn_key=(round, generation))
    return (sequence.generate_state(episodes) % VALIDATION_SEEDS).tolist()


def play_candidates(
    workers: Workers, env: EnvConfig, agent: Path, candidates: Tensor, seeds: Sequence[int]
) -> list[list[Outcome]]:
    """An episode of each candidate [P,n] for each seed [E], P lists of E outcomes.

    Every rank plays its share, all of it side by side, and hears of all.
    """
    mine = torch.arange(len(candidates) * len(seeds)) % world_size() == rank()
    mine = mine.unflatten(0, (len(candidates), len(seeds)))
    games = [
        (AgentPlayer(agent, weights), [seeds[e] for e in its.nonzero().flatten().tolist()])
        for weights, its in zip(candidates, mine, strict=True)
    ]
    table = torch.zeros(*mine.shape, len(fields(Outcome)), dtype=torch.float64)
    played = [astuple(outcome) for outcome in workers.play_all(env, games)]
    table[mine] = torch.tensor(played, dtype=torch.float64).reshape(-1, table.shape[2])
    return [
        [
            Outcome(int(seed), episode_return, int(steps), bool(terminated))
            for seed, episode_return, steps, terminated in outcomes
        ]
        for outcomes in summed(table).tolist()
    ]


def real_fitness(
    play: Play,
    seeds: Callable[[int], list[int]],
    run: StageRun,
) -> Fitness:
    """The mean return in the real game behind V and M; its steps are counted in the run."""

    def fitness(candidates: Tensor, generation: int) -> Tensor:
        played = play(candidates, seeds(generation))
        steps = sum(outcome.steps for outcomes in played for outcome in outcomes)
        run.log_metrics({"controller/fitness_steps": steps}, generation)
        return torch.tensor([mean_return(outcomes) for outcomes in played], dtype=torch.float64)

    return fitness


def draw_evolution(folder: Path, run: StageRun, step_unit: str) -> None:
    history = read_metrics(folder)
    names = {"fitness_best": "best", "fitness_mean": "mean", "fitness_worst": "worst"}
    known = {label: history.get(f"controller/{name}") for name, label in names.items()}
    lines = {label: line for label, line in known.items() if line}
    lines["real game (validation)"] = history["controller/real_score"]
    points = {name: (list(line), list(line.values())) for name, line in lines.items()}
    figure = figures.curves(points, step_unit, "return")
    run.log_file(figures.save(figure, folder / "evolution.png"))


def choose_round(
    folder: Path,
    inputs: Inputs,
    run: StageRun,
    trainer: TrainerConfig,
    *,
    env: EnvConfig,
    before: int,
    episodes: int,
) -> Facts:
    """Keep that of the rounds' agents with the best mean return on validation seeds.

    before: the first seeds, by which each round has chosen its own agent: they would flatter it.
    """
    seeds, played = validation_seeds(before + episodes)[before:], {}
    with Workers(trainer.workers) as workers, run.busy():
        for role, controller in inputs.items():
            table, player = folder / role / EPISODES, AgentPlayer(controller / "agent")
            table.parent.mkdir(exist_ok=True)
            played[role] = play_seeds(env, player, seeds, workers, role, table)
            run.log_file(table, role)
    if not leads():
        return {}
    means = {role: mean_return(outcomes) for role, outcomes in played.items()}
    best = max(means, key=means.__getitem__)
    scores = ", ".join(f"{role} {mean:.1f}" for role, mean in means.items())
    print(f"choice: {best} ({scores} on {episodes} validation seeds)", flush=True)
    Agent.load(inputs[best] / "agent").save(folder / "agent")
    run.log_folder(folder / "agent", "agent")
    steps = sum(outcome.steps for outcomes in played.values() for outcome in outcomes)
    return {
        **{f"choice/{role}": mean for role, mean in means.items()},
        "controller/played_steps": steps,
    }


def import_agent(
    folder: Path,
    inputs: Inputs,
    run: StageRun,
    trainer: TrainerConfig,
    *,
    source: Path,
    hashes: dict[str, str],
) -> Facts:
    """Copy an agent from elsewhere, so that its evaluation stands beside it."""
    (folder / "agent").mkdir(exist_ok=True)
    for name in hashes if leads() else ():
        shutil.copyfile(source / name, folder / "agent" / name)
    return {}


def play_baseline(
    folder: Path,
    inputs: Inputs,
    run: StageRun,
    trainer: TrainerConfig,
    *,
    env: EnvConfig,
    evaluation: EvaluateConfig,
) -> Facts:
    """The random policy on the held-out seeds."""
    player, table = RandomPlayer("uniform"), folder / EPISODES
    with Workers(trainer.workers) as workers, run.busy():
        many = evaluation.episodes
        play_held_out(evaluation.game(env), player, many, workers, "random policy", table)
    if not leads():
        return {}
    return scored(table, run, "random")


def evaluate_agent(
    folder: Path,
    inputs: Inputs,
    run: StageRun,
    trainer: TrainerConfig,
    *,
    env: EnvConfig,
    evaluation: EvaluateConfig,
) -> Facts:
    """The agent on the held-out seeds, and what it saw and dreamt in an episode."""
    player, game = AgentPlayer(inputs["controller"] / "agent"), evaluation.game(env)
    table = folder / EPISODES
    with Workers(trainer.workers) as workers, run.busy():
        outcomes = play_held_out(game, player, evaluation.episodes, workers, "agent", table)
    if not leads():
        return {}
    agent = Agent.load(player.folder)
    facts = scored(table, run, "eval") | dream_score(agent, evaluation, folder, run)
    middle = sorted(outcomes, key=lambda outcome: outcome.episode_return)[len(outcomes) // 2]
    (episode,) = record(as_vector(make_env(game)), player, [middle.seed])
    draw_life(agent, episode, folder, run)
    if seeds := held_out_seeds(evaluation.reconstructed):
        with run.busy():
            played = record(as_vector(make_env(game)), player, seeds)
            error = pictures.reconstruction_error(agent.vision, played)
        facts["eval/reconstruction_error"] = error
    return facts


def dream_score(agent: Agent, evaluation: EvaluateConfig, folder: Path, run: StageRun) -> Facts:
    """What the agent gets in its own dreams, as long as the game may last; {} if they pay nothing.

    Ends are drawn where evolution took their expectation, so that episodes differ as in the game.
    """
    if not agent.config.dreams_pay:
        return {}
    env, seeds = agent.config.env, list(validation_seeds(evaluation.episodes))
    end = {"expected": "calibrated"}.get(agent.config.controller.end, agent.config.controller.end)
    with run.busy():
        dreams = agent.dreams(len(seeds), horizon=max(1, env.max_steps // env.repeat), end=end)
        result = rollout(dreams, agent.controller(), seeds)
    outcomes = [
        Outcome(seed, dreamt, steps * env.repeat, dead)
        for seed, dreamt, steps, dead in zip(
            seeds, *(values.tolist() for values in vars(result).values()), strict=True
        )
    ]
    write_outcomes(folder / DREAMS, outcomes)
    return scored(folder / DREAMS, run, "dream")


def scored(table: Path, run: StageRun, name: str) -> Facts:
    """The score of a table of episodes, which the run keeps."""
    run.log_file(table)
    result = score(read_returns(table))
    return {f"{name}/{part}": value for part, value in vars(result).items()}


def draw_life(agent: Agent, episode: Episode, folder: Path, run: StageRun) -> None:
    game, temperature = agent.config.env.name, agent.config.controller.temperature
    if len(episode.actions) > 1:  # the first wakes M, and it dreams of the others
        strip = folder / "filmstrip.png"
        pictures.filmstrip(agent.vision, agent.memory, episode, game, temperature, strip)
        run.log_file(strip)
    frames = pictures.side_by_side(agent.vision, episode)
    speed = STEPS_PER_SECOND[game] / agent.config.env.repeat
    run.log_file(figures.video(frames, folder / "episode.mp4", speed))


def last_metrics(folder: Path, *prefixes: str) -> Facts:
    """The final value of every metric that begins with one of the prefixes."""
    history = read_metrics(folder)
    return {
        name: values[max(values)] for name, values in history.items() if name.startswith(prefixes)
    }
