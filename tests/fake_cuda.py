# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""What would run on CUDA, run with fake CUDA tensors, which need no GPU, to see that the host waits for nothing."""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpstoken_hf import partition_torch


class ReadBackError(AssertionError):
    """The host reads what the GPU has still to compute, or a copy waits for the GPU."""


def storage_key(tensor):
    return tensor.untyped_storage()._cdata


class Watch(TorchDispatchMode):
    """Writes down the operations in order; raises where one makes the host wait for a CUDA device."""

    def __init__(self):
        super().__init__()
        self.is_watching = True
        self.log = []
        self.pinned = []
        # Storages of tensors on the CPU that copies from CUDA are on their way to, and of what was computed from them.
        # Storages, as views share them; kept, so that no other gets the same address.
        self.arriving = {}

    @contextmanager
    def look_away(self):
        """For what is prepared beforehand, where the host may wait."""
        self.is_watching = False
        yield
        self.is_watching = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().removeprefix("aten::")
        if not self.is_watching or name.startswith("prim::"):  # questions about a tensor, not work
            return function(*args, **kwargs)
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        on_cuda = any(tensor.is_cuda for tensor in tensors)
        if on_cuda and name.split(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"):
            raise ReadBackError(name)
        if name.startswith("index.") and any(index.dtype == torch.bool for index in args[1] if index is not None):
            raise ReadBackError("index by a mask")
        arriving = any(storage_key(tensor) in self.arriving for tensor in tensors)
        if name == "_local_scalar_dense":
            if arriving:
                raise ReadBackError("a number is read before it has been waited for")
            return 0.0  # a fake tensor has none; this one is valid everywhere
        if name in ("_to_copy", "copy_"):
            source = tensors[-1]
            target = kwargs.get("device", source.device) if name == "_to_copy" else tensors[0].device
            non_blocking = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
            if source.device.type != torch.device(target).type:
                name = f"copy {source.device.type} to {torch.device(target).type}"
                if not non_blocking:
                    raise ReadBackError(f"{name}, blocking")
                if source.device.type == "cpu" and not any(source is tensor for tensor in self.pinned):
                    raise ReadBackError(f"{name} from pageable memory")
        self.log.append(name)
        result = function(*args, **kwargs)
        if isinstance(result, torch.Tensor) and (arriving or name == "copy cuda to cpu"):
            self.arriving[storage_key(result)] = result
        return result


@contextmanager
def watched_fake_cuda(monkeypatch):
    """`Watch` over fake CUDA tensors, which need no GPU, with stand-ins for what would start CUDA."""
    mode = Watch()

    class Stream:
        cuda_stream = 0

    class Event:
        def record(self, stream):
            mode.log.append("event recorded")
            self.before = list(mode.arriving)

        def synchronize(self):
            mode.log.append("event waited for")
            for key in self.before:
                mode.arriving.pop(key, None)

    def pin_memory(tensor):
        mode.pinned.append(tensor.clone())
        return mode.pinned[-1]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    # Fake tensors must not be kept for other tests, nor real ones be found here.
    partition_torch._region_tensors.cache_clear()
    with FakeTensorMode():
        try:
            torch.empty(2, device="cuda")[:1]
        except RuntimeError as error:
            # torch 2.7 asks the driver to do it, of which there is none.
            if "CUDA" not in str(error) and "NVIDIA" not in str(error):
                raise
            pytest.skip("this version of torch starts CUDA to index a fake tensor")
        with mode:
            yield mode
    partition_torch._region_tensors.cache_clear()
