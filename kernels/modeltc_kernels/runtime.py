"""Where kernels run, decided before any of them is decorated: every kernel module imports this one first.

Without a CUDA device the interpreter is switched on (Triton reads TRITON_INTERPRET when a kernel is decorated), unless
the variable is set already: the compile check sets it to 0.
"""

import os
from functools import cache
from importlib import metadata

import torch

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in metadata.version(package).split("+")[0].split(".")[:2])


def interpreter_trouble(release=_release) -> str:
    "Why the interpreter would fail here, or nothing: Triton up to 3.6 turns one-element arrays into numbers, numpy from 2.4 on forbids it."
    triton, numpy = release("triton"), release("numpy")
    if triton > (3, 6) or numpy < (2, 4): return ""
    say = lambda version: ".".join(map(str, version))
    return f"the interpreter of triton {say(triton)} fails with numpy {say(numpy)}: need numpy below 2.4 (pip install 'numpy<2.4'), or a CUDA device"
