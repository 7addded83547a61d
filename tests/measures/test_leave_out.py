"""What measures are without each group of documents, against the measure computed anew on the rows that are left."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.measures.dimension.subsets_of_groups import group_subsets
from tdgeom.measures.jackknife import group_jackknife
from tdgeom.measures.leave_out_moments import LeaveOutMoments
from tdgeom.measures.sample_metrics import SAMPLE_METRICS
from tdgeom.measures.sample_without_groups import quantile_without
from tdgeom.measures.spectrum_errors import ERROR_METRICS
from tdgeom.numerics.document_groups import document_groups


def documents(n, d, length=8, seed=0, decay=1.0):
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(-(-n // length), d, generator=generator).repeat_interleave(length, 0)[:n]
    scale = torch.arange(1, d + 1) ** (-decay / 2)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    x = ((own + torch.randn(n, d, generator=generator)) * scale) @ turn + 3
    index = torch.arange(n)
    return x, (index // length) << 20 | index % length


def spectra(x, ids, groups=20, **settings):
    td = tg.GroupedCovariance(groups=groups)(TensorDict(tokens=x, row_id=ids))
    return tg.SpectrumErrors()(tg.LeaveOutSpectrum(**settings)(td))


def numpy_spectra(x, ids, groups=20):
    group = document_groups(ids, groups)
    kept = [torch.ones_like(group, dtype=torch.bool), *(group != g for g in range(groups))]
    return np.stack([np.linalg.eigvalsh(np.cov(x[k].double().numpy().T))[::-1] for k in kept])


def test_narrow_spectra_are_decompositions_of_what_is_left():
    x, ids = documents(400, 12)
    td = spectra(x, ids)
    np.testing.assert_allclose(td["replicates", "spectra"], numpy_spectra(x, ids), rtol=1e-6)
    plain = tg.EigenSpectrum()(tg.StreamingCovariance()(TensorDict(tokens=x)))
    torch.testing.assert_close(td["eigenvalues"], plain["eigenvalues"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("massive", [False, True])
def test_perturbed_spectra_give_the_errors_of_decomposed_ones(massive):
    """Beyond the width up to which each is decomposed; with a massive feature the errors of all others stay right."""
    x, ids = documents(3000, 280)
    if massive:
        x[:, 3] *= 300
    found, exact = spectra(x, ids), spectra(x, ids, exact=True)
    np.testing.assert_allclose(exact["replicates", "spectra"], numpy_spectra(x, ids), rtol=1e-3, atol=1e-9)
    for name in ERROR_METRICS:
        near = float(found["spectrum", f"{name}_se"] / exact["spectrum", f"{name}_se"])
        assert 0.8 < near < 1.2 if "slope" in name or name in ("k99", "alpha_req") else 0.93 < near < 1.07, (
            name,
            near,
        )
    other = torch.linalg.qr(torch.randn(280, 32, dtype=torch.float64)).Q
    errors = [
        group_jackknife(F.feature_subspace_novelty(td["replicates", "subspaces"], other.expand(21, -1, -1)),
                        td["replicates", "rows"]).standard_error
        for td in (found, exact)
    ]  # fmt: skip
    assert 0.8 < float(errors[0] / errors[1]) < 1.3


def test_the_error_of_k90_is_that_of_its_interpolated_value():
    assert float(F.components_interpolated(torch.tensor([6.0, 3.0, 1.0]), 0.9)) == pytest.approx(2.0)
    assert float(F.components_interpolated(torch.tensor([5.0, 5.0]), 0.25)) == pytest.approx(0.5)
    x, ids = documents(600, 20)
    td = spectra(x, ids)
    left = numpy_spectra(x, ids)
    grid = np.arange(21)
    k90 = [np.interp(0.9, np.r_[0, np.cumsum(v) / v.sum()], grid) for v in left]
    wanted = group_jackknife(torch.tensor(np.array(k90)), td["replicates", "rows"]).standard_error
    assert float(td["spectrum", "k90_se"]) == pytest.approx(float(wanted), rel=1e-4)


def test_rows_too_wide_for_groups_take_those_of_the_sample():
    """All rows are in the sample here, so that the errors must be those of all rows' groups."""
    x, ids = documents(900, 280)
    td = TensorDict(tokens=x, row_id=ids, sample=x, sample_row_id=ids)
    held = tg.GroupedCovariance(groups=20, widest=279)(td.copy())
    assert held["group_moments", "scatter"].numel() == 0
    with pytest.raises(ValueError, match="rows of 280 features are wider than.*RowSample and SampleGroups"):
        tg.LeaveOutSpectrum()(TensorDict({k: held[k] for k in ("moments", "group_moments")}))
    wide = tg.SpectrumErrors()(tg.LeaveOutSpectrum()(tg.SampleGroups(groups=20)(held)))
    all_rows = spectra(x, ids)
    for name in ERROR_METRICS:
        near = float(wide["spectrum", f"{name}_se"] / all_rows["spectrum", f"{name}_se"])
        assert 0.97 < near < 1.03, (name, near)
    torch.testing.assert_close(wide["moments", "covariance"], all_rows["moments", "covariance"])


def sample_td(x, ids, groups=20, **more):
    return tg.SampleGroups(groups=groups)(TensorDict(sample=x, sample_row_id=ids, **more))


def anew(stage, x, ids, groups=20):
    """The stage on the rows that are left, called by hand."""
    group = document_groups(ids, groups)
    kept = [torch.ones_like(group, dtype=torch.bool), *(group != g for g in range(groups))]
    found = []
    for k in kept:
        out = stage(TensorDict({key: value[k] for key, value in zip(stage.in_keys, x)}))
        found.append([out[key].double() for key in stage.out_keys])
    return [torch.stack(values) for values in zip(*found)]


@pytest.mark.parametrize("width", [20, 200])
def test_sample_metrics(width):
    """Up to some width anew; beyond it from one basis, with errors within a fifth."""
    x, ids = documents(2000, width, decay=0.5)
    td = tg.LeaveOut(tg.SampleMetrics())(sample_td(x, ids))
    wanted = anew(tg.SampleMetrics(), [x], ids)
    rows = td["sample_group_rows"]
    for name, other in zip(SAMPLE_METRICS, wanted):
        value = td["sample_metrics", name].double()
        torch.testing.assert_close(value[0], other[0], rtol=1e-9, atol=1e-12)
        if name in ("norm_max", "sv_numerical_rank", "sv_few_rows"):
            continue
        a, b = group_jackknife(value, rows).standard_error, group_jackknife(other, rows).standard_error
        # quantiles of the rows left jump: those of the shares below vary by their own way
        most = 0.6 if name.startswith("norm_q") else 0.2 if width > 100 else 1e-4
        assert float(a / b) == pytest.approx(1, abs=most), name


def test_errors_of_quantiles_are_the_spread_over_samples_each_time():
    """One of 20 groups of 60 rows: those of the quantiles of the rows left vary by 0.39 of themselves."""
    generator, found = torch.Generator().manual_seed(0), []
    group = (torch.arange(120) % 20).repeat_interleave(10)
    for _ in range(150):
        own = torch.randn(120, 1, dtype=torch.float64, generator=generator)
        norms = (0.2 * (own + torch.randn(120, 10, dtype=torch.float64, generator=generator))).exp().flatten()
        values = quantile_without(norms, 0.95, group, 20)
        assert float(values[0]) == pytest.approx(np.quantile(norms.numpy(), 0.95))
        found.append([float(values[0]), float(group_jackknife(values, torch.bincount(group)).standard_error)])
    value, error = np.array(found).T
    assert np.sqrt((error**2).mean()) / value.std() == pytest.approx(1, abs=0.2)
    assert error.std() / error.mean() < 0.33


@pytest.mark.parametrize(
    "stage",
    [tg.LinearCKA(estimator="both"), tg.LayerCosine(), tg.Procrustes(), tg.RSA()],
    ids=["cka", "cosine", "procrustes", "rsa"],
)
def test_pairs_leave_a_groups_rows_out_of_both_sides(stage):
    x, ids = documents(300, 16)
    y = x @ torch.randn(16, 16) + torch.randn(300, 16)
    td = tg.LeaveOutPair(stage)(sample_td(TensorDict(a=x, b=y), ids))
    for key, wanted in zip(stage.out_keys, anew(stage, [x, y], ids)):
        torch.testing.assert_close(td[key].double(), wanted, rtol=1e-7, atol=1e-9)


def test_cka_in_float32_where_rows_are_many():
    x, ids = documents(4096, 768, decay=1.5)
    x[:, 5] *= 100
    y = x @ torch.randn(768, 300) / 27 + torch.randn(4096, 300)
    stage = tg.LinearCKA(estimator="both")
    td = tg.LeaveOutPair(stage)(sample_td(TensorDict(a=x, b=y), ids, groups=3))
    for key, wanted in zip(stage.out_keys, anew(stage, [x, y], ids, groups=3)):
        torch.testing.assert_close(td[key], wanted, rtol=1e-5, atol=1e-6)


def test_foreach_prepares_a_site_once_and_equals_single_calls():
    x, ids = documents(200, 6)
    sites = ["s.0", "s.1", "s.2"]
    td = tg.SampleGroups(groups=5)(
        TensorDict(
            {"sample": {s: x + i * torch.randn(200, 6) for i, s in enumerate(sites)}, "sample_row_id": ids}
        )
    )
    stage = tg.LeaveOutPair(tg.LinearCKA())
    out = tg.ForEachPair(stage, sites)(td.copy())
    for a, b in pairwise(sites):
        one = stage(sample_a=td["sample", a], sample_b=td["sample", b], sample_group=td["sample_group"],
                    sample_group_rows=td["sample_group_rows"])  # fmt: skip
        assert torch.equal(out["between", f"{a}->{b}", "linear_cka"], one)
    each = tg.ForEach(tg.LeaveOut(tg.SampleMetrics()), sites)(td.copy())
    assert each["sample_metrics", "s.1", "ve_4"].shape == (6,)


class Half(tg.Stage):
    """A measure of one's own of rows and labels, with a way of its own."""

    reads = {"sample": "N D", ("sample_carried", "label"): "N"}
    writes = [("sample_metrics", "half")]

    def compute(self, sample, label):
        """A mean over the rows of one label."""
        return sample[label == 1].double().mean()


class Quick(Half):
    """The same, that knows a shorter way."""

    def leave_out(self, inputs, group, groups):
        """Not the same numbers, to be told apart."""
        return [torch.arange(groups + 1, dtype=torch.float64)]


def test_stages_of_ones_own():
    x, ids = documents(200, 3)
    label = torch.arange(200) % 3
    td = sample_td(x, ids)
    td["sample_carried"] = {"label": label}
    found = tg.LeaveOut(Half())(td.copy())["sample_metrics", "half"]
    torch.testing.assert_close(found, anew(Half(), [x, label], ids)[0])
    assert tg.LeaveOut(Quick())(td)["sample_metrics", "half"].tolist() == list(range(21))


def test_what_cannot_leave_rows_out_is_refused():
    with pytest.raises(TypeError, match="LeaveOut takes a stage of a sample.*StreamingMean.*Replicates"):
        tg.LeaveOut(tg.StreamingMean())
    with pytest.raises(
        TypeError, match="LeaveOut takes a stage of one site, LinearCKA compares two: LeaveOutPair"
    ):
        tg.LeaveOut(tg.LinearCKA())
    with pytest.raises(TypeError, match="LeaveOutPair takes a stage of two sites, TwoNN is of one: LeaveOut"):
        tg.LeaveOutPair(tg.TwoNN())
    x, ids = documents(60, 3)
    td = tg.NearestNeighbors(5)(sample_td(x, ids))
    with pytest.raises(ValueError, match=r"TwoNN reads \('neighbors', 'duplicates'\).*source='sample'"):
        tg.LeaveOut(tg.TwoNN(source="neighbors"))(td)


def neighbours(seed, n=600, length=6):
    """Rows of documents in four dimensions, a noisy copy of them, and labels that lie along one direction."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(n // length, 4, generator=generator).repeat_interleave(length, 0)
    x = 0.55 * own + 0.84 * torch.randn(n, 4, generator=generator)
    y = x + 0.5 * torch.randn(n, 4, generator=generator)
    index = torch.arange(n)
    return x, y, (x[:, 0] > 0).long(), (index // length) << 20 | index % length


def neighbour_values(seed):
    x, y, label, ids = neighbours(seed)
    td = sample_td(TensorDict(a=x, b=y, one=x), ids)
    td["sample_carried"] = {"label": label}
    for stage in (
        tg.LeaveOut(tg.TwoNN(in_keys=[("sample", "one")])),
        tg.LeaveOut(tg.Gride(range_max=16, in_keys=[("sample", "one")])),
        tg.LeaveOut(tg.LevinaBickel(k=10, in_keys=[("sample", "one")])),
        tg.LeaveOut(tg.LabelOverlap(k=10, in_keys=[("sample", "one"), ("sample_carried", "label")])),
        tg.LeaveOutPair(tg.NeighborhoodOverlap(k=10)),
        tg.LeaveOutPair(tg.JaccardKNN(k=10)),
    ):
        td = stage(td)
    keys = [
        ("dimension", "twonn", "estimate"), ("dimension", "gride", "estimate"), ("dimension", "levina_bickel", "estimate"),
        ("neighborhood", "label_overlap"), ("between", "neighborhood_overlap"), ("between", "jaccard_knn"),
    ]  # fmt: skip
    return {key[-2] + "/" + key[-1]: td[key].reshape(21, -1)[:, -1] for key in keys}, td["sample_group_rows"]


@pytest.mark.parametrize("stage", [tg.LevinaBickel(k=18), tg.Gride(range_max=32)], ids=["local", "scales"])
def test_errors_of_what_looks_far_are_of_halves(stage):
    """Against the stage called on the rows of each half of the groups."""
    x, _ = documents(400, 3)
    td = TensorDict(sample=x, sample_group=torch.arange(400) // 20, sample_group_rows=torch.full((20,), 20))
    value = tg.LeaveOut(stage)(td.copy())["dimension", stage.name, "estimate"].reshape(21, -1)[:, -1]
    halves = group_subsets(20, 0.5)
    assert halves.sum(0).tolist() == halves.sum(1).tolist() == [10] * 20
    kept = [picked[td["sample_group"]] for picked in halves]
    apart = torch.stack([stage(sample=x[rows])[0].reshape(-1)[-1] for rows in kept])
    sums = apart.double().var()  # of n/2 rows: the variance of n is n/2/(n - n/2) times it
    error = group_jackknife(value, td["sample_group_rows"]).standard_error
    worth = 16.67  # independent halves that twenty are worth, and Student's t of so many
    assert float(error / sums.sqrt()) == pytest.approx(
        student.ppf(0.975, worth) / student.ppf(0.975, 19), rel=1e-2
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_errors_of_nearest_neighbours_are_the_spread_over_samples():
    """Leaving groups out of the table itself gives 1.6 times the spread, fixed neighbours 0.7."""
    values, errors = {}, {}
    for seed in range(30):
        found, rows = neighbour_values(seed)
        for name, value in found.items():
            values.setdefault(name, []).append(float(value[0]))
            errors.setdefault(name, []).append(float(group_jackknife(value, rows).standard_error))
    for name, several in values.items():
        ratio = np.sqrt(np.mean(np.square(errors[name]))) / np.std(several, ddof=1)
        assert 0.7 < ratio < 1.45, (name, ratio)  # 30 samples tell a spread to 13 %


def test_the_first_value_of_neighbour_measures_is_the_measures_own():
    found, _ = neighbour_values(0)
    x, y, label, _ = neighbours(0)
    assert float(found["twonn/estimate"][0]) == float(F.twonn(x).estimate)
    assert float(found["between/neighborhood_overlap"][0]) == float(F.neighborhood_overlap(x, y, k=10))
    assert float(found["neighborhood/label_overlap"][0]) == float(F.label_overlap(x, label, k=10))


def test_too_few_rows_for_a_scale_are_told():
    x, _, _, ids = neighbours(0, n=120)
    with pytest.warns(
        tg.FewRowsWarning, match="Gride: no standard error at some scales: half of the 120 rows"
    ):
        td = tg.LeaveOut(tg.Gride(range_max=64))(sample_td(x, ids))
    assert td["dimension", "gride", "estimate"][1:].isnan().all()


def kinds(seed):
    """Documents of two kinds far from each other, of whose neighbours nearly all or few are kept."""
    generator = torch.Generator().manual_seed(seed)
    kind = (torch.rand(60, 1, generator=generator) < 0.5).repeat_interleave(10, 0)
    x = torch.randn(600, 3, generator=generator) + 40 * kind
    return x, x + torch.where(kind, 0.03, 0.7) * torch.randn(600, 3, generator=generator), torch.arange(600)


@pytest.mark.slow
@pytest.mark.parametrize("measure", [tg.NeighborhoodOverlap, tg.JaccardKNN])
def test_errors_of_overlaps_where_documents_differ(measure):
    """What a neighbour shared by both sides leaves behind is another shared one: counted as lost it would double the error."""
    values, errors = [], []
    for seed in range(40):
        x, y, index = kinds(seed)
        td = sample_td(TensorDict(a=x, b=y), (index // 10) << 20 | index % 10)
        value = tg.LeaveOutPair(measure(k=10))(td)["between"].values()
        found = group_jackknife(next(iter(value)), td["sample_group_rows"])
        values.append(float(found.estimate))
        errors.append(float(found.standard_error))
    assert 0.75 < np.sqrt(np.mean(np.square(errors))) / np.std(values, ddof=1) < 1.3


@pytest.mark.parametrize(
    "stage", [tg.RankMe(), tg.ParticipationRatio()], ids=["rankme", "participation_ratio"]
)
def test_measures_of_moments_have_the_errors_of_the_samples_rows(stage):
    """The sample is all rows here, so that the errors are those of all rows."""
    x, ids = documents(600, 20)
    td = tg.StreamingCovariance()(TensorDict(tokens=x, sample=x, sample_row_id=ids))
    key = stage.out_keys[0]
    found = LeaveOutMoments(stage)(tg.SampleGroups()(td))
    group = document_groups(ids, 20)
    kept = [torch.ones_like(group, dtype=torch.bool), *(group != g for g in range(20))]
    left = [stage(tg.StreamingCovariance()(TensorDict(tokens=x[k])))[key] for k in kept]
    rows = found["sample_group_rows"]
    assert float(found[key][0]) == pytest.approx(float(left[0]))
    wanted = group_jackknife(torch.stack(left).double(), rows).standard_error
    own = group_jackknife(found[key], rows)
    assert float(own.standard_error) == pytest.approx(float(wanted), rel=1e-3) and abs(float(own.bias)) < 1e-9
    with pytest.raises(TypeError, match="LeaveOutMoments takes a stage of moments alone, such as RankMe"):
        LeaveOutMoments(tg.TwoNN())


@pytest.mark.parametrize("width", [20, 200])
def test_the_ablation_without_each_group(width):
    """Up to some width anew; beyond it along the eigenvectors of all rows, with errors within a fifth."""
    x, ids = documents(2000, width, decay=0.7)
    x = x * torch.linspace(0.1, 3, width)
    stage = tg.NormalizationAblation(variants=["raw", "token_rms", "feature_standardized", "remove_top_pc"])
    td = sample_td(x, ids)
    found = tg.LeaveOut(stage)(td.copy())
    group, rows = td["sample_group"], td["sample_group_rows"]
    left = [stage(TensorDict(sample=x))] + [stage(TensorDict(sample=x[group != g])) for g in range(20)]
    for variant in stage.variants:
        for metric in ("d_pr", "d_entropy", "effective_rank", "top10_share", "log_spectrum_slope_10_200"):
            key = ("ablation", variant, metric)
            wanted = group_jackknife(torch.stack([one[key] for one in left]), rows).standard_error
            near = float(group_jackknife(found[key], rows).standard_error / wanted)
            exact = width == 20 or variant == "remove_top_pc"
            if float(wanted) > 0:
                assert near == pytest.approx(1, abs=1e-3 if exact else 0.2), (key, near)
    assert float(group_jackknife(found["ablation", "raw", "k90"], rows).standard_error) > 0


def test_wide_spectra_take_their_bias_from_two_halves():
    """That of the decomposed replicates, whose own spread is not small."""
    ratios = {}
    for seed in range(4):
        x, ids = documents(4000, 260, seed=seed)
        td = tg.GroupedCovariance()(TensorDict(tokens=x, row_id=ids))
        both = [
            tg.SpectrumErrors(parts=True)(tg.LeaveOutSpectrum(exact=exact)(td.copy()))
            for exact in (False, True)
        ]
        assert both[0]["replicates", "halves"].shape == (2, 260) and both[1][
            "replicates", "halves"
        ].shape == (0, 260)
        for name in ("d_pr", "d_entropy", "effective_rank", "k90"):
            a, b = (float(one["spectrum_bias", name]) for one in both)
            ratios.setdefault(name, []).append((a, b))
    for name, pairs in ratios.items():
        halves, jackknife = np.mean(pairs, 0)
        assert jackknife < 0 and 0.6 < halves / jackknife < 1.6, (name, halves, jackknife)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_errors_from_subsets_are_the_spread_over_samples():
    values, errors = {}, {}
    for seed in range(30):
        x, y, _, ids = neighbours(seed)
        td = sample_td(TensorDict(a=x, b=y, one=x), ids)
        for stage in (
            tg.LeaveOut(tg.Decimation(in_keys=[("sample", "one")])),
            tg.LeaveOutPair(tg.CKNNA()),
            tg.LeaveOutPair(tg.InformationImbalance()),
        ):
            td = stage(td)
        held = {
            **{
                f"decimation {i}": v
                for i, v in enumerate(td["dimension", "twonn_decimation", "estimate"].unbind(-1))
            },
            **dict(td["between"].items()),
        }
        for name, value in held.items():
            found = group_jackknife(value, td["sample_group_rows"])
            values.setdefault(name, []).append(float(found.estimate))
            errors.setdefault(name, []).append(float(found.standard_error))
    for name, several in values.items():
        ratio = np.sqrt(np.mean(np.square(errors[name]))) / np.std(several, ddof=1)
        assert 0.65 < ratio < 1.6, (name, ratio)
