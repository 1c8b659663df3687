"""Every op of the C core against the reference, for every case of the registry (cases.py)."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from cases import CASES, Case, Values
from tolerances import CELL_F32, OP_F32, OP_F64

from xlstm_distill import ops, reference
from xlstm_distill.testing import assert_close

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
both_types = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])


def tolerance(case: Case, dtype: type) -> float:
    if dtype == np.float64:
        return OP_F64
    return CELL_F32 if case.op.cell else OP_F32


def evaluate(module, case: Case, args: dict, cotangents: Values) -> Values:
    """Outputs and gradients (as d<argument>) of a case on one module."""
    values = dict(case.op.forward(module, args))
    if case.op.backward:
        gradients = case.op.backward(module, args, cotangents)
        values |= {f"d{name}": a for name, a in gradients.items()}
    return values


def cotangents_of(case: Case, dtype: type) -> Values:
    exact = case.op.forward(reference, case.cast(np.float64))
    return {n: d.astype(dtype) for n, d in case.random_cotangents(exact).items()}


def compare(found: Values, expected: Values, tolerance: float, what: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if np.asarray(value).dtype.kind in "iub":
            assert np.array_equal(found[name], value), f"{what} {name}"
        else:
            assert_close(found[name], value, tolerance, f"{what} {name}")


@pytest.mark.parametrize("name", ops.__all__)
def test_names_and_signatures_are_those_of_the_reference(name):
    def shape(function):
        """Without `mixed`: the specification does not round."""
        return [
            (p.name, p.default, p.kind)
            for p in inspect.signature(function).parameters.values()
            if p.name != "mixed"
        ]

    assert shape(getattr(ops, name)) == shape(getattr(reference, name))


def test_every_op_has_a_case():
    covered = {name for case in CASES for name in case.op.functions}
    assert covered == set(ops.__all__)


@every_case
@both_types
def test_equals_the_reference(case, dtype):
    """float32 is compared with float64 arithmetic on the same rounded inputs: its true error."""
    rounded = case.cast(dtype)
    widened = {
        n: a.astype(np.float64) if getattr(a, "dtype", None) == dtype else a
        for n, a in rounded.items()
    }
    cotangents = cotangents_of(case, dtype)
    exact = {n: d.astype(np.float64) for n, d in cotangents.items()}
    expected = evaluate(reference, case, widened, exact)
    found = evaluate(ops, case, rounded, cotangents)
    kind = "f64" if dtype == np.float64 else "f32"
    compare(found, expected, tolerance(case, dtype), f"{case.name} {kind}")
    for name in (*case.op.cotangents, *(f"d{n}" for n in case.wrt)):
        if name in found and found[name].ndim:
            assert found[name].dtype == dtype, f"{name} is {found[name].dtype}"


@every_case
@both_types
def test_every_instruction_set_gives_the_generic_result(case, dtype, runtime):
    args, cotangents = case.cast(dtype), cotangents_of(case, dtype)
    runtime.set_isa("generic")
    expected = evaluate(ops, case, args, cotangents)
    for isa in runtime.available_isas():
        runtime.set_isa(isa)
        found = evaluate(ops, case, args, cotangents)
        compare(found, expected, tolerance(case, dtype), f"{case.name} {isa} against generic")


@every_case
def test_threads_do_not_change_a_bit(case, runtime):
    args, cotangents = case.cast(np.float32), cotangents_of(case, np.float32)
    runtime.set_threads(1)
    expected = evaluate(ops, case, args, cotangents)
    for threads in (2, 3):
        runtime.set_threads(threads)
        for name, value in evaluate(ops, case, args, cotangents).items():
            assert np.array_equal(value, expected[name], equal_nan=True), f"{name}, {threads}"


@every_case
def test_arguments_are_not_written(case):
    args, cotangents = case.cast(np.float32), cotangents_of(case, np.float32)
    before = {n: a.copy() for n, a in args.items() if isinstance(a, np.ndarray)}
    evaluate(ops, case, args, cotangents)
    for name, a in before.items():
        assert np.array_equal(args[name], a, equal_nan=a.dtype.kind == "f"), name
