"""Counting the bytes that operations on the meta device would allocate."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Tag = Callable[[Tensor], str]

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)

LARGE = 32 << 20
"""glibc maps blocks from this size on their own and gives them back; its heap has the others."""


class MemoryTrace(TorchDispatchMode):
    """Counts the storages that are alive, and remembers their kinds at the peak.

    Tensors that exist before the trace starts are not counted.

    Args:
        tag: names the kind of a new tensor.

    Attributes:
        now: bytes alive.
        peak: largest ``now``.
        at_peak: bytes by kind when ``now`` was largest.
        small_at_peak: bytes then in storages below ``LARGE``.
        products: half-precision matrix products that were taken, each shape once.
    """

    def __init__(self, tag: Tag) -> None:
        super().__init__()
        self.tag = tag
        self.now = 0
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.small_at_peak = 0
        self.products: set[tuple[Any, ...]] = set()
        self._kinds: Counter[str] = Counter()
        self._small = 0
        self._alive: dict[int, tuple[int, str]] = {}
        self._outside: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and count what it returns."""
        for item in tree_leaves((args, kwargs)):
            if isinstance(item, Tensor):
                self._note(item)
        if func.overloadpacket in PRODUCTS and args[-1].dtype in (torch.bfloat16, torch.float16):
            self.products.add(tuple(tuple(item.shape) for item in args[-2:]))
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self._count(item)
        return result

    def restart(self) -> None:
        """Forget the peak so far; what is alive stays counted."""
        self.peak, self.at_peak, self.small_at_peak = self.now, self._kinds.copy(), self._small

    def retag(self, tensor: Tensor, kind: str) -> None:
        """Give the memory of a tensor another kind."""
        key = tensor.untyped_storage()._cdata
        if key in self._alive:
            size, old = self._alive[key]
            self._alive[key] = size, kind
            self._kinds[old] -= size
            self._kinds[kind] += size

    def _note(self, tensor: Tensor) -> None:
        """Recognise a storage from outside, so that views of it are not counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive and key not in self._outside:
            self._outside.add(key)
            weakref.finalize(storage, self._outside.discard, key)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._outside:
            return
        size, kind = storage.nbytes(), self.tag(tensor)
        self._alive[key] = size, kind
        self.now += size
        self._kinds[kind] += size
        self._small += size if size < LARGE else 0
        weakref.finalize(storage, self._freed, key)
        if self.now > self.peak:
            self.restart()

    def _freed(self, key: int) -> None:
        size, kind = self._alive.pop(key)
        self.now -= size
        self._kinds[kind] -= size
        self._small -= size if size < LARGE else 0


class DryRun(TorchDispatchMode):
    """Answers what a step asks of values that a meta tensor does not have.

    ``any`` is true (cores are not zero), other single values are 0 (not all of a batch's mask is
    1), the labelled positions are as many as was said, what goes to the CPU stays where it is, and
    fused attention keeps no scores.

    Args:
        labelled: labelled positions of a batch.
    """

    def __init__(self, labelled: int) -> None:
        super().__init__()
        self.labelled = labelled
        self._attention = patch.object(F, "scaled_dot_product_attention", _fused_attention)

    def __enter__(self) -> "DryRun":
        """Start answering."""
        # What it decomposes to on the meta device keeps all scores, unlike the kernels it stands for.
        self._attention.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop answering."""
        super().__exit__(*error)
        self._attention.stop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer, or run the operation."""
        kwargs = kwargs or {}
        operation = func.overloadpacket
        if operation is torch.ops.aten._local_scalar_dense and args[0].is_meta:
            return 0
        if operation is torch.ops.aten.any:
            return torch.ones((), dtype=torch.bool)
        if operation is torch.ops.aten.nonzero:
            return args[0].new_empty((self.labelled, args[0].ndim), dtype=torch.long)
        device = kwargs.get("device")
        if operation is torch.ops.aten._to_copy and device is not None and device.type == "cpu":
            return args[0]
        return func(*args, **kwargs)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    result: Tensor = _FusedAttention.apply(query, key, value, attn_mask)
    return result


class _FusedAttention(torch.autograd.Function):
    """Keeps its inputs, its output and a number for each row of scores, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = query.new_empty(query.shape)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
