"""What holds inside of a with statement, for the thread that is in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def assigned(variable: ContextVar[T], value: T) -> Iterator[None]:
    """In here the variable has the value; afterwards it has what it had before."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
