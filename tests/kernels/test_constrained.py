"Constrained decoding on the device: kernels against references, in the interpreter on CPU and on a GPU alike, and against the batch of the host."

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from modeltc_kernels import constrained as c
from modeltc_kernels.constrained import (
    DEAD,
    DEEP,
    FINE,
    OVER,
    SHORT,
    UNKNOWN,
    WRONG,
    State,
    Tables,
    advance_classify,
    fill_bitmask,
    gather_apply,
    masked_argmax,
    masked_topk_sample,
    row_lists,
    take_back,
)
from modeltc_kernels.runtime import INTERPRETED

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make gpu")
DTYPES = list(c.DTYPES)

# --- a grammar small enough to do by hand: s: "(" s ")" | "a", blanks ignored ------------------------------------------------

TOKENS = [b"(", b")", b"a", b"((", b"a)", b"))", b" ", b"(a", None, b"a))))", b""]  # None ends the text, the empty one is never allowed
OPEN, CLOSE, A, OPEN2, A_CLOSE, CLOSE2, BLANK, OPEN_A, END, A_CLOSE4, NEVER = range(11)
ACTION = [[1, 0, 2, 0], [1, 0, 2, 0], [0, -2, 0, -2], [0, 0, 0, c.ACCEPT], [0, 5, 0, 0], [0, -1, 0, -1]]   # columns ( ) a $
GOTO = [[3], [4], [-1], [-1], [-1], [-1]]
DELTA = {0: {"(": 1, ")": 2, "a": 3, " ": 4}, 4: {" ": 4}}  # lexer: one state behind each lexeme, blanks go on
CONTEXT_NODE, ROOTS, BELOW, ANSWER = 0, 1, 2, 7              # nodes: how lexemes begin, where masks are asked for, and what is there
ROWS = [1 << END, 0b1111, 1 << CLOSE | 1 << CLOSE2 | 1 << END, 1 << CLOSE | 1 << BLANK, 1 << BLANK | 1 << END]  # by lexer state; the first is also that of a text that has ended


def hashed(entries):
    "Keys and values of an open hash table, half full at most."
    size = 4
    while size < 2 * len(entries): size *= 2
    keys, values = [-1] * size, [0] * size
    for (node, x), value in entries.items():
        key = node << c.BITS | x
        i = ((key * c.MULTIPLIER + 2**63) % 2**64 - 2**63 >> c.SHIFT) & (size - 1)
        while keys[i] != -1: i = (i + 1) % size
        keys[i], values[i] = key, value
    return torch.tensor(keys), torch.tensor(values, dtype=torch.int32)


def entries():
    "The stack automaton: a lexeme begins in state 0 whatever the stack; a mask is found by lexer state, behind `)` only two cells down."
    out = {(CONTEXT_NODE, s): -2 - ANSWER for s in range(6)} | {(ANSWER, c.CONTEXT): 0} | {(ROOTS, q): BELOW for q in range(5)} | {(ROOTS, 2): BELOW + 1}
    out |= {(BELOW, s): -2 - ANSWER for s in range(6)} | {(BELOW + 1, s): BELOW for s in range(6)}
    return out | {(ANSWER, q): q for q in range(5)}


def parens(device, n=1, depth=8, history=4, without=(), grammar=0):
    "Tables and a state in the beginning."
    delta = torch.full((5, 256), -1, dtype=torch.int32)
    for q, line in DELTA.items():
        for byte, y in line.items(): delta[q, ord(byte)] = y
    text = b"".join(t or b"" for t in TOKENS)
    off = torch.tensor([0] + [len(t or b"") for t in TOKENS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = torch.tensor(ROWS, dtype=torch.int32)[:, None]
    i16, i32 = (lambda v: torch.tensor(v, dtype=torch.int16)), (lambda v: torch.tensor(v, dtype=torch.int32))
    tables = Tables(delta, i32([-1, 0, 1, 2, 3]), i32([0] * 5), i32([len(text)] * 5), torch.tensor(list(text), dtype=torch.uint8), off, torch.tensor([0] * 8 + [1, 0, 2], dtype=torch.int8),
                    *hashed({k: v for k, v in entries().items() if k not in without}), torch.tensor([[0, 4, 0, 1, 0, 0, CONTEXT_NODE]]), i16(ACTION).flatten(), i16(GOTO).flatten(), i16([3, 1]), i16([0, 0]), i16([0, 1, 2, -1]),
                    rows, *row_lists(rows), i32([0]))
    zeros = lambda *shape, dtype=torch.int32: torch.zeros(shape, dtype=dtype)
    i64 = torch.int64
    state = State(torch.full((n,), grammar, dtype=torch.int32), zeros(n), torch.ones(n, dtype=torch.int32), zeros(n, depth, dtype=torch.int16), zeros(n, dtype=torch.int8), zeros(n), zeros(n, 2 * depth, dtype=torch.int16),
                  *(zeros(n, dtype=i64) for _ in range(4)), zeros(n, history, c.MARK, dtype=i64), zeros(n), zeros(n), zeros(n, 2, dtype=i64))
    return Tables(*(t.to(device) for t in tables)), State(*(t.to(device) for t in state))


def read(tables, state, *tokens, impl="triton"):
    for t in tokens: advance_classify(tables, state, torch.tensor([t], device=state.q.device).expand(len(state.q)).contiguous(), impl=impl)
    return state.what.tolist()


def held(state, b=0): return state.stack[b].tolist()


def same(a, b, but=("log",)):
    "Two states are equal in every bit; what the ring holds beyond what was logged is nobody's."
    for name, x, y in zip(State._fields, a, b): assert name in but or torch.equal(x, y), (name, x, y)


BOTH = pytest.mark.parametrize("impl", ["torch", "triton"])


@BOTH
def test_a_text_by_hand(device, impl):
    "A lexeme is pushed when the next byte shows that it is complete; reductions happen then, and what they overwrite is logged from the top down."
    tables, state = parens(device)
    trace = []
    for token in (OPEN, BLANK, OPEN_A, A_CLOSE, CLOSE):
        what = read(tables, state, token, impl=impl)
        trace.append((what[0], int(state.q), held(state)[:int(state.sp)], int(state.row)))
    assert trace == [(FINE, 1, [0], 1), (FINE, 4, [0, 1], 4), (FINE, 3, [0, 1, 1], 3), (DEAD, 3, [0, 1, 1], 3), (FINE, 2, [0, 1, 1, 2], 2)]
    read(tables, state, CLOSE, impl=impl)
    assert held(state) == [0, 1, 1, 4, 5, 0, 0, 0] and state.log[0, :int(state.logged)].tolist() == [2]
    read(tables, state, CLOSE, impl=impl)
    assert held(state) == [0, 1, 4, 5, 0, 0, 0, 0] and state.log[0, :int(state.logged)].tolist() == [2, 5, 4, 1]
    assert state.length.tolist() == [6] and state.flag.tolist() == [DEAD] and state.marks[0, 5 % 4].tolist() == [2, 5, 1, 0, 2]


@BOTH
def test_going_back_restores_every_bit(device, impl):
    tables, state = parens(device, history=9)
    before = []
    for token in (OPEN2, BLANK, OPEN_A, CLOSE, CLOSE2, BLANK, END, END):
        before.append([t.clone() for t in state])
        assert read(tables, state, token, impl=impl) == [FINE]
    assert state.over.tolist() == [1] and state.row.tolist() == [0]
    now, rings = [t.clone() for t in state], ("log", "peak", "marks", "what")
    for k in range(1, 9):
        take_back(state, torch.tensor([k], device=device), impl=impl)
        same(state, before[-k], rings)
        for t, x in zip(state, now): t.copy_(x)
    for k in range(1, 9):
        take_back(state, torch.tensor([1], dtype=torch.int32, device=device), impl=impl)
        same(state, before[-k], rings)
    for n in (1, -1):
        take_back(state, torch.tensor([n], device=device), impl=impl)
        assert state.flag.tolist() == [SHORT]
        same(state, before[0], (*rings, "flag"))
        state.flag.zero_()


@BOTH
def test_what_is_not_read_leaves_no_trace(device, impl):
    "Every code, in one launch; a refused token keeps the oldest mark, so that all of the history can still be taken back."
    tables, state = parens(device, n=9, depth=6, history=2)
    read(tables, state, OPEN2, BLANK, impl=impl)
    state.grammar[8] = -1
    advance_classify(tables, state, torch.tensor([END, *[-1] * 8], device=device), impl=impl)
    before = [t.clone() for t in state]
    advance_classify(tables, state, torch.tensor([A, A_CLOSE4, OPEN2, NEVER, len(TOKENS), -2, -1, A, A], device=device), impl=impl)
    read_, flags = state.what.tolist(), state.flag.tolist()
    assert read_ == [OVER, DEAD, FINE, DEAD, WRONG, WRONG, FINE, FINE, FINE] and flags == read_
    for b in (0, 1, 3, 4, 5, 6, 8):
        for name in ("q", "sp", "stack", "over", "row", "logged", "length", "marks"): assert torch.equal(getattr(state, name)[b], before[State._fields.index(name)][b]), (b, name)
    advance_classify(tables, state, torch.tensor([-1, -1, OPEN2, *[-1] * 6], device=device), impl=impl)
    assert state.what[2] == FINE and held(state, 2) == [0, 1, 1, 1, 1, 1]
    advance_classify(tables, state, torch.tensor([-1, -1, OPEN2, *[-1] * 6], device=device), impl=impl)
    assert state.what[2] == DEEP and held(state, 2) == [0, 1, 1, 1, 1, 1] and state.flag[2] == DEEP and state.length[2] == 4
    take_back(state, torch.tensor([0, 2, 2, 2, 0, 0, 0, 0, 0], device=device), impl=impl)
    assert held(state, 1) == [0] * 6 and state.q.tolist()[1:4] == [0, 4, 0] and state.sp.tolist()[1:4] == [1, 3, 1] and state.length.tolist()[1:4] == [0, 2, 0]


@BOTH
def test_missing_entries_are_said_and_guessed_at_by_nobody(device, impl):
    "In the middle of a token the token is not read; behind it the mask is not known, which allows nothing."
    tables, state = parens(device, without=[(CONTEXT_NODE, 1)])
    assert read(tables, state, OPEN_A, impl=impl) == [UNKNOWN] and held(state) == [0] * 8 and state.miss.tolist() == [[CONTEXT_NODE, 1]] and state.flag.tolist() == [UNKNOWN]
    for lost, q in (((ROOTS, 1), 1), ((BELOW, 0), 1), ((ANSWER, 1), 1), ((BELOW + 1, 1), 2)):
        tables, state = parens(device, without=[lost])
        what = read(tables, state, OPEN, *([A, CLOSE] if q == 2 else []), impl=impl)
        assert what == [FINE] and state.flag.tolist() == [UNKNOWN] and state.row.tolist() == [-2] and state.miss.tolist() == [list(lost)] or q == 2 and lost == (BELOW + 1, 1) and state.row.tolist() == [2]
    logits = torch.zeros(1, 11, device=device)
    tables, state = parens(device, without=[(ROOTS, 1)])
    read(tables, state, OPEN, impl=impl)
    gather_apply(logits, tables.rows, state.row, impl=impl)
    assert not logits.isfinite().any() and masked_argmax(logits, tables.rows, state.row, impl=impl).tolist() == [-1]
    assert read(tables, state, END, impl=impl) == [UNKNOWN] and state.over.tolist() == [0]


def test_kernel_equals_reference_on_random_tokens(device):
    tokens = torch.randint(-1, len(TOKENS), (40, 6), generator=torch.Generator().manual_seed(1)).to(device)
    tables, a = parens(device, n=6, depth=7, history=3)
    b = State(*(t.clone() for t in a))
    g = random.Random(2)
    for line in tokens:
        advance_classify(tables, a, line, impl="triton")
        advance_classify(tables, b, line.int(), impl="torch")
        same(a, b)
        if g.random() < 0.4:
            steps = torch.tensor([g.randrange(4) for _ in range(6)], device=device)
            take_back(a, steps, impl="triton")
            take_back(b, steps, impl="torch")
            same(a, b)
    assert len(set(a.flag.tolist())) > 1


# --- hashing and noise -------------------------------------------------------------------------------------------------------

@triton.jit
def find_kernel(keys_ptr, values_ptr, last, wanted_ptr, out_ptr, n):
    for i in range(0, n): tl.store(out_ptr + i, c.hash_find(keys_ptr, values_ptr, last, tl.load(wanted_ptr + i)))


def test_hash_wraps_as_64_bits_do(device):
    "Keys whose product leaves 64 bits, on both sides of zero; the kernel, the reference and the loop of the host find the same."
    g = random.Random(0)
    some = {(g.randrange(1 << 40), g.randrange(1 << 20)): g.randrange(-2**31, 2**31 - 1) for _ in range(200)}
    some = {k: v if v != -1 else 5 for k, v in some.items()}
    keys, values = hashed(some)
    wanted = [*some, *((g.randrange(1 << 40), g.randrange(1 << 20)) for _ in range(50))]
    out = torch.zeros(len(wanted), dtype=torch.int32, device=device)
    packed = torch.tensor([n << 20 | x for n, x in wanted], device=device)
    assert (packed * c.MULTIPLIER < 0).any() and (packed * c.MULTIPLIER > 0).any()
    find_kernel[(1,)](keys.to(device), values.to(device), len(keys) - 1, packed, out, len(wanted))
    tables = parens("cpu")[0]._replace(keys=keys, values=values)
    assert out.tolist() == [some.get(k, -1) for k in wanted] == [c._find_ref(tables, *k) for k in wanted]
    pytest.importorskip("numba", reason="the loop of the host needs numba")
    from modeltc_lab.decoding.pre3 import BITS, CONTEXT, _find
    assert (BITS, CONTEXT) == (c.BITS, c.CONTEXT)
    assert [int(_find(keys.numpy(), values.numpy(), int(k))) for k in packed.tolist()] == out.tolist()


@triton.jit
def noise_kernel(seeds_ptr, ids_ptr, x_ptr, bits_ptr, log_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(bits_ptr + at, tl.randint(tl.load(seeds_ptr), tl.load(ids_ptr + at)).to(tl.int64))
    tl.store(log_ptr + at, c.precise_log(tl.load(x_ptr + at)))


def test_noise_is_the_same_everywhere(device):
    "Philox against its published answer and Triton's; the logarithm against another one, and bit by bit."
    assert c.philox_ref(torch.tensor(0), torch.tensor(0)).item() == 0x6627E8D5
    x = torch.cat([torch.rand(200, generator=torch.Generator().manual_seed(0)), torch.tensor([2.0**-24, 1 - 2.0**-24, 1.0, 1.4142135, 1.4142137, 16.6, 6e-8]), torch.rand(49) * 17]).to(device)
    ids = torch.randint(0, 2**31 - 1, (256,), device=device, dtype=torch.int32)
    bits, logs = torch.zeros(256, dtype=torch.int64, device=device), torch.zeros(256, device=device)
    for seed in (0, 1, -1, 2**63 - 1, -2**63, 12345678901234567):
        noise_kernel[(1,)](torch.tensor([seed], device=device), ids, x, bits, logs, N=256, enable_fp_fusion=False)
        assert torch.equal(bits, c.philox_ref(torch.tensor(seed, device=device), ids))
    assert torch.equal(logs, c.log_ref(x))
    torch.testing.assert_close(logs.double(), x.double().log(), rtol=3e-7, atol=1e-7)
    noise = c.gumbel_ref(torch.arange(300)[:, None], torch.arange(300, dtype=torch.int32))
    assert abs(float(noise.mean()) - 0.5772) < 0.02 and abs(float(noise.var()) - 1.6449) < 0.05 and noise.isfinite().all()


# --- masks and logits --------------------------------------------------------------------------------------------------------

def masks(device, words, seed=0):
    "Seven masks: three random ones, nothing, everything, one token, a mixture of empty, full and mixed words."
    rows = torch.randint(-2**31, 2**31, (7, words), generator=torch.Generator().manual_seed(seed)).int()
    rows[3], rows[4], rows[5] = 0, -1, 0
    rows[5, words // 2], rows[6, ::3], rows[6, 1::3] = 1 << 7, 0, -1
    return rows.to(device), torch.tensor([0, 3, -1, 4, 5, 6, 1, -2], dtype=torch.int32, device=device)


def logits_of(device, n, columns, dtype, seed=0, spare=0): return torch.randn(n, columns + spare, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)[:, :columns]


def expected_of(logits, rows, ids, indices=None):
    "One bit after the other."
    out, words = logits.clone(), rows.tolist()
    for k, r in enumerate(ids.tolist()):
        line = k if indices is None else int(indices[k])
        for v in range(logits.shape[1]):
            if line >= 0 and r != -1 and not (r >= 0 and v < 32 * len(words[0]) and words[r][v // 32] >> (v % 32) & 1): out[line, v] = float("-inf")
    return out


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns, spare", [(65, 0), (96, 7), (128, 0), (131, 5)])
def test_apply(device, impl, dtype, columns, spare):
    "Columns that end in the middle of a word, at its end, and behind the vocabulary; rows that lie apart."
    rows, ids = masks(device, 3)
    logits = logits_of(device, len(ids), columns, dtype, spare=spare)
    logits[:, ::9] = float("nan")
    whole = logits.clone()
    expected = expected_of(logits, rows, ids)
    gather_apply(logits, rows, ids, impl=impl)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(logits[2].isnan(), whole[2].isnan()) and torch.equal(logits[3, :65].nan_to_num(), whole[3, :65].nan_to_num())


@BOTH
def test_apply_to_some_rows(device, impl):
    rows, ids = masks(device, 2)
    logits = logits_of(device, 11, 70, torch.float32)
    indices = torch.tensor([10, 2, 3, -1, 0, 7, 5, 9], device=device)
    for kind in (torch.int64, torch.int32):
        out = logits.clone()
        gather_apply(out, rows, ids, indices.to(kind), impl=impl)
        assert torch.equal(out, expected_of(logits, rows, ids, indices)) and torch.equal(out[[1, 4, 6, 8]], logits[[1, 4, 6, 8]])
    wide = torch.zeros(7, 5, dtype=torch.int32, device=device)
    wide[:, :2] = rows
    out = logits.clone()
    gather_apply(out, wide[:, :2], ids, indices, impl=impl)          # masks that lie apart
    assert torch.equal(out, expected_of(logits, rows, ids, indices))


def test_addresses_beyond_32_bits():
    "Rows so far apart that their offset does not fit in 32 bits; only a few pages of the file behind them exist."
    if torch.cuda.is_available(): pytest.skip("takes memory of the host only as it is touched")
    rows, ids = masks("cpu", 1)
    far = torch.empty_strided((2, 32), (2**30 + 64, 1), dtype=torch.bfloat16, device="meta")
    assert far.stride(0) * 2 > 2**31
    import mmap
    with mmap.mmap(-1, 2 * (2**30 + 64 + 32)) as memory:
        far = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, 32), (2**30 + 64, 1))
        far.copy_(torch.randn(2, 32))
        expected = expected_of(far.clone(), rows, ids[:2])
        gather_apply(far, rows, ids[:2], impl="triton")
        assert torch.equal(far, expected)
        del far


@pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter's loads and stores")
def test_what_is_read_and_written(device, monkeypatch):
    "Of logits: a word of ones neither, a word of zeros written only; the search reads no word without an allowed token, and with a list nothing but its tokens."
    from triton.runtime import interpreter
    rows, ids = masks(device, 6)
    logits = logits_of(device, len(ids), 6 * 32, torch.float32)
    seen = {"load": set(), "store": set()}
    builder, start = interpreter.interpreter_builder, logits.data_ptr()

    def watch(kind, name):
        plain = getattr(builder, name)

        def watched(ptrs, *args, **options):
            mask = args[0] if kind == "load" else args[1]
            at = (ptrs.data.astype("int64") - start)[mask.data.astype(bool)]
            seen[kind].update(int(a) // 4 for a in at if 0 <= a < logits.numel() * 4)
            return plain(ptrs, *args, **options)
        monkeypatch.setattr(builder, name, watched)
    watch("load", "create_masked_load")
    watch("store", "create_masked_store")
    words = {(b, w): int(rows[r, w]) if r >= 0 else 0 for b, r in enumerate(ids.tolist()) if r != -1 for w in range(6)}
    cells = lambda chosen: {b * 192 + 32 * w + i for b, w in chosen for i in range(32)}
    masked_argmax(logits, rows, ids, impl="triton")
    free = set(range(2 * 192, 3 * 192))
    assert seen["load"] == cells(k for k, v in words.items() if v) | free and not seen["store"]
    seen["load"].clear()
    masked_argmax(logits, rows, ids, lists=row_lists(rows, 30), impl="triton")
    assert seen["load"] & set(range(4 * 192, 5 * 192)) == {4 * 192 + 3 * 32 + 7}     # the mask with one token
    seen["load"].clear()
    gather_apply(logits, rows, ids, impl="triton")
    assert seen["load"] == cells(k for k, v in words.items() if v not in (0, -1)) and seen["store"] == cells(k for k, v in words.items() if v != -1)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax(device, impl, dtype):
    "As argmax of what `gather_apply` leaves; lists and pieces make no difference."
    rows, ids = masks(device, 5)
    logits = logits_of(device, len(ids), 171, dtype, seed=1, spare=3)
    after = expected_of(logits, rows, ids).float()
    expected = torch.where(after.amax(1) == float("-inf"), -1, after.argmax(1)).tolist()
    assert expected[1] == expected[7] == -1 and expected[4] == 2 * 32 + 7
    for lists in (None, row_lists(rows, 70), row_lists(rows)):
        for splits in (None, 1, 3): assert masked_argmax(logits, rows, ids, lists=lists, num_splits=splits, impl=impl).tolist() == expected


@BOTH
def test_argmax_of_odd_logits(device, impl):
    "Ties go to the first, NaN is never the greatest, an allowed minus infinity is still allowed, zeros are equal."
    rows, ids = masks(device, 2)
    every = torch.tensor([4], dtype=torch.int32, device=device)
    for values, expected in (({9: 3.0, 40: 3.0}, 9), ({5: float("nan"), 40: 0.5}, 40), ({}, 0), ({20: -0.0, 33: 0.0}, 20), ({50: float("inf"), 51: float("inf")}, 50), ({0: float("nan"), 1: float("nan")}, 0)):
        logits = torch.full((1, 64), float("-inf"), device=device)
        for v, x in values.items(): logits[0, v] = x
        assert masked_argmax(logits, rows, every, impl=impl).tolist() == [expected]
        assert masked_argmax(logits, rows, every, lists=row_lists(rows), impl=impl).tolist() == [expected]
    low = torch.full((1, 64), float("-inf"), device=device)
    assert masked_argmax(low, rows, torch.tensor([5], dtype=torch.int32, device=device), impl=impl).tolist() == [32 + 7]


def test_sampling_equals_its_reference(device):
    "Token by token, whatever the type, the lists, the rows that are left out."
    rows, ids = masks(device, 4)
    g, at = torch.Generator().manual_seed(3), lambda *v: torch.tensor(v, device=device)
    for dtype, k, which, lists, indices in ((torch.float32, 5, [0, 1, 2], None, None), (torch.bfloat16, 1, [4, 5, 0], row_lists(rows, 70), None), (torch.float16, 3, [5, 7, 2, 6], row_lists(rows), at(3, 0, -1, 1))):
        logits, some, n = logits_of(device, len(which), 130, dtype, seed=k), ids[which], len(which)
        seeds, temperature = torch.randint(-2**63, 2**63 - 1, (n,), generator=g).to(device), at(0.7, 1.0, 0.0, 3.0)[:n]
        drawn = masked_topk_sample(logits, rows, some, k, temperature, seeds, indices, lists=lists, impl="triton")
        assert torch.equal(drawn, masked_topk_sample(logits, rows, some, k, temperature, seeds, indices, impl="torch")) and drawn.max() >= 0
        if k == 1: assert torch.equal(drawn, masked_argmax(logits, rows, some, impl="torch"))
        assert all(drawn[i] == -1 for i, v in enumerate(which) if v in (1, 7) or indices is not None and indices[i] < 0)


def test_sixty_four_candidates(device):
    rows, ids = masks(device, 3)
    logits, one = logits_of(device, 2, 90, torch.float32), torch.ones(2, device=device)
    seeds = torch.tensor([5, 6], device=device)
    assert torch.equal(*(masked_topk_sample(logits, rows, ids[[0, 4]], 64, one, seeds, impl=impl) for impl in ("torch", "triton")))


def test_draws_follow_the_softmax():
    "Of the four best allowed ones, by chi-square; hot draws spread, cold ones do not."
    rows, n = torch.tensor([[0b1011011101]], dtype=torch.int32), 4000
    x = torch.tensor([0.3, 9.0, 1.1, 0.2, -2.0, 9.0, 0.9, -1.0, 9.0, -0.5])
    ids, seeds = torch.zeros(n, dtype=torch.int32), torch.arange(n)
    best = [2, 6, 0, 3]
    for temperature in (0.7, 2.0):
        drawn = masked_topk_sample(x.expand(n, 10).contiguous(), rows, ids, 4, torch.full((n,), temperature), seeds)
        counts = torch.bincount(drawn, minlength=10)
        share = (x[best] / temperature).softmax(0) * n
        assert counts.sum() == counts[best].sum() == n and float(((counts[best] - share) ** 2 / share).sum()) < 16.3   # 0.1 % of fair draws exceed it
    assert (masked_topk_sample(x.expand(n, 10).contiguous(), rows, ids, 4, torch.zeros(n), seeds) == 2).all()


@BOTH
@pytest.mark.parametrize("wide", [3, 4, 9])
def test_fill(device, impl, wide):
    rows, ids = masks(device, 3)
    out = torch.full((8, wide + 2), 77, dtype=torch.int32, device=device)
    fill_bitmask(out[:, :wide], rows, ids, impl=impl)
    expected = [[-1] * wide if r == -1 else ([0] * 3 if r < 0 else rows[r].tolist()) + [0] * (wide - 3) for r in ids.tolist()]
    assert out[:, :wide].tolist() == expected and (out[:, wide:] == 77).all()


def test_lists_of_masks(device):
    rows, _ = masks(device, 3)
    for longest in (0, 1, 50, 4096):
        start, size, few = row_lists(rows, longest)
        for r, line in enumerate(rows.tolist()):
            ids = [v for v in range(96) if line[v // 32] >> (v % 32) & 1]
            assert size[r] == (len(ids) if len(ids) <= longest else -1) and (size[r] < 0 or few[start[r]:start[r] + size[r]].tolist() == ids)


def test_no_sequences(device):
    rows, none = masks(device, 3)[0], torch.zeros(0, dtype=torch.int32, device=device)
    tables, state = parens(device, n=0)
    advance_classify(tables, state, none, impl="triton")
    take_back(state, none, impl="triton")
    logits = torch.zeros(0, 96, device=device)
    gather_apply(logits, rows, none, impl="triton")
    assert masked_argmax(logits, rows, none, impl="triton").shape == masked_topk_sample(logits, rows, none, 2, none.float(), none.long(), impl="triton").shape == (0,)


# --- registration ------------------------------------------------------------------------------------------------------------

def test_custom_ops(device):
    check = torch.library.opcheck
    tables, state = parens(device, n=2)
    read(tables, state, OPEN2)
    check(c._advance_classify_op, (list(tables), list(state), torch.tensor([BLANK, A], device=device)))
    check(c._take_back_op, (list(state), torch.tensor([1, 0], device=device)))
    rows, ids = masks(device, 2)
    logits, lists = logits_of(device, 8, 64, torch.float32), list(row_lists(rows))
    check(c._gather_apply_op, (logits, rows, ids, None))
    check(c._masked_argmax_op, (logits, rows, ids, None, lists, 0))
    check(c._masked_argmax_op, (logits, rows, ids, torch.arange(8, device=device), [], 2))
    check(c._masked_topk_sample_op, (logits[:1], rows, ids[:1], 2, torch.ones(1, device=device), torch.arange(1, device=device), None, []))
    check(c._fill_bitmask_op, (torch.zeros(8, 2, dtype=torch.int32, device=device), rows, ids))


def test_a_step_compiles_whole(device):
    tables, state = parens(device, n=2)
    plain = State(*(t.clone() for t in state))

    def step(tokens, logits):
        advance_classify(tables, state, tokens, impl="triton")
        gather_apply(logits, tables.rows, state.row, impl="triton")
        return masked_argmax(logits, tables.rows, state.row, impl="triton") + 0
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for tokens in ([OPEN, A], [BLANK, CLOSE], [A, OPEN]):
        logits = logits_of(device, 2, 11, torch.float32, seed=tokens[0])
        mine, tokens = logits.clone(), torch.tensor(tokens, device=device)
        best = compiled(tokens, mine)
        advance_classify(tables, plain, tokens, impl="triton")
        same(state, plain)
        assert torch.equal(mine, expected_of(logits, tables.rows, plain.row)) and torch.equal(best, mine.argmax(1))


# --- errors ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (dict(tokens=lambda t: t.float()), "tokens is torch.float32: need int64 or int32"), (dict(tokens=lambda t: t[:1]), "need one token for each of the n=2"), (dict(tokens=lambda t: t[None]), "tokens has shape (1, 2): need 1 dimension"),
    (dict(sp=lambda t: t.long()), "state.sp is torch.int64: need int32"), (dict(stack=lambda t: t[:, :3].contiguous()), "need a stack of at least 4 cells"), (dict(log=lambda t: t[:, :9].contiguous()), "state.log has 9 columns"),
    (dict(stack=lambda t: t.T.contiguous().T), "need it in one piece"), (dict(q=lambda t: t[:1]), "state.q has shape (1,), state.grammar n=2"), (dict(marks=lambda t: t[:, :, :4].contiguous()), "need [n, history, 5]"),
    (dict(keys=lambda t: t[:-1]), "need the same power of two"), (dict(delta=lambda t: t[:, :9].contiguous()), "need [Q, 256]"), (dict(off=lambda t: t[1:]), "need one entry more than tokens"),
    (dict(where=lambda t: t[:, :5].contiguous()), "need [grammars, 7]"), (dict(action=lambda t: t.int()), "tables.action is torch.int32: need int16")], ids=lambda v: str(v)[:30])
def test_errors_of_a_step(device, change, message):
    tables, state = parens(device, n=2)
    swap = lambda t: t._replace(**{k: f(getattr(t, k)) for k, f in change.items() if k in t._fields})
    tokens = change.get("tokens", lambda t: t)(torch.zeros(2, dtype=torch.int64, device=device))
    with pytest.raises(ValueError) as error: advance_classify(swap(tables), swap(state), tokens, impl="triton")
    assert message in str(error.value)


def test_errors_of_masks(device):
    rows, ids = masks(device, 2)
    x, seeds, one = logits_of(device, 8, 64, torch.float32), torch.arange(8, device=device), torch.ones(8, device=device)
    for call, message in (
            (lambda: gather_apply(x.double(), rows, ids), "logits is torch.float64: need float32, float16 or bfloat16"), (lambda: gather_apply(x[:3], rows, ids), "row_ids has 8 entries, logits n=3 rows"),
            (lambda: gather_apply(x[:, :32], rows, ids), "need a column for every token, more than 32"), (lambda: gather_apply(x.T, rows, ids), "logits has stride"), (lambda: gather_apply(x[0], rows, ids), "need [n, C]"),
            (lambda: gather_apply(x, rows.long(), ids), "rows is torch.int64"), (lambda: gather_apply(x, rows, ids.long()), "row_ids is torch.int64: need int32"), (lambda: gather_apply(x, rows[:0], ids), "need at least one"),
            (lambda: gather_apply(x, rows, ids, torch.zeros(3, dtype=torch.int64, device=device)), "indices has 3 entries, row_ids 8"), (lambda: gather_apply(x, rows, ids, one), "indices is torch.float32: need int64 or int32"),
            (lambda: gather_apply(x, rows.to("meta"), ids), "row_ids is on"), (lambda: masked_argmax(x, rows, ids, num_splits=0), "num_splits=0: need 1 to 1024"), (lambda: masked_argmax(x, rows, ids, lists=row_lists(rows[:2])), "lists are of 2 and 2 masks, rows has 7"),
            (lambda: masked_topk_sample(x, rows, ids, 65, one, seeds), "k=65: need 1 to 64"), (lambda: masked_topk_sample(x, rows, ids, 2, one.double(), seeds), "temperature is torch.float64: need float32"),
            (lambda: masked_topk_sample(x, rows, ids, 2, one, seeds[:2]), "seeds has 2 entries, row_ids 8"), (lambda: fill_bitmask(rows[:, :1], rows, ids[:7]), "need int32 [7, 2 or wider]"),
            (lambda: gather_apply(x, rows, ids, impl="cuda"), "impl='cuda': need 'auto', 'torch' or 'triton'"), (lambda: take_back(parens(device)[1], seeds), "need a number for each of the n=1")):
        with pytest.raises(ValueError) as error: call()
        assert message in str(error.value), message


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    rows, ids = masks("cpu", 2)
    monkeypatch.setattr(c, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="need CUDA tensors, or the interpreter"): gather_apply(torch.zeros(8, 64), rows, ids, impl="triton")
    monkeypatch.setattr(c, "INTERPRETED", True)
    monkeypatch.setattr(c, "interpreter_trouble", lambda: "need numpy below 2.4")
    with pytest.raises(RuntimeError, match="need numpy below 2.4"): gather_apply(torch.zeros(8, 64), rows, ids, impl="triton")


# --- on a GPU ----------------------------------------------------------------------------------------------------------------

def step_of(batch, tokens, logits):
    "What a server would record: choose, read."
    def step():
        tokens.copy_(batch.argmax(logits))
        batch.advance_(tokens)
    return step


@pytest.fixture
def real():
    pytest.importorskip("numba", reason="compiling grammars needs numba")
    from modeltc_lab.decoding.device import DeviceBatch
    from modeltc_lab.decoding.grammar import Grammar
    from modeltc_lab.decoding.pre3 import compile_grammar
    from modeltc_lab.decoding.vocabulary import Vocabulary
    pieces = [bytes([b]) for b in b'{}[]()+-*/.,:" \n0123456789abcdeflnrstuxyE<>='] + [b"]}", b"]]", b'": "', b'",', b"true", b"12", b"3.", b"))", b"})", b", ", b"\xc3", b"\xa9", b"<a>", b"</", None]
    vocabulary = Vocabulary.from_bytes(pieces, [len(pieces) - 1], size=len(pieces) + 3)
    compiled = [compile_grammar(Grammar.named(name), vocabulary, saturate="full") for name in ("json", "arithmetic", "csv", "xml")]
    return DeviceBatch, [*compiled, None, *compiled], vocabulary


@pytest.mark.gpu
@needs_gpu
def test_cuda_graph_against_the_host(real):
    "200 steps by replay, token by token what the batch of the host makes of the same logits; texts that have ended begin again on the device."
    DeviceBatch, constraints, vocabulary = real
    from modeltc_lab.decoding.batch import BatchState
    batch, host, n = DeviceBatch(constraints, "cuda", max_depth=256), BatchState(constraints, max_depth=256), len(constraints)
    logits, tokens = torch.zeros(n, vocabulary.size + 5, device="cuda", dtype=torch.bfloat16), torch.zeros(n, dtype=torch.int64, device="cuda")
    g, step = torch.Generator(device="cuda").manual_seed(0), step_of(batch, tokens, logits)
    def again():
        step()
        batch.reset(batch.terminated)
    with torch.cuda.stream(stream := torch.cuda.Stream()):
        again()
    stream.synchronize()
    batch.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): again()
    batch.reset()
    expected = torch.zeros(n, batch.engine.width, dtype=torch.int32).numpy()
    for _ in range(200):
        logits.normal_(generator=g)[:, vocabulary.size:] = float("-inf")  # a sequence without a constraint may choose any column
        masked = logits.float().cpu()
        host.apply_(masked)
        graph.replay()
        best = masked.argmax(1)
        assert torch.equal(tokens.cpu(), best)
        host.advance_(best.numpy())
        host.reset([b for b, over in enumerate(host.terminated) if over])
        host.fill_bitmask(expected)
        mine = torch.zeros(n, batch.engine.width, dtype=torch.int32, device="cuda")
        batch.fill_bitmask(mine)
        assert mine.tolist() == expected.tolist()
    assert batch.flags().tolist() == [0] * n and host.state.length.max() > 5


@pytest.mark.gpu
@needs_gpu
def test_a_step_never_waits(real):
    "Every method of a step, with an error for whatever makes the host wait for the device."
    DeviceBatch, constraints, vocabulary = real
    batch, n = DeviceBatch(constraints, "cuda"), len(constraints)
    logits, tokens = torch.randn(n, vocabulary.size, device="cuda"), torch.zeros(n, dtype=torch.int64, device="cuda")
    seeds, one, out = torch.arange(n, device="cuda"), torch.ones(n, device="cuda"), torch.zeros(n, batch.engine.width, dtype=torch.int32, device="cuda")
    def everything():
        step_of(batch, tokens, logits)()
        batch.advance_(batch.sample(logits, 8, one, seeds))
        batch.rollback_(1)
        batch.fill_bitmask(out)
        batch.apply_(logits)
        batch.reset(batch.terminated)
    everything()                                          # compiled before it is watched
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: everything()
    finally: torch.cuda.set_sync_debug_mode("default")


def test_the_recorded_step_in_the_interpreter(real):
    "The steps that a GPU records, without recording: token by token what the host makes of the same logits."
    if not INTERPRETED: pytest.skip("the graph test does this on a GPU")
    DeviceBatch, constraints, vocabulary = real
    from modeltc_lab.decoding.batch import BatchState
    some = constraints[:5:2]
    batch, host = DeviceBatch(some, impl="triton", max_depth=64), BatchState(some, max_depth=64)
    logits, tokens = torch.zeros(3, vocabulary.size + 5, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
    step = step_of(batch, tokens, logits)
    for i in range(15):
        logits.normal_(generator=torch.Generator().manual_seed(i))[:, vocabulary.size:] = float("-inf")   # a sequence without a constraint may choose any column
        masked = logits.float()
        host.apply_(masked)
        step()
        assert torch.equal(tokens, masked.argmax(1))
        host.advance_(tokens.numpy())
        batch.reset(batch.terminated)
        host.reset([b for b, over in enumerate(host.terminated) if over])
        assert batch.row_ids().tolist() == host.row_ids().tolist()
    assert batch.flags().tolist() == [0] * 3


# --- the benchmark -----------------------------------------------------------------------------------------------------------

BENCH = Path(__file__).resolve().parents[2] / "kernels/bench"


@pytest.fixture
def bench(monkeypatch):
    pytest.importorskip("numba", reason="compiling grammars needs numba")
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_constrained
    return bench_constrained


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_nothing_is_timed_without_a_gpu(tmp_path):
    done = subprocess.run([sys.executable, BENCH / "bench_constrained.py", "--out", tmp_path / "rows.json"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and "nothing is timed" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_places_and_gate(bench, device, monkeypatch):
    "Sequences stand where the texts say; the gate lets the kernels through and refuses a mask that allows too much, a wrong choice, a step that does nothing."
    from modeltc_lab.decoding.device import DeviceBatch
    from modeltc_lab.decoding.grammar import Grammar
    from modeltc_lab.decoding.pre3 import compile_grammar
    vocabulary = bench.made_vocabulary(700)
    constraint = compile_grammar(Grammar.json(), vocabulary, saturate="full")
    texts = [bench.tokens_of(vocabulary, t) for t in bench.TEXTS]
    for text, tokens in zip(bench.TEXTS, texts): assert b"".join(vocabulary.tokens[t] for t in tokens) == text and constraint.matcher().accept_bytes(text)
    batch, tokens = bench.placed(constraint, texts, 9, device, impl="torch")
    assert len(set(batch.state.length.tolist())) > 1 and batch.flags().tolist() == [0] * 9
    rows = batch.tables.rows[batch.row_ids().long()]
    assert all(int(rows[b, t >> 5]) >> (t & 31) & 1 for b, t in enumerate(tokens.tolist()))
    advance, whole, chosen = bench.steps_of(batch, tokens, torch.zeros(9, 700, device=device))
    before = batch.state.length.tolist()
    for step in (advance, whole, chosen): step()
    assert batch.state.length.tolist() == before and batch.flags().tolist() == [0] * 9
    small = lambda: DeviceBatch([constraint] * 3, device, impl="torch")
    bench.gate(small(), steps=3)
    for name, wrong, message in (("apply_", lambda self, logits: None, "masked logits differ"), ("argmax", lambda self, logits: logits.argmax(1), "chosen tokens differ"), ("advance_", lambda self, tokens: None, "masks after a token differ")):
        with monkeypatch.context() as m:
            m.setattr(DeviceBatch, name, wrong)
            with pytest.raises(ValueError, match=message): bench.gate(small(), steps=6)


def test_peer_that_is_not_there_is_said(bench, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    assert bench.xgrammar_step(None, None, None, None, None) is None and "xgrammar is not installed" in capsys.readouterr().out
