"""One dreamt step of N dreams: two matrix products, and all that is between them in one kernel.

It gives what MDNRNN.advance, MDNRNN.predict and sample_mixture give (a test compares them), with
M's matrices joined beforehand. torch.compile fuses the rest where a C++ compiler is there.
N dreams, Z latent, A action, H hidden, K mixtures, W mixture weights: K if joint, KZ if factored.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wm.worldmodels.mdnrnn import MDNRNN, State, sample_mixture, unpack_mixture

PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


class Weights(NamedTuple):
    """M's weights, joined to one matrix before the gates and one after them."""

    gates: Tensor  # [4H,Z+A+H]
    gates_bias: Tensor  # [4H]
    heads: Tensor  # [W+2KZ+2,H]: the mixture, the reward, the end
    heads_bias: Tensor  # [W+2KZ+2]


class Noise(NamedTuple):
    """The random numbers of one step for E distinct seeds; dream n takes row index[n]."""

    uniform: Tensor  # [E,1] or [E,Z]: picks mixture components
    normal: Tensor  # [E,Z]
    bar: Tensor  # [E]: a dream ends where M's end logit is above it
    action: Tensor  # [E,A], standard normal


def join_weights(memory: MDNRNN, dtype: torch.dtype, survival: float = 1.0) -> Weights:
    """The weights of M for `dream_step`, in the type that its products run in.

    survival: a step's reward where M has no reward head (take-cover counts tics).
    """
    rnn = memory.rnn
    inputs, hidden = rnn.weight_ih_l0, rnn.weight_hh_l0
    bias = rnn.bias_ih_l0 + rnn.bias_hh_l0
    if memory.config.cell == "gru":  # its third gate keeps what inputs and hidden give apart
        H = memory.config.hidden
        inputs = F.pad(inputs, (0, 0, 0, H))
        hidden = torch.cat([hidden[: 2 * H], torch.zeros_like(hidden[:H]), hidden[2 * H :]])
        bias = torch.cat([bias[: 2 * H], rnn.bias_ih_l0[2 * H :], rnn.bias_hh_l0[2 * H :]])
    heads = [(memory.mixture_head.weight, memory.mixture_head.bias)]
    silent = bias.new_zeros(1, memory.config.hidden)
    for head, otherwise in ((memory.reward_head, survival), (memory.end_head, -torch.inf)):
        absent = silent, bias.new_tensor([otherwise])
        heads.append(absent if head is None else (head.weight, head.bias))
    matrices, biases = zip(*heads, strict=True)
    joined = torch.cat([inputs, hidden], dim=1), bias, torch.cat(matrices), torch.cat(biases)
    gates, gates_bias, head, head_bias = (tensor.detach() for tensor in joined)
    return Weights(gates.to(dtype), gates_bias, head.to(dtype), head_bias)


def dream_step(
    weights: Weights,
    mixtures: int,
    features: Callable[[Tensor, State], Tensor],
    temperature: Tensor,
    latent: Tensor,
    action: Tensor,
    state: State,
    noise: Noise,
    index: Tensor,
) -> tuple[Tensor, State, Tensor, Tensor, Tensor]:
    """The next latent [N,Z], M's next state, the features [N,F], reward and end logit [N].

    Args:
        features: what C sees (see latent.FEATURES).
        temperature: a scalar tensor.
        latent, action, state: [N,Z], [N,A] and layers [1,N,H].
        noise, index: see Noise.
    """
    dtype = weights.gates.dtype
    inputs = torch.cat([latent, action, state[0][0]], dim=1).to(dtype)
    gates = F.linear(inputs, weights.gates) + weights.gates_bias  # outside the product it is free
    state = (lstm if len(state) == 2 else gru)(gates, state)
    raw = F.linear(state[0][0].to(dtype), weights.heads) + weights.heads_bias
    mixture = unpack_mixture(raw[:, :-2], mixtures, latent.shape[1])
    latent = sample_mixture(*mixture, temperature, noise.uniform[index], noise.normal[index])
    return latent, state, features(latent, state), raw[:, -2], raw[:, -1]


def lstm(gates: Tensor, state: State) -> State:
    """The next (h, c) from gates [N,4H] in PyTorch's order: input, forget, cell, output."""
    enter, keep, new, show = gates.chunk(4, dim=1)
    cell = keep.sigmoid() * state[1][0] + enter.sigmoid() * tanh(new)
    return (show.sigmoid() * tanh(cell))[None], cell[None]


def gru(gates: Tensor, state: State) -> State:
    """The next (h,) from gates [N,4H]: reset, update, new from inputs, new from hidden."""
    reset, keep, new, recalled = gates.chunk(4, dim=1)
    candidate = tanh(new + reset.sigmoid() * recalled)
    return ((candidate + keep.sigmoid() * (state[0][0] - candidate))[None],)


def tanh(x: Tensor) -> Tensor:
    """As torch.tanh to 1e-7; compiled, it takes half the time."""
    return 2 * (2 * x).sigmoid() - 1


@cache
def fused_step() -> Callable[..., Any]:
    """`dream_step`, compiled for one core if that is possible here."""
    fused = torch.compile(dream_step, options={"cpp.threads": 1})
    broken = []

    def step(*arguments: Any) -> Any:
        if not broken:
            try:
                return fused(*arguments)
            except torch._dynamo.exc.BackendCompilerFailed as failure:
                broken.append(failure)
                why = str(failure).splitlines()[0]
                warnings.warn(f"dreams are not compiled, which is slower: {why}", stacklevel=2)
        return dream_step(*arguments)

    return step
