"""The error that users meet.

A `UserError` is one line that names the thing that is wrong (key, tensor, file) and, where there is
one, the fix. The command line prints that line and ends with exit status 1, or with 2 where the
command was used wrongly (`usage=True`). Everything else that escapes is a defect of this package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

_Model = TypeVar("_Model", bound=BaseModel)


class UserError(ValueError):
    """A mistake or a damaged input, worded for the user in one line.

    `usage` is True where the command line or an argument is wrong (exit status 2) and False where
    the work itself failed (exit status 1).
    """

    def __init__(self, message: str, *, usage: bool = False) -> None:
        super().__init__(" ".join(spelt(message).split()))
        self.usage = usage


def spelt(text: str) -> str:
    """The text with backslashes for what UTF-8 cannot spell: names of files may be any bytes, and
    keys of JSON half a surrogate pair, but manifests and logs are UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def short(value: object) -> str:
    """A value for a message: its beginning where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_choice(name: str, value: object, known: Sequence[object]) -> None:
    """UserError that names a setting with its value and those that there are, if it is not one."""
    if value not in known:
        raise UserError(f"{name} is {value!r}, expected one of {', '.join(map(str, known))}")


def check_package(package: str, extra: str, who: str) -> None:
    """UserError for `who` needs it, naming the extra to install, if a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{who} needs the package {package}: pip install 'xlstm_distill[{extra}]'", usage=True
        )


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error as `key: what is wrong`, in one line.

    A misspelt key is named with its path (`mixers.3.windw: unknown key`).
    """
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        text = "unknown key"
    elif problem["type"] == "missing":
        text = "missing"
    else:
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] != "value_error" and isinstance(
            problem.get("input"), str | int | float | bool | None
        ):
            text += f", found {problem['input']!r}"
    return f"{key}: {text}" if key else text


def validated(
    kind: type[_Model], values: Mapping[str, Any], where: str, *, usage: bool = False
) -> _Model:
    """Build the pydantic model `kind` from `values`.

    `where` (a file or a key) opens the message of the `UserError` that a bad value raises.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error)}", usage=usage) from None
