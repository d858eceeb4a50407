"Shared test settings: one thread, repeatable properties, no time limits, and a count of skips at the end."

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")

from hypothesis import settings  # noqa: E402

settings.register_profile("project", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("project")
