"""``GeometryWatch``: geometry beside the loss, at steps of one's choice, in a training that goes on as if nobody looked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdgeom.analysis.analysis_settings import AnalysisSettings, Metrics, select_settings
from tdgeom.analysis.saved_results import save_results
from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.keys import Key
from tdgeom.core.process_groups import broadcast_number, rank_and_world
from tdgeom.core.warnings import Gathered, gathered, tell
from tdgeom.model.sites import LayerSpec
from tdgeom.training.loggers import as_loggers
from tdgeom.training.one_look import Look, Results
from tdgeom.training.schedule import Steps, step_rule
from tdgeom.training.step_values import StepValue, flat_names, step_values, tidy_frame
from tdgeom.training.time_budget import TimeBudget
from tdgeom.training.training_rows import StepReading, refuse_compiled_step
from tdgeom.training.untouched import seed_generators, untouched

__all__ = ["GeometryWatch"]


class GeometryWatch:
    """Measures a model while it trains: in three lines of a plain loop, and in the callbacks for trainers.

    A step's number is how many steps of the optimizer are done. With a probe loader the model is measured on it in eval mode,
    between two steps. Without one the training batches are measured: hooks read what the passes of a due step compute anyway, in
    training mode (dropout acts), detached; there is no further forward pass.

    **What training does is the same with and without it**, bit for bit: random numbers (Python, NumPy, torch, every device, the
    loader's own), each module's mode, gradients, buffers and autocast's copies of weights are put back. A compiled model is
    measured eagerly on the probe loader. In a process group all ranks measure together, and rank 0 has the results.

    Args:
        dataloader: the probe: batches, or texts with ``tokenizer``, as for ``analyze_model``; it is read again at every look,
            under the same random numbers. None: the training batches themselves.
        every: steps between two looks, the first at 0.
        schedule: in place of ``every``: "log" (0, 1, 2, 4, 8, ...), a list of steps (``log_spaced_steps``), a function of the
            step.
        budget: the share of the training time that looks may take: one that would be too much is put off to the next step of the
            schedule at which it fits. The first look, which shows how long one takes, comes in any case. None: no bound.
        metrics, sites, layers, max_rows, sample_size, seed, select, novelty_k: of the default analysis, as for ``analyze_model``.
        pipeline: in place of the default analysis: any pipeline for ``run`` over a Capture of the model, or a function that makes
            one of the model. ``max_rows`` bounds its rows too.
        log: where values go: a file for JSON lines (``"geometry.jsonl"``), ``"tensorboard"`` or ``"tensorboard:FOLDER"``,
            anything with ``.log(dict, step)`` or ``.log_metrics(dict, step)`` (Weights & Biases, MLflow, Trackio, Lightning's
            loggers), a function, or a list of these. Names are flat: ``geometry/residual_output.3/d_pr``.
        alarms: objects with ``update(step, metrics) -> messages``, metrics by those names: a message is warned of and kept.
        save_dir: a folder in which each step's results become a bundle, ``step-00000100``; a report of several draws them over
            steps.
        in_keys, tokenizer, text_column, batch_size, max_length: of the probe, as for ``run``.

    Attributes: ``values``, what each step gave (``frame`` makes a table); ``last``, the newest results; ``messages``, what alarms
    said, as (step, message); ``overhead``, looks, their seconds and their share of the training time.

    Raises:
        ValueError: a schedule, sites or settings that cannot be; an iterator as the probe. RuntimeError: a training step that no
            hook sees, a forward that writes to parameters. The first look raises what goes wrong; later looks warn, and training
            goes on.

        >>> import torch, tdgeom as tg
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> probe = [{"input": torch.randn(64, 4)}]
        >>> watch = tg.GeometryWatch(probe, every=5, budget=None, sites="module_output:1", metrics="spectrum")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for _ in range(10):
        ...     with watch.step(model):
        ...         model(torch.randn(8, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> watch.frame()["step"].unique().tolist()
        [0, 5, 10]
    """

    @answer_guesses
    def __init__(
        self,
        dataloader: Iterable[Any] | None = None,
        *,
        every: int = 100,
        schedule: Steps | None = None,
        budget: float | None = 0.02,
        metrics: Metrics = "default",
        sites: str | Sequence[str] = "residual_output",
        layers: LayerSpec = "all",
        max_rows: int | None = 4096,
        sample_size: int = 2048,
        seed: int = 0,
        select: Mapping[str, Any] | None = None,
        novelty_k: int = 32,
        pipeline: TensorDictModuleBase | Callable[[nn.Module], TensorDictModuleBase] | None = None,
        log: Any = None,
        alarms: Any = (),
        save_dir: str | Path | None = None,
        in_keys: Sequence[Key] | None = None,
        tokenizer: Any = None,
        text_column: str | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
    ) -> None:
        self.owner = owner = type(self).__name__
        if isinstance(dataloader, Iterator):
            raise ValueError(
                f"{owner}: the probe is read again at every look, but the dataloader is an iterator that can be read once. "
                f"Give a list or a DataLoader."
            )
        if budget is not None and not budget > 0:
            raise ValueError(
                f"{owner}: budget is a share of the training time, such as 0.02, or None, got {budget!r}."
            )
        given = {
            "metrics": metrics,
            "layers": layers,
            "select": select,
            "novelty_k": novelty_k,
            "sites": sites,
        }
        if pipeline is not None and (
            unused := [name for name, own in OF_THE_ANALYSIS.items() if given[name] != own]
        ):
            raise ValueError(
                f"{owner}: {unused[0]}= is of the default analysis, and pipeline= stands in its place. Leave one of them out."
            )
        self.dataloader, self.due = dataloader, step_rule(every, schedule, owner)
        self.settings = AnalysisSettings(
            metrics=metrics,
            sites=sites,
            layers=layers,
            max_rows=max_rows,
            sample_size=sample_size,
            seed=seed,
            select=select_settings(owner, select),
            novelty_k=novelty_k,
        )
        of_texts = {
            "in_keys": in_keys,
            "tokenizer": tokenizer,
            "text_column": text_column,
            "batch_size": batch_size,
            "max_length": max_length,
        }
        self.look = Look(self.settings, pipeline, dataloader, of_texts, owner)
        self.budget, self.loggers = TimeBudget(budget), as_loggers(log, owner)
        self.alarms = list(alarms) if isinstance(alarms, Sequence) else [alarms]
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.values: dict[int, list[StepValue]] = {}
        self.messages: list[tuple[int, Any]] = []
        self.last: Results | None = None
        self.finished = self.put_off = 0
        self._reading: tuple[int, StepReading] | None = None
        self._told: set[str] = set()
        self._works = False

    # ------------------------------------------------------------------------------------------ steps of training

    @contextmanager
    def step(self, model: nn.Module, step: int | None = None) -> Iterator[None]:
        """Around one step of training: forward, backward, optimizer.

        Args:
            model: the model in training, as it is called. step: how many steps were done before; default counted here.
        """
        done = self.finished if step is None else step
        self.begin_step(model, done)
        try:
            yield
        except BaseException:
            self.drop_reading()
            raise
        self.finished = done + 1
        self.end_step(model, self.finished)

    def begin_step(self, model: nn.Module, done: int) -> None:
        """A step of training begins, ``done`` steps are done: for callbacks of a trainer."""
        self.drop_reading()
        self.budget.start()
        if self.dataloader is not None:
            if done == 0 and self.due(0) and 0 not in self.values:
                self.measure(model, 0)
        elif self.due(done) and self._has_time():
            refuse_compiled_step(model)
            reading = StepReading(self.look.capture(model), self.settings.max_rows)
            reading.open()
            self._reading = done, reading

    def end_step(self, model: nn.Module, done: int) -> None:
        """A step of training has ended, ``done`` steps are done."""
        if self._reading is not None:
            (before, reading), self._reading = self._reading, None
            self._look(model, before, reading.close())
        elif self.dataloader is not None and self.due(done) and self._has_time():
            self.measure(model, done)

    def drop_reading(self) -> None:
        """Take away the hooks of a step that an error has ended."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading[1].drop()

    # ------------------------------------------------------------------------------------------------ looks

    def measure(self, model: nn.Module, step: int) -> Results | None:
        """Look now, whatever the schedule says: the results, on rank 0 of a process group.

        Raises:
            ValueError: there is no probe loader.
        """
        if self.dataloader is None:
            raise ValueError(
                f"{self.owner}.measure needs a probe, dataloader=: without one, what training steps run is measured."
            )
        return self._look(model, step, None)

    def frame(self) -> pd.DataFrame:
        """A row for each step, site and metric: ``step, site, layer, metric, value`` (``standard_error`` where there is one).

        ``write_report(watch.frame(), path)`` draws it.
        """
        return tidy_frame(self.values)

    def pairs_frame(self) -> pd.DataFrame:
        """The same of what stands between two sites (``"a->b"``)."""
        return tidy_frame(self.values, pairs=True)

    @property
    def overhead(self) -> dict[str, float | int | None]:
        """``looks``, their ``seconds``, ``training_seconds`` without, their ``share`` of these, looks ``put_off``, ``budget``.

        What hooks take inside of training steps counts as training: they keep references, and compute nothing.
        """
        return {**self.budget.account(), "put_off": self.put_off}

    def _has_time(self) -> bool:
        """Whether a due look fits into the budget: as rank 0 finds, on all ranks."""
        if self.budget.share is None:
            return True
        allowed = self.budget.allows()
        if rank_and_world()[1] > 1:
            allowed = bool(broadcast_number(int(allowed)))
        if not allowed:
            self.put_off += 1
            self._tell_once(
                f"{self.owner}: a look takes {self.budget.longest:.2g} s, so due looks are put off to stay within "
                f"budget={self.budget.share:g} of the training time. budget=None looks at every step of the schedule."
            )
        return allowed

    def _look(self, model: nn.Module, step: int, calls: list[TensorDictBase] | None) -> Results | None:
        begun, told = self.budget.begin(), Gathered()
        try:
            bare = self.look.bind(model)
            with untouched(bare, self.dataloader):
                self.look.prepare(bare)
                seed_generators(self.settings.seed, self.dataloader)
                with gathered(told):
                    results = self.look.results(bare, calls)
                if results is not None:
                    self._keep(results, step)
        except Exception as error:
            if not self._works:
                raise
            tell(f"{self.owner}: step {step} is not measured: {type(error).__name__}: {error}", UserWarning)
            return None
        finally:
            self.budget.end(begun)
        self._works = True
        for kind, text in told.warnings():
            self._tell_once(text, kind)
        return results

    def _keep(self, results: Results, step: int) -> None:
        """Results into the table, the logs, the alarms and the folder."""
        said = self.look.note(results, step)
        self.last, self.values[step] = results, step_values(results)
        flat = flat_names(self.values[step])
        share = self.budget.account()["share"]
        for log in self.loggers:
            log({**flat, **({} if share is None else {"geometry/overhead": float(share)})}, step)
        for alarm in self.alarms:
            for message in alarm.update(step, flat) or ():
                self.messages.append((step, message))
                tell(f"{self.owner}: step {step}: {message}", UserWarning)
        if self.save_dir is not None:
            save_results(results, self.save_dir / f"step-{step:08d}", overwrite=True)
        if said is not None:
            self._tell_once(said)

    def _tell_once(self, text: str, kind: type[Warning] = UserWarning) -> None:
        """Warn of what has not been said yet; the same with other numbers, or at other sites, has."""
        plain = re.sub(r"\[at [^\]]*\]|[\d.]+", "#", text)
        if plain not in self._told:
            self._told.add(plain)
            tell(text, kind)


OF_THE_ANALYSIS: dict[str, Any] = {
    "metrics": "default",
    "layers": "all",
    "select": None,
    "novelty_k": 32,
    "sites": "residual_output",
}
