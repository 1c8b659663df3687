"""What the ranks of a job do in test_mpi.py: `mpirun -n N python mpi_ranks.py FOLDER` checks the
parts, `... failing HOW RANK COMMAND` does a command in which one rank fails, `... script WHERE
FOLDER` is a program of a user's."""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_run
from test_accumulation import check_sum
from test_tasks import request, write_task

from xlstm_distill import accumulation, cli, shards
from xlstm_distill.accumulation import Accumulation
from xlstm_distill.communicator import ALONE, Communicator, world
from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import evaluate
from xlstm_distill.model import Model
from xlstm_distill.optim import AdamW
from xlstm_distill.parameters import Parameters
from xlstm_distill.training import Best, Saver


def communicator(_: Path) -> None:
    """Every call of the communicator."""
    comm = world()
    rank, size = comm.rank, comm.size
    assert size > 1 and comm.first == (rank == 0)
    assert comm.gather(rank) == list(range(size))
    assert comm.broadcast(("first", rank)) == ("first", 0)
    assert comm.any(rank == size - 1) and not comm.any(False)
    assert list(comm.map(lambda n: n * n, range(7))) == [n * n for n in range(7)]
    assert list(comm.map(lambda n: (n, comm.rank), range(5))) == [(n, n % size) for n in range(5)]
    comm.agree("the same", 3)
    with pytest.raises(UserError, match=rf"the rank is 0 on rank 0 .* and {1} on rank 1"):
        comm.agree("the rank", rank)
    errors_of_one(comm)
    others = [other for other in range(size) if other != rank]
    received = {o: [np.empty(n, np.float32) for n in (o + 2, 1)] for o in others}
    sent = {o: [np.full(n, 10 * rank + o + n, np.float32) for n in (rank + 2, 1)] for o in others}
    comm.exchange(sent, received)
    for other, arrays in received.items():
        for array in arrays:
            assert (array == 10 * other + rank + len(array)).all()
    comm.barrier()
    for groups in range(1, size + 1):
        number, own = comm.split(groups)
        members = own.gather((number, rank))
        assert {n for n, _ in members} == {number} and members[own.rank] == (number, rank)
        sizes = comm.gather(own.size)
        assert max(sizes) - min(sizes) <= 1 and len(set(comm.gather(number))) == groups
        assert comm.gather(number) == sorted(comm.gather(number))


def errors_of_one(comm: Communicator) -> None:
    """What the last rank meets is raised by all, each in its words, and none waits for another."""
    last = comm.size - 1
    mine, its_name = comm.rank == last, comm.gather(comm.name)[last]

    def mapped(error: BaseException, at: int) -> list[int]:
        def work(n: int) -> int:
            if n == at:
                raise error
            return n

        return list(comm.map(work, range(3 * comm.size)))

    at = 2 * comm.size - 1  # of the last rank, in the second turn
    with pytest.raises(UserError) as user:
        mapped(UserError("file.json: damaged", usage=True), at)
    words = "file.json: damaged"
    assert str(user.value) == (words if mine else f"{its_name}: {words}") and user.value.usage
    with pytest.raises(OSError if mine else UserError, match="disk full"):
        mapped(OSError("disk full"), at)
    with pytest.raises(KeyboardInterrupt):
        mapped(KeyboardInterrupt(), at)
    with pytest.raises(ZeroDivisionError if mine else RuntimeError, match="a defect") as defect:
        mapped(ZeroDivisionError("a defect"), at)
    if not mine:
        assert its_name in str(defect.value) and "in work" in defect.value.__notes__[0]

    def items() -> Iterator[int]:
        yield from range(comm.size)
        if mine:
            raise UserError("the items end here")

    with pytest.raises(UserError, match="the items end here"):
        list(comm.map(abs, items()))
    comm.share(None)
    assert list(comm.map(abs, range(3))) == [0, 1, 2]


def sums(_: Path) -> None:
    """The tree of any number of parts, also fewer than ranks, in several messages; one rank has the
    whole tensor, or all have a part."""
    with pytest.MonkeyPatch.context() as patch:
        for parts in range(1, 14):
            patch.setattr(accumulation, "PIECE", 3000 if parts % 2 else 1 << 22)
            for block in (16384, 100):
                patch.setattr(shards, "BLOCK", block)
                check_sum(world(), parts)


TENSORS = [
    ("model.embed_tokens.weight", (700, 64), "embedding", -1),
    ("model.layers.0.input_layernorm.weight", (61,), "norm", 0),
    ("model.layers.0.mlp.up_proj.weight", (301, 500), "mlp", 0),
    ("model.layers.0.mixer.i_proj.bias", (3,), "bias", 0),
    ("model.layers.1.mlp.up_proj.weight", (301, 500), "mlp", 1),
    ("model.layers.1.mixer.map_q", (2, 16, 16), "map", 1),
]


def optimiser(folder: Path) -> None:
    """The shards of all ranks are the bits of one process, and a state is the same to both; numbers
    of other shards are never looked at."""
    comm, training = world(), np.random.default_rng(7)
    names = {name for name, *_ in TENSORS} - {"model.layers.0.mixer.i_proj.bias"}
    start = {name: training.standard_normal(shape) for name, shape, *_ in TENSORS}

    def new(comm: Communicator) -> AdamW:
        params = Parameters.of(TENSORS, np.float32)
        for name, value in start.items():
            params[name] = value.astype(np.float32)
        return AdamW(params, names, rates={"mixer": 3.0, "norm": 0.1}, average=0.9, comm=comm)

    def compare(one: AdamW, shared: AdamW) -> None:
        assert np.array_equal(one.params.flat, shared.params.flat)
        low, high = shared.shards.low, shared.shards.high
        for name, values in shared.state().items():
            assert np.array_equal(values, one.state()[name][low:high])

    one, shared = new(ALONE), new(comm)
    size = shared.shards.size
    assert size == sum(map(np.size, (start[name] for name in names)))
    assert abs(len(shared.m) - size / comm.size) <= shards.BLOCK
    assert sum(comm.gather(len(shared.m))) == size
    cut = [p.entry.name for p in shared.shards.own if p.own.stop - p.own.start < p.entry.size]
    assert any(comm.gather(bool(cut)))
    best = Best()
    for step in range(3):
        grads = one.params.zeros_like()
        for name in sorted(names):
            grads[name] = training.standard_normal(start[name].shape).astype(np.float32)
        own = grads.copy()
        own.flat[:] = np.nan
        for piece in shared.shards.own:
            own.flat[piece.place] = grads.flat[piece.place]
        assert one.norm(grads) == shared.norm(own) and one.squares(grads) == shared.squares(own)
        one.step(grads, 1e-2, 0.5)
        shared.step(own, 1e-2, 0.5)
        compare(one, shared)
        best.offer(shared, 3.0 - step)
        with one.averaged(), shared.averaged():
            assert np.array_equal(one.params.flat, shared.params.flat)
        compare(one, shared)

    saver = Saver(folder / "shared.npz", {"a": 1}, comm=comm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "PIECE", 5000)  # so that a shard is several messages
        saver.save(shared, {"text": 5}, best)
    comm.barrier()
    with np.load(saver.path) as whole:
        assert np.array_equal(whole["best"], one.values())
        for name, values in one.state().items():
            assert np.array_equal(whole[name], values)
    batches = SimpleNamespace(load_state_dict=lambda cursor: None)
    taken = new(ALONE), new(comm)
    Saver(saver.path, {"a": 1}).load(taken[0], batches, Best())
    saver.load(taken[1], batches, best)
    assert taken[0].steps == taken[1].steps == 3 and best.step == 3
    compare(*taken)
    compare(one, taken[1])
    assert np.array_equal(best.values, taken[1].values())


def write_arithmetic(requests: Path) -> None:
    """A small request set in the place of arc_easy."""
    asked = [
        request(n, choice, f"{n} plus {n} is" + " so" * (n % 5), f" {n + choice}", n % 2)
        for n in range(9)
        for choice in range(2)
    ]
    write_task(requests, "arc_easy/rc_5shot", asked)


def tasks(requests: Path) -> None:
    """Request sets give the same results as one process."""
    if world().first:
        write_arithmetic(requests)
    world().barrier()
    model = tiny_run.teacher()
    found = [
        evaluate(model, ["arc_easy"], requests=requests, comm=comm) for comm in (ALONE, world())
    ]
    assert found[0] == found[1] and len(found[0]["samples"]["arc_easy"]) == 9


def failing(how: str, rank: int, arguments: list[str]) -> None:
    """The command, in which one rank alone meets a defect or is asked to stop, while the others
    wait for it: for its gradient in the third step, or for its windows of the evaluation."""
    calls = itertools.count(1)

    def trouble(at: int) -> None:
        if next(calls) == at and world().rank == rank:
            if how == "asked":
                signal.raise_signal(signal.SIGTERM)
            else:
                raise RuntimeError("a defect of one rank")

    add, measure = Accumulation.__call__, Model.divergence

    def call(self: Accumulation, *arguments: Any) -> Any:
        trouble(3)
        return add(self, *arguments)

    def divergence(self: Model, *arguments: Any) -> Any:
        trouble(1)
        return measure(self, *arguments)

    if how == "training":
        Accumulation.__call__ = call  # type: ignore[method-assign]
    else:
        Model.divergence = divergence  # type: ignore[method-assign]
    cli._GRACE = 0.5
    sys.exit(cli.main(arguments))


def script(where: str, requests: Path) -> None:
    """What a user's own program does: one rank meets an error of the model, of its disk while the
    others go on, or is interrupted between two batches."""
    comm = world()
    if comm.first:
        write_arithmetic(requests)
    comm.barrier()
    model = tiny_run.teacher()
    scorer = model.scorer

    def failing_scorer(*arguments: Any) -> Any:
        if where == "model" and comm.rank == 1:
            raise UserError("a model that fails")
        return scorer(*arguments)

    def progress(_: str, done: int, total: int) -> None:
        if where == "disk" and comm.first:
            raise OSError("a full disk")
        if where == "interrupt" and comm.rank == 1:
            signal.raise_signal(signal.SIGINT)

    model.scorer = failing_scorer  # type: ignore[method-assign]
    evaluate(model, ["arc_easy"], requests=requests, progress=progress, comm=comm)
    evaluate(model, ["arc_easy"], requests=requests, comm=comm)


if __name__ == "__main__":
    if sys.argv[1] == "script":
        script(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1] == "failing":
        failing(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    else:
        for check in (communicator, sums, optimiser, tasks):
            check(Path(sys.argv[1]))
    print("done", flush=True)
