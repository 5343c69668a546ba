"""Pretrained agents: those of finished pipelines, in half precision, small enough for git.

A bundle is an agent's folder like any other, with a page beside it that says where it comes from.
"""

import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from wm import WMError
from wm.config import load
from wm.files import shipped, write_atomically
from wm.stages import damaged
from wm.worldmodels.agent import Agent
from wm.worldmodels.pipeline import Config, result_config, scored_controller, stages, summary
from wm.worldmodels.starts import Starts

PRETRAINED = shipped("pretrained")
KEPT_STARTS = 128  # at most


def pretrained(game: str) -> str:
    """The folder of the pretrained agent of a game.

    Raises:
        WMError: if there is none, naming those that there are.
    """
    if not (PRETRAINED / game / "config.yaml").is_file():
        there = ", ".join(sorted(path.parent.name for path in PRETRAINED.glob("[!.]*/config.yaml")))
        raise WMError(f"there is no pretrained agent '{game}'; there are: {there or 'none'}")
    return str(PRETRAINED / game)


def bundle(words: Sequence[str]) -> None:
    """Keep the agent of a finished pipeline; `words` are those of its `wm run`.

    Raises:
        WMError: if the pipeline is not finished, or the agent damaged.
    """
    config = load(Config, words)
    graph = stages(config)
    if missing := [stage.label for stage in graph if not stage.done]:
        command = " ".join(["wm", "run", *words])
        raise WMError(f"{missing[0]} is not done; `{command}` does it")
    source = scored_controller(graph)
    if bad := damaged(source):
        command = " ".join(["wm", source.name, *words])
        raise WMError(f"{bad[0]} is damaged; `{command} --repair` makes it again, the same")
    folder = PRETRAINED / config.env.name
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    halved(Agent.load(source.folder / "agent")).save(partial)
    trained = [stage for stage in graph if stage.name == "controller"][-1]
    about: dict[str, Any] = {
        "command": f"wm run {' '.join(w for w in words if not w.startswith('runs='))}",
        "versions": trained.record["versions"],
        "results before it was halved": summary(graph),
        "config": result_config(config),
    }
    write_atomically(partial / "about.yaml", OmegaConf.to_yaml(about))
    shutil.rmtree(folder, ignore_errors=True)  # never files of two agents in one folder
    partial.rename(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB; `wm evaluate pretrained={config.env.name}` scores it")


def halved(agent: Agent) -> Agent:
    """With V, M and some of the starts in float16; C, which is small, stays as it is."""
    vision, memory = deepcopy(agent.vision).half(), deepcopy(agent.memory).half()
    some = slice(
        None, None, -(-len(agent.starts.latent) // KEPT_STARTS)
    )  # they are in order of time
    starts = Starts(*(tensor[some].half() for tensor in agent.starts))
    return replace(agent, vision=vision, memory=memory, starts=starts)
