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
    assert code == 0 and len(rows) == 10 and {r["state"].split(" (")[0] for r in rows} == {"built", "partly built", "not built yet"}


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
    assert ran.returncode == 2 and ran.stderr.strip() == "modeltc-lab: MODELTC_LAB_SEED: seed='x': invalid literal for int() with base 10: 'x'"
