import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.balance.cost import (
    DEFAULT_COST,
    HARDWARE,
    MODELS,
    CostModel,
    GroupSpec,
    Hardware,
    ModelShape,
    check_groups,
    fit_cost,
    hardware_of,
    model_shape,
    relative_errors,
)
from modeltc_lab.balance.packing import PackPlan

LLAMA = MODELS["llama3.1-8b"]


def configs():
    "Small configurations of three families, as transformers makes them."
    import transformers as tf
    return {"llama": tf.LlamaConfig(hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, vocab_size=130),
            "qwen2": tf.Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=100, tie_word_embeddings=True),
            "wide heads": tf.LlamaConfig(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=24, vocab_size=64),
            "deepseek-v2": tf.DeepseekV2Config(hidden_size=64, intermediate_size=96, moe_intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, vocab_size=90, q_lora_rank=20, kv_lora_rank=12,
                                               qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1)}


@pytest.mark.parametrize("name", ["llama", "qwen2", "wide heads", "deepseek-v2"])
def test_weights_are_those_of_transformers(name):
    "All matrices of a model built from the configuration, biases and norms left out."
    import torch
    from transformers import AutoModelForCausalLM
    config = configs()[name]
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(config)
    assert ModelShape.from_config(config).weights == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values() if p.dim() > 1)


@pytest.mark.parametrize("name", ["llama", "qwen2", "wide heads"])
def test_operations_are_those_torch_counts(name):
    "Forward and backward on meta tensors; torch counts attention without its mask, which is twice the causal half."
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM
    config, s = configs()[name], 40
    config._attn_implementation = "eager"
    shape = ModelShape.from_config(config)
    with torch.device("meta"):
        model, mask = AutoModelForCausalLM.from_config(config), torch.zeros(1, 1, s, s)
        with FlopCounterMode(display=False) as forward: logits = model(input_ids=torch.zeros(1, s, dtype=torch.long), attention_mask=mask, use_cache=False).logits
        with FlopCounterMode(display=False) as backward: logits.sum().backward()
    full = replace(shape, causal=False)
    assert forward.get_total_flops() == full.forward_flops(s, s * s) == shape.forward_flops(s, 2 * s * s)
    weights = 2 * (shape.layer_weights + shape.hidden * shape.vocab) * s
    assert backward.get_total_flops() == 2 * full.forward_flops(s, s * s)  # eager attention keeps its matrix: twice the forward; a kernel that recomputes it takes 2.5 times
    assert full.train_flops(s, s * s) == pytest.approx(3 * weights + 3.5 * full.square_flops * s * s)


def test_published_operations_of_a_layer():
    "The paper's appendix D: 24 B s h^2 + 4 B h sum s^2 a layer, for full attention and 12 h^2 weights."
    h, s = 64, 100
    shape = ModelShape("gpt", 1, h, 4, 4, 4 * h, 0, gated=False, causal=False)
    assert shape.forward_flops(s, s * s) == 24 * s * h * h + 4 * h * s * s
    assert replace(shape, causal=True).square_flops == 2 * h  # causal kernels do half


@pytest.mark.parametrize(("heads", "kv", "sp", "node"), [(8, 8, 2, 8), (8, 2, 2, 8), (8, 2, 8, 8), (8, 2, 8, 4), (16, 4, 16, 8), (6, 3, 3, 8)])
def test_exchange_is_what_ranks_send(heads, kv, sp, node):
    "Every (token, head) of Q, K, V that a rank needs and another holds, and the way back of the output, counted one by one."
    shape, tokens = ModelShape("x", 3, 8 * heads, heads, kv, 16, 10), 4 * sp
    holder = np.arange(tokens) // (tokens // sp)
    inside, outside = np.zeros(sp), np.zeros(sp)  # elements a rank receives
    for rank in range(sp):
        mine = list(range(rank * heads // sp, (rank + 1) * heads // sp))
        for wanted in (mine, sorted({h * kv // heads for h in mine}), sorted({h * kv // heads for h in mine})):  # Q, K, V
            for h in wanted:
                for t in range(tokens):
                    if holder[t] != rank: (inside if holder[t] // node == rank // node else outside)[rank] += shape.head_dim
        for h in range(heads):  # the output comes back: all heads of own tokens
            maker = h * sp // heads
            if maker != rank: (inside if maker // node == rank // node else outside)[rank] += tokens // sp * shape.head_dim
    link, network = 3e9, 7e8
    cost = CostModel(token_s=1e-9, layers=3, exchange_bytes=shape.exchange_bytes(), link_bytes_s=link, network_bytes_s=network, ranks_per_node=node, kv_share=kv / (heads + kv), kv_heads=kv)
    each = 3 * 2 * 2 * np.maximum(inside / link, outside / network)  # layers, bytes, forward and backward
    assert np.ptp(each) < 1e-15 and float(cost.exchange_seconds(tokens, sp)) == pytest.approx(each[0], rel=1e-12)
    assert float(cost.exchange_seconds(tokens, sp, 3)) == pytest.approx(1.5 * each[0])  # every layer's forward exchange once more


shapes = st.builds(lambda a, b, c, d, e: CostModel(a, b, c, d, e, layers=8, exchange_bytes=100.0, exchange_s=.01, link_bytes_s=1e6), *[st.floats(1e-9, 1.0) for _ in range(5)])


@given(shapes, st.lists(st.integers(1, 50), min_size=1, max_size=6), st.sampled_from([1, 2, 4]), st.integers(0, 8), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_more_work_never_costs_less(cost, docs, sp, gc, tiles):
    t, s, n = sum(docs), sum(d * d for d in docs), len(docs)
    base = float(cost.seconds(t, s, n, sp, gc, tiles))
    assert base >= cost.step_s and base == pytest.approx(sum(float(v) for v in cost.explain(t, s, n, sp, gc, tiles).values()))
    for more in ((t + 1, s, n, sp, gc, tiles), (t, s + 1, n, sp, gc, tiles), (t, s, n + 1, sp, gc, tiles), (t, s, n, sp, gc, tiles + 1), (t, s, n, sp, min(gc + 1, 8), tiles)): assert float(cost.seconds(*more)) >= base
    assert float(cost.seconds(t, s, n, 1, gc, tiles)) == pytest.approx(cost.token_s * t + cost.tile_s * tiles + cost.square_s * s + gc / 8 / 3 * (cost.token_s * t + cost.tile_s * tiles + cost.square_s * s) + cost.doc_s * n + cost.step_s)


def test_seconds_of_a_plan():
    "Pack by pack as from its documents."
    lengths = np.random.default_rng(0).integers(1, 500, 200)
    plan = PackPlan.from_assignment(np.random.default_rng(1).permutation(200) // 4, lengths[:, None], (2000,))
    for group in (None, GroupSpec(2000, 4, 5)):
        g = group or GroupSpec(2000)
        each = [float(DEFAULT_COST.seconds(lengths[ids].sum(), (lengths[ids] ** 2).sum(), len(ids), g.sp, g.gc_layers)) for ids in (plan.pack(i) for i in range(plan.packs))]
        assert DEFAULT_COST.of(plan, group) == pytest.approx(each)
    sizes = np.array([[2, 10], [1, 20], [3, 5]])
    vlm = PackPlan.from_assignment(np.array([0, 0, 1]), sizes, (4, 40))
    cost = CostModel(1.0, tile_s=100.0)
    assert cost.of(vlm).tolist() == [330.0, 305.0]


def test_a_vision_tower_costs_by_tiles():
    cost = CostModel.analytic("internlm2-20b", "a100", vision="internvit-6b")
    vit = MODELS["internvit-6b"]
    h = HARDWARE["a100"]
    assert cost.tile_s == pytest.approx(float(6 * vit.layer_weights * 1025 / (h.flops * h.matmul_efficiency) + 3.5 * vit.square_flops * 1025**2 / (h.flops * h.attention_efficiency)), rel=1e-2)
    assert vit.square_flops == 4 * 3200 * 45  # no mask: twice a causal kernel's
    assert CostModel.analytic("internlm2-20b", "a100").tile_s == 0


def steps(truth, n, seed, noise=0.0, sp=(1,), gc=(0,)):
    "Steps of random packs, measured under a known model."
    rng, out = np.random.default_rng(seed), []
    for _ in range(n):
        docs = rng.integers(1, 1 + int(rng.choice([30, 300, 3000])), rng.integers(1, 30)).astype(float)
        step = {"tokens": docs.sum(), "squares": (docs**2).sum(), "docs": float(len(docs)), "sp": int(rng.choice(sp)), "gc_layers": int(rng.choice(gc)), "tiles": int(rng.integers(0, 4)) if truth.tile_s else 0}
        out.append(step | {"seconds": float(truth.seconds(*step.values())) * float(np.exp(noise * rng.standard_normal()))})
    return out


@given(st.lists(st.floats(.1, 10), min_size=5, max_size=5), st.booleans(), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_a_fit_finds_the_prices(scale, tiles, seed):
    "Without noise every price comes back, whatever their sizes."
    truth = CostModel(1e-5 * scale[0], 1e-9 * scale[1], 1e-4 * scale[2], 1e-2 * scale[3], 1e-3 * scale[4] * tiles, layers=4, exchange_bytes=1e4, link_bytes_s=1e9, exchange_s=2e-3)
    found = CostModel.fit(steps(truth, 120, seed, sp=(1, 2, 4), gc=(0, 1, 4)), base=truth)
    for name in ("token_s", "square_s", "doc_s", "step_s", "tile_s", "exchange_s", "link_bytes_s"): assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-4), name
    assert found.error < 1e-6 and found.layers == 4 and "held out" in found.source


def test_noise_is_reported_and_too_much_refused():
    truth = CostModel(1e-5, 1e-9, 1e-4, 1e-2)
    errors = [CostModel.fit(steps(truth, 200, 1, noise), 1.0).error for noise in (.02, .1, .3)]
    assert errors[0] < errors[1] < errors[2] and .01 < errors[0] < .03 and .04 < errors[1] < .12
    with pytest.raises(ValueError, match=r"median relative error \d+.\d% on 50 held-out steps, above maximum_error=15%"): CostModel.fit(steps(truth, 200, 1, .6))
    assert CostModel.fit(steps(truth, 200, 1, .6), maximum_error=1).error > .15


def test_a_wrong_form_is_refused():
    "Time that depends on something the model does not know: the held-out error says so."
    rows = steps(CostModel(1e-5), 100, 3)
    for i, r in enumerate(rows): r["seconds"] = .001 * (1 + i % 17) ** 2
    with pytest.raises(ValueError, match="held-out steps, above"): fit_cost(rows)
    for r in rows: r["seconds"] = .1
    with pytest.raises(ValueError, match="do not grow with tokens, squares or tiles"): fit_cost(rows)


def test_prices_that_cannot_be_told_apart():
    truth = CostModel(1e-5, 1e-9, 0, 1e-2)
    full = [{"tokens": 1000.0, "squares": float(s), "docs": 1.0} for s in range(1000, 50_000, 1000)]
    rows = [r | {"seconds": float(truth.seconds(r["tokens"], r["squares"], r["docs"]))} for r in full]
    with pytest.raises(ValueError, match="cannot be told apart"): fit_cost(rows)       # one document and 1000 tokens everywhere
    rows = [r | {"docs": float(1 + i % 7)} for i, r in enumerate(rows)]
    found = fit_cost(rows)
    assert found.step_s == 0 and found.token_s * 1000 == pytest.approx(1e-5 * 1000 + 1e-2)  # equal tokens: the step's price is in theirs


def test_errors_of_a_model_are_relative():
    truth = CostModel(1e-5, 1e-9)
    rows = steps(truth, 5, 0)
    assert relative_errors(replace(truth, token_s=2e-5, square_s=2e-9), rows) == pytest.approx(np.ones(5))


def test_file_round_trip(tmp_path):
    for model in (DEFAULT_COST, CostModel(1.0), fit_cost(steps(CostModel(1e-5, 1e-9, 1e-4, 1e-2), 60, 0), source="a test")):
        model.save(tmp_path / "cost.json")
        assert CostModel.load(tmp_path / "cost.json") == model
        assert "Infinity" not in (tmp_path / "cost.json").read_text()
    assert json.loads((tmp_path / "cost.json").read_text())["error"] < 1e-6
    (tmp_path / "other.json").write_text('{"token": 1}')
    with pytest.raises(ValueError, match="not a cost model"): CostModel.load(tmp_path / "other.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"): CostModel.load(tmp_path / "broken.json")


@pytest.mark.parametrize(("call", "message"), [
    (lambda: GroupSpec(-1), "length=-1: need a whole number of 1 or more"), (lambda: GroupSpec(8, 0), "sp=0"), (lambda: GroupSpec(8, 1, -1), "gc_layers=-1"), (lambda: GroupSpec(8.5), "length=8.5"), (lambda: GroupSpec(True), "length=True"),
    (lambda: check_groups([]), "need at least one group"), (lambda: check_groups([8, 8]), "length 8 occurs twice"), (lambda: check_groups([GroupSpec(8, 4)], world=2), "world=2: sp=4 .* more ranks share a pack than there are"),
    (lambda: check_groups([GroupSpec(8, 4)], world=6), "world=6: sp=4 .* does not divide it"), (lambda: check_groups([GroupSpec(8, 4)], world=8, heads=6), "heads=6: sp=4"),
    (lambda: model_shape("gpt-5"), "model='gpt-5': known are"), (lambda: hardware_of("tpu"), "hardware='tpu': known are"), (lambda: Hardware("x", -1.0), "flops=-1.0"), (lambda: Hardware("x", 1.0, link_efficiency=0.0), "link_efficiency=0.0"),
    (lambda: ModelShape("x", 1, 8, 3, 2, 8, 8), "kv_heads=2: need a divisor of heads=3"), (lambda: ModelShape("x", 0, 8, 1, 1, 8, 8), "layers=0"), (lambda: ModelShape("x", 1, 8, 1, 1, 8, 8, experts=2, active_experts=3), "active_experts=3: need at most"),
    (lambda: ModelShape.from_config(object()), "num_hidden_layers.*get_text_config"), (lambda: CostModel(0.0), "nothing costs anything"), (lambda: CostModel(1.0, square_s=math.nan), "square_s=nan"), (lambda: CostModel(1.0, forward_share=2), "forward_share=2"),
    (lambda: DEFAULT_COST.seconds(1, 1, 1, 0), "sp=0"), (lambda: DEFAULT_COST.seconds(1, 1, gc_layers=40), "gc_layers=40: the model has 32 layers"),
    (lambda: fit_cost([]), r"records=\[\]"), (lambda: fit_cost([{"tokens": 1}]), r"records\[0\]: no squares, docs, seconds"), (lambda: fit_cost(steps(CostModel(1e-5), 3, 0)), "3 steps for"),
    (lambda: fit_cost([{"tokens": -1, "squares": 1, "docs": 1, "seconds": 1}]), r"records\[0\]: tokens=-1"), (lambda: fit_cost([{"tokens": 1, "squares": 1, "docs": 1, "seconds": 0}]), r"seconds=0; need a finite number, above 0"),
    (lambda: fit_cost(steps(CostModel(1e-5), 60, 0), holdout=1.5), "holdout=1.5"), (lambda: fit_cost(steps(CostModel(1e-5, layers=9), 60, 0, gc=(0, 9))), "gc_layers=9 but the model has layers=1"),
    (lambda: fit_cost(steps(CostModel(1e-5), 60, 0, sp=(2,))), "some have sp > 1")])
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_groups_come_out_sorted():
    assert check_groups((131072, GroupSpec(16384, 2))) == (GroupSpec(16384, 2), GroupSpec(131072))
    assert asdict(GroupSpec(np.int64(8))) == {"length": 8, "sp": 1, "gc_layers": 0}
