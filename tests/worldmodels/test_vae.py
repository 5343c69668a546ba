import math
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from wm.worldmodels.vae import (
    ConvVAE,
    VisionConfig,
    encode_frames,
    gaussian_kl,
    reconstruction_loss,
    to_frames,
    to_images,
)


@pytest.fixture
def change(vision):
    """change(**settings): a copy of V that a test may train or damage."""

    def make(**settings):
        model = deepcopy(vision)
        model.config = replace(vision.config, **settings)
        return model

    return make


def random_frames(*shape):
    return torch.randint(0, 256, (*shape, 64, 64, 3), dtype=torch.uint8)


@pytest.mark.parametrize(("latent", "count"), [(32, 4_348_547), (64, 4_446_915)])
def test_parameter_count_is_the_papers(latent, count):
    with torch.device("meta"):
        model = ConvVAE(VisionConfig(latent=latent))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_gaussian_kl_equals_the_divergence_of_torch():
    mean, log_variance = torch.randn(2, 5, 4, dtype=torch.float64) * 3
    posterior = Normal(mean, (log_variance / 2).exp())
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(
        gaussian_kl(mean, log_variance), kl_divergence(posterior, prior), check_dtype=False
    )


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_reconstruction_loss_is_the_negative_log_likelihood(likelihood):
    logits = torch.randn(3, 3, 8, 8, dtype=torch.float64) * 4
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    if likelihood == "bernoulli":
        density, constant = Bernoulli(logits=logits, validate_args=False), 0.0
    else:  # of variance 1/2
        density, constant = Normal(logits.sigmoid(), math.sqrt(0.5)), 0.5 * math.log(math.pi)
    expected = (-density.log_prob(images) - constant).sum((1, 2, 3)).mean()
    torch.testing.assert_close(reconstruction_loss(logits, images, likelihood), expected)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_extreme_frames_and_weights_give_finite_loss_and_gradients(change, likelihood, scale):
    model = change(likelihood=likelihood)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None]
    frames, noise = black_and_white.expand(2, 64, 64, 3), torch.ones(2, 4)
    if scale > 1:
        assert model(to_images(frames), noise)[0].abs().max() > 1000
    parts = model.loss(frames, frames, noise)
    parts["loss"].backward()
    assert all(parts[name].isfinite() for name in ("loss", "reconstruction", "kl"))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_pixels_that_have_just_changed_weigh_more(change):
    frames = random_frames(2) // 128 * 255  # each colour is out or full,
    turned = frames.clone()
    turned[1, ..., 0] = 255 - frames[1, ..., 0]  # and red turns in the second picture
    model, noise = change(motion_weight=3.0), torch.zeros(2, 4)
    one, two = (model.loss(f[None], f[None], noise)["reconstruction"] for f in frames)
    weighed = model.loss(frames, turned, noise)["reconstruction"]
    torch.testing.assert_close(weighed, (one + (1 + 3.0) * two) / 2)
    model.config = replace(model.config, motion_weight=0.0)
    torch.testing.assert_close(model.loss(frames, turned, noise)["reconstruction"], (one + two) / 2)


@pytest.mark.parametrize("informative", [0, 1])
def test_free_nats_floor_the_kl_of_an_image(change, informative):
    model = change(free_nats=0.5, beta=2.0)
    head = model.encoder[-1]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)  # the posterior is the prior,
    head.bias.data[:informative] = 3.0  # except for means of 3: a KL of 4.5 nats
    parts = model.loss(*random_frames(2, 2), torch.zeros(2, 4))
    torch.testing.assert_close(parts["kl"], torch.tensor(4.5 * informative))
    floored = max(4.5 * informative, 0.5 * 4)
    torch.testing.assert_close(parts["loss"], parts["reconstruction"] + 2.0 * floored)


def test_frames_to_images_and_back_is_exact():
    frames = (torch.arange(2 * 64 * 64 * 3) % 256).to(torch.uint8).view(2, 64, 64, 3)
    images = to_images(frames)
    assert images.shape == (2, 3, 64, 64)
    assert (images.min(), images.max()) == (0.0, 1.0)
    for error in (-0.4 / 255, 0.0, 0.4 / 255):  # less than half a level
        assert (to_frames(images + error) == frames.numpy()).all()


def test_a_frame_is_encoded_alike_alone_and_in_a_batch(vision):
    frames = random_frames(5).numpy()
    whole = encode_frames(vision, frames)
    alone = encode_frames(vision, frames[2:3])
    for batch, single in zip(whole, alone, strict=True):
        assert batch.shape == (5, 4)
        torch.testing.assert_close(torch.tensor(batch[2:3]), torch.tensor(single))


def test_latents_of_half_precision_are_off_by_little(change):
    frames = random_frames(20).numpy()
    half, full = (
        np.stack(encode_frames(change(precision=precision), frames))
        for precision in ("bf16-mixed", "32-true")
    )
    assert np.abs(half - full).max() < 0.02 * np.abs(full).max()
    assert half.dtype == np.float32 and (half != full).any()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_few_steps_on_a_few_frames_lower_the_loss(change, likelihood):
    model = change(likelihood=likelihood, learning_rate=1e-3)
    frames, previous = random_frames(2, 2)
    optimizer, losses = model.configure_optimizers(), []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model.loss(frames, previous, torch.zeros(2, 4))["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1.0


def test_everything_is_made_where_v_is():
    with torch.device("meta"):
        model = ConvVAE(VisionConfig(latent=4))
        frames = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    model.log = model.log_dict = lambda *values, **options: None
    model.trainer = SimpleNamespace(global_step=3)
    loss = model.training_step((frames, frames), 0)
    loss.backward()
    assert loss.is_meta
    model.on_validation_epoch_start()
    model.validation_step((frames, frames), 0)
    model.on_validation_epoch_end()
