"Serving's notebooks in JupyterLab: move every control of its widgets, read the changed figure."

import re

import pytest
from jupyter_pages import STATE, cells_with, moves, no_cell_failed, opened, press, quiet, sources, widget

TECHNIQUE, GALLERY = "serving/13_past_future.ipynb", "serving/19_views.ipynb"


@pytest.fixture(scope="module")
def notebook(lab, browser):
    "The technique notebook."
    page = opened(lab, browser, TECHNIQUE)
    yield page
    page.close()


@pytest.fixture(scope="module")
def gallery(lab, browser):
    "The notebook of the views: every widget of the room, quick to run."
    page = opened(lab, browser, GALLERY)
    yield page
    page.close()


@pytest.mark.parametrize("name", ["notebook", "gallery"])
def test_no_cell_failed(name, request): no_cell_failed(request.getfixturevalue(name))


def test_memory_timeline_every_control(notebook):
    cell = widget(notebook, cells_with("memory_widget", TECHNIQUE))
    sliders, toggles = cell.locator(".noUi-handle"), cell.locator(".widget-toggle-buttons button")
    names = cell.locator(".widget-slider .widget-label").all_text_contents()
    assert names == ["prompt", "generated", "whole reply", "capacity"]
    for i, key in enumerate(["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft"]): moves(notebook, cell, lambda i=i, key=key: press(sliders.nth(i), key))
    for i in (1, 2, 0): moves(notebook, cell, lambda i=i: toggles.nth(i).click())
    cell.locator("select").select_option("B")
    notebook.wait_for_function("el => el.querySelectorAll('.widget-readout')[0].textContent.replace(/\\D/g, '') === '800'", arg=cell.element_handle())
    before, after = moves(notebook, cell, lambda: press(sliders.nth(0)))
    assert before[0] != after[0] and after[1][1] != before[1][1]  # the curve of request B itself


def test_length_posterior_every_control(notebook):
    cell = widget(notebook, cells_with("posterior_widget", TECHNIQUE))
    sliders, toggles = cell.locator(".noUi-handle"), cell.locator(".widget-toggle-buttons button")
    before, after = moves(notebook, cell, lambda: press(sliders.nth(0)))
    assert [re.search(r"after (\d+) tokens", state[0])[1] for state in (before, after)] == ["100", "105"]
    moves(notebook, cell, lambda: press(sliders.nth(1)))
    assert "(interp)" in moves(notebook, cell, lambda: toggles.nth(1).click())[1][0]


def test_policy_race_every_control(gallery):
    cell = widget(gallery, cells_with("race_widget", GALLERY))
    names = cell.locator(".widget-slider .widget-label").all_text_contents()
    assert len(names) == 7 and names[0].startswith("rate") and names[-1].startswith("MTPOT")
    for i in (0, 2, 3, 4, 5, 6): moves(gallery, cell, lambda i=i: press(cell.locator(".noUi-handle").nth(i), "ArrowLeft"))
    moves(gallery, cell, lambda: press(cell.locator(".noUi-handle").nth(1)))
    before, after = moves(gallery, cell, lambda: cell.locator("select").select_option(["Conservative"]))
    assert before[0].startswith("Past-Future") and after[0].startswith("Conservative") and len(after[1]) < len(before[1])
    moves(gallery, cell, lambda: press(cell.locator(".noUi-handle").nth(5), "ArrowLeft"))  # the new figure is alive too


def test_serving_timeline_click_and_every_control(gallery):
    cell = widget(gallery, cells_with("timeline_widget", GALLERY))
    bar = cell.locator(".barlayer .trace").nth(1).locator(".point path").nth(7)  # somebody served in time
    before, after = moves(gallery, cell, lambda: bar.click(force=True))
    marked = re.match(r"request (\d+): wait", after[0])
    assert before[0].startswith("Aggressive") and marked and cell.locator("select").nth(1).locator("option:checked").text_content().strip() == marked[1]
    cell.locator("select").nth(1).select_option("none")
    gallery.wait_for_function("el => el.querySelector('.js-plotly-plot')?.layout?.title?.text?.startsWith('Aggressive')", arg=cell.element_handle())
    for i, key in enumerate(("ArrowRight", "ArrowLeft", "ArrowRight", "ArrowLeft", "ArrowLeft")): moves(gallery, cell, lambda i=i, key=key: press(cell.locator(".noUi-handle").nth(i), key))
    assert moves(gallery, cell, lambda: cell.locator("select").nth(0).select_option("Oracle"))[1][0].startswith("Oracle")


def test_goodput_frontier_every_control(gallery):
    cell = widget(gallery, cells_with("frontier_widget", GALLERY))
    for i in range(3): moves(gallery, cell, lambda i=i: press(cell.locator(".noUi-handle").nth(i), "ArrowLeft"))
    for label in ("within the promise", "p50"): moves(gallery, cell, lambda label=label: cell.locator(f".widget-toggle-buttons button:text-is('{label}')").click())
    assert "Aggressive" in moves(gallery, cell, lambda: cell.locator("select").select_option(["Aggressive"]))[1][0]


def test_simulator_check_every_control(gallery):
    cell = widget(gallery, cells_with("check_widget", GALLERY))
    assert "ttft mean" in cell.element_handle().evaluate(STATE)
    assert "tpot mean" in moves(gallery, cell, lambda: cell.locator(".widget-toggle-buttons button:text-is('gap between tokens')").click())[1][0]
    assert "tpot p99" in moves(gallery, cell, lambda: cell.locator(".widget-toggle-buttons button:text-is('p99')").click())[1][0]
    moves(gallery, cell, lambda: cell.locator("select").select_option(index=0))


def test_twin_slider_moves_in_the_notebook(notebook):
    cell = widget(notebook, sources(TECHNIQUE).index("views.memory_timeline_twin()"))
    rail = cell.locator(".slider-rail-touch-rect")
    rail.wait_for()
    moves(notebook, cell, lambda: rail.click(position={"x": 6, "y": 6}))


@pytest.mark.parametrize("name", ["notebook", "gallery"])
def test_quiet(name, request): quiet(request.getfixturevalue(name))
