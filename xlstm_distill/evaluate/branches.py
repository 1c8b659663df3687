"""What each branch of a hybrid student carries: the same weights with a part silenced or cut.

    gate 0         every output gate forced to 0: the window branch alone
    gate 1         every output gate forced to 1: the mLSTM alone
    mLSTM emptied  its state is emptied after every window of tokens: nothing from beyond the window
    window cut     the attention branch's window is halved in every hybrid layer that has one (64
                   become 32 tokens, an odd one is rounded down, 1 stays); its sinks stay

A student whose mLSTM matters gets worse in the first and the third; one that could do without its
window hardly does in the second; where the mLSTM stands in for what the window no longer sees, the
last is hardly worse. `fidelity` measures them like other students.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError
from ..model import Model


class Branch:
    """A student with a forced gate, or whose mLSTM forgets every `forget` tokens.

    It has what `Model.divergence` needs of a student.
    """

    def __init__(self, model: Model, gate: float | None = None, forget: int | None = None) -> None:
        self.model, self.gate, self.forget = model, gate, forget
        self.capsule, self.params = model.capsule, model.params

    def hidden(
        self, ids: ArrayLike, gate: float | None = None, reset: ArrayLike | None = None
    ) -> NDArray[Any]:
        """Hidden states after the last norm, [B, T, d], of int ids [B, T].

        Raises ValueError for resets where the mLSTM forgets.
        """
        gate = self.gate if gate is None else gate
        if self.forget is None:
            return self.model.hidden(ids, gate, reset)
        if reset is not None or gate is not None:
            raise ValueError("a student whose mLSTM forgets takes neither resets nor a gate")
        tokens = np.atleast_2d(np.asarray(ids))
        state = self.model.new_state(len(tokens), tokens.shape[1])
        parts = []
        for start in range(0, tokens.shape[1], self.forget):
            piece, state = self.model.hidden_after(tokens[:, start : start + self.forget], state)
            parts.append(piece)
            state.forget()
        return np.concatenate(parts, axis=1)


def branches(model: Model, name: str, place: str | None = None) -> dict[str, Branch]:
    """The variants of a hybrid student, "NAME, gate 0" and so on.

    Raises UserError, which names the model by its `place` (default: `name`), for one without a
    hybrid layer that has a window.
    """
    windows = [m.window for m in model.config.mixers if m.mixer == "hybrid"]
    known = [w for w in windows if w is not None]
    if not known:
        raise UserError(
            f"{place or name}: has no hybrid layer with a window, so nothing to take apart"
        )
    return {
        f"{name}, gate 0": Branch(model, gate=0.0),
        f"{name}, gate 1": Branch(model, gate=1.0),
        f"{name}, mLSTM emptied": Branch(model, forget=max(known)),
        f"{name}, window cut": Branch(_with_half_windows(model)),
    }


def _with_half_windows(model: Model) -> Model:
    """A model with the same parameters, in the same memory, and half the windows of hybrids."""
    mixers = [
        m.model_copy(update={"window": max(1, m.window // 2)})
        if m.mixer == "hybrid" and m.window is not None
        else m
        for m in model.config.mixers
    ]
    cut = copy.copy(model)
    cut.config = model.config.model_copy(update={"mixers": mixers})
    cut.compute = model.compute  # gives the core the new configuration
    return cut
