"""Closed forms from streamed moments against scikit-learn on all rows in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier, RidgeCV
from sklearn.model_selection import GridSearchCV, PredefinedSplit

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.probing.label_moments import LEAVES

SPLITS = [(600,), (1, 7, 64), (37,)]
ALPHAS = [1e-3, 1.0, 1e3]


def close(a, b, rtol=1e-6):
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def streamed(feed, data, label, sizes, **settings):
    stage = tg.StreamingLabelMoments(**settings)
    return dict(zip(LEAVES, feed(stage, sizes, data.x, label, data.row_id).result().values()))


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 100.0])
def test_ridge_is_sklearn_ridge(data, feed, sizes, alpha):
    moments = streamed(feed, data, data.y, sizes, folds=4)
    weight, bias = F.ridge_probe(moments, alpha)
    reference = Ridge(alpha=alpha or 1e-12).fit(data.x.numpy(), data.y.numpy())
    close(weight[0], reference.coef_)
    close(bias[0], reference.intercept_)


@pytest.mark.parametrize("sizes", SPLITS)
def test_linear_probe_is_sklearn_ridge_classifier_for_every_batch_split(data, feed, sizes):
    probe = tg.LinearProbe(alpha=2.0, holdout=0.0)
    out = feed(probe, sizes, data.x, data.label, data.row_id).result()
    reference = RidgeClassifier(alpha=2.0).fit(data.x.numpy(), data.label.numpy())
    close(out["weight"], reference.coef_)
    close(out["bias"], reference.intercept_)
    assert (probe.predict(data.x).numpy() == reference.predict(data.x.numpy())).all()


def test_two_classes_have_sklearns_coefficients_in_row_one(data):
    y = (data.label > 0).long()
    probe = tg.LinearProbe(alpha=1.0).fit(data.x, y)
    reference = RidgeClassifier(alpha=1.0).fit(data.x.numpy(), y.numpy())
    close(probe.fitted["weight"][1], reference.coef_.ravel())
    close(probe.fitted["weight"][0], -reference.coef_.ravel())
    unit = reference.coef_.ravel() / np.linalg.norm(reference.coef_.ravel())
    close(probe.direction(), np.stack([-unit, unit]))
    close(probe.direction(1), unit)
    close(probe.direction(unit=False)[-1], reference.coef_.ravel())


def test_alpha_by_folds_is_a_grid_search_over_the_same_groups(data, feed):
    alphas = np.logspace(-2, 6, 9).tolist()
    probe = tg.LinearProbe(alpha=alphas, folds=4, holdout=0.0)
    feed(probe, (50,), data.x, data.y, data.row_id).result()
    fold = F.fold_index(F.row_groups(data.row_id), 4, probe.seed)
    assert all(len(set(fold[F.row_groups(data.row_id) == g].tolist())) == 1 for g in range(60))
    search = GridSearchCV(
        Ridge(), {"alpha": alphas}, cv=PredefinedSplit(fold.numpy()), scoring="neg_mean_squared_error"
    ).fit(data.x.numpy(), data.y.numpy())
    close(probe.fitted["cv_errors"], -search.cv_results_["mean_test_score"])
    assert float(probe.fitted["alpha"]) == search.best_params_["alpha"]
    close(probe.fitted["weight"][0], search.best_estimator_.coef_)


def test_fold_errors_are_the_errors_of_refits(data, feed):
    moments = streamed(feed, data, data.y, (64,), folds=3)
    errors = F.fold_errors(moments, ALPHAS)
    fold = F.fold_index(F.row_groups(data.row_id), 3)
    for g in range(3):
        for a, alpha in enumerate(ALPHAS):
            fit = Ridge(alpha=alpha).fit(data.x[fold != g].numpy(), data.y[fold != g].numpy())
            gap = fit.predict(data.x[fold == g].numpy()) - data.y[fold == g].numpy()
            close(errors[g, a], (gap**2).mean())


def test_leave_one_out_is_ridge_cv(data):
    alphas = np.logspace(-2, 5, 8)
    x, y = data.x[:80], data.y[:80]
    reference = RidgeCV(alphas=alphas, store_cv_results=True).fit(x.numpy(), y.numpy())
    errors = F.ridge_loo(x, y[:, None], alphas)
    close(errors[:, :, 0].T, reference.cv_results_)
    probe = tg.LinearProbe(alpha=alphas.tolist(), selection="loo").fit(x, y)
    assert float(probe.fitted["alpha"]) == reference.alpha_
    close(probe.fitted["weight"][0], reference.coef_)
    close(probe.fitted["bias"][0], reference.intercept_)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
@pytest.mark.parametrize("sizes", SPLITS)
def test_lda_is_sklearns(data, feed, sizes, shrinkage):
    probe = tg.LinearProbe(solver="lda", alpha=shrinkage, holdout=0.0)
    out = feed(probe, sizes, data.x, data.label, data.row_id).result()
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None).fit(
        data.x.numpy(), data.label.numpy()
    )
    close(out["weight"], reference.coef_)
    close(out["bias"], reference.intercept_)


def test_balanced_lda_takes_equal_priors(data):
    few = torch.cat(((data.label == 0).nonzero().flatten()[:20], (data.label == 1).nonzero().flatten()))
    x, y = data.x[few], data.label[few]
    probe = tg.LinearProbe(solver="lda", balanced=True).fit(x, y)
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.5, 0.5])
    reference.fit(x.numpy(), y.numpy())
    decision = probe.decision(x)
    # scikit-learn weighs the covariance by the priors too; the intercept's prior is what is compared.
    weight, bias = F.lda_probe(F.label_moments(x, torch.eye(2)[y]))
    plain = x @ weight.mT + bias
    shares = y.bincount().double() / len(y)
    torch.testing.assert_close(decision, plain - shares.log() + np.log(0.5))


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_is_sklearns(make_data, classes):
    data = make_data(n=200, d=5, classes=classes, seed=3)
    probe = tg.LinearProbe(solver="logistic", alpha=2.0).fit(data.x, data.label)
    reference = LogisticRegression(C=0.5, tol=1e-10, max_iter=20000).fit(data.x.numpy(), data.label.numpy())
    weight = probe.fitted["weight"]
    if classes == 2:
        close(weight[1] - weight[0], reference.coef_[0], 2e-4)
    else:
        close(weight, reference.coef_, 2e-4)
    agreement = (probe.predict(data.x).numpy() == reference.predict(data.x.numpy())).mean()
    assert agreement > 0.98


def test_moments_merge_whatever_classes_each_shard_met(data, feed):
    whole = streamed(feed, data, data.label, (600,), folds=2)
    order = torch.argsort(data.label, stable=True)
    a, b = tg.StreamingLabelMoments(folds=2), tg.StreamingLabelMoments(folds=2)
    for stage, part in ((a, order[:250]), (b, order[250:])):
        feed(stage, (33,), data.x[part], data.label[part], data.row_id[part])
    assert a.target_mean.shape[1] < b.target_mean.shape[1]
    for merged in (a.merge_(b),):
        for name, value in merged.result().items():
            torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-9)


def test_large_offsets_cost_no_digits(data):
    moments = F.label_moments(data.x + 1e6, data.y[:, None])
    weight, _ = F.ridge_probe(moments, 1.0)
    reference, _ = F.ridge_probe(F.label_moments(data.x, data.y[:, None]), 1.0)
    close(weight, reference)


def test_within_and_between_scatter_add_up(data, feed):
    moments = streamed(feed, data, data.label, (64,))
    within, between = F.within_scatter(moments)
    expected = sum((len(x) - 1) * torch.cov(x.T) for x in (data.x[data.label == c] for c in range(3)))
    torch.testing.assert_close(within, expected)
    torch.testing.assert_close(within + between, 599 * torch.cov(data.x.T))


def test_least_squares_of_dependent_features_has_the_least_norm(data):
    x = torch.cat((data.x, data.x[:, :3]), 1)
    weight, _ = F.ridge_probe(F.label_moments(x, data.y[:, None]), 0.0)
    centred = (x - x.mean(0)).numpy()
    expected = np.linalg.lstsq(centred, (data.y - data.y.mean()).numpy(), rcond=1e-10)[0]
    close(weight[0], expected)


def test_default_alphas_follow_the_scale_of_the_data(data):
    a = tg.LinearProbe().fit(data.x, data.label)
    b = tg.LinearProbe().fit(data.x * 1e-6, data.label)
    torch.testing.assert_close(a.decision(data.x), b.decision(data.x * 1e-6), rtol=1e-6, atol=1e-8)
