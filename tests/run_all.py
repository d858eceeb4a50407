"""Everything, in order: what `make test` and `.ci/run` run. Each step prints its name and time; the last line is the total count."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import compiled  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
QUIET = {"OMP_NUM_THREADS": "1", "PLOTLY_RENDERER": "plotly_mimetype", "PYTHONWARNINGS": "ignore::DeprecationWarning"}
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
STEPS = [
    ("ruff", [BIN / "ruff", "check", "--quiet", "."]),
    ("types", [BIN / "mypy"]),
    ("kernels compile for sm_90", [sys.executable, "kernels/bench/compile_check.py"]),
    ("tests", [*PYTEST, "-n", "2", "--dist", "loadfile", "tests", "--ignore=tests/browser", "--ignore=tests/docs", "--ignore=tests/wheel"]),
    ("notebooks", [sys.executable, "docs/execute.py"]),
    ("site", [sys.executable, "docs/build.py"]),
    ("site tests", [*PYTEST, "tests/docs"]),
    ("browser tests", [*PYTEST, "tests/browser"]),
    ("wheel tests", [*PYTEST, "tests/wheel"])]
SUMMARY = ROOT / "docs/_build/executed/summary.json"
COUNT = re.compile(r"(\d+) (passed|failed|skipped|error)")


def run(name, command):
    "Run one step with its output on the screen; returns its exit code and the counts in its closing line."
    print(f"\n=== {name}", flush=True)
    if name == "notebooks": SUMMARY.unlink(missing_ok=True)  # what an earlier run counted is not this run's
    start, tail = time.time(), []
    with subprocess.Popen([str(c) for c in command], cwd=ROOT, env={**os.environ, **QUIET}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as p:
        for line in p.stdout or ():
            if "[IPKernelApp]" in line: continue
            print(line, end="", flush=True)
            tail = [*tail[-5:], line]
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    if "pytest" in map(str, command):
        closing = next((line for line in reversed(tail) if re.search(r"\d+ \w+.* in [\d.]+s", line)), "")  # a library may speak after it
        for number, what in COUNT.findall(closing): counts["failed" if what == "error" else what] += int(number)
    elif name == "notebooks": counts = json.loads(SUMMARY.read_text()) if SUMMARY.exists() else counts
    else: counts["passed" if p.returncode == 0 else "failed"] = 1
    if p.returncode and not counts["failed"]: counts["failed"] = 1
    print(f"--- {name}: {time.time() - start:.0f} s, exit {p.returncode}", flush=True)
    return p.returncode, counts


def main():
    start, total, red = time.time(), {"passed": 0, "failed": 0, "skipped": 0}, []
    for name, command in STEPS:
        code, counts = run(name, command)
        total = {k: total[k] + counts[k] for k in total}
        if code: red.append(name)
    print(f"\nall steps: {time.time() - start:.0f} s" + (f"; failed: {', '.join(red)}" if red else ""))
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped", flush=True)
    return 1 if red else 0


if __name__ == "__main__": sys.exit(main())
