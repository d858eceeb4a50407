"House rules on every tracked file, each shown to be able to fail."

import re
import subprocess
from pathlib import Path

import pytest

import modeltc_lab

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1_000_000
PATHS = re.compile(r"(?<![\w.~-])/(?:work|farm|root|tmp|home/\w+)/\w")
HOSTS = re.compile(r"\b(?:pypi|pythonhosted|registry[.]npmjs|deb[.]debian)[.]org\b")
UNFINISHED = re.compile(r"\b(?:TO[D]O|FIX[M]E|XX[X])\b")
SLEEP = re.compile(r"\btime\.sleep\(|wait_for_timeout\(")


def tracked():
    "Files git tracks, or would."
    out = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if out.returncode: pytest.skip("not a git checkout")
    return [ROOT / line for line in out.stdout.splitlines() if (ROOT / line).is_file()]


def text(path):
    "The file as text, empty when it is not."
    try: return path.read_text(encoding="utf-8")
    except UnicodeDecodeError: return ""


def offenders(rule, keep=lambda p: True):
    "Lines that break a rule."
    return [f"{p.relative_to(ROOT)}: {line.strip()[:120]}" for p in tracked() if keep(p) for line in text(p).splitlines() if rule.search(line)]


def test_no_large_files(): assert [p for p in tracked() if p.stat().st_size > LIMIT] == []


def test_no_paths_of_a_machine(): assert offenders(PATHS) == []


def test_no_registry_hosts(): assert offenders(HOSTS) == []


def test_nothing_unfinished(): assert offenders(UNFINISHED, lambda p: p.suffix != ".svg") == []


def test_tests_do_not_sleep(): assert offenders(SLEEP, lambda p: "tests" in p.parts) == []


def test_the_rules_can_fail():
    root = "/" + "work/main/x"  # put together here, so that this file keeps the rule too
    assert PATHS.search(f"see {root}") and PATHS.search(f'"{root}"') and not PATHS.search("a" + root) and not PATHS.search("https://x.org/home/")
    assert HOSTS.search("https://" + ".".join(["pypi", "org"]) + "/simple") and UNFINISHED.search("# TO" + "DO: later") and SLEEP.search("time.sle" + "ep(1)")


def test_version_is_the_changelogs():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert newest and newest[1] == modeltc_lab.__version__
    assert f"version: {modeltc_lab.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_typed_and_licensed():
    assert (ROOT / "modeltc_lab/py.typed").is_file() and (ROOT / "kernels/modeltc_kernels/py.typed").is_file()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_kernels_folder_is_no_package():
    "A package `kernels` would shadow another distribution that transformers imports."
    assert not (ROOT / "kernels/__init__.py").exists() and not list((ROOT / "tests").rglob("__init__.py"))


def test_every_lock_line_is_exact():
    lines = (ROOT / ".ci/constraints.txt").read_text().split()
    assert lines and all(re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.!+]+", line) for line in lines)
