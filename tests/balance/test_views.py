"The room's figures and widgets: what they show is what the room's functions say, and every control changes it."

import json
import re

import numpy as np
import pytest
from plotly.serializers import custom_serializers

from modeltc_lab.balance import views
from modeltc_lab.balance.cost import DEFAULT_COST, GroupSpec
from modeltc_lab.balance.packing import pack
from modeltc_lab.balance.schedule import costs, metrics, schedule
from modeltc_lab.balance.vector_packing import isf
from modeltc_lab.core import viz


def title(fig): return fig.layout.title.text.replace("<br>", " ")


def number(text, fig): return float(re.search(text.replace("#", r"([\d.]+)"), title(fig))[1])


def test_strips_are_the_packs():
    plan = pack([5, 3, 8, 2, 6, 4, 4], 8)
    cells = views.strips(plan, shown=plan.packs, cells=8)
    for row, i in zip(cells, range(plan.packs)):
        lengths = plan.lengths[plan.offsets[i]:plan.offsets[i + 1]]
        assert row.tolist() == [d for d, n in enumerate(lengths) for _ in range(n)] + [-1] * int(8 - lengths.sum())


def test_bench_counts_its_packs_and_says_what_was_left_out():
    fig = views.packing_bench(480, 1.05, 20.0, "16 Ki", "ffd")
    documents = views.mixed(480, 1.05, 20.0)
    assert number("FFD: # packs", fig) == pack(documents, 16_384, "ffd", oversize="drop").packs
    assert number(r"# documents too long", fig) == (documents > 16_384).sum()
    assert sum(fig.data[1].y) == pytest.approx(100) and set(fig.data[2].y) == {0}
    two = views.packing_bench(capacity="16 Ki and 128 Ki")
    assert sum(two.data[1].y) == pytest.approx(100) and sum(two.data[2].y) == pytest.approx(100)


def test_timeline_bars_are_the_costs():
    s = schedule(pack(np.random.default_rng(0).integers(1, 900, 400), 1024), 8, GroupSpec(1024, 2), balance="window:4", accumulate=2)
    fig = views.schedule_figure(s, DEFAULT_COST, shown=3)
    work, wait, seconds = fig.data[0], fig.data[1], costs(s)
    begin, end = (np.asarray(t.base, float) for t in (work, wait))
    for step in range(3):
        each = np.repeat(seconds[s.offsets[step]:s.offsets[step + 1]].reshape(2, 4).sum(0), 2)
        mine = slice(8 * step, 8 * step + 8)
        assert np.allclose(work.x[mine], each) and np.allclose(np.add(work.x[mine], wait.x[mine]), each.max())
        assert np.allclose(begin[mine], begin[8 * step]) and np.allclose(end[mine], begin[mine] + each)


def test_timeline_titles_are_the_metrics():
    fig = views.rank_timeline("HBP: 16 Ki and 128 Ki", "window:8", 16)
    m = metrics(views._race("HBP: 16 Ki and 128 Ki", "window:8", 16, 1), DEFAULT_COST)
    assert number("idle # %", fig) == pytest.approx(100 * m["idle"], abs=0.005) and number("ABR #,", fig) == pytest.approx(m["abr"], abs=5e-4)


def test_map_leaves_out_what_does_not_fit():
    time, memory, layers = views._strategy_grid("llama3.1-8b", 32, 80.0, "none")
    assert np.isnan(time[memory > 95]).all() and np.isnan(time).any() and (layers[~np.isnan(layers)] == 0).all()
    more = views._strategy_grid("llama3.1-8b", 32, 80.0, "all")[1]
    assert (more[~np.isnan(memory)] <= memory[~np.isnan(memory)] + 1e-9).all()  # checkpointing frees memory
    odd = views._strategy_grid("llama3.1-8b", 8, 80.0, "all")[0]
    assert np.isnan(odd[views.MAP_DEGREES.index(16)]).all()


def test_builder_shows_the_packs_and_the_trap():
    fig = views.group_builder(10, 4096, 5)
    left = []
    plan = isf(views._images().sizes, (10, 4096), rounds=5, stop=0.0, left=left)
    assert number("# packs", fig) == plan.packs and fig.data[3].y[0] == pytest.approx(100 * left[0] / len(views._images()))
    used = {t: number(r"# % of the tiles", views.group_builder(t, 4096, 30)) for t in (9, 10)}
    assert used[9] < 80 < 95 < used[10]


def test_own_cuts_are_simulated():
    own = views.pipeline_gantt(cuts=(20, 50, 70))
    assert title(own).startswith("cuts of your own") and [s.x0 for s in own.layout.shapes] == [19.5, 49.5, 69.5]
    assert number("step # of", views.pipeline_gantt(method="dp")) <= number("step # of", own)
    for bad in ((20, 20, 70), (0, 50, 70), (20, 50, 96), (20, 50)):
        with pytest.raises(ValueError, match="rising numbers"): views.pipeline_gantt(cuts=bad)


def test_ladder_adds_up_to_the_bytes_of_the_plan():
    plan = views._fitted("internvl-6b-20b", 8, 32, 100.0, "joint")
    fig = views.memory_figure(plan)
    assert np.allclose(sum(np.array(t.y) for t in fig.data[:4]) * 1e9, plan.stage_bytes)
    assert np.allclose(sum(np.array(t.y) for t in fig.data[5:8]) * 1e-3, plan.stage_s)


@pytest.mark.parametrize("name, changes", [
    ("packing_bench", {"median": 1000, "sigma": 0.5, "longs": 10.0, "capacity": "32 Ki", "packer": "isf", "ranks": 16}),
    ("rank_timeline", {"groups": "HBP: 16 Ki and 128 Ki", "order": "sort", "ranks": 16, "accumulate": 2}),
    ("strategy_map", {"model": "llama3.1-70b", "world": 128, "memory_gb": 128.0, "level": "all"}),
    ("group_builder", {"tiles": 12, "tokens": 6144, "rounds": 3, "ranks": 16}),
    ("pipeline_gantt", {"method": "exact", "cut2": 40, "micros": 8, "schedule": "gpipe", "model": "internvl-6b-34b"}),
    ("memory_ladder", {"memory_gb": 120.0, "recompute": "full", "stages": 10, "micros": 16, "model": "internvl-0.3b-7b"})])
def test_every_control_changes_the_figure(name, changes):
    box = getattr(views, f"{name}_widget")()
    state = lambda: json.dumps(box.fig.to_plotly_json(), default=lambda a: np.asarray(a).tolist(), sort_keys=True)
    assert set(changes) <= set(box.controls)
    for control, value in changes.items():
        before = state()
        box.controls[control].value = value
        assert box.message.value == "" and state() != before, control
        assert box.children[-1] is box.fig
        json.dumps(custom_serializers["to_json"](box.fig._data, box.fig), default=str, allow_nan=False)  # what the browser is sent


def test_a_mistake_is_said_and_the_figure_stays():
    box = views.rank_timeline_widget()
    shown = title(box.fig)
    box.controls["order"].value = "lpt"
    assert "accumulate=1" in box.message.value and title(box.fig) == shown
    box.controls["accumulate"].value = 4
    assert box.message.value == "" and title(box.fig).startswith("longest first")
    low = views.memory_ladder_widget()
    low.controls["memory_gb"].value = 40.0
    assert "needs" in low.message.value


def test_a_dragged_cut_is_ones_own_and_a_method_moves_the_cuts():
    box = views.pipeline_gantt_widget()
    box.controls["cut1"].value += 3
    assert box.controls["method"].value == "own cuts" and title(box.fig).startswith("cuts of your own")
    box.controls["method"].value = "exact"
    plan = views._cut("internvl-6b-20b", 4, 16, "dp", None, "1f1b")
    assert [box.controls[f"cut{k}"].value for k in (1, 2, 3)] == plan.cuts[1:-1].tolist() and title(box.fig).startswith("exact partition")
    box.controls["cut1"].value = box.controls["cut2"].value
    assert "rising numbers" in box.message.value


@pytest.mark.parametrize("name", ["rank_timeline", "strategy_map", "pipeline_gantt", "memory_ladder"])
def test_twins_hold_the_live_figures(name):
    made = getattr(views, f"{name}_twin")()
    choice = dict(zip(made.names, (v[-1] for v in made.values)))
    extra = {"rank_timeline": {"ranks": 16}, "pipeline_gantt": {"micros": 12}}.get(name, {})
    assert title(made.figures[-1]) == title(getattr(views, name)(**choice, **extra))
    assert len({title(f) for f in made.figures}) >= 15 and len(json.dumps(made.payload())) < viz.MAX_BYTES
