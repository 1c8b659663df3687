"""Documents, token data on disk, packing, batches, the standard library as text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from hypothesis import given
from hypothesis import strategies as st

from xlstm_distill import sources
from xlstm_distill.cleaning import Collection, split_held_out
from xlstm_distill.data import Batches, Rows, TokenData
from xlstm_distill.errors import UserError
from xlstm_distill.sources import Document
from xlstm_distill.texts import Malformed


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_run.tokenizer()


def documents(*lengths: int) -> list[list[int]]:
    """Documents whose ids are all different: a row can be traced back to where it came from."""
    count = iter(range(sum(lengths)))
    return [[next(count) for _ in range(n)] for n in lengths]


# ---- files --------------------------------------------------------------------------------------


def test_text_file_is_one_document_with_an_end(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("hi <|im_end|>")
    (found,) = sources.read_files([tmp_path / "a.txt"], tokenizer)
    assert found.ids[-1] == 0  # <|endoftext|>
    assert 2 not in found.ids  # written control tokens are mere text
    assert tokenizer.decode(found.ids[:-1]) == "hi <|im_end|>"


def test_jsonl_fields(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [
        {"text": "plain"},
        {"prompt": "2+2=", "completion": "4"},
        {"messages": chat},
        {"prompt": chat[:1], "completion": chat[1:]},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    texts = {d.name: tokenizer.decode(d.ids[:-1]) for d in sources.read_files([file], tokenizer)}
    rendered = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert texts == {
        "a.jsonl:1": "plain",
        "a.jsonl:2": "2+2=4",
        "a.jsonl:3": rendered,
        "a.jsonl:4": rendered,
    }
    (chat_document,) = [d for d in sources.read_files([file], tokenizer) if d.name == "a.jsonl:3"]
    assert list(chat_document.ids).count(1) == 2  # control tokens are tokens there


def test_directory_reads_all_kinds_in_name_order(tmp_path, tokenizer):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "a.md").write_text("a")
    (tmp_path / "c.jsonl").write_text('{"text": "c"}')
    (tmp_path / "d.bin").write_bytes(b"\x00")
    (tmp_path / "empty.py").write_text("")
    found = [d.name for d in sources.read_files([tmp_path], tokenizer)]
    assert found == ["b.txt", "c.jsonl:1", "sub/a.md"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "the file is empty"),
        ("a.txt", " \n", "the file is empty"),
        ("a.jsonl", "\n", "the file is empty"),
        ("a.jsonl", '{"text": "a"}\n{', ":2: not valid JSON"),
        ("a.jsonl", "[1]", ":1: a JSON object is expected"),
        ("a.jsonl", '{"txt": "a"}', "found: txt"),
        ("a.jsonl", '{"messages": []}', "messages must be a list that is not empty"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "messages[0]"),
        ("a.jsonl", '{"prompt": "a", "completion": [1]}', "two strings or two lists"),
        ("a.txt", b"\xff\xfe", "not UTF-8 text (byte 0)"),
        ("missing.txt", None, "no such file"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, tokenizer, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        list(sources.read_files([file], tokenizer))
    assert message in str(error.value) and name in str(error.value)
    assert "\n" not in str(error.value)


def test_directory_without_text(tmp_path, tokenizer):
    with pytest.raises(UserError, match="holds no"):
        list(sources.read_files([tmp_path], tokenizer))


# ---- the standard library -----------------------------------------------------------------------


def test_stdlib_skips_what_is_no_library(tmp_path, tokenizer):
    for name in ("a.py", "test/b.py", "json/c.py", "idlelib/d.py", "site-packages/e.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"x = {name!r}\n")
    (tmp_path / "json" / "latin.py").write_bytes(b"# caf\xe9\n")
    found = {d.name for d in sources.read_stdlib(tokenizer, tmp_path)}
    assert found == {"a.py", "json/c.py"}
    with pytest.raises(UserError, match="holds no Python sources"):
        list(sources.read_stdlib(tokenizer, tmp_path / "nothing"))


def test_own_stdlib_is_text_enough(tokenizer):
    some = list(sources.up_to(sources.read_stdlib(tokenizer), 200_000))
    assert sum(len(d.ids) for d in some) >= 200_000
    names = [d.name for d in some]
    assert names == sorted(names, key=sources.hash_order)
    assert not any("/test/" in f"/{name}" for name in names)


# ---- held-out text ------------------------------------------------------------------------------


def test_held_out_documents_are_apart_and_do_not_move():
    some = [Document(f"doc{n}", [n] * (5 + n % 7)) for n in range(60)]
    train, held = split_held_out(some, 100, "here")
    assert {d.name for d in train} | {d.name for d in held} == {d.name for d in some}
    assert not {d.name for d in train} & {d.name for d in held}
    assert sum(min(len(d.ids), 10) for d in held) >= 100
    # Another order of the collection, and more of it, leaves most of the choice where it was.
    _, again = split_held_out(some[::-1], 100, "here")
    assert [d.name for d in again] == [d.name for d in held]
    more = [*some, *(Document(f"new{n}", [1] * 9) for n in range(10))]
    _, wider = split_held_out(more, 100, "here")
    assert {d.name for d in wider} - {d.name for d in held} <= {f"new{n}" for n in range(10)}


def test_no_document_is_lost_where_two_have_one_name():
    some = [Document(f"train.jsonl:{n % 40}", [n] * 20) for n in range(80)]
    for tokens in range(100, 1500, 50):
        train, held = split_held_out(some, tokens, "here")
        assert sorted(d.ids[0] for d in (*train, *held)) == list(range(80))


def test_one_long_document_is_not_the_sample():
    some = [Document("long", [1] * 10_000), *(Document(f"s{n}", [1] * 20) for n in range(50))]
    _, held = split_held_out(some, 200, "here")
    assert len(held) >= 10


def test_what_is_evaluated_on_is_not_trained_on_under_another_name():
    """Repeats are left in where nobody asks for them to go; passages come from elsewhere."""
    some = [Document(f"doc{n}", [n] * 9) for n in range(30)]
    again = [Document(f"again{n}", [n] * 9) for n in range(30)]
    for hold_out in (True, False):
        found = Collection([Document("sampled", [1] * 9)], [*some, *again], Malformed())
        if hold_out:
            found.hold_out(45, "here")
        else:
            found.evaluate_on([Document("passage", [1] * 9)])
        held = {d.ids[0] for d in found.held_out}
        assert held and not held & {d.ids[0] for d in found.train}
        assert len(found.train) >= 61 - 2 * len(found.held_out) - 1


def test_too_little_text_to_hold_out():
    with pytest.raises(UserError, match="cannot give 100 held-out tokens"):
        split_held_out([Document("a", [1] * 50)], 100, "here")


# ---- token data ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_token_data_round_trip(tmp_path, vocab, dtype):
    data = TokenData.from_documents([[1, 2, vocab - 1], [], [5]], vocab, {"tokenizer": "abc"})
    data.save(tmp_path / "d")
    again = TokenData.open(tmp_path / "d")
    assert again.ids.dtype == dtype and isinstance(again.ids, np.memmap)
    assert [again.document(i).tolist() for i in range(again.documents)] == [[1, 2, vocab - 1], [5]]
    assert again.fingerprint == data.fingerprint
    assert again.manifest["tokenizer"] == "abc" and again.manifest["tokens"] == 4


def test_fingerprint_sees_ids_and_boundaries():
    def fingerprint(*docs):
        return TokenData.from_documents(docs, 10).fingerprint

    prints = {fingerprint([1, 2], [3]), fingerprint([1], [2, 3]), fingerprint([1, 2], [4])}
    assert len(prints) == 3


def test_bad_token_data(tmp_path):
    with pytest.raises(UserError, match=r"document 1 holds token id 10, outside 0\.\.9"):
        TokenData.from_documents([[1], [10]], 10)
    with pytest.raises(UserError, match="token id -1"):
        TokenData.from_documents([[-1]], 10)
    with pytest.raises(UserError, match="holds no text"):
        TokenData.from_documents([], 10)
    with pytest.raises(UserError, match="not token data"):
        TokenData.open(tmp_path)
    TokenData.from_documents([[1, 2, 3]], 10).save(tmp_path / "d")
    content = bytearray((tmp_path / "d" / "ids.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "d" / "ids.bin").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        TokenData.open(tmp_path / "d")


# ---- rows ---------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(2, 17),
    st.integers(0, 1000),
)
def test_rows_hold_every_token_once_with_its_label_and_start(lengths, length, seed):
    docs = documents(*lengths)
    follows = {a: b for d in docs for a, b in itertools.pairwise(d)}
    firsts = {d[0] for d in docs}
    data = TokenData.from_documents(docs, 1000)
    if data.tokens < length:
        with pytest.raises(UserError, match="fewer than one row"):
            Rows(data, length, seed)
        return
    rows = Rows(data, length, seed)
    seen: list[int] = []
    for i in range(len(rows)):
        ids, labels, reset = rows.row(i)
        assert ids.shape == labels.shape == reset.shape == (length,)
        for t, token in enumerate(ids.tolist()):
            assert labels[t] == follows.get(token, -1) or (
                # the very last token of the stream of documents knows its next one if there is one
                labels[t] == -1 and t == length - 1
            )
            assert reset[t] == (t == 0 or token in firsts)
        seen += ids.tolist()
    assert len(set(seen)) == len(seen) == len(rows) * length
    assert len(rows) == data.tokens // length


def test_last_position_of_a_row_has_its_label():
    rows = Rows(TokenData.from_documents(documents(30), 100), 10)
    labels = sorted(int(rows.row(i)[1][-1]) for i in range(3))
    assert labels == [-1, 10, 20]


def test_rows_depend_on_the_seed_alone():
    data = TokenData.from_documents(documents(*[9] * 40), 1000)
    one, same, other = Rows(data, 16, 5), Rows(data, 16, 5), Rows(data, 16, 6)
    assert all(np.array_equal(one.row(3)[i], same.row(3)[i]) for i in range(3))
    assert not np.array_equal(one.row(3)[0], other.row(3)[0])


# ---- batches ------------------------------------------------------------------------------------


def two_domains() -> dict[str, Rows]:
    a = TokenData.from_documents(documents(*[10] * 20), 1000)
    b = TokenData.from_documents(documents(*[7] * 10), 1000)
    return {"a": Rows(a, 8, 1), "b": Rows(b, 8, 1)}


def test_batches_follow_the_weights():
    batches = Batches(two_domains(), 4, {"a": 3, "b": 1})
    names = [name for _ in range(25) for name, _ in next(batches).rows]
    assert names.count("a") == 75 and names.count("b") == 25
    assert all(names[i : i + 4].count("b") == 1 for i in range(0, 100, 4))


def test_every_row_comes_once_an_epoch_in_another_order():
    rows = two_domains()["a"]
    batches = Batches({"a": rows}, 5)
    order = [row for _ in range(2 * len(rows) // 5) for _, row in next(batches).rows]
    first, second = order[: len(rows)], order[len(rows) :]
    assert first == list(range(len(rows)))
    assert sorted(second) == first and second != first


@given(st.integers(0, 30), st.integers(0, 30))
def test_cursor_continues_anywhere(before, after):
    one, other = (Batches(two_domains(), 3, {"a": 0.3, "b": 0.7}, seed=2) for _ in range(2))
    for _ in range(before):
        next(one)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(after):
        x, y = next(one), next(other)
        assert x.rows == y.rows
        assert np.array_equal(x.ids, y.ids)


def test_first_rows_are_those_that_are_drawn():
    batches = Batches(two_domains(), 3, {"a": 2, "b": 1})
    expected = batches.first_rows(7)
    drawn = [key for _ in range(7) for key in next(batches).rows]
    for name, count in expected.items():
        assert {row for own, row in drawn if own == name} == set(range(count))


def test_passes_are_counted_beyond_the_first():
    domains = two_domains()
    batches = Batches(domains, 3, {"a": 2, "b": 1})
    for steps in (1, 50):
        own = Batches(domains, 3, {"a": 2, "b": 1})
        drawn = [name for _ in range(steps) for name, _ in next(own).rows]
        expected = {name: drawn.count(name) / len(rows) for name, rows in domains.items()}
        assert batches.passes(steps) == expected
    assert expected["b"] > 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"c": 1}, "no domain 'c'"),
        ({"a": -1, "b": 2}, "a has -1"),
        ({"a": 0, "b": 0}, "all are 0"),
        ({"a": float("nan"), "b": 1}, "a has nan"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(UserError, match=message):
        Batches(two_domains(), 2, weights)


def test_parts_of_a_batch():
    batch = next(Batches(two_domains(), 5))
    parts = list(batch.parts(2))
    assert [len(p.ids) for p in parts] == [2, 2, 1]
    assert sum(p.counted for p in parts) == batch.counted == int((batch.labels >= 0).sum())
    assert [key for p in parts for key in p.rows] == batch.rows


def test_from_texts_and_files_agree(tmp_path: Path, tokenizer):
    (tmp_path / "a.txt").write_text("one")
    file = TokenData.from_files([tmp_path / "a.txt"], tokenizer)
    text = TokenData.from_texts(["one"], tokenizer)
    assert file.fingerprint == text.fingerprint
    assert file.manifest["tokenizer"] == tokenizer.fingerprint


def test_texts_need_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    for make in (
        lambda: TokenData.from_texts(["a text"], None),
        lambda: TokenData.from_files([tmp_path / "a.txt"], None),
    ):
        with pytest.raises(UserError, match=r"add its tokenizer\.json"):
            make()
