"The built site: nothing from other hosts, no dead link, and everything on it that the sources say."

import importlib
import inspect
import json
import re
from urllib.parse import unquote, urldefrag

import pytest
from fastcore.docments import docments

from modeltc_lab._modidx import d as index
from modeltc_lab.core import results
from modeltc_lab.core.cli import TECHNIQUES, technique_state

ELSEWHERE = re.compile(r"^\s*(?:https?:)?//", re.I)
LOCAL = re.compile(r"^(?![a-z][a-z0-9+.-]*:)", re.I)
IN_STYLE = re.compile(r"(?:url\(\s*[\"']?|@import\s+[\"']?)((?:https?:)?//[^\"')\s]+)", re.I)


def outside(page): return [u for u in page.loads if ELSEWHERE.search(u)] + [u for s in page.styles for u in IN_STYLE.findall(s)]


def dead(name, page, pages, site):
    "Links of a page to files or places that are not there."
    bad = []
    for link in filter(LOCAL.search, page.links):
        path, anchor = urldefrag(link)
        target = (site / name).parent / unquote(path) if path else site / name
        target = target.resolve()
        if target.is_dir(): target /= "index.html"
        known = pages.get(target.relative_to(site.resolve()).as_posix()) if target.is_relative_to(site.resolve()) else None
        if not target.is_file() or (anchor and known and unquote(anchor) not in known.anchors): bad.append(f"{name}: {link}")
    return bad


def test_pages_load_nothing_from_other_hosts(pages): assert {n: outside(p) for n, p in pages.items() if outside(p)} == {}


def test_styles_load_nothing_from_other_hosts(site):
    sheets = list(site.rglob("*.css"))
    assert sheets and {p.name: IN_STYLE.findall(p.read_text(errors="replace")) for p in sheets if IN_STYLE.search(p.read_text(errors="replace"))} == {}


def test_everything_a_page_loads_is_there(pages, site):
    "`#` is how the theme names a page that has no source of its own."
    missing = [f"{n}: {u}" for n, p in pages.items() for u in p.loads if LOCAL.search(u) and u != "#" and not ((site / n).parent / unquote(u.split("?")[0].split("#")[0])).is_file()]
    assert missing == []


def test_no_dead_links(pages, site): assert [b for n, p in pages.items() for b in dead(n, p, pages, site)] == []


def test_the_rules_can_fail(parse, pages, site):
    bad = '<link href="//x.org/a.css"><img srcset="https://x.org/b.png 2x"><p style="background:url(http://x.org/c.png)"></p><style>@import "https://x.org/d.css"</style><script src="a.js"></script>'
    assert len(outside(parse(bad))) == 4
    page = parse('<a href="none.html"></a><a href="index.html#nowhere"></a><a href="#here" id="here"></a><a href="https://x.org/"></a>')
    assert dead("status.html", page, {**pages, "status.html": page}, site) == ["status.html: none.html", "status.html: index.html#nowhere"]


def test_math_is_local(pages, site):
    with_math = [n for n in pages if 'class="math' in (site / n).read_text()]
    assert "serving/past_future.html" in with_math
    scripts = {n: [u for u in pages[n].loads if "mathjax" in u.lower() and LOCAL.search(u)] for n in with_math}
    assert [n for n, found in scripts.items() if not found] == []


def rows(text, width):
    "Rows of the tables of a page, cells as words."
    found = re.findall(r"<tr\b.*?</tr>", text, flags=re.S)
    return [cells for cells in ([" ".join(re.sub(r"<[^>]+>", " ", c).split()) for c in re.findall(r"<t[dh]\b[^>]*>(.*?)</t[dh]>", r, flags=re.S)] for r in found) if len(cells) >= width]


def test_every_technique_has_its_state(site, plain):
    matrix = {r[0]: r for r in rows((site / "status.html").read_text(), 4)}
    assert set(matrix) >= {t.title for t in TECHNIQUES}
    assert [t.title for t in TECHNIQUES if plain(technique_state(t)) not in plain(" ".join(matrix[t.title]))] == []


def test_status_claims_only_what_is_recorded(site):
    "A technique without records of its own claims nothing, one with records shows them."
    matrix = {r[0]: r for r in rows((site / "status.html").read_text(), 4)}
    known = {(r.domain, r.experiment) for r in results.read()}
    for t in TECHNIQUES:
        room, mine = t.module.split(".")[1], " ".join(matrix[t.title])
        own = {e for d, e in known if d == room and e.startswith(t.name)}
        assert ("recorded" in mine.replace("no record", "")) == bool(t.built and own), mine
        assert [e for e in own if t.built and e not in mine] == []


def test_results_pages_show_every_record(site):
    "Every record's number, and the command that remakes it."
    text = " ".join(re.sub(r"<[^>]+>", " ", (site / "results.html").read_text()).split())
    records = results.read()
    assert records and [f"{r.experiment} {r.method} {r.metric}" for r in records if results.cell(r) not in text] == []
    assert [e for e in {f"{r.domain}/{r.experiment}" for r in records} if e not in text] == []
    assert [r.device for r in records if r.device not in text] == []


def test_long_tables_of_results_are_folded(site):
    "The long ones only, each behind its number of rows."
    page = (site / "results.html").read_text()
    folded = re.findall(r"<details>\s*<summary>(\d+) rows</summary>(.*?)</details>", page, flags=re.S)
    assert folded and all(table.count("<tr") == int(rows) + 1 > 41 for rows, table in folded)
    assert max(t.count("<tr") for t in re.findall(r"<table.*?</table>", re.sub(r"<details>.*?</details>", "", page, flags=re.S), flags=re.S)) <= 41


def test_llms_txt_lists_every_page(pages, site):
    listed = set(re.findall(r"\]\(([\w./-]+\.html)\)", (site / "llms.txt").read_text()))
    rooms = {p.name for p in site.glob("*.html")} & {f"{p.name}.html" for p in site.iterdir() if p.is_dir()}
    generated = {"genindex.html", "search.html", "index.html", *rooms}
    assert set(pages) - generated - listed == set()
    assert [p for p in listed if not (site / p).is_file()] == []
    assert len((site / "llms-full.txt").read_text()) > 10_000


def documented(module):
    "Comments beside the parameters of a module's public functions."
    for name in module.__all__:
        thing = getattr(module, name)
        if not inspect.isfunction(thing): continue
        for parameter, note in docments(thing, full=True, returns=True).items():
            if note.docment: yield f"{name}.{parameter}", note.docment


@pytest.mark.parametrize("module_name", sorted(index["syms"]))
def test_api_page_is_about_our_names_only(module_name, site):
    "An alias of somebody else's type does not bring that type's manual along."
    text = (site / f"api/{module_name.removeprefix('modeltc_lab.')}.html").read_text()
    headings = [re.sub(r"<[^>]+>", "", h).removesuffix("#").strip() for h in re.findall(r"<h2\b[^>]*>(.*?)</h2>", text, flags=re.S)]
    assert [h for h in headings if h not in importlib.import_module(module_name).__all__ and h != "On this page"] == []


@pytest.mark.parametrize("module_name", sorted(index["syms"]))
def test_api_page_shows_the_docments(module_name, pages, plain):
    module = importlib.import_module(module_name)
    shown = plain(pages[f"api/{module_name.removeprefix('modeltc_lab.')}.html"].text)
    own = [n for n in module.__all__ if callable(getattr(module, n)) and getattr(module, n).__module__ == module_name]
    assert [n for n in own if plain(n) not in shown] == []
    assert [where for where, comment in documented(module) if plain(comment) not in shown] == []


def notebooks(site):
    "Page name -> cells of the notebook it was made from."
    root = site.parents[1] / "nbs"
    for path in sorted(root.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        relative = path.relative_to(root)
        yield (relative.parent / re.sub(r"^\d+\w?_", "", relative.stem)).as_posix() + ".html", json.loads(path.read_text())["cells"]


def opening(cell):
    "The first plain words of a Markdown cell, without what markup turns into something else."
    prose = re.sub(r"```.*?```|\$\$.*?\$\$|<!--.*?-->", "", "".join(cell["source"]), flags=re.S)
    lines = [re.sub(r"\]\([^)]*\)", "", line) for line in prose.splitlines() if re.match(r"[#>\w*`\[(]", line)]
    return re.split(r"[$<&\\|]", lines[0])[0] if lines else ""


def test_no_text_of_a_notebook_is_lost(site, pages, plain):
    "Title, subtitle and every Markdown cell reach the page: the first cell is the one that tools drop."
    lost = []
    for name, cells in notebooks(site):
        shown, (title, subtitle) = plain(pages[name].text), [line for line in "".join(cells[0]["source"]).splitlines() if line.strip()]
        lost += [f"{name}: title"] * (plain(pages[name].title) != plain(title)) + [f"{name}: subtitle"] * (plain(subtitle) not in shown)
        lost += [f"{name}: {opening(c)[:60]}" for c in cells[1:] if c["cell_type"] == "markdown" and plain(opening(c)) not in shown]
    assert lost == []


def test_directives_are_not_shown(pages):
    assert [n for n, p in pages.items() if "#|" in p.text] == []


def test_figures_and_twins_are_on_the_pages(site):
    "A technique page has figures drawn by the page's own script, and a twin that holds every combination."
    text = (site / "serving/past_future.html").read_text()
    assert text.count('class="mlab-figure"') >= 3
    twins = [json.loads(t) for t in re.findall(r'class="mlab-twin"><script type="application/json">(.*?)</script>', text, flags=re.S)]
    assert len(twins) >= 2
    for twin in twins:
        combinations = 1
        for c in twin["controls"]: combinations *= len(c["values"])
        assert len(twin["figures"]) == combinations and all(c["label"] and 0 <= c["default"] < len(c["values"]) for c in twin["controls"])
