"""Which of a tensor's first two axes counts tokens: some models work on (T, B, D)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tdgeom.core.surroundings import steady
from tdgeom.model.calls.forward_signature import read_signature
from tdgeom.model.calls.model_inputs import made_up_inputs
from tdgeom.model.calls.quiet import without_hooks
from tdgeom.model.calls.verified import verified
from tdgeom.model.structure.resolved_site import ResolvedSite

_TORCHS_OWN = (nn.MultiheadAttention, nn.RNNBase)


def is_time_first(
    model: nn.Module,
    entry: ResolvedSite,
    value: Tensor,
    tokens: tuple[int, int] | None,
    entries: Sequence[ResolvedSite],
) -> bool:
    """Whether a site's tensor is (T, B, ...), beside a call of (B, T) ``tokens`` where these are known.

    Told by the shape; where there are as many sequences as tokens, or no ids, by what torch's own modules say of themselves; else
    by one pass over made-up tokens, once a model. ``entries`` are looked at together in that pass.
    """
    if entry.in_softmax or value.ndim < 3:
        return False
    first = value.shape[0], value.shape[1]
    if tokens is not None and tokens[0] != tokens[1]:
        return first == (tokens[1], tokens[0])
    if tokens is not None and first != tokens:
        return False  # no axis of tokens at all
    known: dict[tuple[str, str], bool] = verified(model).setdefault("time first", {})
    place = entry.module_path, entry.side
    if place not in known:
        known[place] = _says_so(model, entry)
        if not known[place] and tokens is not None and tokens[0] > 1:
            known.update(_seen(model, entries))
    return known[place]


def _says_so(model: nn.Module, entry: ResolvedSite) -> bool:
    path = entry.module_path if entry.block_path is None else entry.block_path
    return any(isinstance(m, _TORCHS_OWN) and not m.batch_first for m in model.get_submodule(path).modules())


def _seen(model: nn.Module, entries: Sequence[ResolvedSite]) -> dict[tuple[str, str], bool]:
    """What the places look like in a pass over two sequences of five tokens; nothing where no tokens can be made up."""
    given = made_up_inputs(model, read_signature(model), 2, 5)
    first = next(model.parameters(), None)
    if given is None or first is None or first.is_meta:
        return {}
    found: dict[tuple[str, str], bool] = {}
    handles = []
    flags = [(module, module.training) for module in model.modules()]
    try:
        with without_hooks(model), steady(first.device), torch.no_grad():
            for module, _ in flags:
                module.training = False
            for entry in entries:
                if entry.in_softmax:
                    continue
                module, place = model.get_submodule(entry.module_path), (entry.module_path, entry.side)

                def look(value: Tensor | None, place: tuple[str, str] = place) -> None:
                    if value is not None and value.ndim > 2:
                        found[place] = value.shape[:2] == (5, 2)

                if entry.side == "input":
                    handles.append(
                        module.register_forward_pre_hook(
                            lambda _, args, kwargs, entry=entry, look=look: look(entry.read(args, kwargs)),
                            with_kwargs=True,
                        )
                    )
                else:
                    handles.append(
                        module.register_forward_hook(
                            lambda _, args, kwargs, output, entry=entry, look=look: look(
                                entry.read(args, kwargs, output)
                            ),
                            with_kwargs=True,
                        )
                    )
            model(**given)
    except Exception:  # it wants other inputs: the order of axes stays what it looks like
        return {}
    finally:
        for handle in handles:
            handle.remove()
        for module, training in flags:
            module.training = training
    return found
