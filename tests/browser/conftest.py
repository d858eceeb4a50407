"One Chromium for all browser tests; without it they say how to install it."

import shutil
import warnings

import pytest
from jupyter_pages import server_over_notebooks

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
INSTALL = "apt-get install chromium, and pip install playwright"


@pytest.fixture(scope="session")
def browser():
    "A running Chromium."
    api = pytest.importorskip("playwright.sync_api", reason=f"playwright is missing: {INSTALL}", exc_type=ImportError)
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None: pytest.skip(f"no Chromium found ({', '.join(NAMES)}): {INSTALL}")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab server on the loopback interface over a copy of the notebooks: its address."
    with server_over_notebooks(tmp_path_factory.mktemp("lab")) as address: yield address


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    "On a machine with more to do than cores a browser may miss a deadline: a test that waited in vain starts over with its cells run afresh, once, and says so."
    from playwright.sync_api import TimeoutError as Late
    try: return (yield)
    except Late as late:
        pages = [p for p in pyfuncitem.funcargs.values() if hasattr(p, "afresh")]
        if not pages: raise
        warnings.warn(f"{pyfuncitem.nodeid} waited in vain and is run once more: {late}", stacklevel=1)
        for p in pages: p.afresh = True
        try: pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames})
        finally:
            for p in pages: p.afresh = False
        return True
