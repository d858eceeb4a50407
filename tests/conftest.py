"Shared test settings: one thread, no network, repeatable properties without time limits."

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import compiled  # noqa: E402, F401

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")
os.environ.setdefault("MODELTC_LAB_OFFLINE", "yes")  # tests never use the network

from hypothesis import settings  # noqa: E402

settings.register_profile("project", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("project")
