"""Where a program waits for an accelerator, found without one."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# what copies a tensor's elements to the host, by its name in Python
_READ = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"}
# operations whose output has a size that only the elements tell
_SIZED = {"nonzero", "masked_select", "unique_consecutive", "unique_dim", "_unique", "_unique2", "repeat_interleave"}
_FROM_HOST = {"tensor", "as_tensor"}


class HostReads:
    """Notes what would wait for an accelerator, were the tensors of this type of device on one.

    Attributes:
        device_type: of the tensors that count.
        found: how often which operation would.
    """

    def __init__(self, device_type: str) -> None:
        self.device_type, self.found = device_type, Counter()

    def counts(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self.device_type


class _PythonCalls(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        out = func(*args, **kwargs)
        copied = self.reads.device_type != "cpu" and name in _FROM_HOST and self.reads.counts(out)
        if (name in _READ and self.reads.counts(args[0])) or (copied and not self.reads.counts(args[0])):
            self.reads.found[name] += 1
        return out


class _Operations(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        packet, kwargs = func.overloadpacket.__name__, kwargs or {}
        by_mask = packet in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        sized = by_mask or (packet in _SIZED and kwargs.get("output_size") is None)
        out = func(*args, **kwargs)
        copied = packet in ("_to_copy", "copy_") and len({t.device for t in (*args, out) if isinstance(t, Tensor)}) > 1
        if (sized and self.reads.counts(args[0])) or copied:
            self.reads.found[packet] += 1
        return out


@contextlib.contextmanager
def host_reads(device_type: str) -> Iterator[HostReads]:
    """Find what waits: elements read on the host, sizes that elements decide, tensors copied between devices."""
    reads = HostReads(device_type)
    with _PythonCalls(reads), _Operations(reads):
        yield reads
