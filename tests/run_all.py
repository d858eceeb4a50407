"""Everything, in order: what `make test` and `.ci/run` run. Each step prints its name and time; the last line is the total count."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compiled  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
QUIET = {"OMP_NUM_THREADS": "1", "PLOTLY_RENDERER": "plotly_mimetype", "PYTHONWARNINGS": "ignore::DeprecationWarning"}
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
STEPS = [  # what stands in one row runs side by side
    [("ruff", [BIN / "ruff", "check", "--quiet", "."])],
    [("types", [BIN / "mypy"]), ("kernels compile for sm_90", [sys.executable, "kernels/bench/compile_check.py"]), ("wheel tests", [*PYTEST, "tests/wheel"])],
    [("tests", [*PYTEST, "-n", "2", "--dist", "loadfile", "tests", "--ignore=tests/browser", "--ignore=tests/docs", "--ignore=tests/wheel"])],
    [("notebooks", [sys.executable, "docs/execute.py"])],
    [("site", [sys.executable, "docs/build.py"])],
    [("site tests", [*PYTEST, "tests/docs"])],
    [("browser tests", [*PYTEST, "-n", "2", "--dist", "loadfile", "tests/browser"])]]
SUMMARY = ROOT / "docs/_build/executed/summary.json"
COUNT = re.compile(r"(\d+) (passed|failed|skipped|error)")


def counted(name, command, code, tail):
    "What a step counted: tests from their closing line, notebooks from their summary, anything else as one."
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    if "pytest" in map(str, command):
        closing = next((line for line in reversed(tail) if re.search(r"\d+ \w+.* in [\d.]+s", line)), "")  # a library may speak after it
        for number, what in COUNT.findall(closing): counts["failed" if what == "error" else what] += int(number)
    elif name == "notebooks": counts = json.loads(SUMMARY.read_text()) if SUMMARY.exists() else counts
    else: counts["passed" if code == 0 else "failed"] = 1
    return {**counts, "failed": max(counts["failed"], int(code != 0))}


def run(name, command, aloud=True):
    "Run one step; aloud, its output is on the screen as it comes, else at its end. Returns its exit code, counts and the lines that name what failed."
    say = (lambda text: print(text, end="", flush=True)) if aloud else (said := []).append
    say(f"\n=== {name}\n")
    if name == "notebooks": SUMMARY.unlink(missing_ok=True)  # what an earlier run counted is not this run's
    start, tail, faults = time.time(), [], []
    with subprocess.Popen([str(c) for c in command], cwd=ROOT, env={**os.environ, **QUIET}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as p:
        for line in p.stdout or ():
            if "[IPKernelApp]" in line: continue
            say(line)
            tail = [*tail[-5:], line]
            if line.startswith(("FAILED ", "ERROR ")): faults.append(line)
    say(f"--- {name}: {time.time() - start:.0f} s, exit {p.returncode}\n")
    if not aloud: print("".join(said), end="", flush=True)
    return p.returncode, counted(name, command, p.returncode, tail), faults


def run_row(steps):
    "Run steps side by side; the first is heard as it goes, the others at their end."
    with ThreadPoolExecutor(len(steps)) as pool: return list(pool.map(lambda job: run(*job[1], aloud=job[0] == 0), enumerate(steps)))


def main():
    start, total, red, faults = time.time(), {"passed": 0, "failed": 0, "skipped": 0}, [], []
    for steps in STEPS:
        for (name, _), (code, counts, said) in zip(steps, run_row(steps)):
            total = {k: total[k] + counts[k] for k in total}
            if code: red.append(name)
            faults += said
    print("\n" + "".join(faults), end="")
    print(f"\nall steps: {time.time() - start:.0f} s" + (f"; failed: {', '.join(red)}" if red else ""))
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped", flush=True)
    return 1 if red else 0


if __name__ == "__main__": sys.exit(main())
