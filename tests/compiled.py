"Compiled code of these sources only: numba does not notice a change in a function that another file has compiled in, so each version of the sources gets a folder of its own."

import hashlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def folder(base):
    "Where numba keeps what it compiles from the sources as they are."
    sources = b"".join(p.read_bytes() for p in sorted((ROOT / "modeltc_lab").rglob("*.py")))
    return str(Path(base) / hashlib.sha256(sources).hexdigest()[:12])


if "MODELTC_COMPILED" not in os.environ:
    os.environ["NUMBA_CACHE_DIR"] = os.environ["MODELTC_COMPILED"] = folder(os.environ.get("NUMBA_CACHE_DIR", ROOT / ".venv/numba"))
