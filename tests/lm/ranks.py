"""Trains one model as one of several processes, or alone, and writes what it came to: what test_parallel.py starts."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from lm import checkpoint, parallel, runtime, train
from lm.checkpoint import TrainState
from lm.config import Config
from lm.data import Windows
from lm.vocab import Vocab


def main(changes: str, out: str, folder: str) -> None:
    config = Config.from_flat({
        "d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 128, "seq_len": 16, "batch_size": 7, "epochs": 4,
        "steps_per_epoch": 50, "lr": 1e-3, "precision": "fp32", "device": "cpu", **json.loads(changes),
    })  # fmt: skip
    vocab = Vocab.build([" ".join(f"w{i}" for i in range(99))], min_count=1)
    drawn = np.random.default_rng(0).zipf(1.5, 16 * 7 * 90) % 100
    ids = np.cumsum(drawn, dtype=np.uint64) % 100  # what comes next depends on what was last
    windows, validation = Windows(ids[:-984], 16), Windows(ids[-984:], 16)
    with parallel.joined("cpu") as ranks:
        runtime.seed_everything(config.train.seed + ranks.rank)  # the first one's weights are to count
        state = TrainState.new(config, 100, torch.device("cpu"))
        if Path(folder).exists() and ranks.is_first:
            state = checkpoint.load(Path(folder)).state
        reports = train.fit(state, windows, validation, config.train, ranks=ranks)
        found = [(r.epoch, r.step, r.train.nll, r.validation.nll, r.grad_norm) for r in reports]
        if ranks.is_first:
            Path(out).write_text(json.dumps(found))
            if not Path(folder).exists():
                checkpoint.save(Path(folder), config, vocab, state, "digest")
        if ranks.size > 1:
            parallel.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
