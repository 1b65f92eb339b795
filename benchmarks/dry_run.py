"""Peak memory at Llama 3.2-3B's shape and 65,536 latents, computed by running without numbers.

    python -m benchmarks.dry_run | tail -1 > benchmarks/data/peak_bytes.json

The code runs on fake tensors (`torch._subclasses.FakeTensorMode`) on a device "cuda" that need not
be there: operators that mix devices or shapes fail as they would on a card, and every storage is
counted from its making to its end. Not counted: workspaces of cuBLAS, cuSPARSE and attention,
rounding and fragmentation of torch's allocator, the context (about 0.5 GB).

What a CPU build cannot fake is worked around:

- shapes that depend on numbers: a batch has k latents of each token, and no token is looked at
  twice; other masks keep all that they can, and `nonzero` finds nothing;
- numbers that the host reads (`item`): they are 1;
- `inference_mode`, in which composite operators cannot be faked: it is `no_grad`;
- autograd on "cuda": `dense` runs on "cpu", so that devices are not compared there;
- Triton: kernels are not launched; their buffers are made, and counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import SHAPES, draw_sentences
from llama_3 import HookPoint, Llama, Sampling, generate
from sae import ActiveLatents, SAEConfig, TopKSparseAutoencoder
from saint.capture.packing import Pack
from saint.evaluation.faithfulness import Subject, capture_to_hook, next_token_losses
from saint.kernels import torch_ops
from saint.stage.workers import Workers
from saint.steering.completions import request_edits, rows_from
from saint.steering.settings import Limits, Request, Setting
from saint.steering.studio import Dictionary, Studio
from saint.store.row_format import encode_rows
from saint.training import objectives
from saint.training.objectives import OBJECTIVES
from saint.training.recipe import Recipe
from saint.training.trainer import Trainer

SHAPE, LAYER, BATCH = SHAPES["3b"], 22, 8192
DICTIONARY = SAEConfig(3072, 65536, 64, layer=LAYER)
_TRITON = importlib.util.find_spec("triton") is not None
_KERNELS = ["torch", "dense", *["triton"] * _TRITON]
_AT_LEAST = objectives._at_least
_CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten
_INDEXED = (_aten.index, _aten.index_put, _aten.index_put_)


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage on a device that is alive, and makes up what is not known.

    alive, peak: bytes. asked: how often the host would have waited for a number or a shape, by
    operator.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.alive, self.peak = device, 0, 0
        self.asked: Counter[str] = Counter()
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator: on the device without numbers, elsewhere as it is."""
        kwargs = kwargs or {}
        if not self._is_fake(args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        found = _made_up(func.overloadpacket, args, kwargs)
        if found is None:
            found = func(*args, **kwargs)
        else:
            self.asked[str(func.overloadpacket)] += 1
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                self._count(tensor.untyped_storage())
        return found

    def _is_fake(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        def there(leaf: Any) -> bool:
            on_device = isinstance(leaf, torch.device) and leaf.type == self.device.type
            return on_device or isinstance(leaf, FakeTensor)

        on_cpu = self.device.type == "cpu"  # then nothing has numbers
        return on_cpu or any(there(leaf) for leaf in tree_leaves((args, kwargs)))

    def _count(self, storage: torch.UntypedStorage) -> None:
        number, n_bytes = storage._cdata, storage.nbytes()
        if number not in self._known:
            self._known.add(number)
            self.alive += n_bytes
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._end, number, n_bytes)

    def _end(self, number: int, n_bytes: int) -> None:
        self._known.discard(number)
        self.alive -= n_bytes


def _made_up(packet: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return what stands for a result whose numbers or shape the host would wait for, else None."""
    if packet is _aten.nonzero:
        return args[0].new_empty(0, args[0].ndim, dtype=torch.int64)
    if packet is _aten._local_scalar_dense:
        return args[0].dtype == torch.bool or 1
    if packet is _aten.bincount:
        minlength = kwargs["minlength"] if "minlength" in kwargs else args[2]
        return args[0].new_empty(minlength, dtype=torch.int64)
    masks = [i for i in args[1] if _is_mask(i)] if packet in _INDEXED else []
    if masks and packet is _aten.index:
        before = next(n for n, i in enumerate(args[1]) if i is masks[0])
        n, shape = min(masks[0].numel(), BATCH * DICTIONARY.k), args[0].shape
        return args[0].new_empty(*shape[:before], n, *shape[before + masks[0].ndim :])
    if masks:
        return args[0]
    if packet is _aten.repeat_interleave and kwargs.get("output_size") is None:
        return args[0].new_empty(BATCH * DICTIONARY.k, dtype=torch.int64)
    return None


_NUMBERS = {Tensor.__int__: int, Tensor.__float__: float, Tensor.__bool__: bool}

# Python's bindings of these want the device too; the operators do not.
_GUARDED = {
    Tensor.copy_: _aten.copy_,
    Tensor.nonzero: _aten.nonzero,
    torch.nonzero: _aten.nonzero,
    Tensor.data_ptr: lambda x: 0,
    Tensor.pin_memory: lambda x: x,
    Tensor.__invert__: _aten.bitwise_not,
    Tensor.new_tensor: lambda x, data: torch.tensor(data, dtype=x.dtype, device=x.device),
}


class Indexing(TorchFunctionMode):
    """Lets Python index and copy fake CUDA tensors, for which a CPU build wants a device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace what would fail, and pass on all else."""
        if func is Tensor.__getitem__:
            view, tensors = _basic(*args)
            return view if tensors is None else _aten.index(view, tensors)
        if func is Tensor.__setitem__:
            view, tensors = _basic(*args[:2])
            value = torch.as_tensor(args[2], dtype=view.dtype, device=view.device)
            if tensors is None:
                return _aten.copy_(view, value)
            return _aten.index_put_(view, tensors, value)
        if func in _NUMBERS:
            return _NUMBERS[func](args[0].item())
        func = _GUARDED.get(func, func)
        if func is Tensor.tolist:
            return [each.item() if each.ndim == 0 else each.tolist() for each in args[0].unbind()]
        return func(*args, **(kwargs or {}))


def _basic(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None] | None]:
    """Apply an index's numbers, slices and None; return the view, and its tensors by dimension."""
    items = list(index) if isinstance(index, tuple) else [index]
    taken = [i.ndim if _is_mask(i) else 1 for i in items if i is not None and i is not Ellipsis]
    if Ellipsis in [i for i in items if not isinstance(i, Tensor)]:
        at = next(n for n, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (x.ndim - sum(taken))
    tensors: list[Tensor | None] = []
    dim = 0
    for item in items:
        if isinstance(item, int):
            x = x.select(dim, item)
            continue
        if item is None:
            x = x.unsqueeze(dim)
        elif isinstance(item, slice):
            x = _aten.slice(x, dim, item.start, item.stop, item.step or 1)
        tensors.append(item if isinstance(item, Tensor) else None)
        dim += item.ndim if isinstance(item, Tensor) and _is_mask(item) else 1
    return x, (tensors if any(t is not None for t in tensors) else None)


def _is_mask(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype == torch.bool


def _complete(top: Any, a: Tensor, cut: Tensor, found: Any, n_latents: int) -> ActiveLatents:
    """As `torch_ops.complete` where no token has more than it found, and k of each are kept."""
    values, indices = found
    return torch_ops.keep(values, indices, values >= cut, len(a) * DICTIONARY.k)


def _at_least(active: ActiveLatents, cut: Tensor, n: int) -> ActiveLatents:
    return _AT_LEAST(active, cut, len(active.values))


_STUBS: dict[str, Any] = {
    "torch.inference_mode.__enter__": lambda self: None,
    "torch.inference_mode.__exit__": lambda self, *error: None,
    "saint.training.objectives.complete": _complete,
    "saint.training.objectives._at_least": _at_least,
    "torch.cuda.get_device_capability": lambda device=None: (8, 9),
}
if _TRITON:
    for name in ("triton_ops", "triton_encoder", "triton_gradient", "triton_update"):
        _STUBS[f"saint.kernels.{name}.launch"] = lambda *arguments, **options: None


@contextmanager
def dry(device: torch.device) -> Iterator[Ledger]:
    """Let torch compute without numbers, and count what it holds on a device."""
    with ExitStack() as stack:
        for target, instead in _STUBS.items():
            stack.enter_context(patch(target, instead))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        ledger = stack.enter_context(Ledger(device))
        stack.enter_context(Indexing())
        stack.enter_context(torch.no_grad())
        yield ledger


# --- the parts -----------------------------------------------------------------------------------


def step(
    kernels: str, *, n_dead: int = 0, moments: str = "float32", micro_batch_size: int = BATCH
) -> Ledger:
    """Take two training steps: the second has all that lives on from one to the next."""
    device = torch.device("cpu") if kernels == "dense" else _CUDA
    with dry(device) as ledger:
        activation = OBJECTIVES[Recipe.objective].activation
        sae = TopKSparseAutoencoder(replace(DICTIONARY, activation=activation), device=device)
        sae.requires_grad_(kernels == "dense")
        recipe = Recipe(
            batch_size=BATCH,
            learning_rate=1e-4,
            k_start=DICTIONARY.k,
            k_aux=2048,
            dead_tokens=10**7,
            moments=moments,
        )
        basis = torch.empty(DICTIONARY.d_model, DICTIONARY.d_model, device=device)
        trainer = Trainer(sae, recipe, 1000, Workers(0, 1, device), kernels, basis)
        trainer.dead = torch.empty(n_dead, dtype=torch.int64, device=device)
        trainer.n_dead = n_dead
        rows = torch.empty(BATCH, DICTIONARY.d_model, dtype=torch.bfloat16, device=device)
        with (
            patch.object(trainer, "_list_dead", lambda mask: None),
            torch.set_grad_enabled(kernels == "dense"),
        ):
            for _ in range(2):
                trainer.train_step(rows, micro_batch_size)
    return ledger


def capture(batch_tokens: int = 32768) -> Ledger:
    """Run a pack up to the hook, and make its rows what is stored."""
    lengths = _lengths(batch_tokens)
    with dry(_CUDA) as ledger:
        model = Llama(SHAPE, device=_CUDA, dtype=torch.bfloat16, n_layers=LAYER + 1)
        tokens = torch.empty(sum(lengths), dtype=torch.int64, device=_CUDA)
        hook = HookPoint(LAYER, "resid_pre")
        rows = model.capture(tokens, [hook], seq_lens=lengths)[hook]
        own = torch.empty(len(rows) - len(lengths), dtype=torch.int64, device=_CUDA)
        encode_rows(rows[own], "bfloat16")
    return ledger


def evaluation(batch_tokens: int = 2048) -> Ledger:
    """Take a pack through both of evaluation's passes."""
    lengths = _lengths(batch_tokens)
    with dry(_CUDA) as ledger:
        model = Llama(SHAPE, device=_CUDA, dtype=torch.bfloat16)
        sae = TopKSparseAutoencoder(DICTIONARY, device=_CUDA)
        hook = HookPoint(LAYER, "resid_pre")
        unused: Any = None  # the tokenizer
        subject = Subject(model, unused, sae, hook, batch_tokens, seed=0)
        tokens = torch.empty(sum(lengths), dtype=torch.int64)
        packs = [Pack(tokens, lengths, torch.ones(len(tokens), dtype=torch.bool))]
        next_token_losses(subject, packs, capture_to_hook(subject, packs))
    return ledger


def demo() -> Ledger:
    """Generate plain and steered texts at the demo's limits, with a latent that is encoded."""
    limits, n_new = Limits(), 3
    n = limits.prompts
    prompts = [[0] * (limits.tokens // n - n_new)] * n
    with dry(_CUDA) as ledger:
        model = Llama(SHAPE, device=_CUDA, dtype=torch.bfloat16)
        sae = TopKSparseAutoencoder(DICTIONARY, device=_CUDA)
        hook, units = HookPoint(LAYER, "resid_pre"), torch.empty(DICTIONARY.n_latents)
        unused: Any = None  # the tokenizer
        studio = Studio(model, unused, (Dictionary("", sae, hook, units, ""),))
        wishes = (Setting(0, "scale", 2.0), Setting(1, "add", 1.0))
        request = Request(("",) * n, wishes, max_new_tokens=n_new)
        edits = rows_from(n, request_edits(studio, request, [len(p) for p in prompts]))
        sampling = Sampling(0.7, 0.9)
        how = {"max_new_tokens": n_new, "sampling": sampling, "edits": edits}
        for _ in generate(model, [*prompts, *prompts], **how):
            pass
    return ledger


def _lengths(n_tokens: int) -> list[int]:
    """Return lengths of sentences that fill a pack, longest first."""
    lengths = [len(ids) for ids in draw_sentences(n_tokens // 20, 100)]
    while sum(lengths) > n_tokens:
        lengths.pop()
    return sorted([*lengths, n_tokens - sum(lengths)], reverse=True)


PARTS: dict[str, Callable[[], Ledger]] = {
    **{f"step, {name}": partial(step, name) for name in _KERNELS},
    **{f"step, {name}, 2,048 dead": partial(step, name, n_dead=2048) for name in _KERNELS},
    **{
        f"step, {name}, int8 moments": partial(step, name, moments="int8")
        for name in _KERNELS
        if name != "dense"
    },
    "step, torch, int8 moments, micro-batches of 1,024": partial(
        step, "torch", moments="int8", micro_batch_size=1024
    ),
    "step, dense, micro-batches of 1,024": partial(step, "dense", micro_batch_size=1024),
    "capture, 32,768 tokens": capture,
    "capture, 4,096 tokens": partial(capture, 4096),
    "evaluation, 2,048 tokens": evaluation,
    "demo at its limits": demo,
}


def peaks() -> dict[str, int]:
    """Return the bytes of every part."""
    return {name: part().peak for name, part in PARTS.items()}


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(argv)
    found = peaks()
    for name, n_bytes in found.items():
        print(f"| {name} | {n_bytes / 1e9:.2f} GB |")
    print(json.dumps(found))  # a test compares it with what is in benchmarks/data


if __name__ == "__main__":
    main()
