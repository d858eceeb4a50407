"One Chromium for all browser tests; without it they say how to install it."

import shutil

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
