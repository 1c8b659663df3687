"""The cache of the teacher's targets: contents, resume, refusal, damage."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_run

from xlstm_distill import targets
from xlstm_distill.data import Batches, Rows, TokenData
from xlstm_distill.distill import distill
from xlstm_distill.errors import UserError
from xlstm_distill.linearize import linearize
from xlstm_distill.targets import (
    ROWS_PER_SHARD,
    OnlineTargets,
    TargetCache,
    identity_of,
    write_targets,
)

LENGTH, K = 16, 9


@pytest.fixture(scope="module")
def teacher():
    return tiny_run.teacher()


def identity(model, *settings):
    """What a cache of a model's targets says of itself."""
    return identity_of(model.fingerprint(), model.tokenizer, *settings)


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
    cache = TargetCache(tmp_path / "t", identity(teacher, rows, K))
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
    assert 0 < cache.mean() < 1


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
        found, here = identity(teacher, rows, K)[field], identity(model, packed, k)[field]
        assert str(found) in str(error.value) and str(here) in str(error.value)
        with pytest.raises(UserError, match=f"targets were made for {field} "):
            TargetCache(tmp_path / "t", identity(model, packed, k))


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
    # A run that was killed after it had made a later shard again.
    place = tmp_path / "t" / "manifest.json"
    manifest = json.loads(place.read_text())
    for lacking, wrong in (
        ({**manifest, "shards": manifest["shards"][1:]}, r"shard-00000\.npz is missing"),
        ({}, r"manifest\.json: not that of targets .*shards.*; delete the directory"),
        ({**manifest, "shards": [{}]}, r"manifest\.json: not that of targets .*file"),
        ({**manifest, "shards": 3}, r"manifest\.json: not that of targets"),
        ([], r"manifest\.json: not that of targets"),
    ):
        place.write_text(json.dumps(lacking))
        with pytest.raises(UserError, match=wrong):
            TargetCache(tmp_path / "t")
    place.unlink()
    with pytest.raises(UserError, match="holds no targets"):
        TargetCache(tmp_path / "t")


def test_shards_are_in_the_order_of_their_numbers(tmp_path, teacher, rows, monkeypatch):
    """Five digits are too few for 100,000 shards; here one digit is."""
    monkeypatch.setattr(targets, "_name", lambda number: f"shard-{number}.npz")
    monkeypatch.setattr(targets, "ROWS_PER_SHARD", 1)
    list(write_targets(teacher, rows, tmp_path / "t", k=K, count=12))
    cache, online = TargetCache(tmp_path / "t"), OnlineTargets(teacher, rows, K)
    for index in (1, 2, 10, 11):
        assert np.array_equal(cache.get([index])[0], online.get([index])[0])


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


# ---- draws --------------------------------------------------------------------------------------

DRAWS = 300  # more than a byte counts


def test_draws_have_the_teachers_distribution(tmp_path, teacher, rows):
    list(write_targets(teacher, rows, tmp_path / "t", k=DRAWS, form="sampled"))
    cache = TargetCache(tmp_path / "t", identity(teacher, rows, DRAWS, "sampled"))
    index = list(range(cache.rows))
    ids, logp = cache.get(index)
    assert ids.shape == logp.shape == (len(index), LENGTH, DRAWS)
    share = np.exp(logp.astype(np.float64))
    # Each weight is the logarithm of a whole number of draws, rounded to float32.
    assert np.abs(share * DRAWS - np.rint(share * DRAWS)).max() < DRAWS * 2.0**-23 * 8
    assert np.allclose(share.sum(axis=-1), 1, atol=1e-5)
    found = np.zeros((len(index), LENGTH, tiny_run.VOCAB))
    np.put_along_axis(found, ids, share, axis=-1)  # ids are distinct, but for padding
    padding = ~np.isfinite(logp)
    assert padding.any() and not ids[padding].any() and not share[padding].any()
    found[..., 0] = np.where(ids == 0, share, 0).sum(axis=-1)
    parts = [rows.row(n) for n in index]
    logits = teacher.logits(
        np.stack([p[0] for p in parts]), reset=np.stack([p[2] for p in parts])
    ).astype(np.float64)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    # Pearson's terms of tokens that are expected at least five times: each has the mean 1 - p and
    # a variance near 2; five standard deviations at most.
    expected = DRAWS * p
    large = expected >= 5
    statistic = ((DRAWS * found - expected)[large] ** 2 / expected[large]).sum()
    assert large.sum() > 1000
    assert abs(statistic - (1 - p)[large].sum()) <= 5 * np.sqrt(2.2 * large.sum())
    assert cache.mean() == pytest.approx((share > 0).sum(axis=-1).mean())


def test_draws_depend_on_seed_and_row_alone(tmp_path, teacher, rows):
    def made(name, packed=rows, **more):
        list(write_targets(teacher, packed, tmp_path / name, k=K, form="sampled", **more))
        return contents(tmp_path / name)

    whole = made("whole")
    assert made("cut", count=ROWS_PER_SHARD + 3) != whole and made("cut") == whole
    cache = TargetCache(tmp_path / "whole")
    alone = OnlineTargets(teacher, rows, K, "sampled")
    for index in (5, 0, len(rows) - 1):
        pairs = zip(cache.get([index]), alone.get([index]), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    # The same text in an order of its own has other draws, two rows with the same text too.
    same = TokenData.from_documents([[7] * (LENGTH * 4)], tiny_run.VOCAB)
    twins = OnlineTargets(teacher, Rows(same, LENGTH), K, "sampled").get([0, 1])
    assert not np.array_equal(twins[0][0], twins[0][1])


def test_a_shard_of_draws_is_as_documented(tmp_path, teacher, rows):
    list(write_targets(teacher, rows, tmp_path / "t", k=DRAWS, form="sampled", count=3))
    with np.load(tmp_path / "t" / "shard-00000.npz") as shard:
        assert {name: shard[name].dtype for name in shard.files} == {
            "ids": np.uint16,
            "counts": np.uint16,
            "distinct": np.uint16,
        }
        assert shard["distinct"].shape == (3, LENGTH)
        assert len(shard["ids"]) == len(shard["counts"]) == shard["distinct"].sum(dtype=np.int64)
        ends = np.cumsum(shard["distinct"].reshape(-1), dtype=np.int64)[:-1]
        for ids, counts in zip(
            np.split(shard["ids"], ends), np.split(shard["counts"], ends), strict=True
        ):
            assert (np.diff(ids.astype(int)) > 0).all() and counts.sum(dtype=np.int64) == DRAWS
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert manifest["form"] == "sampled" and manifest["k"] == DRAWS


def test_the_two_forms_are_not_taken_for_each_other(tmp_path, teacher, rows):
    list(write_targets(teacher, rows, tmp_path / "topk", k=K, count=1))
    list(write_targets(teacher, rows, tmp_path / "sampled", k=K, count=1, form="sampled"))
    for found, here in (("topk", "sampled"), ("sampled", "topk")):
        message = f"targets were made for form {found}, here it is {here}"
        with pytest.raises(UserError, match=message):
            list(write_targets(teacher, rows, tmp_path / found, k=K, form=here))
        with pytest.raises(UserError, match=message):
            TargetCache(tmp_path / found, identity(teacher, rows, K, here))
    student = linearize(teacher, window=6, sinks=2)
    for form, kl_form in (("topk", "sampled"), ("sampled", "tail")):
        with pytest.raises(UserError, match=f"kl_form {kl_form} needs targets of the form"):
            next(distill(student, rows, TargetCache(tmp_path / form), steps=1, kl_form=kl_form))
    with pytest.raises(UserError, match="k is 0, expected at least 1 draw"):
        list(write_targets(teacher, rows, tmp_path / "none", k=0, form="sampled"))


# ---- online -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_form", ["renormalised", "tail", "sampled"])
def test_online_and_cached_training_are_bitwise_the_same(tmp_path, teacher, rows, kl_form):
    form = "sampled" if kl_form == "sampled" else "topk"
    list(write_targets(teacher, rows, tmp_path / "t", k=K, form=form))
    found = []
    for source in (TargetCache(tmp_path / "t"), teacher, OnlineTargets(teacher, rows, K, form)):
        student = linearize(teacher, window=6, sinks=2)
        batches = Batches({"data": rows}, 3)
        settings = dict(steps=12, micro_rows=2, kl_form=kl_form, k=K, lr=1e-3)
        metrics = list(distill(student, batches, source, **settings))
        found.append(([m["loss"] for m in metrics], student.params.flat.copy()))
    assert batches.state_dict()["data"] > len(rows)  # rows come twice
    for losses, values in found[1:]:
        assert losses == found[0][0] and np.array_equal(values, found[0][1])
