"""Prompt ids to sampled ids, with a KV cache. Knows no corpora and no files.

Within the window a new token costs one position, whatever the length of the text. Past it the last `seq_len` tokens
are read again for each, since every position then moves. `<unk>` is never sampled.

Shape suffixes: B batch, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lm.errors import DivergedError, UserError
from lm.loss import token_nats
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


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's distribution; the defaults but for the temperature cut nothing off.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: as many likeliest tokens are kept; 0 keeps all.
        top_p: the fewest likeliest tokens whose mass reaches it are kept (Holtzman et al. 2020).
        min_p: tokens are kept that are at least so many times as likely as the likeliest (Nguyen et al. 2024).
        repetition_penalty: logits of tokens that stand in the text, or in the window's part of it, are divided by it
            where positive and multiplied where negative (Keskar et al. 2019); 1 changes nothing.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        temperature, penalty = self.temperature, self.repetition_penalty
        hot = temperature == 0 or 1e-3 <= temperature < 1e3
        _require("temperature", temperature, hot, "be 0 (greedy) or 0.001 to 1000", 0.8)
        _require("top_k", self.top_k, self.top_k >= 0, "be 0 (off) or above", 0)
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "be above 0 and at most 1", 1.0)
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "be from 0 (off) to 1", 0.0)
        _require("repetition_penalty", penalty, 0.1 <= penalty <= 10, "be from 0.1 to 10 (1 is off)", 1.0)


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and how.

    Attributes:
        ids: at least one; of more than the window holds the last `seq_len` count.
        max_length: new tokens at the most.
        seed: equal seeds give equal ids; None draws a new one.
    """

    ids: Sequence[int]
    max_length: int = 20
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None

    def __post_init__(self) -> None:
        _require("max_length", self.max_length, self.max_length >= 1, "be at least 1", 20)
        seed = self.seed
        _require("seed", seed, seed is None or 0 <= seed < 2**63, "be from 0 to 2**63 - 1", 0)


class Token(NamedTuple):
    """A token as it is drawn: of which text, and its log-probability under the model itself (nats, before sampling)."""

    text: int
    id: int
    log_p: float


def _require(name: str, value: object, holds: bool, rule: str, remedy: object) -> None:
    if not holds:
        raise UserError(f"{name} must {rule}: got {value}. Try {name}={remedy}.")


@torch.inference_mode()
def sample(logits_BV: Tensor, how: Sampling, uniform_B: Tensor) -> Tensor:
    """Ids [B].

    Args:
        logits_BV: after any repetition penalty.
        uniform_B: fp64 numbers from 0 up to 1: which share of the remaining mass lies before the token that is taken.

    Raises:
        DivergedError: logits that are not numbers.
    """
    if how.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / how.temperature
    if 0 < how.top_k < logits_BV.shape[-1]:
        values_BK, kept_BK = logits_BV.topk(how.top_k)
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter(1, kept_BK, values_BK)
    probabilities_BV = logits_BV.softmax(-1)
    if how.min_p > 0:
        least_B1 = how.min_p * probabilities_BV.amax(-1, keepdim=True)
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < least_B1, 0)
    if how.top_p < 1:
        ordered_BV, order_BV = probabilities_BV.sort(descending=True)
        cut_BV = ordered_BV.cumsum(-1) - ordered_BV >= how.top_p
        cut_BV[:, 0] = False
        ordered_BV[cut_BV] = 0
        probabilities_BV = torch.zeros_like(probabilities_BV).scatter(1, order_BV, ordered_BV)
    mass_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    whole_B1 = mass_BV[:, -1:]
    if not whole_B1.isfinite().all():
        raise DivergedError("a model must give finite logits: got nan. Try the checkpoint of an earlier epoch.")
    at_B1 = torch.minimum(uniform_B[:, None] * whole_B1, torch.nextafter(whole_B1, torch.zeros_like(whole_B1)))
    return torch.searchsorted(mass_BV, at_B1, right=True)[:, 0]


@torch.inference_mode()
def _draw(
    logits_BV: Tensor, texts: Sequence[Sequence[int]], prompts: Sequence[Prompt], uniform: list[Tensor]
) -> Tensor:
    """Ids [B] and log-probabilities, stacked as fp64 [2, B]: each text by its own prompt's sampling."""
    own_BV, drawn_B = logits_BV.clone(), torch.zeros(len(texts), dtype=torch.int64)
    alike: dict[Sampling, list[int]] = {}
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        alike.setdefault(prompt.sampling, []).append(row)
        penalty = prompt.sampling.repetition_penalty
        if penalty != 1:
            seen = torch.tensor(sorted(set(text)))
            values = own_BV[row, seen]
            own_BV[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
    for how, rows in alike.items():
        drawn_B[rows] = sample(own_BV[rows], how, torch.stack([uniform[row] for row in rows]))
    log_p_B = logits_BV.gather(1, drawn_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
    return torch.stack([drawn_B.double(), log_p_B.double()])


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
    prompts: Sequence[Prompt],
    banned: int | None = None,
    ended: Container[int] = (),
    generators: Sequence[torch.Generator] | None = None,
) -> Iterator[Token]:
    """Continue several texts at once; each gets the tokens that it would get alone, but for the rounding of logits.

    Texts of like length share a batch: shorter ones go on while longer ones are still read, a token at a time, which is
    never longer than the new tokens take. A text that has its tokens costs no more.

    Args:
        banned: an id never to draw.
        ended: texts that shall get no more, by number; looked at after each position.
        generators: one for each text, in place of its seed: they go on where they stand.

    Yields:
        each token as it is drawn.
    """
    if generators is None:
        generators = [new_generator(prompt.seed) for prompt in prompts]
    was_training = model.training
    model.eval()
    try:
        for group in _of_like_length(prompts, model.seq_len):
            yield from _generate(model, prompts, group, banned, ended, generators)
    finally:
        model.train(was_training)


def new_generator(seed: int | None) -> torch.Generator:
    """A generator of its own for a text; None seeds it anew."""
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    return generator


def _of_like_length(prompts: Sequence[Prompt], seq_len: int) -> list[list[int]]:
    groups: list[list[int]] = []
    lengths = [min(len(prompt.ids), seq_len) for prompt in prompts]
    for i in sorted(range(len(prompts)), key=lengths.__getitem__):
        if groups and lengths[i] - lengths[groups[-1][0]] <= max(8, prompts[i].max_length):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _generate(
    model: Decoder,
    prompts: Sequence[Prompt],
    group: list[int],
    banned: int | None,
    ended: Container[int],
    generators: Sequence[torch.Generator],
) -> Iterator[Token]:
    """`generate_ids` for some of the prompts, by number."""
    texts = {i: list(prompts[i].ids[-model.seq_len :]) for i in group}
    ends = {i: len(texts[i]) + prompts[i].max_length for i in group}
    active, cache = [i for i in group if i not in ended], None
    n = min(map(len, texts.values()))
    while active:
        logits_BV, cache = next_token_logits(model, [texts[i][:n] for i in active], cache)
        logits_BV = logits_BV.cpu()  # a device may lack fp64, which draws are made in
        if banned is not None:
            logits_BV = logits_BV.index_fill(1, torch.tensor([banned]), -torch.inf)
        rows = [row for row, i in enumerate(active) if len(texts[i]) == n]
        if rows:
            drawing = [active[row] for row in rows]
            uniform = [torch.rand((), generator=generators[i], dtype=torch.float64) for i in drawing]
            windows = [texts[i][-model.seq_len :] for i in drawing]
            ids, log_ps = _draw(logits_BV[rows], windows, [prompts[i] for i in drawing], uniform).tolist()
            for i, new, log_p in zip(drawing, ids, log_ps, strict=True):
                texts[i].append(int(new))
                yield Token(i, int(new), log_p)
        going = [row for row, i in enumerate(active) if len(texts[i]) < ends[i] and i not in ended]
        if len(going) < len(active):
            active = [active[row] for row in going]
            cache = cache.of(going) if cache is not None else None
        n += 1


@torch.inference_mode()
def perplexity(model: Decoder, ids: Sequence[int]) -> float | None:
    """Of a text of at least two tokens, at the most the window's last; None of one."""
    ids = ids[-model.seq_len - 1 :]
    if len(ids) < 2:
        return None
    with autocast(model.device, model.head.weight.dtype):
        logits_BTV, _ = model(torch.tensor([ids[:-1]], device=model.device))
    return math.exp(token_nats(logits_BTV, torch.tensor([ids[1:]], device=model.device)).mean().item())


def generate_texts(
    model: Decoder,
    vocab: Vocab,
    seed_texts: Sequence[str],
    max_length: int = 20,
    seed: int | None = None,
    **sampling: Any,
) -> list[str]:
    """Continue each seed text by `max_length` tokens and return both as one text.

    Args:
        sampling: fields of `Sampling`.

    Raises:
        UserError: a parameter out of range, or a seed text without a known word.
    """
    how = Sampling(**sampling)
    prompts = [Prompt(encode_prompt(vocab, text), max_length, how, seed) for text in seed_texts]
    texts = [list(prompt.ids) for prompt in prompts]
    for token in generate_ids(model, prompts, banned=vocab.unk_id):
        texts[token.text].append(token.id)
    return [vocab.decode(text) for text in texts]


def generate_text(
    model: Decoder, vocab: Vocab, seed_text: str, max_length: int = 20, seed: int | None = None, **sampling: Any
) -> str:
    """`generate_texts` of one."""
    return generate_texts(model, vocab, [seed_text], max_length, seed, **sampling)[0]
