"""The real games: 64x64 uint8 RGB frames in, a bounded action vector out.

CarRacing-v3 is Gymnasium's; take-cover is ViZDoom's scenario with the paper's rules (skill 4, 2100
tics, one reward a tic); `tiny` is a game of a few lines for tests.
"""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

from wm.config import bounded
from wm.worlds import ORDINARY, World, write_scenario

FRAME = (64, 64, 3)
MOVE = 1 / 3  # take-cover: left below -MOVE, right above MOVE, else stay; the paper's thresholds
FRAME_SPACE = gym.spaces.Box(0, 255, FRAME, np.uint8)
STEPS_PER_SECOND = {"carracing": 50, "takecover": 35, "tiny": 20}  # as a person would play

# Three disjoint ranges of episode seeds: nothing is ever trained on or chosen by a held-out seed.
SEEDS_PER_ROOT = 1_000_000
VALIDATION_SEEDS = 2_000_000_000
HELD_OUT_SEEDS = 3_100_000_000  # those from 3_000_000_000 on were seen while settings were chosen


@dataclass(frozen=True)
class EnvConfig:
    name: Literal["carracing", "takecover", "tiny"] = "takecover"
    max_steps: int = bounded(2100, 1)  # the official length of an episode, in steps of the game
    repeat: int = bounded(1, 1, 16)  # steps of the game for which an action is held
    crop: int = bounded(0, 0, 40)  # rows cut from the bottom of the original picture
    fast_drawing: bool = True  # CarRacing: the same frames with less work; never when scores count
    world: ClassVar[World] = ORDINARY


@dataclass(frozen=True)
class ElsewhereConfig(EnvConfig):
    """The game in another world, where agents are scored and never trained."""

    world: World = ORDINARY


def action_space(name: str) -> gym.spaces.Box:
    """What a player may do: steering, gas and brake in CarRacing, one axis in the other games."""
    low = {"carracing": [-1.0, 0.0, 0.0]}.get(name, [-1.0])
    return gym.spaces.Box(np.array(low, np.float32), 1.0, dtype=np.float32)


def make_env(config: EnvConfig) -> gym.Env:
    """One game: frames [64,64,3] uint8, actions a bounded float32 Box, official length."""
    return {"carracing": car_racing, "takecover": TakeCover, "tiny": catch}[config.name](config)


def as_vector(env: gym.Env) -> SyncVectorEnv:
    """A vector of one, for the rollout loop; the caller resets it."""
    return SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.DISABLED)


def training_seeds(root: int, round: int, count: int) -> Sequence[int]:
    """Episode seeds of one round of collection, disjoint between roots and rounds."""
    first = root * SEEDS_PER_ROOT + round * SEEDS_PER_ROOT // 10
    return range(first, first + count)


def validation_seeds(count: int) -> Sequence[int]:
    """For choosing between controllers."""
    return range(VALIDATION_SEEDS, VALIDATION_SEEDS + count)


def held_out_seeds(count: int) -> Sequence[int]:
    """For reporting, and for nothing else."""
    return range(HELD_OUT_SEEDS, HELD_OUT_SEEDS + count)


class HeldAction(gym.Wrapper):
    """Every action is held for some steps of the game, whose rewards are added.

    Only the last frame is seen: a game with a method `draw` may leave the others undrawn while its
    `drawing` is false.
    """

    def __init__(self, env: gym.Env, steps: int):
        super().__init__(env)
        self.steps = steps

    def step(self, action: np.ndarray):
        game, total = self.unwrapped, 0.0
        for left in reversed(range(self.steps)):
            game.drawing = left == 0
            frame, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        game.drawing = True
        if left and hasattr(game, "draw"):  # it ended before its last step
            frame = game.draw()
        return frame, total, terminated, truncated, info


class CroppedFrame(gym.ObservationWrapper):
    """Cut rows from the bottom of a picture and shrink the rest to 64x64."""

    def __init__(self, env: gym.Env, crop: int):
        super().__init__(env)
        self.crop = crop
        self.observation_space = FRAME_SPACE

    def observation(self, picture: np.ndarray) -> np.ndarray:
        return shrink(picture, self.crop)


def shrink(picture: np.ndarray, crop: int) -> np.ndarray:
    """[H,W,3] uint8 -> [64,64,3] uint8 without the `crop` lowest rows, by area averaging."""
    rows = picture.shape[0] - crop
    return cv2.resize(picture[:rows], FRAME[:2], interpolation=cv2.INTER_AREA)


def car_racing(config: EnvConfig) -> gym.Env:
    """Gymnasium's CarRacing-v3: steering in [-1,1], gas and brake in [0,1]."""
    from wm.carracing import CarRacing, FastCarRacing  # pygame and Box2D take a second to load

    game = FastCarRacing() if config.fast_drawing else CarRacing()
    return CroppedFrame(HeldAction(TimeLimit(game, config.max_steps), config.repeat), config.crop)


class TakeCover(gym.Env):
    """ViZDoom's take-cover: dodge fireballs; the return is the survival in tics.

    One action in [-1,1], of which MOVE makes three moves.
    """

    def __init__(self, config: EnvConfig):
        import vizdoom

        self.observation_space = FRAME_SPACE
        self.action_space = action_space(config.name)
        self.crop, self.repeat = config.crop, config.repeat
        self.game = game = vizdoom.DoomGame()
        game.set_vizdoom_path(str(Path(__file__).with_name("vizdoom.sh")))
        game.load_config(os.path.join(vizdoom.scenarios_path, "take_cover.cfg"))
        skill = config.world.skill  # the scenario's file is not to be relied upon for either
        game.set_doom_skill(skill)
        game.set_episode_timeout(config.max_steps)
        game.set_window_visible(False)
        self.scratch = tempfile.TemporaryDirectory(prefix="vizdoom-")
        # A pool's process that is told to end runs this, and nothing else of ours.
        self.end_game = Finalize(self, _end_game, (game, self.scratch), exitpriority=1)
        if config.world != ORDINARY:
            scenario = Path(self.scratch.name, "take_cover.wad")
            write_scenario(config.world, Path(vizdoom.scenarios_path, scenario.name), scenario)
            game.set_doom_scenario_path(str(scenario))
        ini = os.path.join(self.scratch.name, "vizdoom.ini")
        game.set_doom_config_path(ini)  # else it leaves a file in the user's folder
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        game.set_available_buttons([vizdoom.Button.MOVE_LEFT, vizdoom.Button.MOVE_RIGHT])
        assert game.get_doom_skill() == skill
        assert game.get_episode_timeout() == config.max_steps
        os.environ |= {"WM_ENGINE": vizdoom.exe_path, "WM_GAME": str(os.getpid())}  # to vizdoom.sh
        with contextlib.chdir(self.scratch.name):  # the engine makes a folder where it is started
            game.init()

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        # ViZDoom draws from a seed only when it is set right before the episode.
        self.game.set_seed(int(self.np_random.integers(2**31)) if seed is None else seed)
        self.game.new_episode()
        self.frame = shrink(self.game.get_state().screen_buffer, self.crop)
        return self.frame, {}

    def step(self, action: np.ndarray):
        move = float(action[0])
        reward = self.game.make_action([move < -MOVE, move > MOVE], self.repeat)
        dead = self.game.is_player_dead()
        finished = self.game.is_episode_finished()
        if not finished:  # a finished game has no picture: the last one stands
            self.frame = shrink(self.game.get_state().screen_buffer, self.crop)
        return self.frame, reward, dead, finished and not dead, {}

    def close(self):
        self.end_game()


def _end_game(game: Any, scratch: tempfile.TemporaryDirectory) -> None:
    """End ViZDoom's engine, and remove its files."""
    game.close()
    scratch.cleanup()


def catch(config: EnvConfig) -> gym.Env:
    """The test game, its actions held as in the others."""
    return HeldAction(Catch(config), config.repeat)


class Catch(gym.Env):
    """A ball falls, a paddle slides below it: +1 for a catch; a miss ends the episode."""

    def __init__(self, config: EnvConfig):
        self.observation_space = FRAME_SPACE
        self.action_space = action_space(config.name)
        self.max_steps = config.max_steps

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.steps, self.paddle = 0, 0.5
        self._drop()
        return self._draw(), {}

    def step(self, action: np.ndarray):
        self.steps += 1
        self.paddle = float(np.clip(self.paddle + 0.1 * action[0], 0.0, 1.0))
        self.ball[1] += 0.125
        landed = self.ball[1] >= 1.0
        caught = landed and abs(self.ball[0] - self.paddle) < 0.25
        if caught:
            self._drop()
        frame = self._draw()
        return frame, float(caught), bool(landed and not caught), self.steps >= self.max_steps, {}

    def _drop(self) -> None:
        self.ball = np.array([self.np_random.uniform(), 0.0])

    def _draw(self) -> np.ndarray:
        frame = np.zeros(FRAME, np.uint8)
        x, y = (4 + self.ball * 55).astype(int)
        frame[y - 4 : y + 4, x - 4 : x + 4] = (255, 80, 80)
        paddle = int(4 + self.paddle * 55)
        frame[58:64, max(paddle - 10, 0) : paddle + 10] = (80, 160, 255)
        return frame
