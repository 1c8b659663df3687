"""The processes of a job that work together through MPI, or one process alone.

Every process, called a rank, runs the same program: all of them make the calls of a communicator in
the same order, and what they decide by must be the same on all. `world()` is the communicator of
the job that mpirun started; mpi4py is imported for that alone.
"""

from __future__ import annotations

import functools
import itertools
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from numpy.typing import NDArray

from .errors import UserError

_Item = TypeVar("_Item")
_Value = TypeVar("_Value")

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""What mpirun of Open MPI and of MPICH (and of its kin) tells each process."""
_POLL = 0.005
"""Seconds between two looks at a barrier. A blocking one would take a whole core for waiting."""


class Communicator:
    """One process alone: the only rank of its job. `Mpi` has several."""

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """True on the rank that writes files, logs and speaks to the user."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """This rank in words."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def barrier(self) -> None:
        """Wait until all ranks are here, without work for the processor."""

    def gather(self, value: _Value) -> list[_Value]:
        """The values of all ranks in their order, on every rank. Values are pickled."""
        return [value]

    def broadcast(self, value: _Value) -> _Value:
        """The first rank's value, on every rank. Values are pickled."""
        return value

    def exchange(
        self,
        sent: Mapping[int, Sequence[NDArray[Any]]],
        received: Mapping[int, Sequence[NDArray[Any]]],
    ) -> None:
        """Send contiguous arrays to other ranks, and receive what others send into as many arrays
        of the same sizes and dtypes in the same order, all at the same time."""
        if others := {*sent, *received}:
            raise ValueError(f"there is no rank {min(others)} beside this one")

    def split(self, groups: int) -> tuple[int, Communicator]:
        """(number, communicator) of the group that this rank belongs to: neighbouring ranks, in
        groups as even as can be. There are at most as many groups as ranks."""
        return 0, self

    def abort(self, status: int) -> None:
        """End the processes of all other ranks and this one, if there are others."""

    def any(self, flag: bool) -> bool:
        """True on every rank if one has the flag."""
        return any(self.gather(flag))

    def agree(self, what: str, value: Any) -> None:
        """UserError on every rank if the value differs between ranks."""
        first, *others = self.gather((value, self.name))
        for other, name in others:
            if other != first[0]:
                raise UserError(f"{what} is {first[0]} on {first[1]} and {other} on {name}")

    def share(self, error: BaseException | None) -> None:
        """Raise on every rank what one has met; nothing where none has met an error.

        A rank raises its own error. The others raise KeyboardInterrupt where one was interrupted,
        or a UserError that names the first rank with an error, or for a defect a RuntimeError that
        has the other's traceback as a note.
        """
        failures = self.gather(None if error is None else _Failure.of(error, self.name))
        if error is not None:
            raise error
        for failure in failures:
            if failure is not None:
                raise failure.here()

    def map(self, function: Callable[[_Item], _Value], items: Iterable[_Item]) -> Iterator[_Value]:
        """The function of each item in order, on every rank; the ranks take items in turns. Results
        are pickled. An error in the function or the items of one rank ends all (`share`)."""
        waiting = iter(items)
        turn: list[_Item] = []
        while True:
            own: list[_Value] = []
            failure: BaseException | None = None
            try:
                turn = list(itertools.islice(waiting, self.size))
                own = [function(item) for item in turn[self.rank : self.rank + 1]]
            except (Exception, KeyboardInterrupt) as error:
                failure = error
            self.share(failure)
            if not turn:
                return
            yield from itertools.chain.from_iterable(self.gather(own))


class _Failure(NamedTuple):
    """What a rank met, in words that can be sent. trace: of a defect, else empty."""

    line: str
    interrupted: bool
    usage: bool
    trace: str

    @classmethod
    def of(cls, error: BaseException, name: str) -> _Failure:
        """For the others; `name` is this rank's."""
        known = isinstance(error, UserError | OSError | MemoryError | FloatingPointError)
        words = str(error) if isinstance(error, UserError) else repr(error)
        return cls(
            line=f"{name}: {words}",
            interrupted=isinstance(error, KeyboardInterrupt),
            usage=isinstance(error, UserError) and error.usage,
            trace="" if known else "".join(traceback.format_exception(error)),
        )

    def here(self) -> BaseException:
        """As an exception of a rank that did not meet it."""
        if self.interrupted:
            return KeyboardInterrupt()
        if not self.trace:
            return UserError(self.line, usage=self.usage)
        defect = RuntimeError(self.line)
        defect.add_note(self.trace)
        return defect


class Mpi(Communicator):
    """The ranks of a communicator of mpi4py."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank, self.size = int(comm.rank), int(comm.size)

    def barrier(self) -> None:
        request = self._comm.Ibarrier()
        while not request.Test():
            time.sleep(_POLL)

    def gather(self, value: _Value) -> list[_Value]:
        found: list[_Value] = self._comm.allgather(value)
        return found

    def broadcast(self, value: _Value) -> _Value:
        found: _Value = self._comm.bcast(value)
        return found

    def exchange(
        self,
        sent: Mapping[int, Sequence[NDArray[Any]]],
        received: Mapping[int, Sequence[NDArray[Any]]],
    ) -> None:
        # Arrays between two ranks arrive in the order in which they were sent.
        waiting = [self._comm.Irecv(a, source=rank) for rank, own in received.items() for a in own]
        waiting += [self._comm.Isend(a, dest=rank) for rank, own in sent.items() for a in own]
        for request in waiting:
            request.Wait()

    def split(self, groups: int) -> tuple[int, Communicator]:
        if groups == 1:
            return 0, self
        number = self.rank * groups // self.size
        return number, Mpi(self._comm.Split(number, self.rank))

    def abort(self, status: int) -> None:
        self._comm.Abort(status)


ALONE = Communicator()


@functools.cache
def world() -> Communicator:
    """All processes that mpirun started together; ALONE where there is but one.

    From then on an exception that ends the program of one rank ends the job, once it is printed:
    the others may wait for this rank, and MPI would wait for them.

    UserError if there are several and mpi4py is absent or knows nothing of them.
    """
    size = max(int(os.environ.get(name, 1)) for name in _SIZES)
    if size == 1:
        return ALONE
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter: there is no MPI library
        raise UserError(
            f"{size} processes were started together, which needs mpi4py ({error}): "
            "pip install 'xlstm_distill[mpi]'"
        ) from None
    if MPI.COMM_WORLD.size != size:
        raise UserError(
            f"{size} processes were started together, but mpi4py uses another MPI than they "
            f"({MPI.Get_library_version().splitlines()[0]}): start them with its own mpirun"
        )
    found = Mpi(MPI.COMM_WORLD)
    shown = sys.excepthook

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        shown(kind, error, trace)
        sys.stderr.flush()
        found.abort(130 if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = end
    return found
