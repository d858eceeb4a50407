"README.md is the front page's notebook, as it was last run."

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


@pytest.fixture(scope="module")
def build():
    "docs/build.py as a module."
    if not (ROOT / "docs/_build/executed/index.ipynb").is_file(): pytest.skip("the front page's notebook has not been run: run `make docs`")
    spec = importlib.util.spec_from_file_location("site_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_is_in_step(build):
    assert README.read_text() == build.readme_text(), "README.md is not the front page: run `python docs/build.py --readme`"


def test_readme_links_lead_somewhere():
    links = [u for u in re.findall(r"\]\(([^)\s]+)\)", README.read_text()) if not re.match(r"https?:|#", u)]
    assert links and [u for u in links if not (ROOT / u.split("#")[0]).exists()] == []


def test_readme_says_what_it_owes():
    "A promise, a figure, the two commands, the CUDA line, lines of Python, and the ten techniques."
    from modeltc_lab.core.cli import TECHNIQUES, technique_state
    text = README.read_text()
    assert text.index("> ") < text.index("make lab") and "make test" in text and "CUDA" in text
    assert re.search(r"!\[[^\]]{10,}\]\(docs/images/[\w-]+\.svg\)", text)
    assert re.search(r"```python\n.*from modeltc_lab\.", text, flags=re.S)
    assert [t.title for t in TECHNIQUES if not re.search(rf"^\|.*{re.escape(t.title)}.*{re.escape(technique_state(t))}", text, flags=re.M)] == []


def test_figure_is_a_drawing_of_its_own():
    "The SVG parses, has curves, and asks no other host for anything."
    for path in set(re.findall(r"\((docs/images/[\w-]+\.svg)\)", README.read_text())):
        text = (ROOT / path).read_text()
        ElementTree.fromstring(text)
        assert text.count("<path") > 10
        assert re.findall(r"(?:href|src)=\"https?://|url\([\"']?https?://|@import", text) == []
