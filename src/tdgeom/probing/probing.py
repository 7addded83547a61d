"""``Probing``: a probe at every site of a model, around the user's own calls or over a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn

from tdgeom.core.for_each import ForEach, ForEachPair, pair_list
from tdgeom.core.keys import Key, as_key, key_tuple
from tdgeom.core.stage import Stage
from tdgeom.model.capture import Capture
from tdgeom.probing.bilinear import BilinearProbe
from tdgeom.probing.control_task import control_labels
from tdgeom.probing.predict import ProbeScore
from tdgeom.probing.probe import Probe
from tdgeom.probing.scores import SCORES
from tdgeom.rows.select_tokens import SelectTokens
from tdgeom.run.run import run
from tdgeom.run.to_frame import to_frame
from tdgeom.stream.row_sample import RowSample

__all__ = ["Probing"]

Labels = str | tuple[str, ...] | Callable[[TensorDictBase], Tensor]


class _Label(TensorDictModuleBase):
    """Puts the labels of a batch under "label", from a key or a function of the batch."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.labels = labels
        self.in_keys = [] if callable(labels) else [labels]
        self.out_keys = ["label"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        value = self.labels(tensordict) if callable(self.labels) else tensordict.get(self.labels, None)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.as_tensor(value)
        if not isinstance(value, Tensor):
            have = sorted(map(str, tensordict.keys()))
            source = (
                "the labels function returned"
                if callable(self.labels)
                else f"the batch holds at {self.labels!r}"
            )
            raise TypeError(
                f"Probing needs a tensor of labels, a value a sequence (B,) or a token (B, T); {source} "
                f"{type(value).__name__}. Number classes that have names from 0. There is {have}."
            )
        return tensordict.set("label", value)


class _Decide(Stage):
    """The decisions of one fitted probe on its site's (or pair's) rows, and of its control probe."""

    def __init__(self, probe: Probe | BilinearProbe, sites: Sequence[str], name: str) -> None:
        self._control = probe.fitted.get("control") is not None
        super().__init__(
            reads=[("tokens", site) for site in sites],
            writes=[("decision", name)] + ([("control_decision", name)] if self._control else []),
        )
        self._probe = (probe,)

    def compute(self, *rows: Tensor) -> list[Tensor]:
        (probe,) = self._probe
        inputs = tuple(probe.prepared(x) for x in rows)
        fits = [probe.fitted, probe.fitted["control"]] if self._control else [probe.fitted]
        return [probe.decide(fitted, inputs) for fitted in fits]


class _ControlLabel(Stage):
    """The control task's labels of rows, from their types."""

    def __init__(self, types: Key, counts: Tensor, seed: int) -> None:
        super().__init__(reads=[types], writes=[("tokens", "control_label")])
        self._counts, self._seed = counts, seed

    def compute(self, types: Tensor) -> Tensor:
        return control_labels(types, self._counts.to(types.device), self._seed)


class Phase:
    """What a ``with`` block of ``Probing`` hands over: set ``labels`` before each model call."""

    def __init__(self, units: Sequence[TensorDictModuleBase], needs_labels: bool) -> None:
        self.units, self.needs_labels = units, needs_labels
        self.labels: Tensor | None = None
        self.calls = 0

    def feed(self, td: TensorDictBase) -> None:
        """One model call: its rows and labels to every probe."""
        if self.needs_labels:
            if self.labels is None:
                raise ValueError(
                    "Probing expects labels for every model call: set `phase.labels = y` before the call (a value a sequence "
                    "(B,) or a token (B, T)), or give Probing(labels=) a function of the call's inputs."
                )
            td.set("label", self.labels.to(next(iter(td.values(True, True))).device))
            self.labels = None
        self.calls += 1
        for unit in self.units:
            if hasattr(unit, "update"):
                unit.update(td)
            else:
                unit(td)


class Probing:
    """A probe at every site of a model: fitted on some calls, scored on others.

    **Over loaders**: ``Probing(model, sites, probe, labels="label").run(loader)`` streams the loader once; the probe's own
    ``holdout`` decides which sequences train and which are scored. ``run(train_loader, test_loader)`` fits on all of the
    first and scores on all of the second.

    **Around the user's own calls**::

        probing = tg.Probing(model, "residual_output", tg.LinearProbe(), labels=lambda td: td["input_ids"] % 2)
        with probing.fit():
            model(**train_batch)
        with probing.score():
            model(**test_batch)
        probing.table()

    With labels that no function of the call's inputs gives, ``with probing.fit() as phase:`` and set ``phase.labels = y``
    before each call. Rows of a call are given to the probes and dropped at once.

    Args:
        model: any ``nn.Module``; it stays as it is.
        sites: kinds, concrete names, or a list of them, as for ``Capture``.
        probe: a probe with its default keys, copied for each site. A ``BilinearProbe`` is copied for each pair. With
            ``control=("tokens", "input_ids")`` the control task takes token ids as types.
        labels: the batch's key of the labels, a value a sequence (B,) or a token (B, T); or a function of the batch (a
            TensorDict with the model's inputs) that returns them.
        pairs: "consecutive", "all" or a list of (a, b), for bilinear probes.
        select: further settings of ``SelectTokens``, such as ``dict(positions="last")`` or ``dict(pool="mean")``.
        capture: further settings of ``Capture``, such as ``dict(layers=[0, 5])``.

    Attributes: ``sites``; ``probes``, the fitted probe of each site (or ``"a->b"``); ``settings``, what can change a number
    (seed, split, probe); ``result``, a TensorDict with ``("probe", site, score)`` and, for linear probes,
    ``("probe_fit", site, "weight" | "bias")``.

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
    ) -> None:
        if not isinstance(probe, Probe | BilinearProbe):
            raise TypeError(
                f"Probing takes a probe (LinearProbe(), SklearnProbe(estimator), ...), got {type(probe).__name__}. Wrap a "
                f"scikit-learn estimator in SklearnProbe, a torch module in TorchProbe."
            )
        self.capture = Capture(model, sites, **(capture or {}))
        self.sites = self.capture.sites
        self.probe, self.labels, self.select = probe, labels, dict(select or {})
        self._pairs = pair_list(self.sites, pairs) if isinstance(probe, BilinearProbe) else None
        if self._pairs == []:
            raise ValueError(
                f"Probing: no two of the sites {[*map(str, self.sites)]} make a pair under pairs={pairs!r}."
            )
        self.probes: dict[str, Any] = {}
        self._scores: TensorDict | None = None

    # ------------------------------------------------------------------------------------------ loaders

    def run(
        self, dataloader: Iterable[Any], test: Iterable[Any] | None = None, *, max_rows: int | None = None
    ) -> pd.DataFrame:
        """Fit and score over loaders and return the table.

        Args:
            dataloader: labelled batches; without ``test`` the probe holds out its own share of sequences.
            test: labelled batches that are scored; then everything in ``dataloader`` trains.
            max_rows: stop after this many rows of each.
        """
        units = self._fit_units(self.probe.holdout if test is None else 0.0)
        whole = TensorDictSequential(_Label(self.labels), self.capture, *units)
        first = run(whole, dataloader, max_rows=max_rows, keep=["probe"], progress=False)
        self._collect(units)
        if first is not None:
            self._scores = first.select("probe")
        if test is not None:
            units = self._score_units()
            whole = TensorDictSequential(_Label(self.labels), self.capture, *units)
            second = run(whole, test, max_rows=max_rows, progress=False)
            if second is not None:
                self._scores = self._named(second)
        return self.table()

    # ---------------------------------------------------------------------------------------- contexts

    def fit(self) -> Any:
        """A context: every model call inside it trains the probes."""
        return self._phase("fit")

    def score(self) -> Any:
        """A context: every model call inside it is scored by the fitted probes."""
        if not self.probes:
            raise ValueError(
                "Probing has no fitted probes yet: open `with probing.fit():` around labelled calls first."
            )
        return self._phase("score")

    @contextmanager
    def _phase(self, kind: str) -> Iterator[Phase]:
        units = self._fit_units(0.0) if kind == "fit" else self._score_units()
        before = [_Label(self.labels)] if callable(self.labels) else []
        phase = Phase(
            [*before, *(part for unit in units for part in _parts(unit))], not callable(self.labels)
        )
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
        if not phase.calls:
            raise ValueError(f"no model call was made in this {kind} block, so there is nothing to {kind}.")
        if kind == "fit":
            self._finish_pairs(units)
            self._collect(units)
            self._scores = None
        else:
            td = TensorDict({}, batch_size=[])
            for unit in units:
                for part in _parts(unit):
                    if hasattr(part, "publish"):
                        part.publish(td)
            self._scores = self._named(td)

    # ------------------------------------------------------------------------------------------ results

    @property
    def result(self) -> TensorDict:
        """Scores and, for linear probes, weights, by site."""
        if self._scores is None:
            raise ValueError(
                "nothing has been scored yet: run(loader), or a `with probing.score():` block after fit."
            )
        result = self._scores.clone()
        for name, probe in self.probes.items():
            for leaf in ("weight", "bias"):
                if isinstance(probe.fitted.get(leaf), Tensor):
                    result.set(("probe_fit", name, leaf), probe.fitted[leaf])
        return result

    def table(self) -> pd.DataFrame:
        """One row a site (or pair) with every score; the settings are in its ``attrs``."""
        frame = to_frame(self.result, "probe")
        frame.attrs = self.settings
        return frame

    def direction(self, site: str, label: int | None = None, *, unit: bool = True) -> Tensor:
        """The concept activation vector of a site's probe: see ``Probe.direction``."""
        if site not in self.probes:
            raise KeyError(f"no fitted probe at {site!r}; there is {list(self.probes)}.")
        return self.probes[site].direction(label, unit=unit)

    @property
    def settings(self) -> dict[str, Any]:
        """What can change a number: the probe, its settings and seed, the selection of rows."""
        plain = (str, int, float, bool, tuple, list, type(None))
        own = {k: v for k, v in vars(self.probe).items() if not k.startswith("_") and isinstance(v, plain)}
        own.pop("training", None)
        labels = getattr(self.labels, "__name__", "function") if callable(self.labels) else self.labels
        return {"probe": type(self.probe).__name__, **own, "labels": labels, "select": dict(self.select)}

    # ------------------------------------------------------------------------------------------ building

    @property
    def _types(self) -> list[str]:
        return [] if self.probe.control is None else [key_tuple(self.probe.control)[-1]]

    def _selector(self) -> SelectTokens:
        return SelectTokens(self.sites, also=["label", *self._types], **self.select)

    def _fit_units(self, holdout: float) -> list[TensorDictModuleBase]:
        probe = deepcopy(self.probe)
        probe.holdout = holdout
        if self._pairs is None:
            return [self._selector(), ForEach(probe, self.sites)]
        # The sample holds both parts of the split.
        size = int(probe.train_rows / (1 - holdout)) + 1
        sample = RowSample(self.sites, size=size, seed=probe.seed, also=["label", *self._types])
        return [self._selector(), sample, _Pairs(probe, self.sites, self._pairs)]

    def _finish_pairs(self, units: Sequence[TensorDictModuleBase]) -> None:
        if self._pairs is not None:
            _, sample, pairs = units
            pairs(sample.publish(TensorDict({}, batch_size=[])))

    def _collect(self, units: Sequence[TensorDictModuleBase]) -> None:
        last = units[-1]
        if self._pairs is None:
            self.probes = {unit.where: unit.module for unit in last}
            for name, probe in self.probes.items():
                try:
                    probe.solve_state()
                except ValueError as error:
                    error.args = (f"{error.args[0]} [at {name}]", *error.args[1:])
                    raise
        else:
            self.probes = dict(last.probes)

    def _score_units(self) -> list[TensorDictModuleBase]:
        sites = {name: ([name] if self._pairs is None else name.split("->")) for name in self.probes}
        if self._pairs is not None:
            sites = {f"{a}->{b}": [a, b] for a, b in self._pairs}
        units: list[TensorDictModuleBase] = [self._selector()]
        units += [_Decide(probe, sites[name], name) for name, probe in self.probes.items()]
        settings = {
            "permutations": self.probe.permutations,
            "ignore_index": self.probe.ignore_index,
            "seed": self.probe.seed,
        }
        units.append(ForEach(ProbeScore(**settings), list(self.probes)))
        first = next(iter(self.probes.values()))
        if first.fitted.get("control") is not None:
            types: Key = as_key(("tokens", *self._types))
            units.append(_ControlLabel(types, first.fitted["counts"], self.probe.seed))
            keys: list[Key] = ["control_decision", ("tokens", "control_label"), "row_id"]
            control = ProbeScore(**{**settings, "permutations": 0}, in_keys=keys, out_keys="control_score")
            units.append(ForEach(control, list(self.probes)))
        return units

    def _named(self, found: TensorDictBase) -> TensorDict:
        """Scores of a second pass under the names of the first."""
        scores = TensorDict({}, batch_size=[])
        for name, probe in self.probes.items():
            for score in SCORES:
                scores.set(("probe", name, score), found.get(("probe_score", name, score)))
            scores.set(
                ("probe", name, "train_rows"),
                torch.tensor(float(probe.fitted["train_rows"]), dtype=torch.float64),
            )
            control = found.get(("control_score", name, "accuracy"), None)
            if control is not None:
                scores.set(("probe", name, "control_accuracy"), control)
                scores.set(
                    ("probe", name, "selectivity"), found.get(("probe_score", name, "accuracy")) - control
                )
        return scores


class _Pairs(TensorDictModuleBase):
    """A copy of a bilinear probe for every pair, kept by name."""

    def __init__(self, probe: BilinearProbe, sites: Sequence[str], pairs: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.probes = {f"{a}->{b}": deepcopy(probe) for a, b in pairs}
        self._units = [ForEachPair(p, sites, pairs=[pair]) for p, pair in zip(self.probes.values(), pairs)]
        self.in_keys = list(dict.fromkeys(key for unit in self._units for key in unit.in_keys))
        self.out_keys = [key for unit in self._units for key in unit.out_keys]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for unit in self._units:
            unit(tensordict)
        return tensordict


def _parts(unit: TensorDictModuleBase) -> list[TensorDictModuleBase]:
    if isinstance(unit, TensorDictSequential):
        return list(unit)
    return [] if isinstance(unit, _Pairs) else [unit]
