"""The processes that torchrun starts, and what they tell each other."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from saint.stage.devices import pick_device
from saint.stage.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Workers:
    """The process's place among torchrun's (one process without torchrun) and its device.

    model_parallel_size: consecutive ranks that share one language model's weights and see the same
    data; only the first of them writes.
    """

    rank: int
    world_size: int
    device: torch.device
    model_parallel_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes shared files and talks."""
        return self.rank == 0

    @property
    def is_writer(self) -> bool:
        """Whether this is the first rank of its tensor-parallel group: the others only compute."""
        return self.rank % self.model_parallel_size == 0

    def label(self, description: str) -> str:
        """Return a bar's description that says whose work it shows, where ranks share the work."""
        n_groups = self.world_size // self.model_parallel_size
        return description if n_groups == 1 else f"{description} (rank 0's 1/{n_groups})"

    def owns(self, index: int) -> bool:
        """Whether piece `index` of the data is this rank's (tensor-parallel group's) to do."""
        n_groups = self.world_size // self.model_parallel_size
        return index % n_groups == self.rank // self.model_parallel_size

    def barrier(self) -> None:
        """Wait for all ranks; does nothing for a single process."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's picklable `value` on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's picklable `value`, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 and return its result on every rank.

        An expected error on rank 0 is raised on all ranks, so that none waits for ever.
        """
        outcome: tuple[bool, Any] = (True, None)
        if self.is_main:
            try:
                outcome = (True, action())
            except (UserError, OSError) as error:
                outcome = (False, str(error))
        succeeded, value = self.broadcast(outcome)
        if not succeeded:
            raise UserError(value)
        return value


# Ranks wait while one verifies or writes what may be terabytes.
_PATIENCE = timedelta(hours=2)


def start_workers(
    device: str, *, model_parallel_size: int = 1, data_parallel: bool = True
) -> Workers:
    """Join torchrun's process group where there is one, and choose this process's device.

    device: "auto" (CUDA when there is a GPU, else CPU), "cpu", "cuda" or "cuda:N".
    model_parallel_size: of fairscale's groups, over which `llama_3.load_llama` splits a model.
    data_parallel: whether several such groups can share the work.
    Raises UserError when CUDA is asked for and absent, or the processes do not make whole groups.
    """
    import torch
    import torch.distributed as dist

    rank, world_size = (
        int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    if world_size % model_parallel_size:
        raise UserError(
            f"--model_parallel_size {model_parallel_size} does not divide the number of processes, "
            f"{world_size}: start with torchrun --nproc_per_node={model_parallel_size}"
        )
    if world_size > model_parallel_size and not data_parallel:
        raise UserError(
            f"this stage needs no more processes than --model_parallel_size {model_parallel_size}, "
            f"torchrun started {world_size}"
        )
    if world_size > 1 and device.startswith("cuda:"):
        raise UserError(
            f"--device {device} would put all {world_size} processes on one GPU: --device cuda "
            "gives each its own"
        )
    chosen = pick_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    on_gpu = chosen.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(chosen)
    if world_size > 1 and not dist.is_initialized():
        # Told its GPU, NCCL connects at once, rather than at the first collective.
        backend, place = ("nccl", chosen) if on_gpu else ("gloo", None)
        dist.init_process_group(backend, timeout=_PATIENCE, device_id=place)
    if model_parallel_size > 1:
        from fairscale.nn.model_parallel.initialize import initialize_model_parallel

        with redirect_stdout(io.StringIO()):  # it prints; stdout belongs to the stage's results
            initialize_model_parallel(model_parallel_size)
    return Workers(rank, world_size, chosen, model_parallel_size)
