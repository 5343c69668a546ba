"""V, the convolutional VAE: a 64x64 frame to a latent vector and back.

Ha & Schmidhuber 2018, section A.1. B batch, Z latent. Images are float [B,3,64,64] in [0,1],
frames uint8 [B,64,64,3].
"""

from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm.config import bounded
from wm.ranks import averaged
from wm.training import step_noise

ACTIVE_VARIANCE = 0.01  # of a latent's mean over frames: Burda et al. 2016, section 2


@dataclass(frozen=True)
class VisionConfig:
    latent: int = bounded(32, 1)
    beta: float = bounded(1.0, 0.0)  # weight of the KL, on the scale of `likelihood`
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian"  # of variance 1/2, or per pixel
    free_nats: float = bounded(
        0.0, 0.0
    )  # floor of an image's KL, per latent; the original code's 0.5
    motion_weight: float = bounded(0.0, 0.0)  # extra weight of pixels that have just changed
    learning_rate: float = bounded(1e-4, 0.0)  # as in the original code
    batch: int = bounded(100, 1)
    steps: int = bounded(3000, 1)  # in the first round
    later_steps: int = bounded(500, 0)  # in each later one; 0: V stays as it is
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed"


def to_images(frames: Tensor | np.ndarray) -> Tensor:
    """uint8 [B,64,64,3] -> float [B,3,64,64] in [0,1], channels last in memory."""
    if isinstance(frames, np.ndarray):
        frames = torch.from_numpy(np.require(frames, requirements="W"))  # a memory map is copied
    return frames.permute(0, 3, 1, 2).float() / 255.0


def to_frames(images: Tensor) -> np.ndarray:
    """float [B,3,64,64] in [0,1] -> uint8 [B,64,64,3]."""
    levels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) per latent, [B,Z]; in nats.

    In closed form: -1/2 (1 + log var - mean^2 - var) (Kingma & Welling 2014, appendix B).
    """
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp())


def reconstruction_loss(
    logits: Tensor, images: Tensor, likelihood: str, weight: Tensor | float = 1.0
) -> Tensor:
    """-log p(image | latent) up to a constant, summed over pixels, averaged over the batch.

    gaussian: the squared error, which is a Gaussian of variance 1/2; bernoulli: cross-entropy.
    weight [B,1,64,64] multiplies the loss of each pixel.
    """
    if likelihood == "bernoulli":
        loss = F.binary_cross_entropy_with_logits(logits, images, reduction="none")
    else:
        loss = (logits.sigmoid() - images).square()
    return (weight * loss).flatten(1).sum(1).mean()


def motion(images: Tensor, previous: Tensor) -> Tensor:
    """How much each pixel has changed, the largest of its colours: [B,1,64,64] in [0,1].

    A fireball far away is four pixels of 4,096: without weight it is the last thing V learns.
    """
    return (images - previous).abs().amax(1, keepdim=True)


class ConvVAE(L.LightningModule):
    """The paper's V: conv 32-64-128-256, latent, dense 1024, deconv 128-64-32-3."""

    step_unit = "batch"

    def __init__(self, config: VisionConfig, seed: int = 0):
        super().__init__()
        self.config, self.seed = config, seed
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, 32, 4, 2), nn.ReLU()),
            *(nn.Conv2d(32, 64, 4, 2), nn.ReLU()),
            *(nn.Conv2d(64, 128, 4, 2), nn.ReLU()),
            *(nn.Conv2d(128, 256, 4, 2), nn.ReLU()),
            nn.Flatten(),
            nn.Linear(1024, 2 * config.latent),
        )
        self.dense = nn.Linear(config.latent, 1024)
        self.deconv = nn.Sequential(
            *(nn.ConvTranspose2d(1024, 128, 5, 2), nn.ReLU()),
            *(nn.ConvTranspose2d(128, 64, 5, 2), nn.ReLU()),
            *(nn.ConvTranspose2d(64, 32, 6, 2), nn.ReLU()),
            nn.ConvTranspose2d(32, 3, 6, 2),
        )
        self.to(memory_format=torch.channels_last)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | image), each [B,Z]."""
        mean, log_variance = self.encoder(images).float().chunk(2, dim=-1)
        return mean, log_variance.clamp(-20, 20)  # finite variances for any input

    def decode_logits(self, latent: Tensor) -> Tensor:
        """Logits [B,3,64,64] of p(image | z) for latents [B,Z]."""
        return self.deconv(self.dense(latent)[..., None, None]).float()

    def decode(self, latent: Tensor) -> Tensor:
        """The mean image [B,3,64,64] of p(image | z) for latents [B,Z]."""
        return self.decode_logits(latent).sigmoid()

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the reconstruction, mean and log-variance; noise [B,Z] is standard normal."""
        mean, log_variance = self.encode(images)
        latent = mean + (log_variance / 2).exp() * noise
        return self.decode_logits(latent), mean, log_variance

    def loss(self, frames: Tensor, previous: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """What V is trained by: reconstruction + beta * floored KL, in nats a frame.

        With beta 1, no motion weight and no free nats it is the negative ELBO, up to a constant.

        Args:
            frames: [B,64,64,3] uint8.
            previous: the frames before, [B,64,64,3], for the motion weight.
            noise: standard normal [B,Z].

        Returns:
            loss, reconstruction and kl (before the floor), scalars; mean [B,Z], the latents.
        """
        images = to_images(frames)
        logits, mean, log_variance = self(images, noise)
        weight = 1 + self.config.motion_weight * motion(images, to_images(previous))
        reconstruction = reconstruction_loss(logits, images, self.config.likelihood, weight)
        kl = gaussian_kl(mean, log_variance).sum(1)  # [B]
        floored = kl.clamp(min=self.config.free_nats * self.config.latent).mean()
        loss = reconstruction + self.config.beta * floored
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl.mean(), "mean": mean}

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        frames, previous = batch
        shape = (len(frames), self.config.latent)
        noise = step_noise(self.seed, self.global_step, shape, self.device)
        parts = self.loss(frames, previous, noise)
        shown = averaged({name: parts[name] for name in ("loss", "reconstruction", "kl")})
        self.log("vision/loss", shown.pop("loss"), prog_bar=True)
        self.log_dict({f"vision/{name}": value for name, value in shown.items()})
        return parts["loss"]

    def on_validation_epoch_start(self) -> None:
        self.validation_means: list[Tensor] = []

    def validation_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        frames, previous = batch
        at_mean = torch.zeros(len(frames), self.config.latent, device=self.device)
        parts = self.loss(frames, previous, at_mean)
        names = ("loss", "reconstruction", "kl")
        self.log_dict({f"vision/val_{name}": parts[name] for name in names}, batch_size=len(frames))
        self.validation_means.append(parts["mean"])

    def on_validation_epoch_end(self) -> None:
        variance = torch.cat(self.validation_means).var(0)
        self.log("vision/active_latents", (variance > ACTIVE_VARIANCE).sum().float())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.config.learning_rate)


@torch.inference_mode()
def encode_frames(vision: ConvVAE, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [B,64,64,3] to mean and log-variance, float32 [B,Z] each.

    In the precision that V was trained in: bfloat16 is twice as fast or more, and its error is
    below the posterior's deviation.
    """
    images, device = to_images(frames).to(vision.device), vision.device.type
    half = vision.config.precision == "bf16-mixed"
    with torch.autocast(device, torch.bfloat16, enabled=half):
        mean, log_variance = vision.encode(images)
    return mean.cpu().numpy(), log_variance.cpu().numpy()
