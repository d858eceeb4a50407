"""Drive vLLM's real manager of structured outputs and its real scheduler with our backend: `vllm_structured.sh` makes the environment this needs.

Real are vLLM's plug-in loader, configuration, tokenizer, sampling parameters with their checks, requests, manager with its threads, scheduler, and the function that
applies masks to logits. In place of the forward pass random numbers are drawn. `--quick` draws fewer texts and writes no record.
"""

import gzip
import json
import os
import re
import sys
import tempfile
import tomllib
from importlib import metadata
from inspect import signature
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np
import torch
import vllm.plugins
from check_vllm import MODEL, TALLY, cache_of, complaint, ensure
from lark import Lark
from lark.exceptions import LarkError
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    StructuredOutputsConfig,
    VllmConfig,
)
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1 import structured_output
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager, backend_types
from vllm.v1.structured_output import utils as vllm_utils
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
from vllm.v1.structured_output.utils import apply_grammar_bitmask

from modeltc_lab.core.data import find
from modeltc_lab.core.results import record, write
from modeltc_lab.decoding import vllm_backend
from modeltc_lab.decoding.grammars import GRAMMARS
from modeltc_lab.decoding.vllm_backend import INTERFACE, VARIABLE, backend_class

vllm_utils.PIN_MEMORY = False   # there is no GPU to pin memory for
ROOT = Path(__file__).resolve().parents[2]
EOS, ENDS, VOCAB = 2, {2, 0}, 49152
ARITHMETIC, LISTS = GRAMMARS["arithmetic"].text, 'root ::= "[" (item ("," item)*)? "]"  # a list\nitem ::= [0-9]{1,3} | root\n'
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}}}, "required": ["name", "age"], "additionalProperties": False}


def whole(pattern): return lambda text: re.fullmatch(pattern, text) is not None


def by_lark(grammar):
    parser = Lark(grammar, parser="lalr")
    def accepts(text):
        try: parser.parse(text)
        except LarkError: return False
        return True
    return accepts


def is_list(text):
    plain = lambda x: all(plain(y) if isinstance(y, list) else isinstance(y, int) for y in x)
    return isinstance(made := json.loads(re.sub(r"\b0+(?=[0-9])", "", text)), list) and plain(made) and " " not in text


def by_schema(text):
    import jsonschema
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(text))


WISHES = [  # what a request asks, and who judges the text
    (dict(regex=r"[A-Z]{2}-[0-9]{3,5}"), whole(r"[A-Z]{2}-[0-9]{3,5}")),
    (dict(regex=r"^(?:caf\u00e9|\u65e5\u672c|na\u00efve)+ ?$"), whole("(?:caf\u00e9|\u65e5\u672c|na\u00efve)+ ?")),
    (dict(choice=["tea", "coffee", "tea with milk"]), lambda t: t in ("tea", "coffee", "tea with milk")),
    (dict(json_object=True), lambda t: isinstance(json.loads(t), dict)),
    (dict(grammar=ARITHMETIC), by_lark(ARITHMETIC)),
    (dict(grammar=LISTS), is_list),
    (dict(grammar="list = 'a', {',', 'a'}; "), whole("a(,a)*")),
    (dict(grammar='start: one+\none: x "a" "b" | y "a" "c"\nx: "d"\ny: "d"'), whole("(da[bc])+")),
    (dict(json=SCHEMA), by_schema),
    (dict(json=json.dumps(SCHEMA)), by_schema),
]


def folder_with_tokenizer(folder):
    "A model's folder without weights: a small Llama with SmolLM2's tokenizer."
    path = Path(folder)
    (path / "config.json").write_text(json.dumps({**MODEL, "vocab_size": VOCAB}))
    (path / "tokenizer.json").write_bytes(gzip.decompress(find("smollm2").read_bytes()))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}))


def config(folder, backend="xgrammar", drafts=0, seqs=64):
    "vLLM's own configuration."
    guess = dict(speculative_config=SpeculativeConfig(method="ngram", num_speculative_tokens=drafts, prompt_lookup_max=3, prompt_lookup_min=1)) if drafts else {}
    cache = CacheConfig(block_size=16)
    made = VllmConfig(model_config=ModelConfig(model=str(folder), dtype="float32", max_model_len=1024), cache_config=cache, device_config=DeviceConfig("cpu"),
                      scheduler_config=SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=2048, max_model_len=1024, is_encoder_decoder=False, async_scheduling=False),
                      structured_outputs_config=StructuredOutputsConfig(backend=backend), **guess)
    cache.num_gpu_blocks = 4000
    return made


def plug_in(folder):
    "The entry point as pyproject.toml declares it, found and called by vLLM's loader; the interface; and what a wrong variable does."
    for name, methods in INTERFACE.items():
        host = getattr(backend_types, name)
        ensure({m: tuple(signature(getattr(host, m)).parameters)[1:] for m in host.__abstractmethods__} == methods, "recorded interface", host=name)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    info = Path(folder) / "site" / "modeltc_declared-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modeltc-declared\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\n" + "".join(f"{k} = {v}\n" for k, v in declared.items()))
    sys.path.append(str(info.parent))
    def load():
        vllm.plugins.plugins_loaded = False
        vllm.plugins.load_general_plugins()
    os.environ.pop(VARIABLE, None)
    load()
    ensure(structured_output.XgrammarBackend is XgrammarBackend, "without the variable nothing is done")
    os.environ[VARIABLE] = "guidance"
    ensure("xgrammar or outlines" in (complaint(load) or ""), "a wrong variable stops the server")
    for name in ("xgrammar", "outlines"):
        os.environ[VARIABLE] = name
        load()
        made = config(folder, name)
        manager = StructuredOutputManager(made)
        manager.grammar_init(request("0", made, manager, dict(regex="a")))
        ensure(type(manager.backend) is backend_class() and isinstance(manager.backend, backend_types.StructuredOutputBackend) and manager.backend_name == name, "the manager makes our backend", name=name)
        manager.clear_backend()
    made, manager = config(folder, "auto"), StructuredOutputManager(config(folder, "auto"))
    manager.grammar_init(request("0", made, manager, dict(regex="a")))
    ensure(type(manager.backend) is backend_class(), "vLLM's default, auto, comes to us as well")
    manager.clear_backend()


def request(name, made, manager, wish, most=150, stops=(), prompt=(1, 2, 3)):
    "A request as vLLM's front end makes it: parameters completed and checked by vLLM. An empty wish is a free one."
    params = SamplingParams(max_tokens=most, stop_token_ids=list(stops), structured_outputs=StructuredOutputsParams(**wish) if wish else None)
    params.update_from_generation_config({"eos_token_id": sorted(ENDS)}, EOS)
    params.verify(made.model_config, made.speculative_config, made.structured_outputs_config, manager.tokenizer)
    return Request(request_id=name, prompt_token_ids=list(prompt), sampling_params=params, pooling_params=None, arrival_time=float(len(name)))


class Model:
    "Random logits that like to come to an end: quotes, brackets and end tokens are likely, and letters less than digits."

    def __init__(self, tokenizer, seed):
        self.rng, self.bias = torch.Generator().manual_seed(seed), torch.zeros(VOCAB)
        for text, value in {**dict.fromkeys('"}]),:', 11.0), **dict.fromkeys("0123456789", 4.0)}.items():
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) == 1: self.bias[ids[0]] = value
        self.bias[list(ENDS)] = 12.0

    def logits(self, rows, dtype=torch.float32): return (self.bias + torch.randn((rows, VOCAB), generator=self.rng)).to(dtype)

    def draw(self, logits): return torch.multinomial(torch.softmax(logits.float(), -1), 1, generator=self.rng)[:, 0].tolist()

    def chance(self, p): return float(torch.rand((), generator=self.rng)) < p


def ready(r):
    "Wait for the compiling thread."
    while not r.structured_output_request.is_grammar_ready: pass
    return r.structured_output_request.grammar


def masked(manager, requests, drafts, logits):
    "vLLM's masks of some requests, applied to logits by vLLM."
    ids = list(requests)
    scheduled = SimpleNamespace(scheduled_spec_decode_tokens=drafts)
    mask = manager.grammar_bitmask(requests, ids, drafts)
    apply_grammar_bitmask(scheduled, GrammarOutput(ids, mask), SimpleNamespace(req_ids=ids), logits)
    return logits


def every_kind(folder, seeds, counts):
    "Each kind of request through checks, threads, masks and logits of vLLM; the text is judged by others."
    made = config(folder)
    for seed in seeds:
        manager = StructuredOutputManager(made)
        model, done = Model(manager.tokenizer, seed), 0
        for k, (wish, judge) in enumerate(WISHES):
            r = request(str(k), made, manager, wish)
            manager.grammar_init(r)
            grammar = ready(r)
            if isinstance(grammar, Exception):
                ensure(False, "compiles", wish=wish, error=str(grammar)[:200])
                continue
            tokens = []
            while not grammar.is_terminated() and len(tokens) < 150:
                logits = masked(manager, {r.request_id: r}, {}, model.logits(1, torch.bfloat16 if seed % 2 else torch.float32))
                kept = torch.isfinite(logits[0]).nonzero()[:, 0]
                ensure(len(kept) > 0 and set(kept[torch.isin(kept, torch.tensor(sorted(ENDS)))].tolist()) in (set(), ENDS), "end tokens come together")
                tokens += model.draw(logits)
                ensure(manager.accept_tokens(r, tokens[-1:]), "a token of the mask is read", wish=wish)
                counts["tokens read"] += 1
            ensure(manager.accept_tokens(r, [11]) or not grammar.is_terminated(), "what follows the end is ignored")
            if not grammar.is_terminated(): continue
            done += 1
            text = manager.tokenizer.decode(tokens, skip_special_tokens=True)
            ensure(judge(text), "in the language", wish=str(wish)[:60], text=text[:200])
        ensure(done >= len(WISHES) - 3, "most texts end", done=done)
        manager.clear_backend()
        ensure(manager.backend is None, "the backend is let go")


def stop_tokens(folder):
    "A user's stop token takes part in the end, and only there."
    made = config(folder)
    manager = StructuredOutputManager(made)
    dot, = manager.tokenizer.encode(".", add_special_tokens=False)
    r = request("0", made, manager, dict(regex="a+"), stops=[dot])
    manager.grammar_init(r)
    ready(r)
    bits = lambda: set(torch.isfinite(masked(manager, {"0": r}, {}, torch.zeros(1, VOCAB))[0]).nonzero()[:, 0].tolist())
    ensure(not bits() & {dot, *ENDS}, "no end before there is a text")
    manager.accept_tokens(r, manager.tokenizer.encode("a", add_special_tokens=False))
    ensure({dot, *ENDS} <= bits(), "each of them may end it")
    ensure(manager.accept_tokens(r, [dot]) and r.structured_output_request.grammar.is_terminated(), "the user's stop token ends it")
    r.structured_output_request.grammar.rollback(1)
    ensure({dot, *ENDS} <= bits() and not r.structured_output_request.grammar.is_terminated(), "and can be taken back")
    manager.clear_backend()


def against_xgrammar(folder, seeds, counts):
    "The same expressions in vLLM's own xgrammar backend: masks bit by bit along random texts."
    made = config(folder)
    tokenizer = StructuredOutputManager(made).tokenizer
    ours, theirs = backend_class()(made, tokenizer, VOCAB), XgrammarBackend(made, tokenizer, VOCAB)
    both = ours.allocate_token_bitmask(2), theirs.allocate_token_bitmask(2)
    ensure(both[0].shape == both[1].shape and both[0].dtype == both[1].dtype and both[0].stride() == both[1].stride(), "masks are laid out alike")
    cases = [("REGEX", r"[A-Z]{2}-[0-9]{3,5}"), ("REGEX", "(caf\u00e9|\u65e5\u672c)+"), ("REGEX", r"[^\n.]{0,20}\."), ("CHOICE", json.dumps(["tea", "coffee", "tea with milk"])), ("GRAMMAR", LISTS),
             ("GRAMMAR", 'root ::= expr\nexpr ::= term (("+" | "-") term)*\nterm ::= [0-9]+ | "(" expr ")"\n')]
    for seed in seeds:
        model = Model(tokenizer, seed)
        for kind, spec in cases:
            pair = [b.compile_grammar(StructuredOutputOptions[kind], spec, stop_token_ids=set(ENDS)) for b in (ours, theirs)]
            for _ in range(30):
                for g, bits in zip(pair, both): g.fill_bitmask(bits, 1)
                counts["masks compared"] += 1
                for token in np.flatnonzero(np.unpackbits((both[0][1] ^ both[1][1]).numpy().view(np.uint8), bitorder="little")).tolist():
                    text = tokenizer.decode([token])                   # where they differ: does xgrammar itself read its characters, one by one?
                    parts = [tokenizer.encode(c, add_special_tokens=False) for c in text]
                    reads = all(len(x) == 1 for x in parts) and len(pair[1].validate_tokens(sum(parts, []))) == len(parts)
                    ensure(reads == bool(both[0][1, token >> 5] >> (token & 31) & 1), "what xgrammar reads in pieces", spec=spec[:40], text=text)
                    counts["tokens that differ"] += 1
                counts["masks that differ"] += not torch.equal(both[0][1], both[1][1])
                logits = model.logits(1)
                logits[0, np.unpackbits(both[0][1].numpy().view(np.uint8), bitorder="little")[:VOCAB] == 0] = -torch.inf
                token = model.draw(logits)
                ensure(all(g.accept_tokens("r", token) for g in pair), "both read the token")
                ensure(len({g.is_terminated() for g in pair}) == 1, "both end")
                if pair[0].is_terminated(): break


def drafts(folder, seeds, counts):
    "Drafts, some of them wrong, cut by the manager as a walk of single tokens says; masks along drafts; nothing stays behind."
    made = config(folder, drafts=4)
    for seed in seeds:
        manager, rng = StructuredOutputManager(made), np.random.default_rng(seed)
        model = Model(manager.tokenizer, seed)
        for wish in (WISHES[0][0], WISHES[2][0], WISHES[4][0], WISHES[5][0], WISHES[7][0]):
            r, twin = (request(n, made, manager, wish) for n in ("a", "b"))
            for x in (r, twin): manager.grammar_init(x)
            g, h = ready(r), ready(twin)
            for _ in range(12):
                if g.is_terminated(): break
                guess, rows, read = [], [], 0
                while len(guess) < 4 and not h.is_terminated():      # what the twin, one token at a time, allows
                    logits = masked(manager, {"b": twin}, {}, model.logits(1))
                    rows.append(torch.isfinite(logits[0]))
                    guess += model.draw(logits if rng.random() < 0.85 else model.logits(1))
                    ensure(h.accept_tokens("b", guess[-1:]) == bool(rows[-1][guess[-1]]), "the mask says what is read", token=guess[-1])
                    if not rows[-1][guess[-1]]: break
                    read += 1
                if h.is_terminated(): guess += model.draw(model.logits(4 - len(guess))) if len(guess) < 4 else []
                if not h.is_terminated(): rows.append(torch.isfinite(masked(manager, {"b": twin}, {}, model.logits(1))[0]))
                if read: h.rollback(read)
                guess += [-1] * (4 - len(guess))
                kept = manager.validate_tokens(r, list(guess))
                ensure(kept == guess[:read], "valid drafts", guess=guess, kept=kept, read=read)
                padded = kept + [-1] * (4 - len(kept))
                got = torch.isfinite(masked(manager, {"a": r}, {"a": padded}, torch.zeros(5, VOCAB)))
                for i in range(min(len(kept) + 1, len(rows))): ensure(torch.equal(got[i], rows[i]), "mask along drafts", i=i, kept=kept)
                again = [torch.isfinite(masked(manager, {n: x}, {}, torch.zeros(1, VOCAB))) for n, x in (("a", r), ("b", twin))]
                ensure(torch.equal(*again), "drafts leave no trace")
                take = kept[:1 + int(rng.integers(4))] or model.draw(masked(manager, {"b": twin}, {}, model.logits(1)))
                ensure(manager.accept_tokens(r, list(take)) and manager.accept_tokens(twin, list(take)), "accepted drafts are read")
                counts["tokens read"] += 2 * len(take)
                if rng.random() < 0.3:
                    g.rollback(len(take))
                    h.rollback(len(take))
                    ensure(not g.is_terminated(), "the end is taken back too")
        manager.clear_backend()


def many_at_once(folder, counts):
    "More requests than vLLM fills in one thread, while others are compiled."
    made = config(folder, seqs=256)
    manager = StructuredOutputManager(made)
    model = Model(manager.tokenizer, 0)
    requests = {str(i): request(str(i), made, manager, WISHES[i % 6][0] if i % 4 else dict(regex=f"[a-f]{{2}}{i}")) for i in range(200)}
    for r in requests.values(): manager.grammar_init(r)
    for r in requests.values(): ready(r)
    for step in range(6):
        live = {n: r for n, r in requests.items() if not r.structured_output_request.grammar.is_terminated()}
        late = [request(f"late {step} {i}", made, manager, dict(regex=f"x{step}[0-9a-f]{{{i + 1}}}(?:yz)*")) for i in range(4)]
        for r in late: manager.grammar_init(r)
        logits = masked(manager, live, {}, model.logits(len(live)))
        one = torch.zeros((1, (VOCAB + 31) // 32), dtype=torch.int32)
        for k, (n, r) in enumerate(live.items()):
            r.structured_output_request.grammar.fill_bitmask(one, 0)
            allowed = np.unpackbits(one[0].numpy().view(np.uint8), bitorder="little")[:VOCAB] != 0
            ensure(bool((torch.isfinite(logits[k]).numpy() == allowed).all()), "as alone", request=n)
            ensure(manager.accept_tokens(r, model.draw(logits[k:k + 1])), "read")
            counts["tokens read"] += 1
        for r in late: ensure(not isinstance(ready(r), Exception), "compiled meanwhile")
    manager.clear_backend()


def serve(folder, seed, ahead, counts):
    "vLLM's scheduler with constrained and free requests, and one whose grammar cannot be made."
    made = config(folder, drafts=ahead)
    manager = StructuredOutputManager(made)
    s = Scheduler(vllm_config=made, kv_cache_config=cache_of(4000), structured_output_manager=manager, block_size=16, log_stats=False)
    model, wishes = Model(manager.tokenizer, seed), [*WISHES, (None, None)]
    requests = {str(i): request(str(i), made, manager, wishes[i % len(wishes)][0], prompt=(1, 2, 3 + i)) for i in range(22)}
    broken = request("broken", made, manager, dict(regex="ok"))
    broken.structured_output_request.params.regex = "(?=a)b"          # as if it had passed a check that knows less
    everybody = {**requests, "broken": broken}
    for r in everybody.values():
        if r.structured_output_request: manager.grammar_init(r)
        s.add_request(r)
    for r in everybody.values():
        if r.structured_output_request: ready(r)
    errors, steps = {}, 0
    while s.has_unfinished_requests() and steps < 1000:
        out = s.schedule()
        steps += 1
        guesses, ids = out.scheduled_spec_decode_tokens, list(out.num_scheduled_tokens)
        grammar = s.get_grammar_bitmask(out)
        rows = [1 + len(guesses.get(n, ())) for n in ids]
        logits = model.logits(sum(rows))
        if grammar is not None: apply_grammar_bitmask(out, grammar, SimpleNamespace(req_ids=ids), logits)
        tokens, at = [], 0
        for n, k in zip(ids, rows):
            took = []
            for i, guess in enumerate([*guesses.get(n, ()), None]):
                likes = guess is not None and guess >= 0 and torch.isfinite(logits[at + i, guess]) and model.chance(0.7)
                took.append(guess if likes else model.draw(logits[at + i:at + i + 1])[0])
                if not likes: break
            tokens.append(took)
            at += k
            counts["tokens read"] += len(took) * bool(s.requests[n].use_structured_output)
        for answers in s.update_from_output(out, ModelRunnerOutput(req_ids=ids, req_id_to_index={n: i for i, n in enumerate(ids)}, sampled_token_ids=tokens)).values():
            for o in answers.outputs: errors[o.request_id] = str(o.finish_reason)
        if ahead:
            left = [n for n in ids if n in s.requests]
            s.update_draft_token_ids(DraftTokenIds(left, [draft(model, s.requests[n], ahead) for n in left]))
    ensure(not s.has_unfinished_requests(), "everybody was served", steps=steps)
    ensure(broken.is_finished() and not broken.num_output_tokens, "a grammar that cannot be made ends its request, and no other", status=str(broken.status))
    for i, r in enumerate(requests.values()):
        judge, tokens = wishes[i % len(wishes)][1], list(r.output_token_ids)
        ensure(r.status.name in ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED"), "ended well", request=i, status=str(r.status))
        if judge and r.status.name == "FINISHED_STOPPED": ensure(judge(text := manager.tokenizer.decode(tokens, skip_special_tokens=True)), "in the language", request=i, text=text[:200])
    counts["requests served"] += len(everybody)
    manager.clear_backend()


def draft(model, r, ahead):
    "Guesses of a drafter: half of the time what a grammar allows, else anything."
    g = r.structured_output_request.grammar if r.structured_output_request else None
    if g is None or g.is_terminated(): return model.draw(model.logits(ahead))
    bits, out = torch.zeros((1, (VOCAB + 31) // 32), dtype=torch.int32), []
    while len(out) < ahead and not g.is_terminated():
        g.fill_bitmask(bits, 0)
        logits = model.logits(1)
        logits[0, np.unpackbits(bits[0].numpy().view(np.uint8), bitorder="little")[:VOCAB] == 0] = -torch.inf
        out += model.draw(logits)
        g.accept_tokens("draft", out[-1:])
    g.rollback(len(out))
    return [t if model.chance(0.8) else model.draw(model.logits(1))[0] for t in out]


def refusals(folder):
    "What vLLM tells a user at once."
    made = config(folder)
    manager = StructuredOutputManager(made)
    for wish, words in ((dict(regex="(?=a)b"), "structured_outputs.regex"), (dict(grammar='start: "a" missing'), "missing"), (dict(grammar='root ::= "a'), "structured_outputs.grammar"),
                        (dict(structural_tag="{}"), "this backend reads"), (dict(regex="a", whitespace_pattern=" "), "single request"), (dict(json="{"), "structured_outputs.json")):
        try: said = request("0", made, manager, wish) and None
        except VLLMValidationError as e: said = str(e)
        ensure(said is not None and words in said, "refused with a reason", wish=wish, said=said)


def main(quick):
    started, seeds, counts = perf_counter(), range(2 if quick else 6), dict.fromkeys(("masks compared", "masks that differ", "tokens that differ", "requests served", "tokens read"), 0)
    vllm_backend.log.setLevel("CRITICAL")
    with tempfile.TemporaryDirectory() as folder:
        folder_with_tokenizer(folder)
        plug_in(folder)
        every_kind(folder, seeds, counts)
        stop_tokens(folder)
        against_xgrammar(folder, seeds, counts)
        drafts(folder, seeds, counts)
        many_at_once(folder, counts)
        for seed in seeds: serve(folder, seed, 3 * (seed % 2), counts)
        refusals(folder)
    print(f"vllm {metadata.version('vllm')}: {TALLY['checks']} checks, {TALLY['failed']} failed; {counts}; {perf_counter() - started:.0f} s")
    if TALLY["failed"]: return 1
    if not quick:
        common = dict(implementation="modeltc_lab in vLLM", seed=list(seeds), wall_s=perf_counter() - started, config={"tokenizer": "smollm2", "kinds": len(WISHES), "drafts": "3 and 4"})
        made = [record("decoding", "vllm_backend", "tests/peers/check_vllm_structured.py", metric, unit, [value], **common)
                for metric, unit, value in (("checks", "checks", TALLY["checks"]), *((k, k.split()[0], v) for k, v in counts.items()))]
        versions = {name: metadata.version(name) for name in ("vllm", "xgrammar")}
        print(write([r.model_copy(update={"versions": {**r.versions, **versions}}) for r in made]))
    return 0


if __name__ == "__main__": sys.exit(main("--quick" in sys.argv[1:]))
