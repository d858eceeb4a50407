"The built site as fixtures; without it the tests say how to build it."

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    "What the tests need to know of a page: what it loads, where it links, its anchors, its words."

    LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "object": "data", "embed": "src"}
    SILENT = ("style", "script")

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.anchors, self.words, self.styles, self.titles, self.within = [], [], set(), [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag in self.LOADS and found.get(self.LOADS[tag]): self.loads.append(found[self.LOADS[tag]])
        if found.get("srcset"): self.loads += [part.split()[0] for part in found["srcset"].split(",")]
        if tag == "a" and "href" in found: self.links.append(found["href"])
        self.anchors |= {found[k] for k in ("id", "name") if found.get(k)}
        if found.get("style"): self.styles.append(found["style"])
        if tag in ("h1", *self.SILENT): self.within.append(tag)

    def handle_endtag(self, tag):
        if self.within and self.within[-1] == tag: self.within.pop()

    def handle_data(self, data):
        where = self.within[-1] if self.within else ""
        if where == "style": self.styles.append(data)
        if where == "h1": self.titles.append(data)
        if where not in self.SILENT: self.words.append(data)

    @property
    def text(self): return " ".join(" ".join(self.words).split())

    @property
    def title(self): return "".join(self.titles).strip().removesuffix("#").strip()


def letters(text):
    "Letters and digits only, in lower case: the same words however they are marked up."
    return re.sub(r"[^a-z0-9]", "", text.lower())


@pytest.fixture(scope="session")
def parse(): return Page


@pytest.fixture(scope="session")
def plain(): return letters


@pytest.fixture(scope="session")
def site():
    "The folder of the built site."
    folder = ROOT / "docs" / "_site"
    if not (folder / "llms.txt").is_file(): pytest.skip("the site is not built: run `make docs`")
    return folder


@pytest.fixture(scope="session")
def pages(site):
    "Every page of the site by its path."
    found = sorted(p for p in site.rglob("*.html") if p.relative_to(site).parts[0] != "_static")  # a theme keeps a template there
    return {p.relative_to(site).as_posix(): Page(p.read_text(encoding="utf-8")) for p in found}
