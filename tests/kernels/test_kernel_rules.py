"House rules for kernel files, and that the rules can fail."

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "kernels/modeltc_kernels").glob("*.py"))
BANNED = re.compile(r"make_block_ptr|tl\.advance|autotune|tl\.program_id\(\d\) \*")
ALLOWED = {"torch", "triton", "modeltc_kernels", *sys.stdlib_module_names}


def foreign(text):
    "Imports, at any depth, of anything but torch, triton, the standard library and these kernels."
    found = []
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or "."] if isinstance(node, ast.ImportFrom) else []
        found += [n for n in names if n.split(".")[0] not in ALLOWED]
    return found


def unmasked(text):
    "Loads of a block without `other=`; a load of one value by a plain program index needs none."
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and ast.unparse(n.func) in ("tl.load", "tl.store")]
    keys = lambda c: {k.arg for k in c.keywords}
    return [ast.unparse(c) for c in calls if "mask" in keys(c) and ast.unparse(c.func) == "tl.load" and "other" not in keys(c)]


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_imports(path): assert foreign(path.read_text()) == []


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_no_banned_calls(path):
    text = path.read_text()
    assert [line for line in text.splitlines() if BANNED.search(line)] == [] and unmasked(text) == []


@pytest.mark.parametrize("path", [p for p in KERNELS if "@triton.jit" in p.read_text()], ids=lambda p: p.stem)
def test_order_of_a_family(path):
    "Reference, kernels, launcher's op, public function, of every op the file registers."
    text = path.read_text()
    ops = re.findall(r'custom_op\("modeltc::(\w+)"', text)
    for op in ops:
        places = [m.start() if (m := re.search(p, text, flags=re.M)) else -1
                  for p in (rf"^def {op}_ref\(", r"^@triton\.jit", rf'^@torch\.library\.custom_op\("modeltc::{op}"', rf"^@_{op}_op\.register_fake", rf"^def {op}\(")]
        assert -1 not in places and places == sorted(places), op
    assert ops


def test_the_folder_is_no_package(): assert not (ROOT / "kernels/__init__.py").exists() and KERNELS


def test_the_rules_can_fail():
    assert foreign("def f():\n    import numpy") == ["numpy"] and foreign("from modeltc_lab.core import viz") and not foreign("import torch.nn, os")
    assert BANNED.search("p = tl.make_block_ptr(x)") and BANNED.search("tl.program_id(0) * stride")
    assert unmasked("tl.load(p, mask=m)") and not unmasked("tl.load(p, mask=m, other=0.0)") and not unmasked("tl.load(p)")
