"""Replicates of streams against the stage on the rows that are left, and the groups' moments against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom.numerics.document_groups import document_groups
from tdgeom.numerics.symmetric_strips import packed, packed_length, square_of, times

LEAVES = ("count", "mean", "covariance", "norm4", "norm2_x")


def documents(n=300, d=7, length=6, seed=0, offset=20.0):
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(-(-n // length), d, generator=generator, dtype=torch.float64).repeat_interleave(
        length, 0
    )[:n]
    x = own + torch.randn(n, d, generator=generator, dtype=torch.float64) + offset
    index = torch.arange(n)
    return TensorDict({"tokens": x, "row_id": (index // length) << 20 | index % length})


def part(td, rows):
    return td.apply(lambda value: value[rows], batch_size=[])


def only(stage, td, rows):
    return stage(part(td, rows))


def test_every_leading_item_is_the_stage_on_the_rows_that_are_left():
    td = documents()
    group = document_groups(td["row_id"], 5)
    for stage in (tg.StreamingCovariance(), tg.StreamingMean(), tg.StreamingSketch(k=2, size=6, probes=8)):
        found = tg.Replicates(stage, groups=5)(td.copy())
        assert torch.equal(found["replicates", "rows"], torch.bincount(group, minlength=5))
        for g, rows in enumerate((torch.ones(300, dtype=torch.bool), *(group != g for g in range(5)))):
            fresh = type(stage).from_settings(stage.settings())
            alone = only(fresh, td, rows)
            for key in stage.out_keys:
                torch.testing.assert_close(found[key][g], alone[key], rtol=1e-9, atol=1e-9, equal_nan=True)


def test_moments_of_all_rows_are_those_of_streaming_covariance():
    td = documents(n=500, d=150)
    plain, grouped = tg.StreamingCovariance()(td.copy()), tg.GroupedCovariance(groups=7)(td.copy())
    for leaf in LEAVES:
        torch.testing.assert_close(grouped["moments", leaf], plain["moments", leaf], rtol=1e-10, atol=1e-8)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([3, 130]), st.lists(st.integers(1, 199), max_size=3))
def test_groups_are_numpys_scatters_in_any_split(seed, d, cuts):
    td = documents(n=200, d=d, seed=seed)
    group, x = document_groups(td["row_id"], 4, seed=2), td["tokens"].numpy()
    stages = [tg.GroupedCovariance(groups=4, seed=2) for _ in range(2)]
    for number, rows in enumerate(torch.arange(200).tensor_split(sorted(set(cuts)))):
        stages[number % 2].update(part(td, rows))
    found = stages[0].merge_(stages[1]).publish(TensorDict({}))["group_moments"]
    for g in range(4):
        own = x[(group == g).numpy()]
        assert int(found["rows"][g]) == len(own)
        if not len(own):
            continue
        np.testing.assert_allclose(found["centre"][g], own.mean(0), rtol=1e-10)
        scatter = square_of(found["scatter"][g], d).double() * found["spread"] * found["spread"][:, None]
        wanted = (own - own.mean(0)).T @ (own - own.mean(0))
        bound = 2**-23 * (found["spread"] * found["spread"][:, None]).numpy()
        assert (np.abs(scatter.numpy() - wanted) <= bound).all()


def test_strips_hold_a_symmetric_matrix():
    matrix = torch.randn(300, 300, dtype=torch.float64)
    matrix = matrix + matrix.T
    flat, vector = packed(matrix), torch.randn(300, dtype=torch.float64)
    assert flat.shape == (packed_length(300),) and flat.numel() < 0.7 * 300**2
    assert torch.equal(square_of(flat, 300), matrix)
    torch.testing.assert_close(times(flat, vector), matrix @ vector)


@pytest.mark.parametrize("scale", [1e-20, 1e16])
def test_scales_of_features_cost_no_digits(scale):
    td = documents(d=4, offset=0.0)
    td["tokens"] = td["tokens"] * torch.tensor([1.0, scale, 1e3, 1e-3], dtype=torch.float64)
    found = tg.GroupedCovariance(groups=3)(td)["group_moments"]
    assert torch.isfinite(found["scatter"]).all() and found["scatter"].abs().max() <= 1 + 1e-6


def test_documents_stay_together_and_rows_need_not():
    td = documents(n=120)
    td["carried"] = {"document_id": td["row_id"] >> 22}  # four sequences are one document
    by = {
        by: tg.Replicates(tg.StreamingMean(), groups=4, by=by)(td.copy())
        for by in ("document", "sequence", "row")
    }
    expected = {
        "document": document_groups(td["carried", "document_id"] << 20, 4),
        "sequence": document_groups(td["row_id"], 4),
        "row": document_groups(td["row_id"], 4, by="row"),
    }
    for name, found in by.items():
        assert torch.equal(found["replicates", "rows"], torch.bincount(expected[name], minlength=4)), name
    assert ("carried", "document_id") not in tg.Replicates(tg.StreamingMean(), by="row").in_keys


def test_a_group_does_not_depend_on_what_else_there_is():
    ids = torch.arange(1000) << 20
    group = document_groups(ids, 20)
    order = torch.randperm(1000)
    assert torch.equal(document_groups(ids[order], 20), group[order])
    counts = torch.bincount(group, minlength=20)
    assert counts.min() > 25 and counts.max() < 80  # 50 on average
    with pytest.raises(ValueError, match="document_id is one whole number a row.*torch.unique"):
        document_groups(ids, 20, torch.rand(1000))


def test_values_so_far_where_one_group_has_all_rows():
    td = documents(n=6)
    with pytest.warns(tg.FewRowsWarning, match="all 6 rows are of one group of documents"):
        found = tg.Replicates(tg.StreamingCovariance(), groups=3)(td)
    assert torch.isfinite(found["moments", "covariance"][0]).all()
    own = int(document_groups(td["row_id"], 3)[0])
    assert found["moments", "covariance"][1 + own].isnan().all()
    assert torch.isfinite(found["moments", "covariance"][1 + (own + 1) % 3]).all()  # leaves nothing out


def test_a_stream_that_keeps_what_the_rows_call_for():
    """State whose shape is that of the rows held, group by group; outputs that differ in shape are refused."""
    td = documents(n=60)
    with pytest.raises(
        ValueError, match="Collect has another shape without each group.*do not stand side by side"
    ):
        tg.Replicates(tg.Collect(), groups=3)(td)


def test_what_is_no_stream_is_refused():
    with pytest.raises(
        TypeError, match="takes a streaming stage such as StreamingCovariance.*TwoNN.*LeaveOut"
    ):
        tg.Replicates(tg.TwoNN())
    with pytest.raises(ValueError, match="groups counts what is left out in turn, at least 2, got 1"):
        tg.Replicates(tg.StreamingMean(), groups=1)
    with pytest.raises(ValueError, match=r"by is one of \['document', 'sequence', 'row'\], got 'token'"):
        tg.GroupedCovariance(by="token")


def test_one_line_around_a_stage_of_a_pipeline():
    """The stages behind take the replicates as they are, and the errors are those of whole runs on what is left."""
    td = documents(n=400, d=5)
    s = ["x", "y"]
    rows = {("tokens", "x"): td["tokens"], ("tokens", "y"): td["tokens"] * torch.arange(1, 6)}
    batches = [
        TensorDict(
            {**{key: value[i : i + 64] for key, value in rows.items()}, "row_id": td["row_id"][i : i + 64]}
        )
        for i in range(0, 400, 64)
    ]
    keys = [("spectrum", "d_pr"), ("spectrum", "d_entropy")]
    pipeline = TensorDictSequential(
        tg.ForEach(tg.Replicates(tg.StreamingCovariance(), groups=8), s),
        tg.ForEach(tg.EigenSpectrum(k=2), s),
        tg.ForEach(tg.SpectrumMetrics(), s),
        tg.ForEach(tg.Jackknife([*keys, *(("spectrum", n) for n in ("k90", "near_rank1"))]), s),
    )
    result = tg.run(pipeline, batches, keep=["spectrum"], progress=False)
    group = document_groups(td["row_id"], 8)
    for site in s:
        x = rows["tokens", site].numpy()

        def d_pr(kept, x=x):
            values = np.linalg.eigvalsh(np.cov(x[kept].T))
            return values.sum() ** 2 / (values**2).sum()

        left = [d_pr(np.ones(400, bool)), *(d_pr((group != g).numpy()) for g in range(8))]
        wanted = tg.functional.group_jackknife(torch.tensor(left), torch.bincount(group, minlength=8))
        assert float(result["spectrum", site, "d_pr"]) == pytest.approx(left[0])
        assert float(result["spectrum", site, "d_pr_se"]) == pytest.approx(
            float(wanted.standard_error), rel=1e-6
        )
    frame = tg.to_frame(result, "spectrum")
    assert {"d_pr_se", "d_entropy_se"} <= set(frame.columns)
