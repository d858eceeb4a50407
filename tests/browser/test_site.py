"The built site in a real browser, opened from disk: twins move, the look switches, search finds, nothing is asked of other hosts."

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
SITE = Path(__file__).resolve().parents[2] / "docs" / "_site"
TECHNIQUE, GALLERY = "serving/past_future.html", "serving/views.html"
DECODING, LENSES = "decoding/pre3.html", "decoding/views.html"
BALANCE = "balance/views.html"
DRAWN = "() => { const all = [...document.querySelectorAll('.mlab-figure .plot, .mlab-twin .plot')]; return all.length > 0 && all.every(d => d.querySelector('.main-svg')); }"
SHOWN = "el => { const d = el.querySelector('.plot'); return JSON.stringify([d._fullLayout.title.text, d._fullData.map(t => [t.name, Array.from(t.x || []), Array.from(t.y || [])])]); }"
CHANGED = "([el, old]) => { const d = el.querySelector('.plot'); return JSON.stringify([d._fullLayout.title.text, d._fullData.map(t => [t.name, Array.from(t.x || []), Array.from(t.y || [])])]) !== old; }"
INK = "() => document.querySelector('.mlab-figure .plot, .mlab-twin .plot')._fullLayout.font.color"
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
CUT = """() => [...document.querySelectorAll('.mlab-figure, .mlab-twin')].filter(el => {
  const box = el.getBoundingClientRect(), svg = el.querySelector('.main-svg').getBoundingClientRect(), room = el.querySelector('.plot').getBoundingClientRect();
  const frame = el.parentElement.getBoundingClientRect();
  return frame.right < box.right - 1 || box.right > document.documentElement.clientWidth + 1 || Math.abs(svg.right - room.right) > 1 || svg.width < 200; }).length"""
WAIT_MS = 60_000


class Visit:
    "One tab: what went wrong and what was asked for is remembered."

    def __init__(self, page):
        self.page, self.errors, self.hosts = page, [], set()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("request", lambda r: None if re.match(r"file:|data:|blob:|about:", r.url) else self.hosts.add(r.url))

    def open(self, name, ready=None):
        "Open a page of the site and wait until it is what `ready` says."
        self.page.goto((SITE / name).as_uri())
        if ready: self.page.wait_for_function(ready)
        return self.page


@pytest.fixture
def visit(browser):
    "A fresh tab; afterwards: no error on any page, nothing asked of another host."
    if not (SITE / "llms.txt").is_file(): pytest.skip("the site is not built: run `make docs`")
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    guest = Visit(context.new_page())
    yield guest
    context.close()
    assert guest.errors == [] and guest.hosts == set()


def choose(page, look):
    "What the theme switch remembers."
    page.evaluate("look => { localStorage.setItem('mode', look); localStorage.setItem('theme', look); }", look)


def press(page, twin, control, key):
    "Press a key on a control and return the figure before and after, once it has changed."
    handle = twin.element_handle()
    before = twin.evaluate(SHOWN)
    control.focus()
    control.press(key)
    page.wait_for_function(CHANGED, arg=[handle, before])
    return before, twin.evaluate(SHOWN)


@pytest.mark.parametrize("name", [TECHNIQUE, GALLERY, LENSES, BALANCE])
def test_every_slider_of_a_twin_moves_with_the_keyboard(visit, name):
    "Each slider alone changes the drawn figure, and moving it back restores what was there."
    page = visit.open(name, DRAWN)
    twins = page.locator(".mlab-twin")
    assert twins.count() >= 2
    for i in range(twins.count()):
        twin = twins.nth(i)
        sliders = twin.locator("input[type=range]")
        assert sliders.count() >= 1
        for j in range(sliders.count()):
            slider = sliders.nth(j)
            there, back = ("ArrowRight", "ArrowLeft") if int(slider.input_value()) < int(slider.get_attribute("max")) else ("ArrowLeft", "ArrowRight")
            value = slider.locator("xpath=../output")
            said = value.text_content()
            first, moved = press(page, twin, slider, there)
            assert value.text_content() != said
            moved_from, restored = press(page, twin, slider, back)
            assert (moved_from, restored) == (moved, first) and value.text_content() == said


@pytest.mark.parametrize("name, least", [(GALLERY, 3), (LENSES, 2), (BALANCE, 4)])
def test_every_choice_of_a_twin_moves_the_figure(visit, name, least):
    "Each list alone changes the drawn figure, whatever is chosen."
    page = visit.open(name, DRAWN)
    twins = page.locator(".mlab-twin").filter(has=page.locator("select"))
    assert twins.count() >= least
    for i in range(twins.count()):
        twin, handle = twins.nth(i), twins.nth(i).element_handle()
        for choice in twin.locator("select").all():
            for other in range(choice.locator("option").count()):
                if str(other) == choice.input_value(): continue
                before = twin.evaluate(SHOWN)
                choice.select_option(index=other)
                page.wait_for_function(CHANGED, arg=[handle, before])


def test_twin_shows_the_combination_its_controls_name(visit):
    "After a slider and a list have been moved together, the drawn figure is the one computed for both."
    page = visit.open(TECHNIQUE, DRAWN)
    twin = page.locator(".mlab-twin").filter(has=page.locator("select")).first
    slider, choice = twin.locator("input[type=range]").first, twin.locator("select").first
    press(page, twin, slider, "ArrowLeft" if int(slider.input_value()) else "ArrowRight")
    before, handle = twin.evaluate(SHOWN), twin.element_handle()
    choice.select_option(index=1 if choice.input_value() == "0" else 0)
    page.wait_for_function(CHANGED, arg=[handle, before])
    drawn, computed = twin.evaluate("""el => {
      const spec = JSON.parse(el.querySelector('script').textContent), controls = [...el.querySelectorAll('.controls input, .controls select')];
      const at = spec.controls.reduce((n, c, i) => n * c.values.length + Number(controls[i].value), 0), text = f => (f.layout.title.text ?? f.layout.title);
      return [text(el.querySelector('.plot')).replace(/<br>/g, ' '), text(spec.figures[at])]; }""")
    assert drawn == computed


def test_controls_are_labelled(visit):
    "Every control has a name that a screen reader can say."
    page = visit.open(TECHNIQUE, DRAWN)
    names = page.evaluate("() => [...document.querySelectorAll('.mlab-twin input, .mlab-twin select')].map(c => [...c.labels].map(l => l.textContent.trim()).join(''))")
    assert names and all(names)


def test_dark_look_reaches_the_figures(visit):
    "The theme switch changes page and figures, and is kept on the next page."
    page = visit.open("index.html", DRAWN)
    choose(page, "light")
    page = visit.open("index.html", DRAWN)
    paper, ink = page.evaluate("() => getComputedStyle(document.body).backgroundColor"), page.evaluate(INK)
    page.locator(".theme-switch-button:visible").click()
    page.locator(".theme-change-button[data-mode='dark']:visible").click()
    page.wait_for_function("() => document.documentElement.dataset.theme === 'dark'")
    page.wait_for_function(f"old => ({INK})() !== old", arg=ink)
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") != paper
    assert visit.open(TECHNIQUE, DRAWN).evaluate("() => document.documentElement.dataset.theme") == "dark"


def test_search_finds_a_docstring(visit):
    "The search box leads to results, and the first ones to pages of the site."
    page = visit.open("index.html", DRAWN)
    page.locator(".search-button, .search-button__button").first.click()
    box = page.locator("input[type=search]:visible").first
    box.fill("admission")
    box.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('#search-results li a').length > 0")
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(a => a.getAttribute('href'))")
    assert any("serving" in link for link in found)


def test_math_is_drawn(visit):
    page = visit.open(TECHNIQUE)
    page.wait_for_function("() => document.querySelectorAll('mjx-container, .MathJax_CHTML, .mjx-chtml, .MathJax').length > 2")
    assert page.evaluate("() => document.querySelectorAll('.MathJax_Error, .mjx-merror, mjx-merror').length") == 0


FAINT = """() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number), shine = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = el => { for (let e = el; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] > 0.5) return c; } return [255, 255, 255]; };
  const told = [...document.querySelectorAll('.bd-article p, .bd-article h2, .bd-article td, .bd-article th, .cards strong, .cards span, .cards i, .controls span, .controls output, .controls select, .question')];
  return told.filter(el => el.textContent.trim() && el.getBoundingClientRect().width > 2).map(el => {
    const [a, b] = [shine(parse(getComputedStyle(el).color)), shine(behind(el))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), el.tagName + ' ' + el.textContent.trim().slice(0, 40)]; }).filter(([contrast]) => contrast < 3); }"""


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", TECHNIQUE, "status.html"])
def test_words_can_be_read(visit, name, look):
    "Text stands out from what is behind it, in both looks."
    page = visit.open(name)
    choose(page, look)
    page = visit.open(name, f"() => document.documentElement.dataset.theme === '{look}'" + ("" if name == "status.html" else f" && ({DRAWN})()"))
    assert page.evaluate(FAINT) == []


@pytest.mark.parametrize("name", ["index.html", TECHNIQUE, DECODING, LENSES, "api/serving.token_sim.html", "status.html", "results.html"])
@pytest.mark.parametrize("width, look", [(420, "dark"), (1400, "light")])
def test_nothing_sticks_out(visit, name, width, look):
    "The page does not scroll sideways, and its figures fit into it."
    visit.page.set_viewport_size({"width": width, "height": 900})
    choose(visit.open(name), look)
    page = visit.open(name, DRAWN if name in ("index.html", TECHNIQUE, DECODING, LENSES) else "() => document.readyState === 'complete'")
    page.wait_for_function(f"() => ({OVERFLOW})() <= 0")
    page.wait_for_function(f"() => ({CUT})() === 0")
    clipped = "all => all.filter(el => el.scrollWidth > el.clientWidth + 1 && el.clientWidth > 2).map(el => el.textContent.trim())"
    assert page.eval_on_selector_all(".bd-article h1, .bd-article h2, .bd-article h3, .prev-next-info p", clipped) == []


def test_the_guard_can_fail(browser):
    "An error on a page and a request elsewhere are both noticed."
    page = browser.new_page()
    guest = Visit(page)
    page.route("https://elsewhere.invalid/*", lambda route: route.abort())
    page.set_content("<script>setTimeout(() => { throw new Error('broken'); })</script><img src='https://elsewhere.invalid/a.png'>")
    page.wait_for_function("() => document.readyState === 'complete'")
    page.evaluate("() => 1")
    assert guest.hosts == {"https://elsewhere.invalid/a.png"} and any("broken" in e for e in guest.errors)
    page.close()
