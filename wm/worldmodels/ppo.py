"""C by gradients: proximal policy optimisation (Schulman et al. 2017), in the dream or the game.

What evolution does not find in time, a C with a hidden layer and its ten thousands of weights, is
learnt in minutes. An iteration is one step of Lightning's Trainer, as a generation is: C practises
with Gaussian noise on its raw outputs, and then follows the clipped gradient of what that brought.
N episodes, T steps, F features, A actions, n weights of C.
"""

from collections.abc import Callable, Container, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorWrapper
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.utils.rnn import pad_sequence

from wm.envs import EnvConfig, as_vector, make_env
from wm.ranks import leads, of_leader
from wm.rollout import rollout
from wm.workers import Workers, time_limit
from wm.worldmodels.agent import Agent, AgentPlayer
from wm.worldmodels.controller import Controller
from wm.worldmodels.dream import DreamEnv
from wm.worldmodels.evolution import RealGame, Search
from wm.worldmodels.latent import LatentEnv

RATE = 1e-3  # of Adam
DEVIATION = 0.5  # of the noise on C's raw outputs, at first; it learns with C
TRACE = 0.95  # lambda of generalised advantage estimation
CLIP = 0.2
LARGE = 20.0  # a change of log-probability beyond which nothing is learnt
EPOCHS, BATCH = 3, 4096  # passes over the steps of an iteration, and steps of a gradient
CRITIC = 128  # hidden units
VALUE = 50.0  # the critic's unit: a larger one learns worse, even where steps far ahead count


class Experience(NamedTuple):
    """What an iteration has brought. An episode that is over, or was left out, has weight 0."""

    features: Tensor  # [T+1,N,F]
    raw: Tensor  # [T,N,A]: C's outputs with their noise, before they are squashed
    reward: Tensor  # [T,N], times the chance of having lived so long
    alive: Tensor  # [T+1,N]: that chance


# (weights [n] of C, the noise's deviation [A], seeds [N], random numbers) -> an episode for each
Practice = Callable[[Tensor, Tensor, Sequence[int], torch.Generator], Experience]


class ExperienceRecorder(VectorWrapper):
    """Keeps what a rollout of at most so many steps sees and gets."""

    env: DreamEnv | LatentEnv

    def __init__(self, envs: DreamEnv | LatentEnv, steps: int):
        super().__init__(envs)
        # A list would take twice the memory.
        self.seen = torch.empty(steps + 1, *envs.observation_space.shape)

    def reset(self, **arguments: Any) -> tuple[Tensor, dict]:
        self.seen[0], info = self.env.reset(**arguments)
        self.rewards, self.alive = [], [self.env.survival]
        return self.seen[0], info

    def step(self, actions: Any):
        observation, reward, *ended = self.env.step(actions)
        self.rewards.append(torch.as_tensor(reward).float() * (self.alive[-1] > 0))
        self.alive.append(self.env.survival)
        self.seen[len(self.rewards)] = observation
        return observation, reward, *ended

    @property
    def features(self) -> Tensor:
        """[T+1,N,F]."""
        return self.seen[: len(self.alive)]


class Explorer:
    """C with Gaussian noise on its raw outputs; keeps them."""

    def __init__(self, controller: Controller, deviation: Tensor, generator: torch.Generator):
        self.controller, self.deviation, self.generator = controller, deviation, generator

    def reset(self, seeds: Any) -> None:
        self.raw: list[Tensor] = []

    def __call__(self, features: Tensor) -> Tensor:
        raw = self.controller.raw(features)
        noise = torch.randn(raw.shape, generator=self.generator)
        self.raw.append(raw + self.deviation * noise)
        return self.controller.squash(self.raw[-1])


def explore(
    envs: DreamEnv | LatentEnv, explorer: Explorer, seeds: Sequence[int], steps: int
) -> Experience:
    """An episode of at most so many steps in each of N environments."""
    recorder = ExperienceRecorder(envs, steps)
    rollout(recorder, explorer, seeds)
    kept = (torch.stack(values) for values in (explorer.raw, recorder.rewards, recorder.alive))
    return Experience(recorder.features, *kept)


def practise_in_dreams(
    agent: Agent,
    compiled: bool,
    weights: Tensor,
    deviation: Tensor,
    seeds: Sequence[int],
    generator: torch.Generator,
) -> Experience:
    """A dream of the agent's V, M and starts for every seed, all in one batch; see Practice.

    Args:
        compiled: fuse the dream's step.
    """
    explorer = Explorer(agent.controller(weights[None]), deviation, generator)
    envs = agent.dreams(len(seeds), compiled)
    return explore(envs, explorer, seeds, agent.config.controller.horizon)


def practise_in_the_game(
    workers: Workers,
    env: EnvConfig,
    folder: Path,
    weights: Tensor,
    deviation: Tensor,
    seeds: Sequence[int],
    generator: torch.Generator,
) -> Experience:
    """A real game behind the V and M of an agent's folder for every seed; see Practice."""
    noise = torch.randint(2**31, (len(seeds),), generator=generator).tolist()
    games, size = list(zip(seeds, noise, strict=True)), workers.task_size(len(seeds))
    chunks = [games[first : first + size] for first in range(0, len(games), size)]
    task = partial(_play_with_noise, env, AgentPlayer(folder, weights), deviation)
    played = workers.map(task, chunks, time_limit(env, size), "games at {}".format)
    parts = zip(*(episode for chunk in played for episode in chunk), strict=True)
    # The zeros are steps of weight 0: games that are cut, not ended, are the longest of all.
    return Experience(*(pad_sequence([torch.from_numpy(e) for e in part]) for part in parts))


def _play_with_noise(
    env: EnvConfig, player: AgentPlayer, deviation: Tensor, chunk: Sequence[tuple[int, int]]
) -> list[list[np.ndarray]]:
    """The Experience of an episode, without N, for each pair of its seed and that of the noise."""
    games, steps, episodes = as_vector(make_env(env)), -(-env.max_steps // env.repeat), []
    try:
        envs, controller = player(games)
        for seed, noise in chunk:
            explorer = Explorer(controller, deviation, torch.Generator().manual_seed(noise))
            brought = explore(envs, explorer, [seed], steps)
            episodes.append([part[:, 0].numpy() for part in brought])
        return episodes
    finally:
        games.close()


class PPO(Search):
    """Improves C by what it practises.

    Args:
        agent: whose C is begun with.
        practise: in dreams or in the game.
        seeds: iteration -> those of its episodes; all other random numbers are of the first.
    """

    step_unit = "iteration"

    def __init__(
        self,
        agent: Agent,
        practise: Practice,
        seeds: Callable[[int], list[int]],
        real_game: RealGame,
        judged: Container[int],
    ):
        super().__init__(agent.weights.float(), real_game, judged)
        self.mean.requires_grad_()
        self.agent, self.practise, self.seeds = agent, practise, seeds
        config, self.discount = agent.config, agent.config.controller.discount
        self.spread = nn.Parameter(torch.full((config.actions,), DEVIATION).log())
        with torch.random.fork_rng(devices=[]):  # whatever has been trained in this process before
            torch.manual_seed(seeds(0)[0])
            layers = nn.Linear(config.features, CRITIC), nn.Tanh(), nn.Linear(CRITIC, 1)
        self.critic = nn.Sequential(*layers, nn.Flatten(0))

    @property
    def noise_and_critic(self) -> dict[str, Tensor]:
        """By their names in the state."""
        return {"spread": self.spread.detach(), **self.critic.state_dict(prefix="critic.")}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), RATE)

    def training_step(self, batch: Any, number: int) -> None:
        if leads():
            self.iterate()
        self.optimizers().step()  # without gradients: Lightning counts iterations by it
        for parameter in self.parameters():
            parameter.data.copy_(of_leader(parameter.data))

    def iterate(self) -> None:
        """Practise once, and learn from that."""
        seeds = self.seeds(self.global_step)
        generator = torch.Generator().manual_seed(seeds[0])
        deviation = self.spread.detach().exp()
        brought = self.practise(self.mean.detach(), deviation, seeds, generator)
        seen, raw, alive = brought.features[:-1], brought.raw, brought.alive[:-1]
        with torch.no_grad():
            old = self.log_probability(seen, raw)
        steps = [v.flatten(0, 1) for v in (seen, raw, old, alive, *self.advantages(brought))]
        optimizer = self.optimizers(use_pl_optimizer=False)
        for _ in range(EPOCHS):
            for chosen in torch.randperm(len(steps[0]), generator=generator).split(BATCH):
                self.manual_backward(self.loss(*(values[chosen] for values in steps)))
                optimizer.step()
                optimizer.zero_grad()
        self.log("controller/fitness_mean", brought.reward.sum(0).mean(), prog_bar=True)
        self.log("controller/sigma", self.spread.exp().mean())
        if self.agent.config.controller.fitness == "real":
            steps = (alive > 0).sum().float() * self.agent.config.env.repeat
            self.log("controller/fitness_steps", steps)

    def log_probability(self, features: Tensor, raw: Tensor) -> Tensor:
        """Of raw outputs [...,A] where C sees features [...,F]."""
        mean = self.agent.controller(self.mean[None]).raw(features.flatten(0, -2)).view_as(raw)
        return Normal(mean, self.spread.exp()).log_prob(raw).sum(-1)

    @torch.no_grad()
    def advantages(self, brought: Experience) -> tuple[Tensor, Tensor]:
        """Generalised advantages (Schulman et al. 2016) and the critic's targets, [T,N] each.

        Both are times the chance of having lived so long: what comes after an end counts as much
        as it is likely to come.
        """
        value = brought.alive * torch.stack([self.critic(x) for x in brought.features]) * VALUE
        surprise = brought.reward + self.discount * value[1:] - value[:-1]
        advantage = torch.zeros_like(surprise)
        carried = torch.zeros_like(surprise[0])
        for t in reversed(range(len(surprise))):
            advantage[t] = carried = surprise[t] + self.discount * TRACE * carried
        return advantage / advantage.square().mean().sqrt(), advantage + value[:-1]

    def loss(
        self,
        features: Tensor,
        raw: Tensor,
        old: Tensor,
        alive: Tensor,
        advantage: Tensor,
        target: Tensor,
    ) -> Tensor:
        """The critic's squared error less the clipped surrogate, of B steps.

        Args:
            features, raw: [B,F] and [B,A], what C saw and gave.
            old: log-probability [B] of raw when it was given.
            alive, advantage, target: [B], see Experience and advantages.
        """
        change = self.log_probability(features, raw) - old
        ratio = change.clamp(max=LARGE).exp()  # padding, of weight 0, may be far from all C does
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        gain = torch.minimum(ratio * advantage, clipped * advantage).mean()
        error = alive * self.critic(features) - target / VALUE
        return error.square().mean() - gain
