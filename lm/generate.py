"""Prompt ids to sampled ids, with a KV cache. Knows no corpora and no files.

Within the window a new token costs one position, whatever the length of the text. Past it the last `seq_len` tokens
are read again for each, since every position then moves. `<unk>` is never sampled.

Shape suffixes: B batch, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm.errors import UserError
from lm.model import Decoder, KVCache
from lm.runtime import autocast
from lm.vocab import Vocab


def for_generation(model: Decoder, precision: torch.dtype) -> Decoder:
    """A copy that generates in `precision`: its matrices are kept in it, rather than cast for each token.

    In bf16 a token takes a third of the time, since half as many bytes are read; sums, norms and embeddings stay fp32,
    as in training.
    """
    copied = copy.deepcopy(model).requires_grad_(False).eval()
    for module in copied.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.to(precision), requires_grad=False)
            module.bias = nn.Parameter(module.bias.to(precision), requires_grad=False)
    return copied


@torch.inference_mode()
def next_token_logits(model: Decoder, ids: list[list[int]], cache: KVCache | None) -> tuple[Tensor, KVCache | None]:
    """Logits [B, V] after texts of one length, and the cache to pass next time (None past the window)."""
    if len(ids[0]) > model.seq_len:
        cache = None
    elif cache is None:
        cache = model.new_cache(len(ids))
    start = -model.seq_len if cache is None else cache.length
    unseen_BT = torch.tensor([text[start:] for text in ids], device=model.device)
    with autocast(model.device, model.head.weight.dtype):
        logits_B1V, _ = model(unseen_BT, cache=cache, last=1)
    return logits_B1V[:, -1].float(), cache


@torch.inference_mode()
def sample(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, uniform_B: Tensor) -> Tensor:
    """Ids [B]; temperature 0 takes the likeliest, `top_k` 0 and `top_p` 1 cut nothing off.

    Nucleus sampling keeps the fewest likeliest tokens whose mass reaches `top_p` (Holtzman et al. 2020).

    Args:
        uniform_B: fp64 numbers from 0 up to 1: which share of the remaining mass lies before the token that is taken.

    Raises:
        UserError: logits that are not numbers.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        values_BK, kept_BK = logits_BV.topk(top_k)
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter(1, kept_BK, values_BK)
    probabilities_BV = logits_BV.softmax(-1)
    if top_p < 1:
        ordered_BV, order_BV = probabilities_BV.sort(descending=True)
        ordered_BV[ordered_BV.cumsum(-1) - ordered_BV >= top_p] = 0
        probabilities_BV = torch.zeros_like(probabilities_BV).scatter(1, order_BV, ordered_BV)
    mass_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    whole_B1 = mass_BV[:, -1:]
    if not whole_B1.isfinite().all():
        raise UserError("a model must give finite logits to generate: got nan. Try the checkpoint of an earlier epoch.")
    at_B1 = torch.minimum(uniform_B[:, None] * whole_B1, torch.nextafter(whole_B1, torch.zeros_like(whole_B1)))
    return torch.searchsorted(mass_BV, at_B1, right=True)[:, 0]


def check_sampling(temperature: float, top_k: int, top_p: float, max_length: int, seed: int | None) -> None:
    """Raise UserError for a sampling parameter outside its range."""
    rules = (
        (
            "temperature",
            temperature,
            temperature == 0 or 1e-3 <= temperature < 1e3,
            "be 0 (greedy) or 0.001 to 1000",
            0.8,
        ),
        ("top_k", top_k, top_k >= 0, "be 0 (off) or above", 0),
        ("top_p", top_p, 0 < top_p <= 1, "be above 0 and at most 1", 1.0),
        ("max_length", max_length, max_length >= 1, "be at least 1", 20),
        ("seed", seed, seed is None or 0 <= seed < 2**63, "be from 0 to 2**63 - 1", 0),
    )
    for name, value, holds, rule, remedy in rules:
        if not holds:
            raise UserError(f"{name} must {rule}: got {value}. Try {name}={remedy}.")


def encode_prompt(vocab: Vocab, text: str) -> list[int]:
    """Ids of a seed text.

    Raises:
        UserError: no token at all, or none that the vocabulary knows.
    """
    ids = vocab.encode(text)
    if not ids:
        raise UserError(f"the seed text must hold at least one token: got {text[:40]!r}. Try a word or two.")
    if all(i == vocab.unk_id for i in ids):
        raise UserError(
            f"the seed text must hold a word of the vocabulary: got {text[:40]!r}, all unknown. "
            "Try common lower-case words."
        )
    return ids


def generate_ids(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_length: int = 20,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    banned: int | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue several texts at once; each gets the tokens that it would get alone, but for the rounding of logits.

    Shorter prompts go on while longer ones are still read, a token at a time; a text that has its tokens costs no more.

    Args:
        prompts: of any lengths, each of at least one id; of one longer than the window the last `seq_len` count.
        seed: equal seeds give equal ids, to each text; None draws new ones.
        banned: an id never to draw.

    Yields:
        (text, id) as each is drawn, up to `max_length` ids a text.

    Raises:
        UserError: a parameter out of its range.
    """
    check_sampling(temperature, top_k, top_p, max_length, seed)
    was_training = model.training
    model.eval()
    try:
        generators = [torch.Generator() for _ in prompts]
        for generator in generators:
            generator.manual_seed(seed) if seed is not None else generator.seed()
        texts = [list(prompt[-model.seq_len :]) for prompt in prompts]
        ends = [len(text) + max_length for text in texts]
        active, cache = list(range(len(texts))), None
        n = min(map(len, texts), default=0)
        while active:
            logits_BV, cache = next_token_logits(model, [texts[i][:n] for i in active], cache)
            logits_BV = logits_BV.cpu()  # a device may lack fp64, which draws are made in
            if banned is not None:
                logits_BV = logits_BV.index_fill(1, torch.tensor([banned]), -torch.inf)
            rows = [row for row, i in enumerate(active) if len(texts[i]) == n]
            uniform = [torch.rand((), generator=generators[active[row]], dtype=torch.float64) for row in rows]
            if rows:
                drawn = sample(logits_BV[rows], temperature, top_k, top_p, torch.stack(uniform)).tolist()
                for row, new in zip(rows, drawn, strict=True):
                    texts[active[row]].append(new)
                    yield active[row], new
            going = [row for row, i in enumerate(active) if len(texts[i]) < ends[i]]
            if len(going) < len(active):
                active = [active[row] for row in going]
                cache = cache.of(going) if cache is not None else None
            n += 1
    finally:
        model.train(was_training)


def generate_texts(
    model: Decoder,
    vocab: Vocab,
    seed_texts: Sequence[str],
    max_length: int = 20,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> list[str]:
    """Continue each seed text by `max_length` tokens and return both as one text.

    Raises:
        UserError: a parameter out of range, or a seed text without a known word.
    """
    prompts = [encode_prompt(vocab, text) for text in seed_texts]
    if not prompts:
        return []
    texts = [list(prompt) for prompt in prompts]
    for i, new in generate_ids(model, prompts, max_length, temperature, top_k, top_p, seed, banned=vocab.unk_id):
        texts[i].append(new)
    return [vocab.decode(text) for text in texts]


def generate_text(model: Decoder, vocab: Vocab, seed_text: str, **sampling: Any) -> str:
    """`generate_texts` of one."""
    return generate_texts(model, vocab, [seed_text], **sampling)[0]
