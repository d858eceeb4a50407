"""Run every notebook in a real Jupyter kernel, on a copy: the notebooks' test and the feed of the site.

    python docs/execute.py [NOTEBOOK ...] [--flags slow,gpu] [--jobs 2] [--force]

Executed copies go to docs/_build/executed. A notebook that has not changed since its last good run, in a package and with
records that have not changed either, is not run again.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import zmq
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import compiled  # noqa: E402

NBS, OUT = ROOT / "nbs", ROOT / "docs" / "_build" / "executed"
QUIET = {"PLOTLY_RENDERER": "plotly_mimetype", "OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "TQDM_DISABLE": "1"}
CELL_TIMEOUT_S = 600
ANSI = r"\x1b\[[0-9;]*m"  # colours of a traceback


def test_flags():
    "Flags whose cells are left out unless asked for."
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["nbdev"]["tst_flags"])


def left_out(cell, flags):
    "Is this cell not to be run?"
    lines = re.findall(r"^#\|\s*(.+?)\s*$", cell.source, flags=re.M)
    return any(re.fullmatch(r"eval:\s*false", line) for line in lines) or bool(set(lines) & flags)


def fingerprint():
    "A hash of everything but the notebook that can change its outputs."
    digest = hashlib.sha256()
    for folder, pattern in (("modeltc_lab", "**/*.py"), ("kernels", "**/*.py"), ("docs/results", "**/*.json")):
        for path in sorted((ROOT / folder).glob(pattern)): digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


class Runner(NotebookClient):
    "A client that passes over cells which are left out."

    left_out_flags: set = set()
    skipped = 0

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        if cell.cell_type == "code" and left_out(cell, self.left_out_flags):
            self.skipped += 1
            return cell
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)


def wires(folder):
    "How a kernel is reached: through files of its own. A free port can be taken by somebody else before the kernel listens on it."
    return Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}} if zmq.has("ipc") else {})


def run(path, flags, state, force):
    "Execute one notebook; returns (ok, message, cells left out); of a failure the last line says what it was."
    relative = path.relative_to(NBS)
    target, stamp = OUT / relative, OUT / relative.with_suffix(".stamp")
    key = hashlib.sha256(path.read_bytes() + state.encode() + " ".join(sorted(flags)).encode()).hexdigest()
    if not force and target.is_file() and stamp.is_file() and stamp.read_text().split()[0] == key:
        return True, f"{relative}: unchanged", int(stamp.read_text().split()[1])
    stamp.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    nb = nbformat.read(path, as_version=4)
    start = time.time()
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        client = Runner(nb, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}, config=wires(folder))
        client.left_out_flags = flags
        try: client.execute(env={**os.environ, **QUIET, **compiled.KERNEL})
        except CellExecutionError as e:
            at = next(i for i, c in enumerate(nb.cells) if any(o.output_type == "error" for o in c.get("outputs", [])))
            head = nb.cells[at].source.strip().splitlines()[:6]
            return False, f"{relative}: cell {at} failed\n    " + "\n    ".join(head) + f"\n{e.traceback[-3000:].rstrip()}", client.skipped
        except Exception as e: return False, f"{relative}: {type(e).__name__}: {e}", client.skipped
    nbformat.write(nb, target)
    stamp.write_text(f"{key} {client.skipped}")
    return True, f"{relative}: {time.time() - start:.0f} s", client.skipped


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--flags", default="", help="comma-separated flags whose cells are run after all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="run even what has not changed")
    args = parser.parse_args()
    flags = test_flags() - set(args.flags.split(","))
    paths = [p.resolve() for p in args.notebooks] or sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    if not args.notebooks:  # copies of notebooks that are gone
        for old in OUT.rglob("*.ipynb"):
            if not (NBS / old.relative_to(OUT)).is_file(): old.unlink()
    failed, skipped, state = list[str](), 0, fingerprint()
    with ThreadPoolExecutor(args.jobs) as pool:
        for ok, message, cells in pool.map(lambda p: run(p, flags, state, args.force), paths):
            print(message, flush=True)
            failed, skipped = failed + [message] * (not ok), skipped + cells
    summary = {"passed": len(paths) - len(failed), "failed": len(failed), "skipped": skipped}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "summary.json").write_text(json.dumps(summary))
    for lines in map(str.splitlines, failed): print(f"FAILED {lines[0]}: {re.sub(ANSI, '', lines[-1])[:300]}")
    print(f"notebooks: {summary['passed']} passed, {len(failed)} failed, {skipped} cells skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
