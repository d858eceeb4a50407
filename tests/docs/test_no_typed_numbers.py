"""No measurement is typed into a page: it comes out of a record or out of a code cell.

A number followed by a unit or a comparison is a measurement, unless it stands in code, in a formula, or in a paragraph that carries
`<!-- quoted: where it is from -->`: numbers of a paper, a definition or a setting of the experiment. Bare counts of tokens and steps
describe an input more often than a result and are let through; their rates are not.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NUMBER = r"(?<![\w.#/-])[-+~≈]?\d[\d,]*(?:\.\d+)?"
UNITS = (r"(?:%|‰|×|x\b|[KMGT]i?B(?:/s)?\b|[KMG]?bit/s\b|[nmuµμ]?s\b|ms\b|[KMGT]?Hz\b|W\b|J\b|[TGP]?FLOP/?s?\b|dB\b|"
         r"(?:per ?cent|percent|points?|times|fold|seconds?|minutes?|hours?|milliseconds?|microseconds?|nanoseconds?|bytes|requests?|req|evictions?|registers)\b(?:/s| per second)?|tokens?(?:/s| per second|/GPU))")
TYPED = re.compile(rf"{NUMBER}\s?-?{UNITS}(?!\w)", re.I)
WORDED = re.compile(r"\b(?:twice|thrice|half|double|triple|(?:two|three|four|five|ten|hundred|thousand)(?:-| )?(?:times|fold))\s+(?:as|faster|slower|more|less|better|worse|the (?:speed|throughput|goodput|memory|time))\b", re.I)
QUOTED = re.compile(r"<!--\s*quoted:\s*\S[^>]*-->")


def paragraphs(text):
    "Paragraphs of Markdown without code, formulas and link targets."
    for block in (r"```.*?(?:```|\Z)", r"\$\$.*?\$\$", r"^(?: {4}|\t).*$"): text = re.sub(block, "", text, flags=re.S | (re.M if block.startswith("^") else 0))
    for paragraph in re.split(r"\n\s*\n", text):
        if QUOTED.search(paragraph): continue
        for inline in (r"`[^`\n]*`", r"\$[^$\n]+\$", r"\]\([^)]*\)", r"<!--.*?-->", r"https?://\S+"): paragraph = re.sub(inline, " ", paragraph, flags=re.S)
        yield paragraph


def typed(text): return [m[0] for p in paragraphs(text) for rule in (TYPED, WORDED) for m in rule.finditer(p)]


NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    cells = json.loads(path.read_text())["cells"]
    assert [(f"cell {i}", found) for i, c in enumerate(cells) if c["cell_type"] == "markdown" and (found := typed("".join(c["source"])))] == []


@pytest.mark.parametrize("name", ["docs/log.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_page(name): assert typed((ROOT / name).read_text()) == []


def test_records_reach_pages_as_values():
    "Cells of Python type no result into the text they show either."
    shown = re.compile(r"(?:Markdown|HTML)\(\s*(?:f|r)?([\"'])(?P<text>(?:(?!\1).)*)\1", re.S)
    found = [(p.name, t) for p in NOTEBOOKS for c in json.loads(p.read_text())["cells"] if c["cell_type"] == "code"
             for m in shown.finditer("".join(c["source"])) for t in typed(re.sub(r"\{[^}]*\}", "", m["text"]))]
    assert found == []


@pytest.mark.parametrize("text", [
    "it takes 49.7 us a decision", "a speed-up of 51.8x", "3.2 times as many", "97 % of memory", "97% of memory", "4.77 requests/s", "120 GB/s", "1,509 µs",
    "evicts 12 requests", "about ~20x", "2-fold", "1.5 seconds", "it is twice as fast", "three times faster", "5 ms", "96 registers", "-3 points", "900 tokens/s", "80 tokens per second"])
def test_measurements_are_seen(text): assert typed(f"Some words, {text}, and more.")


@pytest.mark.parametrize("text", [
    "it takes `49.7 us`", "$t = 5\\,\\mathrm{ms}$", "$$\n5 ms\n$$", "```sh\nsleep 5 s\n```", "Python 3.11 or 3.12", "section 4.2, formula 3", "Llama-2-7B on an A100-80G",
    "sm_90 and int8", "Dist-1, Dist-2", "[a paper](https://x.org/5%20s)", "the ten techniques", "<!-- quoted: Table 2 of the paper --> the paper reports 1.5x goodput", "page 16, GQA 4", "in 2026", "a prompt of 30 tokens", "every 10 steps"])
def test_other_numbers_are_not(text): assert typed(text) == []


def test_a_quotation_covers_its_paragraph_only():
    assert typed("<!-- quoted: the paper --> 5 ms\nand 6 ms\n\nand 7 ms") == ["7 ms"]
    assert typed("<!-- quoted: --> 5 ms") == ["5 ms"]
