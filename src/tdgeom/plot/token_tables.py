"""Pictures with tokens in them: attention, what a lens reads, the texts that drive a concept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tensordict import TensorDictBase

from tdgeom.plot.matrices import matrix
from tdgeom.plot.pair_grids import short_names
from tdgeom.plot.palette import COLOURS
from tdgeom.plot.style import as_array, axes_or_new, thinned, tidy
from tdgeom.rows.token_context import marked_text

__all__ = ["attention", "concept_examples", "lens_table"]

LONGEST = 14


def attention(
    pattern: Any, tokens: Sequence[str], ax: Any = None, *, columns: Sequence[str] | None = None
) -> Any:
    """One head's attention, (Tq, Tk): each row says where a token looks, on a scale from 0 to 1.

    Args:
        pattern: such as ``td["acts", "attn_pattern.3"][example, head]``.
        tokens: the Tq tokens; ``columns`` are the Tk, default the same.
        ax: matplotlib axes; made if None.

    Returns:
        The axes.

    Raises ``ValueError`` where tokens and pattern do not fit.

    >>> attention(np.eye(2), ["a", "b"]).images[0].get_clim()
    (0.0, 1.0)
    """
    weights = as_array(pattern).astype(np.float64)
    names = list(tokens) if columns is None else list(columns)
    if weights.shape != (len(tokens), len(names)):
        raise ValueError(
            f"plot.attention expects the pattern ({len(tokens)}, {len(names)}) of one head, got {weights.shape}. Remedy: "
            f"pattern[example, head], and a token for each position."
        )
    ax = matrix(weights, None, ax, vmin=0.0, vmax=1.0, annotate=False)
    ax.set_yticks(*thinned([_cut(name) for name in tokens], 48), parse_math=False)
    ax.set_xticks(*thinned([_cut(name) for name in names], 48), rotation=90, parse_math=False)
    ax.set(xlabel="attended token", ylabel="token")
    ax.images[0].colorbar.set_label("attention")
    return ax


def lens_table(
    result: TensorDictBase,
    tokenizer: Any,
    tokens: Sequence[str] | None = None,
    ax: Any = None,
    *,
    example: int = 0,
    last: int = 12,
) -> Any:
    """What the model would say if it ended at each layer: layers down, positions across; the shade is the probability.

    Args:
        result: what ``logit_lens`` returned, or anything with ``("lens", site, "top_tokens")`` and ``"top_probabilities"``.
        tokenizer: whatever has ``decode``.
        tokens: the tokens read, below the positions.
        ax: matplotlib axes; made if None.
        example: which sequence.
        last: at most so many positions, from the end.

    Returns:
        The axes.

    Raises:
        KeyError: the lens gave no top tokens.
    """
    branch = result.get("lens", None)
    sites = [] if branch is None else [str(site) for site in branch.keys()]
    if not sites or any("top_tokens" not in branch.get(site).keys() for site in sites):
        raise KeyError(
            "plot.lens_table needs ('lens', site, 'top_tokens') and 'top_probabilities': logit_lens(model, batch) gives them."
        )
    ids = np.stack([as_array(branch.get((site, "top_tokens")))[example, -last:, 0] for site in sites])
    shares = np.stack(
        [as_array(branch.get((site, "top_probabilities")))[example, -last:, 0] for site in sites]
    )
    ax = axes_or_new(ax, (1.0 * ids.shape[1] + 1.6, 0.34 * len(sites) + 1.2))
    matrix(shares.astype(np.float64), None, ax, vmin=0.0, vmax=1.0, annotate=False, cmap="cividis")
    for (row, column), token in np.ndenumerate(ids):
        colour = "white" if shares[row, column] < 0.55 else "black"
        said = _cut(tokenizer.decode([int(token)]))
        ax.text(
            column, row, said, ha="center", va="center", fontsize="x-small", color=colour, parse_math=False
        )
    ax.set_yticks(*thinned(short_names(sites)), parse_math=False)
    if tokens is not None:
        shown = [_cut(token) for token in list(tokens)[-ids.shape[1] :]]
        ax.set_xticks(range(len(shown)), shown, rotation=45, ha="right", parse_math=False)
    ax.set(xlabel="position" if tokens is None else "token read", ylabel="layer", aspect="auto")
    ax.images[0].colorbar.set_label("probability of the first guess")
    return ax


def concept_examples(
    exemplars: TensorDictBase, tokenizer: Any, unit: int, ax: Any = None, *, before: int = 10, most: int = 10
) -> Any:
    """The texts that drive a unit or a concept most, the token itself in double brackets, with a bar for each value.

    Args:
        exemplars: what ``MaxActivating`` wrote, ``result["exemplars", site]``.
        tokenizer: whatever has ``decode``.
        unit: which unit.
        ax: matplotlib axes; made if None.
        before, most: as for ``describe_exemplars``.

    Returns:
        The axes.
    """
    decode: Callable[[list[int]], str] = tokenizer.decode
    values = as_array(exemplars["values"][unit])[:most]
    texts = [marked_text(ids, before, decode) for ids in exemplars["context"][unit][:most].tolist()]
    ax = axes_or_new(ax, (7.5, 0.36 * len(values) + 0.9))
    places = np.arange(len(values))
    ax.barh(places, values, color=COLOURS[0], height=0.7, alpha=0.35)
    for place, text in zip(places, texts):
        said = _cut(" ".join(text.split()), 90)
        ax.text(
            0.01,
            place,
            said,
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize="small",
            parse_math=False,
        )
    ax.set(ylim=(len(values) - 0.5, -0.5), xlabel=f"value of unit {unit}")
    ax.set_yticks([])
    tidy(ax)
    return ax


def _cut(text: str, longest: int = LONGEST) -> str:
    text = text.replace("\n", "↵")
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
