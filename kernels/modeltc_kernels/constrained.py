"""Constrained decoding on the device: where every sequence is in its grammar, which tokens may come next, and what to do with that mask.

A step of a batch without a host: `advance_classify` reads the sampled tokens and leaves the number of every sequence's mask,
`gather_apply` writes minus infinity into logits, or `masked_argmax` and `masked_topk_sample` choose a token without writing
them, and `fill_bitmask` hands the masks to engines that want bits. Reading order: what the tensors hold, references, kernels,
launchers, registration. Shapes: n sequences, V tokens, W = ceil(V / 32) words of a mask, R masks, C columns of the logits
(V or more), Q lexer states. Masks are bits: bit i % 32 of word i // 32 is token i, 1 is allowed. The number of a mask is -1
for a sequence without a constraint, -2 where the mask is not known: then nothing is allowed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modeltc_kernels.runtime import INTERPRETED, interpreter_trouble  # first: it decides whether triton interprets

import triton  # isort: skip
import triton.language as tl  # isort: skip

FINE, DEAD, UNKNOWN, OVER, DEEP, WRONG, SHORT = 0, 1, 2, 3, 4, 5, 6  # read; refused; a table lacks an entry; the text was over before; the stack is full; no such token; less is remembered than is taken back
TEXT, STOP, NEVER = 0, 1, 2                 # kinds of tokens: bytes, end of the text, never allowed
FREE, NO_ROW = -1, -2                       # in place of the number of a mask: not constrained; not known, nothing is allowed
BITS, CONTEXT = 20, 2**20 - 1               # a key of the hash table is a node and 20 bits of state; what stands there for the beginning of a lexeme
MULTIPLIER, SHIFT = -7046029254386353131, 20  # of the hash, in 64 bits that wrap
ACCEPT = 2**15 - 1                          # action of a parser at the end of the text
MARK = 5                                    # numbers remembered of every token
CHUNK = 4096                                # columns one program looks at, and the longest list of a mask's tokens
MAX_K = 64                                  # tokens that are sampled from
LANES = 32                                  # of the programs that follow a text: one warp
DTYPES = {torch.float32: (torch.int32, -8388608), torch.float16: (torch.int16, -1024), torch.bfloat16: (torch.int16, -128)}  # integers of the same width, and minus infinity as one
NOTHING = -2**63                            # key of a token that may not be chosen
LAST = 2**31 - 1


class Tables(NamedTuple):
    "What a step reads."

    delta: Tensor      # [Q, 256] int32 next lexer state, -1 none
    emit: Tensor       # [Q] int32 pattern completed if the next byte ends the lexeme, -1 none
    plen: Tensor       # [Q] int32 bytes read since it was complete
    pat: Tensor        # [Q] int32 where they lie in `text`
    text: Tensor       # uint8 bytes of all tokens, then bytes read since a pattern was complete
    off: Tensor        # [V + 1] int32 where the bytes of each token lie
    kind: Tensor       # [V] int8 `TEXT`, `STOP` or `NEVER`
    keys: Tensor       # [power of two] int64 hash table from node and state to node, answer or row; -1 free
    values: Tensor     # int32
    where: Tensor      # [grammars, 7] int64 where its actions begin, their columns, where its gotos begin, their columns, where its productions and its patterns begin; node that says how lexemes begin
    action: Tensor     # int16 LR tables, one behind the other
    goto: Tensor       # int16
    size: Tensor       # int16 by production: its length
    lhs: Tensor        # int16 and its left side
    column: Tensor     # int16 by pattern: its column, -1 ignored
    rows: Tensor       # [R, W] int32 masks
    few_start: Tensor  # [R] int32 where the tokens of a mask lie in `few`
    few_size: Tensor   # [R] int32 how many, -1: too many for a list
    few: Tensor        # int32 tokens of the masks with few of them
    stop: Tensor       # [1] int32 mask of a text that has ended


class State(NamedTuple):
    "Where every sequence is. Cells of a stack above its height are zero."

    grammar: Tensor    # [n] int32, -1 not constrained
    q: Tensor          # [n] int32 lexer state
    sp: Tensor         # [n] int32 height of the stack
    stack: Tensor      # [n, depth] int16 LR states
    over: Tensor       # [n] int8, has the text ended?
    row: Tensor        # [n] int32 number of its mask
    log: Tensor        # [n, room] int16 ring of what the stack held where it was overwritten
    logged: Tensor     # [n] int64 written into the ring so far
    peak: Tensor       # [n] int64 the most that ever was: `room` before it the ring has been written over
    length: Tensor     # [n] int64 tokens read
    kept: Tensor       # [n] int64 of which so many can be taken back
    marks: Tensor      # [n, history, MARK] int64 by token, a ring: `q`, `sp`, `logged`, `over` and `row` before it
    what: Tensor       # [n] int32 what became of the last token
    flag: Tensor       # [n] int32 the first thing that went wrong since it was cleared
    miss: Tensor       # [n, 2] int64 node and state that a table lacks


def _find_ref(t: Tables, node: int, x: int) -> int:
    "Value of a node and a state; -1 if it is not there."
    key, last = node << BITS | x, len(t.keys) - 1
    i = ((key * MULTIPLIER + 2**63) % 2**64 - 2**63 >> SHIFT) & last
    while (there := int(t.keys[i])) != key:
        if there == -1: return -1
        i = (i + 1) & last
    return int(t.values[i])


def _look_ref(t: Tables, node: int, tail: int, stack: list[int]) -> tuple[int, int, int]:
    "Walk a stack automaton from the top: the value for `tail` behind the answer, or -1, and the last pair that was looked up."
    value = node
    for x in reversed(stack):
        node = value
        value = _find_ref(t, node, x)
        if value < 0: break
    if value >= -1: return -1, node, x      # not known, or the automaton wants to see more than there is
    return _find_ref(t, -2 - value, tail), -2 - value, tail


def _read_ref(t: Tables, grammar: int, q: int, stack: list[int], depth: int, text: list[int]) -> tuple[int, int, list[int], list[int], tuple[int, int]]:
    "Read bytes: what became of them, lexer state, stack, what was overwritten of the old stack from its top down, and the pair a table lacks."
    actions, columns, gotos, lefts, productions, patterns, context = t.where[grammar].tolist()
    stack, log, low, feed = list(stack), list[int](), len(stack), text[::-1]
    while feed:
        y = int(t.delta[q, feed[-1]])
        if y >= 0:
            q = y
            feed.pop()
            continue
        if (label := int(t.emit[q])) < 0: return DEAD, q, stack, log, (0, 0)
        feed += t.text[int(t.pat[q]):int(t.pat[q]) + int(t.plen[q])].tolist()[::-1]
        column = int(t.column[patterns + label])
        while column >= 0:
            a = int(t.action[actions + stack[-1] * columns + column])
            if a == 0 or a == ACCEPT: return DEAD, q, stack, log, (0, 0)
            if a < 0:
                p = productions - a - 1
                for _ in range(int(t.size[p])):
                    held = stack.pop()
                    if len(stack) < low: log.append(held)
                low = min(low, len(stack))
            if len(stack) == depth: return DEEP, q, stack, log, (0, 0)
            stack.append(a if a > 0 else int(t.goto[gotos + stack[-1] * lefts + int(t.lhs[p])]))
            if a > 0: break
        q, *miss = _look_ref(t, context, CONTEXT, stack)
        if q == -1: return UNKNOWN, q, stack, log, (miss[0], miss[1])
    return FINE, q, stack, log, (0, 0)


def _row_ref(t: Tables, grammar: int, q: int, stack: list[int]) -> tuple[int, int, int]:
    "Mask of a sequence, or -1, and the last pair that was looked up."
    roots = int(t.where[grammar, 6]) + 1
    root = _find_ref(t, roots, q)
    return (root, roots, q) if root == -1 else _look_ref(t, root, q, stack)


def _advance_one_ref(t: Tables, s: State, b: int, token: int) -> None:
    "Read a token in one sequence."
    history, room, grammar, q, sp = s.marks.shape[1], s.log.shape[1], int(s.grammar[b]), int(s.q[b]), int(s.sp[b])
    stack, log, over, row, miss = s.stack[b, :sp].tolist(), list[int](), int(s.over[b]), int(s.row[b]), ()
    mark = torch.tensor([q, sp, int(s.logged[b]), over, row])
    if token < -1 or token >= len(t.kind): what = WRONG
    elif token == -1 or grammar < 0: what, grammar = FINE, -1
    elif over: what = FINE if t.kind[token] == STOP else OVER
    elif t.kind[token] == NEVER: what = DEAD
    elif t.kind[token] == STOP:
        what = UNKNOWN if row < 0 else FINE if int(t.rows[row, token >> 5]) >> (token & 31) & 1 else DEAD
        over = int(what == FINE)
    else: what, q, stack, log, miss = _read_ref(t, grammar, q, stack, s.stack.shape[1], t.text[int(t.off[token]):int(t.off[token + 1])].tolist())
    bad = what
    if what == FINE and grammar >= 0:
        row, *miss = (int(t.stop), 0, 0) if over else _row_ref(t, grammar, q, stack)
        if row == -1: row, bad = NO_ROW, UNKNOWN
        s.marks[b, int(s.length[b]) % history] = mark.to(s.marks.device)
        for i, held in enumerate(log): s.log[b, (int(s.logged[b]) + i) % room] = held
        s.logged[b] += len(log)
        s.length[b] += 1
        s.kept[b] = min(int(s.kept[b]) + 1, history)
        s.q[b], s.sp[b], s.over[b], s.row[b] = q, len(stack), over, row
        s.stack[b] = 0
        s.stack[b, :len(stack)] = torch.tensor(stack, dtype=torch.int16)
    s.peak[b] = max(int(s.peak[b]), int(s.logged[b]) + (len(log) if what != FINE else 0))   # the kernel has the ring written when it finds out
    if bad == UNKNOWN and miss: s.miss[b] = torch.tensor(miss)   # the end of a text needs no more than the mask
    s.what[b] = what
    if not s.flag[b]: s.flag[b] = bad


def advance_classify_ref(tables: Tables, state: State, tokens: Tensor) -> None:
    "The specification: one sequence after the other, one byte after the other."
    for b, token in enumerate(tokens.tolist()): _advance_one_ref(tables, state, b, token)


def take_back_ref(state: State, steps: Tensor) -> None:
    "Token by token, the last one first."
    s = state
    for b, n in enumerate(steps.tolist()):
        history, room, length = s.marks.shape[1], s.log.shape[1], int(s.length[b])
        if s.grammar[b] < 0 or n == 0: continue
        if n < 0 or n > int(s.kept[b]) or int(s.peak[b]) - int(s.marks[b, (length - n) % history, 2]) > room:
            if not s.flag[b]: s.flag[b] = SHORT
            continue
        for k in range(length - 1, length - n - 1, -1):
            q, sp, logged, over, row = s.marks[b, k % history].tolist()
            s.stack[b, sp:] = 0
            for i in range(int(s.logged[b]) - logged): s.stack[b, sp - 1 - i] = s.log[b, (logged + i) % room]
            s.logged[b] = logged
        s.q[b], s.sp[b], s.over[b], s.row[b], s.length[b] = q, sp, over, row, length - n
        s.kept[b] -= n


def allowed_ref(rows: Tensor, row_ids: Tensor, columns: int) -> Tensor:
    "[n, C] bool: which columns may be chosen; all of them without a constraint, none behind the vocabulary with one."
    words = rows[row_ids.clamp(min=0).long()]
    bits = (words[:, :, None] >> torch.arange(32, device=rows.device, dtype=torch.int32) & 1).bool().flatten(1)[:, :columns]
    known = torch.nn.functional.pad(bits, (0, columns - bits.shape[1]))
    return torch.where((row_ids < 0)[:, None], (row_ids == FREE)[:, None], known)


def gather_apply_ref(logits: Tensor, rows: Tensor, row_ids: Tensor, indices: Tensor | None = None) -> None:
    "Minus infinity where a bit is clear."
    at = torch.arange(len(row_ids), device=logits.device) if indices is None else indices.long()
    here, allowed = at >= 0, allowed_ref(rows, row_ids, logits.shape[1])
    logits[at[here]] = logits[at[here]].masked_fill(~allowed[here], float("-inf"))


def _ordered_ref(logits: Tensor, rows: Tensor, row_ids: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    "Values in fp32 (NaN counts as minus infinity, both zeros as one) and which of them may be chosen."
    x = (logits if indices is None else logits[indices.clamp(min=0).long()]).float()
    allowed = allowed_ref(rows, row_ids, logits.shape[1])
    if indices is not None: allowed = allowed & (indices >= 0)[:, None]
    return torch.where(x.isnan(), float("-inf"), torch.where(x == 0, 0.0, x)), allowed


def masked_argmax_ref(logits: Tensor, rows: Tensor, row_ids: Tensor, indices: Tensor | None = None) -> Tensor:
    "The greatest allowed logit, of equal ones the first; -1 where nothing is allowed."
    x, allowed = _ordered_ref(logits, rows, row_ids, indices)
    best = torch.where(allowed, x, float("-inf")).amax(1, keepdim=True)
    first = torch.where(allowed & (x == best), torch.arange(x.shape[1], device=x.device), LAST).amin(1)
    return torch.where(first == LAST, -1, first)


def philox_ref(seed: Tensor, offset: Tensor) -> Tensor:
    "The first 32 bits of Philox 4x32-10 with the counter (offset, 0, 0, 0), as int64."
    low, mask = lambda x: x & 0xFFFFFFFF, 0xFFFFFFFF
    c0, (c1, c2, c3), k0, k1 = low(offset.long()), (torch.zeros_like(offset, dtype=torch.int64) for _ in range(3)), low(seed), low(seed >> 32)
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57            # the product wraps around 64 bits, its bits are right
        c0, c1, c2, c3 = low(b >> 32) ^ c1 ^ k0, low(b), low(a >> 32) ^ c3 ^ k1, low(a)
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return c0


def log_ref(x: Tensor) -> Tensor:
    "Natural logarithm of positive fp32 numbers by additions, multiplications and one division, which every machine rounds alike."
    bits = x.view(torch.int32)
    e, m = (bits >> 23) - 127, (bits & 0x7FFFFF | 0x3F800000).view(torch.float32)
    big = m > 1.4142135
    m, e = torch.where(big, m * 0.5, m), torch.where(big, e + 1, e).float()
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    return e * 0.69314718 + (s + s) * (z * (z * (z * (z * 0.11111111 + 0.14285714) + 0.2) + 0.33333333) + 1.0)


def gumbel_ref(seed: Tensor, offset: Tensor) -> Tensor:
    "Gumbel noise in fp32, the same on every machine."
    u = ((philox_ref(seed, offset) >> 9) * 2 + 1).float() * 2.0**-24   # odd multiples of 2**-24, all of them exact
    return -log_ref(-log_ref(u))


def masked_topk_sample_ref(logits: Tensor, rows: Tensor, row_ids: Tensor, k: int, temperature: Tensor, seeds: Tensor, indices: Tensor | None = None) -> Tensor:
    "One of the k greatest allowed logits by softmax(logits / temperature); the greatest where temperature is 0; -1 where nothing is allowed."
    x, allowed = _ordered_ref(logits, rows, row_ids, indices)
    order = torch.where(allowed, x, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    ids = order.gather(1, (~allowed.gather(1, order)).to(torch.int8).sort(dim=1, stable=True).indices)[:, :k]  # allowed ones first, minus infinity among them
    x, allowed = x.gather(1, ids), allowed.gather(1, ids)
    warm = temperature > 0
    score = torch.where(warm[:, None], x / torch.where(warm, temperature, 1.0)[:, None] + gumbel_ref(seeds[:, None], ids), x)
    best = torch.where(allowed, score, float("-inf")).amax(1, keepdim=True)
    place = torch.where(allowed & (score == best), torch.arange(ids.shape[1], device=ids.device), LAST).amin(1)
    return torch.where(place == LAST, -1, ids.gather(1, place.clamp(max=ids.shape[1] - 1)[:, None])[:, 0])


def fill_bitmask_ref(out: Tensor, rows: Tensor, row_ids: Tensor) -> None:
    "Masks as bits; all ones without a constraint, zeros behind the vocabulary with one."
    words = torch.nn.functional.pad(rows[row_ids.clamp(min=0).long()], (0, out.shape[1] - rows.shape[1]))
    out.copy_(torch.where((row_ids < 0)[:, None], torch.where(row_ids == FREE, -1, 0)[:, None].int(), words))


_FINE, _DEAD, _UNKNOWN, _OVER, _DEEP, _WRONG, _SHORT = (tl.constexpr(v) for v in (FINE, DEAD, UNKNOWN, OVER, DEEP, WRONG, SHORT))
_STOP, _NEVER, _FREE, _NO_ROW, _ACCEPT, _MARK, _LANES = (tl.constexpr(v) for v in (STOP, NEVER, FREE, NO_ROW, ACCEPT, MARK, LANES))
_BITS, _CONTEXT, _MULTIPLIER, _SHIFT, _NOTHING, _LAST = (tl.constexpr(v) for v in (BITS, CONTEXT, MULTIPLIER, SHIFT, NOTHING, LAST))


@triton.jit
def hash_find(keys_ptr, values_ptr, last, key):
    "Value of a key; -1 if it is not there. Key and value are asked for together."
    i = ((key * _MULTIPLIER) >> _SHIFT) & last
    there = tl.load(keys_ptr + i)
    value = tl.load(values_ptr + i)
    while (there != key) & (there != -1):
        i = (i + 1) & last
        there = tl.load(keys_ptr + i)
        value = tl.load(values_ptr + i)
    return tl.where(there == key, value, -1)


@triton.jit
def look_down(keys_ptr, values_ptr, last, node, tail, stack_ptr, sp):
    "Walk a stack automaton from the top: the value for `tail` behind the answer, or -1, and the last pair that was looked up."
    x = tl.load(stack_ptr + sp - 1).to(tl.int32)
    value = hash_find(keys_ptr, values_ptr, last, (node << _BITS) | x)
    while (value >= 0) & (sp > 1):
        node = value.to(tl.int64)
        sp -= 1
        x = tl.load(stack_ptr + sp - 1).to(tl.int32)
        value = hash_find(keys_ptr, values_ptr, last, (node << _BITS) | x)
    value = tl.minimum(value, -1)      # nothing is read below a stack
    if value != -1:
        node = (-2 - value).to(tl.int64)
        x = tail
        value = hash_find(keys_ptr, values_ptr, last, (node << _BITS) | x)
    return value, node, x


@triton.jit
def restore(stack_ptr, log_ptr, room, began, logged, sp):
    "Put back what the stack held below a height, from the ring."
    lane = tl.arange(0, _LANES)
    for base in range(0, (logged - began).to(tl.int32), _LANES):
        live = base + lane < logged - began
        held = tl.load(log_ptr + (began + base + lane) % room, mask=live, other=0)
        tl.store(stack_ptr + sp - 1 - base - lane, held, mask=live)


@triton.jit
def clear(stack_ptr, start, stop):
    "Cells that are above the height are zero."
    lane = tl.arange(0, _LANES)
    for base in range(start, stop, _LANES): tl.store(stack_ptr + base + lane, tl.zeros((_LANES,), tl.int16), mask=base + lane < stop)


@triton.jit
def advance_classify_kernel(delta_ptr, emit_ptr, plen_ptr, pat_ptr, text_ptr, off_ptr, kind_ptr, keys_ptr, values_ptr, where_ptr, action_ptr, goto_ptr,
                            size_ptr, lhs_ptr, column_ptr, rows_ptr, stop_ptr,
                            grammar_ptr, q_ptr, sp_ptr, stack_ptr, over_ptr, row_ptr, log_ptr, logged_ptr, peak_ptr, length_ptr, kept_ptr, marks_ptr, what_ptr, flag_ptr, miss_ptr,
                            tokens_ptr, vocabulary, width, last, depth, room, history):
    "One sequence: read the bytes of its token, then find its mask. A text follows one warp; a barrier stands between a store and a load by another thread."
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, _LANES)
    token = tl.load(tokens_ptr + b).to(tl.int64)
    grammar = tl.load(grammar_ptr + b).to(tl.int64)
    stack_ptr += b * depth
    log_ptr += b * room
    what = tl.where((token < -1) | (token >= vocabulary), _WRONG, _FINE)
    bad = what
    if (what == _FINE) & (token >= 0) & (grammar >= 0):
        kind = tl.load(kind_ptr + token).to(tl.int32)
        q0 = tl.load(q_ptr + b)
        sp0 = tl.load(sp_ptr + b)
        over0 = tl.load(over_ptr + b).to(tl.int32)
        row0 = tl.load(row_ptr + b)
        logged0 = tl.load(logged_ptr + b)
        context = tl.load(where_ptr + grammar * 7 + 6)
        q = q0
        sp = sp0
        over = over0
        logged = logged0
        if over0 != 0: what = tl.where(kind == _STOP, _FINE, _OVER)
        elif kind == _NEVER: what = tl.where(kind == _NEVER, _DEAD, _FINE)
        elif kind == _STOP:
            known = row0 >= 0
            word = tl.load(rows_ptr + tl.where(known, row0, 0).to(tl.int64) * width + (token >> 5))
            allowed = ((word >> (token & 31).to(tl.int32)) & 1) != 0
            what = tl.where(known, tl.where(allowed, _FINE, _DEAD), _UNKNOWN)
            over = tl.where(what == _FINE, 1, 0)
        else:
            actions = tl.load(where_ptr + grammar * 7)
            columns = tl.load(where_ptr + grammar * 7 + 1)
            gotos = tl.load(where_ptr + grammar * 7 + 2)
            lefts = tl.load(where_ptr + grammar * 7 + 3)
            productions = tl.load(where_ptr + grammar * 7 + 4)
            patterns = tl.load(where_ptr + grammar * 7 + 5)
            start = tl.load(off_ptr + token)
            n = tl.load(off_ptr + token + 1) - start
            i = tl.zeros((), tl.int32)       # the next byte; below zero it is one of an earlier token, read again
            before = tl.zeros((), tl.int32)  # where byte 0 would lie behind those
            low = sp0
            high = sp0
            while (i < n) & (what == _FINE):
                byte = tl.load(text_ptr + tl.where(i < 0, before, start) + i).to(tl.int32)
                y = tl.load(delta_ptr + q.to(tl.int64) * 256 + byte)
                if y >= 0:
                    q = y
                    i += 1
                else:
                    label = tl.load(emit_ptr + q)
                    back = tl.load(plen_ptr + q)
                    pat = tl.load(pat_ptr + q)
                    if label < 0: what = tl.where(label < 0, _DEAD, what)
                    else:
                        before = tl.where((i >= 0) & (i < back), pat + back - i, before)
                        i -= back
                        column = tl.load(column_ptr + patterns + label).to(tl.int64)
                        going = tl.where(column >= 0, 1, 0)
                        while going != 0:
                            top = tl.load(stack_ptr + sp - 1).to(tl.int64)
                            a = tl.load(action_ptr + actions + top * columns + column).to(tl.int32)
                            push = a.to(tl.int16)
                            if (a == 0) | (a == _ACCEPT):
                                what = tl.where(going != 0, _DEAD, what)
                                going = tl.where(a < 0, 1, 0)
                            else:
                                if a < 0:
                                    production = productions - a - 1
                                    size = tl.load(size_ptr + production).to(tl.int32)
                                    lhs = tl.load(lhs_ptr + production).to(tl.int64)
                                    under = tl.load(stack_ptr + sp - size - 1).to(tl.int64)
                                    push = tl.load(goto_ptr + gotos + under * lefts + lhs)
                                    for base in range(0, size, _LANES):
                                        cell = sp - 1 - base - lane
                                        live = base + lane < size
                                        held = tl.load(stack_ptr + cell, mask=live, other=0)
                                        tl.store(log_ptr + (logged + low - 1 - cell) % room, held, mask=live & (cell < low))
                                        tl.store(stack_ptr + cell, tl.zeros((_LANES,), tl.int16), mask=live)
                                    sp -= size
                                    logged += tl.maximum(low - sp, 0)
                                    low = tl.minimum(low, sp)
                                    tl.debug_barrier()
                                if sp == depth:
                                    what = tl.where(sp == depth, _DEEP, what)
                                    going = tl.where(sp == depth, 0, going)
                                else:
                                    tl.store(stack_ptr + sp, push)
                                    sp += 1
                                    high = tl.maximum(high, sp)
                                    going = tl.where(a < 0, 1, 0)
                                    tl.debug_barrier()
                        if what == _FINE:
                            q, node, x = look_down(keys_ptr, values_ptr, last, context, _CONTEXT, stack_ptr, sp)
                            if q == -1:
                                what = tl.where(q == -1, _UNKNOWN, what)
                                tl.store(miss_ptr + 2 * b, node)
                                tl.store(miss_ptr + 2 * b + 1, x.to(tl.int64))
            if what != _FINE:
                tl.debug_barrier()
                clear(stack_ptr, sp0, high)
                restore(stack_ptr, log_ptr, room, logged0, logged, sp0)
        bad = what
        tl.store(peak_ptr + b, tl.maximum(tl.load(peak_ptr + b), logged))
        if what == _FINE:
            length = tl.load(length_ptr + b)
            mark_ptr = marks_ptr + (b * history + length % history) * _MARK
            tl.store(mark_ptr, q0.to(tl.int64))
            tl.store(mark_ptr + 1, sp0.to(tl.int64))
            tl.store(mark_ptr + 2, logged0)
            tl.store(mark_ptr + 3, over0.to(tl.int64))
            tl.store(mark_ptr + 4, row0.to(tl.int64))
            tl.store(length_ptr + b, length + 1)
            tl.store(kept_ptr + b, tl.minimum(tl.load(kept_ptr + b) + 1, history))
            tl.store(q_ptr + b, q)
            tl.store(sp_ptr + b, sp)
            tl.store(over_ptr + b, over.to(tl.int8))
            tl.store(logged_ptr + b, logged)
            row = tl.load(stop_ptr)
            if over == 0:
                node = context + 1
                x = q
                row = hash_find(keys_ptr, values_ptr, last, (node << _BITS) | x)
                if row != -1: row, node, x = look_down(keys_ptr, values_ptr, last, row.to(tl.int64), q, stack_ptr, sp)
                if row == -1:
                    row = tl.where(row == -1, _NO_ROW, row)
                    bad = tl.where(over == 0, _UNKNOWN, bad)
                    tl.store(miss_ptr + 2 * b, node)
                    tl.store(miss_ptr + 2 * b + 1, x.to(tl.int64))
            tl.store(row_ptr + b, row)
    tl.store(what_ptr + b, what)
    flag = tl.load(flag_ptr + b)
    tl.store(flag_ptr + b, tl.where(flag == _FINE, bad, flag))


@triton.jit
def take_back_kernel(grammar_ptr, q_ptr, sp_ptr, stack_ptr, over_ptr, row_ptr, log_ptr, logged_ptr, peak_ptr, length_ptr, kept_ptr, marks_ptr, flag_ptr, steps_ptr, depth, room, history):
    "One sequence: undo its last tokens, the last one first."
    b = tl.program_id(0).to(tl.int64)
    steps = tl.load(steps_ptr + b).to(tl.int64)
    stack_ptr += b * depth
    log_ptr += b * room
    marks_ptr += b * history * _MARK
    if (tl.load(grammar_ptr + b) >= 0) & (steps != 0):
        length = tl.load(length_ptr + b)
        logged = tl.load(logged_ptr + b)
        sp = tl.load(sp_ptr + b)
        kept = tl.load(kept_ptr + b)
        short = (steps < 0) | (steps > kept)
        first_ptr = marks_ptr + tl.where(short, 0, (length - steps) % history) * _MARK
        short = short | (tl.load(peak_ptr + b) - tl.load(first_ptr + 2) > room)
        if short:
            flag = tl.load(flag_ptr + b)
            tl.store(flag_ptr + b, tl.where(flag == _FINE, _SHORT, flag))
        else:
            for k in range(1, (steps + 1).to(tl.int32)):
                mark_ptr = marks_ptr + (length - k) % history * _MARK
                below = tl.load(mark_ptr + 1).to(tl.int32)
                began = tl.load(mark_ptr + 2)
                clear(stack_ptr, below, sp)
                restore(stack_ptr, log_ptr, room, began, logged, below)
                sp = below
                logged = began
                tl.debug_barrier()
            tl.store(q_ptr + b, tl.load(first_ptr).to(tl.int32))
            tl.store(sp_ptr + b, sp)
            tl.store(logged_ptr + b, logged)
            tl.store(over_ptr + b, tl.load(first_ptr + 3).to(tl.int8))
            tl.store(row_ptr + b, tl.load(first_ptr + 4).to(tl.int32))
            tl.store(length_ptr + b, length - steps)
            tl.store(kept_ptr + b, kept - steps)


@triton.jit
def gather_apply_kernel(logits_ptr, rows_ptr, ids_ptr, indices_ptr, columns, width, stride_l, stride_r, LOW: tl.constexpr, INDEXED: tl.constexpr, WORDS: tl.constexpr):
    "One row of logits, as integers, and some words of its mask: a word of zeros is written and not read, a word of ones neither."
    k = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + k).to(tl.int64)
    line = k
    if INDEXED: line = tl.load(indices_ptr + k).to(tl.int64)
    if (row != _FREE) & (line >= 0):
        at = tl.program_id(1).to(tl.int64) * WORDS + tl.arange(0, WORDS)
        bit = tl.arange(0, 32)
        word = tl.load(rows_ptr + row * stride_r + at, mask=(at < width) & (row >= 0), other=0)   # [WORDS]
        column = at[:, None] * 32 + bit[None, :]                                                  # [WORDS, 32]
        inside = column < columns
        mixed = (word != 0) & (word != -1)
        place = logits_ptr + line * stride_l + column
        x = tl.load(place, mask=mixed[:, None] & inside, other=LOW)
        x = tl.where(((word[:, None] >> bit[None, :]) & 1) != 0, x, LOW)
        tl.store(place, x, mask=(word != -1)[:, None] & inside)


@triton.jit
def order_key(x, token, may):
    "One number by which tokens are ranked: the greater logit, then the lower token; NaN counts as minus infinity, both zeros as one."
    x = x.to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ _LAST, bits)
    return tl.where(may, (bits.to(tl.int64) << 32) | (token ^ _LAST).to(tl.int64), _NOTHING)


@triton.jit
def chunk_keys(logits_ptr, rows_ptr, few_ptr, few_start, few_size, row, base, columns, width, stride_r, WORDS: tl.constexpr):
    "Keys of the allowed tokens of a piece of a row [WORDS, 32]: its listed tokens, or its bits; logits of a word without an allowed token are not read."
    at = base // 32 + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    token = at[:, None] * 32 + bit[None, :]
    if few_size >= 0:
        may = token < few_size
        token = tl.load(few_ptr + few_start + token, mask=may, other=0)
        x = tl.load(logits_ptr + token, mask=may, other=float("-inf"))
        keys = order_key(x, token, may)
    else:
        word = tl.load(rows_ptr + row * stride_r + at, mask=(at < width) & (row >= 0), other=0)
        word = tl.where(row == _FREE, -1, word)
        inside = token < columns
        x = tl.load(logits_ptr + token, mask=(word != 0)[:, None] & inside, other=float("-inf"))
        keys = order_key(x, token, (((word[:, None] >> bit[None, :]) & 1) != 0) & inside)
    return keys


@triton.jit
def masked_argmax_kernel(logits_ptr, rows_ptr, few_start_ptr, few_size_ptr, few_ptr, ids_ptr, indices_ptr, part_ptr, columns, width, splits,
                         stride_l, stride_r, INDEXED: tl.constexpr, LISTED: tl.constexpr, WORDS: tl.constexpr):
    "One row and every `splits`-th piece of it: the greatest key."
    k = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.load(ids_ptr + k).to(tl.int64)
    line = k
    if INDEXED: line = tl.load(indices_ptr + k).to(tl.int64)
    few_start = 0
    few_size = -1
    if LISTED:
        known = row >= 0
        few_start = tl.load(few_start_ptr + tl.where(known, row, 0))
        few_size = tl.where(known, tl.load(few_size_ptr + tl.where(known, row, 0)), -1)
    best = tl.full((WORDS, 32), _NOTHING, tl.int64)
    stop = tl.where((row == _NO_ROW) | (line < 0), 0, tl.where(few_size >= 0, few_size, columns))
    for base in range(split * WORDS * 32, stop, splits * WORDS * 32):
        best = tl.maximum(best, chunk_keys(logits_ptr + line * stride_l, rows_ptr, few_ptr, few_start, few_size, row, base, columns, width, stride_r, WORDS))
    tl.store(part_ptr + k * splits + split, tl.max(tl.max(best, axis=1), axis=0))


@triton.jit
def masked_argmax_merge_kernel(part_ptr, out_ptr, splits, SPLITS_PAD: tl.constexpr):
    "The token of the greatest key of a row; -1 if nothing is allowed."
    k = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_PAD)
    best = tl.max(tl.load(part_ptr + k * splits + split, mask=split < splits, other=_NOTHING), axis=0)
    tl.store(out_ptr + k, tl.where(best == _NOTHING, -1, (best & _LAST) ^ _LAST))


@triton.jit
def masked_topk_kernel(logits_ptr, rows_ptr, few_start_ptr, few_size_ptr, few_ptr, ids_ptr, indices_ptr, part_ptr, columns, width, splits,
                       stride_l, stride_r, INDEXED: tl.constexpr, LISTED: tl.constexpr, WORDS: tl.constexpr, K_PAD: tl.constexpr):
    "One row and one piece of it: its greatest keys, in order."
    k = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.load(ids_ptr + k).to(tl.int64)
    line = k
    if INDEXED: line = tl.load(indices_ptr + k).to(tl.int64)
    few_start = 0
    few_size = -1
    if LISTED:
        known = row >= 0
        few_start = tl.load(few_start_ptr + tl.where(known, row, 0))
        few_size = tl.where(known, tl.load(few_size_ptr + tl.where(known, row, 0)), -1)
    stop = tl.where((row == _NO_ROW) | (line < 0), 0, tl.where(few_size >= 0, few_size, columns))
    base = split * WORDS * 32
    best = tl.full((K_PAD,), _NOTHING, tl.int64)
    if base < stop:
        keys = chunk_keys(logits_ptr + line * stride_l, rows_ptr, few_ptr, few_start, few_size, row, base, columns, width, stride_r, WORDS)
        best = tl.topk(tl.reshape(keys, (WORDS * 32,)), K_PAD)
    tl.store(part_ptr + (k * splits + split) * K_PAD + tl.arange(0, K_PAD), best)


@triton.jit
def precise_log(x):
    "Natural logarithm of positive numbers by additions, multiplications and one division, which every machine rounds alike."
    bits = x.to(tl.int32, bitcast=True)
    e = (bits >> 23) - 127
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    big = m > 1.4142135
    m = tl.where(big, m * 0.5, m)
    e = tl.where(big, e + 1, e).to(tl.float32)
    s = tl.div_rn(m - 1.0, m + 1.0)
    z = s * s
    return e * 0.69314718 + (s + s) * (z * (z * (z * (z * 0.11111111 + 0.14285714) + 0.2) + 0.33333333) + 1.0)


@triton.jit
def masked_topk_sample_kernel(part_ptr, temperature_ptr, seeds_ptr, out_ptr, candidates, k, BLOCK: tl.constexpr, K_PAD: tl.constexpr):
    "The greatest keys of a row, noise on them, and the greatest again."
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    keys = tl.topk(tl.load(part_ptr + row * candidates + at, mask=at < candidates, other=_NOTHING), K_PAD)    # [K_PAD], in order
    place = tl.arange(0, K_PAD)
    may = (place < k) & (keys != _NOTHING)
    token = ((keys & _LAST) ^ _LAST).to(tl.int32)
    bits = (keys >> 32).to(tl.int32)
    x = tl.where(bits < 0, bits ^ _LAST, bits).to(tl.float32, bitcast=True)
    temperature = tl.load(temperature_ptr + row)
    warm = temperature > 0
    u = (((tl.randint(tl.load(seeds_ptr + row), token) >> 9) * 2 + 1).to(tl.int32)).to(tl.float32) * 5.9604644775390625e-08
    noise = -precise_log(-precise_log(u))
    score = tl.where(warm, tl.div_rn(x, tl.zeros((K_PAD,), tl.float32) + tl.where(warm, temperature, 1.0)) + noise, x)
    score = tl.where(may, score, float("-inf"))
    first = tl.min(tl.where(may & (score == tl.max(score, axis=0)), place, _LAST), axis=0)
    tl.store(out_ptr + row, tl.where(first == _LAST, -1, tl.sum(tl.where(place == first, token, 0), axis=0)).to(tl.int64))


@triton.jit
def fill_bitmask_kernel(out_ptr, rows_ptr, ids_ptr, wide, width, stride_o, stride_r, BLOCK: tl.constexpr):
    "Some words of one row."
    k = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + k).to(tl.int64)
    tile = tl.program_id(1)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(rows_ptr + row * stride_r + at, mask=(at < width) & (row >= 0), other=0)
    tl.store(out_ptr + k * stride_o + at, tl.where(row == _FREE, -1, word), mask=at < wide)


def _power(n: int) -> int:
    "The smallest power of two that is not below `n`."
    return 1 << max(n - 1, 0).bit_length()


def launch_options(kernel: str) -> dict:
    """Words or block a program works on, and warps; none of them spills on sm_90 (the compile check looks).

    A text is followed by one warp. Noise is rounded alike everywhere only without fused multiply-adds. Sorting costs the
    interpreter seconds a thousand numbers, so there a program looks at fewer.
    """
    return {"advance_classify": dict(num_warps=1), "take_back": dict(num_warps=1), "gather_apply": dict(WORDS=CHUNK // 32, num_warps=4),
            "masked_argmax": dict(WORDS=CHUNK // 64, num_warps=4), "masked_argmax_merge": dict(num_warps=1), "masked_topk": dict(WORDS=4 if INTERPRETED else CHUNK // 32, num_warps=8),
            "masked_topk_sample": dict(num_warps=8, enable_fp_fusion=False), "fill_bitmask": dict(BLOCK=1024, num_warps=4)}[kernel]


def default_splits(n: int, columns: int, processors: int) -> int:
    "Programs a row is looked through by: enough to fill the device four times over, none with less than a piece."
    return max(1, min(4 * processors // max(n, 1), -(-columns // (CHUNK // 2))))


_TABLES = {"delta": torch.int32, "emit": torch.int32, "plen": torch.int32, "pat": torch.int32, "text": torch.uint8, "off": torch.int32, "kind": torch.int8, "keys": torch.int64, "values": torch.int32,
           "where": torch.int64, "action": torch.int16, "goto": torch.int16, "size": torch.int16, "lhs": torch.int16, "column": torch.int16, "rows": torch.int32,
           "few_start": torch.int32, "few_size": torch.int32, "few": torch.int32, "stop": torch.int32}
_STATE = {"grammar": (torch.int32, 1), "q": (torch.int32, 1), "sp": (torch.int32, 1), "stack": (torch.int16, 2), "over": (torch.int8, 1), "row": (torch.int32, 1), "log": (torch.int16, 2),
          "logged": (torch.int64, 1), "peak": (torch.int64, 1), "length": (torch.int64, 1), "kept": (torch.int64, 1), "marks": (torch.int64, 3), "what": (torch.int32, 1), "flag": (torch.int32, 1), "miss": (torch.int64, 2)}


def _one(name: str, t: Tensor, dtype: torch.dtype | tuple[torch.dtype, ...], ndim: int, device: torch.device, like: str) -> None:
    "Type, dimensions, device, and no gaps."
    kinds = dtype if isinstance(dtype, tuple) else (dtype,)
    if t.dtype not in kinds: raise ValueError(f"{name} is {t.dtype}: need {' or '.join(str(k).removeprefix('torch.') for k in kinds)}")
    if t.ndim != ndim: raise ValueError(f"{name} has shape {tuple(t.shape)}: need {ndim} dimension{'s' * (ndim > 1)}")
    if t.device != device: raise ValueError(f"{name} is on {t.device}, {like} on {device}: need one device")
    if not t.is_contiguous(): raise ValueError(f"{name} has strides {t.stride()}: need it in one piece; call .contiguous() first")


def _check_state(s: State) -> None:
    "Shapes and types of a state."
    n, device = len(s.grammar), s.grammar.device
    for name, (dtype, ndim) in _STATE.items():
        _one(f"state.{name}", getattr(s, name), dtype, ndim, device, "state.grammar")
        if len(getattr(s, name)) != n: raise ValueError(f"state.{name} has shape {tuple(getattr(s, name).shape)}, state.grammar n={n} sequences: need the same")
    if s.stack.shape[1] < 4 or s.log.shape[1] % s.stack.shape[1] or s.log.shape[1] < 2 * s.stack.shape[1]: raise ValueError(f"state.log has {s.log.shape[1]} columns, state.stack {s.stack.shape[1]}: need a stack of at least 4 cells, and a multiple of it, at least twice as many, for the log")
    if s.marks.shape[1] < 1 or s.marks.shape[2] != MARK: raise ValueError(f"state.marks has shape {tuple(s.marks.shape)}: need [n, history, {MARK}] and at least one token of history")


def _check_advance(t: Tables, s: State, tokens: Tensor) -> None:
    "Everything that can be checked without asking the device."
    _check_state(s)
    device = s.grammar.device
    for name, dtype in _TABLES.items(): _one(f"tables.{name}", getattr(t, name), dtype, 2 if name in ("delta", "where", "rows") else 1, device, "state.grammar")
    if t.delta.shape[1] != 256: raise ValueError(f"tables.delta has shape {tuple(t.delta.shape)}: need [Q, 256]")
    if t.where.shape[1] != 7: raise ValueError(f"tables.where has shape {tuple(t.where.shape)}: need [grammars, 7]")
    if len(t.keys) != len(t.values) or len(t.keys) & (len(t.keys) - 1): raise ValueError(f"tables.keys has {len(t.keys)} places and tables.values {len(t.values)}: need the same power of two")
    if len(t.off) != len(t.kind) + 1 or t.rows.shape[1] != -(-len(t.kind) // 32): raise ValueError(f"tables.kind has {len(t.kind)} tokens, tables.off {len(t.off)} entries, tables.rows {t.rows.shape[1]} words: need one entry more than tokens, and a word for 32 tokens")
    _one("tokens", tokens, (torch.int64, torch.int32), 1, device, "state.grammar")
    if len(tokens) != len(s.grammar): raise ValueError(f"tokens has shape {tuple(tokens.shape)}: need one token for each of the n={len(s.grammar)} sequences")


def _check_rows(rows: Tensor, row_ids: Tensor) -> None:
    "A table of masks and numbers of them."
    if rows.dtype != torch.int32 or rows.ndim != 2 or (rows.numel() and rows.stride(1) != 1): raise ValueError(f"rows is {rows.dtype} of shape {tuple(rows.shape)}: need int32 [R, W], last dimension dense")
    if not len(rows): raise ValueError("rows has no masks: need at least one")
    _one("row_ids", row_ids, torch.int32, 1, rows.device, "rows")


def _check_logits(logits: Tensor, rows: Tensor, row_ids: Tensor, indices: Tensor | None) -> None:
    "Everything that can be checked without asking the device."
    _check_rows(rows, row_ids)
    if logits.dtype not in DTYPES: raise ValueError(f"logits is {logits.dtype}: need float32, float16 or bfloat16")
    if logits.ndim != 2: raise ValueError(f"logits has shape {tuple(logits.shape)}: need [n, C]")
    if logits.device != rows.device: raise ValueError(f"logits is on {logits.device}, rows on {rows.device}: need one device")
    if logits.numel() and logits.stride(1) != 1: raise ValueError(f"logits has stride {logits.stride(1)} in its last dimension: need 1; call .contiguous() first")
    if not 32 * (rows.shape[1] - 1) < logits.shape[1] < 2**31: raise ValueError(f"logits has C={logits.shape[1]} columns, rows W={rows.shape[1]} words: need a column for every token, more than {32 * (rows.shape[1] - 1)}")
    if indices is None:
        if len(row_ids) != len(logits): raise ValueError(f"row_ids has {len(row_ids)} entries, logits n={len(logits)} rows: need the same, or indices= to say which row belongs to which")
    else:
        _one("indices", indices, (torch.int64, torch.int32), 1, rows.device, "rows")
        if len(indices) != len(row_ids): raise ValueError(f"indices has {len(indices)} entries, row_ids {len(row_ids)}: need the same, -1 for none")


def _choose(impl: str, t: Tensor) -> bool:
    "Is it the kernel that runs?"
    if impl not in ("auto", "torch", "triton"): raise ValueError(f"impl={impl!r}: need 'auto', 'torch' or 'triton'")
    if impl == "torch" or (impl == "auto" and not t.is_cuda): return False
    if not t.is_cuda and not INTERPRETED: raise RuntimeError(f"impl='triton' with tensors on {t.device}: need CUDA tensors, or the interpreter (set TRITON_INTERPRET=1 before the import)")
    if INTERPRETED and (trouble := interpreter_trouble()): raise RuntimeError(trouble)
    return True


@torch.library.custom_op("modeltc::advance_classify", mutates_args=("state",))
def _advance_classify_op(tables: Sequence[Tensor], state: Sequence[Tensor], tokens: Tensor) -> None:
    "Launch one program a sequence."
    t, s = Tables(*tables), State(*state)
    if not len(tokens): return
    advance_classify_kernel[(len(tokens),)](
        t.delta, t.emit, t.plen, t.pat, t.text, t.off, t.kind, t.keys, t.values, t.where, t.action, t.goto, t.size, t.lhs, t.column, t.rows, t.stop,
        s.grammar, s.q, s.sp, s.stack, s.over, s.row, s.log, s.logged, s.peak, s.length, s.kept, s.marks, s.what, s.flag, s.miss,
        tokens, len(t.kind), t.rows.shape[1], len(t.keys) - 1, s.stack.shape[1], s.log.shape[1], s.marks.shape[1], **launch_options("advance_classify"))


@torch.library.custom_op("modeltc::take_back", mutates_args=("state",))
def _take_back_op(state: Sequence[Tensor], steps: Tensor) -> None:
    "Launch one program a sequence."
    s = State(*state)
    if not len(steps): return
    take_back_kernel[(len(steps),)](s.grammar, s.q, s.sp, s.stack, s.over, s.row, s.log, s.logged, s.peak, s.length, s.kept, s.marks, s.flag, steps,
                                    s.stack.shape[1], s.log.shape[1], s.marks.shape[1], **launch_options("take_back"))


@torch.library.custom_op("modeltc::gather_apply", mutates_args=("logits",))
def _gather_apply_op(logits: Tensor, rows: Tensor, row_ids: Tensor, indices: Tensor | None) -> None:
    "Launch a program a row and piece; logits are handled as integers."
    if not len(row_ids): return
    kind, low = DTYPES[logits.dtype]
    options = launch_options("gather_apply")
    gather_apply_kernel[(len(row_ids), triton.cdiv(logits.shape[1], options["WORDS"] * 32))](
        logits.view(kind), rows, row_ids, row_ids if indices is None else indices, logits.shape[1], rows.shape[1], logits.stride(0), rows.stride(0),
        LOW=low, INDEXED=indices is not None, **options)


@torch.library.custom_op("modeltc::masked_argmax", mutates_args=())
def _masked_argmax_op(logits: Tensor, rows: Tensor, row_ids: Tensor, indices: Tensor | None, lists: Sequence[Tensor], num_splits: int) -> Tensor:
    "Launch a search of pieces and a choice among their winners; the number of pieces is chosen here when it is 0, out of sight of a tracer."
    n, columns = len(row_ids), logits.shape[1]
    out = torch.empty(n, dtype=torch.int64, device=logits.device)
    if not n: return out
    if num_splits == 0: num_splits = default_splits(n, columns, torch.cuda.get_device_properties(logits.device).multi_processor_count if logits.is_cuda else 1)
    part = torch.empty((n, num_splits), dtype=torch.int64, device=logits.device)
    start, size, few = lists or (row_ids, row_ids, row_ids)
    masked_argmax_kernel[(n, num_splits)](logits, rows, start, size, few, row_ids, row_ids if indices is None else indices, part, columns, rows.shape[1], num_splits,
                                          logits.stride(0), rows.stride(0), INDEXED=indices is not None, LISTED=bool(lists), **launch_options("masked_argmax"))
    masked_argmax_merge_kernel[(n,)](part, out, num_splits, SPLITS_PAD=_power(num_splits), **launch_options("masked_argmax_merge"))
    return out


@torch.library.custom_op("modeltc::masked_topk_sample", mutates_args=())
def _masked_topk_sample_op(logits: Tensor, rows: Tensor, row_ids: Tensor, k: int, temperature: Tensor, seeds: Tensor, indices: Tensor | None, lists: Sequence[Tensor]) -> Tensor:
    "Launch a search of pieces and a draw among their best."
    n, columns = len(row_ids), logits.shape[1]
    out = torch.empty(n, dtype=torch.int64, device=logits.device)
    if not n: return out
    options, k_pad = launch_options("masked_topk"), max(2, _power(k))
    splits = triton.cdiv(columns, options["WORDS"] * 32)
    part = torch.empty((n, splits, k_pad), dtype=torch.int64, device=logits.device)
    start, size, few = lists or (row_ids, row_ids, row_ids)
    masked_topk_kernel[(n, splits)](logits, rows, start, size, few, row_ids, row_ids if indices is None else indices, part, columns, rows.shape[1], splits,
                                    logits.stride(0), rows.stride(0), INDEXED=indices is not None, LISTED=bool(lists), K_PAD=k_pad, **options)
    masked_topk_sample_kernel[(n,)](part, temperature, seeds, out, splits * k_pad, k, BLOCK=_power(splits * k_pad), K_PAD=k_pad, **launch_options("masked_topk_sample"))
    return out


@torch.library.custom_op("modeltc::fill_bitmask", mutates_args=("out",))
def _fill_bitmask_op(out: Tensor, rows: Tensor, row_ids: Tensor) -> None:
    "Launch a program a row and piece."
    if not len(row_ids): return
    options = launch_options("fill_bitmask")
    fill_bitmask_kernel[(len(row_ids), triton.cdiv(out.shape[1], options["BLOCK"]))](out, rows, row_ids, out.shape[1], rows.shape[1], out.stride(0), rows.stride(0), **options)


@_advance_classify_op.register_fake
def _(tables, state, tokens): return None


@_take_back_op.register_fake
def _(state, steps): return None


@_gather_apply_op.register_fake
def _(logits, rows, row_ids, indices): return None


@_masked_argmax_op.register_fake
def _(logits, rows, row_ids, indices, lists, num_splits): return torch.empty(row_ids.shape, dtype=torch.int64, device=logits.device)


@_masked_topk_sample_op.register_fake
def _(logits, rows, row_ids, k, temperature, seeds, indices, lists): return torch.empty(row_ids.shape, dtype=torch.int64, device=logits.device)


@_fill_bitmask_op.register_fake
def _(out, rows, row_ids): return None


def row_lists(
    rows: Tensor,              # [R, W] int32 masks
    longest: int = CHUNK,      # tokens of a mask that still gets a list
) -> tuple[Tensor, Tensor, Tensor]:  # `few_start`, `few_size` and `few` of `Tables`
    "The tokens of the masks that have few of them, as lists."
    sizes, lists = [], []
    for some in rows.split(64):                      # bits take 32 times the memory
        bits = some[:, :, None] >> torch.arange(32, device=rows.device, dtype=torch.int32) & 1
        size = bits.sum((1, 2), dtype=torch.int32)
        sizes.append(torch.where(size <= longest, size, -1))
        lists.append(bits[size <= longest].flatten(1).nonzero()[:, 1].int())
    size, few = torch.cat(sizes), torch.cat(lists)
    kept = size.clamp(min=0)
    return kept.cumsum(0, dtype=torch.int32) - kept, size, few if len(few) else few.new_zeros(1)


def advance_classify(
    tables: Tables,
    state: State,              # changed in place
    tokens: Tensor,            # [n] int64 or int32; -1 leaves a sequence as it is
    *,
    impl: str = "auto",        # "torch" (the reference), "triton", or "auto": torch on CPU, the kernel on CUDA
) -> None:
    "Read a token in every sequence and find its next mask (`state.row`); what became of it is in `state.what`, and a sequence that did not read it is as it was."
    _check_advance(tables, state, tokens)
    if _choose(impl, tokens): _advance_classify_op(list(tables), list(state), tokens)
    else: advance_classify_ref(tables, state, tokens)


def take_back(
    state: State,              # changed in place
    steps: Tensor,             # [n] int64 or int32, tokens to take back
    *,
    impl: str = "auto",        # as in `advance_classify`
) -> None:
    "Undo the last tokens of every sequence; one that does not remember so many stays as it is, and is flagged."
    _check_state(state)
    _one("steps", steps, (torch.int64, torch.int32), 1, state.grammar.device, "state.grammar")
    if len(steps) != len(state.grammar): raise ValueError(f"steps has shape {tuple(steps.shape)}: need a number for each of the n={len(state.grammar)} sequences")
    if _choose(impl, steps): _take_back_op(list(state), steps)
    else: take_back_ref(state, steps)


def gather_apply(
    logits: Tensor,                  # [m, C] fp32, fp16 or bf16, changed in place; rows may lie apart, columns may be more than tokens
    rows: Tensor,                    # [R, W] int32 masks
    row_ids: Tensor,                 # [n] int32 mask of each sequence; -1: its logits stay as they are
    indices: Tensor | None = None,   # [n] int64 or int32 row of the logits of each sequence, -1 none; None: m = n, in order
    *,
    impl: str = "auto",              # as in `advance_classify`
) -> None:
    "Write minus infinity where a bit is clear and in the columns behind the vocabulary."
    _check_logits(logits, rows, row_ids, indices)
    if _choose(impl, logits): _gather_apply_op(logits, rows, row_ids, indices)
    else: gather_apply_ref(logits, rows, row_ids, indices)


def _check_lists(rows: Tensor, lists: tuple[Tensor, Tensor, Tensor] | None) -> None:
    "Lists of tokens belong to the masks."
    for name, t in zip(("few_start", "few_size", "few"), lists or ()): _one(f"lists {name}", t, torch.int32, 1, rows.device, "rows")
    if lists and not len(lists[0]) == len(lists[1]) == len(rows): raise ValueError(f"lists are of {len(lists[0])} and {len(lists[1])} masks, rows has {len(rows)}: need those of row_lists(rows)")


def masked_argmax(
    logits: Tensor,                  # [m, C] fp32, fp16 or bf16
    rows: Tensor,                    # [R, W] int32 masks
    row_ids: Tensor,                 # [n] int32 mask of each sequence, -1: any column
    indices: Tensor | None = None,   # [n] row of the logits of each sequence, as in `gather_apply`
    *,
    lists: tuple[Tensor, Tensor, Tensor] | None = None,  # of `row_lists(rows)`: masks with few tokens are not searched for their bits
    num_splits: int | None = None,   # pieces of a row that are searched at once; None: enough to fill the device
    impl: str = "auto",              # as in `advance_classify`
) -> Tensor:                         # [n] int64, -1 where nothing is allowed
    "The allowed token with the greatest logit, of equal ones the first; NaN counts as minus infinity."
    _check_logits(logits, rows, row_ids, indices)
    _check_lists(rows, lists)
    if num_splits is not None and not 1 <= num_splits <= 1024: raise ValueError(f"num_splits={num_splits}: need 1 to 1024, or None")
    if _choose(impl, logits): return _masked_argmax_op(logits, rows, row_ids, indices, list(lists or ()), num_splits or 0)
    return masked_argmax_ref(logits, rows, row_ids, indices)


def masked_topk_sample(
    logits: Tensor,                  # [m, C] fp32, fp16 or bf16
    rows: Tensor,                    # [R, W] int32 masks
    row_ids: Tensor,                 # [n] int32 mask of each sequence, -1: any column
    k: int,                          # of that many greatest logits, 1 to 64
    temperature: Tensor,             # [n] fp32, 0: the greatest
    seeds: Tensor,                   # [n] int64, another one for every step
    indices: Tensor | None = None,   # [n] row of the logits of each sequence, as in `gather_apply`
    *,
    lists: tuple[Tensor, Tensor, Tensor] | None = None,  # as in `masked_argmax`
    impl: str = "auto",              # as in `advance_classify`
) -> Tensor:                         # [n] int64, -1 where nothing is allowed
    "Draw one of the k best allowed tokens; the same seed draws the same token on every machine."
    _check_logits(logits, rows, row_ids, indices)
    _check_lists(rows, lists)
    if not 1 <= k <= MAX_K: raise ValueError(f"k={k}: need 1 to {MAX_K}")
    for name, t, dtype in (("temperature", temperature, torch.float32), ("seeds", seeds, torch.int64)):
        _one(name, t, dtype, 1, rows.device, "rows")
        if len(t) != len(row_ids): raise ValueError(f"{name} has {len(t)} entries, row_ids {len(row_ids)}: need the same")
    if _choose(impl, logits): return _masked_topk_sample_op(logits, rows, row_ids, k, temperature, seeds, indices, list(lists or ()))
    return masked_topk_sample_ref(logits, rows, row_ids, k, temperature, seeds, indices)


def fill_bitmask(
    out: Tensor,                     # [n, W or wider] int32, written
    rows: Tensor,                    # [R, W] int32 masks
    row_ids: Tensor,                 # [n] int32 mask of each sequence
    *,
    impl: str = "auto",              # as in `advance_classify`
) -> None:
    "Copy masks: all ones for a sequence without a constraint, zeros behind the vocabulary for one with."
    _check_rows(rows, row_ids)
    if out.dtype != torch.int32 or out.ndim != 2 or len(out) != len(row_ids) or out.shape[1] < rows.shape[1] or (out.numel() and out.stride(1) != 1):
        raise ValueError(f"out is {out.dtype} of shape {tuple(out.shape)}: need int32 [{len(row_ids)}, {rows.shape[1]} or wider], last dimension dense")
    if out.device != rows.device: raise ValueError(f"out is on {out.device}, rows on {rows.device}: need one device")
    if _choose(impl, out): _fill_bitmask_op(out, rows, row_ids)
    else: fill_bitmask_ref(out, rows, row_ids)
