"""Text of the user's files: what is read, what is refused, what is left out and counted."""

from __future__ import annotations

import errno
import io
import json
import os
import tempfile
import tracemalloc
from typing import Any

import numpy as np
import pytest
import tiny_run

from xlstm_distill import runtime, sources
from xlstm_distill.data import Rows, TokenData, from_sources
from xlstm_distill.errors import UserError
from xlstm_distill.sampling import read_prompts
from xlstm_distill.texts import Malformed, arrow_rows, check_path, read_texts

CHAT = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "b é."},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "content": "d"},
]
TURN = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_run.tokenizer()


def write(path, *records) -> None:
    """jsonl of records; bytes are lines as they are."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"\n".join(lines) + b"\n")


# ---- documents that cannot be used --------------------------------------------------------------

BAD = {
    "not JSON": b'{"text": "a"',
    "not UTF-8": b'{"text": "\xff"}',
    "half a pair": rb'{"text": "a\ud800"}',
    "not an object": b"[1]",
    "no text field": b'{"txt": "a"}',
    "empty": b'{"text": " "}',
    "bad chat": b'{"messages": [{"role": "user"}]}',
    "too long": b'{"text": "' + b"a" * 200 + b'"}',
}


@pytest.mark.parametrize("kind", BAD)
def test_a_malformed_document_is_named_by_file_and_line(tmp_path, tokenizer, kind):
    file = tmp_path / "a.jsonl"
    write(file, {"text": "good"}, BAD[kind])
    with pytest.raises(UserError, match=r"a\.jsonl:2") as error:
        list(read_texts([file], tokenizer, Malformed(max_bytes=100)))
    assert "\n" not in str(error.value)


def test_a_table_is_not_one_long_document(tmp_path, tokenizer):
    for name in ("a.json", "b.CSV"):
        write(tmp_path / name, {"text": "one"}, {"text": "two"})
        with pytest.raises(UserError, match=f"{name}: .* one document a line as .jsonl"):
            list(sources.read_files([tmp_path / name], tokenizer))
    for name in ("a.ndjson", "b.JSONL"):
        write(tmp_path / name, {"text": "one"}, {"text": "two"})
        assert len(list(sources.read_files([tmp_path / name], tokenizer))) == 2
    assert len(list(sources.read_files([tmp_path], tokenizer))) == 4


def test_compressed_files_are_named_before_anything_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "package.tar.gz").write_bytes(b"\x1f\x8b")
    check_path(tmp_path)
    (tmp_path / "b.jsonl.gz").write_bytes(b"\x1f\x8b")
    for path in (tmp_path, tmp_path / "b.jsonl.gz"):
        with pytest.raises(UserError, match=r"b\.jsonl\.gz: compressed files are not read"):
            check_path(path)
    with pytest.raises(UserError, match=r"c\.json: \.json files are not read"):
        (tmp_path / "c.json").write_text("{}")
        check_path(tmp_path / "c.json")


def test_linked_directories_are_read_once(tmp_path, tokenizer):
    folder, elsewhere = tmp_path / "text", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "sub" / "a.txt").write_text("a")
    (elsewhere / "b.txt").write_text("b")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "sub" / "nowhere.txt").symlink_to("missing.txt")
    found = [d.name for d in sources.read_files([folder], tokenizer)]
    assert found == ["linked/b.txt", "sub/a.txt"]


def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"one\r\ntwo")
    (tmp_path / "b.jsonl").write_bytes(mark + b'{"text": "three"}\r\n{"text": "four"}\r\n')
    found = [text.text for text in read_texts([tmp_path], tokenizer, Malformed())]
    assert found == ["one\ntwo", "three", "four"]


def test_names_that_are_not_utf8_are_spelt_with_backslashes(tmp_path, tokenizer):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("one")
    write(tmp_path / os.fsdecode(b"caf\xe9.jsonl"), rb'{"\ud800": 1}', {"text": "two"})
    malformed = Malformed(skip=True)
    found = list(sources.read_files([tmp_path], tokenizer, malformed))
    assert sorted(d.name for d in found) == ["caf\\udce9.jsonl:2", "caf\\udce9.txt"]
    assert malformed.places[0].endswith("found: \\ud800")
    place = {"malformed_first": malformed.places}
    data = from_sources(found, tokenizer, [], "here", facts=place)
    data.save(tmp_path / "data")
    assert TokenData.open(tmp_path / "data").manifest["malformed_first"] == malformed.places


def test_what_a_record_has_instead_of_text_is_said(tmp_path, tokenizer):
    for record, message in (
        ({"text": 5}, "text must be a string, found 5"),
        ({"text": None, "id": 1}, "found: id$"),
        ({f"key{n}": 1 for n in range(1000)}, r"found: key0, .*\[\.\.\.\]$"),
    ):
        write(tmp_path / "a.jsonl", record)
        with pytest.raises(UserError, match=message):
            list(read_texts([tmp_path / "a.jsonl"], tokenizer, Malformed()))


def test_malformed_documents_are_left_out_and_counted(tmp_path, tokenizer):
    file, empty = tmp_path / "a.jsonl", tmp_path / "b.txt"
    write(file, *BAD.values(), {"text": "good"}, BAD["empty"])
    empty.write_text("")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    malformed = Malformed(skip=True, max_bytes=100)
    paths = [file, empty, tmp_path / "c.txt"]
    found = [d.name for d in sources.read_files(paths, tokenizer, malformed)]
    assert found == ["a.jsonl:9"]
    kinds = set(BAD) - {"half a pair"}
    assert malformed.counts == {**dict.fromkeys(kinds, 1), "empty": 3, "not UTF-8": 3}
    assert len(malformed.places) == 11
    assert any("a.jsonl:10" in place for place in malformed.places)


def test_a_ten_megabyte_line_is_refused_by_its_key(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", {"text": "x" * 10_000_000})
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*max_document_bytes"):
        list(read_texts([tmp_path / "a.jsonl"], tokenizer, Malformed(max_bytes=8_000_000)))
    (tmp_path / "a.txt").write_text("x" * 10_000_000)  # a book is a document, however long
    paths = [tmp_path / "a.txt", tmp_path / "a.jsonl"]
    assert len(list(read_texts(paths[:1], tokenizer, Malformed(max_bytes=8_000_000)))) == 1
    assert len(list(read_texts(paths, tokenizer, Malformed()))) == 2


def test_a_file_without_line_ends_is_not_held_in_memory(tmp_path, tokenizer):
    long = b'[{"text": "' + b"a" * 5_000_000 + b'"}]'
    write(tmp_path / "a.jsonl", {"text": "one"}, long, {"text": "two", "more": "x" * 1000}, long)
    malformed = Malformed(skip=True, max_bytes=1000)
    tracemalloc.start()
    try:
        found = [t.name for t in read_texts([tmp_path / "a.jsonl"], tokenizer, malformed)]
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert found == ["a.jsonl:1", "a.jsonl:3"] and malformed.counts == {"too long": 2}
    assert "a.jsonl:4: a line of more than 8,000 bytes; split it or" in malformed.places[1]


@pytest.fixture(scope="module")
def lacking():
    """A tokenizer without a token for z."""
    core = tiny_run.tokenizer()
    layout = json.loads(core._core.to_str())
    del layout["model"]["vocab"]["z"]
    return type(core)(type(core._core).from_str(json.dumps(layout)), chat_template=tiny_run.CHAT)


def test_a_byte_that_the_vocabulary_lacks_is_counted(tmp_path, lacking):
    write(tmp_path / "a.jsonl", {"text": "ab"}, {"text": "xyz"}, {"text": "cd"})
    malformed = Malformed(skip=True)
    found = sources.read_files([tmp_path / "a.jsonl"], lacking, malformed)
    assert [d.name for d in found] == ["a.jsonl:1", "a.jsonl:3"]
    assert malformed.counts == {"byte without a token": 1}
    with pytest.raises(UserError, match=f"^{tmp_path / 'a.jsonl'}:2: .*0x7a"):
        list(sources.read_files([tmp_path / "a.jsonl"], lacking))
    (tmp_path / "b.txt").write_text("z")
    with pytest.raises(UserError, match=f"^{tmp_path / 'b.txt'}: .*0x7a"):
        list(sources.read_files([tmp_path / "b.txt"], lacking))


def test_what_is_no_document_is_refused_with_skip_too(tmp_path, tokenizer):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"not a table")
    for name, message in (("a.parquet", "cannot read"), ("b.txt", "no such file")):
        with pytest.raises(UserError, match=message):
            list(read_texts([tmp_path / name], tokenizer, Malformed(skip=True)))


# ---- several threads, and the disk --------------------------------------------------------------


@pytest.fixture
def threads():
    """Sets the number of threads; it is set back."""
    before = runtime.threads()
    yield runtime.set_threads
    runtime.set_threads(before)


def mixed_records(count: int) -> list[Any]:
    """Documents of every kind, some of which cannot be used."""
    records: list[Any] = []
    for n in range(count):
        records += [{"text": f"{n} " * (1 + n % 50)}, {"prompt": f"{n}+1=", "completion": "2"}]
        if n % 9 == 4:
            records.append({"messages": CHAT})
        if n % 31 == 5:
            records += [BAD["not JSON"], {"text": f"{n} z"}, {"text": " "}]
    return records


def test_nothing_depends_on_the_number_of_threads(tmp_path, lacking, threads):
    write(tmp_path / "a.jsonl", *mixed_records(200))
    found = []
    for n in (1, 2, 5):
        threads(n)
        malformed = Malformed(skip=True)
        read = list(sources.read_files([tmp_path / "a.jsonl"], lacking, malformed, answers=True))
        counted = [None if d.counted is None else d.counted.tolist() for d in read]
        facts = (dict(malformed.counts), malformed.places)
        found.append(([(d.name, d.ids.tolist()) for d in read], counted, facts))
    assert found[0] == found[1] == found[2]
    _, _, (counts, places) = found[0]
    assert set(counts) == {"not JSON", "empty", "byte without a token"} and len(places) == 20


@pytest.mark.parametrize("n", [1, 3])
def test_the_first_text_that_cannot_be_used_ends_the_reading(tmp_path, lacking, threads, n):
    threads(n)
    good = [{"text": "ab"}] * 100
    # The byte comes first, though the broken line is read before the byte is encoded.
    write(tmp_path / "a.jsonl", *good, {"text": "z"}, *good, BAD["not JSON"])
    read = sources.read_files([tmp_path / "a.jsonl"], lacking)
    with pytest.raises(UserError, match=r"a\.jsonl:101: .*0x7a"):
        list(read)
    write(tmp_path / "a.jsonl", *good, *good, BAD["not JSON"])
    read = sources.read_files([tmp_path / "a.jsonl"], lacking)
    assert [next(read).name for _ in range(64 * 3)][-1] == "a.jsonl:192"
    with pytest.raises(UserError, match=r"a\.jsonl:201: not valid JSON"):
        next(read)


def test_a_reader_that_stops_early_reads_little_further(tmp_path, tokenizer, threads):
    threads(2)
    write(tmp_path / "a.jsonl", *[{"text": f"{n}"} for n in range(2000)])
    malformed = Malformed(skip=True)
    read = sources.read_files([tmp_path / "a.jsonl"], tokenizer, malformed)
    some = list(sources.up_to(read, 100))
    assert 20 < len(some) < 64 and sum(len(d.ids) for d in some) >= 100


def test_spooled_documents_are_the_same_and_on_disk(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", *mixed_records(40)[:60])
    (tmp_path / "place").mkdir()

    def read():
        malformed = Malformed(skip=True)
        return sources.read_files([tmp_path / "a.jsonl"], tokenizer, malformed, answers=True)

    plain, kept = list(read()), sources.spooled(read(), tmp_path / "place")
    assert list((tmp_path / "place").iterdir()) == []
    for a, b in zip(plain, kept, strict=True):
        assert a.name == b.name and np.array_equal(a.ids, b.ids)
        assert (a.counted is None) == (b.counted is None)
        assert a.counted is None or np.array_equal(a.counted, b.counted)
        assert isinstance(b.ids.base.base, np.memmap)  # a view of all of them, which is a map
    assert sources.spooled([], tmp_path / "place") == []
    data = TokenData.from_documents([d.ids for d in kept], tokenizer.vocab_size)
    there = TokenData.from_documents(
        [d.ids for d in kept], tokenizer.vocab_size, place=tmp_path / "place"
    )
    assert there.fingerprint == data.fingerprint and isinstance(there.ids.base, np.memmap)
    for one in (data, there):
        one.save(tmp_path / "saved" / str(len(list(tmp_path.glob("saved/*")))))
    files = [(tmp_path / "saved" / n / "ids.bin").read_bytes() for n in "01"]
    assert files[0] == files[1]


def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer):
    def peak(count: int) -> int:
        file = tmp_path / f"{count}.jsonl"
        write(file, *[{"text": "a river " * 400}] * count)
        tracemalloc.start()
        try:
            kept = sources.spooled(sources.read_files([file], tokenizer), tmp_path)
            TokenData.from_documents((d.ids for d in kept), 259, place=tmp_path)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(500), peak(4000)
    # 3,500 documents more have 11 million tokens, 90 MB as lists of ints; memory holds their names.
    assert many - few < 3_500 * 1000


def test_memory_does_not_grow_with_the_length_of_a_document(tmp_path, tokenizer, monkeypatch):
    """The library's own memory is not seen from here: so is what it is given."""
    given, own = [], tokenizer._plain.encode_batch_fast

    class Core:
        def encode_batch_fast(self, texts, add_special_tokens):
            given.extend(map(len, texts))
            return own(texts, add_special_tokens=add_special_tokens)

        def encode(self, *arguments, **settings):
            return tokenizer_plain.encode(*arguments, **settings)

    tokenizer_plain = tokenizer._plain
    monkeypatch.setitem(tokenizer.__dict__, "_plain", Core())
    (tmp_path / "book.txt").write_text("a river \n\n" * 400_000)
    (book,) = sources.read_files([tmp_path / "book.txt"], tokenizer)
    assert len(book.ids) == 4_000_001 and book.ids.dtype == np.int32
    assert sum(given) == 4_000_000 and max(given) < 1_100_000


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    document = sources.Document("a", [1, 2, 3])
    with pytest.raises(UserError, match="cannot write: No space left"):
        sources.spooled([document], tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="nowhere: cannot write: No such file"):
        sources.spooled([document], tmp_path / "nowhere")


# ---- Parquet and Arrow --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "PARQUET", "file", "stream"])
def test_tables_are_read_as_jsonl_is(tmp_path, tokenizer, kind):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"text": f"row {n}", "messages": None} for n in range(600)]
    records[3] = {"text": None, "messages": CHAT}
    records[5] = {"text": None, "messages": None}
    table = arrow.Table.from_pylist(records)
    is_parquet = kind.lower() == "parquet"
    file = tmp_path / (f"a.{kind}" if is_parquet else "a.arrow")
    if is_parquet:
        parquet.write_table(table, file, row_group_size=250)
    else:
        new = arrow.ipc.new_file if kind == "file" else arrow.ipc.new_stream
        with new(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=250)
    malformed = Malformed(skip=True)
    found = {t.name: t for t in read_texts([tmp_path], tokenizer, malformed)}
    assert len(found) == 599 and malformed.counts == {"no text field": 1}
    assert malformed.places[0].startswith(f"{file}: row 6:")
    assert found[f"{file.name}:600"].text == "row 599"
    assert found[f"{file.name}:4"].text.count("<|im_start|>") == 4


def test_memory_does_not_grow_with_a_group_of_rows(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def peak(count: int) -> int:
        """The most that pyarrow holds while a file is read that is one group of rows."""
        texts = [f"{n} " * 1000 for n in range(count)]
        vectors = np.random.default_rng(0).random((count, 64)).tolist()
        table = arrow.table({"vector": vectors, "text": texts})
        file = tmp_path / f"{count}.parquet"
        parquet.write_table(table, file, row_group_size=count)
        del table
        held = []
        for row in arrow_rows(file, ["text", "messages"]):
            assert list(row) == ["text"]
            held.append(arrow.total_allocated_bytes())
        return max(held)

    assert peak(8000) < peak(1000) + 10_000_000  # the texts of 7,000 rows more are 40 MB
    file = tmp_path / "1000.parquet"
    assert list(next(arrow_rows(file, ["messages"]))) == ["vector", "text"]


# ---- what is learnt -----------------------------------------------------------------------------


def learnt(document, tokenizer) -> str:
    return tokenizer.decode(np.array(document.ids)[document.counted])


def test_answers_alone_are_learnt(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    write(file, {"messages": CHAT}, {"prompt": "2+2=", "completion": "4"}, {"text": "plain"})
    chat, pair, plain = sorted(
        sources.read_files([file], tokenizer, answers=True), key=lambda d: d.name
    )
    assert learnt(chat, tokenizer) == "b é.<|im_end|>d<|im_end|>"
    assert learnt(pair, tokenizer) == "4<|endoftext|>"
    assert plain.counted is None
    write(tmp_path / "b.jsonl", {"prompt": CHAT[:3], "completion": CHAT[3:]})
    (turns,) = sources.read_files([tmp_path / "b.jsonl"], tokenizer, answers=True)
    assert np.array_equal(turns.ids, chat.ids) and learnt(turns, tokenizer) == "d<|im_end|>"
    everything = list(sources.read_files([file], tokenizer))
    assert all(d.counted is None for d in everything)
    ids = {d.name: d.ids.tolist() for d in (*everything, turns)}
    assert ids == {d.name: d.ids.tolist() for d in (chat, pair, plain, turns)}


def test_parts_of_text_are_the_text_and_other_contents_are_refused(tmp_path, tokenizer):
    def rendered(*messages) -> str:
        write(tmp_path / "a.jsonl", {"messages": messages})
        (text,) = read_texts([tmp_path / "a.jsonl"], tokenizer, Malformed())
        return text.text

    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "?"}]
    assert rendered({"role": "user", "content": parts}, *CHAT[1:]) == rendered(*CHAT)
    for content in (None, [], 5, [{"type": "image", "url": "x"}], ["a"]):
        with pytest.raises(UserError, match=r"a\.jsonl:1: messages\[1\]\.content: expected"):
            rendered(CHAT[0], {"role": "assistant", "content": content})


CALLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if 'tool_calls' in m %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tools_and_calls_are_rendered_or_refused(tmp_path, tokenizer, kind):
    able = tiny_run.tokenizer()
    able.chat_template = CALLS
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    record = {"messages": [CHAT[0], call, *CHAT[2:]], "tools": [{"name": "f"}]}
    file = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(file, record)
    else:  # where every message has every key
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist([record]), file)
    (document,) = sources.read_files([file], able, answers=True)
    text = able.decode(document.ids)
    assert text.startswith('<|im_start|>tools\n[{"name": "f"}]<|im_end|>\n<|im_start|>user\na?')
    assert learnt(document, able) == '[{"name": "f"}]<|im_end|>d<|im_end|>'
    with pytest.raises(UserError, match=r"a\..*1: messages\[1\]: .* no place for tool_calls"):
        list(read_texts([file], tokenizer, Malformed()))
    write(tmp_path / "b.jsonl", {"messages": CHAT, "tools": [{"name": "f"}]})
    with pytest.raises(UserError, match=r"b\.jsonl:1: tools: .* no place for them"):
        list(read_texts([tmp_path / "b.jsonl"], tokenizer, Malformed()))


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    tokenizer = tiny_run.tokenizer()
    tokenizer.chat_template = "{{ messages|length }}" + tiny_run.CHAT
    write(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*one behind the other"):
        list(read_texts([tmp_path / "a.jsonl"], tokenizer, Malformed()))


def test_rows_have_labels_for_what_is_learnt(tmp_path):
    ids = [[1, 2, 3, 4, 5], [6, 7, 8, 9]]
    masks = [np.array([False, False, True, True, False]), None]
    data = TokenData.from_documents(ids, 16, counted=masks)
    everything = TokenData.from_documents(ids, 16)
    assert data.fingerprint != everything.fingerprint
    data.save(tmp_path / "data")
    again = TokenData.open(tmp_path / "data")
    assert again.fingerprint == data.fingerprint
    assert again.manifest["counted"] == 6
    rows, whole = Rows(again, 9, 1), Rows(everything, 9, 1)
    (own, labels, _), (theirs, all_labels, _) = rows.row(0), whole.row(0)
    assert np.array_equal(own, theirs)
    assert set(all_labels[labels < 0]) - {-1} == {2, 5}
    assert np.array_equal(labels[labels >= 0], all_labels[labels >= 0])


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(UserError, match="3 tokens, but counted has 2"):
        TokenData.from_documents([[1, 2, 3]], 16, counted=[np.array([True, False])])


def test_a_damaged_mask_is_refused(tmp_path):
    mask = [np.array([True, False, True])]
    TokenData.from_documents([[1, 2, 3]], 16, counted=mask).save(tmp_path / "data")
    (tmp_path / "data" / "counted.bin").write_bytes(b"\x01\x01\x01")
    with pytest.raises(UserError, match="damaged"):
        TokenData.open(tmp_path / "data")


# ---- prompts of a file --------------------------------------------------------------------------


def test_prompts_are_lines_of_text_or_records(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\u2028lines\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two\u2028lines"]
    lines = ['{"prompt": "p", "text": "t"}', '{"instruction": "i\u2028i"}', '{"text": "t"}', ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_prompts(tmp_path / "a.jsonl") == ["p", "i\u2028i", "t"]
    for name in ("a.JSONL", "a.ndjson"):
        (tmp_path / name).write_text("\ufeff" + "\n".join(lines))
        assert read_prompts(tmp_path / name) == ["p", "i\u2028i", "t"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n{"txt": "b"}', r"a\.jsonl:2: needs the field prompt, instruction or text"),
        ('{"text": "a"}\n\n{', r"a\.jsonl:3: not valid JSON"),
        (r'{"text": "\ud800"}', r"a\.jsonl:1: text holds half a surrogate pair"),
        ("\n", r"a\.jsonl: the file is empty"),
    ],
)
def test_bad_prompts_are_named(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "a.jsonl")
