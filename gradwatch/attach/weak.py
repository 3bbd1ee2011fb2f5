"""A hook that neither keeps its owner alive nor breaks copies of what it hangs on."""

from __future__ import annotations

import weakref
from collections.abc import Callable


class WeakHook:
    """Calls a method of an owner that it does not keep alive; copies and pickles of it do nothing.

    A bound method in a module's hooks makes ``copy.deepcopy(model)`` and ``torch.save(model)`` copy the watch with its
    files, and a closure in a parameter's hooks is a cycle that the garbage collector does not see.
    """

    __slots__ = ("_arguments", "_method", "_owner")

    def __init__(self, method: Callable[..., object] | None = None, *arguments: object) -> None:
        self._owner = None if method is None else weakref.ref(method.__self__)  # type: ignore[attr-defined]
        self._method = "" if method is None else method.__name__
        self._arguments = arguments

    def __call__(self, *arguments: object, **keywords: object) -> object:
        """Call the owner's method, if the owner still lives."""
        owner = None if self._owner is None else self._owner()
        if owner is None:
            return None
        return getattr(owner, self._method)(*self._arguments, *arguments, **keywords)

    def __deepcopy__(self, memo: object) -> WeakHook:
        return WeakHook()

    def __reduce__(self) -> tuple[type[WeakHook], tuple[()]]:
        return (WeakHook, ())
