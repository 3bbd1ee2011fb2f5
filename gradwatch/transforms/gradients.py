"""What a transform sees and may do: norms and gradients where they lie, and factors that are applied at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

Include: TypeAlias = str | tuple[str, ...]


class Gradients:
    """The gradients of one optimizer's step, on their device. Nothing here waits for it.

    A transform reads `norms` and `global_norm`, and scales; factors multiply up and reach the gradients in one pass
    when all transforms have had their turn. Values that are not finite stay as they are: no factor is ever NaN.
    """

    def __init__(  # noqa: PLR0913 - what a step is made of
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        norms: Tensor,
        *,
        nonfinite: Tensor,
        divisor: Tensor | None = None,
        loss: Tensor | float | None = None,
    ) -> None:
        self.names = tuple(names)
        """Of the tensors that have a gradient, in depth order."""
        self.params = list(params)
        self.grads = list(grads)
        """As they are in memory: still multiplied by `divisor`, if there is one."""
        self.divisor = divisor
        self.loss = loss
        self.nonfinite = nonfinite
        """True if any gradient holds a NaN or infinite element; shape []."""
        self.skip: Tensor | None = None
        """True once a transform has vetoed the step; shape []. None while none that can was asked."""
        self._norms = norms
        self._factor: Tensor | None = None
        self._factors: Tensor | None = None
        self.dry = False
        """While True nothing is changed: what would be done is computed all the same."""

    # -- what a transform reads ----------------------------------------------------------------------------------

    @property
    def norms(self) -> Tensor:
        """L2 norm of each gradient over its finite elements, unscaled, with the factors so far; shape [tensors]."""
        norms = self._norms
        norms = norms if self._factors is None else norms * self._factors
        return norms if self._factor is None else norms * self._factor

    @property
    def global_norm(self) -> Tensor:
        """L2 norm over all tensors; shape []."""
        norm: Tensor = torch.linalg.vector_norm(self.norms)
        return norm

    def norm_of(self, rows: Tensor | None) -> Tensor:
        """L2 norm over the tensors in `rows`, or over all; shape []."""
        return self.global_norm if rows is None else torch.linalg.vector_norm(self.norms[rows])

    def rows(self, include: Include) -> Tensor | None:
        """Positions of the tensors whose names match; None if all do."""
        globs = (include,) if isinstance(include, str) else include
        return None if "*" in globs else _rows_on(self.names, globs, self._norms.device)

    # -- what a transform does ---------------------------------------------------------------------------------------

    def scale_(self, factor: Tensor, rows: Tensor | None = None) -> Tensor:
        """Multiply all gradients, or those in `rows`, by one factor; shape []. Returns it, finite in any case."""
        factor = _finite(factor)
        if rows is not None:
            return self.scale_each_(factor.expand(len(rows)), rows).amin()
        if not self.dry:
            self._factor = factor if self._factor is None else self._factor * factor
        return factor

    def scale_each_(self, factors: Tensor, rows: Tensor | None = None) -> Tensor:
        """Multiply each gradient, or each in `rows`, by its own factor; shape [tensors] or [rows]."""
        factors = _finite(factors)
        if not self.dry:
            every = factors if rows is None else torch.ones_like(self._norms).index_put((rows,), factors)
            self._factors = every if self._factors is None else self._factors * every
        return factors

    def clamp_(self, limit: float, include: Include = "*") -> None:
        """Clamp every element to [-limit, limit], after the factors so far; NaN stays, infinity becomes the limit."""
        if self.dry:
            return
        self.apply()
        globs = (include,) if isinstance(include, str) else include
        for grad in _dense([self.grads[row] for row in matching(self.names, globs)]):
            if self.divisor is None:
                grad.clamp_(-limit, limit)
            else:
                ceiling = (limit * self.divisor).to(grad.device, grad.dtype)
                grad.clamp_(-ceiling, ceiling)
        self.measure()

    def scale_units_(self, compute: Callable[[Tensor, Tensor], Tensor], rows: Sequence[int]) -> None:
        """Multiply each gradient by what `compute(parameter, unscaled gradient)` returns, broadcast over it."""
        if self.dry:
            return
        self.apply()
        for row in rows:
            grad = self.grads[row]
            values = grad._values() if grad.is_sparse else grad  # noqa: SLF001 - shares the gradient's memory
            unscaled = values if self.divisor is None else values / self.divisor
            values.mul_(_finite(compute(self.params[row], unscaled)).to(values.dtype))
        self.measure()

    def veto(self, flag: Tensor) -> None:
        """Skip this step if `flag` is true; shape []."""
        if not self.dry:
            self.skip = flag if self.skip is None else self.skip | flag

    # -- for the lane --------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Factors wait to be applied."""
        return self._factor is not None or self._factors is not None

    @property
    def only_factor(self) -> Tensor | None:
        """The one factor for all tensors, if that is all there is to apply."""
        return self._factor if self._factors is None else None

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest factor that waits."""
        factor = self._norms.new_ones(()) if self._factor is None else self._factor
        if self._factors is None or not len(self._factors):
            return factor, factor
        return factor * self._factors.amin(), factor * self._factors.amax()

    def forget(self) -> None:
        """Drop the factors that wait, which are one."""
        self._factor = self._factors = None

    def apply(self) -> None:
        """Multiply the gradients by the factors that wait."""
        if not self.pending:
            return
        self._norms, factor, factors = self.norms, self._factor, self._factors
        self._factor = self._factors = None
        if not self.grads:
            return
        if factors is None and factor is not None:
            for group in _by_kind(_dense(self.grads)):
                torch._foreach_mul_(group, factor.to(group[0].device))
            return
        every = torch.ones_like(self._norms) if factors is None else factors
        every = every if factor is None else every * factor
        for grad, one in zip(_dense(self.grads), every.unbind(), strict=True):
            grad.mul_(one.to(grad.device, grad.dtype, non_blocking=True))

    def measure(self) -> None:
        """Read the norms afresh, in float32 at least: half precision ends at 65,504."""
        dense = _dense(self.grads)
        norms = [torch.linalg.vector_norm(grad, dtype=_wide(grad)) for grad in dense]
        device, dtype = self._norms.device, self._norms.dtype
        if norms:
            measured = torch.stack([norm.to(device, dtype, non_blocking=True) for norm in norms])
            self._norms = measured if self.divisor is None else measured / self.divisor.to(dtype)
            self.nonfinite = self.nonfinite | ~torch.isfinite(self._norms).all()


Transform: TypeAlias = Callable[[Gradients], object]
"""Changes gradients; may return its factor for the log, and remember by `state()` and `restore(state)`."""


@lru_cache(maxsize=64)
def matching(names: tuple[str, ...], globs: tuple[str, ...]) -> tuple[int, ...]:
    """Return the positions of the names that any of the globs matches."""
    return tuple(row for row, name in enumerate(names) if any(fnmatchcase(name, glob) for glob in globs))


@lru_cache(maxsize=64)
def _rows_on(names: tuple[str, ...], globs: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor(matching(names, globs), dtype=torch.long, device=device)


def _finite(factor: Tensor) -> Tensor:
    """Leave gradients alone where a factor is not a number: zero times infinity is NaN."""
    return factor.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)


def _dense(grads: Sequence[Tensor]) -> list[Tensor]:
    """Return the memory to change in place: the values of sparse gradients, both parts of complex ones."""
    dense = [grad._values() if grad.is_sparse else grad for grad in grads]  # noqa: SLF001
    return [torch.view_as_real(grad) if grad.is_complex() else grad for grad in dense]


def _wide(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)


def _by_kind(grads: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group by device and dtype, as one call takes only one kind."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        groups.setdefault((grad.device, grad.dtype), []).append(grad)
    return list(groups.values())
