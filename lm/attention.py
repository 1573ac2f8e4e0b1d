"""Text to attention maps: what each head of each layer looks at, and measures of it.

Measures of a map leave out the first position, which can look at itself alone, and are means over the others; kinds of
heads are means over the repeated half of random tokens.

Shape suffixes: L layers, H heads, T query position, S key position; a star stands for any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lm.model import Decoder
from lm.vocab import Vocab

SETTLED = 0.01
"""Bits: maps that change less than this from epoch to epoch, on average over heads, have settled (`settled`)."""

_REPEATS, _LONGEST_REPEAT = 8, 64

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class AttentionMap:
    """Weights of one text: each row [S] sums to 1 and is 0 after its own position."""

    tokens: list[str]
    weights_LHTS: npt.NDArray[np.float32]


def attention_map(model: Decoder, vocab: Vocab, ids: Sequence[int]) -> AttentionMap:
    """Read `ids` (1 to `seq_len` of them) and return the weights [L, H, T, S] in fp32; dropout is off."""
    return AttentionMap(vocab.tokens(ids), _weights(model, torch.tensor([list(ids)]))[0])


def triangle(weights: Floats) -> Floats:
    """[*, T, T] to [*, T (T + 1) / 2]: the rows of the lower triangle, one after another."""
    rows, columns = np.tril_indices(weights.shape[-1])
    return np.ascontiguousarray(weights[..., rows, columns])  # safetensors would store another order as it lies


@torch.inference_mode()
def _weights(model: Decoder, ids_BT: torch.Tensor) -> npt.NDArray[np.float32]:
    was_training = model.training
    model.eval()
    _, layers = model(ids_BT.to(model.device), return_attention=True)
    model.train(was_training)
    return torch.stack(layers, dim=1).float().cpu().numpy()


def measures(weights: Floats) -> dict[str, Floats]:
    """What a map looks like, a number a head.

    Args:
        weights: [*, T, S] with T = S of at least 2.

    Returns:
        each [*]: `entropy`, bits; `entropy_share`, of the most that a causal row can have, log2 of its length;
        `distance`, mean tokens looked back; `self`, `previous` and `first`, the share of attention on the token itself,
        on the one before it and on the first of the text (Clark et al. 2019, section 3).
    """
    weights = weights.astype(np.float64)
    T = weights.shape[-1]
    rows = weights[..., 1:, :]
    position = np.arange(T)
    bits = _bits(rows).sum(-1).mean(-1)
    back = position[1:, None] - position
    return {
        "entropy": bits,
        "entropy_share": bits / np.log2(position[1:] + 1).mean(),
        "distance": (rows * back).sum((-1, -2)) / (T - 1),
        "self": np.diagonal(rows, 1, -2, -1).mean(-1),
        "previous": np.diagonal(rows, 0, -2, -1).mean(-1),
        "first": rows[..., 0].mean(-1),
    }


def divergence(a: Floats, b: Floats) -> Floats:
    """Jensen-Shannon divergence (Lin 1991) of the rows of two maps [*, T, S], in bits: 0 equal, 1 disjoint. [*]."""
    a, b = a[..., 1:, :].astype(np.float64), b[..., 1:, :].astype(np.float64)
    return (_bits((a + b) / 2) - (_bits(a) + _bits(b)) / 2).sum(-1).mean(-1).clip(0)


def _bits(weights: Floats) -> Floats:
    return -weights * np.log2(weights, out=np.zeros_like(weights), where=weights > 0)


def agreement(weights_LHTS: Floats) -> Floats:
    """How alike a head is to the others of its layer: 1 minus the mean divergence from them, [L, H]; H > 1."""
    L, H = weights_LHTS.shape[:2]
    apart_LHH = np.zeros((L, H, H))
    for i in range(H):
        for j in range(i):
            apart_LHH[:, i, j] = apart_LHH[:, j, i] = divergence(weights_LHTS[:, i], weights_LHTS[:, j])
    return 1 - apart_LHH.sum(-1) / (H - 1)


def head_kinds(model: Decoder, n_tokens: int, seed: int = 0) -> dict[str, Floats]:
    """How far each head does one of three known jobs, measured on random tokens that are then repeated once.

    Args:
        n_tokens: size of the vocabulary; token 0, the unknown one, is not drawn.
        seed: of the tokens.

    Returns:
        each [L, H], the share of attention from the second half on: `previous_token`, the token before (Clark et al.
        2019); `duplicate_token`, the same token's first place (Wang et al. 2022); `induction`, the token
        after that place (Olsson et al. 2022, prefix matching). Empty for a window below 6, where jobs coincide.
    """
    half = min(model.seq_len, _LONGEST_REPEAT) // 2
    if half < 3:
        return {}
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(n_tokens - 1, half, replace=n_tokens <= half) + 1 for _ in range(_REPEATS)])
    weights_LHTS = _weights(model, torch.from_numpy(np.concatenate([drawn, drawn], axis=1))).mean(0, dtype=np.float64)
    second_LHTS = weights_LHTS[..., half:, :]
    return {
        "previous_token": np.diagonal(second_LHTS, half - 1, -2, -1).mean(-1),
        "duplicate_token": np.diagonal(second_LHTS, 0, -2, -1).mean(-1),
        "induction": np.diagonal(second_LHTS, 1, -2, -1).mean(-1),
    }


def settled(changes: Sequence[float]) -> int | None:
    """The epoch after which attention no longer changes, or None.

    Args:
        changes: for epoch 1, 2, ...: the mean divergence of its maps from those of the epoch before.

    Returns:
        the first epoch whose successors, one at the least, all change the maps by less than `SETTLED`; 0 is the
        untrained network.
    """
    epoch = len(changes)
    while epoch > 0 and changes[epoch - 1] < SETTLED:
        epoch -= 1
    return epoch if epoch < len(changes) else None
