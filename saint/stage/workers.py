"""The processes that torchrun starts, and what they tell each other."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from saint.stage.devices import pick_device
from saint.stage.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Axis:
    """Ranks that share something, and this one's place among them; by default it is alone.

    group: torch's process group, None for all ranks. Alone, nothing is exchanged.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up the ranks' contiguous tensors, in place and alike everywhere; return it."""
        return self._reduce(tensor, "SUM")

    def largest(self, tensor: Tensor) -> Tensor:
        """As `sum`, elementwise the largest."""
        return self._reduce(tensor, "MAX")

    def _reduce(self, tensor: Tensor, operation: str) -> Tensor:
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return (size, *shape): the ranks' tensors, which are of one shape."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        import torch.distributed as dist

        gathered = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(gathered.unbind()), tensor.contiguous(), group=self.group)
        return gathered

    def gather_uneven(self, tensor: Tensor) -> Tensor:
        """Put the ranks' tensors (n,) one after the other; their lengths may differ."""
        if self.size == 1:
            return tensor
        import torch

        length = torch.tensor(len(tensor), device=tensor.device)
        lengths = self.gather(length).tolist()
        padded = tensor.new_zeros(max(lengths))
        padded[: len(tensor)] = tensor
        gathered = self.gather(padded)
        return torch.cat([piece[:n] for piece, n in zip(gathered, lengths, strict=True)])

    def broadcast(self, tensor: Tensor) -> None:
        """Give all of them the first one's contiguous tensor, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast(tensor, self._place(0), group=self.group)

    def send_to_first(self, tensor: Tensor) -> None:
        """Send a contiguous tensor, which the first must `receive`."""
        import torch.distributed as dist

        dist.send(tensor, self._place(0), group=self.group)

    def receive(self, tensor: Tensor, rank: int) -> Tensor:
        """Fill a contiguous tensor with the one that a rank of these sends; return it."""
        import torch.distributed as dist

        dist.recv(tensor, self._place(rank), group=self.group)
        return tensor

    def _place(self, rank: int) -> int:
        import torch.distributed as dist

        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def barrier(self) -> None:
        """Wait for all of them."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier(self.group)


@dataclass(frozen=True)
class Workers:
    """The process's place among torchrun's (one process without torchrun) and its device.

    model_parallel_size: consecutive ranks that share one language model's weights and see the same
    data; only the first of them writes. mesh: axes "data" and "latent", where ranks share one SAE's
    latents: consecutive ranks, which see the same tokens.
    """

    rank: int
    world_size: int
    device: torch.device
    model_parallel_size: int = 1
    mesh: DeviceMesh | None = None

    @cached_property
    def everyone(self) -> Axis:
        """All ranks."""
        return Axis(self.rank, self.world_size)

    @cached_property
    def data(self) -> Axis:
        """The ranks that share a batch's tokens: those with the same latents as this one."""
        return self.everyone if self.mesh is None else _axis(self.mesh, "data")

    @cached_property
    def latents(self) -> Axis:
        """The ranks that share the latents: those with the same tokens as this one."""
        return Axis() if self.mesh is None else _axis(self.mesh, "latent")

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


def _axis(mesh: DeviceMesh, name: str) -> Axis:
    return Axis(mesh.get_local_rank(name), mesh[name].size(), mesh.get_group(name))


# Ranks wait while one verifies or writes what may be terabytes.
_PATIENCE = timedelta(hours=2)


def start_workers(
    device: str,
    *,
    model_parallel_size: int = 1,
    latent_parallel_size: int = 1,
    data_parallel: bool = True,
) -> Workers:
    """Join torchrun's process group where there is one, and choose this process's device.

    device: "auto" (CUDA when there is a GPU, else CPU), "cpu", "cuda" or "cuda:N".
    model_parallel_size: of fairscale's groups, over which `llama_3.load_llama` splits a model.
    latent_parallel_size: ranks over which an SAE's latents are split.
    data_parallel: whether several such groups can share the work.
    Raises UserError when CUDA is asked for and absent, or the processes do not make whole groups.
    """
    import torch
    import torch.distributed as dist

    rank, world_size = (
        int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    sizes = {"model": model_parallel_size, "latent": latent_parallel_size}
    for name, size in sizes.items():
        if world_size % size:
            raise UserError(
                f"--{name}_parallel_size {size} does not divide the number of processes, "
                f"{world_size}: start with torchrun --nproc_per_node={size}"
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
    mesh = None
    if latent_parallel_size > 1:
        mesh = make_mesh(chosen.type, world_size, latent_parallel_size)
    return Workers(rank, world_size, chosen, model_parallel_size, mesh)


def make_mesh(device_type: str, world_size: int, latent_parallel_size: int) -> DeviceMesh:
    """Return torch's mesh of all ranks, of which consecutive ones share latents."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (world_size // latent_parallel_size, latent_parallel_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("data", "latent"))
