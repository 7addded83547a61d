"""Every function of ``tdgeom.functional`` takes NumPy arrays, tables and lists, and gives what it gives of the same tensors."""

from __future__ import annotations

import inspect
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import tdgeom as tg
from function_examples import CALLS, OTHERS, Call, D, N, covariance, groups, labels, rows
from tdgeom import functional as F
from tdgeom.numerics.array_arguments import tensor_of

MASK = torch.arange(6) < torch.tensor([[6], [4]])


def folds() -> dict[str, Tensor]:
    """Label moments in four folds."""
    targets = torch.nn.functional.one_hot(labels(0), 2).double()
    parts = [F.label_moments(x, t) for x, t in zip(rows(0).split(10), targets.split(10))]
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


# name: a call of (tensors or mappings of tensors), and these
REST = {
    **{name: Call(getattr(F, name), lambda seed: (folds(),)) for name in (
        "class_means", "fisher_basis", "lda_probe", "leace", "mean_difference", "within_scatter")},
    "ridge_probe": Call(lambda m: F.ridge_probe(m, 0.5), lambda seed: (folds(),)),
    "pool_folds": Call(F.pool_folds, lambda seed: (folds(), torch.tensor([True, False, True, True]))),
    "fold_errors": Call(lambda m, a: F.fold_errors(m, a), lambda seed: (folds(), torch.tensor([0.1, 1.0]))),
    "aggregate_positions": Call(
        lambda v, k: F.aggregate_positions(v, k, "mean"), lambda seed: (rows(seed, D, 12).view(2, 6, D), MASK)
    ),
    "group_attention": Call(
        lambda p, a, b: F.group_attention(p, [a], [a, b]),
        lambda seed: (rows(seed, 6, 12).view(2, 1, 6, 6).softmax(-1), MASK, ~MASK),
    ),
    "lens_measures": Call(
        lambda z, f: F.lens_measures(z, ("entropy", "kl"), final=f, top=2), lambda seed: (rows(seed), rows(seed + 1))
    ),
    "position_mask": Call(F.position_mask, lambda seed: (MASK,)),
    "selection_mask": Call(F.selection_mask, lambda seed: (MASK,)),
    "clustered_error": Call(F.clustered_error, lambda seed: (rows(seed)[:, 0], groups())),
    "control_labels": Call(F.control_labels, lambda seed: (groups(), torch.tensor([3, 1]))),
    "fold_index": Call(lambda g: F.fold_index(g, 3), lambda seed: (groups(),)),
    "hash_ids": Call(lambda i: F.hash_ids(i, 3), lambda seed: (torch.arange(9) << 20,)),
    "holdout_mask": Call(lambda g: F.holdout_mask(g, 0.3), lambda seed: (groups(),)),
    "adjusted_p_values": Call(F.adjusted_p_values, lambda seed: (torch.tensor([0.1, 0.5, 0.02]),)),
    "document_shuffles": Call(lambda d: F.document_shuffles(d, 3), lambda seed: (groups(),)),
    "joint_p_values": Call(F.joint_p_values, lambda seed: (rows(seed)[:3, 0], rows(seed, 20)[:3])),
    "procrustes_bounds": Call(F.procrustes_bounds, lambda seed: (rows(seed), rows(seed + 1), torch.arange(N) // 2)),
    "rotated_null": Call(
        lambda x, y: F.rotated_null(F.soft_matching, x, y, repeats=19), lambda seed: (rows(seed), rows(seed + 1))
    ),
    "shuffled_null": Call(
        lambda x, y, d: F.shuffled_null(F.linear_cka, x, y, d, repeats=19), lambda seed: (rows(seed), rows(seed + 1), groups())
    ),
    "subspace_overlap_corrected": Call(
        lambda x, y, d: F.subspace_overlap_corrected(x, y, d, k=2), lambda seed: (rows(seed), rows(seed + 1), groups())
    ),
    "permutation_null": Call(
        lambda y, g: F.permutation_null(lambda z: z.double().mul(torch.arange(N)).sum(), y, g, repeats=5),
        lambda seed: (labels(seed), groups()),
    ),
    "probe_scores": Call(F.probe_scores, lambda seed: (rows(seed, 2), labels(seed), groups())),
    "row_groups": Call(F.row_groups, lambda seed: (torch.arange(9) << 20,)),
    "token_context": Call(
        lambda i: torch.tensor(len(F.token_context(i, [[1, 2, 3]], str, window=1))), lambda seed: (torch.tensor(1),)
    ),
}  # fmt: skip
EVERY = CALLS | REST


def array(x: Tensor) -> np.ndarray:
    return x.numpy()


def unwritable(x: Tensor) -> np.ndarray:
    found = x.numpy().copy()
    found.flags.writeable = False
    return found


KINDS = {
    "array": array,
    "unwritable": unwritable,
    "turned": lambda x: x.flip(0).contiguous().numpy()[::-1] if x.ndim else x.numpy(),
    "other byte order": lambda x: x.numpy().astype(x.numpy().dtype.newbyteorder()),
    "list": lambda x: x.tolist() if x.ndim else x.numpy(),
    "table": lambda x: (
        pd.DataFrame(x.numpy()) if x.ndim == 2 else (pd.Series(x.numpy()) if x.ndim == 1 else x.numpy())
    ),
}


def test_every_function_is_here() -> None:
    assert set(EVERY) == set(F.__all__) and set(REST) == set(OTHERS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EVERY)
def test_arrays_are_taken_as_tensors(name: str, kind: str) -> None:
    call = EVERY[name]
    given = call.inputs(1)
    expected = tree_leaves(call.function(*given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tree_leaves(call.function(*[
            {k: KINDS[kind](v) for k, v in one.items()} if isinstance(one, dict) or hasattr(one, "items") else KINDS[kind](one)
            for one in given
        ]))  # fmt: skip
    assert len(found) == len(expected)
    for value, right in zip(found, expected):
        assert isinstance(value, Tensor)
        torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_number_stands_for_a_tensor_of_it() -> None:
    c, m = covariance(0), rows(0).mean(0)
    torch.testing.assert_close(F.rankme(N, m.numpy(), c.numpy()), F.rankme(torch.tensor(N), m, c))
    assert F.interpolate([1.0, 0.0], [0.0, 1.0], 0.5).tolist() == [0.5, 0.5]


def test_keywords_and_mixtures_are_taken_too() -> None:
    x, y = rows(0), rows(1)
    torch.testing.assert_close(F.linear_cka(y=y.numpy(), x=x), F.linear_cka(x, y))
    torch.testing.assert_close(F.linear_cka(x.numpy().astype(np.longdouble), y), F.linear_cka(x, y))
    torch.testing.assert_close(F.linear_cka(x.half().numpy(), y), F.linear_cka(x.half(), y))
    torch.testing.assert_close(F.linear_cka([*x], y), F.linear_cka(x, y))
    assert F.label_overlap(x, labels(0).numpy().astype(np.uint16), k=5) == F.label_overlap(x, labels(0), k=5)
    torch.testing.assert_close(
        tg.LinearCKA()(sample_a=x.numpy(), sample_b=y.numpy()), F.linear_cka(x.numpy(), y.numpy())
    )


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (np.array([["a", "b"], ["c", "d"]]), TypeError, "ndarray of <U1.*numbered first"),
        (pd.DataFrame({"u": [1, 2], "v": ["x", "y"]}), TypeError, "DataFrame of object"),
        ([[1.0, 2.0], [3.0]], TypeError, "torch.as_tensor.*got list"),
        ("rows.npy", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
        (np.array(["2026-01-01"], dtype="datetime64[D]"), TypeError, "datetime64"),
        (np.ma.masked_array([[1.0, 2.0], [3.0, 4.0]], [[True, False], [False, False]]), ValueError, "masked array"),
        (np.array([2**63], dtype=np.uint64), ValueError, "beyond int64"),
    ],
)  # fmt: skip
def test_what_is_no_array_of_numbers_is_refused_by_name(given, error, says) -> None:
    with pytest.raises(
        error, match=f"twonn.* x .*{says}|twonn: x .*{says}|twonn expects numbers as x.*{says}"
    ):
        F.twonn(given)


def test_memory_is_shared_where_it_can_be() -> None:
    x = np.zeros((3, 2))
    assert tensor_of(x, "f", "x").data_ptr() == x.ctypes.data


@pytest.mark.parametrize("name", F.__all__)
def test_functions_keep_what_they_are(name: str) -> None:
    function = getattr(F, name)
    assert pickle.loads(pickle.dumps(function)) is function
    assert function.__doc__ and inspect.signature(function) == inspect.signature(inspect.unwrap(function))
    assert function.__module__ == "tdgeom.functional"


def test_tensors_pass_untouched_through_graphs_and_gradients() -> None:
    x, y = rows(0), rows(1)
    compiled = torch.compile(F.linear_cka, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y), F.linear_cka(x, y))

    class Alike(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return F.linear_cka(a, b)

    exported = torch.export.export(Alike(), (x, y)).module()
    torch.testing.assert_close(exported(x, y), F.linear_cka(x, y))
    x.requires_grad_()
    F.linear_cka(x, y.numpy()).backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
