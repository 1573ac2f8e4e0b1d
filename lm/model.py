"""The whole decoder in one file; it needs nothing but torch, and fits in a notebook.

Each layer is `torch.nn.TransformerEncoderLayer` with a causal mask: a language model has no memory to attend to.

Shape suffixes: B batch, T query position, S key position, D model width, H heads, K head width,
F feed-forward width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

if TYPE_CHECKING:
    from lm.config import ModelConfig

_TIED_STD = 0.02
_ODD = (-7046029254386353131, -49064778989728563, -4265267296055464877)  # any with as many ones as zeros
_SITES = 4  # of dropout, in a layer


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, preallocated to the window.

    `keys` and `values` are one [B, H, seq_len, K] a layer; the first `length` positions are filled.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    def of(self, rows: list[int]) -> KVCache:
        """The cache of some of the texts."""
        return KVCache([keys[rows] for keys in self.keys], [values[rows] for values in self.values], self.length)


def sinusoidal_positions(seq_len: int, d_model: int) -> Tensor:
    """[seq_len, d_model]: sin and cos interleaved (Vaswani et al. 2017, section 3.5)."""
    position = torch.arange(seq_len, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float32) * (-math.log(10000.0) / d_model))
    table = torch.empty(seq_len, d_model)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)
    return table


def rotary_angles(seq_len: int, head_dim: int) -> Tensor:
    """[2, seq_len, head_dim / 2]: cosines and sines of the angles by which positions turn (Su et al. 2021, eq. 15)."""
    position = torch.arange(seq_len, dtype=torch.float32)[:, None]
    angles = position * torch.exp(torch.arange(0, head_dim, 2, dtype=torch.float32) * (-math.log(10000.0) / head_dim))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x_BHTK: Tensor, angles_2TK: Tensor) -> Tensor:
    """Turn each pair of channels by its position's angle; pairs are a channel and the one half the width on."""
    cos, sin = angles_2TK.to(x_BHTK.dtype)
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass(frozen=True)
class Noise:
    """What dropout draws from in one pass: a draw follows from seed, site, window and place in it alone.

    So the windows of a batch may be computed in any parts, by any number of processes, and are dropped alike
    (counter-based random numbers: Salmon et al. 2011).

    `first` is the place in the whole batch of the window that stands first here.
    """

    seed: int
    first: int = 0

    @classmethod
    def drawn(cls) -> Noise:
        """A seed from torch's own generator."""
        return cls(int(torch.randint(2**62, ()).item()))

    def draws(self, site: int, start: int, n: int) -> Tensor:
        """[n] int64, equally likely bits: draws number `start` and on of a site."""
        key = self.seed
        for odd in (site, *_ODD):
            key = (key ^ key >> 32) * _ODD[0] + odd & 2**64 - 1
        key -= 2**63
        z = torch.arange(start, start + n).mul_(_ODD[0]).add_(key)
        shifted = torch.empty_like(z)
        for odd in _ODD[1:]:
            torch.bitwise_right_shift(z, 32, out=shifted)
            z.bitwise_xor_(shifted).mul_(odd)
        return z

    def bytes(self, site: int, shape: torch.Size) -> Tensor:
        """A byte, int8, for each element of [B, ...]."""
        a_row = shape[1:].numel()
        words = -(-a_row // 8)
        drawn = self.draws(site, self.first * words, shape[0] * words).view(torch.int8)
        return drawn.view(shape[0], 8 * words)[:, :a_row].reshape(shape)


class Dropout(nn.Module):
    """Zero a share `p` of the activations in training and scale up the rest (Srivastava et al. 2014).

    On the CPU one 64-bit draw serves eight activations: a byte is compared with 256 `p`, rounded up or down by chance
    for each channel, so that `p` is exact. Torch's own dropout takes a draw for each, a quarter of a training step.
    Elsewhere it is torch's own, with draws from torch's generator.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, noise: Noise | None, site: int) -> Tensor:
        """[B, ...] to the same shape; `site` is another number for each place in the network."""
        if not self.training or self.p == 0:
            return x
        if noise is None or x.device.type != "cpu" or self.p > 255 / 256:
            return F.dropout(x, self.p)
        chances = noise.draws(-1 - site, 0, x.shape[-1]).bitwise_and_(2**24 - 1) / 2**24
        n_zero = (self.p * 2**8 + chances).floor().clamp(max=2**8 - 1) - 2**7
        keep = noise.bytes(site, x.shape) >= n_zero.to(torch.int8)
        return x * keep.view(torch.uint8).to(x.dtype).mul_(1 / (1 - self.p))  # torch casts bool itself slowly


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and those before it."""

    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.dropout = n_heads, d_model // n_heads, Dropout(dropout)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        # As torch.nn.MultiheadAttention starts: Glorot for the stacked projection, biases at 0.
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        x_BTD: Tensor,
        return_attention: bool = False,
        cache: KVCache | None = None,
        layer: int = 0,
        angles_2TK: Tensor | None = None,
        noise: Noise | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix values by attention; with `angles_2TK` queries and keys are turned by their positions.

        Returns:
            [B, T, D], and the weights [B, H, T, S] where `return_attention` asks for them (before dropout).
        """
        B, T, D = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, 3, self.n_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q_BHTK, k_BHSK, v_BHSK = qkv.unbind(0)
        past = cache.length if cache is not None else 0
        if angles_2TK is not None:
            q_BHTK, k_BHSK = rotate(q_BHTK, angles_2TK), rotate(k_BHSK, angles_2TK)
        if cache is not None:
            cache.keys[layer][:, :, past : past + T] = k_BHSK
            cache.values[layer][:, :, past : past + T] = v_BHSK
            k_BHSK = cache.keys[layer][:, :, : past + T]
            v_BHSK = cache.values[layer][:, :, : past + T]
        if T == 1 and cache is not None and not return_attention:
            # One query a text: in fp32, as bf16 products would have code made for each length of the text.
            with torch.autocast(x_BTD.device.type, enabled=False):
                scores_BHTS = (q_BHTK.float() * self.head_dim**-0.5) @ k_BHSK.transpose(-2, -1)
                mixed_BHTK = (scores_BHTS.softmax(dim=-1) @ v_BHSK).to(q_BHTK.dtype)
            return self.out(mixed_BHTK.transpose(1, 2).reshape(B, T, D)), None
        mask_TS = _causal(T, past, x_BTD.device)
        if not return_attention and x_BTD.device.type != "cpu":
            p = self.dropout.p if self.training else 0.0
            mask = mask_TS.to(q_BHTK.dtype) if past else None
            mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, mask, p, is_causal=not past)
            return self.out(mixed_BHTK.transpose(1, 2).reshape(B, T, D)), None
        # On the CPU these steps take half the time of torch's fused attention (EXPERIMENTS.md).
        scores_BHTS = (q_BHTK * self.head_dim**-0.5) @ k_BHSK.transpose(-2, -1)
        weights_BHTS = (scores_BHTS.float() + mask_TS).softmax(dim=-1)
        mixed_BHTK = self.dropout(weights_BHTS.to(v_BHSK.dtype), noise, _SITES * layer) @ v_BHSK
        mixed_BTD = self.out(mixed_BHTK.transpose(1, 2).reshape(B, T, D))
        return mixed_BTD, weights_BHTS if return_attention else None


def _causal(n_queries: int, past: int, device: torch.device) -> Tensor:
    """[T, S] 0 where query t, which stands at `past + t`, may see key s, and -inf where not."""
    return torch.full((n_queries, past + n_queries), -math.inf, device=device).triu(diagonal=past + 1)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each with dropout, residual and layer norm (after it, or before)."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = shape.norm == "pre"
        self.attention = CausalSelfAttention(shape.d_model, shape.n_heads, shape.dropout)
        self.norm_attention = nn.LayerNorm(shape.d_model)
        self.up = nn.Linear(shape.d_model, shape.d_ff)
        self.down = nn.Linear(shape.d_ff, shape.d_model)
        self.norm_feed_forward = nn.LayerNorm(shape.d_model)
        self.activation = {"relu": F.relu, "gelu": F.gelu}[shape.activation]
        self.dropout = Dropout(shape.dropout)

    def feed_forward(self, x_BTD: Tensor, layer: int, noise: Noise | None) -> Tensor:
        """Widen to F, bend, narrow back."""
        bent_BTF = self.dropout(self.activation(self.up(x_BTD)), noise, _SITES * layer + 2)
        return self.dropout(self.down(bent_BTF), noise, _SITES * layer + 3)

    def forward(
        self,
        x_BTD: Tensor,
        return_attention: bool = False,
        cache: KVCache | None = None,
        layer: int = 0,
        angles_2TK: Tensor | None = None,
        noise: Noise | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer; arguments and returns as `CausalSelfAttention.forward`."""
        inner = self.norm_attention(x_BTD) if self.pre_norm else x_BTD
        mixed, weights = self.attention(inner, return_attention, cache, layer, angles_2TK, noise)
        x_BTD = x_BTD + self.dropout(mixed, noise, _SITES * layer + 1)
        if self.pre_norm:
            return x_BTD + self.feed_forward(self.norm_feed_forward(x_BTD), layer, noise), weights
        x_BTD = self.norm_attention(x_BTD)
        return self.norm_feed_forward(x_BTD + self.feed_forward(x_BTD, layer, noise)), weights


class Decoder(nn.Module):
    """A decoder-only language model.

    Weights start as torch's own layers do, except a tied head: its shared matrix starts at 0.02, as GPT-2's
    (Radford et al. 2019), and is scaled up to unit variance on the way in. At the common d_model ** -0.5
    (Vaswani et al. 2017, section 3.4) every first prediction would be the input token itself.
    """

    def __init__(self, shape: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.seq_len, self.n_heads = shape.seq_len, shape.n_heads
        self.embedding = nn.Embedding(vocab_size, shape.d_model)
        self.embedding_scale = 1.0
        self.rotary = shape.positions == "rotary"
        if shape.positions == "learned":
            self.positions = nn.Parameter(torch.randn(shape.seq_len, shape.d_model) * 0.02)
        else:
            width = shape.d_model // shape.n_heads if self.rotary else shape.d_model
            table = (rotary_angles if self.rotary else sinusoidal_positions)(shape.seq_len, width)
            self.register_buffer("positions", table, persistent=False)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.n_layers))
        self.final_norm = nn.LayerNorm(shape.d_model) if shape.norm == "pre" else nn.Identity()
        self.head = nn.Linear(shape.d_model, vocab_size)
        self.dropout = Dropout(shape.dropout)
        if shape.tie_embeddings:
            nn.init.normal_(self.embedding.weight, std=_TIED_STD)
            self.head.weight = self.embedding.weight
            self.embedding_scale = 1 / _TIED_STD

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def forward(
        self,
        ids_BT: Tensor,
        return_attention: bool = False,
        cache: KVCache | None = None,
        last: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Predict the next token at every position.

        Args:
            ids_BT, return_attention, cache: as `hidden`.
            last: predict at so many last positions alone.

        Returns:
            logits [B, T, V] (or [B, last, V]), and attention as `hidden`.

        Raises:
            ValueError: more positions than the window.
        """
        x_BTD, attention = self.hidden(ids_BT, return_attention, cache)
        return self.head(x_BTD if last is None else x_BTD[:, -last:]), attention

    def hidden(
        self,
        ids_BT: Tensor,
        return_attention: bool = False,
        cache: KVCache | None = None,
        noise: Noise | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """What the head predicts from, at every position.

        Args:
            ids_BT: token ids, 1 to `seq_len` positions (the cached ones counted).
            return_attention: return the softmax's weights.
            cache: keys and values of earlier tokens; those of `ids_BT` are added to it.
            noise: what dropout draws from in training; by default torch's generator seeds it.

        Returns:
            [B, T, D], and one [B, H, T, S] of attention weights a layer (empty without `return_attention`).

        Raises:
            ValueError: more positions than the window.
        """
        past = cache.length if cache is not None else 0
        T = ids_BT.shape[1]
        if past + T > self.seq_len:
            raise ValueError(f"the window must hold all tokens: got {past + T}, seq_len={self.seq_len}.")
        x_BTD = self.embedding(ids_BT) * self.embedding_scale
        angles_2TK = None
        if self.rotary:
            angles_2TK = self.positions[:, past : past + T]
        else:
            x_BTD = x_BTD + self.positions[past : past + T]
        if noise is None and self.training:
            noise = Noise.drawn()
        x_BTD = self.dropout(x_BTD, noise, _SITES * len(self.layers))
        attention: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x_BTD, weights_BHTS = layer(x_BTD, return_attention, cache, i, angles_2TK, noise)
            if weights_BHTS is not None:
                attention.append(weights_BHTS)
        if cache is not None:
            cache.length += T
        return self.final_norm(x_BTD), attention

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for `batch_size` texts."""
        weight = self.embedding.weight
        shape = (batch_size, self.n_heads, self.seq_len, weight.shape[1] // self.n_heads)
        keys, values = ([weight.new_zeros(shape) for _ in self.layers] for _ in range(2))
        return KVCache(keys, values)

    def n_parameters(self) -> int:
        """Trained weights, a shared matrix counted once."""
        return sum(p.numel() for p in self.parameters())
