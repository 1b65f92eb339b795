"""Counts operations whose result's size, or whose value on the host, depends on the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ALWAYS = {
    "_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero",
    "unique_dim", "unique_consecutive", "_unique", "_unique2", "argwhere",
}  # fmt: skip


def _waits(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [
            i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
        ]
        return bool(masks)
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in _ALWAYS


class Waits(TorchDispatchMode):
    """On a GPU the host would wait for the device at each of `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if _waits(name, args, kwargs or {}):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    """Counts what a CPU's tensor gives without any operation."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy):
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def waits_of(work: Callable[[], Any]) -> Counter[str]:
    """Return what a piece of work would wait for."""
    with Waits() as waits, _Reads(waits.counts):
        work()
    return waits.counts
