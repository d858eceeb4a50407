"Records: validation, atomic files, rendering; and the rows kernels write without this package."

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeltc_lab.core import results
from modeltc_lab.core.cli import experiments

ROOT = Path(__file__).resolve().parents[2]
make = lambda samples=(1.0,), **k: results.record("core", k.pop("experiment", "t"), k.pop("method", "m"), "metric", "ms", list(samples), **k)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20))
def test_round_trip_and_median(tmp_path_factory, samples):
    import statistics
    root, r = tmp_path_factory.mktemp("r"), make(samples, x_name="n", x=3, config={"a": [1, "b"]}, seed=[1, 2])
    results.write([r], root)
    assert results.read(root=root) == [r] and r.median == pytest.approx(statistics.median(samples))


def test_writing_replaces_and_a_failed_write_keeps_the_old(tmp_path, monkeypatch):
    path = results.write([make([1.0])], tmp_path)
    results.write([make([2.0])], tmp_path)
    assert results.read(root=tmp_path)[0].samples == [2.0]
    monkeypatch.setattr(results.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError): results.write([make([3.0])], tmp_path)
    assert results.read(root=tmp_path)[0].samples == [2.0] and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("bad", [dict(samples=[]), dict(samples=[float("inf")]), dict(experiment="a b"), dict(method=""), dict(device="a/b"), dict(device="../x"), dict(device="a b"),
                                 dict(wall_s=float("nan")), dict(x=float("inf")), dict(config={"a": [float("nan")]}), dict(config={"a": {1}})])
def test_bad_records_are_refused(bad):
    with pytest.raises(ValueError): make(**bad)


def test_a_file_that_is_no_record_is_named(tmp_path):
    folder = tmp_path / "core" / "t"
    folder.mkdir(parents=True)
    (folder / "cpu.json").write_text('[{"domain": "core"}]')
    with pytest.raises(ValueError, match="cpu.json: not a file of records"): results.read(root=tmp_path)


@given(st.floats(1e-6, 1e12))
def test_numbers_keep_three_digits(value):
    shown = float(results.number(value).replace(",", ""))
    assert shown == pytest.approx(value, rel=0.006) or value < 1e-4


def test_committed_records_have_a_command_and_one_meaning():
    records = results.read(root=ROOT / "docs" / "results")
    assert records
    known = set(experiments()) | {f"kernels/{family}_{what}" for family in ("paged_decode", "constrained", "varlen_attention") for what in ("resources", "speed", "step")}
    scripts = "".join(p.read_text() for p in (ROOT / "tests/peers").glob("*.*"))
    assert {f"{r.domain}/{r.experiment}" for r in records if f'"{r.experiment}"' not in scripts} <= known
    for experiment in {(r.domain, r.experiment, r.device) for r in records}:
        mine = [r for r in records if (r.domain, r.experiment, r.device) == experiment]
        more = results.telling(mine)                                                      # "language", "vocabulary"; not what went wrong
        keys = [(r.method, r.metric, r.x, r.implementation, *(str(r.config.get(n)) for n in more)) for r in mine]
        assert len(set(keys)) == len(keys) and "why" not in more, experiment
    assert not any(r.interpreted and "s" == r.unit for r in records)


def test_kernel_rows_are_records():
    spec = importlib.util.spec_from_file_location("rows", ROOT / "kernels/bench/rows.py")
    rows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rows)
    row = rows.row("paged_decode_speed", "m", "time", "us", [1, 2], device="NVIDIA H100 80GB HBM3", x_name="n", x="1", config={"n": 1})
    assert results.Record.model_validate(json.loads(json.dumps(row))).device == "nvidia-h100-80gb-hbm3"


def test_commit_is_ours_and_not_a_strangers(tmp_path, monkeypatch):
    "Installed into an environment that lies in the user's own repository, the package must not borrow that repository's commit."
    git = lambda *a: subprocess.run(["git", "-c", "user.email=a@b.c", "-c", "user.name=a", *a], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    module = tmp_path / ".venv" / "lib" / "modeltc_lab" / "core" / "results.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(results, "__file__", str(module))
    assert results.commit() == "unknown"
    ours = tmp_path / "modeltc_lab" / "core" / "results.py"
    ours.parent.mkdir(parents=True)
    monkeypatch.setattr(results, "__file__", str(ours))
    assert results.commit() == git("rev-parse", "--short", "HEAD")
