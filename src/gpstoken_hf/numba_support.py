# Copyright 2026 The gpstoken-hf authors. Licensed under the Apache License, Version 2.0.
"""Numba where it is installed: compiled loops for the CPU, and plain Python in their place where it is not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

try:
    import numba
    from numba.core import event as numba_event
except ImportError:  # an optional dependency: the PyTorch paths take over, see `is_available`
    numba = None

logger = logging.getLogger(__name__)

_functions: set[Callable[..., Any]] = set()


def is_available() -> bool:
    """Whether numba is installed, so that compiled loops can run."""
    return numba is not None


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`numba.njit` without the GIL, compiled at the first call and cached on disk where a cache can be written.

    Use as `@compiled` or `@compiled(fastmath=...)`. Numba looks for the cache folder when the function is defined and
    raises if there is none (a read-only installation, no home directory); the function is then compiled once per
    process. Without numba the function stays plain Python.
    """
    if function is None:
        return lambda function: compiled(function, **options)
    if numba is None:
        return function
    _functions.add(function)
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(nogil=True, **options)(function)


if numba is not None:

    class _CompileNotice(numba_event.Listener):
        """Logs once in a process, when numba starts to compile one of our functions and not when it loads one."""

        given = False

        def on_start(self, event: Any) -> None:
            if not self.given and event.data["dispatcher"].py_func in _functions:
                self.given = True
                # As a warning, because lower levels are hidden unless the user has set up logging.
                logger.warning(
                    "Compiling loops for the CPU with numba. This takes a few seconds and is cached on disk."
                )

        def on_end(self, event: Any) -> None:
            pass

    numba_event.register("numba:compile", _CompileNotice())
