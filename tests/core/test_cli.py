"The command as a user meets it."

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modeltc_lab.core import cli

ROOT = Path(__file__).resolve().parents[2]


def run(capsys, *argv):
    code = cli.main(list(argv))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_list(capsys):
    code, out, _ = run(capsys, "list", "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) == 10 and {r["state"] for r in rows if r["technique"] in ("Past-Future", "TokenSim")} == {"built"}
    assert {r["state"].split(" (")[0] for r in rows} <= {"built", "partly built", "not built yet"}


def test_data_list_names_everything(capsys):
    from modeltc_lab.core.data import REGISTRY
    out = run(capsys, "data", "list")[1]
    assert all(name in out for name in REGISTRY)


def test_experiments_exist(capsys):
    from importlib import import_module
    names = run(capsys, "run")[1].split()
    assert names == sorted(cli.experiments()) and "serving/past_future_memory" in names
    for target in cli.experiments().values():
        module, function = target.split(":")
        assert callable(getattr(import_module(module), function))


def test_run_writes_records_where_asked(capsys, tmp_path):
    code, out, _ = run(capsys, "run", "serving/past_future_cost", "--results", str(tmp_path))
    rows = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert code == 0 and "records in" in out and {r["x"] for r in rows} == {32, 128, 512, 1000}


@pytest.mark.parametrize("argv", [["nonsense"], ["data"], ["data", "get"], ["data", "get", "nothing"], ["run", "serving/nothing"], ["list", "--bad"], []])
def test_mistakes(capsys, argv):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_interrupt_and_closed_pipe(capsys, monkeypatch):
    import builtins
    monkeypatch.setattr(cli, "_rows", lambda rows: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert run(capsys, "list")[0] == 130
    monkeypatch.setattr(cli, "_rows", lambda rows: (_ for _ in ()).throw(BrokenPipeError()))
    monkeypatch.setattr(builtins, "open", lambda *a: sys.stdout)
    assert cli.main(["list"]) == 0


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "_rows", lambda rows: (_ for _ in ()).throw(RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"): cli.main(["list"])


def test_bad_settings_end_in_one_line():
    ran = subprocess.run([sys.executable, "-m", "modeltc_lab", "settings"], capture_output=True, text=True, cwd=ROOT,
                         env={"PATH": "/usr/bin", "MODELTC_LAB_SEED": "x", "HOME": "/"})
    assert ran.returncode == 2 and ran.stderr.strip() == "modeltc-lab: MODELTC_LAB_SEED: seed='x': need a whole number >= 0"


@pytest.mark.parametrize("argv", [["list"], ["--help"], ["data", "list", "--json"]])
def test_reader_that_has_gone(argv):
    "As in `modeltc-lab list | head -0`, with the output buffered as it is for users."
    import os
    end, start = os.pipe()
    os.close(end)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    ran = subprocess.run([sys.executable, "-m", "modeltc_lab", *argv], stdout=start, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    os.close(start)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_results_folder_is_tried_before_the_work(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(cli, "import_module", lambda name: pytest.fail("the work began") if name.endswith("studies") else __import__(name, fromlist=["x"]))
    code, out, err = run(capsys, "run", "serving/past_future_cost", "--results", str(tmp_path / "file" / "r"))
    assert code == 2 and out == "" and "name another with --results" in err and len(err.splitlines()) == 1


def test_percent_signs_in_docments(capsys, monkeypatch):
    def verb(
        share: str,          # in % of all
        most: bool = False,  # more than 50% of it
    ) -> None:
        "Takes 50% of it."
    monkeypatch.setitem(cli.CORE_VERBS, "verb", verb)
    assert "Takes 50% of it" in run(capsys, "--help")[1] and "more than 50% of it" in run(capsys, "verb", "--help")[1]


def test_core_stays_light():
    code = "import sys, modeltc_lab, modeltc_lab.core.cli as c, modeltc_lab.core.settings; c.build_parser(); print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    assert not {"torch", "plotly", "transformers", "pandas", "numba", "pydantic", "joblib", "ipywidgets"} & set(loaded)
