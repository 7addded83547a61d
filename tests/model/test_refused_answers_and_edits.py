"""Answers and settings of edits that read as something else are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tdgeom as tg
from tdgeom.model.lens.answer_tokens import answer_tokens


class Words:
    """A tokenizer of three words; two ids read alike."""

    unk_token, unk_token_id = "[UNK]", 0
    ids = {"[UNK]": 0, "cat": 1, "dog": 3}

    def encode(self, word: str, add_special_tokens: bool = False) -> list[int]:
        return [self.ids.get(word, 0)]

    def decode(self, ids: list[int]) -> str:
        return {0: "[UNK]", 1: "cat", 2: "cat", 3: "dog"}[ids[0]]


def test_a_word_that_the_tokenizer_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="does not know the word 'Paris'"):
        answer_tokens("Paris", 1, tokenizer=Words())
    with pytest.raises(ValueError, match="does not know the word 'Rome'"):
        answer_tokens(("cat", "Rome"), 1, tokenizer=Words())
    assert answer_tokens("[UNK]", 1, tokenizer=Words())[0].tolist() == [[0]]


def test_answers_that_read_alike_have_their_ids_behind_them() -> None:
    assert answer_tokens([1, 2, 3], 1, tokenizer=Words())[2] == [["cat [1]", "cat [2]", "dog"]]
    with pytest.raises(ValueError, match="holds an answer twice"):
        answer_tokens([5, 5], 1)


def test_ids_are_whole_numbers_from_0_on() -> None:
    with pytest.raises(ValueError, match="from 0 on, got -100"):
        answer_tokens(-100, 1)
    with pytest.raises(ValueError, match="got torch.bool"):
        answer_tokens(torch.tensor([True]), 1)


@pytest.mark.parametrize(
    "clamp", [(1.0, -1.0), (float("nan"), 1.0), (None, None), [None, None], (float("inf"), None)]
)
def test_the_ends_of_a_clamp_are_numbers_in_order(clamp) -> None:
    with pytest.raises(ValueError, match=r"clamp=\) expects \(low, high\) with low <= high"):
        tg.Steer(torch.ones(4), clamp=clamp)


@pytest.mark.parametrize("name", ["coefficient", "share", "target"])
def test_a_strength_is_finite(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=\) is a finite number, got nan"):
        tg.Steer(torch.ones(4), **{name: float("nan")})


@pytest.mark.parametrize(
    "places",
    [{"positions": [1, 2], "source_positions": [3, 0]}, {"positions": [1, 1], "source_positions": [0, 3]}],
)
def test_positions_out_of_order_are_refused(places) -> None:
    donor = torch.zeros(1, 5, 16)
    with pytest.raises(ValueError, match="ascending order.*align="):
        tg.Patch(donor, **places)
    tg.Patch(donor, positions=[0, -1], source_positions=[1, -2])


def test_vectors_are_tensors_or_arrays_and_strengths_numbers() -> None:
    array, x = np.linspace(-1, 1, 4, dtype=np.float32), torch.randn(1, 2, 4)
    for of_array, of_tensor in (
        (tg.Steer(array, coefficient=np.float32(2)), tg.Steer(torch.tensor(array), coefficient=2.0)),
        (tg.Scale(array), tg.Scale(torch.tensor(array))),
        (tg.ProjectOut(array, mean=array), tg.ProjectOut(torch.tensor(array), mean=torch.tensor(array))),
        (tg.ProjectOnto(array[:, None]), tg.ProjectOnto(torch.tensor(array)[:, None])),
    ):
        torch.testing.assert_close(of_array(activation=x), of_tensor(activation=x))
    for make, match in (
        (lambda: tg.Steer("north"), "Steer expects numbers as vector: .* got str"),
        (lambda: tg.ProjectOut(None), "ProjectOut expects numbers as basis: .* got NoneType"),
        (lambda: tg.Steer(array, coefficient="3"), r"Steer\(coefficient=\) is a number, got the str '3'"),
        (lambda: tg.Steer(array, coefficient=None), r"Steer\(coefficient=\) is a number, got the NoneType"),
        (lambda: tg.Steer(array, share="1"), r"Steer\(share=\) is a number"),
        (lambda: tg.Scale("2"), r"Scale\(factor=\) is a number, got the str '2'"),
        (lambda: tg.BlockAttention(queries=0, keys=0, factor="0"), r"BlockAttention\(factor=\) is a number"),
        (
            lambda: tg.ActivationAddition(x, x, coefficient="1"),
            r"ActivationAddition\(coefficient=\) is a number",
        ),
    ):
        with pytest.raises(TypeError, match=match):
            make()
    for clamp in (3.0, ("a", 1.0), "ab"):
        with pytest.raises(ValueError, match=r"Steer\(clamp=\) expects \(low, high\)"):
            tg.Steer(array, clamp=clamp)
