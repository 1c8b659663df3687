"""State passing: what a student remembers of the rows before, stream by stream (`data.Rows`).

Truncated backpropagation through time: a row goes on from the state behind the row before it in its
stream, as numbers without a gradient, made with the weights that the student had then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import Batch, Batches
from .errors import UserError
from .model import Model
from .state import DecodeState, full_attention


class StreamStates:
    """States of all streams of all domains of `batches`.

    The states behind the rows of a step count once the step is done (`commit`): one that is broken
    off leaves no trace. UserError if a layer would have to remember every token.
    """

    def __init__(self, student: Model, batches: Batches) -> None:
        if layers := full_attention(student.config):
            raise UserError(
                f"state_passing: layer {layers[0]} attends without a window, and would keep the "
                "keys of whole documents; give it one"
            )
        if not batches.streams:
            raise UserError(
                "state_passing: the rows are not those of streams; pack them with "
                f"Rows(..., streams={batches.rows})"
            )
        self._student, self._streams = student, batches.streams
        self._first = {name: n * batches.streams for n, name in enumerate(batches.sources)}
        self._states = student.new_state(len(self._first) * batches.streams)
        self._behind: list[tuple[list[int], DecodeState]] = []

    def around(self, part: Batch) -> tuple[DecodeState, DecodeState]:
        """The states that the rows of `part` go on from, and empty ones for those behind them,
        which are to be set before `commit`."""
        places = [self._first[name] + number % self._streams for name, number in part.rows]
        behind = self._student.new_state(len(places))
        self._behind.append((places, behind))
        return self._states.fork(self._student, places), behind

    def commit(self) -> None:
        """The step is done: the states behind its rows are what the next rows go on from."""
        for places, behind in self._behind:
            self._states.put(places, behind)
        self._behind.clear()

    def state(self) -> dict[str, NDArray[Any]]:
        """Arrays from which `load_state` goes on."""
        return {"states": self._states.tensors.flat, "states_lengths": self._states.lengths}

    def load_state(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take up what `state` returned."""
        np.copyto(self._states.tensors.flat, arrays["states"])
        np.copyto(self._states.lengths, arrays["states_lengths"])
