"""Capture: read a model's activations, as a TensorDict module or around the user's own calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor, nn

from tdgeom.core.keys import Key
from tdgeom.model.calls.checked_sites import choices_beside, resolve_sites
from tdgeom.model.calls.model_inputs import InKeys
from tdgeom.model.calls.recorded_calls import LastRecord
from tdgeom.model.calls.repeated_calls import CallsSpec
from tdgeom.model.capture_batches import CaptureBatches
from tdgeom.model.capture_calls import CaptureCalls
from tdgeom.model.capture_keys import name_leaves, prefixed
from tdgeom.model.sites import LayerSpec, Site
from tdgeom.model.structure.meant_sites import listed_sites
from tdgeom.model.structure.resolved_site import ResolvedSite
from tdgeom.model.structure.select_heads import HeadSpec


class Capture(CaptureBatches, CaptureCalls):
    """Reads named places of a model: a TensorDict module, and a context manager around the user's own calls.

    **Module form**, ``capture(td)``: runs the model in eval mode without gradients and without a cache, on every
    tensor of ``td`` that its forward takes (labels and row identities excepted), and stops right after the last site. Nothing
    is made up for a batch without padding; a padded one gets ``position_ids`` only in a numbering with which a sequence gives
    what it gives alone: checked once a model and padding side on one of its sequences, and refused with the remedy where
    there is none. Writes ``("acts", site)``, shape (B, T, D), or
    (B, D) where the model gives that; everything else in ``td`` stays.

    **Context form**, ``with capture as calls:``: changes nothing about the calls the user makes; ``calls`` gets
    one TensorDict a model call with the keys of the module form and the tensors that the call was given.

    **Order.** Contexts on one model act in the order in which they are entered: a Capture inside an ``Intervene``
    reads what the edits left, one outside of it reads what was there before. Hooks of others are run before a Capture reads,
    except by one around an ``Intervene``.

    **Calls.** A call is what the outermost module runs: the model, or a part of it that is called instead (by a wrapper's
    ``generate``). A part that ran on its own right before (an encoder) belongs to the call of the whole that does not run it
    again. It belongs to the thread that began it, with the threads that it starts itself (replicas, whose parts of the batch
    are put together).

    Args:
        model: any ``nn.Module`` that is not compiled. It stays the user's: neither registered, moved nor saved.
        sites: kinds, concrete names (``"residual_output.-1"``), ``"module_output:<glob>"``, compiled regular expressions
            (they match a whole module path and stand for its output), or a list of them. The path of a module, or the module,
            stands for its output; other libraries' words for the same tensor (``"blocks.0.hook_resid_pre"``) are understood.
            ``[1]`` or ``['name']`` behind a path is that tensor of a tuple, mapping or dataclass;
            ``"module_output:<root>"`` is what the model itself gives.
            ``"router_logits"`` brings what the routers have chosen along, under the names of ``router_choice``.
        layers: ``"all"``, an int, a list (negative counts from the end), a slice or ``"0,3,7"``; applies to kinds, and to
            globs and expressions, of which those in the blocks of these layers are kept.
        heads: query heads to read at sites with heads, (B, T, heads, Dh) or (B, heads, Tq, Tk), or a mapping from layers to
            heads; where queries share key/value heads, ``k`` and ``v`` give the one that each of these heads uses.
        direction: ``"forward"``, or ``"backward"`` for gradients, ``("grads", site)``: in module form of ``target``, in
            context form of what the user calls ``backward`` on inside the ``with`` block. The gradient of what a module
            receives is the one through that module alone.
        target: output of the model -> scalar, what the module form takes gradients of (needed for ``"backward"``).
        callback: called with the site and its tensor as it is read; what it returns (unless None) is kept instead.
        classes, skip_classes: classes of modules to take or leave among those that ``sites`` stands for.
        nested: put module sites under their path's parts, ``("acts", "h", "0", "mlp")``.
        cache: a TensorDict that every call's activations are also written to, the last call winning.
        model_outputs: names of the model's outputs to keep, under ``prefix + name``; the pass then runs to its end.
        prefix: put before each site's name, ``"b/"``, to keep two models apart.
        keep_graph: keep the autograd graph (and the ambient grad mode) instead of detaching.
        clone: copy what is read, for models that modify it in place later in the pass. (What a model writes again at its next
            call, a static buffer say, is seen and copied without.)
        withhold: further entries that the model is never called with; ``["position_ids"]`` also leaves padded batches
            unchecked.
        in_keys: what the module form demands: a list of keys, or a mapping of forward names to keys. Default: the
            model's main input, or every parameter of forward without a default. The attribute ``in_keys`` goes on with the
            other tensors that forward takes, which are passed where the batch has them (``optional_in_keys``).
        out_keys: the root of the activations' keys (default ``"acts"``; ``"grads"`` for gradients), or a list naming every
            leaf.
        calls: which call is meant of a module that runs several times in one pass: ``"first"``, ``"last"``, a number from 0, or
            ``"all"`` of them, (B, calls, ...). Default: such a module is an error. Layers that share a block are told apart
            without it.
        threads: ``"all"`` reads the calls of every thread in context form, default the entering thread's ``"own"``.

    Attributes: ``sites``, a list of :class:`Site` in execution order; ``module_paths``, site -> module path.

    What is *added* to the stream (``attn_output``, ``mlp_output``) is read before the block's residual dropout, which
    does nothing in eval mode. ``embed`` is the input of the first block. A block listed several times is one layer
    each time. Raises an error that says what was expected, what came and the remedy for unknown kinds, layers out of
    range, paths that match nothing, compiled models, and sites that never fire or fire more often than they should.

    >>> import torch
    >>> from tensordict import TensorDict
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> capture = Capture(model, "residual_output", in_keys=["x"])
    >>> td = capture(TensorDict({"x": torch.ones(3, 4)}))
    >>> td["acts", "residual_output.1"].shape
    torch.Size([3, 4])
    >>> with capture as calls:
    ...     _ = model(torch.ones(2, 4))
    >>> calls[0]["acts", "residual_output.0"].shape
    torch.Size([2, 4])
    """

    _told_anew = frozenset({"cache"})
    heads: HeadSpec
    nested: bool
    prefix: str
    _asked: dict[str, Any]
    _asked_for: int
    _with_choices: bool

    def __init__(
        self,
        model: nn.Module,
        sites: str | re.Pattern | Iterable[str | re.Pattern] = "residual_input",
        *,
        layers: LayerSpec = "all",
        heads: HeadSpec = None,
        direction: str = "forward",
        target: Callable[[Any], Tensor] | None = None,
        callback: Callable[[Site, Tensor], Tensor | None] | None = None,
        classes: Sequence[type[nn.Module]] = (),
        skip_classes: Sequence[type[nn.Module]] = (),
        nested: bool = False,
        cache: TensorDictBase | None = None,
        model_outputs: str | Sequence[str] | None = None,
        prefix: str = "",
        keep_graph: bool = False,
        clone: bool = False,
        withhold: Sequence[str] = (),
        in_keys: InKeys | None = None,
        out_keys: Key | list[Key] | None = None,
        calls: CallsSpec = None,
        threads: str = "own",
    ) -> None:
        if direction not in ("forward", "backward"):
            raise ValueError(f"direction= expects 'forward' or 'backward', got {direction!r}.")
        self._set_plain(
            _asked={
                "sites": listed_sites(model, sites),
                "layers": layers,
                "prefix": prefix,
                "heads": heads,
                "classes": tuple(classes),
                "skip_classes": tuple(skip_classes),
            },
            # what a router has chosen comes with its logits, where nothing counts the sites one by one
            _with_choices=direction == "forward" and callback is None and not isinstance(out_keys, list),
        )
        super().__init__(
            model,
            model_outputs=model_outputs,
            keep_graph=keep_graph,
            withhold=withhold,
            in_keys=in_keys,
            calls=calls,
            threads=threads,
        )
        if self.calls == "all" and direction == "backward":
            raise ValueError(
                "calls='all' gives activations; for gradients give the number of a call, 'first' or 'last'."
            )
        self.target, self.callback = target, callback
        all_sites = [entry.site for entry in self._bound.sites]
        root: Key = "acts" if direction == "forward" else "grads"
        leaves = name_leaves(
            root if out_keys is None else out_keys,
            all_sites,
            prefixed(self.model_outputs, prefix),
            nested=nested,
            asked=self._asked_for,
        )
        self._set_plain(
            direction=direction,
            heads=heads,
            nested=nested,
            cache=cache,
            prefix=prefix,
            clone=clone,
            sites=all_sites[: self._asked_for],
            _all_sites=all_sites,
            _leaves=leaves,
            _last=LastRecord(leaves),
            _readings=None,
            _recording=Lock(),
        )
        self.out_keys: list[Any] = list(leaves)

    def _current(self) -> dict[str, Any]:
        """The settings; of a cache that there is one, whatever has been written to it."""
        return {
            **super()._current(),
            "cache": None if self.cache is None else {"object": type(self.cache).__name__},
        }

    def resolve(self, model: nn.Module) -> list[ResolvedSite]:
        """The sites asked for, in a model, and behind them those that come along."""
        entries = resolve_sites(model, **self._asked)
        self._set_plain(_asked_for=len(entries))
        return [*entries, *(choices_beside(model, entries) if self._with_choices else ())]
