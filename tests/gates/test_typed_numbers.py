"No measured number is typed into a page: prose may quote a paper or define a size, and then says so."

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
UNITS = r"%|x\b|×|times (?:as|faster|slower|more|less)|-fold\b|µs\b|us\b|ms\b|s\b|seconds?\b|minutes?\b|GB/s|TB/s|tokens?/s|req(?:uest)?s?/s|TFLOP|evictions?\b|percent\b|points?\b"
MEASURED = re.compile(rf"(?<![\w.-])\d[\d ,.]*\s*(?:{UNITS})")
QUOTED = "<!-- quoted:"


def typed(text):
    "Measurements typed into Markdown, outside code, mathematics and marked quotations."
    prose = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", " ", text, flags=re.S)
    return [m[0] for part in prose.split("\n\n") if QUOTED not in part for line in part.splitlines() if QUOTED not in line for m in MEASURED.finditer(line)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_prose(path):
    cells = json.loads(path.read_text())["cells"]
    assert [t for c in cells if c["cell_type"] == "markdown" for t in typed("".join(c["source"]))] == []


def test_log_and_readme():
    for name in ("docs/log.md", "README.md", "CHANGELOG.md"): assert typed((ROOT / name).read_text()) == [], name


def test_the_rule_can_fail():
    for text in ("It is 3.2x faster.", "took 15 ms", "evicts 7 % of them", "84 evictions", "2 times as long", "3.35 TB/s"): assert typed(text), text
    for text in ("`15 ms`", "Python 3.11 or 3.12", "120 000 token slots", "$2 s$", "up to 3x <!-- quoted: abstract -->", "three thousand requests"): assert not typed(text), text
