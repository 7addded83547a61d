"""Probes around other estimators: any of scikit-learn's, any torch module."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdgeom.probing.labelled_rows import as_numpy, one_hot
from tdgeom.probing.probe import Probe
from tdgeom.probing.rules import Fitted, Task

__all__ = ["SklearnProbe", "TorchProbe", "train_module"]


class SklearnProbe(Probe):
    """Any scikit-learn estimator as a probe, fitted on a uniform sample of ``train_rows`` training rows.

    The estimator is cloned for every fit and never changed; give it its own ``random_state``. Decisions come from
    ``decision_function``, else ``predict_proba``, else ``predict``. ``fitted["estimator"]`` is the fitted clone; where it
    has ``coef_`` (one row a class or one in all), ``direction()`` gives it.

    Args:
        estimator: classifier or regressor with ``fit`` and ``predict``, a pipeline included.

    For the other arguments, what it reads and its scores see ``Probe``.

    Raises:
        TypeError: no estimator (or a class in place of an instance).

        >>> import torch, tdgeom as tg
        >>> from sklearn.linear_model import LogisticRegression
        >>> x = torch.randn(100, 3)
        >>> probe = tg.SklearnProbe(LogisticRegression()).fit(x, (x[:, 1] > 0).long())
        >>> probe.direction().abs().argmax()
        tensor(1)
    """

    def __init__(self, estimator: Any, **settings: Any) -> None:
        if isinstance(estimator, type) or not (hasattr(estimator, "fit") and hasattr(estimator, "predict")):
            raise TypeError(
                f"SklearnProbe takes an estimator with fit and predict, such as LogisticRegression(), got {estimator!r}."
            )
        super().__init__(**settings)
        self.estimator = estimator

    def solve(self, inputs: tuple[Tensor, ...], label: Tensor, task: Task) -> Fitted:
        """Clone and fit."""
        from sklearn.base import clone

        target = as_numpy(label)
        target = target[:, 0] if task.regression and task.classes == 1 else target
        like = self.estimator
        estimator = clone(like) if hasattr(like, "get_params") else deepcopy(like)
        estimator.fit(as_numpy(inputs[0]), target)
        return {"estimator": estimator, "task": task, **_linear_part(estimator, task, inputs[0])}

    def decide(self, fitted: Fitted, inputs: tuple[Tensor, ...]) -> Tensor:
        """What the estimator says about each row, a column a class or target."""
        estimator, x = fitted["estimator"], as_numpy(inputs[0])
        for name in ("decision_function", "predict_proba", "predict"):
            if hasattr(estimator, name):
                out = np.asarray(getattr(estimator, name)(x))
                break
        home = inputs[0].device
        if name == "predict" and not fitted["task"].regression:
            return one_hot(torch.as_tensor(out).long(), fitted["task"].classes).to(home)
        values = torch.as_tensor(out, dtype=torch.float64)
        if name == "decision_function" and values.ndim == 1:
            values = torch.stack((-values, values), 1) / 2
        return (values[:, None] if values.ndim == 1 else values).to(home)


def _linear_part(estimator: Any, task: Task, like: Tensor) -> Fitted:
    coef = getattr(estimator, "coef_", None)
    if coef is None:
        return {}
    found = (np.atleast_2d(coef), np.atleast_1d(estimator.intercept_))
    weight, bias = (torch.as_tensor(value, dtype=torch.float64, device=like.device) for value in found)
    if not task.regression and weight.shape[0] == 1:
        weight, bias = torch.cat((-weight, weight)) / 2, torch.cat((-bias, bias)) / 2
    return {"weight": weight, "bias": bias}


class TorchProbe(Probe):
    """A torch module as a probe, trained on a uniform sample of ``train_rows`` training rows.

    Cross-entropy for classes, mean squared error for numbers; AdamW over shuffled batches, on rows whose features (and
    numbers to predict, unless ``loss`` is given) are centred and scaled to unit variance. The module given stays untouched:
    each fit trains a fresh copy under its own seed and leaves the global random state as it was.

    Args:
        module: a module (N, D) -> (N, K), or a function (features, outputs) -> module. A module given as it is keeps the
            weights it came with as its start.
        epochs, batch_size, learning_rate, weight_decay: of the training.
        loss: function of (outputs, labels) in place of the usual loss.

    For the other arguments, what it reads and its scores see ``Probe``. ``fitted["module"]`` is the trained copy.

        >>> import torch, tdgeom as tg
        >>> make = lambda d, k: torch.nn.Sequential(torch.nn.Linear(d, 16), torch.nn.ReLU(), torch.nn.Linear(16, k))
        >>> x = torch.randn(400, 2)
        >>> y = (x[:, 0] * x[:, 1] > 0).long()  # no linear probe can tell these apart
        >>> tg.TorchProbe(make, epochs=60, learning_rate=1e-2).fit(x, y).score(x, y)["accuracy"] > 0.9
        True
    """

    def __init__(
        self,
        module: nn.Module | Callable[[int, int], nn.Module],
        *,
        epochs: int = 50,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        **settings: Any,
    ) -> None:
        if not callable(module) or isinstance(module, type):
            raise TypeError(
                f"TorchProbe takes a module, or a function (features, outputs) -> module, got {module!r}."
            )
        super().__init__(**settings)
        # In a tuple: a registered module would put its untrained weights into the stage's state.
        self._template = (module,)
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.weight_decay, self.loss = weight_decay, loss

    @property
    def module(self) -> Any:
        """What was given: a module, or the function that makes one."""
        return self._template[0]

    def solve(self, inputs: tuple[Tensor, ...], label: Tensor, task: Task) -> Fitted:
        """Train a fresh copy."""
        x = inputs[0].float()
        mean = x.mean(0)
        scale = (x - mean).square().mean(0).sqrt()
        # one massive feature must not set the step of the others; a constant one stays as it is
        scale = torch.where(scale > torch.finfo(torch.float32).eps * x.abs().amax(0), scale, 1.0)
        template = self._template[0]
        on = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices=on):
            # torch.manual_seed would also seed, for good, the devices that this fit does not use.
            for generator in (torch.default_generator, *(torch.cuda.default_generators[d.index] for d in on)):
                generator.manual_seed(self.seed)
            module = (
                deepcopy(template) if isinstance(template, nn.Module) else template(x.shape[1], task.classes)
            )
            module = module.to(x.device)
            shape = tuple(module.eval()((x[:2] - mean) / scale).shape)
            if shape != (len(x[:2]), task.classes):
                raise ValueError(
                    f"TorchProbe: the module must turn rows (N, {x.shape[1]}) into (N, {task.classes}) here, got {shape}. "
                    f"Give a function (features, outputs) -> module to have it made to measure."
                )
            shift, unit = torch.zeros_like(mean[:1]), torch.ones_like(mean[:1])
            if task.regression and self.loss is None:  # a loss of one's own sees the labels as they are
                shift, unit = label.mean(0), (label - label.mean(0)).square().mean(0).sqrt()
                label = (label - shift) / unit
            train_module(self, module, (x - mean) / scale, label, task)
        return {"module": module, "mean": mean, "scale": scale, "shift": shift, "unit": unit}

    def decide(self, fitted: Fitted, inputs: tuple[Tensor, ...]) -> Tensor:
        """The module's outputs."""
        with torch.no_grad():
            out = fitted["module"]((inputs[0].float() - fitted["mean"]) / fitted["scale"]).double()
        return fitted["shift"] + fitted["unit"] * out


def train_module(probe: TorchProbe, module: nn.Module, x: Tensor, label: Tensor, task: Task) -> None:
    """AdamW over shuffled batches, in place."""
    usual = (
        (lambda out, y: (out - y.to(out)).square().mean()) if task.regression else nn.functional.cross_entropy
    )
    loss = probe.loss or usual
    with torch.inference_mode(False), torch.enable_grad():
        module.train()
        optimiser = torch.optim.AdamW(
            module.parameters(), lr=probe.learning_rate, weight_decay=probe.weight_decay
        )
        for _ in range(probe.epochs):
            for chosen in torch.randperm(len(x), device="cpu").to(x.device).split(probe.batch_size):
                optimiser.zero_grad()
                loss(module(x[chosen]), label[chosen]).backward()
                optimiser.step()
    module.eval()
