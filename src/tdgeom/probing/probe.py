"""``Probe``: what every probe shares. It streams rows with labels, holds some out, fits, and scores what it held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdgeom.core.keys import Key, as_key, key_tuple
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.numerics.hashing import EMPTY, hash_ids
from tdgeom.probing.control_task import control_map, type_buckets
from tdgeom.probing.labelled_rows import LabelledStage
from tdgeom.probing.rules import Fitted, Metric, ProbeRules, Task, check_settings, plain_rows
from tdgeom.probing.scores import SCORES, complete
from tdgeom.probing.splits import holdout_mask, row_groups
from tdgeom.stream import reservoir

__all__ = ["Probe"]


class Probe(ProbeRules, LabelledStage):
    """A probe as a streaming stage: rows with labels in, held-out scores out. Base of every probe of one site.

    Whole sequences are held out by a hash of their index (``row_id >> 20``), so that every site, batch split and process
    has the same split. Training rows go into the probe's state (moments, or a uniform sample of ``train_rows``), held-out
    rows into a uniform sample of ``test_rows``; ``publish`` fits and scores.

    A probe of one's own defines ``solve`` and ``decide``:

        >>> import torch, tdgeom as tg
        >>> class Nearest(tg.Probe):
        ...     def solve(self, inputs, label, task):
        ...         return {"rows": inputs[0], "labels": label}
        ...     def decide(self, fitted, inputs):
        ...         nearest = torch.cdist(inputs[0], fitted["rows"]).argmin(1)
        ...         return torch.nn.functional.one_hot(fitted["labels"][nearest]).double()
        >>> x = torch.randn(40, 3)
        >>> Nearest(permutations=0).fit(x, (x[:, 0] > 0).long()).score(x, (x[:, 0] > 0).long())["accuracy"]
        1.0

    Args:
        holdout: share of the sequences that is held out; 0 trains on everything and leaves the scores NaN.
        test_rows: held-out rows kept for scoring. train_rows: training rows kept by probes that need the rows.
        control: key of the types (such as ``("tokens", "input_ids")``) for the control task of Hewitt and Liang (2019);
            it is read after "row_id".
        permutations: permutations of the held-out labels behind ``null_mean`` and ``p_value``.
        ignore_index: integer labels of this value mark rows without a label.
        seed: of the split, the samples, the control task, the permutations and the fit.
        preprocess: function of rows (N, D) -> (N, D'), applied before everything else, row by row.
        metrics: further scores, name -> function of (predictions, labels) on the held-out rows.

    Reads ``"tokens"`` (N, D), ``("tokens", "label")`` (N,) integers for classes 0..K-1 or floats (N,), (N, K) for
    regression, and ``"row_id"``; writes ``("probe", name)`` for each score: accuracy, balanced_accuracy, auroc, r2,
    standard_error (over sequences, of accuracy or R²), majority_baseline, control_accuracy, selectivity (accuracy minus
    control_accuracy), null_mean, p_value, train_rows, test_rows; NaN for what the task does not have.

    Raises:
        ValueError: labels that do not fit the rows, a class missing from a part of the split, a constant target.
    """

    parameters_out: ClassVar[tuple[str, ...]] = ()
    needs_rows = True

    def __init__(
        self,
        *,
        holdout: float = 0.25,
        test_rows: int = 4096,
        train_rows: int = 8192,
        control: Key | None = None,
        permutations: int = 200,
        ignore_index: int = -100,
        seed: int = 0,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        self_metrics = dict(metrics or {})
        check_settings(type(self).__name__, holdout, test_rows, train_rows, self_metrics)
        reads = dict(LabelledStage.reads)
        if control is not None:
            reads[as_key(key_tuple(control))] = "N"
            in_keys = [*in_keys, control] if isinstance(in_keys, list) and len(in_keys) == 3 else in_keys
        super().__init__(
            in_keys=in_keys,
            out_keys=out_keys,
            reads=reads,
            writes=[("probe", name) for name in (*SCORES, *self_metrics)]
            + [("probe_fit", name) for name in self.parameters_out],
        )
        self.holdout, self.test_rows, self.train_rows, self.control = holdout, test_rows, train_rows, control
        self.permutations, self.ignore_index, self.seed = permutations, ignore_index, seed
        self.preprocess, self.metrics = preprocess, self_metrics
        self.add_state("count", torch.int64)
        for part in self.parts:
            for name in ("x", "label", "ids", "bucket", "hashes"):
                self.add_state(part + name, torch.float32 if name == "x" else torch.int64)
        self._fitted = None

    @property
    def keeps_rows(self) -> bool:
        """True where training needs the rows themselves."""
        return self.needs_rows

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the split of which rows are kept: their prefixes in the state."""
        return ("test_", "train_") if self.keeps_rows else ("test_",)

    def slots(self, part: str) -> dict[str, Tensor]:
        """The reservoir that keeps one part's rows."""
        state = self._state()
        return {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}

    def sample(self, part: str) -> dict[str, Tensor]:
        """The rows kept of one part, in hash order."""
        return reservoir.in_hash_order(self.slots(part), type(self).__name__)

    def settings(self) -> dict[str, Any]:
        """What two shards must share."""
        names = ("holdout", "test_rows", "train_rows", "ignore_index", "seed", "control")
        return {name: getattr(self, name) for name in names}

    # ---------------------------------------------------------------------------------------- streaming

    def start(
        self, tokens: Tensor, label: Tensor, row_id: Tensor | None, types: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Empty samples, of the rows' width and the labels' kind."""
        rows = self._rows(tokens, label, row_id, types, 0)
        rows.pop("used")
        state = {"count": torch.zeros((), dtype=torch.int64, device=tokens.device)}
        sizes = {"test_": self.test_rows if self.holdout else 0, "train_": self.train_rows}
        for part in self.parts:
            slots = reservoir.empty_slots(sizes[part], rows)
            state |= {part + name: value for name, value in slots.items()}
        return state

    def _rows(
        self, tokens: Tensor, label: Tensor, row_id: Tensor | None, types: Tensor | None, seen: int
    ) -> dict[str, Tensor]:
        """One block of rows as the state holds them."""
        x = self.prepared(tokens)
        label, used = self.labels(label, tokens, self.in_keys[1])
        if row_id is None:  # rows without an id: each is its own group, numbered as it comes
            row_id = torch.arange(seen, seen + len(used), device=x.device) << POSITION_BITS
        bucket = torch.zeros_like(row_id) if types is None else type_buckets(types, self.seed)
        return {"x": x, "label": label, "ids": row_id.long(), "bucket": bucket, "used": used}

    def accumulate(
        self, tokens: Tensor, label: Tensor, row_id: Tensor | None = None, types: Tensor | None = None
    ) -> None:
        """Add a block of rows: to the held-out sample, or to the training state."""
        rows = self._rows(tokens, label, row_id, types, int(self.count))
        used = rows.pop("used")
        self._check_kind(rows)
        hashes = hash_ids(rows["ids"], self.seed + 1)
        held_out = holdout_mask(row_groups(rows["ids"]), self.holdout, self.seed)
        for part, chosen in (("test_", used & held_out), ("train_", used & ~held_out)):
            if not bool(chosen.any()):
                continue
            if part in self.parts:
                reservoir.offer(self.slots(part), {**rows, "hashes": torch.where(chosen, hashes, EMPTY)})
            else:
                self.learn({name: value[chosen] for name, value in rows.items()})
        self.count = self.count + len(used)
        self._fitted = None

    def learn(self, rows: Mapping[str, Tensor]) -> None:
        """Add training rows ("x", "label", "ids", "bucket") to the state, for probes that need no rows."""
        raise TypeError(f"{type(self).__name__} keeps no rows and defines no learn().")

    def _check_kind(self, rows: Mapping[str, Tensor]) -> None:
        for name in ("x", "label"):
            like = self._buffers["test_" + name]
            if (
                like.shape[1:] != rows[name].shape[1:]
                or like.is_floating_point() != rows[name].is_floating_point()
            ):
                raise ValueError(
                    f"{type(self).__name__} has seen {'rows' if name == 'x' else 'labels'} of shape (N, "
                    f"{', '.join(map(str, like.shape[1:]))}) and {like.dtype}, and now gets {tuple(rows[name].shape)} and "
                    f"{rows[name].dtype} at {self.in_keys[0 if name == 'x' else 1]!r}. Use one probe a site and task, or reset()."
                )

    def combine(self, other: Probe) -> None:
        """Offer the other's samples to the own."""
        home = self.count.device
        for part in self.parts:
            if self.slots(part)["hashes"].shape[0] > 1:
                theirs = {name: value.to(home) for name, value in other.slots(part).items()}
                reservoir.offer(self.slots(part), theirs)
        self.count = self.count + other.count.to(home)
        self._fitted = None

    def reset(self) -> None:
        """Forget every row and the fit."""
        super().reset()
        self._fitted = None

    # ------------------------------------------------------------------------------------ fit and score

    def fit(self, x: Tensor, y: Tensor, row_id: Tensor | None = None, types: Tensor | None = None) -> Probe:
        """Train on all of these rows (nothing is held out); returns itself.

        Args:
            x: (N, D) rows. y: (N,) integers for classes, floats for regression. Tensors, NumPy arrays or lists.
            row_id: what keeps sequences together in the folds that choose the regularisation.
            types: for the control task.
        """
        x, y = plain_rows(type(self).__name__, x=x, label=y)  # type: ignore[assignment]
        self.reset()
        holdout, self.holdout = self.holdout, 0.0
        rows, self.train_rows = self.train_rows, max(self.train_rows, len(x))
        try:
            with torch.no_grad():
                given = (x.detach(), y.detach(), row_id, types)
                for name, value in self.start(*given).items():
                    setattr(self, name, value)
                self.accumulate(*given)
                self.solve_state()
        finally:
            self.holdout, self.train_rows = holdout, rows
        return self

    def refit(self) -> None:
        """Fit what the state holds (after ``load_state_dict``, say)."""
        if not self.is_empty:
            self.solve_state()

    def solve_state(self) -> Fitted:
        """Fit what has been streamed so far, and the control task beside it."""
        if self._fitted is None:
            with torch.inference_mode(False), torch.no_grad():
                self._task, fitted, control = self._solve()
            self._fitted = {**fitted, "control": control}
        return self._fitted

    def _solve(self) -> tuple[Task, Fitted, Fitted | None]:
        rows = self.sample("train_")
        task = self.task_of(rows["label"])
        counts = task.counts(rows["label"])
        fitted = {
            "train_rows": len(rows["label"]),
            "counts": counts,
            **self.solve((rows["x"],), rows["label"], task),
        }
        control = None
        if self.control is not None and not task.regression:
            random = control_map(counts, self.seed)[rows["bucket"]]
            control = self.solve((rows["x"],), random, Task(False, task.classes))
        return task, fitted, control

    def result(self) -> dict[str, Tensor]:
        """Fit, score the held-out rows, and hand over what was fitted."""
        fitted = self.solve_state()
        rows = self.sample("test_")
        if not len(rows["label"]):
            if self.holdout:
                raise ValueError(
                    f"{type(self).__name__}: no sequence fell into the held-out part (holdout={self.holdout}, "
                    f"{int(self.count)} rows seen). Give more sequences or a larger holdout; a sequence is never split. "
                    f"holdout=0 trains on everything and scores nothing."
                )
            found = complete({"train_rows": float(fitted["train_rows"])}, self.count.device)
            found |= {name: torch.full((), torch.nan, dtype=torch.float64) for name in self.metrics}
        else:
            group = row_groups(rows["ids"])
            decision = self.decide(fitted, (rows["x"],))
            found = self.scored(decision, rows["label"], group)
            found |= self.control_scores((rows["x"],), rows["bucket"], found["accuracy"])
        return {**found, **{name: fitted[name].clone() for name in self.parameters_out}}

    def control_scores(
        self, inputs: tuple[Tensor, ...], bucket: Tensor, accuracy: Tensor
    ) -> dict[str, Tensor]:
        """Accuracy of the control probe on its own labels, and the selectivity."""
        control = self.fitted.get("control")
        if control is None:
            return {}
        random = control_map(self.fitted["counts"], self.seed)[bucket]
        right = (self.decide(control, inputs).argmax(-1) == random).double().mean()
        return {"control_accuracy": right, "selectivity": accuracy - right}
