"""Checks that a perplexity can be trusted, made on every run: what the model sees, and what it is measured on.

Each check returns its findings in words; none is good news. Knows neither files nor the training loop.

Shape suffixes: B batch, T query position, D model width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lm.data import Windows
from lm.errors import LeakError
from lm.model import Decoder
from lm.runtime import autocast

_BATCH, _POSITIONS = 2, 2

Path = Callable[[Decoder, Tensor], Tensor]


def _training(model: Decoder, ids_BT: Tensor) -> Tensor:
    torch.manual_seed(0)  # equal dropout in each pass
    return model.train()(ids_BT)[0]


def _evaluation(model: Decoder, ids_BT: Tensor) -> Tensor:
    return model.eval()(ids_BT, last=ids_BT.shape[1])[0]


def _attention(model: Decoder, ids_BT: Tensor) -> Tensor:
    return model.eval()(ids_BT, return_attention=True)[0]


def _cached(model: Decoder, ids_BT: Tensor) -> Tensor:
    cache, half = model.eval().new_cache(len(ids_BT)), ids_BT.shape[1] // 2
    with torch.no_grad():  # a second write into the cache would break the gradients of the first
        first_BTV, _ = model(ids_BT[:, :half], cache=cache)
    rest_BTV, _ = model(ids_BT[:, half:], cache=cache)
    return torch.cat([first_BTV, rest_BTV], dim=1)


PATHS: dict[str, Path] = {
    "training": _training,
    "evaluation": _evaluation,
    "attention": _attention,
    "cached generation": _cached,
}
"""The ways in which logits are made: learning with dropout, measuring, with weights returned, and with a cache."""


def causality(
    model: Decoder,
    vocab_size: int,
    precision: torch.dtype = torch.float32,
    seed: int = 0,
    paths: Mapping[str, Path] = PATHS,
) -> list[str]:
    """Whether logits at a position depend on later tokens, or on another text of the batch, on each path.

    Two tests at random positions of the first text, both exact: the gradient of its logits with respect to all those
    embeddings is zero, and other tokens there leave the logits equal to the bit. Weights, gradients, mode and random
    state stay as they were.

    Args:
        vocab_size: tokens are drawn below it.
        precision: of the matrix products, as in training.
        seed: of tokens and positions.
        paths: the ways to make logits that are looked at.

    Returns:
        one finding for each path that leaks.
    """
    T = model.seq_len
    if T < 2:
        return []
    rng = np.random.default_rng(seed)
    positions = sorted({*(int(t) for t in rng.integers(0, T - 1, _POSITIONS)), T - 2})
    ids_BT, others_BT = (torch.from_numpy(rng.integers(0, vocab_size, (_BATCH, T))).to(model.device) for _ in range(2))
    others_BT = torch.where(others_BT == ids_BT, (others_BT + 1) % vocab_size, others_BT)
    findings: list[str] = []
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for name, path in paths.items():
            with autocast(model.device, precision):
                leak = _gradient_leak(model, ids_BT, path, positions) or _token_leak(
                    model, ids_BT, others_BT, path, positions
                )
            if leak:
                findings.append(f"{name} path: {leak}")
    model.train(was_training)
    return findings


def _gradient_leak(model: Decoder, ids_BT: Tensor, path: Path, positions: Sequence[int]) -> str:
    embedded: list[Tensor] = []

    def cut(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_(torch.is_grad_enabled())
        embedded.append(leaf)
        return leaf

    hook = model.embedding.register_forward_hook(cut)
    try:
        logits_BTV = path(model, ids_BT)
    finally:
        hook.remove()
    start = sum(part.shape[1] for part in embedded[:-1])  # the last part has gradients
    weights_V = torch.randn(logits_BTV.shape[-1], device=logits_BTV.device)
    for t in positions:
        if t < start:
            continue
        seen = (logits_BTV[0, t].float() * weights_V).sum()
        (gradient_BTD,) = torch.autograd.grad(seen, embedded[-1], retain_graph=True)
        reached_BT = (gradient_BTD != 0).any(dim=-1)  # NaN too
        if bool(reached_BT[1:].any()):
            return f"the logits at position {t} have a gradient with respect to another text of the batch"
        if bool(reached_BT[0, t - start + 1 :].any()):
            at = t + 1 + int(reached_BT[0, t - start + 1 :].int().argmax())
            return f"the logits at position {t} have a gradient with respect to the token at {at}"
    return ""


@torch.no_grad()
def _token_leak(model: Decoder, ids_BT: Tensor, others_BT: Tensor, path: Path, positions: Sequence[int]) -> str:
    before_BTV = path(model, ids_BT)
    for t in positions:
        changed_BT = others_BT.clone()
        changed_BT[0, : t + 1] = ids_BT[0, : t + 1]
        if not torch.equal(path(model, changed_BT)[0, : t + 1], before_BTV[0, : t + 1]):
            return f"other tokens after position {t}, or in another text of the batch, change the logits up to it"
    return ""


def alignment(windows: Windows, what: str) -> list[str]:
    """Whether each target is the token after its input.

    Looked at are the first batch of a training pass, and of consecutive windows every token of an evaluation pass: the
    targets must be the text without its first token, each once and in order.
    """
    for inputs_BT, targets_BT in itertools.islice(windows.shuffled(_BATCH, 0), 1):
        if not torch.equal(inputs_BT[:, 1:], targets_BT[:, :-1]):
            return [f"{what} windows: a target is not the token after its input"]
    if windows.starts is None:
        done = 0
        for inputs_BT, targets_BT in windows.in_order(4096):
            n = targets_BT.numel()
            text_N = windows.ids[done : done + n + 1]
            if not (
                np.array_equal(inputs_BT.flatten().numpy(), text_N[:-1])
                and np.array_equal(targets_BT.flatten().numpy(), text_N[1:])
            ):
                break
            done += n
        if done != len(windows.ids) - 1:
            return [f"{what} windows: the targets of a pass are not the text, each token once"]
    return []


def separation(train: Windows, validation: Windows) -> list[str]:
    """Whether windows that were cut from one array of ids share text.

    Splits of a tokenized corpus are arrays of their own and pass by construction; windows dealt from one text do not.
    """
    if not np.may_share_memory(train.ids, validation.ids):
        return []
    if validation.starts is None:
        targets = np.arange(1, len(validation.ids))
    else:
        targets = (validation.starts[:, None] + 1 + np.arange(validation.seq_len)).ravel()
    trained_on = int(train.covered()[targets].sum())
    if not trained_on:
        return []
    share = trained_on / len(targets)
    return [f"validation windows: {share:.1%} of {len(targets):,} targets stand in training windows too"]


def require(findings: Sequence[str]) -> None:
    """Raise LeakError if there are findings."""
    if findings:
        raise LeakError(
            f"a model must be measured on what it has not seen: got {'; '.join(findings)}. "
            "Try mending the model, or --allow-leak, which marks the run and its figures as leaking."
        )
