"""Real games in a pool of processes: a few seeds in, their episodes out.

A task is the retryable unit: it builds its own game and its result depends on its seeds alone, so
neither the number of processes nor the death of one changes anything.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from gymnasium.vector import VectorEnv
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from wm import WMError
from wm.envs import EnvConfig, as_vector, make_env
from wm.processes import end_with_parent
from wm.rollout import RANDOM_POLICIES, Policy, rollout

ATTEMPTS = 3
TASK_GAMES = 4  # at most
SECONDS_TO_END = 30.0  # of a pool that is stopped
SECONDS_PER_STEP = 0.5  # a game slower than this by far is stuck, and its process is replaced


class Player(Protocol):
    """Who plays: picklable, so that every process can seat its own at the games."""

    def __call__(self, games: VectorEnv) -> tuple[VectorEnv, Policy]:
        """The games as the player sees them, and the player's policy."""


@dataclass(frozen=True)
class RandomPlayer:
    """One of the random policies, on frames."""

    kind: str

    def __call__(self, games: VectorEnv) -> tuple[VectorEnv, Policy]:
        return games, RANDOM_POLICIES[self.kind](games.single_action_space)


@dataclass(frozen=True)
class Outcome:
    """One episode of a game, without its frames."""

    seed: int
    episode_return: float
    steps: int  # of the game, up to env.repeat - 1 too many where an end cut a held action
    terminated: bool


def play(env: EnvConfig, player: Player, seeds: Sequence[int]) -> list[Outcome]:
    """Play the seeds one after the other in one game."""
    game = as_vector(make_env(env))
    try:
        envs, policy = player(game)
        game.envs[0].unwrapped.watched = not getattr(policy, "blind", False)
        return [_outcome(envs, policy, seed, env.repeat) for seed in seeds]
    finally:
        game.close()


def _play_chunk(env: EnvConfig, chunk: tuple[Player, Sequence[int]]) -> list[Outcome]:
    return play(env, *chunk)


def _outcome(envs: VectorEnv, policy: Policy, seed: int, repeat: int) -> Outcome:
    result = rollout(envs, policy, [seed])
    steps = int(result.steps.item()) * repeat
    return Outcome(seed, result.returns.item(), steps, bool(result.terminated.item()))


class Workers:
    """A pool of game processes; use as a context manager.

    Args:
        count: processes; 0 takes one for every core this rank may use.
    """

    def __init__(self, count: int):
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.count = count or max(1, cores)

    def __enter__(self) -> "Workers":
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPool(
            self.count, context=context, initializer=_begin, initargs=(os.getpid(),)
        )
        return self

    def __exit__(self, *failure: Any) -> None:
        """Stop the processes.

        A SIGTERM may have come amid the pool's own bookkeeping, which then waits for ever for one
        of its threads: so it is waited for by another, and not for ever.
        """
        self.pool.stop()
        ending = threading.Thread(target=self.pool.join, daemon=True)
        ending.start()
        ending.join(SECONDS_TO_END)

    def map(
        self,
        task: Callable,
        items: Sequence[Any],
        timeout: float,
        name: Callable[[Any], str] = "a game at {}".format,
    ) -> Iterator[Any]:
        """Yield task(item) in order; a crashed or stuck process is replaced, its item retried.

        Raises:
            WMError: after ATTEMPTS failures of one item, naming it.
        """
        futures = [self._schedule(task, item, timeout) for item in items]
        for item, future in zip(items, futures, strict=True):
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    result = future.result()
                    break
                except Exception as failure:
                    if not _of_the_game(failure):
                        raise
                    if attempt == ATTEMPTS:
                        raise WMError(
                            f"{name(item)} failed {ATTEMPTS} times: "
                            f"{type(failure).__name__} {failure}"
                        ) from failure
                    future = self._schedule(task, item, timeout)
            yield result

    def _schedule(self, task: Callable, item: Any, timeout: float) -> ProcessFuture:
        try:
            return self.pool.schedule(task, args=(item,), timeout=timeout)
        except RuntimeError:  # a process died that had nothing to do, and with it the pool
            self.__exit__()
            self.__enter__()
            return self.pool.schedule(task, args=(item,), timeout=timeout)

    def task_size(self, games: int) -> int:
        """How many of so many games share the start of a simulator, and are played in turn."""
        return max(1, min(TASK_GAMES, games // self.count))

    def play(self, env: EnvConfig, player: Player, seeds: Sequence[int]) -> Iterator[Outcome]:
        """One outcome per seed, in the order of the seeds."""
        return self.play_all(env, [(player, seeds)])

    def play_all(
        self, env: EnvConfig, games: Sequence[tuple[Player, Sequence[int]]]
    ) -> Iterator[Outcome]:
        """One outcome per seed of each player, in their order; all are at play together."""
        size = self.task_size(sum(len(seeds) for _, seeds in games))
        chunks = [
            (player, seeds[first : first + size])
            for player, seeds in games
            for first in range(0, len(seeds), size)
        ]
        task, limit = partial(_play_chunk, env), time_limit(env, size)
        for outcomes in self.map(task, chunks, limit, lambda chunk: f"a game at {chunk[1]}"):
            yield from outcomes


def _of_the_game(failure: Exception) -> bool:
    """Whether a process or a game's engine was lost: ViZDoom says so by errors of its own."""
    lost = isinstance(failure, ProcessExpired | BrokenProcessPool | TimeoutError)
    return lost or type(failure).__module__.startswith("vizdoom")


def time_limit(env: EnvConfig, episodes: int) -> float:
    """Seconds after which a task of so many episodes is taken for stuck."""
    return 60.0 + SECONDS_PER_STEP * env.max_steps * episodes


def _begin(owner: int) -> None:
    """In a new process: take one core, and end with the owner of the pool."""
    torch.set_num_threads(1)  # the processes share the cores already
    end_with_parent(signal.SIGKILL)
    if os.getppid() != owner:  # it has ended already
        os._exit(1)
