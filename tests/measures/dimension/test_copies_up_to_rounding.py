"""The same sentences in other batches: rows that differ in their last bits are copies, in every estimator and table."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom.cli.demo import demo_model, demo_texts

ESTIMATORS = {
    "TwoNN": {},
    "Gride": {"range_max": 16},
    "LevinaBickel": {"k": 12},
    "MOM": {"k": 12},
    "TLE": {"k": 12},
    "LocalKNN": {"k": 6},
    "LocalPCA": {"k": 12},
    "CAPCA": {"k": 12},
}


def two_roundings(dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """400 rows, and 70 of them by another order of the same sum, two of which are equal to the bit."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.sin(torch.randn(400, 9, generator=g) @ torch.randn(9, 384, generator=g))
    weight = torch.randn(384, 48, generator=g)
    if dtype != torch.float32:
        hidden, weight = hidden.to(dtype).float(), weight.to(dtype).float()
    one = hidden @ weight
    two = sum(hidden[:70, part] @ weight[part] for part in torch.arange(384).flip(0).split(48))
    one, two = one.to(dtype), two.to(dtype)
    two[:2] = one[:2]
    return one, two


@pytest.mark.parametrize("name", list(ESTIMATORS))
@pytest.mark.parametrize(
    "dtype, scale",
    [
        (torch.float32, 1e-6),
        (torch.float32, 1e6),
        (torch.bfloat16, 1e-6),
        (torch.bfloat16, 1e6),
        (torch.float16, 1),
    ],
)
def test_every_estimator_and_source(name, dtype, scale):
    one, two = two_roundings(dtype, 0)
    exact = int((one[:70] == two).all(1).sum())
    both = torch.cat((one, two)) * scale
    stage = getattr(tg, name)
    right = stage(**ESTIMATORS[name])(TensorDict(sample=one * scale))["dimension"]
    td = tg.NearestNeighbors(40)(TensorDict(sample=both))
    assert td["neighbors", "duplicates"] == 70 and td["neighbors", "near_duplicates"] == 70 - exact
    for source in ("sample", "neighbors"):
        found = stage(**ESTIMATORS[name], source=source)(td.copy())["dimension"]
        (leaves,), (expected,) = found.values(), right.values()
        for leaf in ("estimate", "standard_error", "scale"):
            torch.testing.assert_close(leaves[leaf], expected[leaf], rtol=1e-12, atol=0)
        assert leaves["duplicates"] == 70 and leaves["near_duplicates"] == 70 - exact
        assert (leaves["rows"] == 400).all()


def test_decimation_and_the_covariance_of_all_rows_leave_them_out_too():
    one, two = two_roundings(torch.float32, 1)
    both, near = torch.cat((one, two)), int((one[:70] != two).any(1).sum())
    pca = tg.GlobalPCA(rule="participation_ratio")
    for found, right in (
        (tg.Decimation(min_rows=470)(both), tg.Decimation(min_rows=400)(one)),
        (pca(both), pca(one)),
    ):
        estimate, _, _, rows, duplicates, near_duplicates = found
        assert (rows, duplicates, near_duplicates) == (400, 70, near)
        torch.testing.assert_close(estimate, right[0])


def test_the_table_over_all_rows_is_that_of_the_data_as_given():
    one, two = two_roundings(torch.float32, 2)
    both = torch.cat((one, two))
    table = tg.functional.nearest_neighbors(both, 5)
    distance = torch.cdist(both.double(), both.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(torch.inf)
    torch.testing.assert_close(table.distance, distance.sort(-1).values[:, :5], rtol=1e-12, atol=0)
    assert table.distinct_distance[:400].isfinite().all() and table.distinct_distance[400:].isnan().all()


def batches(texts, tokenizer, size, length=None):
    how = {"padding": "max_length", "max_length": length} if length else {"padding": True}
    for start in range(0, len(texts), size):
        yield dict(tokenizer(texts[start : start + size], return_tensors="pt", truncation=True, **how))


@pytest.mark.parametrize(
    "dtype, site, rtol",
    [(torch.float32, "residual_output.2", 0.01), (torch.bfloat16, "residual_output.5", 0.03)],
)
def test_a_trained_model_on_the_same_sentences_in_other_batches(dtype, site, rtol):
    """Distinct tokens of a trained encoder are not merged; eight sentences that come again, otherwise padded, are."""
    model, tokenizer = demo_model()
    model = model.to(dtype)
    texts = [sentence[:60] for text in demo_texts()[:10] for sentence in text.split(". ")[:3]]
    tokens, again = (sum(len(tokenizer(text)["input_ids"]) for text in part) for part in (texts, texts[:8]))
    results = []
    for size, length in ((1, None), (len(texts), 40), (7, None)):
        capture = tg.Capture(model, site)
        s = capture.sites
        stages = [tg.TwoNN(method="ml"), tg.LevinaBickel(), tg.Gride(range_max=8)]
        pipeline = TensorDictSequential(
            capture,
            tg.SelectTokens(s),
            tg.RowSample(s, size=8192),
            *[tg.ForEach(stage, s) for stage in stages],
        )
        given = [*batches(texts, tokenizer, size, length), *batches(texts[:8], tokenizer, 3, 64)]
        found = tg.run(pipeline, given, progress=False)
        assert len(found["sample", s[0]]) == tokens + again and found["sample", s[0]].dtype == dtype
        results.append(found["dimension", s[0]])
    for result in results:
        assert result["gride", "duplicates"] == again and result["gride", "rows"][0] == tokens
        for name in ("twonn", "levina_bickel", "gride"):
            expected = results[0][name, "estimate"]
            torch.testing.assert_close(result[name, "estimate"], expected, rtol=rtol, atol=0)
