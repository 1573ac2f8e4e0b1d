"""Several processes that train one model: who they are, which windows each takes, and how their sums meet.

`torchrun` starts them; torch.distributed carries what they exchange (gloo on the CPU, nccl on CUDA). One process alone
is the same with nothing to exchange. Knows neither data nor the training loop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lm.errors import LostRankError, UserError

_WAIT = timedelta(days=7)
"""How long one may be away from the others, as the first is while it tokenises; a killed one is noticed at once."""
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model, as one of them sees them; by default it is alone."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that logs and writes."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """Those of `n` windows that are this process's: consecutive, as equal as can be."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor that each has; in place, and the same to the bit for all."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def told(self, message: Any = None) -> Any:
        """What the first process says, plain values and torch's types and shapes; the others wait for it."""
        if self.size == 1:
            return message
        box = [message]
        with together(self):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def level(self, tensors: list[Tensor]) -> None:
        """Give all processes the first one's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


ALONE = Ranks()


def launched() -> bool:
    """Whether `torchrun`, or something that sets its variables, has started this process."""
    return "WORLD_SIZE" in os.environ


def job() -> str:
    """The id that a person gave `torchrun` (`--rdzv-id`), or that it made up for `--standalone`; empty without."""
    named = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if named == "none" else named


@contextmanager
def joined(device: str) -> Generator[Ranks]:
    """The group that `torchrun` made, from its variables; left at the end. Without them one process alone.

    Args:
        device: as `TrainConfig.device`; with CUDA each process takes the GPU of its local rank.

    Raises:
        UserError: more processes on this host than GPUs, a device that cannot be shared out, or several hosts with a
            store that outlives restarts.
    """
    if not launched():
        yield Ranks()
        return
    for name in _VARIABLES:
        if not os.environ.get(name):
            raise UserError(f"who starts several processes must tell each {name}: got none. Try torchrun.")
    local, here = (int(os.environ.get(name, n)) for name, n in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if device == "mps" or (on_cuda and here > torch.cuda.device_count()):
        has = "one device" if device == "mps" else f"{torch.cuda.device_count()} GPUs"
        raise UserError(
            f"each process of a host must have a device of its own: got {here} processes and {has}. "
            "Try fewer with --nproc-per-node, or --device cpu."
        )
    if on_cuda:
        torch.cuda.set_device(local)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it has nothing to close, and may be waiting where Python is not
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, timeout=_WAIT, store=_store(size), rank=rank, world_size=size)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def leave() -> NoReturn:
    """End this process with success, once all have come here, and at once.

    torch's threads of a group may abort a process that ends in the usual way: seen a few times on a busy machine.
    """
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _store(size: int) -> Any:
    """Where the processes find each other.

    torchrun's agents keep theirs over restarts, in which new processes would read what dead ones wrote
    (pytorch/pytorch issue 135712). On one host the number of restarts tells them apart; on several it may differ.
    """
    stores = cast(Any, dist)  # torch's stubs keep them back
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return stores.TCPStore(address, port, size, is_master=os.environ["RANK"] == "0", timeout=_WAIT)
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1" and os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0":
        raise UserError(
            "restarts over several hosts need a new store each time: got torchrun's shared one. "
            "Try TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun."
        )
    store = stores.TCPStore(address, port, size, is_master=False, timeout=_WAIT)
    return stores.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def together(ranks: Ranks) -> Generator[None]:
    """What processes do together.

    Raises:
        LostRankError: another one has ended; torch says so in a RuntimeError.
    """
    try:
        yield
    except RuntimeError as e:
        if ranks.size == 1 or not (isinstance(e, dist.DistError) or "gloo" in str(e) or "peer" in str(e)):
            raise
        raise LostRankError(
            f"all {ranks.size} processes must stay: rank {ranks.rank} ends since another has, which may have said why "
            f"({str(e).splitlines()[0][:120]}). If it was killed, try torchrun --max-restarts 3."
        ) from e


def replicated(module: nn.Module, ranks: Ranks) -> nn.Module:
    """A module whose gradients are the mean over all processes after `backward` (DDP: Li et al. 2020)."""
    if ranks.size == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)


def shares_weights(parallel: str, ranks: Ranks) -> bool:
    """Whether each process holds a share of the weights alone, by `TrainConfig.parallel`."""
    return parallel == "fsdp" and ranks.size > 1


def share_out(model: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Leave each process its share of every weight, on `device`; a layer's are brought together while it is needed.

    FSDP2 (Zhao et al. 2023). `hidden` counts as a forward pass too.
    """
    from torch.distributed.device_mesh import init_device_mesh  # half a second, which others need not pay
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may have a share; all must ask at once."""
    share = cast(Any, tensor)
    return share.full_tensor() if hasattr(share, "full_tensor") else tensor


def like(full: Tensor, parameter: Tensor) -> Tensor:
    """Of a whole tensor what this process has of a parameter of that shape."""
    share = cast(Any, parameter)
    if not hasattr(share, "placements") or not full.ndim:
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(share.device), share.device_mesh, share.placements)


@contextmanager
def exchange(module: nn.Module, due: bool) -> Generator[None]:
    """Within it gradients are added up here alone, unless the exchange is `due`."""
    ddp = isinstance(module, nn.parallel.DistributedDataParallel)
    with contextlib.nullcontext() if due or not ddp else cast(Any, module).no_sync():
        yield
