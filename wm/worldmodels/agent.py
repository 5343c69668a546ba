"""An agent in a folder: V, M, C, the starts of its dreams and the configuration that made them.

The files are safetensors and YAML, so that reading a stranger's agent runs no code.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from gymnasium.vector import VectorEnv
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from wm import WMError
from wm.config import ConfigError, from_yaml, merge, plain, to_yaml
from wm.envs import EnvConfig, action_space
from wm.files import inside, write_atomically
from wm.rollout import NoisyPolicy, Policy
from wm.stages import DONE, LOCK
from wm.worldmodels.controller import Controller, ControllerConfig, parameter_count
from wm.worldmodels.dream import DreamEnv, SingleDream, Starts
from wm.worldmodels.latent import LatentEnv, feature_size
from wm.worldmodels.mdnrnn import MDNRNN, MemoryConfig
from wm.worldmodels.vae import ConvVAE, VisionConfig

FILES = (  # of an agent
    "config.yaml",
    "vision.safetensors",
    "memory.safetensors",
    "controller.safetensors",
    "starts.safetensors",
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class AgentConfig:
    """The part of a configuration that its models need."""

    env: EnvConfig = field(default_factory=EnvConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)

    def __post_init__(self) -> None:
        if self.controller.features == "zhc" and self.memory.cell == "gru":
            raise ConfigError("controller.features=zhc needs memory.cell=lstm: a GRU has no cell")
        if self.memory.moves and self.env.name != "takecover":
            raise ConfigError("memory.moves=true is for env=takecover, whose actions are moves")
        if self.controller.fitness == "dream":  # a dream must have something to tell good from bad
            if self.memory.steps == 0:
                raise ConfigError(
                    "memory.steps=0 leaves M untrained, and its dreams teach nothing: add "
                    "controller.fitness=real"
                )
            if not self.dreams_pay:
                weight = ", and memory.reward_weight" if self.paying_head == "reward_head" else ""
                raise ConfigError(
                    f"controller.fitness=dream needs memory.{self.paying_head}=true{weight} here"
                )
            if self.paying_head == "end_head" and self.controller.end == "never":
                raise ConfigError("controller.end=never pays every candidate the same here")

    @property
    def features(self) -> int:
        """What C sees, in numbers."""
        return feature_size(self.controller.features, self.vision.latent, self.memory.hidden)

    @property
    def actions(self) -> int:
        return action_space(self.env.name).shape[0]

    @property
    def parameters(self) -> int:
        """Weights of one controller."""
        return parameter_count(self.controller, self.features, self.actions)

    @property
    def paying_head(self) -> str:
        """The head of M that tells good from bad in a dream."""
        return "end_head" if self.env.name == "takecover" else "reward_head"

    @property
    def dreams_pay(self) -> bool:
        if self.paying_head == "reward_head" and self.memory.reward_weight == 0:
            return False  # it has learnt nothing
        return getattr(self.memory, self.paying_head)


@dataclass(frozen=True)
class Agent:
    """V, M and C together; weights [n] are C's."""

    config: AgentConfig
    vision: ConvVAE
    memory: MDNRNN
    weights: Tensor
    starts: Starts

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", to_yaml(self.config))
        save_tensors(folder / "vision.safetensors", self.vision.state_dict())
        save_tensors(folder / "memory.safetensors", self.memory.state_dict())
        save_tensors(folder / "controller.safetensors", {"weights": self.weights})
        save_tensors(folder / "starts.safetensors", self.starts._asdict())

    @classmethod
    def load(cls, folder: Path) -> "Agent":
        """Read an agent back, ready to play and to dream.

        Raises:
            WMError: if a file is missing, damaged or does not fit the configuration.
        """
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            raise WMError(f"{folder} holds no agent (config.yaml is missing)")
        for name in FILES:
            inside(folder, name)  # and not a link to what is none of the agent's
        config = from_yaml(AgentConfig, folder / "config.yaml")
        actions = action_space(config.env.name).shape
        make_memory = partial(MDNRNN, config.memory, config.vision.latent, *actions)
        vision = read_module(partial(ConvVAE, config.vision), folder / "vision.safetensors")
        memory = read_module(make_memory, folder / "memory.safetensors")
        (weights,) = load_tensors(folder / "controller.safetensors", ("weights",))
        tensors = load_tensors(folder / "starts.safetensors", Starts._fields)
        starts = Starts(*(tensor.float() for tensor in tensors))  # a bundle's are halves
        agent = cls(config, vision.eval(), memory.eval(), weights, starts)
        agent._check_shapes(folder)
        return agent

    def to(self, device: torch.device | str) -> "Agent":
        """A copy of the agent on a device: it plays on the CPU and dreams anywhere."""
        V, M = (deepcopy(module).to(device) for module in (self.vision, self.memory))
        starts = Starts(*(tensor.to(device) for tensor in self.starts))
        return Agent(self.config, V, M, self.weights.to(device), starts)

    def _check_shapes(self, folder: Path) -> None:
        """That C and the starts are of the configuration's sizes, as V and M are already."""
        state = (len(self.memory.zero_state(1)), self.config.memory.hidden)
        fits = {
            "controller": self.weights.shape == (self.config.parameters,),
            "starts": self.starts.latent.ndim == 2
            and 0 < len(self.starts.latent) == len(self.starts.state)
            and self.starts.latent.shape[1:] == (self.config.vision.latent,)
            and self.starts.state.shape[1:] == state,
        }
        for name in (name for name, good in fits.items() if not good):
            raise WMError(f"{folder / name}.safetensors does not fit the configuration")

    def controller(self, weights: Tensor | None = None) -> Controller:
        """The policy of candidates [P,n], or the agent's own."""
        weights = self.weights[None] if weights is None else weights
        config = self.config
        sizes = config.features, config.actions
        return Controller(config.controller, config.env.name, *sizes, weights.float())

    def dreams(self, num_envs: int, compiled: bool = False, **changes: Any) -> DreamEnv:
        """Its dreams, with changes to the controller's settings, for instance temperature=1.15.

        Raises:
            ConfigError: if the agent cannot have them.
        """
        config = merge(ControllerConfig, plain(self.config.controller), changes)
        replace(self.config, controller=replace(config, fitness="real"))  # which refuses
        env, models = self.config.env, (self.memory, self.starts)
        return DreamEnv(*models, config, env.name, num_envs, self.vision, env.repeat, compiled)


@dataclass(frozen=True)
class AgentPlayer:
    """An agent's folder at real games, for the worker processes.

    Args:
        weights: another controller's weights [n] in place of the agent's.
        noise: the most standard deviation of Gaussian noise on the actions (see NoisyPolicy).
    """

    folder: Path
    weights: Tensor | None = None
    noise: float = 0.0

    def __call__(self, games: VectorEnv) -> tuple[VectorEnv, Policy]:
        agent = Agent.load(self.folder)
        features = agent.config.controller.features
        envs = LatentEnv(games, agent.vision, agent.memory, features)
        policy = agent.controller(None if self.weights is None else self.weights[None])
        if self.noise:
            policy = NoisyPolicy(policy, self.noise, games.single_action_space)
        return envs, policy


def find_agent(run: str | Path, runs: Path = Path("runs")) -> Path:
    """The folder of an agent: given as such, as its stage's, or as the id of an MLflow run.

    Raises:
        WMError: if neither a folder nor a run with an agent is found, or its stage is not done.
    """
    for folder in (Path(run), Path(run) / "agent"):  # of a stage
        if (folder / "config.yaml").is_file():
            stage = folder.parent
            begun = folder.name == "agent" and (stage / LOCK).is_file()
            if begun and not (stage / DONE).is_file():
                raise WMError(f"{stage} is not done: its agent still learns")
            return folder
    if Path(run).is_dir():
        raise WMError(f"{run} holds no agent (config.yaml is missing)")
    from wm.tracking import download_agent  # MLflow is slow to import, and not always needed

    return download_agent(str(run), runs)


def make_dreams(
    num_envs: int, run: str | Path, game: str, render_mode: str | None = None, **changes: Any
) -> DreamEnv:
    """The dreams of a finished run, for gym.make_vec.

    Args:
        run: an agent's folder, or the id of an MLflow run that holds one.
        game: what the run must dream of; set by the environment's name.
        render_mode: these dreams can always render.
        changes: controller settings of the dream, for instance temperature=1.15, horizon=500.

    Raises:
        WMError: if there is no such run, it dreams of another game, or its dreams pay nothing.
    """
    agent = Agent.load(find_agent(run))
    if agent.config.env.name != game:
        raise WMError(f"{run} dreams of {agent.config.env.name}, not of {game}")
    if not agent.config.dreams_pay:
        lack = agent.config.paying_head.replace("_", " ")
        raise WMError(f"M of {run} has no trained {lack}: its dreams pay the same whatever is done")
    return agent.dreams(num_envs, **changes)


def make_dream(
    run: str | Path, game: str, render_mode: str | None = None, **changes: Any
) -> SingleDream:
    """One dream of a finished run, for gym.make; arguments as in make_dreams."""
    return SingleDream(make_dreams(1, run, game, **changes), render_mode)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_atomically(path, save({name: t.detach().contiguous() for name, t in tensors.items()}))


def load_tensors(path: Path, names: Sequence[str]) -> list[Tensor]:
    """The named tensors of a file that holds no others."""
    tensors = _read(path)
    if set(tensors) != set(names):
        raise WMError(f"{path} holds {sorted(tensors)}, not {sorted(names)}")
    return [tensors[name] for name in names]


def read_module(make: Callable[[], Module], path: Path) -> Module:
    """A module with the weights of a file.

    It is made only if the file holds them: a configuration alone cannot ask for any memory.
    """
    tensors = _read(path)
    try:
        with torch.device("meta"):
            expected = make().state_dict()
    except (RuntimeError, TypeError, ValueError) as error:  # more numbers than can be counted
        raise WMError(f"{path} does not fit its configuration: {error}") from None
    wrong = set(tensors) ^ set(expected)
    wrong |= {n for n in set(tensors) & set(expected) if tensors[n].shape != expected[n].shape}
    if wrong:
        raise WMError(f"{path} does not fit its configuration: {', '.join(sorted(wrong))[:200]}")
    module = make()
    module.load_state_dict(tensors)
    return module


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WMError(f"cannot read {path}: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise WMError(f"cannot read {path}: {name[:100]} holds {tensor.dtype}")
        if not tensor.isfinite().all():
            raise WMError(f"{path} is of no use: {name[:100]} is not finite everywhere")
    return tensors
