"The compile check for a GPU that is not there: it compiles, it reads, and it can say no."

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "kernels/bench/compile_check.py"


def run(*args, code=None):
    "A process of its own, as users start it, from an environment that interprets; `code` runs in place of the script."
    command = [sys.executable, *(["-c", f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import compile_check as c\n{code}"] if code else [SCRIPT, *args])]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})


@pytest.fixture(scope="module", autouse=True)
def tools():
    if importlib.util.find_spec("triton.backends.nvidia") is None: pytest.skip("this triton has no NVIDIA back end")


def test_common_variants_keep_their_loads_in_flight():
    "Registers are read, nothing spills, and keys and values have two buffers: otherwise a block is waited for as soon as it is asked for."
    done = run("--json", "--only", "bf16 e=128 page=16 GQA 4 split")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout).values()
    assert 32 <= found["registers"] <= 168 and found["spill stores"] == found["spill loads"] == found["stack"] == 0
    two_buffers_of_keys_and_values = 2 * 2 * 64 * 128 * 2
    assert two_buffers_of_keys_and_values <= found["shared memory"] <= 227 * 1024


def test_a_spilling_kernel_is_refused():
    "Full-precision products of wide heads with half of the warps they get."
    done = run(code="""
fn, signature, const, options = c.forward("fp32", 256, 16, 4, True)
c.VARIANTS = {"spilling": (fn, signature, const, dict(num_warps=4, num_stages=4))}
sys.argv = ["compile_check"]
sys.exit(c.main())""")
    assert done.returncode == 1 and "over budget: spilling: " in done.stderr and "spill stores" in done.stderr


def test_budgets_bind_one_compiler_and_limits_bind_all():
    done = run(code="""
fits = {"registers": 96, "stack": 0, "shared memory": 70000, "spill stores": 0, "spill loads": 0}
name = "paged_decode bf16 e=128 page=16 GQA 4 split"
assert c.over_budget(name, fits, "3.6.0") == []
assert c.over_budget(name, {**fits, "registers": 200}, "3.6.1") == ["registers 200, allowed 168"]
assert c.over_budget(name, {**fits, "registers": 200}, "3.60.0") == c.over_budget(name, {**fits, "registers": 200}, "3.9.0") == []
assert c.over_budget(name, {**fits, "spill loads": 4}, "3.9.0") == ["spill loads 4, allowed 0"]
assert c.over_budget("other", {**fits, "shared memory": 240000}, "3.6.0") == ["shared memory 240000, allowed 232448"]
assert all(any(part in v for v in c.VARIANTS) for part in c.BUDGETS)
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args, message", [(("--only", "nothing"), "names no variant"), (("--only", "merge", "--write"), "goes without --write")])
def test_bad_arguments(args, message):
    done = run(*args)
    assert done.returncode == 2 and message in done.stderr
