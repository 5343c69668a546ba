import os
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from wm.worldmodels.engine import Noise, dream_step, fused_step, join_weights
from wm.worldmodels.latent import FEATURES
from wm.worldmodels.mdnrnn import sample_mixture

DREAMS, SEEDS, LATENT, ACTIONS = 12, 3, 4, 2
CELLS = pytest.mark.parametrize("cell", ["lstm", "gru"])


@pytest.fixture
def situation(make_memory):
    """situation(**memory settings): M and one step's arguments for N dreams."""

    def make(dreams=DREAMS, **settings):
        memory = make_memory(LATENT, ACTIONS, **settings)
        layers = 2 if memory.config.cell == "lstm" else 1
        state = tuple(torch.randn(1, dreams, memory.config.hidden) for _ in range(layers))
        uniform, normals = torch.rand(SEEDS, memory.uniform_size), [torch.randn(SEEDS, LATENT)]
        noise = Noise(uniform, *normals, torch.randn(SEEDS) / 10, torch.empty(SEEDS, ACTIONS))
        now = (torch.randn(dreams, LATENT), torch.rand(dreams, ACTIONS), state)
        return memory, now, noise, torch.randint(SEEDS, (dreams,))

    return make


def plainly(memory, temperature, now, noise, index):
    """The same step by M's own methods."""
    latent, action, state = now
    hidden, state = memory.advance(latent[:, None], action[:, None], state)
    prediction = memory.predict(hidden[:, 0])
    latent = sample_mixture(*prediction[:3], temperature, noise.uniform[index], noise.normal[index])
    features = FEATURES["zh"](latent, state)
    return latent, state, features, prediction.reward, prediction.end_logit


@CELLS
@pytest.mark.parametrize("mixture", ["joint", "factored"])
@pytest.mark.parametrize("temperature", [0.5, 1.15])
@torch.inference_mode()
def test_the_joined_step_is_ms_own_step(situation, cell, mixture, temperature):
    memory, *now = situation(cell=cell, mixture=mixture)
    weights = join_weights(memory, torch.float32)
    moment, *noise = now
    ours = dream_step(weights, 3, FEATURES["zh"], torch.tensor(temperature), *moment, *noise)
    torch.testing.assert_close(ours, plainly(memory, temperature, *now))


@CELLS
@torch.inference_mode()
def test_without_heads_a_step_pays_one_and_ends_nothing(situation, cell):
    memory, now, *noise = situation(cell=cell, reward_head=False, end_head=False)
    weights = join_weights(memory, torch.float32)
    *_, reward, end = dream_step(weights, 3, FEATURES["z"], torch.tensor(1.0), *now, *noise)
    assert (reward == 1).all()
    assert (end == -torch.inf).all()


@torch.inference_mode()
def test_products_in_bfloat16_err_by_its_rounding(situation):
    memory, now, *noise = situation(hidden=64)
    exact, rounded = (
        dream_step(join_weights(memory, dtype), 3, FEATURES["z"], torch.tensor(1.0), *now, *noise)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for layer, same in zip(exact[1], rounded[1], strict=True):
        torch.testing.assert_close(same, layer, atol=0.03, rtol=0)
        assert (same != layer).any()


@torch.inference_mode()
def test_the_compiled_step_is_the_plain_one_for_any_number_of_dreams(situation):
    for dreams in (DREAMS, 7, 2):
        memory, now, *noise = situation(dreams)
        weights = join_weights(memory, torch.float32)
        arguments = (weights, 3, FEATURES["zh"], torch.tensor(1.15), *now, *noise)
        torch.testing.assert_close(fused_step()(*arguments), dream_step(*arguments))


def test_without_a_compiler_dreams_are_slower_and_the_same(tmp_path):
    script = """
import torch
from wm.worldmodels.engine import Noise, dream_step, fused_step, join_weights
from wm.worldmodels.latent import FEATURES
from wm.worldmodels.mdnrnn import MDNRNN, MemoryConfig

memory = MDNRNN(MemoryConfig(hidden=6, mixtures=2), 4, 1)
noise = Noise(torch.rand(1, 4), torch.randn(1, 4), torch.zeros(1), torch.zeros(1, 1))
now = torch.randn(3, 4), torch.randn(3, 1), memory.zero_state(3)
weights = join_weights(memory, torch.float32)
arguments = weights, 2, FEATURES["z"], torch.tensor(1.0), *now, noise, torch.zeros(3).long()
for _ in range(2):
    torch.testing.assert_close(fused_step()(*arguments), dream_step(*arguments))
"""
    nowhere = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **nowhere})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("dreams are not compiled, which is slower") == 1


@CELLS
@pytest.mark.parametrize("heads", [True, False])
def test_a_step_is_made_where_m_is(situation, cell, heads):
    memory, *given = situation(cell=cell, reward_head=heads, end_head=heads)
    now, noise, index = tree_map(lambda tensor: tensor.to("meta"), given)
    weights = join_weights(memory.to("meta"), torch.bfloat16)
    temperature = torch.tensor(1.0, device="meta")
    made = dream_step(weights, 3, FEATURES["zh"], temperature, *now, noise, index)
    assert all(tensor.is_meta for tensor in tree_leaves(made))
