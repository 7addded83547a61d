"""``Probe``: what every probe shares. It streams rows with labels, holds some out, fits, and scores what it held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.core.surroundings import steady
from tdgeom.core.words import Vocabulary, Words
from tdgeom.core.wrong_objects import named_functions
from tdgeom.numerics.hashing import EMPTY, hash_ids
from tdgeom.probing import rules
from tdgeom.probing.class_labels import NamesClasses, moved_labels, moved_targets
from tdgeom.probing.control_task import BUCKETS, control_map, type_buckets
from tdgeom.probing.label_moments import (
    LEAVES,
    class_counts,
    merged_moments,
    pool_folds,
    row_targets,
    some_targets,
    with_rows,
    zero_moments,
)
from tdgeom.probing.labelled_rows import labelled_keys, one_hot, plain_rows, row_labels
from tdgeom.probing.predict import linear_decision
from tdgeom.probing.rules import Fitted, Metric, Task, check_settings, score_names
from tdgeom.probing.splits import fold_index, holdout_mask, row_groups
from tdgeom.stream import reservoir
from tdgeom.stream.held_rows import same_kind
from tdgeom.stream.replicates import error_groups

__all__ = ["Probe"]


class Probe(NamesClasses):
    """A probe as a streaming stage: rows with labels in, held-out scores out. Base of every probe of one site.

    Whole documents are held out by a hash of their number, so that every site, batch split and process has the same split: of
    the rows' ``("carried", "document_id")``, which ``SelectTokens`` writes; where there is none, of the sequence
    (``row_id >> 20``). Training rows go into the probe's state (moments, or a uniform sample of ``train_rows``), held-out
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
        labels: the carried value to predict, ``SelectTokens(..., also=[labels])``: numbers, or names of classes (text, booleans;
            None: a row without one), which are numbered in the order of the names: ``classes``.
        holdout: share of the documents that is held out; 0 trains on everything and leaves the scores NaN.
        test_rows: held-out rows kept for scoring. train_rows: training rows kept by probes that need the rows.
        control: a carried value, such as "input_ids", whose values are the types of the control task of Hewitt and Liang
            (2019); it is read after "row_id".
        permutations: permutations of the held-out labels behind ``null_mean`` and ``p_value``.
        errors: standard errors of every score, ``("probe", f"{name}_se")``, over 20 groups of documents or this many. No score
            depends on it. See ``score_errors``.
        ignore_index: integer labels of this value mark rows without a label.
        seed: of the split, the samples, the control task, the permutations and the fit.
        preprocess: function of rows (N, D) -> (N, D'), applied before everything else, row by row.
        metrics: further scores, name -> function of (predictions, labels) on the held-out rows.

    Reads ``"tokens"`` (N, D), ``("carried", labels)`` (N,) integers for classes 0..K-1 or floats (N,), (N, K) for
    regression, ``"row_id"`` and last, where present, ``("carried", "document_id")``; writes ``("probe", name)`` for each score:
    accuracy, balanced_accuracy, auroc, r2, standard_error (over documents, of accuracy or R²), majority_baseline,
    control_accuracy, selectivity (accuracy minus control_accuracy), null_mean, p_value, train_rows, test_rows; NaN for what the
    task does not have.

    Raises:
        ValueError: labels that do not fit the rows, a class missing from a part of the split, a constant target, a state of
            other settings, row ids that came twice.
    """

    optional = frozenset({"row_id", "document_id"})
    publishing = frozenset({"permutations", "metrics"})
    parameters_out: ClassVar[tuple[str, ...]] = ()
    needs_rows: ClassVar[bool] = True  # False: trained from moments of every row, by solve_moments()
    needs_scatter: ClassVar[bool] = True  # False: from means alone
    count: Tensor
    metrics: Mapping[str, Metric]

    def __init__(
        self,
        *,
        labels: str = "label",
        holdout: float = 0.25,
        test_rows: int = 4096,
        train_rows: int = 8192,
        control: str | None = None,
        permutations: int = 200,
        errors: bool | int = False,
        ignore_index: int = -100,
        seed: int = 0,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        self.metrics = named_functions(f"{self.__name__}: metrics", metrics)
        check_settings(self.__name__, holdout, test_rows, train_rows, self.metrics)
        self.errors, self.groups = errors, error_groups(errors, self.__name__)
        reads = labelled_keys(self.__name__, labels, control)
        if control is not None and isinstance(in_keys, list) and len(in_keys) == 3:
            in_keys = [*in_keys, ("carried", control)]
        super().__init__(
            in_keys=in_keys,
            out_keys=out_keys,
            reads=reads,
            writes=[("probe", name) for name in score_names(self.metrics, self.groups)]
            + [("probe_fit", name) for name in self.parameters_out],
        )
        self.labels, self.control = labels, control
        self.holdout, self.test_rows, self.train_rows = holdout, test_rows, train_rows
        self.permutations, self.ignore_index, self.seed = permutations, ignore_index, seed
        self.preprocess = preprocess
        self.add_state("count", torch.int64)
        for part in self.parts:
            for name in ("x", "label", "ids", "bucket", "document", "hashes"):
                self.add_state(part + name, None if name in ("x", "label") else torch.int64)
        for name in () if self.keeps_rows else LEAVES:
            self.add_state("moment_" + name, torch.int64 if name == "count" else torch.float64)
        self.add_class_names()
        self._fitted: Fitted | None = None

    @property
    def keeps_rows(self) -> bool:
        """True where training needs the rows themselves."""
        return self.needs_rows

    @property
    def folds_used(self) -> int:
        """Folds kept apart in the moments: more than one only where something is chosen by cross-validation."""
        return 1

    # ------------------------------------------------------------------------------------ what a probe defines

    def solve(self, inputs: tuple[Tensor, ...], label: Tensor, task: Task) -> Fitted:
        """Fit on rows: one (N, D), and int64 (N,) classes or float64 (N, K) targets."""
        raise TypeError(f"{self.__name__} defines no solve(): fit the rows there and return what was found.")

    def solve_moments(self, moments: dict[str, Tensor], task: Task) -> Fitted:
        """Fit moments with folds first (``needs_rows = False``): at least "weight" (K, D) and "bias" (K,)."""
        raise TypeError(
            f"{self.__name__} defines no solve_moments(): fit the moments of the training rows there."
        )

    def decide(self, fitted: Fitted, inputs: tuple[Tensor, ...]) -> Tensor:
        """A number a row and class (the largest is the answer), or a row and target: (N, K). Default: Wx + b."""
        if "weight" not in fitted:
            raise TypeError(f"{self.__name__} defines no decide(): compute (N, K) decisions there.")
        home = inputs[0].device
        return linear_decision(inputs[0], fitted["weight"].to(home), fitted["bias"].to(home))

    # ------------------------------------------------------------------------------------ the stream

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the split of which rows are kept: their prefixes in the state."""
        return ("test_", "train_") if self.keeps_rows else ("test_",)

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The pieces of the state under a prefix: a part's reservoir, or the moments."""
        state = self.state()
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def sample(self, part: str) -> dict[str, Tensor]:
        """The rows kept of one part, in hash order."""
        return reservoir.in_hash_order(self.named(part), self.__name__)

    def moments(self) -> dict[str, Tensor]:
        """Moments of the training rows so far, folds first (the leaves of ``StreamingLabelMoments``)."""
        return some_targets(self.named("moment_"), slice(self._bucket_columns, None))

    @property
    def _bucket_columns(self) -> int:
        """Leading targets of the moments that count the control task's buckets."""
        return BUCKETS if self.control is not None else 0

    def start(self, tokens: Tensor, label: Any, row_id: Tensor | None, *further: Any) -> dict[str, Tensor]:
        """Empty samples, of the rows' width and the labels' kind, and moments of no rows."""
        rows = self._rows(tokens, label, row_id, further, 0)
        rows.pop("used")
        state = {"count": torch.zeros((), dtype=torch.int64, device=tokens.device)}
        sizes = {"test_": self.test_rows if self.holdout else 0, "train_": self.train_rows}
        for part in self.parts:
            slots = reservoir.empty_slots(sizes[part], rows)
            state |= {part + name: value for name, value in slots.items()}
        if not self.keeps_rows:
            targets = self._bucket_columns + (rows["label"].shape[1] if rows["label"].ndim == 2 else 1)
            moments = zero_moments(
                self.folds_used, rows["x"].shape[1], targets, tokens.device, scatter=self.needs_scatter
            )
            state |= {"moment_" + name: value for name, value in moments.items()}
        return state

    def _rows(
        self, tokens: Tensor, label: Any, row_id: Tensor | None, further: tuple[Any, ...], seen: int
    ) -> dict[str, Tensor]:
        """One block of rows as the state holds them; ``further``: the types of the control task, documents."""
        types = further[0] if further and self.control is not None else None
        document = further[-1] if len(further) > (self.control is not None) else None
        x, key = rules.prepared(self, tokens), self.in_keys[1]
        label = self.numbered(label, key).to(tokens.device)
        if isinstance(types, Words):
            types = Vocabulary().encode(types).to(tokens.device)
        label, used = row_labels(label, tokens, key=key, owner=self.__name__, ignore_index=self.ignore_index)
        if row_id is None:  # rows without an id: each is its own group, numbered as it comes
            row_id = torch.arange(seen, seen + len(used), device=x.device) << POSITION_BITS
        bucket = torch.zeros_like(row_id) if types is None else type_buckets(types, self.seed)
        group = row_groups(row_id.long(), document)
        return {
            "x": x,
            "label": label,
            "ids": row_id.long(),
            "bucket": bucket,
            "document": group,
            "used": used,
        }

    def accumulate(self, tokens: Tensor, label: Any, row_id: Tensor | None = None, *further: Any) -> None:
        """Add a block of rows: to the held-out sample, or to the training state."""
        rows = self._rows(tokens, label, row_id, further, int(self.count))
        used = rows.pop("used")
        for key, name in zip(self.in_keys, ("x", "label")):
            same_kind(self.__name__, key, self.state()["test_" + name], rows[name])
        hashes = hash_ids(rows["ids"], self.seed + 1)
        held_out = holdout_mask(rows["document"], self.holdout, self.seed)
        for part, chosen in (("test_", used & held_out), ("train_", used & ~held_out)):
            at = chosen.nonzero()[
                :, 0
            ]  # one wait for a device, which an index of true and false is each time
            if not len(at):
                continue
            if part in self.parts:
                reservoir.offer(self.named(part), {**rows, "hashes": torch.where(chosen, hashes, EMPTY)})
            else:
                self._learn({name: value[at] for name, value in rows.items()})
        self.count = self.count + len(used)
        self._fitted = None

    def _learn(self, rows: Mapping[str, Tensor]) -> None:
        """Add training rows to their folds' moments."""
        state = self.named("moment_")
        targets = row_targets(rows["label"], state["target_mean"].shape[1] - self._bucket_columns)
        if self._bucket_columns:
            targets = torch.cat((one_hot(rows["bucket"], BUCKETS), targets), 1)
        fold = fold_index(rows["document"], self.folds_used, self.seed)
        self._set_moments(with_rows(state, rows["x"], targets, fold))

    def _set_moments(self, moments: Mapping[str, Tensor]) -> None:
        self.set_state({"moment_" + name: value for name, value in moments.items()})

    def fits(self, name: str, value: Tensor) -> bool:
        """Either may have met classes that the other has not."""
        return name.startswith("moment_") or name == "class_texts" or super().fits(name, value)

    def renumber(self, places: Tensor, classes: int) -> None:
        """Move the classes of the rows and moments held."""
        for part in self.parts:
            label = self.state()[part + "label"]
            self.set_state({part + "label": moved_labels(label, places)})
        if not self.keeps_rows:
            moments = self.named("moment_")
            self._set_moments(moved_targets(moments, places, classes, self._bucket_columns))
        self._fitted = None

    def combine(self, other: Probe) -> None:
        """Offer the other's samples to the own, and add its moments."""
        other = self.agree_on_classes(other)
        for part in self.parts:
            if len(self.named(part)["hashes"]) > 1:
                theirs = {name: value.to(self.home) for name, value in other.named(part).items()}
                reservoir.offer(self.named(part), theirs)
        if not self.keeps_rows:
            self._set_moments(merged_moments(self.named("moment_"), other.named("moment_"), self.__name__))
        self.count = self.count + other.count.to(self.home)
        self._fitted = None

    def reset(self) -> None:
        """Forget every row and the fit."""
        super().reset()
        self._fitted = None

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._fitted = None

    def result(self) -> dict[str, Tensor]:
        """Fit, score the held-out rows, and hand over what was fitted."""
        fitted, rows = self.solve_state(), self.sample("test_")
        if len(rows["label"]):
            inputs = (rows["x"],)
            right = rules.control_right(self, inputs, rows["bucket"])
            decided = self.decide(fitted, inputs)
            found = rules.scored(self, decided, rows["label"], rows["document"], right)
        elif self.holdout:
            raise ValueError(
                f"{self.__name__}: no document fell into the held-out part (holdout={self.holdout}, {int(self.count)} rows "
                f"seen). Give more documents or a larger holdout; a document (the batch's 'document_id', else a sequence) is "
                f"never split. holdout=0 trains on everything and scores nothing."
            )
        else:
            found = rules.unscored(self, self.home)
        return {**found, **{name: fitted[name].clone() for name in self.parameters_out}}

    # ------------------------------------------------------------------------------------ fit, predict, score

    def fit(
        self,
        x: Any,
        y: Any,
        row_id: Tensor | None = None,
        types: Tensor | None = None,
        document_id: Tensor | None = None,
    ) -> Probe:
        """Train on all of these rows (nothing is held out); returns itself.

        Args:
            x: (N, D) rows. y: (N,) integers for classes, floats for regression. Tensors, NumPy arrays or lists.
            row_id: what keeps sequences together in the folds that choose the regularisation.
            types: for the control task.
            document_id: (N,) whole numbers: what keeps documents together there.
        """
        x, y = plain_rows(self.__name__, x=x, label=y)
        self.reset()
        before = self.holdout, self.train_rows
        self.holdout, self.train_rows = 0.0, max(self.train_rows, len(x))
        try:
            with torch.inference_mode(False), torch.no_grad(), steady(x.device):
                controlled = [] if self.control is None else [types]
                given = (x.detach(), y.detach(), row_id, *controlled, document_id)
                self.set_state(self.start(*given))
                self.accumulate(*given)
                self.solve_state()
        finally:
            self.holdout, self.train_rows = before
        return self

    def solve_state(self) -> Fitted:
        """Fit what has been streamed so far, and the control task beside it."""
        if self._fitted is None:
            with torch.inference_mode(False), torch.no_grad(), steady(self.home):
                if self.keeps_rows:
                    rows = self.sample("train_")
                    bucket = rows["bucket"] if self.control is not None else None
                    self._fitted = rules.fit_rows(self, (rows["x"],), rows["label"], bucket)
                else:
                    self._fitted = self._solve_moments()
        return self._fitted

    def take_fitted(self, fitted: Fitted, names: Sequence[str]) -> None:
        """Be fitted as another process was, without its rows."""
        self.reset()
        self.rename(names)
        self._fitted = fitted

    def _solve_moments(self) -> Fitted:
        moments, regression = self.moments(), self.state()["test_label"].is_floating_point()
        rows = int(moments["count"].sum())
        pooled = pool_folds(moments) if rows else moments
        counts = None if regression else class_counts(pooled)
        spread = pooled["target_scatter"].diagonal(dim1=-2, dim2=-1) if regression else None
        task = rules.task_of(self.__name__, rows, counts=counts, spread=spread)
        fitted: Fitted = {"task": task, "train_rows": rows, "counts": counts, "control": None}
        fitted |= self.solve_moments(moments, task)
        if self.control is not None and counts is not None:
            choice = one_hot(control_map(counts, self.seed), task.classes)
            buckets = some_targets(self.named("moment_"), slice(0, BUCKETS))
            random = {
                "target_mean": buckets["target_mean"] @ choice,
                "cross_scatter": buckets["cross_scatter"] @ choice,
                "target_scatter": choice.mT @ buckets["target_scatter"] @ choice,
            }
            fitted["control"] = self.solve_moments({**buckets, **random}, task)
        return fitted

    @property
    def fitted(self) -> Fitted:
        """What the last fit found, such as "weight" (K, D) and "bias" (K,); after ``load_state_dict`` it is found again."""
        if self._fitted is None and self.is_empty:
            raise ValueError(
                f"{self.__name__} is not fitted: call fit(x, y), or run it over labelled rows first."
            )
        return self.solve_state()

    @property
    def task(self) -> Task:
        """What the last fit predicts."""
        return self.fitted["task"]

    def predict(self, x: Any) -> Any:
        """Classes (N,), by name as an array where labels were names; or numbers (N,) or (N, K), for rows (N, D)."""
        return rules.named_answers(self, rules.answers(self.task, self.decision(x)))

    def decision(self, x: Any) -> Tensor:
        """What ``predict`` decides by: (N, K) for rows (N, D)."""
        return rules.decision(self, x)

    def score(
        self, x: Any, y: Any, *, row_id: Tensor | None = None, document_id: Tensor | None = None
    ) -> dict[str, float]:
        """Scores by name on rows and their labels; error bars over documents, or the sequences of ``row_id``."""
        return rules.score(self, x, y, row_id=row_id, document_id=document_id)

    def direction(self, label: int | str | None = None, *, unit: bool = True) -> Tensor:
        """The concept activation vectors of a fitted linear probe, float64: what Steer and ProjectOut take.

        (K, D), a row for each class (or target): ``direction()[1]`` points towards class 1, of two classes as of more; with
        ``label`` that row, (D,). A class' row is its weight less the mean of all classes' weights (of two classes, one is the
        other's opposite); a target's is its weight. For ``preprocess`` it lives in the preprocessed space.

        Args:
            label: the class (by number or name) or target to point to.
            unit: length 1; False keeps the probe's own scale.
        """
        return rules.concept_direction(self, label, unit=unit)
