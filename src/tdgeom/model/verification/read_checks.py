"""Whether what is read at a site is what the model computes there: by its own outputs, by plain hooks, by what must add up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from tdgeom.core.devices import doubled
from tdgeom.model.sites import Site
from tdgeom.model.structure.resolved_site import ADDED_KINDS
from tdgeom.model.verification.plain_hooks import columns_in, distance
from tdgeom.model.verification.site_evidence import Evidence

OUTCOMES = ("ok", "failed", "unchecked")


@dataclass(frozen=True)
class Check:
    """One check of one site: how far (relative to the largest value, NaN where nothing was compared), and what follows."""

    site: Site
    check: str
    difference: float
    outcome: str
    note: str = ""


def compared(site: Site, check: str, far: float, tolerance: float, note: str = "") -> Check:
    """A check that compared two tensors."""
    return Check(site, check, far, "ok" if far <= tolerance else "failed", note)


def unchecked(site: Site, check: str, note: str) -> Check:
    """A check that could not be made, and why."""
    return Check(site, check, float("nan"), "unchecked", " ".join(note.split()))


def read_checks(found: Evidence, tolerance: float) -> Iterator[Check]:
    """Every check of what is read, site by site."""
    for site in found.entries:
        if site in found.refused:
            yield unchecked(site, "read", f"refused: {found.refused[site]}")
            continue
        further = _FURTHER.get(site.kind)
        plain = _own_hook(found, site, tolerance)
        if plain.outcome != "unchecked" or further is None:
            yield plain
        if further is not None:
            yield further(found, site, tolerance)


# ------------------------------------------------------------------------------------------- plain hooks


def _own_hook(found: Evidence, site: Site, tolerance: float) -> Check:
    """A plain hook on the module sees the same tensor."""
    entry, value = found.entries[site], found.acts[site]
    if entry.in_softmax:
        return unchecked(
            site, "own hook", "lies inside of the attention's forward, where no hook of torch reaches"
        )
    runs = [run for run in found.runs if run.path == entry.module_path]
    if len(runs) <= entry.call:
        return unchecked(site, "own hook", f"the module {entry.module_path!r} was not seen to run")
    run = runs[entry.call]
    tensors = run.inputs if entry.side == "input" else run.outputs
    shapes = [value, value.flatten(-2)] if entry.head_axis == -2 else [value]
    far = min((distance(v, t * entry.scale) for v in shapes for t in tensors), default=float("inf"))
    if far == float("inf") and entry.view is not None:
        if any(columns_in(shapes[-1], t) is not None for t in tensors if t.ndim):
            return compared(
                site, "own hook", 0.0, tolerance, f"features of the {entry.side} of {entry.module_path}"
            )
        return unchecked(site, "own hook", f"computed from what {entry.module_path!r} holds")
    return compared(site, "own hook", far, tolerance, f"{entry.side} of {entry.module_path or 'the model'}")


# ------------------------------------------------------------------------------------------- the stream


def _hidden_states(found: Evidence, site: Site, tolerance: float) -> Check:
    """The stream before and after a block, as the model's own ``hidden_states`` have it."""
    states, name = found.hidden.get(site.stack), "hidden states"
    if states is None:
        return unchecked(site, name, "the model gives no hidden states of this stack")
    depth = found.depth(site.stack)
    if len(states) != depth + 1:
        return unchecked(site, name, f"the model gives {len(states)} hidden states, of {depth} blocks")
    value, layer = found.acts[site], site.layer or 0
    # a model lists what its blocks are given and what it ends with, or what they give and what it ends with
    first = found.acts.get(Site.of("residual_output", 0, stack=site.stack))
    gives = first is not None and distance(first, states[0]) <= tolerance
    if gives and (site.kind == "embed" or (site.kind == "residual_input" and not layer)):
        return unchecked(site, name, "the model's first hidden state is behind its first block")
    index = {"embed": 0, "final_norm": depth, "residual_input": layer}.get(site.kind, layer + 1) - (
        1 if gives and site.kind != "final_norm" else 0
    )
    far = distance(value, states[index])
    if site.kind == "residual_output" and index == depth and not far <= tolerance:
        return unchecked(site, name, "the model's last hidden state is behind the final norm")
    if site.kind == "final_norm" and not far <= tolerance:
        return unchecked(site, name, "the model's last hidden state is another tensor")
    if value.shape != states[index].shape:
        return Check(
            site,
            name,
            far,
            "failed",
            f"shape {tuple(value.shape)}, the model's is {tuple(states[index].shape)}",
        )
    return compared(site, name, far, tolerance, f"hidden_states[{index}]")


def _sum(found: Evidence, site: Site, tolerance: float) -> Check:
    """What attention and MLP add, and the stream before the block, make the stream behind it (norms behind a sum included)."""
    name = "sum onto the stream"
    parts = [found.act(site, kind) for kind in ("attn_output", "cross_attn_output", "mlp_output")]
    before, after = found.act(site, "residual_input"), found.act(site, "residual_output")
    if before is None or after is None or parts[0] is None or parts[2] is None:
        return unchecked(
            site, name, "attn_output, mlp_output and the stream around the block are not all read"
        )
    terms = [part for part in parts if part is not None]
    if any(term.numel() != after.numel() for term in (before, *terms)):
        return unchecked(site, name, "what is read has not the stream's shape")
    total = before.reshape(after.shape) + sum(term.reshape(after.shape) for term in terms)
    far = distance(total, after)
    if far <= tolerance:
        return compared(site, name, far, tolerance)
    normed = _normed_sum(
        found, site, before.reshape(after.shape), [term.reshape(after.shape) for term in terms]
    )
    if normed is not None and distance(normed, after) <= tolerance:
        return compared(site, name, distance(normed, after), tolerance, "normalised behind each sum")
    return Check(
        site,
        name,
        far,
        "unchecked",
        "more than these is added, or the sum is transformed: see 'arrives in the stream'",
    )


def _normed_sum(found: Evidence, site: Site, value: Tensor, terms: list[Tensor]) -> Tensor | None:
    """The sum, with each norm of the block that is given a partial sum put behind it."""
    for term in terms:
        value = value + term
        for run in found.inside(site):
            if (
                "norm" in type(run.module).__name__.lower()
                and run.inputs
                and distance(run.inputs[0], value) < 1e-3
            ):
                value = run.outputs[0].reshape(value.shape)
                break
    return value


# ------------------------------------------------------------------------------------------- attention


def _eager_pattern(found: Evidence, site: Site, tolerance: float) -> Check:
    """The patterns that the model's own eager attention gives out."""
    given, name = found.attentions.get(site.stack), "eager attention"
    if given is None or len(given) not in (found.depth(site.stack), len(found.layers_with(site))):
        return unchecked(site, name, "the model gives no attentions of this stack")
    if found.eager > tolerance:
        return unchecked(
            site, name, "the model computes something else with its eager attention than with its own"
        )
    whole = len(given) == found.depth(site.stack)
    index = site.layer if whole else found.layers_with(site).index(site.layer)
    value, right = found.acts[site], given[index or 0]
    if value.shape[:-1] == right.shape[:-1] and value.shape[-1] == right.shape[-1] + 1:
        value = value[..., :-1]  # a sink, which the model leaves out of what it gives
    if value.shape != right.shape:
        return Check(
            site,
            name,
            float("inf"),
            "failed",
            f"shape {tuple(value.shape)}, the model's is {tuple(right.shape)}",
        )
    looks = (
        value.sum(-1) > 0
    )  # a query that may look nowhere (padding) has zeros with one kernel, and anything with another
    return compared(site, name, distance(value[looks], right[looks]), tolerance, f"attentions[{index}]")


def _softmax(found: Evidence, site: Site, tolerance: float) -> Check:
    """The softmax of the scores is the pattern."""
    pattern, name = found.act(site, "attn_pattern"), "softmax is the pattern"
    if pattern is None or pattern.shape != found.acts[site].shape:
        return unchecked(site, name, "no pattern of this shape is read")
    looks = pattern.sum(-1) > 0
    far = distance(found.acts[site].double().softmax(-1)[looks], pattern[looks])
    if far <= tolerance:
        return compared(site, name, far, tolerance)
    return Check(site, name, far, "unchecked", "the softmax runs over more than these scores (a sink, say)")


def _weighed(found: Evidence, site: Site, tolerance: float) -> Check:
    """The pattern weighs these values, and the heads' outputs come of it."""
    pattern, z, name = found.act(site, "attn_pattern"), found.act(site, "z"), "pattern @ v is z"
    value = found.acts[site]
    if pattern is None or z is None or value.ndim != 4 or pattern.ndim != 4:
        return unchecked(site, name, "pattern and z are not both read here")
    pattern = pattern[..., : value.shape[1]]  # behind them a sink has no value
    if pattern.shape[1] % value.shape[2] or pattern.shape[-1] != value.shape[1]:
        return unchecked(
            site, name, f"the pattern {tuple(pattern.shape)} does not fit the values {tuple(value.shape)}"
        )
    heads = value.repeat_interleave(pattern.shape[1] // value.shape[2], 2)
    far = distance((pattern.to(heads.dtype) @ heads.transpose(1, 2)).transpose(1, 2), z)
    if far <= tolerance:
        return compared(site, name, far, tolerance)
    return Check(
        site,
        name,
        far,
        "unchecked",
        "more than the pattern stands between values and heads (a gate, a norm, a sink)",
    )


def _heads_add_up(found: Evidence, site: Site, tolerance: float) -> Check:
    """The heads' shares are ``attn_output`` less one vector, the same at every position."""
    total, name = found.act(site, "attn_output"), "sum over heads"
    if total is None:
        return unchecked(site, name, "attn_output is not read here")
    rest = (doubled(found.acts[site]).sum(-2) - doubled(total)).flatten(0, -2)
    size = max(float(total.abs().max()), 1e-30)
    return compared(
        site, name, float((rest - rest.mean(0)).abs().max()) / size, tolerance, "attn_output, less a bias"
    )


_FURTHER: dict[str, Callable[[Evidence, Site, float], Check]] = {
    "embed": _hidden_states,
    "residual_input": _hidden_states,
    "residual_output": _hidden_states,
    "final_norm": _hidden_states,
    **dict.fromkeys(ADDED_KINDS, _sum),
    "attn_pattern": _eager_pattern,
    "attn_scores": _softmax,
    "v": _weighed,
    "head_output": _heads_add_up,
}
