"""Whether an edit at a site takes effect: the same change made by a plain hook gives the same answer of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from operator import add, mul

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene
from tdgeom.model.sites import Site
from tdgeom.model.structure.resolved_site import ADDED_KINDS
from tdgeom.model.verification.plain_hooks import (
    Run,
    changed,
    columns_in,
    distance,
    eager_attention,
    ratio,
    recorded,
)
from tdgeom.model.verification.read_checks import Check, compared, unchecked
from tdgeom.model.verification.site_evidence import Evidence, answer

Change = Callable[[Tensor], Tensor]


def edit_checks(found: Evidence, tolerance: float) -> Iterator[Check]:
    """Every check of edits, site by site."""
    for site in found.acts:
        checks = [_CHECKS.get(site.kind, _same_as_plain_hook)]
        if site.kind in ADDED_KINDS:
            checks.append(_arrives)
        if site.kind in ("z", "mlp_act"):
            checks.append(_alone)
        for check in checks:
            try:
                yield check(found, site, tolerance)
            except Exception as error:
                yield unchecked(site, "edit", f"refused: {type(error).__name__}: {error}")


def _push(value: Tensor) -> Tensor:
    """A vector that is far from nothing at every feature, of the size of what is read."""
    size = value.float().std(correction=0).clamp_min(1e-6)
    return (torch.linspace(-1, 1, value.shape[-1], device=value.device) * size).to(value.dtype)


def _under(found: Evidence, site: Site, edit: Change) -> Tensor | None:
    with Intervene(found.model, {str(site): edit}):
        return answer(found.call())


def _verdict(
    found: Evidence, site: Site, edited: Tensor | None, right: Tensor | None, tolerance: float, note: str = ""
) -> Check:
    plain = answer(found.output)
    if edited is None or right is None or plain is None:
        return unchecked(site, "edit", "the model's answer holds no floating tensor")
    edited, right, plain = found.attended(edited), found.attended(right), found.attended(plain)
    far = distance(edited, right)
    if distance(right, plain) <= 1e-7 and distance(edited, plain) <= 1e-7:
        return unchecked(
            site,
            "edit",
            "the model's answer does not depend on this place: neither edit nor plain hook changes it",
        )
    if distance(edited, plain) <= 1e-7:
        return Check(site, "edit", far, "failed", "the edit changes nothing, a plain hook does")
    return compared(site, "edit", far, tolerance, note or "as a plain hook's")


def _same_as_plain_hook(found: Evidence, site: Site, tolerance: float) -> Check:
    entry, value = found.entries[site], found.acts[site]
    runs = [run for run in found.runs if run.path == entry.module_path]
    if entry.bypass:
        return _in_the_middle(found, site, tolerance)
    if len(runs) <= entry.call:
        return unchecked(site, "edit", f"the module {entry.module_path!r} was not seen to run")
    run = runs[entry.call]
    tensors = run.inputs if entry.side == "input" else run.outputs
    flat = value.flatten(-2) if entry.head_axis == -2 else value
    given = next((t for t in tensors if ratio(flat, t) is not None), None)
    if given is None:
        return _among_others(found, site, run, flat, tensors, tolerance)
    if entry.view is None:
        push, scale = _push(value), entry.scale
        edited = _under(found, site, partial(add, push))
        with changed(run.module, entry.side, partial(add, push / scale), given.shape[-1], entry.call):
            right = answer(found.call())
    else:
        edited = _under(found, site, partial(mul, 0.5))
        with changed(run.module, entry.side, partial(mul, 0.5), given.shape[-1], entry.call):
            right = answer(found.call())
    return _verdict(found, site, edited, right, tolerance)


def _among_others(
    found: Evidence, site: Site, run: Run, flat: Tensor, tensors: list[Tensor], tolerance: float
) -> Check:
    """A site that is some of the features that a module holds: a plain hook changes those."""
    entry = found.entries[site]
    if entry.view is not None:
        for given in tensors:
            where = columns_in(flat, given) if given.ndim else None
            if where is not None:
                factors = torch.ones(given.shape[-1], dtype=given.dtype, device=given.device)
                factors[where.to(given.device)] = 0.5
                edited = _under(found, site, partial(mul, 0.5))
                with changed(run.module, entry.side, partial(mul, factors), given.shape[-1], entry.call):
                    return _verdict(found, site, edited, answer(found.call()), tolerance)
    return unchecked(site, "edit", "no plain hook holds the same tensor")


def _in_the_middle(found: Evidence, site: Site, tolerance: float) -> Check:
    """The stream between attention and MLP, changed as by a change of what was added last."""
    value, before = found.acts[site], found.act(site, "residual_input")
    terms = {kind: found.act(site, kind) for kind in ("attn_output", "cross_attn_output")}
    known = [term.reshape(value.shape) for term in (before, *terms.values()) if term is not None]
    if before is None or distance(torch.stack(known).sum(0), value) > tolerance:
        return unchecked(site, "edit", "what is added before this place is not all known")
    for kind, added in reversed(terms.items()):
        run = None if added is None else _giver(found, found.site(site, kind), added)
        if run is not None and added is not None:
            push, factor = _push(value), next(f for t in run.outputs if (f := ratio(added, t)) is not None)
            edited = _under(found, site, partial(add, push))
            with changed(run.module, "output", partial(add, push / factor), value.shape[-1]):
                right = answer(found.call())
            return _verdict(found, site, edited, right, tolerance, f"as a plain hook's on {run.path}")
    return unchecked(site, "edit", "no plain hook reaches the stream inside of a block")


def _giver(found: Evidence, site: Site, value: Tensor) -> Run | None:
    """The first module of the block that gives a tensor, up to one factor."""
    own = [run for run in found.inside(site) if any(ratio(value, t) is not None for t in run.outputs)]
    return own[0] if own else None


def _arrives(found: Evidence, site: Site, tolerance: float) -> Check:
    """A constant added to it is found, as it is, in what a later module of the block is given, or behind the block."""
    name, block = "arrives in the stream", found.block(site)
    value, inside = found.acts[site], found.inside(site)
    if block is None or found.entries[site].calls > 1:
        return unchecked(site, name, "blocks that share weights run more than once")
    if any(distance(value, t) <= tolerance for t in block.outputs):
        return Check(
            site, name, float("nan"), "failed", "it is the stream behind the block, not what is added to it"
        )
    push = _push(value)
    paths = [run.path for run in (block, *inside)]
    with (
        recorded(found.model, dict.fromkeys(paths)) as runs,
        Intervene(found.model, {str(site): lambda x: x + push}),
    ):
        found.call()
    after = [run for run in runs if run.path in set(paths)]
    if [run.path for run in after] != paths:
        return unchecked(site, name, "the block runs other modules when it is edited")
    pairs = list(zip((block, *inside), after))
    moved = [(a, b) for old, new in pairs[:1] for a, b in zip(old.outputs, new.outputs)]
    moved += [
        (a, b) for old, new in pairs[1:] for a, b in zip(old.inputs, new.inputs) if ratio(value, a) is None
    ]
    fits = [
        (b - a)
        for a, b in moved
        if a.shape == b.shape and a.shape[-1] == push.shape[-1] and not torch.equal(a, b)
    ]
    far = min((distance(step, push.expand_as(step)) for step in fits), default=float("inf"))
    return compared(site, name, far, 10 * tolerance, "a constant added to it is found in the stream as it is")


def _alone(found: Evidence, site: Site, tolerance: float) -> Check:
    """Without it, what it is projected to is one vector, the same at every position: nothing else feeds the projection."""
    name, kind = "nothing without it", "attn_output" if site.kind == "z" else "mlp_output"
    return _constant(found, site, kind, name, tolerance)


def _constant(found: Evidence, site: Site, kind: str, name: str, tolerance: float) -> Check:
    total = found.act(site, kind)
    if total is None:
        return unchecked(site, name, f"{kind} is not read here")
    reader = Capture(found.model, str(found.site(site, kind)), clone=True, **found.options)
    with Intervene(found.model, {str(site): torch.zeros_like}):
        left = reader(found.batch.copy())["acts", str(found.site(site, kind))].flatten(0, -2)
    far = float((left - left[:1]).abs().max()) / max(float(total.abs().max()), 1e-30)
    return compared(site, name, far, tolerance, f"with zeros there, {kind} is one vector at every position")


def _no_heads(found: Evidence, site: Site, tolerance: float) -> Check:
    return _constant(found, site, "attn_output", "edit", tolerance)


def _no_pattern(found: Evidence, site: Site, tolerance: float) -> Check:
    """A pattern of zeros leaves no head an output, as zeros at the output projection do."""
    z = found.site(site, "z")
    return _as_without_heads(found, site, z, tolerance)


def _no_values(found: Evidence, site: Site, tolerance: float) -> Check:
    """Values: as a plain hook's where they are a whole tensor, else zeros, which leave no head an output."""
    check = _same_as_plain_hook(found, site, tolerance)
    if check.outcome != "unchecked":
        return check
    return _as_without_heads(found, site, found.site(site, "z"), tolerance)


def _as_without_heads(found: Evidence, site: Site, z: Site, tolerance: float) -> Check:
    entry = found.entries.get(z)
    runs = [] if entry is None else [run for run in found.runs if run.path == entry.module_path]
    if entry is None or z not in found.acts or len(runs) != 1:
        return unchecked(site, "edit", "z, whose module a plain hook could reach, is not read here")
    width = found.acts[z].flatten(-2).shape[-1]
    edited = _under(found, site, torch.zeros_like)
    with changed(runs[0].module, "input", torch.zeros_like, width):
        right = answer(found.call())
    return _verdict(found, site, edited, right, tolerance, "zeros there are zeros at the output projection")


def _halved_scores(found: Evidence, site: Site, tolerance: float) -> Check:
    """Scores halved: the attentions that the model then gives are the softmax of half the scores."""
    attentions, pattern = found.attentions.get(site.stack), found.act(site, "attn_pattern")
    scores = found.acts[site]
    if attentions is None or pattern is None or len(attentions) != found.depth(site.stack):
        return unchecked(site, "edit", "the model gives no attentions of this stack to tell it by")
    looks = pattern.sum(-1) > 0
    if not distance(scores.double().softmax(-1)[looks], pattern[looks]) <= tolerance:
        return unchecked(site, "edit", "the softmax runs over more than these scores (a sink, say)")
    with eager_attention(found.model), Intervene(found.model, {str(site): partial(mul, 0.5)}):
        output = found.call(output_attentions=True)
    name = f"{site.stack}_attentions" if site.stack in ("encoder", "decoder") else "attentions"
    given = output[name][site.layer]
    right = (0.5 * scores.double()).softmax(-1)[
        ..., : given.shape[-1]
    ]  # without a sink, as the model gives them
    far = distance(given[looks], right[looks])
    return compared(
        site, "edit", far, tolerance, "the model's own attentions are the softmax of the halved scores"
    )


def _chosen(found: Evidence, site: Site, tolerance: float) -> Check:
    """One expert's logit raised far above the others at every token: the experts' module is told to run it everywhere."""
    value, block = found.acts[site], found.block(site)
    experts = value.shape[-1]
    pick = one_hot(torch.tensor(experts - 1, device=value.device), experts).to(value.dtype) * 1e4
    paths = [r.path for r in found.inside(site) if "expert" in r.path.rpartition(".")[2].lower()]
    if block is None or not paths:
        return unchecked(site, "edit", "no module of experts is seen to run")
    with (
        recorded(found.model, dict.fromkeys(paths), whole=True) as runs,
        Intervene(found.model, {str(site): lambda x: x + pick}),
    ):
        found.call()
    tokens = value[..., 0].numel()
    told = [
        t
        for run in runs
        for t in run.inputs
        if not t.is_floating_point() and t.ndim and t.numel() % tokens == 0
    ]
    if not told:
        return unchecked(
            site, "edit", "the experts' module is not told which to run, so that it cannot be seen"
        )
    share = float((told[0].reshape(tokens, -1) == experts - 1).any(-1).double().mean())
    return compared(site, "edit", 1.0 - share, 0.0, "the expert of the largest logit runs at every token")


_CHECKS: dict[str, Callable[[Evidence, Site, float], Check]] = {
    "head_output": _no_heads,
    "attn_pattern": _no_pattern,
    "attn_scores": _halved_scores,
    "v": _no_values,
    "router_logits": _chosen,
}
