"""What the ranks of a job do in test_mpi.py: `mpirun -n N python mpi_ranks.py CHECK`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from test_accumulation import check_sum
from test_tasks import request, write_task

from xlstm_distill import cli
from xlstm_distill.communicator import ALONE, world
from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import evaluate
from xlstm_distill.run import Run


def communicator(_: list[str]) -> None:
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
    array = np.full(5, rank, np.float32)
    comm.spread(array)
    assert not array.any()
    if rank == 1:
        comm.send(np.arange(5, dtype=np.float32), 0)
    if rank == 0:
        comm.receive(array, 1)
        assert np.array_equal(array, np.arange(5))
    comm.barrier()


def sums(_: list[str]) -> None:
    """The tree of any number of parts, also fewer than ranks."""
    for parts in range(1, 14):
        check_sum(world(), parts)


def tasks(arguments: list[str]) -> None:
    """Request sets give the same results as one process."""
    requests = Path(arguments[0])
    if world().first:
        asked = [
            request(n, choice, f"{n} plus {n} is" + " so" * (n % 5), f" {n + choice}", n % 2)
            for n in range(9)
            for choice in range(2)
        ]
        write_task(requests, "arc_easy/rc_5shot", asked)
    world().barrier()
    model = tiny_run.teacher()
    found = [
        evaluate(model, ["arc_easy"], requests=requests, comm=comm) for comm in (ALONE, world())
    ]
    assert found[0] == found[1] and len(found[0]["samples"]["arc_easy"]) == 9


def failing(arguments: list[str]) -> None:
    """The command, in which one rank alone meets a defect in stage I."""
    original = Run.run_align

    def run_align(self: Run) -> None:
        if self.comm.rank == 1:
            raise RuntimeError("a defect of one rank")
        original(self)

    Run.run_align = run_align  # type: ignore[method-assign]
    cli._GRACE = 0.5
    sys.exit(cli.main(arguments))


if __name__ == "__main__":
    {f.__name__: f for f in (communicator, sums, tasks, failing)}[sys.argv[1]](sys.argv[2:])
    print("done", flush=True)
