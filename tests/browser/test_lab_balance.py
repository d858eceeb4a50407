"Balanced training's views in JupyterLab: move every control of its widgets, read the changed figure."

import pytest
from jupyter_pages import cells_with, drawn_late, moves, no_cell_failed, opened, press, quiet, widget

VIEWS = "balance/79_views.ipynb"


@pytest.fixture(scope="module")
def views(lab, browser):
    "The views of the room."
    page = opened(lab, browser, VIEWS)
    yield page
    page.close()


def test_no_cell_failed(views): no_cell_failed(views)


def toggle(cell, label): return lambda: cell.locator(f".widget-toggle-buttons button:text-is('{label}')").click()


def slide(cell, i, key="ArrowRight"): return lambda: press(cell.locator(".noUi-handle").nth(i), key)


def test_packing_bench_every_control(views):
    cell = widget(views, cells_with("bench_widget", VIEWS))
    for i in range(3): moves(views, cell, slide(cell, i))
    assert "documents too long" in moves(views, cell, toggle(cell, "16 Ki"))[1][0]
    assert moves(views, cell, lambda: cell.locator("select").select_option("FFD"))[1][0].startswith("FFD: ")


def test_rank_timeline_every_control(views):
    cell = widget(views, cells_with("ranks_widget", VIEWS))
    before, after = moves(views, cell, toggle(cell, "sorted"))
    assert before[0].startswith("random order") and after[0].startswith("sorted")
    assert "HBP" in moves(views, cell, toggle(cell, "HBP: 16 Ki and 128 Ki"))[1][0]
    for i, key in ((0, "ArrowLeft"), (1, "ArrowRight")): moves(views, cell, slide(cell, i, key))


def test_strategy_map_every_control(views):
    cell = widget(views, cells_with("map_widget", VIEWS))
    assert "16 ranks" in moves(views, cell, slide(cell, 0, "ArrowLeft"))[1][0]
    moves(views, cell, slide(cell, 1, "ArrowLeft"))
    assert moves(views, cell, lambda: cell.locator("select").select_option("qwen2.5-32b"))[1][0].startswith("qwen2.5-32b")


def test_group_builder_every_control(views):
    cell = widget(views, cells_with("builder_widget", VIEWS))
    for i in range(4): moves(views, cell, slide(cell, i))


def test_pipeline_gantt_every_control(views):
    cell = widget(views, cells_with("gantt_widget", VIEWS))
    assert moves(views, cell, slide(cell, 0))[1][0].startswith("cuts of your own")
    for label, says in (("exact", "exact partition"), ("OmniBal", "OmniBal"), ("equal parameters", "equal parameters")): assert moves(views, cell, toggle(cell, label))[1][0].startswith(says)
    moves(views, cell, slide(cell, 3))
    moves(views, cell, toggle(cell, "gpipe"))
    moves(views, cell, lambda: cell.locator("select").select_option("internvl-6b-34b"))


def test_memory_ladder_every_control(views):
    cell = widget(views, cells_with("ladder_widget", VIEWS))
    assert moves(views, cell, toggle(cell, "full"))[1][0].startswith("recompute full")
    for i in range(3): moves(views, cell, slide(cell, i))
    moves(views, cell, lambda: cell.locator("select").select_option("internvl-0.3b-7b"))


def test_a_figure_that_starts_late_misses_nothing(views):
    shown, cell = drawn_late(views, cells_with("map_widget", VIEWS), lambda cell: slide(cell, 0, "ArrowLeft")())
    assert "16 ranks" in shown[0]
    assert "8 ranks" in moves(views, cell, slide(cell, 0, "ArrowLeft"))[1][0]


def test_quiet(views): quiet(views)
