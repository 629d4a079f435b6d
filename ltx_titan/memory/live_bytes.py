"""Counts the bytes that tensors hold, on any device and for fake tensors.

A CPU allocator reports no statistics and a fake tensor has no memory, but both have storages: a dispatch mode registers
the storage of every operation's results, and a finalizer removes it when it is freed. FSDP2 frees and refills storages
with `resize_`, which is not dispatched, so it is patched.
"""

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context in which `now` and `peak` count the bytes of all storages created in it or passed to `add`.

    Attributes:
        now: bytes held.
        peak: largest `now` since the last `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._resize: Callable | None = None

    def add(self, *tensors: Tensor) -> None:
        """Also counts tensors created outside the context."""
        for tensor in tensors:
            self._register(tensor)

    def reset(self) -> None:
        """Starts a new peak at the current number of bytes."""
        self.peak = self.now

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._register(leaf)
        return out

    def __enter__(self) -> Self:
        counter, resize = self, torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            key = storage._cdata
            if key in counter._sizes:
                counter._set(key, storage.nbytes())

        self._resize = resize
        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign, assignment]
        super().__exit__(kind, error, trace)

    def _register(self, tensor: Tensor) -> None:
        inner = getattr(tensor, "_local_tensor", tensor)
        try:
            storage = inner.untyped_storage()
        except NotImplementedError:  # a wrapper subclass; its inner tensors are dispatched too
            return
        key = storage._cdata  # views share their storage, which is counted once
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
            self._sizes[key] = 0
        # An operation may have grown a storage that is known already, such as an out= argument.
        if self._sizes[key] != storage.nbytes():
            self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        self.now += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
