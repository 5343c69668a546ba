import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from wm import WMError
from wm.config import ConfigError
from wm.envs import as_vector, make_env
from wm.rollout import rollout
from wm.stages import DONE, LOCK
from wm.worldmodels.agent import Agent, AgentPlayer, find_agent, save_tensors

TENSORS = ["vision", "memory", "controller", "starts"]


@pytest.fixture
def folder(saved, tmp_path):
    """An agent's folder that a test may damage."""
    return Path(shutil.copytree(saved("carracing"), tmp_path / "agent"))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_an_agent_read_back_acts_and_dreams_alike(make_agent, tmp_path, cell):
    agent = make_agent("carracing", {"cell": cell}, temperature=0.7, hidden=3)
    agent.save(tmp_path)
    loaded = Agent.load(tmp_path)
    assert loaded.config == agent.config
    features = torch.randn(3, agent.config.features)
    assert torch.equal(loaded.controller()(features), agent.controller()(features))
    results = [rollout(a.dreams(3), a.controller(), [1, 2, 3]) for a in (agent, loaded)]
    assert torch.equal(results[0].returns, results[1].returns)
    frames = [a.dreams(1) for a in (agent, loaded)]
    for envs in frames:
        envs.reset(seed=[4])
    np.testing.assert_array_equal(frames[0].render(), frames[1].render())


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_player_acts_as_its_agent_but_for_noise(make_agent, tmp_path, noise):
    agent = make_agent("tiny")
    agent.save(tmp_path)
    game = as_vector(make_env(agent.config.env))
    envs, policy = AgentPlayer(tmp_path, noise=noise)(game)
    observation, _ = envs.reset(seed=[0])
    policy.reset([0])
    actions = torch.as_tensor(policy(observation))
    assert torch.equal(actions, agent.controller()(observation)) == (noise == 0.0)
    _, other = AgentPlayer(tmp_path, weights=-agent.weights)(game)
    torch.testing.assert_close(other(observation), -agent.controller()(observation))


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("kept", [0, 0.5, None])
def test_a_truncated_or_missing_file_is_reported(folder, name, kept):
    path = folder / f"{name}.safetensors"
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(WMError, match=path.name):
        Agent.load(folder)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_the_configuration_are_reported(folder, name):
    save_tensors(folder / f"{name}.safetensors", {"weights": torch.zeros(3)})
    with pytest.raises(WMError, match=f"{name}.safetensors"):
        Agent.load(folder)


def test_scalars_in_place_of_starts_are_reported(folder):
    scalars = {"latent": torch.tensor(1.0), "state": torch.tensor(1.0)}
    save_tensors(folder / "starts.safetensors", scalars)
    with pytest.raises(WMError, match=r"starts\.safetensors does not fit"):
        Agent.load(folder)


def test_dreams_that_an_agent_cannot_have_are_refused(make_agent):
    agent = make_agent("carracing", {"cell": "gru"})
    with pytest.raises(ConfigError, match=r"needs memory\.cell=lstm"):
        agent.dreams(1, features="zhc")
    make_agent("takecover").dreams(1, end="never")  # which teach nothing, and may be wanted


class Payload:
    """A pickle that touches a file when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", TENSORS)
def test_a_pickle_in_place_of_tensors_is_refused_and_runs_no_code(folder, tmp_path, name):
    marker = tmp_path / "ran"
    payload = pickle.dumps(Payload(marker))
    (folder / f"{name}.safetensors").write_bytes(payload)
    with pytest.raises(WMError, match=f"{name}.safetensors"):
        Agent.load(folder)
    assert not marker.exists()
    pickle.loads(payload)  # it would have
    assert marker.exists()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("memory:\n  hiden: 6\n", "memory.hiden"),
        ("memory:\n  hidden: 0\n", "memory.hidden"),
        ("memory: [\n", "config.yaml"),
    ],
)
def test_a_configuration_that_is_not_one_is_reported(folder, text, error):
    (folder / "config.yaml").write_text(text)
    with pytest.raises(WMError, match=error):
        Agent.load(folder)


def test_a_folder_is_found_as_itself_and_an_empty_one_holds_no_agent(folder, tmp_path):
    assert find_agent(str(folder)) == folder
    assert folder.name == "agent" and find_agent(str(folder.parent)) == folder  # of its stage
    (tmp_path / LOCK).touch()
    with pytest.raises(WMError, match="is not done: its agent still learns"):
        find_agent(folder)
    (tmp_path / DONE).touch()
    assert find_agent(folder) == folder
    (tmp_path / "empty").mkdir()
    for look in (Agent.load, find_agent):
        with pytest.raises(WMError, match="holds no agent"):
            look(tmp_path / "empty")
