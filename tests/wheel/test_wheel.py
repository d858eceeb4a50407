"The wheel holds what it should, and works in an empty folder with nothing of the lab."

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def call(*command, cwd=None):
    "Run a command; its output, or the test fails with what it said."
    ran = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-2000:]
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "sdist from a clean copy, wheel from the sdist."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode: pytest.skip("not a git checkout")
    for name in files.stdout.splitlines():
        if not (ROOT / name).is_file(): continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    "A fresh environment with the wheel, and the dependencies of this one after it on the path."
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=True)
    py = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    call(py, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    site = Path(call(py, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    import numpy
    (site / "zz_dependencies.pth").write_text(str(Path(numpy.__file__).parents[1]) + "\n")
    return py


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("modeltc_lab/py.typed", "modeltc_lab/core/cli.py", "modeltc_lab/serving/past_future.py", "modeltc_lab/decoding/grammars.py", "modeltc_kernels/paged_decode.py", "modeltc_kernels/py.typed"):
        assert needed in names
    assert any(n.endswith("LICENSE") for n in names)
    assert [n for n in names if n.split("/")[0] not in ("modeltc_lab", "modeltc_kernels") and ".dist-info/" not in n] == []


def test_requires_nothing_of_the_lab(wheel):
    z = zipfile.ZipFile(wheel)
    lines = z.read(next(n for n in z.namelist() if n.endswith("METADATA"))).decode().splitlines()
    plain = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert plain and not any(word in line for line in plain for word in ("jupyterlab", "nbdev", "sphinx", "pytest", "playwright"))


def test_works_installed(python, tmp_path):
    where = call(python, "-c", "import modeltc_lab, modeltc_kernels; print(modeltc_lab.__file__); print(modeltc_kernels.__file__)", cwd=tmp_path)
    assert str(ROOT) not in where
    command = python.parent / "modeltc-lab"
    assert "sim" in call(command, "--help", cwd=tmp_path)
    assert "Past-Future" in call(command, "list", cwd=tmp_path)
    answer = json.loads(call(command, "sim", "--policy", "past_future", "--requests", "50", "--json", cwd=tmp_path))
    assert answer["config"]["generated"] is True and answer["results"][0]["requests"] == 50
    (tmp_path / "lengths.txt").write_text("\n".join(map(str, [300, 9000, 500, 700, 120] * 400)))
    answer = json.loads(call(command, "pack", "lengths.txt", "--capacity", "16384", "--groups", "one", "--world", "8", "--json", cwd=tmp_path))
    assert answer["bins"] >= answer["lower_bound"] and answer["documents"] == 2000 and answer["lost_tokens"] == 0
