"""What V and M show: reconstructions, traversals, futures, open-loop error, real beside dream."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wm import figures
from wm.data import Latents
from wm.episodes import Episode, EpisodeStore
from wm.worldmodels.controller import ControllerConfig
from wm.worldmodels.dream import DreamEnv, Starts
from wm.worldmodels.mdnrnn import MDNRNN
from wm.worldmodels.vae import ConvVAE, encode_frames, to_frames

WARM_UP = 10  # real steps M sees before it is left alone
FUTURES = 5
SHOWN, STRIDE = 9, 5  # frames of a filmstrip, actions from one to the next
AHEAD = 12  # actions of each future
TEMPERATURES = (0.1, 0.5, 1.0, 1.3)  # of M's dreams whose error is drawn
TRAVERSED = 6  # latents shown, the most active first


@torch.inference_mode()
def decode(vision: ConvVAE, latents: Tensor | np.ndarray) -> np.ndarray:
    """Latents [N,Z] to frames uint8 [N,64,64,3]."""
    return to_frames(vision.decode(torch.as_tensor(latents)))


def reconstructions(vision: ConvVAE, frames: np.ndarray, path: Path) -> Path:
    """Frames [N,64,64,3] above what V makes of them."""
    rows = {"original": frames, "reconstruction": decode(vision, encode_frames(vision, frames)[0])}
    return figures.save(figures.frame_rows(rows), path)


def traversals(vision: ConvVAE, means: np.ndarray, path: Path) -> Path:
    """One latent a row, moved across the range it takes in real frames; means [N,Z]."""
    base, spread = means[len(means) // 2], means.std(0)
    rows, offsets = {}, np.linspace(-2, 2, 7)
    for latent in np.argsort(-spread)[:TRAVERSED]:
        moved = np.tile(base, (len(offsets), 1))
        moved[:, latent] = means[:, latent].mean() + offsets * spread[latent]
        rows[f"z{latent}"] = decode(vision, moved)
    return figures.save(figures.frame_rows(rows, [f"{offset:+.1f} σ" for offset in offsets]), path)


@torch.inference_mode()
def warm_start(memory: MDNRNN, latents: Tensor, actions: Tensor) -> Starts:
    """Starts after T real steps, from latents [B,T+1,Z] and actions [B,T,A]."""
    _, state = memory.advance(latents[:, :-1], actions, memory.zero_state(len(latents)))
    return Starts.of(latents[:, -1], state)


@torch.inference_mode()
def dream_along(
    memory: MDNRNN, starts: Starts, actions: Tensor, game: str, temperature: float
) -> Tensor:
    """Latents [B,T,Z] of dreams from B starts that get the given actions [B,T,A]."""
    batch, horizon = actions.shape[:2]
    settings = ControllerConfig("z", temperature=temperature, horizon=horizon, end="never")
    dreams = DreamEnv(memory, starts, settings, game, batch)
    dreams.reset(seed=0, options={"start": torch.arange(batch)})
    return torch.stack([dreams.step(actions[:, t])[0] for t in range(horizon)], dim=1)


def futures(
    vision: ConvVAE, memory: MDNRNN, episode: Episode, latents: np.ndarray, game: str, path: Path
) -> Path:
    """What came after the moment where ways part, and five dreams of it with the same actions."""
    means, actions = torch.from_numpy(latents), torch.from_numpy(episode.actions)
    ahead = min(AHEAD, len(actions))
    now = parting(latents, ahead)
    rows = {"real": episode.frames[now + np.arange(ahead + 1)]}
    dreams = dream_on(memory, means, actions[: now + ahead], now, game)
    for number, dream in enumerate(dreams, start=1):
        rows[f"dream {number}"] = decode(vision, torch.cat([means[now][None], dream]))
    titles = [f"+{step}" for step in range(ahead + 1)]
    return figures.save(figures.frame_rows(rows, titles), path)


def parting(latents: np.ndarray, ahead: int) -> int:
    """The moment of an episode with latents [T+1,Z] after which so many steps change most.

    A fireball is about to be thrown there, or a bend about to come. It is the same for every M
    that sees through one V, so that their dreams can be compared.
    """
    last = len(latents) - 1 - ahead
    first = min(WARM_UP, last)
    change = np.square(latents[first + ahead :] - latents[first : last + 1]).sum(-1)
    return first + int(change.argmax())


@torch.inference_mode()
def dream_on(memory: MDNRNN, means: Tensor, actions: Tensor, now: int, game: str) -> Tensor:
    """Dreams [FUTURES,T-now,Z] from a moment of an episode with latents [>=T,Z], actions [T,A]."""
    state = memory.warm_up(means[None, : len(actions)], actions[None], torch.tensor([now]))
    one = Starts.of(means[now][None], state)
    copies = Starts(*(part.repeat_interleave(FUTURES, 0) for part in one))
    along = actions[now:].expand(FUTURES, -1, -1)
    return dream_along(memory, copies, along, game, temperature=1.0)


def liveliest_step(latents: np.ndarray) -> int:
    """The step of an episode whose latents [T+1,Z] change most: the future is least certain."""
    change = np.square(np.diff(latents, axis=0)).sum(-1)
    first = min(WARM_UP, len(change) - 1)
    return first + int(change[first:].argmax())


def prediction_error(
    memory: MDNRNN,
    store: EpisodeStore,
    latents: Latents,
    episodes: np.ndarray,
    game: str,
    horizon: int,
) -> dict[str, np.ndarray]:
    """Root mean squared error of latents [horizon], of a frozen picture and of M left alone.

    Over up to 64 episodes of at least WARM_UP + horizon steps; empty when there is none.
    """
    long_enough = [e for e in episodes if store.steps[e] >= WARM_UP + horizon][:64]
    if not long_enough:
        return {}
    first = store.first_frame[long_enough]
    rows = first[:, None] + np.arange(WARM_UP + horizon + 1)
    real = torch.from_numpy(np.asarray(latents.mean)[rows])
    actions = np.stack([store[e].actions[: WARM_UP + horizon] for e in long_enough])
    actions = torch.from_numpy(actions)
    starts = warm_start(memory, real[:, : WARM_UP + 1], actions[:, :WARM_UP])
    truth = real[:, WARM_UP + 1 :]
    errors = {"nothing changes": _rmse(real[:, WARM_UP : WARM_UP + 1] - truth)}
    for temperature in TEMPERATURES:
        dreamt = dream_along(memory, starts, actions[:, WARM_UP:], game, temperature)
        errors[left_alone(temperature)] = _rmse(dreamt - truth)
    return errors


def left_alone(temperature: float) -> str:
    return f"M, left alone, τ = {temperature}"


def _rmse(error: Tensor) -> np.ndarray:
    return error.square().mean(dim=(0, 2)).sqrt().numpy()


def prediction_error_curve(errors: dict[str, np.ndarray], path: Path) -> Path:
    lines = {name: (np.arange(1, len(error) + 1), error) for name, error in errors.items()}
    return figures.save(figures.curves(lines, "steps ahead", "error of a latent (RMSE)"), path)


def filmstrip(
    vision: ConvVAE,
    memory: MDNRNN,
    episode: Episode,
    game: str,
    temperature: float,
    path: Path,
) -> Path:
    """Real frames, their reconstructions, and the dream from the same frame and actions."""
    means = torch.from_numpy(encode_frames(vision, episode.frames)[0])
    actions = torch.from_numpy(episode.actions)
    steps, length = len(actions), SHOWN * STRIDE
    first = int(np.clip(liveliest_step(means.numpy()) - length // 2, 1, max(steps - length, 1)))
    starts = warm_start(memory, means[None, : first + 1], actions[None, :first])
    dreamt = dream_along(memory, starts, actions[None, first:], game, temperature)[0]
    shown = np.arange(first, min(first + length, steps), STRIDE)
    latents = torch.cat([means[first][None], dreamt])
    rows = {
        "real": list(episode.frames[shown]),
        "seen by V": list(decode(vision, means[shown])),
        "dreamt by M": list(decode(vision, latents[shown - first])),
    }
    return figures.save(figures.frame_rows(rows, [f"+{step - first}" for step in shown]), path)


def side_by_side(vision: ConvVAE, episode: Episode) -> np.ndarray:
    """The episode beside V's reconstruction: frames [T+1,64,128,3]."""
    frames = np.asarray(episode.frames)
    cuts = range(256, len(frames), 256)
    seen = [decode(vision, encode_frames(vision, part)[0]) for part in np.split(frames, list(cuts))]
    return np.concatenate([frames, np.concatenate(seen)], axis=2)


def reconstruction_error(vision: ConvVAE, episodes: Sequence[Episode]) -> float:
    """Mean squared error of V's pictures of all frames, of pixel values in [0,1]."""
    errors = []
    for episode in episodes:
        real, seen = np.split(side_by_side(vision, episode) / np.float32(255), 2, axis=2)
        errors.append(np.square(real - seen).mean((1, 2, 3)))
    return float(np.concatenate(errors).mean())
