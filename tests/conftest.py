"Shared test settings: one thread, no network, repeatable properties without time limits."

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import compiled  # noqa: E402, F401

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")
os.environ.setdefault("MODELTC_LAB_OFFLINE", "yes")  # tests never use the network

import torch  # noqa: E402

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its own functions are decorated then

try: from hypothesis import HealthCheck, settings  # noqa: E402, I001
except ImportError: pass  # the kernels' tests also run on a bare GPU machine
else:
    settings.register_profile("project", deadline=None, derandomize=True, print_blob=False, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("project")
