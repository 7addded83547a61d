"""``Probing``: a probe at every site of a model, around the user's own calls or over a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential, WrapModule
from torch import Tensor, nn

from tdgeom.core.for_each import ForEach
from tdgeom.core.for_each_pair import ForEachPair, pair_list
from tdgeom.core.keys import Key
from tdgeom.core.process_groups import from_first_rank, rank_and_world
from tdgeom.core.rank_failures import fail_together
from tdgeom.core.words import Words, put, words_of
from tdgeom.model.capture import Capture
from tdgeom.probing import rules
from tdgeom.probing.bilinear import BilinearProbe
from tdgeom.probing.predict import HeldOutRows
from tdgeom.probing.probe import Probe
from tdgeom.rows.select_tokens import SelectTokens
from tdgeom.run.pushed import Pushed
from tdgeom.run.run import run
from tdgeom.run.to_frame import to_frame
from tdgeom.stream.row_sample import RowSample

__all__ = ["Probing"]

Labels = str | tuple[str, ...] | Callable[[TensorDictBase], Tensor]


def label_tensor(value: Any, source: str) -> Tensor | Words:
    """Labels as a tensor or as words: a tensor, an array of numbers, or a list of names."""
    words = (
        None if isinstance(value, str | int | float | Tensor | None) else words_of(value, "labels", "Probing")
    )
    if words is not None and not isinstance(value, np.ndarray):
        value = np.array(words.tolist()) if all(type(one) in (int, float) for one in words) else words
    if isinstance(value, Words):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.as_tensor(value, device="cpu")
    if not isinstance(value, Tensor):
        raise TypeError(
            f"Probing needs labels, a tensor with a value a sequence (B,) or a token (B, T) or a list of names; {source} "
            f"{type(value).__name__}."
        )
    return value


def labelled(labels: Labels, out_key: Key) -> TensorDictModuleBase:
    """A module that puts the labels of a batch, from a key or a function of the batch, where the rows' selection finds them."""
    if callable(labels):
        function = labels
        said = "the labels function returned"

        def from_batch(td: TensorDictBase) -> TensorDictBase:
            put(td, out_key, label_tensor(function(td), said))
            return td

        return WrapModule(from_batch)
    return BatchLabels(labels, out_key)


class BatchLabels(TensorDictModuleBase):
    """Puts the labels that a batch holds where the rows' selection finds them."""

    def __init__(self, labels: Any, out_key: Key) -> None:
        super().__init__()
        self.in_keys: list[Any] = [labels]
        self.out_keys: list[Any] = [out_key]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Copy, as a tensor or as words."""
        (key,) = self.in_keys
        value = tensordict.get(key, None)
        if value is None:
            have = sorted(map(str, tensordict.keys()))
            raise KeyError(
                f"Probing reads labels at {key!r}, but the batch has {have[:12]}. Name them: labels='labels', say."
            )
        put(tensordict, self.out_keys[0], label_tensor(value, f"the batch holds at {key!r}"))
        return tensordict


def _with_errors(probe: Any, errors: bool | int) -> Any:
    """The probe made again, with errors; functions and models that it was given are the same."""
    settings = {**probe.settings(), "errors": errors}
    live = {
        name: getattr(probe, name)
        for name, value in settings.items()
        if not isinstance(value, str | int | float | list | None) and hasattr(probe, name)
    }
    return type(probe).from_settings(settings, **live)


class Phase:
    """What a ``with`` block of ``Probing`` hands over: set ``labels`` before each model call.

    ``document_id`` (B,) may be set as well: which document each of the call's sequences is of; else it is a sequence.
    """

    def __init__(self, pass_: Pushed, label_key: Key | None) -> None:
        self.pass_, self.label_key = pass_, label_key
        self.labels: Any = None
        self.document_id: Tensor | None = None

    def feed(self, td: TensorDictBase) -> None:
        """One model call: its rows and labels to every probe."""
        if self.label_key is not None:
            if self.labels is None:
                raise ValueError(
                    "Probing expects labels for every model call: set `phase.labels = y` before the call (a value a sequence "
                    "(B,) or a token (B, T)), or give Probing(labels=) a function of the call's inputs."
                )
            put(td, self.label_key, label_tensor(self.labels, "phase.labels is"))
            self.labels = None
        if self.document_id is not None:
            td.set("document_id", self.document_id)
            self.document_id = None
        self.pass_.feed(td)


class Probing:
    """A probe at every site of a model: fitted on some calls, scored on others.

    **Over loaders**: ``Probing(model, sites, probe, labels="label").run(loader)`` streams the loader once; the probe's own
    ``holdout`` decides which documents train and which are scored. ``run(train_loader, test_loader)`` fits on all of the
    first and scores on all of the second.

    **Around the user's own calls**::

        probing = tg.Probing(model, "residual_output", tg.LinearProbe(), labels=lambda td: td["input_ids"] % 2)
        with probing.fit():
            model(**train_batch)
        with probing.score():
            model(**test_batch)
        probing.table()

    With labels that no function of the call's inputs gives, ``with probing.fit() as phase:`` and set ``phase.labels = y``
    before each call (and ``phase.document_id``, where a document is several sequences). Rows of a call are given to the probes
    and dropped at once.

    Args:
        model: any ``nn.Module``; it stays as it is.
        sites: kinds, concrete names, or a list of them, as for ``Capture``.
        probe: a probe with its default keys, copied for each site. A ``BilinearProbe`` is copied for each pair. With
            ``control="input_ids"`` the control task takes token ids as types.
        labels: the batch's key of the labels, a value a sequence (B,) or a token (B, T), numbers or names of classes; or a
            function of the batch (a
            TensorDict with the model's inputs) that returns them.
        pairs: "consecutive", "all" or a list of (a, b), for bilinear probes.
        select: further settings of ``SelectTokens``, such as ``dict(positions="last")`` or ``dict(pool="mean")``.
        capture: further settings of ``Capture``, such as ``dict(layers=[0, 5])``; over loaders also gradients, ``dict(
            direction="backward", target=...)``.
        errors: columns ``<score>_se``: standard errors over 20 groups of the held-out documents, or this many. A document is a
            ``document_id`` of the batches, else a sequence, and is never on both sides of a split. See ``Probe``.

    Attributes: ``sites``; ``probes``, the fitted probe of each site (or ``"a->b"``); ``settings``, what can change a number
    (seed, split, probe); ``result``, a TensorDict with ``("probe", site, score)`` and, for linear probes,
    ``("probe_fit", site, "weight" | "bias")``. In a process group ``run`` gives the table on rank 0, and every rank the fitted
    probes; the contexts are for one process.

    Raises:
        ValueError: no labels for a call, or what the probe refuses (the message names the site). TypeError: no probe.

        >>> import torch, tdgeom as tg
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> x = torch.randn(300, 4)
        >>> batches = [{"x": x, "label": (x[:, 0] > 0).long()}]
        >>> probing = tg.Probing(model, "module_input:0", tg.LinearProbe(), capture=dict(in_keys=["x"]))
        >>> bool(probing.run(batches)["accuracy"][0] > 0.8)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        sites: str | Iterable[str],
        probe: Probe | BilinearProbe,
        *,
        labels: Labels = "label",
        pairs: str | Sequence[tuple[str, str]] = "consecutive",
        select: dict[str, Any] | None = None,
        capture: dict[str, Any] | None = None,
        errors: bool | int = False,
    ) -> None:
        if not isinstance(probe, Probe | BilinearProbe):
            raise TypeError(
                f"Probing takes a probe (LinearProbe(), SklearnProbe(estimator), ...), got {type(probe).__name__}. Wrap a "
                f"scikit-learn estimator in SklearnProbe, a torch module in TorchProbe."
            )
        if errors is not False:
            probe = _with_errors(probe, errors)
        # gradients too lie where rows are selected
        self.capture = Capture(model, sites, **{"out_keys": "acts", **(capture or {})})
        self.sites = self.capture.sites
        self.probe, self.labels, self.select = probe, labels, dict(select or {})
        # Not at the top of the batch, where the model may have an entry of the same name.
        self.label_key: Key = ("probing", probe.labels)
        self.pairs = pair_list(self.sites, pairs) if isinstance(probe, BilinearProbe) else None
        if self.pairs == []:
            raise ValueError(
                f"Probing: no two of the sites {[*map(str, self.sites)]} make a pair under pairs={pairs!r}."
            )
        self.probes: dict[str, Any] = {}
        self._scores: TensorDict | None = None

    # ------------------------------------------------------------------------------------------ loaders

    @fail_together
    def run(
        self,
        dataloader: Iterable[Any],
        test: Iterable[Any] | None = None,
        *,
        max_rows: int | None = None,
        tokenizer: Any = None,
        text_column: str | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
        sharded: bool | None = None,
    ) -> pd.DataFrame | None:
        """Fit and score over loaders and return the table; in a process group on rank 0, None elsewhere.

        Args:
            dataloader: labelled batches; without ``test`` the probe holds out its own share of documents.
            test: labelled batches that are scored; then everything in ``dataloader`` trains.
            max_rows: stop after this many rows of each.
            tokenizer, text_column, batch_size, max_length: of texts and datasets, as for ``tdgeom.run``.
            sharded: whether each rank of a process group has a part of the data, as for ``tdgeom.run``.
        """
        options: dict[str, Any] = {
            "max_rows": max_rows,
            "tokenizer": tokenizer,
            "text_column": text_column,
            "batch_size": batch_size,
            "max_length": max_length,
            "sharded": sharded,
            "progress": False,
        }
        before = [self.capture, labelled(self.labels, self.label_key)]
        units = self._fit_units(self.probe.holdout if test is None else 0.0)
        first = run(
            TensorDictSequential(*before, *units),
            dataloader,
            keep=["probe"],
            **options,
        )
        self._collect(units[-1], first)
        self._share_fitted()
        if test is not None:
            pipeline = TensorDictSequential(*before, *self._score_units())
            self._scores = run(pipeline, test, **options)
        return self.table() if rank_and_world()[0] == 0 else None

    # ---------------------------------------------------------------------------------------- contexts

    def fit(self) -> AbstractContextManager[Phase]:
        """A context: every model call inside it trains the probes."""
        return self._phase("fit")

    def score(self) -> AbstractContextManager[Phase]:
        """A context: every model call inside it is scored by the fitted probes."""
        if not self.probes:
            raise ValueError(
                "Probing has no fitted probes yet: open `with probing.fit():` around labelled calls first."
            )
        return self._phase("score")

    @contextmanager
    def _phase(self, kind: str) -> Iterator[Phase]:
        if rank_and_world()[1] > 1:
            raise ValueError(
                f"Probing.{kind}() is for one process: the calls of several ranks are not put together. Remedy: "
                f"probing.run(loader), which shares a loader out among the ranks."
            )
        if self.capture.direction == "backward":
            raise ValueError(
                f"Probing.{kind}() uses a call's rows when the call ends, before there are any. Remedy: probing.run(loader) "
                f"with capture=dict(direction='backward', target=...)."
            )
        units = self._fit_units(0.0) if kind == "fit" else self._score_units()
        before = [labelled(self.labels, self.label_key)] if callable(self.labels) else []
        pass_ = Pushed(TensorDictSequential(*before, *units))
        phase = Phase(pass_, None if callable(self.labels) else self.label_key)
        with self.capture as calls:

            def use(*_: Any) -> None:  # what a hook returns would take the place of the model's output
                while calls:
                    phase.feed(calls.pop(0))

            # Capture's own hook has run when this one does: each call is used and dropped.
            handle = self.capture.model.register_forward_hook(use)
            try:
                yield phase
            finally:
                handle.remove()
        use()  # calls of a part of the model, which its own hook has not seen
        if not pass_.batches:
            raise ValueError(f"no model call was made in this {kind} block, so there is nothing to {kind}.")
        found = pass_.end()
        if kind == "fit":
            self._collect(units[-1], None)
        else:
            self._scores = found

    # ------------------------------------------------------------------------------------------ results

    @property
    def result(self) -> TensorDict:
        """Scores and, for linear probes, weights, by site."""
        if self._scores is None:
            if self.probes and rank_and_world()[0]:
                raise ValueError(
                    "Probing's scores are on rank 0; the other ranks have the fitted probes alone."
                )
            raise ValueError(
                "nothing has been scored yet: run(loader), or a `with probing.score():` block after fit."
            )
        result = self._scores.select("probe").clone()
        for name, probe in self.probes.items():
            for leaf in ("weight", "bias"):
                if isinstance(probe.fitted.get(leaf), Tensor):
                    result.set(("probe_fit", name, leaf), probe.fitted[leaf])
        return result

    def table(self) -> pd.DataFrame:
        """One row a site (or pair) with every score; the settings are in its ``attrs``."""
        frame = to_frame(self.result, "probe")
        frame.attrs.update(self.settings)
        return frame

    def direction(self, site: str, label: int | None = None, *, unit: bool = True) -> Tensor:
        """The concept activation vectors of a site's probe, (K, D) or one: see ``Probe.direction``."""
        if site not in self.probes:
            raise KeyError(f"no fitted probe at {site!r}; there is {list(self.probes)}.")
        return rules.concept_direction(self.probes[site], label, unit=unit)

    @property
    def settings(self) -> dict[str, Any]:
        """What can change a number: the probe, its settings and seed, the selection of rows."""
        labels = getattr(self.labels, "__name__", "function") if callable(self.labels) else self.labels
        about = {"probe": type(self.probe).__name__, **self.probe.all_settings()}
        return {**about, "labels": labels, "select": dict(self.select)}

    # ------------------------------------------------------------------------------------------ building

    def _selector(self) -> SelectTokens:
        types = [] if self.probe.control is None else [self.probe.control]
        return SelectTokens(self.sites, also=[self.label_key, *types], **self.select)

    def _fit_units(self, holdout: float) -> list[TensorDictModuleBase]:
        probe = deepcopy(self.probe)
        probe.holdout = holdout
        if self.pairs is None:
            return [self._selector(), ForEach(probe, self.sites)]
        size = int(probe.train_rows / (1 - holdout)) + 1  # the sample holds both parts of the split
        also = [probe.labels] if probe.control is None else [probe.labels, probe.control]
        also += ["document_id"]
        sample = RowSample(self.sites, size=size, seed=probe.seed, also=also)
        return [self._selector(), sample, ForEachPair(probe, self.sites, pairs=self.pairs)]

    def _score_units(self) -> list[TensorDictModuleBase]:
        pairs = [[site] for site in self.sites] if self.pairs is None else self.pairs
        scorers = [
            HeldOutRows(probe, sites, name) for (name, probe), sites in zip(self.probes.items(), pairs)
        ]
        return [self._selector(), *scorers]

    def _collect(self, units: Any, scores: TensorDict | None) -> None:
        """Keep the fitted probes of ``ForEach`` or ``ForEachPair``, and their scores."""
        renamed = units if self.pairs is None else units.units
        self.probes, self._scores = {unit.where: unit.module for unit in renamed}, scores

    def _share_fitted(self) -> None:
        """What rank 0 has fitted, on every rank."""
        if rank_and_world()[1] == 1:
            return
        own = rank_and_world()[0] == 0
        found = (
            {name: (_on_cpu(probe.fitted), probe.names) for name, probe in self.probes.items()}
            if own
            else None
        )
        for name, (fitted, names) in from_first_rank(found).items():
            if not own:
                self.probes[name].take_fitted(fitted, names)


def _on_cpu(fitted: Any) -> Any:
    if isinstance(fitted, dict):
        return {name: _on_cpu(value) for name, value in fitted.items()}
    return fitted.cpu() if isinstance(fitted, Tensor) else fitted
