import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from lm import audit, model
from lm.config import ModelConfig
from lm.data import Windows
from lm.errors import LeakError
from lm.model import Decoder

SHAPE = ModelConfig(d_model=32, n_layers=2, n_heads=4, d_ff=64, seq_len=12)
VOCAB = 50
VARIANTS = [{}, {"norm": "pre", "activation": "gelu"}, {"positions": "rotary"}, {"tie_embeddings": True}]


def decoder(**changes: object) -> Decoder:
    torch.manual_seed(0)
    return Decoder(replace(SHAPE, **changes), VOCAB)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_no_path_of_the_decoder_sees_the_future(changes: dict[str, object], precision: torch.dtype) -> None:
    assert audit.causality(decoder(**changes), VOCAB, precision) == []


def no_mask(n_queries: int, past: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(n_queries, past + n_queries, device=device)


def test_a_mask_taken_away_is_found_on_each_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_causal", no_mask)
    found = audit.causality(decoder(), VOCAB)
    assert [f.split(" path:")[0] for f in found] == list(audit.PATHS)
    assert audit.PATHS.keys() == {"training", "evaluation", "attention", "cached generation"}
    assert "have a gradient with respect to the token at" in found[0]


def test_a_leak_in_evaluation_alone_is_found() -> None:
    class Careless(Decoder):
        def forward(
            self, ids_BT: torch.Tensor, *args: object, **kwargs: object
        ) -> tuple[torch.Tensor, list[torch.Tensor]]:
            logits, attention = super().forward(ids_BT, *args, **kwargs)  # type: ignore[arg-type]
            return logits if self.training or "last" not in kwargs else logits + ids_BT.sum(), attention

    torch.manual_seed(0)
    [found] = audit.causality(Careless(SHAPE, VOCAB), VOCAB)
    assert found.startswith("evaluation path: other tokens after position ")


@pytest.mark.parametrize("differentiable", [True, False])
def test_a_leak_from_another_text_of_the_batch_is_found(differentiable: bool) -> None:
    class Neighbour(Decoder):
        """Evaluation batches are consecutive text: the next row's first token is this row's last target."""

        def forward(
            self, ids_BT: torch.Tensor, *args: object, **kwargs: object
        ) -> tuple[torch.Tensor, list[torch.Tensor]]:
            logits, attention = super().forward(ids_BT, *args, **kwargs)  # type: ignore[arg-type]
            if differentiable:
                return logits + logits.mean(dim=0, keepdim=True), attention
            return logits + ids_BT.roll(-1, 0)[:, :1, None], attention

    torch.manual_seed(0)
    found = audit.causality(Neighbour(SHAPE, VOCAB), VOCAB)
    assert len(found) == 4
    assert "another text of the batch" in found[0]


def test_a_leak_that_gradients_cannot_see_is_found_by_changed_tokens() -> None:
    class Peeking(Decoder):
        def forward(
            self, ids_BT: torch.Tensor, *args: object, **kwargs: object
        ) -> tuple[torch.Tensor, list[torch.Tensor]]:
            logits, attention = super().forward(ids_BT, *args, **kwargs)  # type: ignore[arg-type]
            return logits + ids_BT.sum(), attention

    torch.manual_seed(0)
    found = audit.causality(Peeking(SHAPE, VOCAB), VOCAB)
    assert re.match(
        r"training path: other tokens after position \d+, or in another text of the batch, change", found[0]
    )


def test_the_audit_leaves_weights_gradients_mode_and_random_state_as_they_were() -> None:
    audited = decoder().train()
    before = {name: p.clone() for name, p in audited.state_dict().items()}
    state = torch.get_rng_state()
    audit.causality(audited, VOCAB)
    assert audited.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in audited.parameters())
    assert all(torch.equal(p, before[name]) for name, p in audited.state_dict().items())


def test_targets_shifted_the_wrong_way_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = Windows(np.random.default_rng(0).permutation(100).astype(np.uint16), 8)
    assert audit.alignment(windows, "train") == []
    for shift in (0, -1):
        monkeypatch.setattr(Windows, "_cut", cut_with(shift))
        assert audit.alignment(windows, "train") == ["train windows: a target is not the token after its input"]


def cut_with(shift: int) -> Callable[..., object]:
    def cut(self: Windows, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        at = rows[:, None] * self.seq_len + 1 + np.arange(self.seq_len)
        return torch.from_numpy(self.ids[at].astype(np.int64)), torch.from_numpy(self.ids[at + shift].astype(np.int64))

    return cut


def test_windows_that_overlap_between_splits_are_found() -> None:
    ids = np.arange(100, dtype=np.uint16)
    dealt = np.random.default_rng(0).permutation(80)
    train, validation = Windows(ids, 8, np.sort(dealt[:64])), Windows(ids, 8, np.sort(dealt[64:]))
    [found] = audit.separation(train, validation)
    assert found == "validation windows: 99.2% of 128 targets stand in training windows too"
    apart = Windows(ids, 8, np.arange(0, 40)), Windows(ids, 8, np.arange(48, 80))
    assert audit.separation(*apart) == []
    touching = Windows(ids, 8, np.arange(0, 40)), Windows(ids, 8, np.array([46]))
    assert audit.separation(*touching) == ["validation windows: 12.5% of 8 targets stand in training windows too"]


def test_a_split_is_not_apart_from_itself() -> None:
    windows = Windows(np.arange(100, dtype=np.uint16), 8)
    assert audit.separation(windows, windows) == [
        "validation windows: 100.0% of 99 targets stand in training windows too"
    ]
    assert audit.separation(windows, Windows(np.arange(100, dtype=np.uint16), 8)) == []


def test_findings_stop_with_a_remedy() -> None:
    audit.require([])
    with pytest.raises(LeakError, match="must be measured on what it has not seen: got a; b. Try .*--allow-leak"):
        audit.require(["a", "b"])
