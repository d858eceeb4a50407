"""Compiled code of these sources only: numba does not notice a change in a function that another file has compiled in, so each version of the sources gets a folder of its own.

Functions of a notebook's cells are compiled in its kernel; numba keeps them in IPython's cache folder, wherever that is. `KERNEL` puts it inside the same folder, so that
whoever runs a notebook first, the execution or the browser, compiles for both.
"""

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
Path(os.environ["MODELTC_COMPILED"]).mkdir(parents=True, exist_ok=True)  # IPython takes another folder when this one is not there
KERNEL = {"XDG_CACHE_HOME": os.environ["MODELTC_COMPILED"]}  # of a notebook's kernel
