import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from wm.worldmodels.mdnrnn import (
    MDNRNN,
    MemoryConfig,
    Prediction,
    mixture_nll,
    sample_mixture,
)

MIXTURES = pytest.mark.parametrize("mixture", ["joint", "factored"])
CELLS = pytest.mark.parametrize("cell", ["lstm", "gru"])


def random_mixture(mixture, shape=(6,), K=3, Z=2):
    """log_pi, mean and log_sigma as M predicts them, in float64."""
    logits = torch.randn(*shape, K, Z if mixture == "factored" else 1, dtype=torch.float64)
    mean, log_sigma = torch.randn(2, *shape, K, Z, dtype=torch.float64)
    return logits.log_softmax(-2), mean, log_sigma / 2


def segments(B=3, T=5, Z=4, A=1, lengths=None):
    """A batch as Sequences makes it, but for noise in the padding."""
    return {
        "mean": torch.randn(B, T + 1, Z),
        "log_variance": torch.randn(B, T + 1, Z),
        "action": torch.randn(B, T, A),
        "reward": torch.randn(B, T),
        "end": (torch.rand(B, T) < 0.3).float(),
        "mask": (torch.arange(T) < torch.tensor(lengths or [T] * B)[:, None]).float(),
    }


@pytest.mark.parametrize(
    ("latent", "actions", "changes", "count"),
    [
        (32, 3, {"reward_head": False, "end_head": False}, 422_368),
        # The paper's 1,678,785 has one input more, a flag of a restart: 4 * 512 weights.
        (64, 1, {"reward_head": False, "hidden": 512}, 1_678_785 - 4 * 512),
    ],
)
def test_parameter_count_is_the_papers(latent, actions, changes, count):
    with torch.device("meta"):
        model = MDNRNN(MemoryConfig(**changes), latent, actions)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == count


@MIXTURES
def test_nll_equals_the_mixture_of_torch(mixture):
    log_pi, mean, log_sigma = random_mixture(mixture)
    target = torch.randn(6, 2, dtype=torch.float64)
    if mixture == "joint":
        normals = Independent(Normal(mean, log_sigma.exp()), 1)
        density = MixtureSameFamily(Categorical(logits=log_pi[..., 0]), normals)
        expected = -density.log_prob(target)
    else:  # the mixtures of torch have their components last
        normals = Normal(mean.mT, log_sigma.exp().mT)
        density = MixtureSameFamily(Categorical(logits=log_pi.mT), normals)
        expected = -density.log_prob(target).sum(-1)
    torch.testing.assert_close(mixture_nll(target, log_pi, mean, log_sigma), expected)


@MIXTURES
def test_single_mixture_nll_equals_gaussian_nll(mixture):
    log_pi, mean, log_sigma = random_mixture(mixture, K=1)
    target = torch.randn(6, 2, dtype=torch.float64)
    expected = -Normal(mean[:, 0], log_sigma[:, 0].exp()).log_prob(target).sum(-1)
    torch.testing.assert_close(mixture_nll(target, log_pi, mean, log_sigma), expected)


@MIXTURES
def test_density_integrates_to_one(mixture):
    axis = torch.linspace(-15, 15, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    nll = mixture_nll(grid, *(part[0] for part in random_mixture(mixture)))
    integral = (-nll).exp().sum() * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(integral, torch.ones_like(integral))


@MIXTURES
@pytest.mark.parametrize(("inputs", "weights"), [(1e3, 1.0), (1.0, 1e4), (1e3, 1e4), (0.0, 0.0)])
def test_extreme_inputs_and_weights_give_finite_loss_and_gradients(
    make_memory, mixture, inputs, weights
):
    model = make_memory(mixture=mixture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= weights
    batch = segments()
    batch |= {name: batch[name] * inputs for name in ("mean", "action", "reward")}
    loss = model.loss(batch, noise=torch.ones(3, 6, 4))["loss"]
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in trained)


@MIXTURES
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_samples_follow_softened_weights_and_scaled_deviations(mixture, temperature):
    count, weights = 100_000, torch.tensor([0.6, 0.3, 0.1])
    columns = 2 if mixture == "factored" else 1
    log_pi = weights.log()[:, None].expand(count, 3, columns)
    centre = torch.tensor([0.0, 100.0, 200.0])  # so far apart that a sample tells its component
    sigma = torch.tensor([0.5, 1.0, 2.0])
    mean, log_sigma = (x[:, None].expand(count, 3, 2) for x in (centre, sigma.log()))
    uniform, normal = torch.rand(count, columns), torch.randn(count, 2)
    prediction = Prediction(log_pi, mean, log_sigma, None, None)

    samples = sample_mixture(*prediction[:3], temperature, uniform, normal)

    component = (samples / 100).round().long()
    softened = (weights.log() / temperature).softmax(0)
    frequencies = torch.stack([(component == k).float().mean(0) for k in range(3)])
    torch.testing.assert_close(frequencies, softened[:, None].expand(3, 2), atol=0.01, rtol=0)
    for k in range(3):
        chosen = samples[component == k]
        torch.testing.assert_close(chosen.mean(), centre[k], atol=0.2, rtol=0)
        deviation = math.sqrt(temperature) * sigma[k]
        torch.testing.assert_close(chosen.std(), deviation, atol=0, rtol=0.1)
    together = (component[:, 0] == component[:, 1]).float().mean()
    expected = softened.square().sum() if mixture == "factored" else torch.tensor(1.0)
    torch.testing.assert_close(together, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_single_mixture_has_variance_temperature_times_sigma_squared(temperature):
    sigma, normal = 0.7, torch.randn(100_000, 1)
    parts = [torch.full((100_000, 1, 1), value) for value in (0.0, 3.0, math.log(sigma))]
    samples = sample_mixture(*parts, temperature, normal * 0, normal)
    variance = torch.tensor(temperature * sigma**2)
    torch.testing.assert_close(samples.var(), variance, atol=0, rtol=0.03)


@pytest.mark.parametrize(("uniform", "component"), [(0.0, 1), (0.5, 1), (1 - 2**-24, 1)])
def test_a_component_without_weight_is_never_sampled(uniform, component):
    log_pi = torch.tensor([0.0, 1.0, 0.0]).log()[None, :, None]
    mean = torch.arange(3.0)[None, :, None]
    prediction = Prediction(log_pi, mean, torch.zeros(1, 3, 1), None, None)
    sample = sample_mixture(*prediction[:3], 1.0, torch.tensor([[uniform]]), torch.zeros(1, 1))
    assert sample.item() == component


@CELLS
def test_stepping_one_by_one_equals_the_whole_sequence(make_memory, cell):
    model, batch = make_memory(cell=cell), segments()
    latent, action = batch["mean"][:, :-1], batch["action"]
    whole, last = model.advance(latent, action, None)
    state, outputs = model.zero_state(3), []
    for t in range(5):
        output, state = model.advance(latent[:, t : t + 1], action[:, t : t + 1], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)
    again = model.zero_state(3)
    for t in range(5):
        again = model.step(latent[:, t], action[:, t], again)
    torch.testing.assert_close(again, last)


def test_m_that_is_told_moves_hears_of_a_third_of_the_axis_only(make_memory):
    plain, told = make_memory(), make_memory(moves=True)
    latent, state = torch.randn(6, 4), plain.zero_state(6)
    action = torch.tensor([-1.0, -0.4, -0.3, 0.3, 0.4, 1.0])[:, None]
    move = torch.tensor([-1.0, -1.0, 0.0, 0.0, 1.0, 1.0])[:, None]
    torch.testing.assert_close(told.step(latent, action, state), plain.step(latent, move, state))
    several = latent[:, None].expand(-1, 3, -1), action[:, None].expand(-1, 3, -1)
    moves = move[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(told(*several), plain(several[0], moves))
    lengths = torch.full((6,), 2)
    warmed = told.warm_up(*several, lengths), plain.warm_up(several[0], moves, lengths)
    torch.testing.assert_close(*warmed)


def test_a_dream_tells_m_the_move(make_agent):
    envs = make_agent("takecover", memory={"moves": True}).dreams(2)
    envs.reset(seed=[3, 3])
    features, *_ = envs.step(torch.tensor([[0.4], [1.0]]))
    torch.testing.assert_close(features[0], features[1])


@CELLS
@pytest.mark.parametrize("lengths", [(5, 0, 3), (1, 5, 2), (0, 0, 0)])
def test_warm_up_equals_advancing_each_sequence_by_its_length(make_memory, cell, lengths):
    model, batch = make_memory(cell=cell), segments()
    latent, action = batch["mean"][:, :-1], batch["action"]
    warm = model.warm_up(latent, action, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        expected = model.zero_state(1)
        if length:
            mine = slice(row, row + 1)
            _, expected = model.advance(latent[mine, :length], action[mine, :length], None)
        torch.testing.assert_close(tuple(layer[:, row : row + 1] for layer in warm), expected)


@pytest.mark.parametrize("noise", [None, torch.ones(3, 6, 4)])
def test_padding_does_not_change_the_loss(make_memory, noise):
    model, batch = make_memory(), segments(lengths=[5, 2, 1])
    before = model.loss(batch, noise)
    padding = batch["mask"] == 0
    for name in ("action", "reward", "end"):
        batch[name][padding] = 1 - batch[name][padding]
    for name in ("mean", "log_variance"):
        batch[name][:, 1:][padding] = 9.0
    torch.testing.assert_close(model.loss(batch, noise), before)
    batch["mean"][0, -1] += 1.0  # a real step does
    assert model.loss(batch, noise)["loss"] != before["loss"]


def test_loss_weighs_reward_and_end_as_configured(make_memory):
    batch = segments()
    parts = make_memory(reward_weight=3.0).loss(batch, None)
    total = parts["nll"] + 3.0 * parts["reward_mse"] + parts["end_loss"]
    torch.testing.assert_close(parts["loss"], total)
    bare = make_memory(reward_head=False, end_head=False).loss(batch, None)
    assert set(bare) == {"nll", "loss"}
    assert bare["nll"] == bare["loss"]


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_the_weight_of_the_loss_multiplies_the_odds_of_an_end(make_memory, weight):
    model, batch = make_memory(end_weight=weight), segments(B=2)
    batch["end"] = torch.zeros(2, 5)
    batch["end"][0, -1] = 1.0  # one step in ten
    odds = 1 / 9
    torch.nn.init.zeros_(model.end_head.weight)
    torch.nn.init.constant_(model.end_head.bias, math.log(weight * odds))
    model.loss(batch, None)["end_loss"].backward()
    assert model.end_head.bias.grad.item() == pytest.approx(0.0, abs=1e-6)  # the loss is least here
    assert (model.end_head.bias - math.log(weight)).sigmoid().item() == pytest.approx(0.1)


@MIXTURES
def test_a_few_steps_lower_the_loss_towards_the_final_learning_rate(make_memory, mixture):
    model, batch = make_memory(mixture=mixture, steps=30, learning_rate=0.02), segments()
    (optimizer,), (schedule,) = model.configure_optimizers()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(model.loss(batch, None)["loss"])
        losses[-1].backward()
        optimizer.step()
        schedule["scheduler"].step()
    assert losses[-1] < losses[0] - 0.1
    assert schedule["interval"] == "step"
    assert optimizer.param_groups[0]["lr"] == pytest.approx(model.config.final_learning_rate)


def test_the_ranks_losses_have_the_mean_and_gradient_of_the_whole_batch(make_memory):
    model, batch, noise = make_memory(), segments(4, lengths=[5, 1, 2, 4]), torch.randn(4, 6, 4)

    def gradient(*losses):
        model.zero_grad()
        (sum(losses) / len(losses)).backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    whole = model.loss(batch, noise)["loss"]
    steps = batch["mask"].sum() / 2
    parts = [
        model.loss({k: v[mine] for k, v in batch.items()}, noise[mine], steps)["loss"]
        for mine in (slice(2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(parts) / 2, whole)
    torch.testing.assert_close(gradient(*parts), gradient(whole))


def test_everything_is_made_where_m_is(monkeypatch):
    monkeypatch.setattr(
        torch, "autocast", lambda *given, **options: nullcontext()
    )  # which knows no such device
    with torch.device("meta"):
        model = MDNRNN(MemoryConfig(hidden=6), 4, 1)
        batch = segments()
    model.log = model.log_dict = lambda *values, **options: None
    model.trainer = SimpleNamespace(global_step=3)
    loss = model.training_step(batch, 0)
    loss.backward()
    assert loss.is_meta
    assert model.step(batch["mean"][:, 0], batch["action"][:, 0], model.zero_state(3))[0].is_meta
