"""One example of every public stage: how to make it and what it reads. ``test_contract.py`` runs them all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from sklearn.linear_model import LogisticRegression
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.core.streaming_stage import StreamingStage

# Not stages with keys of their own; each is tested where the reason says.
NOT_STAGES = {
    "Stage": "base class, tests/core/test_stage.py",
    "PairStage": "base class, tests/core/test_stage.py",
    "StreamingStage": "base class, tests/core/test_stage.py",
    "Probe": "base class of the probes, tests/probing",
    "Pipeline": "a TensorDictSequential, tests/core/test_pipeline.py",
    "ForEach": "takes its keys from the stage it repeats, tests/core/test_for_each.py",
    "ForEachPair": "takes its keys from the stage it repeats, tests/core/test_for_each.py",
    "Intervene": "runs a model under edits, tests/model/test_intervene.py",
    **{
        name: "an edit of one activation inside a model's forward pass, tests/model/test_intervene.py"
        for name in (
            "Edit",
            "Steer",
            "ActivationAddition",
            "Patch",
            "PathPatch",
            "Ablate",
            "ProjectOut",
            "ProjectOnto",
            "Scale",
            "BlockAttention",
        )
    },
    "LogitLens": "reads activations out through a model, tests/model/test_lens.py",
    "TunedLens": "reads activations out through a model, tests/model/test_lens.py",
    "Capture": "runs a model and names its outputs after sites, tests/model/test_capture.py",
}

N, D = 60, 5
SCRATCH = tempfile.TemporaryDirectory()  # of the stages that write files


@dataclass
class Example:
    """A stage, tensors for its default in_keys in their order, and the checks that mean nothing for it (with why)."""

    make: Callable[..., torch.nn.Module]
    inputs: Callable[[], list[torch.Tensor]]
    free_of_scale: tuple[int, ...] = ()  # which inputs may be scaled together without changing any output
    free_of_offset: tuple[int, ...] = ()
    batched: tuple[int, ...] = ()  # which inputs take leading dimensions
    exempt: Mapping[str, str] = field(default_factory=dict)

    def td(self, stage: torch.nn.Module | None = None) -> TensorDict:
        """The inputs under the stage's in_keys."""
        td = TensorDict({}, batch_size=[])
        for key, value in zip((stage or self.make()).in_keys, self.inputs()):
            td.set(key, value)
        return td


def rows(seed: int = 0, n: int = N, d: int = D) -> torch.Tensor:
    """(n, d) correlated float64 rows with an offset."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + 0.5


def ids(n: int = N) -> torch.Tensor:
    """Row ids of n sequences of one token."""
    return torch.arange(n) << 20


def labels(n: int = N) -> torch.Tensor:
    """Two classes that the rows tell apart, with exceptions."""
    x = rows()[:n]
    return ((x[:, 0] > x[:, 0].median()).long() + (torch.arange(n) % 7 == 0).long()) % 2


def moments(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The five leaves of StreamingCovariance."""
    stage = tg.StreamingCovariance()
    td = stage(TensorDict(tokens=x))
    return {key[-1]: td[key] for key in stage.out_keys}


def vectors(seed: int) -> torch.Tensor:
    """(D, 3) leading eigenvectors."""
    return F.eigen_spectrum(torch.cov(rows(seed).T), k=3)[1]


def label_moments() -> list[torch.Tensor]:
    """What StreamingLabelMoments writes on the example rows."""
    return list(tg.StreamingLabelMoments(n_classes=2)(rows(), labels(), ids()))


def basis() -> dict[str, torch.Tensor]:
    """What ConceptBasis writes on the example rows."""
    found = moments(rows())
    stage = tg.ConceptBasis(3)
    out = stage(*(found[key[-1]] for key in stage.in_keys))
    return {key[-1]: value for key, value in zip(stage.out_keys, out)}


def eraser() -> list[torch.Tensor]:
    """What LEACE writes on the example rows."""
    return list(tg.LEACE()(*label_moments()))


def group_moments() -> list[torch.Tensor]:
    """What LeaveOutSpectrum reads of the example rows."""
    td = tg.GroupedCovariance(groups=6)(TensorDict(tokens=rows(), row_id=ids()))
    return [td[key] for key in tg.LeaveOutSpectrum().in_keys[:7]]


def sample_groups() -> list[torch.Tensor]:
    """The groups of the example rows."""
    return list(tg.SampleGroups(groups=6)(sample_row_id=ids()))


def two_acts() -> list[torch.Tensor]:
    """Activations of two sites, and a label a sequence."""
    return [rows(0, 12).reshape(3, 4, D), rows(1, 12).reshape(3, 4, D), torch.arange(3)]


STREAMS = {
    "batched": "rows are the leading dimension of a stream",
    "scale": "holds the rows' own units",
    "offset": "holds the rows' own units",
}
BATCH = {
    "batched": "sequences are its leading dimension",
    "dispatch": "optional entries (mask, ids) come by name in a TensorDict",
    "compile": "the selection depends on the mask",
    "shapes": "its first dimension may be the batch",
}
UNITS = {"scale": "in the units of its input", "offset": "in the units of its input"}
REPLICATES = {
    **UNITS, "batched": "its leading dimension is the replicates'", "compile": "goes through the groups that have rows",
    "shapes": "its inputs share no first dimension",
}  # fmt: skip
FIT = {
    "batched": "fits one problem",
    "compile": "fits by branching on values (splits, folds, solvers)",
    "scale": "regularised in the units of the rows",
    "offset": "regularised in the units of the rows",
}


def streaming(
    make: Callable[..., torch.nn.Module], *inputs: Callable[[], torch.Tensor], **exempt: str
) -> Example:
    """An example of a streaming stage."""
    return Example(make, lambda: [value() for value in inputs], exempt={**STREAMS, **exempt})


def pair(make: Callable[..., torch.nn.Module], **changes: object) -> Example:
    """An example of a measure between two samples of rows, free of offsets and of the scale of either side."""
    settings = {"free_of_scale": (0,), "free_of_offset": (1,), "batched": (0, 1), **changes}
    return Example(make, lambda: [rows(0), rows(1)], **settings)


def dimension(make: Callable[..., torch.nn.Module], **changes: object) -> Example:
    """An example of an intrinsic dimension estimator."""
    return Example(
        make,
        lambda: [rows(0)],
        **{"exempt": UNITS, "batched": (0,), **changes},
    )


LABEL_MOMENTS = {
    **UNITS,
    "batched": "label moments hold one data set",
    "shapes": "its inputs share no first dimension",
    "compile": "finds ranks from values",
}


def labelled(make: Callable[..., torch.nn.Module], first: Callable[[], torch.Tensor] = rows) -> Example:
    """An example of a streaming stage that reads labels."""
    return streaming(
        make, first, labels, ids,
        shapes="takes labels of any kind", compile="finds out what kind of labels there are from their values",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ stages as users write them


class ShareAbove(tg.Stage):
    """A stage of one's own, with a threshold."""

    reads = {"sample": "N D"}
    writes = [("sample_metrics", "share_above")]

    def __init__(self, threshold: float = 0.5, **keys: object) -> None:
        super().__init__(**keys)
        self.threshold = threshold

    def compute(self, sample: torch.Tensor) -> torch.Tensor:
        """The share of entries above it."""
        return (sample > self.threshold).double().mean((-2, -1))


class CountAbove(tg.StreamingStage):
    """A streaming stage of one's own, with a threshold and state of two dtypes."""

    reads = {"tokens": "N D"}
    writes = [("above", "count"), ("above", "largest")]

    def __init__(self, threshold: float = 0.5, **keys: object) -> None:
        super().__init__(**keys)
        self.threshold = threshold
        self.add_state("count", torch.int64)
        self.add_state("largest", torch.float32)

    def start(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Nothing counted."""
        return {"count": torch.zeros(()), "largest": tokens.new_full(tokens.shape[-1:], -torch.inf)}

    def accumulate(self, tokens: torch.Tensor) -> None:
        """Count rows whose first feature is above."""
        self.count = self.count + (tokens[:, 0] > self.threshold).sum()
        self.largest = torch.maximum(self.largest, tokens.float().amax(0))

    def combine(self, other: CountAbove) -> None:
        """Add another's count."""
        self.count = self.count + other.count
        self.largest = torch.maximum(self.largest, other.largest)

    def result(self) -> list[torch.Tensor]:
        """Copies."""
        return [self.count.clone(), self.largest.clone()]


class TwiceTheGap(tg.PairStage):
    """A pair stage of one's own that overrides ``compute``."""

    reads = {("sample", "a"): "N D", ("sample", "b"): "M D"}
    writes = [("between", "gap")]

    def prepare(self, sample: torch.Tensor) -> torch.Tensor:
        """The mean row."""
        return sample.mean(-2)

    def compare(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The distance of the means."""
        return (a - b).norm(dim=-1)

    def compute(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Twice that."""
        return 2 * super().compute(*inputs)


def linear_head(features: int, outputs: int) -> torch.nn.Module:
    """A probe's own module."""
    return torch.nn.Linear(features, outputs)


EXAMPLES: dict[str, Example] = {
    "SelectTokens": Example(
        lambda **keys: tg.SelectTokens(["x", "y"], also=["label"], **keys),
        two_acts,
        exempt={
            **UNITS,
            "batched": "sequences are its leading dimension",
            "dispatch": "optional entries (mask, ids) come by name in a TensorDict",
            "compile": "the number of rows depends on the mask",
            "shapes": "reads (B, T, D) and (B, D) alike",
        },
    ),
    "AggregateActs": Example(
        lambda **keys: tg.AggregateActs(["x"], reduce="mean", **keys),
        lambda: [rows(0, 12).reshape(3, 4, D)],
        exempt={**UNITS, **BATCH},
    ),
    "GroupAttention": Example(
        lambda **keys: tg.GroupAttention(["x"], {"last": "last"}, {"first": "first"}, **keys),
        lambda: [rows(0, 24, 4).reshape(3, 2, 4, 4)],
        exempt={**UNITS, **BATCH},
    ),
    "ContextWindow": Example(
        lambda **keys: tg.ContextWindow(before=1, after=1, **keys),
        lambda: [torch.arange(12).reshape(3, 4), torch.ones(3, 4, dtype=torch.long)],
        exempt={**UNITS, **BATCH},
    ),
    "MaxActivating": streaming(
        lambda **keys: tg.MaxActivating("x", k=4, **keys), rows, lambda: labels()[:, None], ids,
        compile="picks rows by value", shapes="its context has a width of its own",
    ),
    "StreamingCovariance": streaming(tg.StreamingCovariance, rows),
    "GroupedCovariance": streaming(
        lambda **keys: tg.GroupedCovariance(groups=6, **keys), rows, ids, compile="cuts rows by the group they are of",
    ),
    "Replicates": streaming(
        lambda **keys: tg.Replicates(tg.StreamingCovariance(), groups=6, **keys), rows, ids,
        compile="cuts rows by the group they are of",
    ),
    "StreamingMean": streaming(tg.StreamingMean, rows, shapes="takes rows of any shape"),
    "RowSample": streaming(
        lambda **keys: tg.RowSample(["x"], size=9, **keys), rows, ids, shapes="takes rows of any shape"
    ),
    "Collect": streaming(
        lambda **keys: tg.Collect(["x"], **keys), rows, ids,
        shapes="takes rows of any shape", compile="grows with the rows it holds",
    ),
    "StoreActivations": streaming(
        lambda **keys: tg.StoreActivations(SCRATCH.name, **keys), rows, ids,
        shapes="takes rows of any shape", compile="writes files",
    ),
    "RouterLoad": streaming(tg.RouterLoad, rows),
    "StreamingCrossMoments": streaming(
        lambda **keys: tg.StreamingCrossMoments(["x", "y"], **keys), rows, lambda: rows(1)
    ),
    "StreamingLabelMoments": labelled(lambda **keys: tg.StreamingLabelMoments(n_classes=2, **keys)),
    "LinearProbe": labelled(tg.LinearProbe),
    "MeanDifferenceProbe": labelled(tg.MeanDifferenceProbe),
    "SklearnProbe": labelled(lambda **keys: tg.SklearnProbe(LogisticRegression(), **keys)),
    "TorchProbe": labelled(lambda **keys: tg.TorchProbe(linear_head, epochs=2, **keys)),
    "ProbeScore": labelled(tg.ProbeScore, lambda: rows()[:, :2]),
    "BilinearProbe": Example(tg.BilinearProbe, lambda: [rows(0), rows(1), labels(), ids()], exempt=FIT),
    "LowRankBilinearProbe": Example(
        lambda **keys: tg.LowRankBilinearProbe(rank=1, steps=3, **keys),
        lambda: [rows(0), rows(1), labels(), ids()], exempt=FIT,
    ),
    "ProbePredict": Example(
        tg.ProbePredict, lambda: [rows(), rows(1, 2), rows(2, 1, 2)[0]],
        exempt={**UNITS, "batched": "one probe for all rows", "shapes": "its inputs share no first dimension"},
    ),
    "ConceptBasis": Example(
        lambda **keys: tg.ConceptBasis(3, **keys), lambda: [moments(rows())[name] for name in ("covariance", "mean")],
        batched=(0, 1), exempt=UNITS,
    ),
    "FisherBasis": Example(tg.FisherBasis, label_moments, exempt=LABEL_MOMENTS),
    "LEACE": Example(tg.LEACE, label_moments, exempt=LABEL_MOMENTS),
    "Erase": Example(
        tg.Erase, lambda: [rows(), *eraser()],
        exempt={**UNITS, "batched": "one eraser for all rows", "shapes": "its inputs share no first dimension"},
    ),
    "Project": Example(
        tg.Project, lambda: [rows(), basis()["basis"], basis()["mean"]],
        exempt={**UNITS, "batched": "one basis for all rows", "shapes": "its inputs share no first dimension"},
    ),
    "Reconstruct": Example(
        tg.Reconstruct, lambda: [rows(2, N, 3), basis()["dual"], basis()["mean"]],
        exempt={**UNITS, "batched": "one basis for all rows", "shapes": "its inputs share no first dimension"},
    ),
    "Interpolate": Example(
        lambda **keys: tg.Interpolate(0.3, **keys), lambda: [rows()[0], rows()[1]],
        batched=(0, 1), exempt=UNITS,
    ),
    "EigenSpectrum": Example(
        lambda **keys: tg.EigenSpectrum(k=2, **keys), lambda: [torch.cov(rows().T)], batched=(0,), exempt=UNITS
    ),
    "LeaveOutSpectrum": Example(
        lambda **keys: tg.LeaveOutSpectrum(k=2, **keys), group_moments,
        exempt={
            **UNITS, "batched": "its groups are the leading dimension", "compile": "goes through the groups that have rows",
            "shapes": "its count has no dimension",
        },
    ),
    "SpectrumErrors": Example(
        tg.SpectrumErrors,
        lambda: [torch.linspace(3, 0.1, 30, dtype=torch.float64) + rows(4, 7, 30).abs() / 9, 2 + torch.arange(6),
                 torch.linspace(3, 0.1, 30, dtype=torch.float64).expand(2, -1).clone()],
        free_of_scale=(0,), exempt={"offset": "eigenvalues have no offset", "batched": "its leading dimension is the replicates'",
                                    "shapes": "its inputs share no first dimension"},
    ),
    "SampleGroups": Example(
        lambda **keys: tg.SampleGroups(groups=6, **keys), lambda: [ids()],
        exempt={**UNITS, "batched": "of one sample", "shapes": "ids have one dimension"},
    ),
    "LeaveOut": Example(
        lambda **keys: tg.LeaveOut(tg.TwoNN(), **keys), lambda: [rows(), *sample_groups()],
        exempt=REPLICATES,
    ),
    "LeaveOutPair": Example(
        lambda **keys: tg.LeaveOutPair(tg.LinearCKA(), **keys), lambda: [rows(0), rows(1), *sample_groups()],
        exempt=REPLICATES,
    ),
    "Jackknife": Example(
        lambda **keys: tg.Jackknife([("spectrum", "d_pr"), ("spectrum", "top1_share")], full=True, **keys),
        lambda: [5 + rows(0, 7, 1)[:, 0], 0.5 + rows(1, 7, 1)[:, 0] / 20, 2 + torch.arange(6)],
        exempt={**UNITS, "batched": "its leading dimension is the replicates'", "shapes": "its inputs share no first dimension",
                "compile": "looks quantiles up"},
    ),
    "SpectrumMetrics": Example(
        tg.SpectrumMetrics, lambda: [torch.linspace(3, 0.1, 30, dtype=torch.float64) ** 2], free_of_scale=(0,), batched=(0,),
        exempt={"offset": "eigenvalues have no offset"},
    ),
    "RankMe": Example(
        tg.RankMe,
        lambda: [moments(rows())[name] for name in ("count", "mean", "covariance")],
        batched=(1, 2),
        exempt={"scale": "two of its inputs scale differently, tests/measures/test_spectrum.py",
                "offset": "uncentred by definition",
                "shapes": "its count has no dimension"},
    ),
    "SampleMetrics": Example(
        tg.SampleMetrics, lambda: [rows()], batched=(0,),
        exempt={"scale": "also gives row norms, in their own units", "offset": "also gives cosines, which are uncentred"},
    ),
    "SampleSpectrum": Example(tg.SampleSpectrum, lambda: [rows()], batched=(0,),
                              exempt={"scale": "eigenvalues in the rows' own units",
                                      "offset": "also gives the covariance of unit rows, which are uncentred"}),
    "NormalizationAblation": Example(
        tg.NormalizationAblation, lambda: [rows()], free_of_scale=(0,), batched=(0,),
        exempt={"offset": "rows are normalised about the origin"},
    ),
    "SubspaceNovelty": Example(
        tg.SubspaceNovelty, lambda: [vectors(0), vectors(1)], batched=(0, 1),
        exempt={"scale": "reads unit vectors", "offset": "reads unit vectors"},
    ),
    "LayerCosine": pair(tg.LayerCosine, free_of_offset=(), exempt={"offset": "uncentred by definition"}),
    "LinearCKA": pair(lambda **keys: tg.LinearCKA(estimator="both", **keys)),
    "RV": pair(tg.RV),
    "CCA": pair(tg.CCA),
    "SVCCA": pair(tg.SVCCA),
    "PWCCA": pair(tg.PWCCA),
    "Procrustes": pair(tg.Procrustes),
    "LinearR2": pair(tg.LinearR2),
    "RBFCKA": pair(tg.RBFCKA),
    "RSA": pair(tg.RSA, free_of_offset=(), exempt={"offset": "correlates features within a row, which are not centred first"}),
    "CKNNA": pair(
        lambda **keys: tg.CKNNA(k=5, **keys), free_of_offset=(),
        exempt={"offset": "neighbours by inner product, uncentred"},
    ),
    "DistanceCorrelation": pair(tg.DistanceCorrelation),
    "SoftMatching": pair(tg.SoftMatching),
    "SampledCKA": pair(tg.SampledCKA, exempt={"compile": "which rows are left out together follows from the ids"}),
    "CKANull": pair(tg.CKANull),
    "Calibrated": Example(
        lambda **keys: tg.Calibrated(tg.LinearCKA(), repeats=19, **keys), lambda: [rows(0), rows(1)],
        free_of_scale=(0, 1), free_of_offset=(0, 1),
        exempt={
            "batched": "the documents of one data set change places",
            "compile": "which documents change places follows from the ids",
        },
    ),
    "Convergence": Example(
        lambda **keys: tg.Convergence(tg.SampleMetrics(), min_rows=8, **keys), lambda: [rows()],
        exempt={
            **UNITS, "batched": "the prefixes of one data set", "compile": "gathers what a stage of its own warns of",
        },
    ),
    "NoiseRank": Example(
        tg.NoiseRank, lambda: [torch.linalg.eigvalsh(moments(rows())["covariance"].double()).flip(0), torch.tensor(N)],
        exempt={**UNITS, "batched": "the count is one for all", "shapes": "its count has no dimension"},
    ),
    "ShrunkCovariance": Example(
        tg.ShrunkCovariance,
        lambda: [moments(rows())[name] for name in ("count", "covariance", "norm4")],
        exempt={**UNITS, "batched": "the count is one for all", "shapes": "its count has no dimension"},
    ),
    "NearestNeighbors": dimension(lambda **keys: tg.NearestNeighbors(4, **keys)),
    "NeighborhoodOverlap": pair(lambda **keys: tg.NeighborhoodOverlap(k=5, **keys)),
    "JaccardKNN": pair(lambda **keys: tg.JaccardKNN(k=5, **keys)),
    "InformationImbalance": pair(tg.InformationImbalance),
    "LabelOverlap": Example(
        lambda **keys: tg.LabelOverlap(k=5, **keys), lambda: [rows(), labels()], free_of_scale=(0,),
        free_of_offset=(0,), batched=(0,), exempt={"shapes": "takes labels of any kind"},
    ),
    "StreamingSketch": streaming(lambda **keys: tg.StreamingSketch(k=2, size=4, probes=8, **keys), rows),
    "TwoNN": dimension(tg.TwoNN),
    "Gride": dimension(lambda **keys: tg.Gride(range_max=8, **keys)),
    "LevinaBickel": dimension(lambda **keys: tg.LevinaBickel(k=8, **keys)),
    "MOM": dimension(lambda **keys: tg.MOM(k=8, **keys)),
    "TLE": dimension(lambda **keys: tg.TLE(k=8, **keys)),
    "LocalKNN": dimension(tg.LocalKNN),
    "LocalPCA": dimension(lambda **keys: tg.LocalPCA(k=20, **keys)),
    "GlobalPCA": dimension(tg.GlobalPCA),
    "CAPCA": dimension(tg.CAPCA),
    "Decimation": dimension(lambda **keys: tg.Decimation(min_rows=20, **keys)),
    "ParticipationRatio": Example(
        tg.ParticipationRatio,
        lambda: [moments(rows())[name] for name in ("count", "covariance", "norm4")],
        exempt={
            **UNITS, "batched": "the count is one for all", "shapes": "its count has no dimension",
        },
    ),
}  # fmt: skip

# As users write them: held to everything that the public stages are held to.
EXAMPLES |= {
    "ShareAbove": Example(ShareAbove, lambda: [rows()], batched=(0,), exempt=UNITS),
    "CountAbove": streaming(CountAbove, rows),
    "TwiceTheGap": Example(
        TwiceTheGap, lambda: [rows(0), rows(1)], batched=(0, 1),
        exempt={"scale": "in the units of its input", "offset": "both sides together only"},
    ),
}  # fmt: skip


def optional_inputs() -> dict[object, torch.Tensor]:
    """A value for every optional input of a public stage, by its default key."""
    product = tg.SampleSpectrum()
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    return {
        "attention_mask": mask,
        "src_key_padding_mask": mask == 0,
        "tgt": rows(2, 12).reshape(3, 4, D),
        "sequence_id": 5 + torch.arange(3),
        "input_ids": torch.arange(12).reshape(3, 4),
        "special_tokens_mask": (torch.arange(12).reshape(3, 4) % 4 == 3).long(),
        "row_id": ids(),
        "chosen": torch.arange(2 * N).reshape(N, 2) % D,
        "sample_row_id": ids(),
        "document_id": torch.tensor([4, 4, 9]),
        ("tdgeom", "document"): torch.tensor([4, 9, 9]),
        ("carried", "document_id"): torch.arange(N) // 2,
        ("sample_carried", "document_id"): torch.arange(N) // 2,
        "sample": rows(),
        **dict(zip(("sample_group", "sample_group_rows"), sample_groups())),
        ("eigenvalues", "a"): torch.linspace(2, 1, D, dtype=torch.float64),
        ("eigenvalues", "b"): torch.linspace(3, 1, D, dtype=torch.float64),
        "eigenvalues": torch.linspace(3, 0.1, 30, dtype=torch.float64) ** 2,
        ("moments", "count"): torch.tensor(N),
        ("moments", "mean"): torch.zeros(30, dtype=torch.float64),
        ("moments", "effective_sample_size"): torch.tensor(float(N), dtype=torch.float64),
        ("moments", "relative_error"): torch.tensor(1e-15, dtype=torch.float64),
        ("moments", "covariance"): torch.diag(torch.linspace(3, 0.1, 30, dtype=torch.float64) ** 2),
        **(known := dict(zip(product.out_keys, product(sample=rows())))),
        **{
            (leaf, side): known[leaf] for side in "ab" for leaf in ("sample_covariance", "sample_fingerprint")
        },
    }


def kind_of(name: str) -> type:
    """The class of that name."""
    return getattr(tg, name, None) or globals()[name]


def is_streaming(stage: torch.nn.Module) -> bool:
    """True for a stage that accumulates rows."""
    return isinstance(stage, StreamingStage)
