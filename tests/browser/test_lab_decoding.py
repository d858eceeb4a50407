"Constrained decoding's views in JupyterLab: move every control of its widgets, read the changed figure."

import pytest
from jupyter_pages import ROOT, cells_with, moves, no_cell_failed, opened, press, quiet, sources, widget

DECODING = "decoding/29_views.ipynb"


@pytest.fixture(scope="module")
def decoding(lab, browser):
    "The views of constrained decoding."
    page = opened(lab, browser, DECODING)
    yield page
    page.close()


def test_no_cell_failed(decoding): no_cell_failed(decoding)


NODE = """el => { const g = el.querySelector('.js-plotly-plot'), l = g._fullLayout, box = g.getBoundingClientRect(), p = g.calcdata[7][0];
  return [box.left + l.xaxis._offset + l.xaxis.d2p(p.x), box.top + l.yaxis._offset + l.yaxis.d2p(p.y), g.data[7].text[0]]; }"""
SAYS = "([el, said]) => el.textContent.includes(said)"


def test_automaton_explorer_every_control(decoding):
    cell = widget(decoding, cells_with("explorer", DECODING))
    handle, buttons, inputs = cell.element_handle(), cell.locator(".widget-toggle-buttons button"), cell.locator("input[type=text]")
    before, after = moves(decoding, cell, lambda: press(cell.locator(".noUi-handle").first, "ArrowLeft"))
    assert "8 bytes read" in before[0] and "7 bytes read" in after[0]
    for i, kind in ((1, "Pager"), (2, "LR(1)"), (0, "LALR")): assert moves(decoding, cell, lambda i=i: buttons.nth(i).click())[1][0].startswith(f"{kind} (")
    assert moves(decoding, cell, lambda: cell.locator("select").nth(1).select_option("3"))[1][0].endswith("state 3")
    x, y, name = handle.evaluate(NODE)                                   # a state on the stack, below the top
    assert moves(decoding, cell, lambda: decoding.mouse.click(x, y))[1][0].endswith(f"state {name}")
    assert "1 bytes read, the next is refused" in moves(decoding, cell, lambda: inputs.first.fill("1)"))[1][0]
    cell.locator("textarea").fill('start: "a')
    cell.locator("textarea").press("Tab")
    decoding.wait_for_function(SAYS, arg=[handle, "begins nothing that Lark's notation knows"])
    assert "27, Pager 27" in moves(decoding, cell, lambda: cell.locator("select").first.select_option("json"))[1][0]
    assert not handle.evaluate("el => el.textContent.includes('begins nothing')")


def test_token_mask_lens_every_control(decoding):
    cell = widget(decoding, cells_with("lens_widget", DECODING))
    inputs = cell.locator("input[type=text]")
    before, after = moves(decoding, cell, lambda: press(cell.locator(".noUi-handle").first))
    assert before[0].startswith("step 0: ") and after[0].startswith("step 1: ")
    assert "refused" in moves(decoding, cell, lambda: inputs.last.fill('": ]'))[1][0]  # a bracket may stand in a string, not behind a key
    def write():
        inputs.first.fill('{"name": 1}')
        inputs.first.press("Enter")
    moves(decoding, cell, write)
    moves(decoding, cell, lambda: cell.locator("button:text-is('forget the table')").click())
    assert moves(decoding, cell, lambda: cell.locator("select").select_option("arithmetic"))[1][0].startswith("step 0: ")


def test_cost_board_every_control(decoding):
    if not list((ROOT / "docs/results/decoding/batch_speed").glob("*.json")): pytest.skip("no record of decoding/batch_speed yet")
    index = next(i for i, s in enumerate(sources(DECODING)) if s.startswith("recorded = "))
    cell = widget(decoding, index)
    moves(decoding, cell, lambda: press(cell.locator(".noUi-handle, .ui-slider-handle").first, "ArrowLeft"))
    assert "p99" in moves(decoding, cell, lambda: cell.locator(".widget-toggle-buttons button:text-is('p99')").click())[1][0]
    moves(decoding, cell, lambda: cell.locator("select").select_option(index=1))


def test_quiet(decoding): quiet(decoding)
