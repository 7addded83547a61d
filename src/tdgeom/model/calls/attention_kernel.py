"""Attention kernels: one whose softmax can be looked at while a context is entered, and the look at it.

``attn_scores`` is exactly what the softmax receives: scaled, soft-capped and with the mask added. ``attn_pattern`` is
what it gives, before dropout; in models with attention sinks its last column is the sink. Both are found by watching the
softmax that an attention module calls, so no attention is written a second time here. The user's kernel stays where it is
the eager one or torch's ``scaled_dot_product_attention``, which is taken apart into what it is documented to compute; any
other is the eager one while a context is entered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tdgeom.model.calls.own_hooks import hold, release
from tdgeom.model.calls.verified import verified

# what a watcher gets: the side ("queries", "keys", "scores", "pattern") and the tensor; it returns the tensor to go on with
Watcher = Callable[[str, Tensor], Tensor]
Wanted = Callable[[], bool]  # whether the watcher looks at the call that runs: not at those of other threads
Look = Callable[[list[Watcher]], Any]
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_ADDED_PRODUCTS = {torch.baddbmm, Tensor.baddbmm}
_SOFTMAX = {functional.softmax, torch.softmax, Tensor.softmax}
_VISIBLE = ("eager", "sdpa", None)
_WATCHED: WeakKeyDictionary[nn.Module, tuple[list[tuple[Watcher, Wanted]], Any]] = WeakKeyDictionary()
_CUTTERS: WeakKeyDictionary[nn.Module, list[ref]] = WeakKeyDictionary()


@contextmanager
def visible_attention(model: nn.Module) -> Iterator[None]:
    """Inside, kernels that nobody can look into are the eager one in every configuration of ``model``; afterwards as before."""
    changed: list[tuple[Any, Any]] = []
    try:
        for config in _configs(model):
            own = config._attn_implementation_internal
            if own not in _VISIBLE:
                changed.append((config, own))
                # not the public setter: it also writes to configurations below, which are restored one by one
                config._attn_implementation_internal = "eager"
        if changed and not verified(model).setdefault("other kernel is said", False):
            verified(model)["other kernel is said"] = True
            warnings.warn(
                f"nobody can look into the attention kernel {changed[0][1]!r} of {type(model).__name__}: while patterns are read "
                "or edited, calls run with the eager kernel, and what they give may differ from the model's own by more than "
                "rounding. Remedy: model.set_attn_implementation('sdpa') or 'eager' for what is compared with them.",
                stacklevel=2,
            )
        yield
    finally:
        for config, own in reversed(changed):
            config._attn_implementation_internal = own


def _configs(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    waiting = [module.__dict__.get("config") for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()]
    return list(found.values())


def padding_cutters(model: nn.Module) -> list[nn.Module]:
    """The ``nn.TransformerEncoder`` in a model that may cut padding out of its batches (nested tensors)."""
    cutters = _CUTTERS.get(model)
    if cutters is None:
        # one look a model: this is asked for at every call
        found = [ref(m) for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
        cutters = _CUTTERS[model] = found
    return [module for cutter in cutters if (module := cutter()) is not None]


@contextmanager
def whole_batches(model: nn.Module) -> Iterator[None]:
    """Inside, batches stay (B, T, D): layers with hooks have no fast path, and the slow one takes no nested tensors."""
    changed: list[Any] = [module for module in padding_cutters(model) if module.use_nested_tensor]
    try:
        for module in changed:
            module.use_nested_tensor = False
        yield
    finally:
        for module in changed:
            module.use_nested_tensor = True


@contextmanager
def watch_softmax(
    module: nn.Module,
    watcher: Watcher,
    heads: int | None = None,
    wanted: Wanted = lambda: True,
    look: Look | None = None,
) -> Iterator[None]:
    """Inside, ``watcher`` sees and may replace what the softmax in ``module.forward`` receives and gives.

    Watchers of one module see queries, keys, scores and patterns in the order in which they came, as (B, H, ...) also where
    the module has (B * H, ...), of ``heads`` heads. ``look`` is what is entered instead around a forward of another sort.
    """
    if module not in _WATCHED:
        # other libraries (offloading) put their forward there too
        own = module.__dict__.get("forward")
        _WATCHED[module] = [], own
        forward, seen = module.forward, _WATCHED[module][0]

        def watched(*args: Any, **kwargs: Any) -> Any:
            here = [watcher for watcher, wanted in seen if wanted()]
            if not here:
                return forward(*args, **kwargs)
            with _Softmax(here, heads) if look is None else look(here):
                return forward(*args, **kwargs)

        hold(module).forward = own
        module.forward = watched
    watchers, own = _WATCHED[module]
    watchers.append((watcher, wanted))
    try:
        yield
    finally:
        watchers.remove((watcher, wanted))
        if not watchers:
            del _WATCHED[module]
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own
            release(module)


class _Softmax(TorchFunctionMode):
    """Shows softmaxes over (B, H, Tq, Tk) to the watchers, and the first product of heads; SDPA is taken apart into these."""

    def __init__(self, watchers: list[Watcher], heads: int | None) -> None:
        super().__init__()
        self.watchers, self.heads, self.multiplied = watchers, heads, False

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SOFTMAX:
            scores = args[0] if args else kwargs["input"]
            rest = {name: value for name, value in kwargs.items() if name != "input"}
            if scores.ndim == 4:
                return self.softmax(scores, lambda x: func(x, *args[1:], **rest))
            if scores.ndim == 3 and self.heads and scores.shape[0] % self.heads == 0:
                split = scores.unflatten(0, (-1, self.heads))
                return self.softmax(
                    split, lambda x: func(x.flatten(0, 1), *args[1:], **rest).unflatten(0, split.shape[:2])
                ).flatten(0, 1)
        elif func in _PRODUCTS and not self.multiplied and len(args) == 2:
            return func(*self.factors(*args), **kwargs)
        elif func in _ADDED_PRODUCTS and not self.multiplied:
            named = dict(zip(("input", "batch1", "batch2"), args), **kwargs)
            named["batch1"], named["batch2"] = self.factors(named["batch1"], named["batch2"])
            return torch.baddbmm(**named)
        elif func is functional.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        return func(*args, **kwargs)

    def factors(self, queries: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the product that scores are made of, as the watchers leave them; others as they are."""
        split = (
            queries.ndim == turned.ndim == 3
            and bool(self.heads)
            and queries.shape[0] % (self.heads or 1) == 0
        )
        if not (queries.ndim == turned.ndim == 4 or split):
            return queries, turned
        self.multiplied = True
        new = queries.unflatten(0, (-1, self.heads)) if split else queries
        keys = (turned.unflatten(0, (-1, self.heads)) if split else turned).transpose(-1, -2)
        for watcher in list(self.watchers):
            new, keys = watcher("queries", new), watcher("keys", keys)
        # also where nothing was changed: what was seen is what the scores, and their gradients, come from
        return (
            (new.flatten(0, 1), keys.flatten(0, 1).transpose(-1, -2))
            if split
            else (new, keys.transpose(-1, -2))
        )

    def softmax(self, scores: Tensor, normalise: Callable[[Tensor], Tensor]) -> Tensor:
        for watcher in list(self.watchers):
            scores = watcher("scores", scores)
        pattern = normalise(scores)
        for watcher in list(self.watchers):
            pattern = watcher("pattern", pattern)
        return pattern

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The documented equivalent of ``scaled_dot_product_attention``, for modules without an eager kernel."""
        if enable_gqa:
            key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
            value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
        query, turned = self.factors(query, key.transpose(-2, -1))
        scores = query @ turned * (query.size(-1) ** -0.5 if scale is None else scale)
        if is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
            else:
                scores = scores + attn_mask
        # one query of several heads that share keys may come as several queries of one head
        groups = self.heads // scores.shape[1] if self.heads and scores.ndim == 4 else 1
        normalise = partial(torch.softmax, dim=-1)
        if groups > 1 and self.heads == groups * scores.shape[1] and scores.shape[2] % groups == 0:
            pattern = self.softmax(scores.unflatten(2, (groups, -1)).flatten(1, 2), normalise)
            pattern = pattern.unflatten(1, (-1, groups)).flatten(2, 3)
        else:
            pattern = self.softmax(scores, normalise)
        if attn_mask is not None:
            # who attends to nothing (padding) gets nothing, where a softmax of lowest scores has equal weights
            allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
            pattern = pattern.masked_fill(~allowed.any(-1, keepdim=True), 0)
        return functional.dropout(pattern, dropout_p, dropout_p > 0) @ value
