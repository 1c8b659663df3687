"""The cache of the teacher's targets: contents, resume, refusal, damage."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_run

from xlstm_distill.data import Rows, TokenData
from xlstm_distill.errors import UserError
from xlstm_distill.targets import ROWS_PER_SHARD, TargetCache, identity_of, write_targets

LENGTH, K = 16, 9


@pytest.fixture(scope="module")
def teacher():
    return tiny_run.teacher()


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    documents = [random.integers(0, tiny_run.VOCAB, 30).tolist() for _ in range(12)]
    return Rows(TokenData.from_documents(documents, tiny_run.VOCAB), LENGTH, 4)


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_targets_are_the_teachers_top_k(tmp_path, teacher, rows):
    metrics = list(write_targets(teacher, rows, tmp_path / "t", k=K))
    assert metrics[-1]["step"] == metrics[-1]["steps"] == -(-len(rows) // ROWS_PER_SHARD)
    cache = TargetCache(tmp_path / "t", identity_of(teacher, rows, K))
    assert cache.rows == len(rows) and cache.k == K
    wanted = [len(rows) - 1, 0, 3]
    ids, logp = cache.get(wanted)
    assert ids.dtype == np.int32 and logp.dtype == np.float32
    for n, index in enumerate(wanted):
        own, _, reset = rows.row(index)
        tid, tlogp, _ = teacher.topk(own[None], K, reset=reset[None])
        assert np.array_equal(ids[n], tid[0])
        # float16: relative error at most 2^-11
        assert (np.abs(logp[n] - tlogp[0]) <= 2.0**-11 * np.abs(tlogp[0]) + 1e-7).all()
    assert 0 < cache.mass() < 1


def test_a_part_is_a_prefix_of_the_whole(tmp_path, teacher, rows):
    list(write_targets(teacher, rows, tmp_path / "all", k=K))
    list(write_targets(teacher, rows, tmp_path / "part", count=ROWS_PER_SHARD + 3, k=K))
    part, whole = TargetCache(tmp_path / "part"), TargetCache(tmp_path / "all")
    assert part.rows == ROWS_PER_SHARD + 3
    index = list(range(part.rows))
    assert all(np.array_equal(a, b) for a, b in zip(part.get(index), whole.get(index), strict=True))
    with pytest.raises(UserError, match=f"not of row {part.rows}"):
        part.get([part.rows])
    # Asking for more later keeps the finished shards and ends with the same bytes.
    list(write_targets(teacher, rows, tmp_path / "part", k=K))
    assert contents(tmp_path / "part") == contents(tmp_path / "all")


def test_stopped_and_continued_is_bitwise_the_same(tmp_path, teacher, rows):
    list(write_targets(teacher, rows, tmp_path / "whole", k=K))
    generator = write_targets(teacher, rows, tmp_path / "cut", k=K)
    next(generator)
    generator.close()
    # A kill between the shard and the manifest leaves a shard that nobody knows.
    (tmp_path / "cut" / "shard-00001.npz").write_bytes(b"half")
    again = list(write_targets(teacher, rows, tmp_path / "cut", k=K))
    assert again[0]["step"] == 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert list(write_targets(teacher, rows, tmp_path / "cut", k=K)) == []


def test_refuses_what_does_not_belong_and_names_it(tmp_path, teacher, rows):
    list(write_targets(teacher, rows, tmp_path / "t", k=K))
    other = tiny_run.teacher(seed=1)
    cases = {
        "teacher": (other, rows, K),
        "seed": (teacher, Rows(rows.data, LENGTH, 5), K),
        "length": (teacher, Rows(rows.data, LENGTH + 1, 4), K),
        "k": (teacher, rows, K + 1),
    }
    for field, (model, packed, k) in cases.items():
        with pytest.raises(UserError, match=f"targets were made for {field} ") as error:
            list(write_targets(model, packed, tmp_path / "t", k=k))
        found, here = identity_of(teacher, rows, K)[field], identity_of(model, packed, k)[field]
        assert str(found) in str(error.value) and str(here) in str(error.value)
        with pytest.raises(UserError, match=f"targets were made for {field} "):
            TargetCache(tmp_path / "t", identity_of(model, packed, k))


def test_damage_is_found(tmp_path, teacher, rows):
    list(write_targets(teacher, rows, tmp_path / "t", k=K))
    shard = tmp_path / "t" / "shard-00000.npz"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000\.npz: damaged"):
        TargetCache(tmp_path / "t").get([0])
    shard.unlink()
    with pytest.raises(UserError, match="cannot read"):
        TargetCache(tmp_path / "t").get([0])
    (tmp_path / "t" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a target cache"):
        TargetCache(tmp_path / "t")


@pytest.mark.parametrize(("k", "count", "message"), [(0, 1, "k is 0"), (999, 1, "k is 999")])
def test_bad_k(tmp_path, teacher, rows, k, count, message):
    with pytest.raises(UserError, match=message):
        list(write_targets(teacher, rows, tmp_path / "t", k=k, count=count))


def test_bad_count(tmp_path, teacher, rows):
    with pytest.raises(UserError, match="targets of 0 rows"):
        list(write_targets(teacher, rows, tmp_path / "t", k=1, count=0))


def test_ids_are_16_bit_where_the_vocabulary_allows(tmp_path, teacher, rows):
    list(write_targets(teacher, rows, tmp_path / "t", k=K, count=1))
    with np.load(tmp_path / "t" / "shard-00000.npz") as part:
        assert part["ids"].dtype == np.uint16 and part["logp"].dtype == np.float16
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert manifest["tokenizer"] == teacher.tokenizer.fingerprint
