"""The attention view: a table of numbers in HTML that runs nothing."""

from __future__ import annotations

import pytest
import torch

import tdgeom as tg


def test_the_attention_view():
    pattern = torch.rand(3, 2, 2).softmax(-1)
    view = tg.attention_view(pattern, ["<s>", 'a"b'], heads=[2])
    html = view._repr_html_()
    assert html == str(view)
    assert "<script" not in html
    assert "<s>" not in html
    assert "&lt;s&gt;" in html
    assert html.count("<table>") == 1
    assert html.count("<td") == 4
    assert f"{pattern[2, 1, 0]:.3f}" in html
    assert "head 2" in html
    with pytest.raises(ValueError, match=r"\(H, 3, 3\).*Remedy"):
        tg.attention_view(pattern, ["a", "b", "c"])
