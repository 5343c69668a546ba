"""Numbers that are none stop the work where they appear, with a name, and reach no checkpoint."""

import lightning as L
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from wm import WMError
from wm.envs import EnvConfig, make_env
from wm.rollout import rollout
from wm.stages import CHECKPOINTS
from wm.training import StepsData, TrainerConfig, fit, newest_checkpoint

CPU = TrainerConfig(accelerator="cpu")


class Line(L.LightningModule):
    """Meets at step 7 with a loss, a gradient or a weight that is no number."""

    def __init__(self, trouble, value):
        super().__init__()
        torch.manual_seed(0)
        self.line, self.trouble, self.value = nn.Linear(2, 1), trouble, value
        self.line.weight.register_hook(lambda g: self.spoil("gradient", g))

    def spoil(self, what, tensor):
        return tensor * self.value if what == self.trouble and self.global_step == 7 else tensor

    def training_step(self, batch, number):
        return self.spoil("loss", (self.line(batch) - 1).square().mean())

    def on_train_batch_end(self, *args):
        self.line.weight.data = self.spoil("weight", self.line.weight.data)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def train(folder, trouble, value=1.0):
    module = Line(trouble, value)
    fit(module, StepsData(lambda step: torch.full((3, 2), step / 9), [], 12, 5), folder, CPU, [])
    return module


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "trouble, says",
    [
        ("loss", "the loss is not finite at step 7"),
        ("gradient", r"the gradient of line\.weight is not finite at step 7"),
        ("weight", r"the (loss|weight line\.weight) is not finite at step 7"),
    ],
)
def test_training_stops_and_its_last_checkpoint_is_finite(trouble, says, value, tmp_path):
    with pytest.raises(WMError, match=rf"{says}.*rerun"):
        train(tmp_path, trouble, value)
    newest = newest_checkpoint(tmp_path / CHECKPOINTS)
    assert newest.name == "step=5.ckpt"
    saved = torch.load(newest, weights_only=True)["state_dict"].values()
    assert all(tensor.isfinite().all() for tensor in saved)
    resumed, straight = train(tmp_path, None), train(tmp_path / "straight", None)
    assert torch.equal(resumed.line.weight, straight.line.weight)


class Broken:
    """Gives one of its games an action that is no number, at its third step."""

    def __init__(self, value):
        self.value = value

    def reset(self, seeds):
        self.steps, self.games = 0, len(seeds)

    def __call__(self, observation):
        self.steps += 1
        actions = np.zeros((self.games, 1), np.float32)
        if self.steps == 3:
            actions[1] = self.value
        return actions


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_action_that_is_not_finite_names_player_seed_and_step(value):
    config = EnvConfig("tiny", max_steps=20)
    games = SyncVectorEnv([lambda: make_env(config)] * 3, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(WMError, match=r"action 2 of player 1 of 3 \(seed 18\) is not finite"):
        rollout(games, Broken(value), [17, 18, 19])
