"JupyterLab in a real browser: open the technique notebook, run it, move every control, read the changed figure."

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import compiled
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_MS, CELL_PATIENCE_MS = 180_000, 600_000  # for one look at a page; for one cell, as in docs/execute.py: the first run on a busy machine compiles
TECHNIQUE, GALLERY, DECODING = "serving/13_past_future.ipynb", "serving/19_views.ipynb", "decoding/29_views.ipynb"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab server on the loopback interface over a copy of the notebooks; yields its address."
    home, port = tmp_path_factory.mktemp("lab"), free_port()
    shutil.copytree(ROOT / "nbs", home / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", home)
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
           "IPYTHONDIR": str(home / "ipython"), "JUPYTER_CONFIG_PATH": str(ROOT / ".ci/jupyter"), "OMP_NUM_THREADS": "1", "MODELTC_LAB_RESULTS_DIR": str(ROOT / "docs/results"),
           "MODELTC_LAB_DATA_DIRS": str(ROOT.parent / "shared" / "data"), **compiled.KERNEL}
    env.pop("PLOTLY_RENDERER", None)
    with open(home / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token=",
                                   f"--ServerApp.root_dir={home / 'nbs'}", "--ServerApp.port_retries=0", "--expose-app-in-browser"], env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_up(port, server, home / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def wait_until_up(port, server, log):
    "Ask for the server's state until it answers; the connection attempt itself is the wait."
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(4000):
        if server.poll() is not None: pytest.fail(f"JupyterLab ended: {log.read_text()[-2000:]}")
        try:
            opener.open(f"http://127.0.0.1:{port}/api/status", timeout=5)
            return
        except OSError: server_pause(server)
    pytest.fail(f"JupyterLab did not come up: {log.read_text()[-2000:]}")


def server_pause(server):
    "Wait a moment for the server to end; it is not expected to."
    try: server.wait(0.05)
    except subprocess.TimeoutExpired: return


def opened(lab, browser, path):
    "A notebook in the browser, run from top to bottom; page errors and outside requests are kept."
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    page.errors, page.hosts = [], set()
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    page.on("request", lambda r: page.hosts.add(r.url.split("/")[2]) if r.url.startswith("http") else None)
    page.goto(f"{lab}/lab/tree/{path}?reset")
    page.wait_for_function(READY, arg=path)
    page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
    wait_until_run(page, path)
    return page


def wait_until_run(page, path):
    "Wait for the end of a run, as long as one cell after the other ends; otherwise say where it stands."
    from playwright.sync_api import TimeoutError as Late
    cells = [s for s in sources(path) if s.strip()]
    state = {"run": 0}
    while not state.get("over"):
        try: state = page.wait_for_function(PROGRESS, arg=[state["run"], len(cells)], timeout=CELL_PATIENCE_MS).json_value()
        except Late:
            state = page.evaluate(PROGRESS, [-1, len(cells)])
            pytest.fail(f"{path}: {state['run']} of {len(cells)} cells have run, none ended in the last {CELL_PATIENCE_MS // 1000} s; kernel {state['kernel']!r}, waiting {state['waiting']}, "
                        f"failed {state['failed']}, in {state['now']!r}; page errors {page.errors}; dialog {page.locator('.jp-Dialog').all_text_contents()}")


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


@pytest.fixture(scope="module")
def decoding(lab, browser):
    "The views of constrained decoding."
    page = opened(lab, browser, DECODING)
    yield page
    page.close()


# The notebook is in front, its kernel answers, and JupyterLab would run its cells: a menu that is opened earlier lists a command that does nothing, and nothing ever runs.
READY = """path => {
  const app = window.jupyterapp, panel = app?.shell.currentWidget, kernel = panel?.sessionContext?.session?.kernel;
  return panel?.context?.path === path && panel.context.isReady && kernel?.connectionStatus === 'connected' && kernel.status === 'idle' && app.commands.isEnabled('notebook:run-all-cells');
}"""
# Where a run stands, when it is further than before: over when the kernel is idle, no cell waits, and all have been counted or one has failed (those after it do not run).
PROGRESS = """([before, cells]) => {
  const code = [...document.querySelectorAll('.jp-CodeCell')], prompt = c => c.querySelector('.jp-InputArea-prompt')?.textContent ?? '';
  const run = code.filter(c => /\\d/.test(prompt(c))).length, waiting = code.filter(c => prompt(c).includes('*'));
  const failed = document.querySelectorAll("[data-mime-type='application/vnd.jupyter.error']").length;
  const kernel = document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status;
  const over = kernel === 'idle' && !waiting.length && (run >= cells || failed > 0);
  return (over || run > before) && {over, run, failed, kernel, waiting: waiting.length, now: waiting[0]?.querySelector('.cm-line')?.textContent ?? ''};
}"""


def widget(page, index):
    "The output of the cell with this widget panel, scrolled into view and drawn."
    page.evaluate("i => document.querySelectorAll('.jp-CodeCell')[i].scrollIntoView({block: 'start'})", index)
    cell = page.locator(".jp-CodeCell").nth(index)
    cell.locator(".js-plotly-plot .main-svg").first.wait_for()
    page.wait_for_function(DRAWN, arg=cell.element_handle())
    return cell


def sources(path):
    "Code cells of a notebook."
    return ["".join(c["source"]) for c in json.loads((ROOT / "nbs" / path).read_text())["cells"] if c["cell_type"] == "code"]


def cells_with(name, path=TECHNIQUE):
    "Place of the code cell that shows a widget."
    return next(i for i, s in enumerate(sources(path)) if s.startswith(f"{name} = "))


# A figure widget is drawn empty first; it is there when it has its title and its traces.
DRAWN = "el => { const g = el.querySelector('.js-plotly-plot'); return g?.layout?.title?.text && g.data?.length; }"
STATE = "el => { const g = el.querySelector('.js-plotly-plot'); return JSON.stringify([g.layout.title.text, g.data.map(t => [...(t.y?._inputArray || t.y || [])].slice(0, 40))]); }"
CHANGED = "([el, old]) => { const g = el.querySelector('.js-plotly-plot'); return g?.layout?.title?.text && g.data && JSON.stringify([g.layout.title.text, g.data.map(t => [...(t.y?._inputArray || t.y || [])].slice(0, 40))]) !== old; }"


def moves(page, cell, act):
    "Do something to a control and wait until the figure has changed."
    handle = cell.element_handle()
    before = handle.evaluate(STATE)
    act()
    page.wait_for_function(CHANGED, arg=[handle, before])
    return json.loads(before), json.loads(handle.evaluate(STATE))


def press(slider, key="ArrowRight"):
    "One step, so that one update follows and none is left over for the next control."
    slider.focus()
    slider.press(key)


@pytest.mark.parametrize("name", ["notebook", "gallery", "decoding"])
def test_no_cell_failed(name, request):
    notebook = request.getfixturevalue(name)
    assert notebook.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'] >> text=Traceback").all_text_contents() == []
    assert notebook.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").all_text_contents() == []


def test_memory_timeline_every_control(notebook):
    cell = widget(notebook, cells_with("memory_widget"))
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
    cell = widget(notebook, cells_with("posterior_widget"))
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
    gallery.wait_for_function("el => el.querySelector('.js-plotly-plot').layout?.title?.text?.startsWith('Aggressive')", arg=cell.element_handle())
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


def test_twin_slider_moves_in_the_notebook(notebook):
    cell = widget(notebook, sources(TECHNIQUE).index("views.memory_timeline_twin()"))
    rail = cell.locator(".slider-rail-touch-rect")
    rail.wait_for()
    moves(notebook, cell, lambda: rail.click(position={"x": 6, "y": 6}))


@pytest.mark.parametrize("name", ["notebook", "gallery", "decoding"])
def test_quiet(name, request):
    "No page error, no pop-up, no request to another host."
    page = request.getfixturevalue(name)
    assert page.locator(".Toastify__toast").count() == 0
    assert page.errors == [] and {h.split(":")[0] for h in page.hosts} == {"127.0.0.1"}
