"""What a model runs after its last block as a linear map: the final norm keeps the statistics that it had in a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdgeom.core.devices import doubled
from tdgeom.model.lens.frozen_norm import FrozenNorm
from tdgeom.model.lens.tail import Tail

# logits of a part times this power of two stay far below any soft cap: exact, and 1e-7 of the way to a tangent
_SMALL = 2.0**-12
_ENTRIES = 2**26  # of logits at once


class LinearTail:
    """The map from the last block's output to the logits, linear once the final norm's statistics are those of the pass.

    What is soft-capped is read before the cap. That the map gives the model's own logits (through the cap, where there is one)
    is checked on the rows of the pass.

    Args:
        tail: what the model runs after its last block.
        rows: the last block's output in the pass, (N, D).

    Attributes: ``norm``, the frozen final norm or ``None``; ``logits``, the rows' own (N, V); ``before_cap``, the same before
    soft-capping; ``cap``, the cap or ``None``; ``offset`` (V,), the logits of no stream at all: the norm's bias, read out, and
    the head's; ``head_bias`` (V,), the second of the two.

    Raises ``ValueError`` for a head that transforms its input in other ways (BERT's), and for pooling heads.
    """

    @torch.no_grad()
    def __init__(self, tail: Tail, rows: Tensor) -> None:
        tail.check_per_token()
        tail.check_width(rows)
        self.tail, self.norm = tail, None
        seen: list[tuple[Tensor, Tensor]] = []
        if tail.norm is not None:
            plain = tail.norm.forward

            def watched(value: Tensor, *args: Any, **kwargs: Any) -> Any:
                gave = plain(value, *args, **kwargs)
                seen.append((value, gave))
                return gave

            self.logits = tail.rows(rows, {tail.norm: watched})
            if len(seen) != 1 or not isinstance(seen[0][1], Tensor) or seen[0][0].numel() != rows.numel():
                raise ValueError(
                    f"the final norm of {tail.name} ran {len(seen)} times behind its last block: whose statistics to hold "
                    "fixed is not clear."
                )
            self.norm = FrozenNorm(tail.norm, *(value.reshape(len(rows), -1) for value in seen[0]))
        else:
            self.logits = tail.rows(rows, {})
        nothing = torch.zeros_like(rows[:1])
        self.offset = self._run(nothing, slice(0, 1))[0]
        self.head_bias = self.offset if self.norm is None else self._run(nothing, slice(0, 1), silent=True)[0]
        whole = self._run(rows, slice(None))
        self.curved = not self._agree(self._run(rows / 2, slice(None)) * 2 - self.offset, whole)
        self.before_cap = self.linear(rows) + self.offset
        self.cap, capped = None, self.before_cap
        for cap in self._caps() if self.curved else ():
            self.cap, capped = cap, cap * torch.tanh(self.before_cap / cap)
            if self._agree(capped, self.logits):
                break
        if not self._agree(capped, self.logits):
            raise ValueError(
                f"the head of {tail.name} is no linear map behind a norm, not even before a soft cap: with the norm's "
                f"statistics held fixed, it misses the model's logits by {float((capped - self.logits).abs().max()):.2g}. A "
                "transform with an activation in it (BERT's) gives parts of the stream no logits of their own. Remedy: "
                "activation_patching, which asks the model itself."
            )

    def linear(self, parts: Tensor) -> Tensor:
        """The logits of parts of the rows' streams, (N, D) -> (N, V), before any cap; the offset belongs to no part."""
        step = _SMALL if self.curved else 1.0
        return (self._run(parts * step, slice(None)) - self.offset) / step

    def directions(self, answers: Tensor) -> Tensor:
        """What reads an answer's logit from each row's stream, (N, A) token ids -> (N, A, D) in float64."""
        count, found = answers.shape[1], []
        each = max(1, _ENTRIES // max(1, self.tail.vocabulary * count))
        for ids in torch.arange(len(answers), device=answers.device).split(each):
            with torch.enable_grad():
                start = self.logits.new_zeros(len(ids) * count, self.tail.width).requires_grad_()
                logits = self._run(start, ids.repeat_interleave(count), keep=True)
                total = logits.gather(1, answers[ids].reshape(-1, 1)).sum()
                (gradient,) = torch.autograd.grad(total, start)
            found.append(doubled(gradient.reshape(len(ids), count, -1)))
        return torch.cat(found)

    def _caps(self) -> list[float]:
        """What the logits may be capped at: what the configuration calls so, then what their largest tells, if less exactly."""
        config = getattr(self.tail.require(self), "config", None)
        told = (
            [*vars(config).items(), *vars(getattr(config, "text_config", None) or config).items()]
            if config
            else []
        )
        named = [v for name, v in told if "cap" in name and isinstance(v, int | float) and v > 0]
        measured = soft_cap(self.before_cap, self.logits)
        return [*map(float, named), *([] if measured is None else [measured])]

    def _agree(self, found: Tensor, expected: Tensor) -> bool:
        return agree(found, expected, expected.abs().max(), self.logits.dtype)

    def _run(self, rows: Tensor, which: Any, *, silent: bool = False, keep: bool = False) -> Tensor:
        """Logits of rows, with the norm as it was in the rows ``which`` of the pass."""
        instead: dict[nn.Module, Callable] = {}
        if self.norm is not None and self.tail.norm is not None:
            norm, scale = self.norm, self.norm.scale[which]

            def forward(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                wide = doubled(value)
                centred = wide - wide.mean(-1, keepdim=True) if norm.centres else wide
                own = scale.reshape(*value.shape[:-1], 1)
                return ((0.0 if silent else norm.bias) + norm.gain * centred * own).to(value)

            instead = {self.tail.norm: forward}
        with torch.set_grad_enabled(keep):
            logits = self.tail.rows(rows.to(self.logits.dtype), instead)
        return logits if keep or logits.dtype == torch.float64 else logits.float()


def agree(found: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are one up to rounding, in a model of this dtype, of numbers of a size that broadcasts to theirs."""
    roundings = 64 if torch.finfo(dtype).eps < 1e-4 else 8
    error = (doubled(found) - doubled(expected)).abs()
    return bool((error <= roundings * torch.finfo(dtype).eps * doubled(size) + 1e-30).all())


def soft_cap(before: Tensor, after: Tensor) -> float | None:
    """The cap c of ``after = c tanh(before / c)``, from the largest logit; ``None`` where that has not been made smaller.

    >>> round(soft_cap(torch.tensor([1.0, 40.0]), 30 * torch.tanh(torch.tensor([1.0, 40.0]) / 30)), 3)
    30.0
    """
    place = before.abs().argmax()
    raw, capped = abs(float(before.reshape(-1)[place])), abs(float(after.reshape(-1)[place]))
    if not 0 < capped < raw:
        return None
    low, high = capped, 1e6 * raw
    for _ in range(200):
        middle = (low * high) ** 0.5
        value = middle * float(torch.tanh(torch.tensor(raw / middle, dtype=torch.float64)))
        low, high = (middle, high) if value < capped else (low, middle)
    return low
