"The notebook runner: what it leaves out, what it reports, and when it does not run again."

import importlib.util
import json
import sys
from pathlib import Path

import nbformat
import pytest
import zmq

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    "docs/execute.py over an empty folder of notebooks."
    spec = importlib.util.spec_from_file_location("site_execute", ROOT / "docs" / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "NBS", tmp_path / "nbs")
    monkeypatch.setattr(module, "OUT", tmp_path / "executed")
    (tmp_path / "nbs").mkdir()
    return module


def write(folder, name, *sources):
    "A notebook of code cells."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources], metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})
    nbformat.write(nb, folder / f"{name}.ipynb")
    return (folder / f"{name}.ipynb").read_bytes()


def call(execute, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["execute.py", *arguments])
    return execute.main()


@pytest.mark.skipif(not zmq.has("ipc"), reason="this system has no sockets in files: kernels are reached through ports")
def test_kernels_are_not_reached_through_ports(execute, monkeypatch):
    "A free port may be taken before the kernel listens on it, which then dies: seen in a run of all tests, and often where a system has few free ports."
    write(execute.NBS, "01", "from ipykernel.connect import get_connection_info\nprint(get_connection_info(unpack=True)['transport'])")
    assert call(execute, monkeypatch) == 0
    assert nbformat.read(execute.OUT / "01.ipynb", as_version=4).cells[0].outputs[0].text == "ipc\n"


@pytest.mark.parametrize("source, skipped", [
    ("#| eval: false\n1/0", True), ("#| gpu\n1/0", True), ("#| slow\n1/0", True), ("#| peer\n1/0", True), ("#| notest\n1/0", True),
    ("#| hide\nx = 1", False), ("#| eval: true\n1", False), ("#| export\ndef slow(): return 1", False), ("x = '#| gpu'", False)])
def test_what_is_left_out(execute, source, skipped): assert execute.left_out(nbformat.v4.new_code_cell(source), execute.test_flags()) is skipped


def test_a_flag_brings_cells_back(execute):
    cell = nbformat.v4.new_code_cell("#| slow\n1")
    assert not execute.left_out(cell, execute.test_flags() - {"slow"})


def test_a_failure_is_named_and_the_others_still_run(execute, monkeypatch, capfd):
    "One good notebook, one bad one: exit code 1, the bad cell named, the good one's output kept, the sources untouched."
    nbs = execute.NBS
    good = write(nbs, "01_good", "import os\nprint(os.environ['PLOTLY_RENDERER'], os.path.basename(os.getcwd()))", "#| gpu\n1/0")
    bad = write(nbs, "00_bad", "x = 1", "raise ValueError('the message of the cell')")
    assert call(execute, monkeypatch) == 1
    said = capfd.readouterr().out
    assert "00_bad.ipynb: cell 1 failed" in said and "the message of the cell" in said
    assert said.strip().splitlines()[-1] == "notebooks: 1 passed, 1 failed, 1 cells skipped"
    assert (nbs / "01_good.ipynb").read_bytes() == good and (nbs / "00_bad.ipynb").read_bytes() == bad
    cells = nbformat.read(execute.OUT / "01_good.ipynb", as_version=4).cells
    assert cells[0].outputs[0].text == "plotly_mimetype nbs\n" and cells[1].outputs == []
    assert json.loads((execute.OUT / "summary.json").read_text()) == {"passed": 1, "failed": 1, "skipped": 1}


def test_unchanged_is_not_run_again(execute, monkeypatch, capfd):
    "The second call runs nothing; a changed notebook, or --force, runs again."
    write(execute.NBS, "00_a", "1")
    assert call(execute, monkeypatch) == 0 and "unchanged" not in capfd.readouterr().out
    assert call(execute, monkeypatch) == 0 and "00_a.ipynb: unchanged" in capfd.readouterr().out
    write(execute.NBS, "00_a", "2")
    assert call(execute, monkeypatch) == 0 and "unchanged" not in capfd.readouterr().out


def test_what_can_change_an_output_is_in_the_fingerprint(execute, monkeypatch, tmp_path):
    "Package, kernels and records: another byte in any of them is another fingerprint."
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    seen = set()
    for name in ("modeltc_lab/core/x.py", "kernels/modeltc_kernels/y.py", "docs/results/core/z/cpu.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        for text in ("a", "b"):
            path.write_text(text)
            seen.add(execute.fingerprint())
    assert len(seen) == 6
