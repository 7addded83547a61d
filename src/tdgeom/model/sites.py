"""Sites: the names of places in a model where a tensor is read or written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from tdgeom.model.guessed_sites import read_guess

# In the order in which a block meets them; a block that runs attention and MLP side by side keeps this order
# too.
BLOCK_KINDS = (
    "residual_input",
    "attn_norm",
    "attn_input",
    "q",
    "k",
    "v",
    "q_rotary",
    "k_rotary",
    "attn_scores",
    "attn_pattern",
    "z",
    "head_output",
    "attn_output",
    "cross_attn_input",
    "cross_q",
    "cross_k",
    "cross_v",
    "cross_attn_scores",
    "cross_attn_pattern",
    "cross_z",
    "cross_head_output",
    "cross_attn_output",
    "residual_mid",
    "mlp_norm",
    "mlp_input",
    "router_logits",
    "router_choice",
    "mlp_act",
    "mlp_output",
    "residual_output",
)
# What has an axis of heads: the last but one, or the second for those of (B, H, Tq, Tk).
SCORE_KINDS = ("attn_scores", "cross_attn_scores")
PATTERN_KINDS = ("attn_scores", "attn_pattern", "cross_attn_scores", "cross_attn_pattern")
_CROSS_HEADS = ("cross_q", "cross_k", "cross_v", "cross_z", "cross_head_output")
HEAD_KINDS = ("q", "k", "v", "q_rotary", "k_rotary", "z", "head_output", *_CROSS_HEADS, *PATTERN_KINDS)
STACK_KINDS = ("embed", "final_norm")
MODULE_KINDS = ("module_input", "module_output")
KINDS = ("embed", *BLOCK_KINDS, "final_norm", *MODULE_KINDS)
ALIASES = {"resid_pre": "residual_input", "resid_post": "residual_output", "resid_mid": "residual_mid"}

_NAME = re.compile(
    r"(?P<prefix>.*/)?(?:(?P<stack>[^/:]+)\.)?"
    r"(?P<kind>" + "|".join((*BLOCK_KINDS, *STACK_KINDS, *ALIASES)) + r")(?:\.(?P<layer>-?\d+))?"
)
_MODULE_NAME = re.compile(r"(?P<prefix>.*/)?(?P<kind>module_input|module_output):(?P<path>[^/:]*)")
ROOT = "<root>"  # the path of the model itself
# "attn[1]", "block['hidden']": a bracket that begins a component ("h.[0-3]") is a glob's
_ELEMENT = re.compile(r"(?<=[^.])(?:\[(?:-?\d+|'[^'\]]+')\])+$")

LayerSpec = str | int | slice | Sequence[int]


class Site(str):
    """The name of a place in a model: a string that also knows its parts.

    ``Site("encoder.residual_output.3")`` parses a name; the parts are ``prefix`` (text up to the last ``/``,
    or ``""``), ``stack`` (``None`` if the model has one stack), ``kind``, ``layer`` (``int`` or ``None``) and
    ``path`` (the module's path for ``module_input:`` and ``module_output:``, ``"<root>"`` for the model itself, else
    ``None``; ``[1]`` or ``['name']`` behind it is the tensor meant in a container). Words of other libraries that mean exactly
    a kind become it: ``resid_pre``, ``blocks.3.attn.hook_z``, ``resid_out_2`` (:mod:`tdgeom.model.guessed_sites`).

    Raises ``ValueError`` for a name whose kind does not exist.

    >>> site = Site("encoder.residual_output.3")
    >>> site.stack, site.kind, site.layer
    ('encoder', 'residual_output', 3)
    >>> site == "encoder.residual_output.3"
    True
    """

    prefix: str
    stack: str | None
    kind: str
    layer: int | None
    path: str | None
    image: Any = (
        None  # what a context knows of the tokens before an image's patches; False at sites of a text
    )
    channels: Any = None  # what a context knows of the channels of feature maps

    def __new__(cls, name: str) -> Site:
        """Parse a name."""
        if isinstance(name, Site):
            return name
        site = exact_site(name)
        if site is None:
            guess = read_guess(name, KINDS)
            if guess.site is None:
                raise ValueError(unknown_kind(name, guess.said()))
            site = cls(guess.site)
        return site

    @classmethod
    def of(
        cls,
        kind: str,
        layer: int | None = None,
        *,
        stack: str | None = None,
        path: str | None = None,
        prefix: str = "",
    ) -> Site:
        """Build a site from its parts.

        >>> Site.of("residual_input", 0, prefix="b/")
        'b/residual_input.0'
        """
        name = f"{stack}.{kind}" if stack else kind
        name = f"{kind}:{path}" if path is not None else name
        name = name if layer is None else f"{name}.{layer}"
        site = str.__new__(cls, prefix + name)
        site.prefix, site.stack, site.kind, site.layer, site.path = prefix, stack, kind, layer, path
        return site

    @classmethod
    def parse(cls, name: str) -> Site:
        """The same as ``Site(name)``."""
        return cls(name)

    def with_prefix(self, prefix: str) -> Site:
        """The same place under another prefix."""
        site = Site.of(self.kind, self.layer, stack=self.stack, path=self.path, prefix=prefix)
        site.image, site.channels = self.image, self.channels
        return site

    def __reduce__(self) -> tuple:
        made = partial(Site.of, self.kind, self.layer, stack=self.stack, path=self.path, prefix=self.prefix)
        return made, ()


def split_element(path: str) -> tuple[str, tuple[int | str, ...] | None]:
    """The module's path and the way to the tensor in what it receives or gives; ``None`` where no way is given.

    >>> split_element("h.0.attn[1]"), split_element("out['pair'][0]"), split_element("h.[0-3]")
    (('h.0.attn', (1,)), ('out', ('pair', 0)), ('h.[0-3]', None))
    """
    match = _ELEMENT.search(path)
    if match is None:
        return path, None
    keys = re.findall(r"\[(?:(-?\d+)|'([^']+)')\]", match[0])
    return path[: match.start()], tuple(int(number) if number else name for number, name in keys)


def exact_site(name: str) -> Site | None:
    """The site of a name that is written as sites are; ``None`` for any other.

    >>> exact_site("resid_pre.0"), exact_site("blocks.0.hook_resid_pre")
    ('residual_input.0', None)
    """
    if isinstance(name, Site):
        return name
    if match := _MODULE_NAME.fullmatch(name):
        return Site.of(match["kind"], path=match["path"] or ROOT, prefix=match["prefix"] or "")
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    layer = None if match["layer"] is None else int(match["layer"])
    kind = ALIASES.get(match["kind"], match["kind"])
    return Site.of(kind, layer, stack=match["stack"], prefix=match["prefix"] or "")


def unknown_kind(name: str, answer: str = "") -> str:
    """The message for a name that no kind answers to."""
    return (
        "expected a site such as 'residual_input', 'residual_output.3', 'encoder.attn_output.0' or "
        f"'module_output:<path>', got {name!r}.{' ' + answer if answer else ''} Kinds: {', '.join(KINDS)}."
    )


def is_pattern(site: str | None, *, scores: bool = False) -> bool:
    """Whether a site holds attention scores or patterns, or (``scores``) those before the softmax.

    By the text of its name: sites that are no :class:`Site` may have any name.

    >>> is_pattern("encoder.attn_scores.2"), is_pattern("attn_output.2"), is_pattern("module_output:h.attn_scores")
    (True, False, False)
    """
    name = "" if site is None else site.rpartition("/")[2]
    return ":" not in name and not set(name.split(".")).isdisjoint(SCORE_KINDS if scores else PATTERN_KINDS)


def choice_beside(site: str) -> str:
    """The site where the choice of a router lies whose logits are at ``site``.

    >>> choice_beside("b/encoder.router_logits.1")
    'b/encoder.router_choice.1'
    """
    prefix, slash, name = site.rpartition("/")
    return prefix + slash + ".".join("router_choice" if p == "router_logits" else p for p in name.split("."))


def is_router(site: str | None) -> bool:
    """Whether a site holds the logits of a router, by the text of its name.

    >>> is_router("encoder.router_logits.1"), is_router("module_output:h.router_logits")
    (True, False)
    """
    name = "" if site is None else site.rpartition("/")[2]
    return ":" not in name and "router_logits" in name.split(".")


def token_side(site: str | None) -> str:
    """What the names of a site's mask and token ids begin with: a decoder has tokens, and padding, of its own.

    The keys and values of its cross-attention lie at the encoder's tokens.

    >>> token_side("b/decoder.residual_output.0"), token_side("decoder.cross_k.0"), token_side("residual_output.0")
    ('decoder_', '', '')
    """
    name = "" if site is None else site.rpartition("/")[2]
    elsewhere = name.startswith(("decoder.cross_k", "decoder.cross_v"))
    return "decoder_" if name.startswith("decoder.") and not elsewhere else ""


def select_layers(layers: LayerSpec, count: int, where: str = "the model") -> list[int]:
    """Layer indices named by ``layers`` in a stack of ``count`` blocks, ascending and without repeats.

    ``layers`` is ``"all"``, an int, a list of ints, a slice, or a string ``"0,3,7"``; negative indices count
    from the end. Raises ``IndexError`` for an index outside the stack, ``ValueError`` for anything else.

    >>> select_layers([0, -1], 4)
    [0, 3]
    >>> select_layers("0,2", 4)
    [0, 2]
    """
    if isinstance(layers, slice):
        chosen = list(range(count))[layers]
    elif isinstance(layers, str) and layers.strip() == "all":
        chosen = list(range(count))
    else:
        chosen = [_index(i, count, where) for i in _integers(layers)]
    if not chosen:
        raise ValueError(
            f"layers={layers!r} selects none of the {count} blocks of {where}; give at least one layer."
        )
    return sorted(set(chosen))


def _integers(layers: int | str | Iterable[int]) -> list[int]:
    if isinstance(layers, str):
        try:
            return [int(part) for part in layers.split(",") if part.strip()]
        except ValueError:
            raise ValueError(f"layers= expects 'all' or integers such as '0,3,7', got {layers!r}.") from None
    values = list(layers) if isinstance(layers, Iterable) else [layers]
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(
                f"layers= expects 'all', an int, a list of ints, a slice or a string '0,3,7', got {layers!r}."
            )
    return [value.__index__() for value in values]


def _index(index: int, count: int, where: str) -> int:
    if not -count <= index < count:
        raise IndexError(
            f"layer {index} is out of range: {where} has {count} blocks, so layers run from 0 to "
            f"{count - 1} (or -{count} to -1)."
        )
    return index % count
