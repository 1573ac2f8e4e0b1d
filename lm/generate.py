"""Prompt ids to sampled ids, with a KV cache. Knows no corpora and no files.

Within the window each new token costs one position; past it the last `seq_len` tokens are read again for each
token, since every position then moves. `<unk>` is never sampled.

Shape suffixes: B batch, T query position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lm.errors import UserError
from lm.model import Decoder, KVCache
from lm.vocab import Vocab


@torch.inference_mode()
def next_token_logits(model: Decoder, ids: list[int], cache: KVCache | None) -> tuple[Tensor, KVCache | None]:
    """Logits [V] after `ids`, and the cache to pass next time (None past the window)."""
    if len(ids) > model.seq_len:
        cache = None
    elif cache is None:
        cache = model.new_cache(1)
    unseen = ids[-model.seq_len :] if cache is None else ids[cache.length :]
    logits_BTV, _ = model(torch.tensor([unseen], device=model.device), cache=cache)
    return logits_BTV[0, -1].float(), cache


def sample(logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Draw one id; temperature 0 takes the likeliest, `top_k` 0 and `top_p` 1 cut nothing off.

    Nucleus sampling keeps the fewest likeliest tokens whose mass reaches `top_p` (Holtzman et al. 2020).
    """
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / temperature
    if 0 < top_k < logits_V.numel():
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    probabilities_V = logits_V.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities_V.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities_V = torch.zeros_like(probabilities_V).scatter(0, order, ordered)
    return int(torch.multinomial(probabilities_V.cpu(), 1, generator=generator))


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
    prompt: list[int],
    max_length: int = 20,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    banned: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_length` new ids, each as it is drawn.

    Args:
        prompt: at least one id; of a longer one the last `seq_len` count.
        seed: equal seeds give equal ids; None draws a new seed.
        banned: an id never to draw.
    """
    check_sampling(temperature, top_k, top_p, max_length, seed)
    was_training = model.training
    model.eval()
    try:
        generator = torch.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        ids = prompt[-model.seq_len :]
        cache: KVCache | None = None
        for _ in range(max_length):
            logits_V, cache = next_token_logits(model, ids, cache)
            if banned is not None:
                logits_V = logits_V.index_fill(0, torch.tensor([banned], device=logits_V.device), -torch.inf)
            ids.append(sample(logits_V, temperature, top_k, top_p, generator))
            yield ids[-1]
    finally:
        model.train(was_training)


def generate_text(
    model: Decoder,
    vocab: Vocab,
    seed_text: str,
    max_length: int = 20,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> str:
    """Continue `seed_text` by `max_length` tokens and return both as one text.

    Raises:
        UserError: a parameter out of range, or a seed text without a known word.
    """
    prompt = encode_prompt(vocab, seed_text)
    new = list(generate_ids(model, prompt, max_length, temperature, top_k, top_p, seed, banned=vocab.unk_id))
    return vocab.decode(prompt + new)
