"""Concepts: bases from moments, projecting and rebuilding a stream, interpolation, what activates a concept."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from models import VOCAB, bert, gpt2, text_batch
from tdgeom import functional as F
from tdgeom.probing.label_moments import LEAVES

NAMES = ("basis", "dual", "eigenvalues", "explained_variance", "mean")


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(400, 8, generator=generator).double() @ torch.randn(8, 8, generator=generator).double()
        + 3
    )


def basis_of(rows, n, **settings):
    moments = tg.StreamingCovariance()(tokens=rows)
    return dict(
        zip(
            ("basis", "dual", "eigenvalues", "explained_variance", "mean"),
            tg.ConceptBasis(n, **settings)(moments[2], moments[1]),
        )
    )


def test_the_basis_is_pca_with_fixed_signs(rows):
    leaves = basis_of(rows, 3)
    pca = PCA(3).fit(rows.numpy())
    np.testing.assert_allclose(leaves["eigenvalues"], pca.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(leaves["explained_variance"], pca.explained_variance_ratio_, rtol=1e-9)
    np.testing.assert_allclose(leaves["basis"].T.abs(), np.abs(pca.components_), atol=1e-9)
    assert (leaves["basis"].gather(0, leaves["basis"].abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("whiten", [False, True])
def test_all_concepts_give_the_rows_back(rows, whiten):
    leaves = basis_of(rows, 8, whiten=whiten)
    coordinates = tg.Project()(rows, leaves["basis"], leaves["mean"])
    torch.testing.assert_close(
        tg.Reconstruct()(coordinates, leaves["dual"], leaves["mean"]), rows, rtol=0, atol=1e-9
    )
    single = rows.float()
    back = F.reconstruct(F.project(single, leaves["basis"], leaves["mean"]), leaves["dual"], leaves["mean"])
    torch.testing.assert_close(back, single.double(), rtol=0, atol=1e-5)
    if whiten:
        torch.testing.assert_close(torch.cov(coordinates.T), torch.eye(8).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("n", [1, 3, 7])
@pytest.mark.parametrize("whiten", [False, True])
def test_the_error_is_the_unexplained_variance(rows, n, whiten):
    leaves = basis_of(rows, n, whiten=whiten)
    back = F.reconstruct(F.project(rows, leaves["basis"], leaves["mean"]), leaves["dual"], leaves["mean"])
    lost = (rows - back).square().sum() / (rows - rows.mean(0)).square().sum()
    assert float(lost) == pytest.approx(float(1 - leaves["explained_variance"].sum()), rel=1e-9)


def test_no_variance_whitens_to_zero_and_not_to_infinity():
    rows = torch.randn(50, 3).double() @ torch.randn(3, 6).double()
    leaves = basis_of(rows, 6, whiten=True)
    coordinates = F.project(rows, leaves["basis"], leaves["mean"])
    assert coordinates.isfinite().all() and bool((coordinates[:, 3:] == 0).all())
    torch.testing.assert_close(F.reconstruct(coordinates, leaves["dual"], leaves["mean"]), rows)


def test_fisher_directions_are_sklearns():
    generator = torch.Generator().manual_seed(1)
    label = torch.arange(300) % 4
    x = (
        torch.randn(300, 6, generator=generator).double()
        + 2 * torch.randn(4, 6, generator=generator).double()[label]
    )
    moments = tg.StreamingLabelMoments(folds=3)(x, label, torch.arange(300) << 20)
    within, between = (scatter / 300 for scatter in F.within_scatter(dict(zip(LEAVES, moments))))
    for shrinkage in (0.0, 0.2):
        leaves = dict(zip(NAMES, tg.FisherBasis(shrinkage=shrinkage)(*moments)))
        assert leaves["basis"].shape == (6, 3)
        shrunk = (1 - shrinkage) * within + shrinkage * within.diagonal().mean() * torch.eye(6)
        values, vectors = scipy.linalg.eigh(between.numpy(), shrunk.numpy())
        np.testing.assert_allclose(leaves["eigenvalues"], values[::-1][:3], rtol=1e-8)
        np.testing.assert_allclose(leaves["basis"].abs(), np.abs(vectors[:, ::-1][:, :3]), rtol=1e-6)
        torch.testing.assert_close(
            leaves["basis"].T @ leaves["dual"], torch.eye(3).double(), atol=1e-9, rtol=0
        )
        if not shrinkage:
            lda = LinearDiscriminantAnalysis(solver="eigen").fit(x.numpy(), label.numpy())
            np.testing.assert_allclose(leaves["basis"].abs(), np.abs(lda.scalings_[:, :3]), rtol=1e-6)
            np.testing.assert_allclose(leaves["explained_variance"], lda.explained_variance_ratio_, rtol=1e-6)
    assert tg.FisherBasis(1)(*moments)[0].shape == (6, 1)


def test_fisher_refuses_what_it_cannot_solve():
    x, label = torch.randn(10, 20), torch.arange(10) % 2
    with pytest.raises(ValueError, match="shrinkage= above 0"):
        F.fisher_basis(F.label_moments(x, torch.eye(2)[label]))
    with pytest.raises(ValueError, match="two classes"):
        F.fisher_basis(F.label_moments(x, torch.ones(10, 1)))
    with pytest.raises(ValueError, match="ConceptBasis"):
        tg.ConceptBasis(0)


def test_a_stream_is_projected_in_a_second_pass():
    model = bert().eval()
    ids = torch.randint(3, VOCAB, (20, 11), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in ids.split(3)]
    sites = ["residual_output.0", "residual_output.2"]
    capture = tg.Capture(model, sites)
    select = tg.SelectTokens(capture.sites)
    first = tg.run(
        TensorDictSequential(
            capture,
            select,
            tg.ForEach(tg.StreamingCovariance(), sites),
            tg.ForEach(tg.ConceptBasis(4), sites),
        ),
        batches,
        progress=False,
    )
    names = ["coordinates", "reconstruction"]
    second = TensorDictSequential(
        capture,
        select,
        tg.ForEach(tg.Project(), sites),
        tg.ForEach(tg.Reconstruct(), sites),
        *(
            tg.Collect(
                sites,
                in_keys=[*((name, site) for site in sites), "row_id"],
                out_keys=[*(("kept", site, name) for site in sites), f"{name}_row_id"],
            )
            for name in names
        ),
        tg.ForEach(tg.StreamingCovariance(out_keys="again"), sites),
    )
    result = tg.run(second, batches, inputs=first, block_rows=50, progress=False)
    for site in sites:
        coordinates = result["kept", site, "coordinates"]
        assert coordinates.shape == (220, 4)
        # coordinates of the whole stream have the eigenvalues as variances and no correlation
        expected = torch.diag(first["concepts", site, "eigenvalues"])
        torch.testing.assert_close(
            torch.cov(coordinates.T), expected, rtol=1e-4, atol=1e-5 * float(expected.max())
        )
        back = result["kept", site, "reconstruction"]
        total = first["moments", site, "covariance"].diagonal().sum() * 219
        with torch.no_grad():
            rows = tg.Capture(model, [site])(input_ids=ids)
        rows = (rows if isinstance(rows, torch.Tensor) else rows[0]).flatten(0, 1)
        lost = (rows - back).square().sum() / total
        unexplained = 1 - first["concepts", site, "explained_variance"].sum()
        assert float(lost) == pytest.approx(float(unexplained), rel=1e-4)
        values, found = F.top_activating(coordinates, result["coordinates_row_id"], 3)
        best = int(coordinates[:, 1].argmax())
        assert int(found[1, 0]) == int(result["coordinates_row_id"][best]) and float(values[1, 0]) == float(
            coordinates[best, 1]
        )
        text = F.token_context(found[1, 0], ids.tolist(), lambda part: " ".join(map(str, part)), window=2)
        assert f"[[{int(ids.flatten()[best])}]]" in text and len(text.split()) <= 5


def test_interpolation_ends_are_exact_and_unit_stays_unit():
    for dtype in (torch.float32, torch.float64):
        a, b = torch.randn(5, 7).to(dtype), torch.randn(5, 7).to(dtype)
        for spherical in (False, True):
            way = F.interpolate(a, b, torch.linspace(0, 1, 11), spherical=spherical)
            assert way.shape == (11, 5, 7)
            assert torch.equal(way[0], a) and torch.equal(way[-1], b)
        u, v = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
        way = F.interpolate(u, v, torch.linspace(0, 1, 11), spherical=True)
        torch.testing.assert_close(way.norm(dim=-1), torch.ones(11, 5, dtype=dtype))
        step = (way[1:] * way[:-1]).sum(-1).clamp(max=1).arccos()
        torch.testing.assert_close(
            step, step[:1].expand_as(step), rtol=2e-2 if dtype == torch.float32 else 1e-6, atol=1e-6
        )
    torch.testing.assert_close(
        F.interpolate(2 * u, 4 * v, 0.5, spherical=True).norm(dim=-1), torch.full((5,), 3.0, dtype=dtype)
    )
    torch.testing.assert_close(F.interpolate(u, v, 0.25), 0.75 * u + 0.25 * v)


def test_interpolation_between_near_and_opposite_directions():
    u = torch.tensor([1.0, 0.0]).double()
    near = torch.tensor([1.0, 1e-9]).double()
    way = F.interpolate(u, near, torch.tensor([0.0, 0.5, 1.0]), spherical=True)
    assert float(way[1, 1]) == pytest.approx(5e-10, rel=1e-6)
    torch.testing.assert_close(F.interpolate(u, u, 0.3, spherical=True), u)
    with pytest.raises(ValueError, match="opposite"):
        F.interpolate(u, -u, 0.5, spherical=True)
    with pytest.raises(ValueError, match="zero vector"):
        F.interpolate(u, 0 * u, 0.5, spherical=True)


def test_interpolate_stage_between_two_columns_of_a_basis(rows):
    basis = basis_of(rows, 2)["basis"]
    out = tg.Interpolate([0.0, 0.5, 1.0], spherical=True)(basis[:, 0], basis[:, 1])
    torch.testing.assert_close(out[1], (basis[:, 0] + basis[:, 1]) / 2**0.5)


def test_the_most_activating_tokens_of_each_concept_with_their_text() -> None:
    model = gpt2()
    batch = {key: value.repeat(2, 1) for key, value in text_batch().items()}
    batch["input_ids"][3:] = batch["input_ids"][3:].flip(1)
    capture = tg.Capture(model, "residual_output.-1")
    (site,) = capture.sites
    first = tg.run(
        TensorDictSequential(
            capture,
            tg.SelectTokens([site]),
            tg.ForEach(tg.StreamingCovariance(), [site]),
            tg.ForEach(tg.ConceptBasis(n=3), [site]),
        ),
        [batch],
    )
    keys = [("coordinates", site), ("carried", "context"), "row_id"]
    second = tg.run(
        TensorDictSequential(
            tg.ContextWindow(before=2, after=1),
            capture,
            tg.SelectTokens([site], also=["context"]),
            tg.ForEach(tg.Project(), [site]),
            tg.MaxActivating(site, k=4, in_keys=keys),
        ),
        [batch],
        inputs=first,
    )
    with capture as calls, torch.no_grad():
        model(**batch)
    rows = calls[0]["acts", site].double().flatten(0, 1)
    along = (rows - first["concepts", site, "mean"]) @ first["concepts", site, "basis"]
    found = second["exemplars", site]
    torch.testing.assert_close(found["values"].double(), along.topk(4, 0).values.T, rtol=1e-5, atol=1e-6)
    ids = batch["input_ids"].flatten()
    length = batch["input_ids"].shape[1]
    best = along.argmax(0)
    assert found["context"][:, 0, 2].tolist() == ids[best].tolist()
    assert (found["row_id"][:, 0] >> 20).tolist() == (best // length).tolist()


def test_a_basis_of_centred_rows_needs_no_mean():
    covariance = torch.cov(torch.randn(5, 40))
    without = tg.functional.concept_basis(covariance, n=2)
    zero = tg.functional.concept_basis(covariance, torch.zeros(5), 2)
    assert without.keys() == zero.keys()
    for name, value in zero.items():
        assert torch.equal(value, without[name]), name
    assert tg.functional.concept_basis(covariance.expand(3, 5, 5), n=2)["mean"].shape == (3, 5)
