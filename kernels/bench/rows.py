"""Records without dependencies: the rows of `modeltc_lab.core.results`, for machines where only torch and triton are installed."""

import datetime
import json
import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def slug(text):
    "A name that can be a file name."
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@cache
def _commit():
    try: return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"
    except OSError: return "unknown"  # no git


@cache
def _version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None


def row(experiment, method, metric, unit, samples, *, device, implementation="modeltc_kernels", x_name=None, x=None, config=None):
    "One record of the kernels room."
    versions = {"python": platform.python_version(), **{p: _version(p) for p in ("torch", "triton", "numpy") if _version(p)}}
    found = dict(domain="kernels", experiment=experiment, method=method, implementation=implementation, metric=metric, unit=unit, x_name=x_name, x=x,
                 samples=[float(s) for s in samples], config=config or {}, commit=_commit(),
                 date=datetime.date.today().isoformat(), device=slug(device), versions=versions)
    return {k: v for k, v in found.items() if v is not None}


def save(rows, out=None):
    "Write rows where records live, or to a file of one's own."
    first = rows[0]
    path = Path(out) if out else ROOT / "docs/results/kernels" / first["experiment"] / f"{first['device']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("[\n" + ",\n".join(json.dumps(r, sort_keys=True) for r in rows) + "\n]\n")
    os.replace(part, path)
    return path
