"House rules for kernel files."

import re
from pathlib import Path

KERNELS = sorted((Path(__file__).resolve().parents[2] / "kernels/modeltc_kernels").glob("*.py"))
BANNED = re.compile(r"make_block_ptr|tl\.advance|autotune|tl\.program_id\(\d\) \*")


def test_no_banned_calls():
    assert [f"{p.name}: {line}" for p in KERNELS for line in p.read_text().splitlines() if BANNED.search(line)] == []
    assert BANNED.search("p = tl.make_block_ptr(x)") and BANNED.search("tl.program_id(0) * stride")


def test_every_kernel_has_a_reference():
    for p in KERNELS:
        text = p.read_text()
        if "@triton.jit" in text: assert re.search(r"^def \w+_ref\(", text, flags=re.M) and "custom_op" in text, p.name
