"""The sum of a step's gradients: in sequence, over the tree, against sums written down plainly."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_run
from tolerances import ORDER_NORM, ORDER_STEPS

from xlstm_distill.accumulation import Accumulation
from xlstm_distill.align import align
from xlstm_distill.communicator import ALONE, Communicator
from xlstm_distill.data import TokenData
from xlstm_distill.distill import distill
from xlstm_distill.linearize import linearize

WEIGHT = "model.layers.1.mlp.down_proj.weight"


def gradient(part: int) -> np.ndarray:
    """A random gradient whose sums show the order of the additions."""
    random = np.random.default_rng(part)
    return (random.standard_normal((64, 96)) * 10.0 ** random.integers(-3, 4)).astype(np.float32)


def tree(values: list[np.ndarray]) -> np.ndarray:
    """The sum over the tree as the module's docstring defines it."""
    if len(values) == 1:
        return values[0]
    middle = max(2**p for p in range(len(values).bit_length()) if 2**p < len(values))
    return tree(values[:middle]) + tree(values[middle:])


def in_sequence(values: list[np.ndarray]) -> np.ndarray:
    total = np.zeros_like(values[0])
    for value in values:
        total = total + value
    return total


def accumulated(comm: Communicator, order: str, parts: int, times: int = 1):
    """The gradient of one tensor, put together of all shards, the sums and the parts that this rank
    computed."""
    model = tiny_run.teacher()
    accumulate = Accumulation(model.params, {WEIGHT}, comm, order)
    grads = model.params.zeros_like()
    own: list[int] = []

    def one(part: int, into) -> np.ndarray:
        own.append(part)
        into[WEIGHT] += gradient(part)  # as the core does: backward adds
        return np.array([part, 0.1 * part])

    for _ in range(times):
        own.clear()
        grads[WEIGHT].fill(0)
        sums = accumulate(range(parts), one, grads)
    accumulate.shards.share(grads)
    others = [name for name in grads if name != WEIGHT and grads[name].any()]
    assert not others
    return grads[WEIGHT], sums, own


def check_sum(comm: Communicator, parts: int) -> None:
    """The tree's bits and the sums, twice with the same buffers; the parts are shared evenly."""
    found, sums, own = accumulated(comm, "tree", parts, times=2)
    assert np.array_equal(found, tree([gradient(n) for n in range(parts)]))
    assert np.array_equal(sums, in_sequence([np.array([n, 0.1 * n]) for n in range(parts)]))
    shares = comm.gather(own)
    assert [part for share in shares for part in share] == list(range(parts))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("parts", range(1, 14))
def test_one_rank_adds_over_the_tree(parts):
    check_sum(ALONE, parts)


def test_the_default_adds_in_sequence():
    found, sums, own = accumulated(ALONE, "sequence", 7)
    gradients = [gradient(n) for n in range(7)]
    assert np.array_equal(found, in_sequence(gradients)) and own == list(range(7))
    assert not np.array_equal(found, tree(gradients))
    assert np.array_equal(sums, in_sequence([np.array([n, 0.1 * n]) for n in range(7)]))


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_both_orders_train_alike(stage):
    teacher = tiny_run.teacher()
    texts = [f"{n}: " + tiny_run.TEXT[n % 4] * 2 for n in range(12)]
    data = TokenData.from_texts(texts, teacher.tokenizer)
    settings = dict(steps=3, rows=5, micro_rows=1, length=32)
    found = []
    for order in ("sequence", "tree"):
        student = linearize(teacher, window=6, sinks=2)
        if stage == "align":
            metrics = list(align(student, teacher, data, accumulation=order, **settings))
        else:
            metrics = list(distill(student, data, teacher, k=8, accumulation=order, **settings))
        found.append((student.params.flat, metrics[0]["loss"], metrics[0]["gradient_norm"]))
    (one, loss, norm), (two, other_loss, other_norm) = found
    assert loss == other_loss  # losses are added in the same order
    assert norm == pytest.approx(other_norm, rel=ORDER_NORM)
    start = linearize(teacher, window=6, sinks=2).params.flat
    assert 0 < np.linalg.norm(one - two) <= ORDER_STEPS * np.linalg.norm(one - start)
