"""Attention patterns as a small self-contained piece of HTML, for notebooks and reports."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import Tensor

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.visible_text import visible

__all__ = ["AttentionView", "attention_view"]

_STYLE = (
    "<style>.tgav{display:flex;flex-wrap:wrap;gap:14px;font:11px system-ui,sans-serif}"
    ".tgav table{border-collapse:collapse}.tgav td{width:%dpx;height:%dpx;padding:0;border:1px solid #8883}"
    ".tgav th{font-weight:400;padding:0 4px;text-align:right;white-space:pre}"
    ".tgav th.c{writing-mode:vertical-rl;text-align:left;padding:4px 0}.tgav caption{font-weight:600;padding-bottom:4px}"
    "</style>"
)


class AttentionView:
    """HTML that a notebook shows; ``str(view)`` is the text, to write to a file."""

    def __init__(self, html: str) -> None:
        self.html = html

    def __str__(self) -> str:
        return self.html

    def _repr_html_(self) -> str:
        return self.html


@answer_guesses
def attention_view(
    pattern: Tensor,
    tokens: Sequence[str],
    *,
    columns: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    cell: int = 16,
    title: str = "head",
) -> AttentionView:
    """Attention of one sequence, (H, Tq, Tk) or (Tq, Tk), as one table a head: rows attend to columns.

    Each cell's shade is the weight (white 0, dark 1) and its tooltip says the two tokens and the number. No script, no
    outside file; text is escaped.

    Args:
        pattern: a pattern of ``Capture`` for one sequence, ``td["acts", "attn_pattern.3"][0]``.
        tokens: the Tq tokens; ``columns`` are the Tk, default the same.
        heads: which heads to show (default all); the number is shown as ``title`` and index.
        cell: width and height of a cell in pixels.

    Raises ``ValueError`` where tokens and pattern do not fit.

    >>> import torch
    >>> view = attention_view(torch.eye(2), ["<s>", "a"])
    >>> "&lt;s&gt;" in str(view), str(view).count("<td")
    (True, 4)
    """
    values = pattern.detach().float().cpu()
    values = values.unsqueeze(0) if values.ndim == 2 else values
    names = list(tokens) if columns is None else list(columns)
    if values.ndim != 3 or values.shape[1:] != (len(tokens), len(names)):
        raise ValueError(
            f"attention_view expects a pattern (H, {len(tokens)}, {len(names)}) of one sequence for its tokens, got "
            f"{tuple(pattern.shape)}. Remedy: pattern[example], and a token for each position."
        )
    tables = [
        _table(values[head], list(tokens), names, f"{title} {head}" if pattern.ndim > 2 else title)
        for head in (range(len(values)) if heads is None else heads)
    ]
    return AttentionView(f'{_STYLE % (cell, cell)}<div class="tgav">{"".join(tables)}</div>')


def _table(values: Tensor, rows: list[str], columns: list[str], caption: str) -> str:
    head = "".join(f'<th class="c">{escape(visible(name))}</th>' for name in columns)
    body = []
    for row, weights in zip(rows, values.tolist()):
        cells = "".join(
            f'<td style="background:rgba(0,60,140,{min(max(w, 0.0), 1.0):.3f})" '
            f'title="{escape(visible(row), quote=True)} &rarr; {escape(visible(name), quote=True)}: {w:.3f}"></td>'
            for name, w in zip(columns, weights)
        )
        body.append(f"<tr><th>{escape(visible(row))}</th>{cells}</tr>")
    return (
        f"<table><caption>{escape(visible(caption))}</caption><tr><th></th>{head}</tr>{''.join(body)}</table>"
    )
