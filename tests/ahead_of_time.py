# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels compiled for a GPU on a machine without one."""

import re
import subprocess
from pathlib import Path

import pytest


def compile_kernel(module, name, constants, pointers, num_warps, folder, monkeypatch, capability=90):
    """Kernel `name` of `module` for CUDA devices of `capability`, its sizes int32 and its pointers' types given.

    `support` is the one scalar that is not a size. Fails if it needs more shared memory than every GPU has.
    """
    import triton

    try:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:  # internals, which a release of Triton may move
        pytest.skip(f"this Triton compiles ahead of time in another way: {error}")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    function = getattr(module, name)
    signature = {
        argument: "constexpr" if argument in constants
        else pointers.get(argument, "*fp32") if argument.endswith("_ptr")
        else "fp32" if argument == "support"
        else "i32"
        for argument in function.arg_names
    }  # fmt: skip
    compiled = triton.compile(
        ASTSource(function, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, **module._OPTIONS},
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 48 * 1024
    return compiled


def local_memory(cubin, folder):
    """Bytes of the stack and of local memory of a compiled kernel: what is spilled lies there. None if unknown."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not program.exists():
        return None
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    report = subprocess.run([program, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
    return [int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", report.stdout)]
