"Figures and twins."

import json
from itertools import product

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeltc_lab.core import viz
from modeltc_lab.serving import views


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_index_follows_the_product(sizes):
    controls = {f"c{i}": tuple(range(n)) for i, n in enumerate(sizes)}
    t = viz.twin(lambda **k: go.Figure(layout=dict(title=str(tuple(k.values())))), controls)
    for choice in product(*map(range, sizes)): assert t.figures[t.index(choice)].layout.title.text == str(choice)


def test_payload_is_plain_json_and_complete():
    for t in (views.memory_timeline_twin(), views.length_posterior_twin()):
        payload = json.loads(json.dumps(t.payload()))
        count = 1
        for c in payload["controls"]: count *= len(c["values"])
        assert len(payload["figures"]) == count and all(len(f["data"]) == len(payload["figures"][0]["data"]) for f in payload["figures"])
        assert t.figure.frames and t.figure.layout.sliders


def test_too_large_is_refused():
    with pytest.raises(ValueError, match="bytes, at most"): viz.twin(lambda a: go.Figure(go.Scatter(y=list(range(1_200_000)))), {"a": (1,)})


def test_every_policy_has_a_look():
    from modeltc_lab.serving.policies import POLICIES
    from modeltc_lab.serving.studies import MEMORY_POLICIES
    for name in (*POLICIES, *MEMORY_POLICIES): assert viz.style(name).color.startswith("#")


def test_widgets_follow_their_controls():
    w = views.memory_timeline_widget()
    seen = {w.fig.layout.title.text}
    for name, value in (("prompt", 2000), ("capacity", 6000), ("criterion", "current use"), ("generated", 400), ("criterion", "sum of maxima"), ("reply", 900)):
        w.controls[name].value = value
        assert w.fig.layout.title.text not in seen, name
        seen.add(w.fig.layout.title.text)
    w.controls["request"].value = "B"
    assert w.controls["prompt"].value == views.BATCH["B"][0]
    p = views.length_posterior_widget()
    p.controls["generated"].value = 250
    assert min(p.draws) > 250 and "after 250 tokens" in p.fig.layout.title.text


def test_frames_carry_what_moves_besides_the_data():
    def build(level):
        return go.Figure(go.Scatter(y=[1, 2]), layout=dict(shapes=[dict(type="line", x0=0, x1=1, y0=level, y1=level)] if level else [], yaxis=dict(range=[0, level + 1]), height=300))
    frames = viz.twin(build, {"level": (0, 1, 2)}).figure.frames
    assert [len(f.layout.shapes) for f in frames] == [0, 1, 1] and [f.layout.yaxis.range[1] for f in frames] == [1, 2, 3]
    assert all(f.layout.height is None for f in frames)


def test_numpy_values_become_plain_numbers():
    import numpy as np
    t = viz.twin(lambda a: go.Figure(), {"a": np.arange(3)}, default={"a": 1})
    assert t.values == ((0, 1, 2),) and type(t.values[0][0]) is int and t.default == (1,)


def test_page_of_a_twin_asks_no_host(tmp_path):
    import re
    page = viz.twin(lambda a: go.Figure(), {"a": ("x", "</script>")}, title="<b>?").to_html(tmp_path / "t.html").read_text()
    assert "&lt;b&gt;?" in page and page.count("</script>") == 2 and not re.search(r"<(script|link|img)[^>]+(src|href)=", page)


@pytest.mark.parametrize(("kind", "whole"), [(viz.LiveFigure, True), (go.FigureWidget, False)])
def test_a_live_figure_is_whole_when_it_reaches_the_browser(kind, whole, monkeypatch):
    "What the first message holds; plotly's own figure sends its traces later, which is why ours exists."
    import comm
    opened, create = [], comm.create_comm
    monkeypatch.setattr(comm, "create_comm", lambda **message: opened.append(message["data"]["state"]) or create(**message))
    live = kind(go.Figure(go.Scatter(y=[1, 2]), layout=dict(title="a")))
    ours = [state for state in opened if "_widget_data" in state]
    assert [bool(s["_widget_data"]) and bool(s["_widget_layout"].get("title")) for s in ours] == [whole]
    viz.refresh(live, go.Figure(go.Scatter(y=[3, 4]), layout=dict(title="b")))
    assert live.data[0].y == (3, 4) and live.layout.title.text == "b"


def test_changes_of_a_live_figure_go_as_letters_once_they_are_heard():
    "Nothing goes before; a page that knows less is given the whole, one that knows all gets the next letter only."
    live = viz.LiveFigure(go.Figure(go.Scatter(y=np.array([1.0, 2.0]))))
    told = []
    live._mail.observe(lambda change: told.append((change.name, change.new)), ["whole", "letter"])
    for title in "ab": live.layout.title.text = title
    assert told == []
    live._handle_custom_msg({"heard": 0}, [])
    (name, (number, data, layout)), = told
    assert (name, number, layout["title"]["text"]) == ("whole", 2, "b") and data[0]["y"].tolist() == [1, 2]
    live.layout.title.text = "c"
    live._handle_custom_msg({"heard": 3}, [])
    assert [(name, new[:2]) for name, new in told[1:]] == [("letter", [3, "_py2js_relayout"])] and told[1][1][2]["relayout_data"] == {"title.text": "c"}
    live._handle_custom_msg({"heard": 2}, [])
    assert told[2][0] == "whole" and told[2][1][0] == 3
