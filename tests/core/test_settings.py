"Settings: precedence, and errors that say where."

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeltc_lab.core.settings import READERS, SettingsError, find_settings, load_settings

ROOT = Path(__file__).resolve().parents[2]


def test_file_then_environment(tmp_path):
    file = tmp_path / "settings.ini"
    file.write_text("[modeltc_lab]\nseed = 3\ndata_dirs = a:b\noffline = yes\n")
    s = load_settings(file, {"MODELTC_LAB_SEED": "4", "UNRELATED": "x"})
    assert (s.seed, s.offline, s.data_dirs) == (4, True, (tmp_path.resolve() / "a", tmp_path.resolve() / "b"))


def test_found_upward_and_defaults_without(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[modeltc_lab]\nthreads = 2\n")
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    assert find_settings(deep) == (tmp_path / "settings.ini").resolve()
    monkeypatch.chdir(deep)
    assert load_settings(env={}).threads == 2


def test_the_checkouts_own_file_is_valid(): assert set(vars(load_settings(ROOT / "settings.ini", {}))) == set(READERS)


def test_frozen():
    with pytest.raises(AttributeError): load_settings(env={}).seed = 5  # type: ignore[misc]


@pytest.mark.parametrize("text, message", [
    ("[modeltc_lab]\nsed = 1\n", "unknown setting 'sed'"), ("[modeltc_lab]\nseed = -1\n", "seed='-1': need a whole number >= 0"), ("[modeltc_lab]\nthreads = many\n", "threads='many': need a whole number >= 1"), ("[modeltc_lab]\noffline = maybe\n", "need yes or no"),
    ("[modeltc_lab]\nbackend = slurm\n", "backend='slurm': need one of sequential, loky, threading, dask, ray"), ("[modeltc_lab]\nworkers = -2\n", "workers='-2': need a whole number >= 1, or -1"),
    ("[modeltc_lab]\ntime_budget_s = nan\n", "time_budget_s='nan'"), ("[other]\nseed = 1\n", "unknown section [other]"), ("no section", "settings.ini")])
def test_bad_file(tmp_path, text, message):
    file = tmp_path / "settings.ini"
    file.write_text(text)
    with pytest.raises(SettingsError) as error: load_settings(file, {})
    assert message in str(error.value) and "\n" not in str(error.value)


@given(st.text(st.characters(codec="ascii", categories=("L",)), min_size=1, max_size=12))
def test_unknown_environment_names_are_refused(name):
    if name.lower() in READERS: return
    with pytest.raises(SettingsError, match="unknown setting"): load_settings(ROOT / "settings.ini", {f"MODELTC_LAB_{name.upper()}": "1"})


def test_files_of_other_tools_are_passed_over(tmp_path):
    (tmp_path / "settings.ini").write_text("[modeltc_lab]\nseed = 5\n")
    (other := tmp_path / "other").mkdir()
    (other / "settings.ini").write_text("[DEFAULT]\nlib_name = theirs\n")
    assert find_settings(other) == (tmp_path / "settings.ini").resolve()
    with pytest.raises(SettingsError, match="unknown setting 'lib_name'"): load_settings(other / "settings.ini", {})
