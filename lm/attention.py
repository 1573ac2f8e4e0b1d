"""Text to attention maps: what each head of each layer looks at, with the tokens it looks at.

Shape suffixes: L layers, H heads, T query position, S key position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lm.model import Decoder
from lm.vocab import Vocab


@dataclass(frozen=True)
class AttentionMap:
    """Weights of one text: each row [S] sums to 1 and is 0 after its own position."""

    tokens: list[str]
    weights_LHTS: npt.NDArray[np.float32]


@torch.inference_mode()
def attention_map(model: Decoder, vocab: Vocab, ids: list[int]) -> AttentionMap:
    """Read `ids` (1 to `seq_len` of them) and return the weights [L, H, T, S] in fp32; dropout is off."""
    was_training = model.training
    model.eval()
    _, layers = model(torch.tensor([ids], device=model.device), return_attention=True)
    model.train(was_training)
    weights = torch.stack([w[0] for w in layers]).float().cpu().numpy()
    return AttentionMap(vocab.tokens(ids), weights)
