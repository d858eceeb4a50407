"What tests of notebooks in a real JupyterLab share: a server, a notebook that has run, a widget to move."

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import compiled
import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_MS, CELL_PATIENCE_MS, MOVED_MS = 180_000, 600_000, 90_000  # for one look at a page; for one cell, as in docs/execute.py: the first run on a busy machine compiles; for a figure to show its state


def free_port():
    "A port nobody listens on, from those a system never gives to a program that asks for any: nobody takes it before the server is up."
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)): return port
    pytest.fail("100 ports between 20000 and 32000 are taken")


@contextmanager
def server_over_notebooks(home):
    "A JupyterLab server on the loopback interface over a copy of the notebooks; yields its address."
    port = free_port()
    shutil.copytree(ROOT / "nbs", home / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", home)
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"),
           "IPYTHONDIR": str(home / "ipython"), "JUPYTER_CONFIG_PATH": str(ROOT / ".ci/jupyter"), "OMP_NUM_THREADS": "1", "MODELTC_LAB_RESULTS_DIR": str(ROOT / "docs/results"),
           "MODELTC_LAB_DATA_DIRS": str(ROOT.parent / "shared" / "data"), **compiled.KERNEL}
    env.pop("PLOTLY_RENDERER", None)
    files = sys.platform != "win32"  # kernels are reached through files: a port can be taken before a kernel listens on it. Their path has to be short
    with open(home / "log", "w") as log, tempfile.TemporaryDirectory(prefix="lab-", dir="/tmp" if files else None) as runtime:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token=",
                                   f"--ServerApp.root_dir={home / 'nbs'}", "--ServerApp.port_retries=0", "--expose-app-in-browser", *["--KernelManager.transport=ipc"] * files],
                                  env={**env, "JUPYTER_RUNTIME_DIR": runtime}, stdout=log, stderr=subprocess.STDOUT)
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
    page.on("pageerror", lambda e: page.errors.append(e.stack or str(e)))
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


# Run one cell of the notebook in front once more; ends when the cell has.
AGAIN = """i => {
  const app = window.jupyterapp, notebook = app.shell.currentWidget.content, code = notebook.widgets.map((w, k) => [w.model.type, k]).filter(c => c[0] === 'code');
  notebook.activeCellIndex = code[i][1];
  return app.commands.execute('notebook:run-cell');
}"""


# What a busy browser does to a figure that is about to start: plotly's code comes when it is let go, and anywidget's time to start is over at once. Then wait until the kernel has answered all it was told.
STARVE = """() => {
  const plotly = globalThis.modeltcPlotly, timeout = AbortSignal.timeout;
  AbortSignal.timeout = () => { const over = new AbortController(); queueMicrotask(() => over.abort()); return over.signal; };
  globalThis.modeltcPlotly = new Promise(go => globalThis.letGo = () => { AbortSignal.timeout = timeout; go(plotly); });
}"""
ANSWERED = "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code: ''}).done"
LATE = "[anywidget] Failed to initialize model."  # from then on anywidget drops what its widget is told; our figures are told by another way


def widget(page, index):
    "The output of the cell with this widget panel, scrolled into view and drawn."
    page.evaluate("i => document.querySelectorAll('.jp-CodeCell')[i].scrollIntoView({block: 'start'})", index)
    cell = page.locator(".jp-CodeCell").nth(index)
    cell.locator(".js-plotly-plot .main-svg").first.wait_for()
    page.wait_for_function(DRAWN, arg=cell.element_handle(), timeout=MOVED_MS)
    return cell


def drawn_late(page, index, act):
    "What a figure shows that could start only after a control had been moved; the cell with it."
    cell, known = page.locator(".jp-CodeCell").nth(index), len(page.errors)
    page.evaluate(STARVE)
    page.evaluate(AGAIN, index)
    act(cell)
    page.evaluate(ANSWERED)
    assert cell.locator(".js-plotly-plot").count() == 0
    page.evaluate("() => letGo()")
    page.wait_for_function(DRAWN, arg=cell.element_handle())
    page.evaluate(ANSWERED)
    assert any(LATE in e for e in page.errors[known:])
    return json.loads(cell.element_handle().evaluate(STATE)), cell


def sources(path):
    "Code cells of a notebook."
    return ["".join(c["source"]) for c in json.loads((ROOT / "nbs" / path).read_text())["cells"] if c["cell_type"] == "code"]


def cells_with(name, path):
    "Place of the code cell that shows a widget."
    return next(i for i, s in enumerate(sources(path)) if s.startswith(f"{name} = "))


# A figure is there when it has its title and its traces.
DRAWN = "el => { const g = el.querySelector('.js-plotly-plot'); return g?.layout?.title?.text && g.data?.length; }"
STATE = "el => { const g = el.querySelector('.js-plotly-plot'); return JSON.stringify([g.layout.title.text, g.data.map(t => [...(t.y?._inputArray || t.y || [])].slice(0, 40))]); }"
CHANGED = "([el, old]) => { const g = el.querySelector('.js-plotly-plot'); return g?.layout?.title?.text && g.data && JSON.stringify([g.layout.title.text, g.data.map(t => [...(t.y?._inputArray || t.y || [])].slice(0, 40))]) !== old; }"


def moves(page, cell, act):
    "Do something to a control and wait until the figure has changed."
    handle = cell.element_handle()
    before = handle.evaluate(STATE)
    act()
    page.wait_for_function(CHANGED, arg=[handle, before], timeout=MOVED_MS)
    return json.loads(before), json.loads(handle.evaluate(STATE))


def press(slider, key="ArrowRight"):
    "One step, so that one update follows and none is left over for the next control."
    slider.focus()
    slider.press(key)


def no_cell_failed(page):
    "Every cell ran without an error."
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'] >> text=Traceback").all_text_contents() == []
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").all_text_contents() == []


def quiet(page):
    "No page error but anywidget's about a late start, no pop-up, no request to another host."
    assert page.locator(".Toastify__toast").count() == 0
    assert not (other := [e for e in page.errors if LATE not in e]), other
    assert {h.split(":")[0] for h in page.hosts} == {"127.0.0.1"}, page.hosts
