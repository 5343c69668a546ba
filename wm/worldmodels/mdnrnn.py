"""M, the mixture-density LSTM: next latent, reward and episode end from (latent, action).

Ha & Schmidhuber 2018, section A.2. B batch, T time, Z latent, A action, H hidden, K mixtures.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim.lr_scheduler import CosineAnnealingLR

from wm.config import bounded
from wm.envs import MOVE
from wm.ranks import averaged, summed, world_size
from wm.training import step_noise

LOG_SIGMA_RANGE = (-7.0, 7.0)

State = tuple[Tensor, ...]  # (h, c) of an LSTM, (h,) of a GRU; each [1,B,H]


@dataclass(frozen=True)
class MemoryConfig:
    cell: Literal["lstm", "gru"] = "lstm"
    hidden: int = bounded(256, 1)
    mixtures: int = bounded(5, 1)
    mixture: Literal["joint", "factored"] = "factored"  # one weight a vector, or one a dimension
    latents: Literal["sample", "mean"] = "sample"  # of V's posterior: the paper, the lecture
    moves: bool = False  # M is told -1, 0 or 1 for an action: all that take-cover makes of it
    reward_head: bool = True
    reward_weight: float = bounded(1.0, 0.0)
    end_head: bool = True
    end_weight: float = bounded(10.0, 1e-3)  # of a positive: ends are rare; the original code's 10
    learning_rate: float = bounded(1e-2, 1e-9)
    final_learning_rate: float = bounded(1e-5, 1e-9)  # reached along half a cosine
    clip: float = bounded(1.0, 0.0)  # of the gradient's norm
    batch: int = bounded(32, 1)
    length: int = bounded(128, 2)  # actions of a training segment
    steps: int = bounded(2000, 0)  # in the first round; 0: M keeps its random weights
    later_steps: int = bounded(500, 0)  # in each later one; 0: M stays as it is
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed"  # of the recurrent layer only


class Prediction(NamedTuple):
    """What M expects of the next step; log_pi [...,K,1] if joint, [...,K,Z] if factored."""

    log_pi: Tensor  # normalised over K
    mean: Tensor  # [...,K,Z]
    log_sigma: Tensor  # [...,K,Z]
    reward: Tensor | None  # [...]
    end_logit: Tensor | None  # [...], of the weighted loss


def mixture_nll(target: Tensor, log_pi: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """-log p(target) [...] of a mixture of K diagonal Gaussians, for target [...,Z].

    joint (log_pi [...,K,1]): -log sum_k pi_k prod_i N(z_i; mu_ki, sigma_ki)   (the lecture)
    factored (log_pi [...,K,Z]): -sum_i log sum_k pi_ki N(z_i; mu_ki, sigma_ki)  (original code)
    """
    error = (target[..., None, :] - mean) * (-log_sigma).exp()
    log_normal = -0.5 * error.square() - log_sigma - 0.5 * math.log(2 * math.pi)
    if log_pi.shape[-1] == 1:
        return -torch.logsumexp(log_pi[..., 0] + log_normal.sum(-1), dim=-1)
    return -torch.logsumexp(log_pi + log_normal, dim=-2).sum(-1)


def unpack_mixture(raw: Tensor, mixtures: int, latent: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [...,W+2KZ] -> logits [...,K,1 or Z], mean and log_sigma [...,K,Z]."""
    size = mixtures * latent
    parts = raw.split([raw.shape[-1] - 2 * size, size, size], dim=-1)
    logits, mean, log_sigma = (part.unflatten(-1, (mixtures, -1)) for part in parts)
    return logits, mean, log_sigma.clamp(*LOG_SIGMA_RANGE)


def sample_mixture(
    logits: Tensor,
    mean: Tensor,
    log_sigma: Tensor,
    temperature: Tensor | float,
    uniform: Tensor,
    normal: Tensor,
) -> Tensor:
    """A latent [N,Z] at a temperature: logits of pi over tau, variance times tau.

    Args:
        logits, mean, log_sigma: as in Prediction; logits may lack a constant.
        uniform: picks the component, [N,1] if joint, [N,Z] if factored, in [0,1).
        normal: standard normal [N,Z].
    """
    pi = ((logits - logits.amax(-2, keepdim=True)) / temperature).exp()
    left = uniform * pi.sum(-2)
    chosen_mean, chosen_sigma = mean[..., 0, :], log_sigma[..., 0, :]
    for k in range(1, pi.shape[-2]):  # a component is passed over while some of `left` is left
        left = left - pi[..., k - 1, :]
        chosen_mean = torch.where(left >= 0, mean[..., k, :], chosen_mean)
        chosen_sigma = torch.where(left >= 0, log_sigma[..., k, :], chosen_sigma)
    return chosen_mean + temperature**0.5 * chosen_sigma.exp() * normal


class MDNRNN(L.LightningModule):
    """M. One recurrent layer serves training (`advance`), life (`step`) and dreams (the engine).

    Tests hold the three to the same results.
    """

    step_unit = "batch"

    def __init__(self, config: MemoryConfig, latent: int, actions: int, seed: int = 0):
        super().__init__()
        self.config, self.latent, self.seed = config, latent, seed
        cell = {"lstm": nn.LSTM, "gru": nn.GRU}[config.cell]
        self.rnn = cell(latent + actions, config.hidden, batch_first=True)
        if config.cell == "lstm":  # its two biases are one: the paper's count has one
            nn.init.zeros_(self.rnn.bias_hh_l0).requires_grad_(False)
        self.weights_size = config.mixtures * (latent if config.mixture == "factored" else 1)
        self.mixture_size = config.mixtures * latent
        self.mixture_head = nn.Linear(config.hidden, self.weights_size + 2 * self.mixture_size)
        self.reward_head = nn.Linear(config.hidden, 1) if config.reward_head else None
        self.end_head = nn.Linear(config.hidden, 1) if config.end_head else None

    @property
    def uniform_size(self) -> int:
        """How many uniform numbers a sampled latent takes."""
        return self.latent if self.config.mixture == "factored" else 1

    def zero_state(self, batch: int) -> State:
        zeros = torch.zeros(1, batch, self.config.hidden, device=self.device)
        return (zeros, zeros) if self.config.cell == "lstm" else (zeros,)

    def told(self, action: Tensor) -> Tensor:
        """What M is told of an action [...,A]: the game moves only beyond a third of the axis."""
        return (action > MOVE).float() - (action < -MOVE).float() if self.config.moves else action

    def _inputs(self, latent: Tensor, action: Tensor) -> Tensor:
        return torch.cat([latent, self.told(action)], dim=-1)

    def advance(self, latent: Tensor, action: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Hidden outputs [B,T,H] and the state after T steps from latents and actions [B,T,.]."""
        packed = state if state is None or self.config.cell == "lstm" else state[0]
        output, packed = self.rnn(self._inputs(latent, action), packed)
        return output, packed if self.config.cell == "lstm" else (packed,)

    def step(self, latent: Tensor, action: Tensor, state: State) -> State:
        """The state after one step from latents and actions [B,.]: `advance`, without its set-up.

        For a few games at a time, where the recurrent layer's own preparations take most of it.
        """
        rnn, inputs = self.rnn, self._inputs(latent, action)
        weights = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0
        if self.config.cell == "gru":
            return (torch.gru_cell(inputs, state[0][0], *weights)[None],)
        hidden, cell = torch.lstm_cell(inputs, (state[0][0], state[1][0]), *weights)
        return hidden[None], cell[None]

    def warm_up(self, latent: Tensor, action: Tensor, lengths: Tensor) -> State:
        """The states after `lengths` [B] steps of padded latents and actions [B,T,.]."""
        packed = pack_padded_sequence(
            self._inputs(latent, action),
            lengths.clamp(min=1),
            batch_first=True,
            enforce_sorted=False,
        )
        _, state = self.rnn(packed)
        state = state if self.config.cell == "lstm" else (state,)
        return tuple(layer * (lengths > 0)[None, :, None] for layer in state)

    def predict(self, hidden: Tensor) -> Prediction:
        """The heads on hidden outputs [...,H]: in float32, whatever the recurrent layer runs in."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            raw = self.mixture_head(hidden)
            logits, mean, log_sigma = unpack_mixture(raw, self.config.mixtures, self.latent)
            return Prediction(
                logits.log_softmax(dim=-2),
                mean,
                log_sigma,
                None if self.reward_head is None else self.reward_head(hidden).squeeze(-1),
                None if self.end_head is None else self.end_head(hidden).squeeze(-1),
            )

    def forward(self, latent: Tensor, action: Tensor, state: State | None = None):
        """Predictions [B,T,...] for the next step of each of T steps, and the state after them.

        Args:
            latent, action: [B,T,Z] and [B,T,A].
            state: layers [1,B,H]; zeros if None.
        """
        hidden, state = self.advance(latent, action, state)
        return self.predict(hidden), state

    def loss(
        self, batch: dict[str, Tensor], noise: Tensor | None, steps: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Teacher-forced losses of a batch of segments (see data.Sequences), means over real steps.

        nll is per latent dimension.

        Args:
            noise: [B,T+1,Z] samples the latents from V's posterior; None takes the means.
            steps: to divide sums by, in place of the real steps of this batch: where it is the
                share of one rank, the ranks' mean number, so that their mean is the whole's.
        """
        latent = batch["mean"]
        if noise is not None:
            latent = latent + (batch["log_variance"] / 2).exp() * noise
        prediction, _ = self(latent[:, :-1], batch["action"])
        mask, end = batch["mask"], batch["end"]
        mean = partial(masked_mean, mask=mask, steps=mask.sum() if steps is None else steps)
        nll = mean(mixture_nll(latent[:, 1:], *prediction[:3])) / self.latent
        parts = {"nll": nll, "loss": nll}
        if prediction.reward is not None:
            error = (prediction.reward - batch["reward"]).square()
            parts["reward_mse"] = mean(error)
            parts["loss"] = parts["loss"] + self.config.reward_weight * parts["reward_mse"]
        if prediction.end_logit is not None:
            weight = torch.full_like(end, self.config.end_weight)
            entropy = F.binary_cross_entropy_with_logits(
                prediction.end_logit, end, reduction="none", pos_weight=weight
            )
            parts["end_loss"] = mean(entropy)
            parts["loss"] = parts["loss"] + parts["end_loss"]
            predicted = (prediction.end_logit > 0) * mask
            parts["end_predicted"], parts["end_real"] = predicted.sum(), (end * mask).sum()
            parts["end_hit"] = (predicted * end).sum()
        return parts

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        noise = None
        if self.config.latents == "sample":
            shape = batch["mean"].shape
            noise = step_noise(self.seed, self.global_step, shape, self.device)
        steps = summed(batch["mask"].sum()) / world_size()
        parts = self.loss(batch, noise, steps)
        shown = averaged({k: v for k, v in parts.items() if k in (*LOSSES, "loss")})
        self.log("memory/loss", shown.pop("loss"), prog_bar=True)
        self.log_dict({f"memory/{k}": v for k, v in shown.items()})
        return parts["loss"]

    def on_validation_epoch_start(self) -> None:
        self.end_counts = torch.zeros(3, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], number: int) -> None:
        """Of the means, also where M is trained on samples: less than the losses of these."""
        parts = self.loss(batch, None)
        losses = {f"memory/val_{k}": v for k, v in parts.items() if k in (*LOSSES, "loss")}
        self.log_dict(losses, batch_size=int(batch["mask"].sum()))
        if "end_hit" in parts:
            counts = [parts["end_hit"], parts["end_predicted"], parts["end_real"]]
            self.end_counts += torch.stack(counts)

    def on_validation_epoch_end(self) -> None:
        if self.config.end_head:
            hit, predicted, real = self.end_counts
            self.log("memory/end_precision", hit / predicted.clamp(min=1))
            self.log("memory/end_recall", hit / real.clamp(min=1))

    def configure_optimizers(self) -> Any:
        config = self.config
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, config.learning_rate)
        schedule = CosineAnnealingLR(optimizer, config.steps, config.final_learning_rate)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


LOSSES = ("nll", "reward_mse", "end_loss")


def masked_mean(values: Tensor, mask: Tensor, steps: Tensor) -> Tensor:
    """The mean of values [B,T] where mask [B,T] is 1, which is at so many steps."""
    return (values * mask).sum() / steps
