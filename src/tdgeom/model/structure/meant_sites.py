"""What is meant by a name of a place in one model: a site, the path of a module, an expression, or another library's word."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn

from tdgeom.model.guessed_sites import Guess, read_guess
from tdgeom.model.sites import KINDS, ROOT, Site, exact_site
from tdgeom.model.structure.blocks import Stack
from tdgeom.model.structure.match_path import match_path
from tdgeom.model.structure.resolved_site import ResolvedSite

__all__ = ["listed_sites", "meant_sites"]

Wanted = str | re.Pattern
Found = Callable[[nn.Module], tuple[Sequence[Stack], Sequence[ResolvedSite]]]
_PATTERN = re.compile(r"[*?\[\\^$|+(]")
_ENVOY = re.compile(r"(?P<path>.+)\.(?P<side>inputs?|outputs?)(?P<element>(?:\[-?\d+\])*)")
_NAMES = (
    "a site is a string such as 'residual_input', 'residual_output.3' or 'module_output:<path>', the path of a module, or a "
    "compiled expression; sites= takes one or several"
)


def listed_sites(model: nn.Module, sites: Any) -> list[Wanted]:
    """What was asked for as a list of names and expressions: one of them or several, modules by their paths.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> listed_sites(model, "embed"), listed_sites(model, model[1]), listed_sites(model, ("z", 3))
    (['embed'], ['module_output:1'], ['z.3'])
    """
    if isinstance(sites, str | re.Pattern):
        return [sites]
    if type(sites) is list and all(isinstance(site, str | re.Pattern) for site in sites):
        return list(sites)
    one = isinstance(sites, nn.Module | ResolvedSite | Mapping | int | type(None)) or _is_act_name(sites)
    if not one and not isinstance(sites, Iterable):
        raise ValueError(f"{_NAMES}; got {sites!r}.")
    several = [sites] if one else list(sites)
    if several and all(isinstance(site, int) for site in several):
        layers = sites if one else several
        raise ValueError(
            f"{_NAMES}; got {layers}. Layers are chosen beside: Capture(model, 'residual_input', layers={layers})."
        )
    return [_name(model, site) for site in several]


def _is_act_name(given: Any) -> bool:
    """``("z", 3)``, which is one place, and no list of names."""
    return (
        isinstance(given, tuple)
        and len(given) in (2, 3)
        and isinstance(given[0], str)
        and isinstance(given[1], int)
    )


def _name(model: nn.Module, given: Any) -> Wanted:
    if isinstance(given, str | re.Pattern):
        return given
    if isinstance(given, ResolvedSite):
        return given.site
    if isinstance(given, nn.Module):
        paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is given]
        if len(paths) != 1:
            where = f"has it at {paths}: name the path" if paths else "does not hold it"
            raise ValueError(
                f"sites= was given a {type(given).__name__} as a module, and {type(model).__name__} {where}."
            )
        return f"module_output:{paths[0] or ROOT}"
    if _is_act_name(given):
        word, layer, *branch = given
        branch = {"a": "attn", "m": "mlp"}.get(branch[0], branch[0]) if branch else ""
        return ".".join(map(str, filter(None, (branch, word)))) + f".{layer}"
    if isinstance(given, Mapping) and "component" in given:
        return f"{given['component']}.{given['layer']}" if "layer" in given else str(given["component"])
    raise ValueError(f"{_NAMES}; got {given!r}.")


def meant_sites(
    model: nn.Module, wanted: Sequence[Any], prefix: str, found: Found
) -> list[Site | re.Pattern]:
    """The sites and expressions that names stand for in a model; what is written as sites are is taken as it stands.

    Raises ``ValueError`` with the right spelling for what is near to something here and not the same.
    """
    return [name if isinstance(name, re.Pattern) else _meant(model, name, prefix, found) for name in wanted]


def _meant(model: nn.Module, given: Any, prefix: str, found: Found) -> Site | re.Pattern:
    if not isinstance(given, str):
        raise ValueError(f"a site is a string such as 'residual_input.0', got {given!r}.")
    if isinstance(given, Site) and not given.prefix:
        return given
    name = given.removeprefix(prefix) if prefix else given
    site: Site | re.Pattern | None = exact_site(name)
    stack = site.stack if isinstance(site, Site) else None
    if site is None or (stack is not None and stack not in [one.name for one in found(model)[0]]):
        other = _by_path(model, name)
        if other is None and "," not in name:
            other = _by_word(model, name, found)
        site = other or site
    if site is None:
        raise ValueError(_unknown(model, name))
    if isinstance(site, Site) and site.prefix:
        raise ValueError(
            f"the site {given!r} has the prefix {site.prefix!r}, where prefix={prefix!r} was given."
        )
    return site


# ------------------------------------------------------------------------------------------- paths of modules


def _by_path(model: nn.Module, name: str) -> Site | re.Pattern | None:
    """A module's path, as it stands or as Python writes it; a glob or an expression of paths."""
    paths = dict(model.named_modules(remove_duplicate=False))
    path = re.sub(r"\[(\d+)\]", r".\1", name)  # transformer.h[0].attn
    if name in paths:
        return Site.of("module_output", path=name or ROOT) if name else None
    if (match := _ENVOY.fullmatch(name)) and (inner := re.sub(r"\[(\d+)\]", r".\1", match["path"])) in paths:
        if match["side"] in ("output", "input") and (match["side"] == "output" or not match["element"]):
            return Site.of(f"module_{match['side']}", path=inner + match["element"])
        side = "input" if match["side"].startswith("input") else "output"
        raise ValueError(f"{name!r} is no site here. Write 'module_{side}:{inner}'.")
    if path in paths:
        return Site.of("module_output", path=path)
    bare = re.sub(r"\[-?\d+\]$", "", name)
    if bare != name and bare in paths:
        return Site.of("module_output", path=name)
    if near := _suffix(list(paths), name if match is None else match["path"]):
        raise ValueError(
            _refused(
                name,
                f"Write 'module_{'input' if match and match['side'].startswith('input') else 'output'}:{near}'.",
            )
        )
    return _by_expression(list(paths)[1:], name) if _PATTERN.search(name) else None


def _by_expression(paths: Sequence[str], name: str) -> Site | re.Pattern | None:
    """A glob or a regular expression, where only one of the two finds modules, or both find the same."""
    try:
        expression = re.compile(name)
    except re.error:
        expression = None
    by_expression = [] if expression is None else [path for path in paths if expression.fullmatch(path)]
    by_glob = [path for path in paths if match_path(path, name)]
    if by_glob and by_expression and by_glob != by_expression:
        raise ValueError(
            f"{name!r} can be read in two ways. Write 'module_output:{name}' for the glob ({len(by_glob)} modules), or "
            f"re.compile({name!r}) for the expression ({len(by_expression)} modules)."
        )
    if by_glob:
        return Site.of("module_output", path=name)
    return expression if by_expression else None


# --------------------------------------------------------------------------------------- words of other libraries


def _by_word(model: nn.Module, name: str, found: Found) -> Site | None:
    guess = read_guess(name, KINDS)
    stacks, entries = found(model)
    stack = next((stack for stack in stacks if stack.name == guess.stack), None)
    if stack is None and guess.stack and len(stacks) == 1 and stacks[0].name is None:
        stack = stacks[0]
    own = [entry for entry in entries if stack is not None and entry.site.stack == stack.name]
    depth = 0 if stack is None else len(stack.blocks)
    normed = any(entry.site.kind == "final_norm" for entry in own)
    if guess.word in ("hidden_states", "hidden_state") and guess.layer is not None and stacks:
        if stack is None:
            sides = " or ".join(f"'{one.name}_hidden_states.{guess.layer}'" for one in stacks)
            raise ValueError(_refused(name, f"there are several stacks. Write {sides}."))
        return _hidden_state(name, guess, depth, normed, stack.name)
    if guess.answer is not None:
        kinds = f" Kinds: {', '.join(KINDS)}." if guess.answer.startswith("Did you mean") else ""
        raise ValueError(_refused(name, guess.said(**_facts(model, normed, depth)) + kinds))
    if guess.site is None:
        return None
    site = Site(guess.site)
    _refuse_other_meaning(name, guess, own, depth)
    return site


def _hidden_state(name: str, guess: Guess, depth: int, normed: bool, stack: str | None) -> Site:
    """``hidden_states[i]`` of transformers: what goes into block i, and last what comes out of the stack."""
    assert guess.layer is not None
    index = guess.layer + depth + 1 if guess.layer < 0 else guess.layer
    if not 0 <= index <= depth:
        raise IndexError(
            f"{name!r} is out of range: there are {depth} blocks, so hidden_states run from 0 to {depth}."
        )
    if index < depth:
        return Site.of("residual_input", index, stack=stack)
    last = Site.of("residual_output", depth - 1, stack=stack)
    if normed:
        raise ValueError(
            f"{name!r}, the last of the hidden_states, is recorded behind the last norm by most models. Write "
            f"{str(Site.of('final_norm', stack=stack))!r} for that, {str(last)!r} for what the last block gives."
        )
    return last


def _refuse_other_meaning(name: str, guess: Guess, own: Sequence[ResolvedSite], depth: int) -> None:
    """Where a word means another tensor in a model of this kind."""
    kind = Site(guess.site or "").kind
    theirs = f"{name!r} is no site here: in this model it would be another tensor. "
    mids = [entry for entry in own if entry.site.kind == "residual_mid"]
    if "hook_resid_post" in name and mids and not all(entry.bypass for entry in mids):
        raise ValueError(
            f"{theirs}TransformerLens reads it before the norm that ends the block. Write {guess.site!r} for what the "
            "block gives, behind it."
        )
    shares = [entry for entry in own if entry.site.kind == "head_output" and entry.behind is not None]
    if kind == "head_output" and guess.word == "result" and shares:
        raise ValueError(
            f"{theirs}TransformerLens reads it before the norm behind the attention. Write {guess.site!r} for what each "
            "head adds, behind it."
        )
    attending = [entry for entry in own if entry.site.kind == kind]
    if guess.word in ("attentions", "cross_attentions") and 0 < len(attending) < depth:
        layers = [entry.site.layer for entry in attending]
        raise ValueError(
            f"{theirs}Only the layers {layers} have a pattern. Write {kind!r} for all of them, or {kind}.{layers[0]} for one."
        )


def _facts(model: nn.Module, normed: bool, depth: int) -> dict[str, str]:
    """What answers say of this model."""
    last = "final_norm" if normed else f"residual_output.{depth - 1}"
    gives = f"the last {'norm' if normed else 'block'} gives, '{last}'"
    facts = {} if depth == 0 else {"last": gives, "all": f"['residual_input', '{last}']"}
    paths = {id(module): path for path, module in model.named_modules()}
    for fact, getter in (("token_embedding", "get_input_embeddings"), ("head", "get_output_embeddings")):
        try:
            path = paths.get(id(getattr(model, getter)()))
        except (AttributeError, NotImplementedError):
            continue
        if path:
            facts[fact] = f"'module_output:{path}'"
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and re.search(r"wpe|pos", path.rpartition(".")[2]):
            facts.setdefault("position_embedding", f"'module_output:{path}'")
    return facts


def _suffix(paths: Sequence[str], name: str) -> str | None:
    """The one path that ends as a name does, or as it ends without its first part."""
    text = re.sub(r"\[(\d+)\]", r".\1", name)
    for tail in (text, text.partition(".")[2]) if "," not in name else ():
        found = [path for path in paths if path == tail or path.endswith("." + tail)]
        if not re.search("[a-z]", tail, re.I):
            continue
        if len(found) == 1:
            return found[0]
    return None


def _refused(name: str, answer: str) -> str:
    return f"{name!r} is no site here: {answer}" if answer else f"{name!r} is no site here."


def _unknown(model: nn.Module, name: str) -> str:
    """The message for a name that nothing answers to."""
    paths = [path for path, _ in model.named_modules() if path]
    near = (
        None if _PATTERN.search(name) else next(iter(get_close_matches(name, paths, n=1, cutoff=0.75)), None)
    )
    said = f" Write 'module_output:{near}'." if near else ""
    if "," in name:
        said = f" Write sites={[part.strip() for part in name.split(',') if part.strip()]}."
    elif re.fullmatch(r"-?\d+", name):
        said = f" Layers are chosen beside: Capture(model, 'residual_input', layers={name})."
    elif not near and _PATTERN.search(name):
        said = (
            f" As a glob of module paths, 'module_output:{name}', and as an expression, re.compile({name!r}), it matches no "
            "module."
        )
    return f"{_NAMES}; got {name!r}.{said} Kinds: {', '.join(KINDS)}."
