"""Where kernels run, decided before any of them is decorated: every kernel module imports this one first.

Without a CUDA device the interpreter is switched on (Triton reads TRITON_INTERPRET when a kernel is decorated), unless
the variable is set already: the compile check sets it to 0.
"""

import os

import torch

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
