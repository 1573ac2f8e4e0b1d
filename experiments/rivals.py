"""What a benchmark times side by side: this project's step, others' steps of the same shape, and the machine's limit.

Each contestant is a process of its own, so that none profits from another's settings (ours has the allocator keep its
memory, as `lm.train.fit` does; the others run as they come) and memory is counted apart.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from lm.config import Config
from lm.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MATMUL = 2048
"""Side of the square matrices whose product is the machine's limit."""
PROMPT, NEW = 12, 20
"""Tokens of a benchmark's prompt, and tokens generated after it."""


@dataclass(frozen=True)
class Job:
    """What a contestant is to do: a config's shape and precision, and the size of the vocabulary."""

    config: Config
    vocab_size: int

    @property
    def tokens(self) -> int:
        """Of one training step."""
        return self.config.train.batch_size * self.config.model.seq_len


class Contestant:
    """A process that repeats one step when asked."""

    def __init__(self, name: str, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(name, job, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, n: int) -> list[float]:
        """Seconds of `n` steps; 0 steps wait until it is built.

        Raises:
            UserError: what it said when it could not do it.
        """
        try:
            if not self._pipe.poll():  # it may have said already why it cannot
                self._pipe.send(n)
            answer = self._pipe.recv()
        except (EOFError, OSError) as e:
            raise UserError(f"{self.name} must stay alive: got a dead process. Try a smaller shape.") from e
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    def close(self) -> float:
        """End it; returns the most memory it had, in MiB (0 of one that had died)."""
        peak = 0.0
        with contextlib.suppress(OSError, EOFError):
            self._pipe.send(None)
            answer = self._pipe.recv()
            peak = answer if isinstance(answer, float) else 0.0  # else it is what went wrong
        self._process.join(timeout=10)
        self._process.terminate()
        return peak


def _work(name: str, job: Job, pipe: Connection) -> None:
    try:
        step = BUILD[name](job)
        while (n := pipe.recv()) is not None:
            times: list[float] = []
            for _ in range(n):
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
            pipe.send(times)
        pipe.send(peak_mib())
    except (EOFError, KeyboardInterrupt):
        pass  # whoever asked has gone
    except Exception as e:
        remedy = "pip install -e '.[dev]'" if isinstance(e, ImportError) else "a smaller shape, or --device cpu"
        first = (str(e).splitlines() or [type(e).__name__])[0][:200]
        with contextlib.suppress(OSError):
            pipe.send(f"{name} must be able to run here: got {first}. Try {remedy}.")


def peak_mib() -> float:
    """The most memory that this process has had, in MiB of the host."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _batches(job: Job) -> Callable[[], tuple[Tensor, Tensor]]:
    """Random inputs and targets [B, T] in which words are as frequent as in text (Zipf's law)."""
    import torch

    torch.manual_seed(0)
    weights = 1 / torch.arange(1, job.vocab_size + 1)
    shape = (job.config.train.batch_size, job.config.model.seq_len + 1)

    def draw() -> tuple[Tensor, Tensor]:
        ids = torch.multinomial(weights, shape[0] * shape[1], replacement=True).view(shape)
        return ids[:, :-1], ids[:, 1:]

    ready = [draw() for _ in range(4)]

    def following() -> tuple[Tensor, Tensor]:
        ready.append(ready.pop(0))
        return ready[-1]

    return following


def _device_and_precision(job: Job) -> tuple[torch.device, torch.dtype]:
    from lm import runtime

    device = runtime.resolve_device(job.config.train.device)
    return device, runtime.resolve_precision(job.config.train.precision, device)


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _ours(job: Job) -> Callable[[], None]:
    from lm import runtime
    from lm.model import Decoder
    from lm.optim import build_optimizers
    from lm.train import Loss, train_step

    device, precision = _device_and_precision(job)
    runtime.seed_everything(0)
    model = Decoder(job.config.model, job.vocab_size).to(device).train()
    loss, optimizers, batch = Loss(model, precision), build_optimizers(model, job.config.train), _batches(job)
    runtime.keep_memory()  # as `fit` does

    def step() -> None:
        train_step(loss, optimizers, *batch(), job.config.train)
        _wait(device)

    return step


def literal_network(job: Job) -> nn.Module:
    """The write-up's network as most people would write it; its memory is masked, since nothing may leak."""
    import torch
    from torch import nn

    from lm.model import sinusoidal_positions

    shape = job.config.model

    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(job.vocab_size, shape.d_model)
            layer = nn.TransformerDecoderLayer(
                shape.d_model, shape.n_heads, shape.d_ff, shape.dropout, shape.activation, batch_first=True
            )
            self.decoder = nn.TransformerDecoder(layer, shape.n_layers)
            self.head = nn.Linear(shape.d_model, job.vocab_size)
            self.register_buffer("positions", sinusoidal_positions(shape.seq_len, shape.d_model))
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(shape.seq_len))

        def forward(self, ids_BT: Tensor) -> Tensor:
            T = ids_BT.shape[1]
            x_BTD = self.embedding(ids_BT) + self.get_buffer("positions")[:T]
            mask_TT = self.get_buffer("mask")[:T, :T]
            return self.head(self.decoder(x_BTD, x_BTD, tgt_mask=mask_TT, memory_mask=mask_TT))

    torch.manual_seed(job.config.train.seed)
    return Literal()


def literal_step(job: Job, model: nn.Module) -> Callable[[Tensor, Tensor], float]:
    """One step of the write-up's loop: fp32, eager Adam, the loss read at each step."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    recipe = job.config.train
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)

    def step(inputs_BT: Tensor, targets_BT: Tensor) -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs_BT).flatten(0, 1), targets_BT.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        return loss.item()

    return step


def _literal(job: Job) -> Callable[[], None]:
    device, _ = _device_and_precision(job)
    step, batch = literal_step(job, literal_network(job).to(device).train()), _batches(job)

    def once() -> None:
        inputs_BT, targets_BT = batch()
        step(inputs_BT.to(device), targets_BT.to(device))

    return once


def _gpt2_network(job: Job) -> nn.Module:
    import logging

    from transformers import GPT2Config, GPT2LMHeadModel  # pyright: ignore[reportMissingTypeStubs]

    logging.getLogger("transformers").setLevel(logging.ERROR)
    shape = job.config.model
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=job.vocab_size,
            n_positions=shape.seq_len,
            n_embd=shape.d_model,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_inner=shape.d_ff,
            resid_pdrop=shape.dropout,
            embd_pdrop=shape.dropout,
            attn_pdrop=shape.dropout,
            activation_function=shape.activation,
            tie_word_embeddings=shape.tie_embeddings,
            bos_token_id=0,
            eos_token_id=None,
        )
    )


def _gpt2(job: Job) -> Callable[[], None]:
    import torch

    from lm import runtime

    device, precision = _device_and_precision(job)
    torch.manual_seed(0)
    model = _gpt2_network(job).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.config.train.lr, fused=True)
    batch = _batches(job)

    def step() -> None:
        ids_BT = batch()[0].to(device)
        with runtime.autocast(device, precision):
            loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)

    return step


def _matmul(job: Job) -> Callable[[], None]:
    import torch

    device, precision = _device_and_precision(job)
    a, b = (torch.randn(MATMUL, MATMUL, device=device, dtype=precision) for _ in range(2))
    out = torch.empty_like(a)

    def step() -> None:
        torch.mm(a, b, out=out)
        _wait(device)

    return step


def _prompts(job: Job, batch_size: int, length: int) -> list[list[int]]:
    import torch

    torch.manual_seed(0)
    return torch.randint(0, job.vocab_size, (batch_size, length)).tolist()


def _generation(batch_size: int, cached: bool = True, fill: bool = False) -> Callable[[Job], Callable[[], None]]:
    """Our own generation; with `fill` the prompt leaves room for the new tokens alone."""

    def build(job: Job) -> Callable[[], None]:
        import torch

        from lm import generate, runtime
        from lm.model import Decoder

        device, precision = _device_and_precision(job)
        torch.manual_seed(0)
        model = generate.for_generation(Decoder(job.config.model, job.vocab_size).to(device), precision)
        prompts = _prompts(job, batch_size, job.config.model.seq_len - NEW if fill else PROMPT)
        asked = [generate.Prompt(prompt, NEW, seed=0) for prompt in prompts]

        def with_cache() -> None:
            for _ in generate.generate_ids(model, asked):
                pass

        @torch.inference_mode()
        def without() -> None:
            ids = [list(prompt) for prompt in prompts]
            for _ in range(NEW):
                window_BT = torch.tensor([text[-model.seq_len :] for text in ids], device=device)
                with runtime.autocast(device, precision):
                    logits_BV = model(window_BT, last=1)[0][:, -1].float()
                uniform_B = torch.rand(batch_size, dtype=torch.float64, device=device)
                drawn = generate.sample(logits_BV, generate.Sampling(), uniform_B).tolist()
                ids = [[*text, new] for text, new in zip(ids, drawn, strict=True)]

        return with_cache if cached else without

    return build


def _gpt2_generation(batch_size: int) -> Callable[[Job], Callable[[], None]]:
    def build(job: Job) -> Callable[[], None]:
        import torch

        device, precision = _device_and_precision(job)
        torch.manual_seed(0)
        model: Any = _gpt2_network(job).to(device, precision).eval()
        ids_BT = torch.tensor(_prompts(job, batch_size, PROMPT), device=device)

        def step() -> None:
            model.generate(
                ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=NEW, do_sample=True, temperature=0.8,
                top_k=0, pad_token_id=0,
            )  # fmt: skip

        return step

    return build


BUILD: dict[str, Callable[[Job], Callable[[], None]]] = {
    "ours": _ours,
    "literal": _literal,
    "gpt2": _gpt2,
    "matmul": _matmul,
    "one text": _generation(1),
    "one text, no cache": _generation(1, cached=False),
    "one long text": _generation(1, fill=True),
    "one long text, no cache": _generation(1, cached=False, fill=True),
    "32 texts": _generation(32),
    "gpt2, one text": _gpt2_generation(1),
    "gpt2, 32 texts": _gpt2_generation(32),
}
"""Contestants by name."""
