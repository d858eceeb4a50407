"Who leans on whom: the rules between the rooms, read from the imports."

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = {"serving", "decoding", "quant", "matting", "diffusion", "sparsity", "balance"}
MAY_USE = {"matting": {"quant"}, "diffusion": {"quant"}, "sparsity": {"quant"}}
FIGURES = re.compile(r"plotly|ipywidgets|anywidget|IPython|jupyter\w*|ipykernel|nbclient|matplotlib")
PEERS = {"vllm", "sglang", "xgrammar", "llguidance", "glrmask", "kbnf", "lmformatenforcer", "outlines_core", "torchao", "simpy", "vidur", "trl", "timm", "llamafactory", "torchtune", "prtpy", "binpacking", "ortools"}
HOSTS = {"modeltc_lab.serving.vllm_plugin": {"vllm"}, "modeltc_lab.decoding.vllm_backend": {"vllm"}}   # plug-ins: what they extend is no peer to them, but still imported only when it is used


def names(node, package):
    "What one node imports, absolute: export writes our own imports as relative ones, `from ..core.data import load`."
    if isinstance(node, ast.Import): return [a.name for a in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
        origin = ".".join([*base, *([node.module] if node.module else [])])
        return [origin] + [f"{origin}.{a.name}" for a in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__") and node.args:
        return [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
    return []


def at_import(node):
    "The nodes that run when the module is imported: not the bodies of functions, nor what only a type checker reads."
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda): return
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"): return
    yield node
    for child in ast.iter_child_nodes(node): yield from at_import(child)


def imports(source, package):
    "Names a source in this package imports: at any depth, and those at import time only."
    tree = ast.parse(source)
    return [n for node in ast.walk(tree) for n in names(node, package)], [n for node in at_import(tree) for n in names(node, package)]


def room(module):
    "The sub-package of a module of ours, None for others."
    parts = module.split(".")
    return parts[1] if parts[0] == "modeltc_lab" and len(parts) > 1 else None


def violations(module, source, package=None):
    "What a module imports and must not."
    every, top = imports(source, package or module.rpartition(".")[0])
    here, last, bad = room(module), module.split(".")[-1], []
    for name in every:
        there, first = room(name), name.split(".")[0]
        if module.startswith("modeltc_kernels") and first == "modeltc_lab": bad.append(f"{module}: kernels know nothing of {name}")
        if here == "core" and there in DOMAINS: bad.append(f"{module}: core knows no room, imports {name}")
        if here in DOMAINS and there in DOMAINS and there != here and there not in MAY_USE.get(here, set()): bad.append(f"{module}: another room, {name}")
        if FIGURES.fullmatch(first) and last not in ("views", "viz"): bad.append(f"{module}: figures belong to views, imports {name}")
        if (there and name.split(".")[2:3] == ["views"] or name == "modeltc_lab.core.viz") and last not in ("views", "viz") and (last != "commands" or name in top):
            bad.append(f"{module}: only views, and a command that is asked for a report, use {name}")
        if first in PEERS - HOSTS.get(module, set()) and "compare" not in module.split("."): bad.append(f"{module}: peers belong to compare modules, imports {name}")
    bad += [f"{module}: peer {n} imported at the top" for n in top if n.split(".")[0] in PEERS]
    if any(isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names) for n in ast.walk(ast.parse(source))): bad.append(f"{module}: star import")
    if module.startswith("modeltc_kernels"):
        allowed = {"torch", "triton", "modeltc_kernels"} | set(sys.stdlib_module_names)
        bad += [f"{module}: kernels import torch and triton only, not {n}" for n in every if n.split(".")[0] not in allowed]
    return bad


def modules():
    "Every module of ours: dotted name, package that relative imports start from, file."
    for base in (ROOT, ROOT / "kernels"):
        for package in ("modeltc_lab", "modeltc_kernels"):
            for path in sorted((base / package).rglob("*.py")):
                name = ".".join(path.relative_to(base).with_suffix("").parts)
                yield name.removesuffix(".__init__"), name.rpartition(".")[0], path


def cycles(graph):
    "Modules that import themselves through others, at import time."
    seen, stack, found = set(), [], []
    def visit(node):
        if node in stack: found.append([*stack[stack.index(node):], node])
        if node in seen or node in stack: return
        stack.append(node)
        for child in graph.get(node, ()): visit(child)
        stack.pop()
        seen.add(node)
    for node in graph: visit(node)
    return found


def test_rooms_keep_the_rules():
    assert [v for name, package, path in modules() for v in violations(name, path.read_text(), package)] == []


def test_no_circles():
    known = {name: (package, path) for name, package, path in modules()}
    graph = {name: {n for n in imports(path.read_text(), package)[1] if n in known and n != name} for name, (package, path) in known.items()}
    assert "modeltc_lab.core.settings" in graph["modeltc_lab.core.data"] and "modeltc_lab.serving.policies" in graph["modeltc_lab.serving.past_future"]  # what export wrote is seen
    assert cycles(graph) == []


@pytest.mark.parametrize("module, source", [
    ("modeltc_kernels.k", "import modeltc_lab.core"), ("modeltc_kernels.k", "import numpy"), ("modeltc_lab.core.x", "from modeltc_lab.serving import y"),
    ("modeltc_lab.serving.x", "from modeltc_lab.quant.y import z"), ("modeltc_lab.serving.x", "def f():\n    import plotly"),
    ("modeltc_lab.core.x", "from ..serving import y"), ("modeltc_lab.core.x", "from .. import serving"), ("modeltc_lab.serving.x", "def f():\n    from ..quant.y import z"),
    ("modeltc_lab.core.x", "from importlib import import_module\nimport_module('modeltc_lab.serving.y')"), ("modeltc_lab.serving.x", "import jupyter_client"),
    ("modeltc_lab.serving.x", "from .views import y"), ("modeltc_lab.serving.x", "from ..core import viz"), ("modeltc_lab.serving.commands", "from .views import y"),
    ("modeltc_lab.serving.x", "import simpy"), ("modeltc_lab.compare.serving", "import simpy"), ("modeltc_lab.compare.serving", "try: import simpy\nexcept ImportError: pass"),
    ("modeltc_lab.serving.x", "from os import *"), ("modeltc_lab.serving.vllm_plugin", "import vllm"), ("modeltc_lab.serving.vllm_plugin", "def f():\n    import sglang"),
    ("modeltc_lab.serving.x", "def f():\n    from vllm.v1 import y")])
def test_the_rules_can_fail(module, source): assert violations(module, source)


def test_the_rules_allow_what_they_should():
    for module, source in (("modeltc_lab.diffusion.x", "from modeltc_lab.quant.y import z"), ("modeltc_lab.diffusion.x", "from ..quant.y import z"),
                           ("modeltc_lab.serving.views", "import plotly"), ("modeltc_lab.serving.views", "from ..core import viz"), ("modeltc_lab.serving.x", "from ..core.data import load"),
                           ("modeltc_lab.serving.commands", "def f():\n    from modeltc_lab.serving.views import y"),
                           ("modeltc_lab.compare.serving", "def f():\n    import simpy"), ("modeltc_lab.serving.vllm_plugin", "def f():\n    from vllm.v1 import y"), ("modeltc_kernels.k", "import torch, triton, os")):
        assert violations(module, source) == []
    assert cycles({"a": {"b"}, "b": {"a"}}) and not cycles({"a": {"b"}, "b": set()})


@pytest.mark.parametrize("code, forbidden", [
    ("from modeltc_lab.core.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass", ("torch", "plotly", "transformers", "numba", "pandas")),
    ("import modeltc_lab", ("torch", "plotly", "transformers", "numpy", "pydantic")),
    ("from modeltc_lab.core.cli import main; main(['sim', '--help'])", ("torch", "plotly", "transformers", "numba", "pandas", "numpy", "pydantic")),
    ("from modeltc_lab.core.cli import main; main(['pack', '--help'])", ("torch", "plotly", "transformers", "numba", "pandas", "numpy", "pydantic")),
    ("import modeltc_lab.balance.omnibal, modeltc_lab.balance.hbp, modeltc_lab.balance.selection", ("torch", "plotly", "transformers", "pandas", "ortools")),
    ("import modeltc_lab.serving.token_sim", ("torch", "plotly", "transformers", "pandas"))])
def test_import_weight(code, forbidden):
    "Heavy packages stay out until they are needed."
    check = f"{code}\nimport sys\nprint('LOADED', [m for m in {forbidden!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.strip().splitlines()[-1] == "LOADED []", ran.stdout[-500:] + ran.stderr[-500:]
