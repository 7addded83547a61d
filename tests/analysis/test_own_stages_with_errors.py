"""``errors=True`` reaches stages of one's own, in whatever they are handed over, or says which it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential

import tdgeom as tg
import tdgeom.functional as F
from tdgeom.numerics.document_groups import document_groups

SITES = ["module_output:0", "module_output:1", "module_output:2"]


class FourthPower(tg.Stage):
    """Mean fourth power of a sample."""

    reads = {"sample": "N D"}
    writes = [("sample_metrics", "fourth_power")]

    def compute(self, sample):
        return sample.double().pow(4).mean()


class NormGap(tg.PairStage):
    """How much longer rows are on one side."""

    reads = {("sample", "a"): "N D", ("sample", "b"): "N E"}
    writes = [("between", "norm_gap")]

    def prepare(self, rows):
        return rows.double().norm(dim=-1)

    def compare(self, a, b):
        return [(a - b).mean()]


class LargestNorm(tg.StreamingStage):
    """The largest norm of a row, and the norms of the first rows."""

    reads = ["tokens"]
    writes = [("largest", "norm"), ("largest", "every")]

    def __init__(self, *, in_keys=None, out_keys=None):
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.add_state("norms", torch.float64)

    def start(self, rows):
        return {"norms": torch.zeros(0, dtype=torch.float64)}

    def accumulate(self, rows):
        self.norms = torch.cat((self.norms, rows.double().norm(dim=-1)))

    def combine(self, other):
        self.norms = torch.cat((self.norms, other.norms))

    def fits(self, name, value):
        return True

    def result(self):
        return {"norm": self.norms.max(), "every": self.norms}


class Trace(tg.Stage):
    """The sum of a spectrum."""

    reads = {"eigenvalues": "D"}
    writes = [("spectrum", "trace")]

    def compute(self, eigenvalues):
        return eigenvalues.sum(-1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3)))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"input": torch.randn(20, 6, generator=generator)} for _ in range(12)]


def analyzed(model, *metrics):
    return tg.analyze_model(
        model, batches(), sites=SITES, metrics=["spectrum", *metrics], errors=True, progress=False
    )


def jackknife(value, rows):
    """The delete-a-group jackknife of a function of the rows, over their documents, which are single rows."""
    group = document_groups(torch.arange(len(rows)) << 20, 20)
    left = [value(rows[group != g]) for g in range(20)]
    values = torch.stack([value(rows), *left])
    return float(F.group_jackknife(values, torch.bincount(group, minlength=20)).standard_error)


@pytest.fixture(scope="module")
def rows(model):
    """What each site has."""
    found, x = {}, torch.cat([batch["input"] for batch in batches()])
    with torch.no_grad():
        for site, layer in zip(SITES, model):
            found[site] = x = layer(x)
    return found


def half_size(sample):
    return sample.double().abs().mean() / 2


OF_A_SITE = {
    "a stage": (FourthPower, "fourth_power", lambda x: x.double().pow(4).mean()),
    "a ForEach": (
        lambda: tg.ForEach(FourthPower(), SITES[:2]), "fourth_power", lambda x: x.double().pow(4).mean(),
    ),
    "a sequence": (
        lambda: TensorDictSequential(FourthPower()), "fourth_power", lambda x: x.double().pow(4).mean(),
    ),
    "a function": (
        lambda: TensorDictModule(half_size, in_keys=["sample"], out_keys=[("sample_metrics", "half")]),
        "half", half_size,
    ),
    "a stream": (LargestNorm, "norm", lambda x: x.double().norm(dim=-1).max()),
    "a ForEach of a stream": (
        lambda: tg.ForEach(LargestNorm(), SITES[:2]), "norm", lambda x: x.double().norm(dim=-1).max(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OF_A_SITE)
def test_stages_of_a_site(model, rows, kind):
    make, name, value = OF_A_SITE[kind]
    table = analyzed(model, make()).metrics.set_index("site")
    for site in SITES[:2]:
        assert table.loc[site, name] == pytest.approx(float(value(rows[site])), rel=1e-5)
        assert table.loc[site, f"{name}_se"] == pytest.approx(jackknife(value, rows[site]), rel=1e-4)
    assert np.isnan(table.loc[SITES[2], f"{name}_se"]) == kind.startswith("a ForEach")
    assert table["d_pr_se"].notna().all()


@pytest.mark.parametrize("pairs", ["consecutive", "all", [(SITES[2], SITES[0])]])
def test_pairs_of_ones_own_choice(model, rows, pairs):
    table = analyzed(model, tg.ForEachPair(NormGap(), SITES, pairs=pairs)).pairs
    table = table[table["norm_gap"].notna()]
    assert len(table) == {"consecutive": 2, "all": 3}.get(str(pairs), 1)
    for _, row in table.iterrows():
        both = torch.stack((rows[row["a"]].double().norm(dim=-1), rows[row["b"]].double().norm(dim=-1)), 1)
        wanted = jackknife(lambda x: (x[:, 0] - x[:, 1]).mean(), both)
        assert row["norm_gap_se"] == pytest.approx(wanted, rel=1e-4)


def test_several_streams_stand_at_a_site(model):
    streams = LargestNorm(), tg.Replicates(tg.StreamingMean(out_keys="average"), groups=10)
    results = analyzed(model, *streams)
    assert (results.metrics["norm_se"] > 0).all()
    assert (results.result["average", SITES[0], "mean_se"] > 0).all()
    assert results.result["average", SITES[0], "mean"].shape == (6,)


def test_a_stage_that_gets_no_error_is_named(model):
    with pytest.warns(UserWarning, match=r"errors=True: Trace reads \['eigenvalues'\].*no errors"):
        table = analyzed(model, Trace()).metrics
    assert "trace" in table and "trace_se" not in table


def test_documents_that_the_sample_does_not_keep_are_told():
    """A pipeline whose batches name documents, and whose sample forgets them."""
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "acts": {"x": torch.randn(8, 3, 4, generator=generator)},
            "document_id": torch.arange(8) // 2 + 4 * i,
        }
        for i in range(6)
    ]

    def pipeline(**sample):
        key = ("sample_metrics", "fourth_power")
        return TensorDictSequential(
            tg.SelectTokens(["x"]),
            tg.RowSample(["x"], **sample),
            tg.SampleGroups(groups=8),
            tg.ForEach(tg.LeaveOut(FourthPower()), ["x"]),
            tg.ForEach(tg.Jackknife([key], rows="sample_group_rows"), ["x"], shared=["sample_group_rows"]),
        )

    with pytest.warns(
        tg.FewRowsWarning, match=r"SampleGroups takes every sequence for a document.*also=\['document_id'\]"
    ):
        tg.run(pipeline(), data, progress=False)
    found = tg.run(pipeline(also=["document_id"]), data, progress=False)
    document = found["sample_carried", "document_id"]
    assert found["sample_group"].equal(document_groups(document << 20, 8)) and len(document.unique()) == 24
