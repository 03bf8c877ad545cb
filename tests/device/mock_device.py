"""The torch device "mock": an accelerator of ordinary memory, which reports its waits and copies.

Tensors on it behave as on a GPU: parameters keep their identity when a module moves, the backward
pass runs in a thread of its own, a generator belongs to its device, and operands on two devices are
refused. Its numbers are the CPU's.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
COMPILER = shutil.which("c++")
KINDS = ("wait", "copy", "kernel")
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p)


def built() -> Path:
    """Return the library of the device, compiled once per source and version of torch."""
    source = HERE / "mock_device.cpp"
    digest = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = HERE.parents[1] / "build" / f"mock-device-{digest}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            include = [f"-I{path}" for path in cpp_extension.include_paths()]
            torch_libraries = cpp_extension.library_paths()[0]
            command = [
                *(COMPILER, "-std=c++20", "-O0", "-shared", "-fPIC", "-w", str(source)),
                *(*include, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"),
                *(f"-L{torch_libraries}", "-lc10", "-ltorch_cpu", "-o", str(made)),
            ]
            subprocess.run(command, check=True)
            os.replace(made, library)  # whole, also where two processes compile it
    return library


@cache
def load() -> ctypes.CDLL:
    """Make the device, once per process, and have the Trainer choose it."""
    native = ctypes.CDLL(str(built()))
    torch.utils.rename_privateuse1_backend("mock")
    operators = torch.ops.mock_device
    module: Any = types.ModuleType("torch.mock")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = module.synchronize = module._lazy_init = lambda device=None: None
    module.empty_cache = lambda: None
    module._is_in_bad_fork = lambda: False
    module.manual_seed = module.manual_seed_all = operators.manual_seed
    module.get_rng_state = lambda device=0: operators.get_rng_state()
    module.set_rng_state = lambda state, device=0: operators.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16, torch.float32]
    torch._register_device_module("mock", module)
    torch.utils.generate_methods_for_privateuse1_backend()
    os.environ["ACCELERATE_TORCH_DEVICE"] = "mock:0"
    return native


class Events(Counter[tuple[str, str, str]]):
    """How often each (kind, operator, place) occurred; a place is a file and a line."""

    def of(self, kind: str) -> dict[str, int]:
        """Return how often events of ``kind`` occurred, by place and operator."""
        found: Counter[str] = Counter()
        for (which, name, place), count in self.items():
            if which == kind:
                found[f"{place} {name}"] += count
        return dict(found)


@contextmanager
def watched() -> Iterator[Events]:
    """Count the events of the block, with places in the file that is neither torch's nor Pyro's."""
    native, events = load(), Events()

    @_Callback
    def heard(kind: int, name: bytes) -> None:
        place = "" if KINDS[kind] == "kernel" else _place()
        events[KINDS[kind], name.decode(), place] += 1

    native.mock_device_listen(heard)
    try:
        yield events
    finally:
        native.mock_device_listen(_Callback(0))


def _place() -> str:
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    named = [f for f in frames if not {"torch", "pyro"} & set(Path(f.filename).parts)]
    innermost = (named or frames)[-1]
    parts = Path(innermost.filename).parts
    start = max((i for i, part in enumerate(parts) if part in _ROOTS), default=len(parts) - 2)
    return f"{'/'.join(parts[start:])}:{innermost.lineno}"


_ROOTS = ("pyrolora", "transformers", "accelerate", "tests")
