"""CarRacing in EnvPool, a faster copy in C++; for collecting only.

Its tracks follow the same rules but are others for the same seed, and its lines have hard edges.
`wm parity` measures what else differs. Scores are always taken in the official game.
"""

import importlib.util
import warnings
from collections.abc import Sequence

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from wm.config import ConfigError
from wm.envs import FRAME_SPACE, EnvConfig, action_space, shrink


def require_envpool(env: EnvConfig) -> None:
    """Refuse what EnvPool cannot play here.

    Raises:
        ConfigError: for another game than CarRacing, or if it is not installed.
    """
    if env.name != "carracing":
        raise ConfigError(f"EnvPool is for env=carracing; {env.name} has only the official game")
    if importlib.util.find_spec("envpool") is None:
        raise ConfigError("EnvPool is not installed; pip install 'wm[fast]' adds it")


class EnvPoolGames(VectorEnv):
    """N games in one thread: frames [N,64,64,3] uint8.

    A game that has ended begins another one at its next step; that is for the caller to overlook.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, config: EnvConfig, num_envs: int):
        require_envpool(config)
        self.config, self.num_envs = config, num_envs
        self.single_observation_space = FRAME_SPACE
        self.single_action_space = action_space(config.name)
        self.observation_space = batch_space(FRAME_SPACE, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Sequence[int], options: dict | None = None):
        import envpool

        with warnings.catch_warnings():  # its spaces' bounds are of two types of float
            warnings.simplefilter("ignore")
            self.games = envpool.make_gymnasium(  # in milliseconds; it takes seeds only here
                "CarRacing-v3",
                num_envs=self.num_envs,
                seed=list(seed),
                num_threads=1,  # the processes share the cores already
                max_episode_steps=self.config.max_steps,
            )
            pictures, info = self.games.reset()
        return self._frames(pictures), info

    def step(self, actions: np.ndarray):
        pictures, total, terminated, truncated, info = self.games.step(actions)
        for _ in range(self.config.repeat - 1):  # as HeldAction does for one game
            seen, reward, dead, cut, info = self.games.step(actions)
            on = ~(terminated | truncated)
            pictures = np.where(on[:, None, None, None], seen, pictures)
            total, terminated, truncated = (
                total + reward * on,
                terminated | dead & on,
                truncated | cut & on,
            )
        return self._frames(pictures), total, terminated, truncated, info

    def _frames(self, pictures: np.ndarray) -> np.ndarray:
        return np.stack([shrink(picture, self.config.crop) for picture in pictures])
