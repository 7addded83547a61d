"""``GeometryCard``: what of a model's geometry on a corpus fits into one file, and two files are compared by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import Tensor, nn

from tdgeom.core.for_each import ForEach
from tdgeom.core.for_each_pair import ForEachPair
from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.process_groups import rank_and_world
from tdgeom.core.streaming_stage import tensor_text, text_tensor
from tdgeom.core.visible_text import visible
from tdgeom.files.atomic import explained_writing
from tdgeom.files.errors import StoreError
from tdgeom.files.json_text import canonical_json, plain, read_json
from tdgeom.files.shard_writing import write_shard
from tdgeom.files.shards import Shard
from tdgeom.measures.eigen_spectrum import EigenSpectrum
from tdgeom.measures.sample_metrics import SampleMetrics
from tdgeom.measures.similarity.linear_cka import LinearCKA
from tdgeom.measures.similarity.procrustes import Procrustes
from tdgeom.measures.similarity.subspace import feature_subspace_novelty
from tdgeom.measures.spectrum_metrics import SpectrumMetrics
from tdgeom.model.capture import Capture
from tdgeom.model.sites import LayerSpec
from tdgeom.rows.select_tokens import SelectTokens
from tdgeom.run.identity import weights_identity
from tdgeom.run.run import run
from tdgeom.run.to_frame import to_frame
from tdgeom.stream.covariance import StreamingCovariance
from tdgeom.training.landmarks import Landmarks, TextIds

__all__ = ["GeometryCard", "geometry_card"]

VERSION = 1
LARGEST = 50_000_000  # bytes
FEWEST = 64  # landmark rows that two cards must share
_RESOLVED = 2.0**-42  # of the largest eigenvalue: the square of eight roundings of a float32 number


@dataclass(repr=False)
class GeometryCard:
    """One model on one corpus: a file of at most 50 MB, from which cards are compared without running a model.

    Attributes:
        ids: (n,) int64 of the landmark rows' texts, ascending (``text_ids`` of their tokens).
        rows: (n, D) float32 landmark rows, by site.
        mean, vectors, values: of all rows, by site: (D,), leading eigenvectors (D, k), their eigenvalues (k,).
        about: provenance: the model, the hash of its weights, and of each corpus its name, hash, number of rows and the
            measures of every site (``profile()`` is their table).
    """

    ids: Tensor
    rows: dict[str, Tensor]
    mean: dict[str, Tensor]
    vectors: dict[str, Tensor]
    values: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def sites(self) -> list[str]:
        """The sites in execution order."""
        return list(self.rows)

    def __repr__(self) -> str:
        corpora, model = len(self.about.get("corpora", [])), self.about.get("model")
        return visible(
            f"GeometryCard({model}: {len(self.sites)} sites, {len(self.ids)} landmarks, corpora: {corpora})"
        )

    def profile(self) -> pd.DataFrame:
        """A row for each corpus and site: its measures over all rows of the corpus."""
        return pd.DataFrame([row for part in self.about["corpora"] for row in part["profile"]])

    def save(self, path: str | Path, *, max_bytes: int = LARGEST) -> Path:
        """Write the file, whole or not at all; landmark rows are kept as they fit into ``max_bytes``, the smallest ids first.

        A value takes 16 bits where all rows fit at that, else 8 (float8, each feature scaled by its largest value).
        """
        path = Path(path)
        held: dict[str, Tensor] = {}
        for number, site in enumerate(self.sites):
            held[f"mean.{number}"] = self.mean[site].float()
            held[f"vectors.{number}"] = self.vectors[site].half()
            held[f"values.{number}"] = self.values[site].double()
        fixed = (
            sum(one.numel() * one.element_size() for one in held.values())
            + len(canonical_json(plain(self.about)))
            + 65_536
        )
        width = sum(one.shape[1] for one in self.rows.values())
        room = max_bytes - fixed
        size = 2 if room // (2 * width + 8) >= len(self.ids) else 1
        keep = min(len(self.ids), room // (size * width + 8))
        if keep < FEWEST:
            raise ValueError(
                f"GeometryCard.save: {max(keep, 0)} landmark rows of {len(self.sites)} sites fit into max_bytes={max_bytes:,}, "
                f"{FEWEST} are needed. Give fewer sites (layers=), or a higher max_bytes."
            )
        held["ids"] = self.ids[:keep]
        for number, site in enumerate(self.sites):
            held |= {
                f"rows{name}.{number}": one for name, one in _packed(self.rows[site][:keep], size).items()
            }
        record = {"version": VERSION, "sites": self.sites, "about": plain(self.about)}
        with explained_writing(path):
            write_shard(path, {**held, "record": text_tensor(json.dumps(record, sort_keys=True))})
        return path

    @classmethod
    def load(cls, path: str | Path) -> GeometryCard:
        """A card from its file; nothing in it is run.

        Raises:
            StoreError: no card, a newer or a damaged one.
        """
        file = Shard(Path(path))
        if "record" not in file.tensors:
            raise StoreError(f"{path} is no geometry card: it holds no record.")
        record = read_json(tensor_text(file.whole("record")) or "", f"the record of {path}")
        if not isinstance(record, dict) or record.get("version") != VERSION:
            raise StoreError(f"{path} is no geometry card of version {VERSION}.")
        try:
            return cls._read(file, record)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StoreError(f"{path} is no whole geometry card ({error}): it was changed.") from error

    @classmethod
    def _read(cls, file: Shard, record: Mapping[str, Any]) -> GeometryCard:
        sites = [str(site) for site in record["sites"]]
        ids, rows = file.whole("ids"), {}
        for number, site in enumerate(sites):
            names = [name for name in ("", "_scale") if f"rows{name}.{number}" in file.tensors]
            rows[site] = _unpacked({name: file.whole(f"rows{name}.{number}") for name in names})
            if rows[site].shape[0] != len(ids):
                raise ValueError(f"{site!r} has {rows[site].shape[0]} landmark rows for {len(ids)} ids")
        read = {
            name: {site: file.whole(f"{name}.{number}") for number, site in enumerate(sites)}
            for name in ("mean", "vectors", "values")
        }
        return cls(ids, rows, read["mean"], read["vectors"], read["values"], dict(record["about"]))

    def directions(self, site: str) -> Tensor:
        """(D, k) float64, the leading eigenvectors along which rows vary beyond rounding."""
        values = self.values[site].double()
        return self.vectors[site].double()[:, values > values.max() * _RESOLVED]

    def compare(self, other: GeometryCard) -> pd.DataFrame:
        """Every site of this card beside every site of the other: a row a pair.

        Columns ``a``, ``b``, ``linear_cka_debiased`` and ``procrustes`` on the landmark rows that both hold,
        ``feature_subspace_novelty`` of the leading eigenvectors over all rows (NaN where widths differ), ``rows``, the number of
        landmarks. How far off the first two are from all rows: docs/howto/geometry_cards.md.

        Raises:
            ValueError: fewer than 64 landmarks in common: cards of other corpora, or of another tokenizer.
        """
        own, theirs = _shared(self.ids, other.ids)
        if len(own) < FEWEST:
            raise ValueError(
                f"GeometryCard.compare: the cards share {len(own)} landmark rows, {FEWEST} are needed. Landmarks are texts "
                f"by their tokens: take cards of one corpus, made with one tokenizer and one truncation."
            )
        td = TensorDict({}, batch_size=[])
        for side, card, index in (("a", self, own), ("b", other, theirs)):
            for site in card.sites:
                td.set(("sample", f"{side}/{site}"), card.rows[site][index].double())
        pairs = [(f"a/{a}", f"b/{b}") for a in self.sites for b in other.sites]
        sites = [key[1] for key in td.keys(True, True)]
        for stage in (LinearCKA(estimator="debiased"), Procrustes()):
            td = ForEachPair(stage, sites, pairs=pairs)(td)
        bases = [
            {site: torch.linalg.qr(card.directions(site))[0] for site in card.sites} for card in (self, other)
        ]
        found = []
        for a in self.sites:
            for b in other.sites:
                between = td["between", f"a/{a}->b/{b}"]
                u, v = bases[0][a], bases[1][b]
                k = min(u.shape[1], v.shape[1])
                same = u.shape[0] == v.shape[0]
                novelty = float(feature_subspace_novelty(u[:, :k], v[:, :k])) if same and k else float("nan")
                values = {name: float(between[name]) for name in ("linear_cka_debiased", "procrustes")}
                found.append(
                    {"a": a, "b": b, **values, "feature_subspace_novelty": novelty, "rows": len(own)}
                )
        return pd.DataFrame(found)

    def merge(self, other: GeometryCard) -> GeometryCard:
        """One card of two disjoint corpora of one model.

        Landmarks are those that a card of both corpora would have (the smallest ids, as many as the smaller card has); means are
        those of all rows; eigenvectors come from the leading ones of both and the distance of the means, exact where cards hold
        all of them; profiles stand side by side.

        Raises:
            ValueError: other weights or sites; the same corpus, or corpora that share more than half of their landmarks: rows
                would count twice.
        """
        for name, one, two in (
            ("weights", self.about["weights"], other.about["weights"]),
            ("sites", self.sites, other.sites),
        ):
            if one != two:
                raise ValueError(
                    f"GeometryCard.merge adds up corpora of one model: {name} differ ({one} and {two})."
                )
        known = {part["data_sha256"] for part in self.about["corpora"] if part["data_sha256"]}
        again = [part["name"] for part in other.about["corpora"] if part["data_sha256"] in known]
        shared, _ = _shared(self.ids, other.ids)
        least = min(len(self.ids), len(other.ids))
        if again or 2 * len(shared) > least:
            raise ValueError(
                f"GeometryCard.merge: the corpora share texts ({len(shared)} of {least} landmark rows), which would count twice. "
                f"Merge cards of disjoint corpora."
            )
        ids = torch.cat((self.ids, other.ids))
        order = torch.argsort(ids, stable=True)
        fresh = torch.cat((torch.ones(1, dtype=torch.bool), ids[order].diff() != 0))
        order = order[fresh][:least]  # texts that begin alike have beginnings in common
        made = GeometryCard(ids[order], {}, {}, {}, {}, dict(self.about))
        n, m = (sum(part["rows"] for part in card.about["corpora"]) for card in (self, other))
        for site in self.sites:
            made.rows[site] = torch.cat((self.rows[site], other.rows[site]))[order]
            delta = other.mean[site].double() - self.mean[site].double()
            made.mean[site] = (self.mean[site].double() + delta * (m / (n + m))).float()
            factors = [
                card.vectors[site].double() * (card.values[site].double() * (rows - 1)).sqrt()
                for card, rows in ((self, n), (other, m))
            ]
            u, s, _ = torch.linalg.svd(
                torch.cat((*factors, (delta * (n * m / (n + m)) ** 0.5)[:, None]), 1), full_matrices=False
            )
            k = min(self.vectors[site].shape[1], other.vectors[site].shape[1])
            made.vectors[site], made.values[site] = u[:, :k].float(), s[:k].square() / (n + m - 1)
        made.about["corpora"] = [*self.about["corpora"], *other.about["corpora"]]
        return made


@answer_guesses
def geometry_card(
    model: nn.Module,
    dataloader: Iterable[Any],
    path: str | Path | None = None,
    *,
    sites: str | Sequence[str] = "residual_output",
    layers: LayerSpec = "all",
    max_rows: int | None = None,
    sample_size: int = 4096,
    k: int = 32,
    corpus: str = "",
    max_bytes: int = LARGEST,
    progress: bool = False,
) -> GeometryCard:
    """Run a model over a corpus once and keep what its card holds.

    Args:
        model, dataloader, sites, layers, max_rows: as ``analyze_model`` takes them; batches hold ``"input_ids"``.
        path: the file to write; None writes none.
        sample_size: landmark rows at most: the positions whose text has the smallest hash, the same for every model that reads
            the corpus with the same tokens. What fits into the file is found out when it is written.
        k: eigenvectors a site.
        corpus: its name.
        max_bytes: of the file.

    Raises:
        KeyError: batches without ``"input_ids"``. ValueError: several ranks; a file too small for 64 landmark rows.

    Memory: ``sample_size`` rows and a covariance (8·D² bytes) a site. Landmark rows say something of the texts that they are of:
    docs/howto/geometry_cards.md.
    """
    if rank_and_world()[1] > 1:
        raise ValueError(
            "geometry_card runs in one process: call it on one rank alone, outside of the process group."
        )
    capture = Capture(model, sites, layers=layers)
    names = [str(site) for site in capture.sites]
    pipeline = TensorDictSequential(
        capture,
        TextIds(),
        SelectTokens(names, also=["text_id"]),
        ForEach(StreamingCovariance(), names),
        Landmarks(names, size=sample_size),
        ForEach(EigenSpectrum(k=k), names),
        ForEach(SpectrumMetrics(), names),
        ForEach(SampleMetrics(in_keys="landmarks"), names),
    )
    result = run(pipeline, dataloader, max_rows=max_rows, progress=progress)
    assert result is not None  # of one process
    rows = int(result["run", "rows"])
    profile = to_frame(result, "spectrum").merge(
        to_frame(result, "sample_metrics"), on="site", suffixes=("", "_sample")
    )
    card = GeometryCard(
        result["landmark_id"].cpu(),
        {site: result["landmarks", site].float().cpu() for site in names},
        {site: result["moments", site, "mean"].float().cpu() for site in names},
        {site: result["eigenvectors", site].float().cpu() for site in names},
        {site: result["eigenvalues", site][: result["eigenvectors", site].shape[1]].cpu() for site in names},
        {
            "model": str(
                getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
            ),
            "weights": weights_identity(model),
            "corpora": [
                {
                    "name": corpus,
                    "rows": rows,
                    "data_sha256": str(result["run", "data_sha256"]),
                    "profile": plain(profile.to_dict("records")),
                }
            ],
        },
    )
    if path is not None:
        card.save(path, max_bytes=max_bytes)
    return card


def _shared(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Where the ids that both have lie in each, in one order."""
    own = torch.isin(a, b).nonzero()[:, 0]
    return own, torch.searchsorted(b, a[own])


def _packed(rows: Tensor, size: int) -> Mapping[str, Tensor]:
    """Rows in 16 or 8 bits a value, each feature scaled to its largest value by a power of two."""
    largest = rows.abs().amax(0)
    scale = torch.where(largest > 0, largest, 1.0).log2().ceil().exp2()
    if size == 2:
        return {"": (rows / scale).half(), "_scale": scale}
    return {"": (rows / scale * 256).to(torch.float8_e4m3fn).view(torch.uint8), "_scale": scale / 256}


def _unpacked(parts: Mapping[str, Tensor]) -> Tensor:
    values = parts[""]
    values = values.view(torch.float8_e4m3fn) if values.dtype == torch.uint8 else values
    return values.float() * parts["_scale"]
