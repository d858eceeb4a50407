"""Compile every kernel variant for sm_90 without a GPU, and read what it uses.

    python kernels/bench/compile_check.py [--write] [--json] [--only TEXT]

A process of its own: after an interpreted run Triton does not compile. It proves that a kernel builds and fits the
machine, not that it is right or fast. No variant may spill or use a stack, with any compiler. Budgets of registers and shared
memory belong to the compiler they were read with and are held against that one only.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
import triton  # noqa: E402
import triton.backends.nvidia as nvidia  # noqa: E402
from modeltc_kernels import constrained as cd  # noqa: E402
from modeltc_kernels import paged_decode as pd  # noqa: E402
from modeltc_kernels import varlen_attention as va  # noqa: E402
from rows import row, save  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGET, ARCH, DEVICE = GPUTarget("cuda", 90, 32), "sm_90a", "sm_90-compile-only"
LIMITS = {"stack": 0, "spill stores": 0, "spill loads": 0, "shared memory": 227 * 1024}  # the last: bytes a block may use on sm_90
BUDGET_TRITON = "3.6"  # the release the budgets below were read with
# What the common variants may use so that three programs stay on a processor: 65536 registers of 128 threads, 228 KiB less 1 KiB each.
BUDGETS = {"bf16 e=128 page=16 GQA 4": {"registers": 168, "shared memory": 75 * 1024}, "bf16 e=128 page=1 GQA 4 ": {"registers": 168, "shared memory": 75 * 1024},
           "paged_decode merge": {"registers": 64, "shared memory": 8 * 1024}}
FWD = dict(q_ptr="*{t}", k_ptr="*{t}", v_ptr="*{t}", table_ptr="*i32", length_ptr="*i32", part_ptr="*{o}", lse_ptr="*fp32", scale="fp32", heads="i32", splits="i32",
           stride_qn="i32", stride_qh="i32", stride_ks="i32", stride_kh="i32", stride_vs="i32", stride_vh="i32", stride_tn="i32")
MERGE = dict(part_ptr="*fp32", lse_ptr="*fp32", out_ptr="*{t}", splits="i32")


def forward(kind, e, page, group, split):
    "The forward kernel as the launcher would build it."
    signature = {k: v.format(t=kind, o="fp32" if split else kind) for k, v in FWD.items()}
    group_pad, e_pad = pd.padded(group, e)
    chosen = pd.launch_options({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind], group_pad, e_pad)
    options = {k: chosen.pop(k) for k in ("num_warps", "num_stages")}
    const = dict(GROUP=group, GROUP_PAD=group_pad, E=e, E_PAD=e_pad, PAGE=page, UPCAST=False, **chosen)
    return pd.paged_decode_fwd_kernel, signature, const, options


def merge(kind, e, splits):
    "The merge kernel as the launcher would build it."
    return pd.paged_decode_merge_kernel, {k: v.format(t=kind) for k, v in MERGE.items()}, dict(E=e, E_PAD=pd.padded(1, e)[1], SPLITS_PAD=splits), dict(num_warps=2)


COMMON = [("bf16", 128, 16, 4, True), ("bf16", 128, 1, 4, True), ("bf16", 128, 16, 4, False), ("bf16", 128, 16, 1, True),
          ("bf16", 64, 16, 8, True), ("bf16", 96, 16, 1, True), ("fp16", 128, 16, 4, True), ("fp32", 128, 16, 4, True)]
CORNERS = [("bf16", 128, 1, 64, False), ("bf16", 256, 1, 4, False), ("bf16", 256, 1, 64, False), ("bf16", 128, 1, 32, False),
           ("fp32", 256, 16, 4, True), ("fp32", 128, 1, 64, False), ("fp32", 256, 1, 64, False)]  # the largest the launcher lets through
VARIANTS = {f"paged_decode {kind} e={e} page={page} GQA {group}" + (" split" if split else ""): forward(kind, e, page, group, split)
            for kind, e, page, group, split in COMMON + CORNERS}
VARIANTS |= {f"paged_decode merge {kind} e={e} splits={s}": merge(kind, e, s) for kind, e, s in (("bf16", 128, 8), ("bf16", 128, 32), ("fp32", 128, 32), ("fp32", 256, 32))}


CD = dict(delta_ptr="*i32", emit_ptr="*i32", plen_ptr="*i32", pat_ptr="*i32", text_ptr="*u8", off_ptr="*i32", kind_ptr="*i8", keys_ptr="*i64", values_ptr="*i32", where_ptr="*i64",
          action_ptr="*i16", goto_ptr="*i16", size_ptr="*i16", lhs_ptr="*i16", column_ptr="*i16", rows_ptr="*i32", stop_ptr="*i32", grammar_ptr="*i32", q_ptr="*i32", sp_ptr="*i32",
          stack_ptr="*i16", over_ptr="*i8", row_ptr="*i32", log_ptr="*i16", logged_ptr="*i64", peak_ptr="*i64", length_ptr="*i64", kept_ptr="*i64", marks_ptr="*i64", what_ptr="*i32", flag_ptr="*i32", miss_ptr="*i64",
          tokens_ptr="*i64", steps_ptr="*i64", logits_ptr="*{t}", few_start_ptr="*i32", few_size_ptr="*i32", few_ptr="*i32", ids_ptr="*i32", indices_ptr="*i64", part_ptr="*i64", out_ptr="*{o}",
          temperature_ptr="*fp32", seeds_ptr="*i64")  # anything else is a number


def constrained(name, kind="bf16", out="i64", **const):
    "A kernel of the constrained family as the launcher would build it; logits are integers to the one that only writes."
    fn, chosen = getattr(cd, f"{name}_kernel"), dict(cd.launch_options(name))
    options = {k: chosen.pop(k) for k in ("num_warps", "enable_fp_fusion") if k in chosen}
    const = {**chosen, **const}
    kind = {"bf16": "i16", "fp16": "i16", "fp32": "i32"}[kind] if name == "gather_apply" else kind
    return fn, {k: CD.get(k, "i32").format(t=kind, o=out) for k in fn.arg_names if k not in const}, const, options


LOGITS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONSTRAINED = {"constrained advance_classify": constrained("advance_classify"), "constrained take_back": constrained("take_back"), "constrained fill_bitmask": constrained("fill_bitmask", out="i32")}
for kind in LOGITS:
    CONSTRAINED[f"constrained gather_apply {kind}"] = constrained("gather_apply", kind, LOW=cd.DTYPES[LOGITS[kind]][1], INDEXED=False)
    CONSTRAINED[f"constrained masked_argmax {kind} lists"] = constrained("masked_argmax", kind, INDEXED=False, LISTED=True)
CONSTRAINED["constrained gather_apply bf16 indexed"] = constrained("gather_apply", LOW=cd.DTYPES[torch.bfloat16][1], INDEXED=True)
CONSTRAINED["constrained masked_argmax bf16 indexed"] = constrained("masked_argmax", INDEXED=True, LISTED=False)
CONSTRAINED |= {f"constrained masked_argmax_merge splits={s}": constrained("masked_argmax_merge", SPLITS_PAD=s) for s in (1, 8, 128, 1024)}
for k in (2, 32, 64):
    CONSTRAINED[f"constrained masked_topk bf16 k={k} lists"] = constrained("masked_topk", INDEXED=False, LISTED=True, K_PAD=k)
    CONSTRAINED[f"constrained masked_topk_sample k={k}, 64 pieces"] = constrained("masked_topk_sample", BLOCK=64 * k, K_PAD=k)
VARIANTS |= CONSTRAINED

VA = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), "*{t}") | dict.fromkeys(("lse_ptr", "grad_lse_ptr", "delta_ptr"), "*fp32") | dict(work_ptr="*i32", factor="fp32", scale="fp32")


def varlen(name, kind="bf16", e=128, group=4, big=True, causal=True, persistent=False):
    "A kernel of the varlen attention family as the launcher would build it."
    fn, const = {"fwd": va.varlen_attention_fwd_kernel, "dq": va.varlen_attention_bwd_dq_kernel, "dkv": va.varlen_attention_bwd_dkv_kernel, "delta": va.varlen_attention_bwd_delta_kernel}[name], dict(E=e, E_PAD=va.padded(e), UPCAST=False)
    if name == "delta": const, options = {**const, "BLOCK_M": 128, "LSE": True}, dict(num_warps=4)
    else:
        chosen = va.launch_options(name, LOGITS[kind], group, big)
        options = {k: chosen.pop(k) for k in ("num_warps", "num_stages")}
        const |= dict(KIND=(va.KV_BIG if name == "dkv" else va.Q_BIG) + (not big), CAUSAL=causal, GROUP=group, **chosen, **({} if name == "dkv" else dict(PERSISTENT=persistent)))
    return fn, {k: VA.get(k, "i32").format(t=kind) for k in fn.arg_names if k not in const}, const, options


VARLEN = {f"varlen_attention {name} {kind} e={e} GQA {group} " + ("large" if big else "small") + ("" if causal else " not causal"): varlen(name, kind, e, group, big, causal)
          for kind, e, group, causal in (("bf16", 128, 4, True), ("bf16", 128, 8, True), ("bf16", 128, 7, True), ("bf16", 64, 3, True), ("bf16", 96, 1, True), ("bf16", 128, 1, False), ("fp32", 128, 4, True))
          for name in ("fwd", "dq", "dkv") for big in (True, False)}
VARLEN |= {f"varlen_attention {name} bf16 e=128 GQA 4 " + ("large" if big else "small") + " persistent": varlen(name, big=big, persistent=True) for name in ("fwd", "dq") for big in (True, False)}
VARLEN |= {f"varlen_attention {name} fp16 e=128 GQA 4 large": varlen(name, "fp16") for name in ("fwd", "dq", "dkv")}
VARLEN |= {f"varlen_attention delta {kind} e=128": varlen("delta", kind) for kind in ("bf16", "fp32")}
VARIANTS |= VARLEN


def compile_variant(fn, signature, const, options):
    "To a cubin for sm_90; pointers, strides and columns are assumed to be multiples of 16, as those of real tensors are; page tables and masks are as wide as they come."
    attrs = {(i,): [["tt.divisibility", 16]] for i, (k, v) in enumerate(signature.items()) if v.startswith("*") or k == "columns" or (k.startswith("stride") and k not in ("stride_tn", "stride_r", "stride_o"))}
    source = ASTSource(fn=fn, signature={**signature, **{k: "constexpr" for k in const}}, constexprs=const, attrs=attrs)
    return triton.compile(source, target=TARGET, options=options)


def resources(kernel):
    "Registers, stack, shared memory from the disassembler; spills from the assembler's own report."
    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "k.cubin", Path(folder) / "k.ptx"
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
        newer = tools / "ptxas-blackwell"
        version = float((re.search(r"\.version (\S+)", kernel.asm["ptx"]) or ["", "0"])[1])
        ptxas = newer if version > 8.8 and newer.exists() else tools / "ptxas"
        said = subprocess.run([ptxas, "-v", f"--gpu-name={ARCH}", ptx, "-o", cubin], capture_output=True, text=True, check=True).stderr
    read = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage)}
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return {"registers": read["REG"], "stack": read["STACK"], "shared memory": read["SHARED"] + kernel.metadata.shared,
            "spill stores": int(spills[1]) if spills else 0, "spill loads": int(spills[2]) if spills else 0}


def over_budget(name, found, triton_version=triton.__version__):
    "What a variant uses beyond its limits, and beyond its budget if this is the compiler of the budgets."
    allowed = dict(LIMITS)
    if triton_version.startswith(BUDGET_TRITON + "."):
        for part, budget in BUDGETS.items(): allowed |= budget if part in name else {}
    return [f"{metric} {found[metric]}, allowed {most}" for metric, most in allowed.items() if found[metric] > most]


UNITS = {"registers": "a thread", "stack": "bytes", "shared memory": "bytes", "spill stores": "bytes", "spill loads": "bytes"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the records")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", default="", help="compile the variants whose name contains this")
    args = parser.parse_args()
    chosen = {name: variant for name, variant in VARIANTS.items() if args.only in name}
    if not chosen or (args.only and args.write):
        print(f"compile_check: --only {args.only!r} " + ("goes without --write: records hold every variant" if chosen else f"names no variant of {list(VARIANTS)}"), file=sys.stderr)
        return 2
    found = {name: resources(compile_variant(*variant)) for name, variant in chosen.items()}
    bad = [f"{name}: {'; '.join(over)}" for name, r in found.items() if (over := over_budget(name, r))]
    if args.json: print(json.dumps(found, indent=1))
    else:
        for name, r in found.items(): print(f"{name:48s}" + "".join(f"  {k} {v}" for k, v in r.items()))
    if args.write:
        for family in ("paged_decode", "constrained", "varlen_attention"):
            rows = [row(f"{family}_resources", name, metric, UNITS[metric], [value], device=DEVICE) for name, r in found.items() if name.startswith(family) for metric, value in r.items()]
            print(f"{len(rows)} records in {save(rows)}", file=sys.stderr)
    print(f"{len(found) - len(bad)} kernels compiled for {ARCH} with triton {triton.__version__} within their limits, {len(bad)} not", file=sys.stderr if args.json else sys.stdout)
    for line in bad: print("over budget:", line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__": sys.exit(main())
