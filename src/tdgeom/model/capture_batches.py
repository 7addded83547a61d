"""Capture's module form: one pass of the model on a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import dispatch, set_skip_existing
from torch import Tensor, nn

from tdgeom.model.calls.bound_model import eval_mode, has_other_forwards, may_stop, modules_within
from tdgeom.model.calls.model_inputs import ids_beyond_vocabulary, needs_decoder_ids
from tdgeom.model.calls.reading import Reading, StopForward
from tdgeom.model.calls.recorded_calls import held_elsewhere, write_entries
from tdgeom.model.calls.repeated_calls import FiredTooOften
from tdgeom.model.capture_reads import CaptureReads
from tdgeom.model.gradients import differentiable, replace_by_gradients


class CaptureBatches(CaptureReads):
    """The module form: the pass stops behind the last site, once a whole one has counted how often the sites fire."""

    target: Callable[[Any], Tensor] | None

    def call_model(self, tensordict: TensorDictBase) -> Any:
        """What the model gives on a batch, called as the module form does but read nowhere and run to its end."""
        args, kwargs = self._arguments(tensordict)
        return self.model(*args, **kwargs)

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(
        self, tensordict: TensorDictBase, tensordict_out: TensorDictBase | None = None, **named: Tensor
    ) -> TensorDictBase:
        """Run the model on a batch (inputs can also be given by keyword) and write what was read."""
        model, bound = self.model, self._bound
        self._refuse_entered()
        bound.refuse_compiled(self)
        args, kwargs = self._arguments(self._with_named(tensordict, named))
        modules = modules_within(model)
        backward = self.direction == "backward"
        if backward and self.target is None:
            raise ValueError(
                "Capture(direction='backward') needs target= in module form, a function of the model's output that gives "
                "the scalar to differentiate. Remedy: target=lambda out: out.logits[:, -1, token].sum(), or the context "
                "form around your own backward()."
            )
        # a whole pass first: what fires again behind the last site would never be seen by one that stops there
        counting = self.calls is None and not bound.is_counted()
        stop = not self.model_outputs and not backward and self.calls not in ("last", "all")
        stop = stop and may_stop(modules) and not has_other_forwards(modules)
        session, hooks = self._reading(stop and not counting)
        self._use(session)
        try:
            session.open(hooks)
            with eval_mode(modules), differentiable(model) if backward else self._grad_mode():
                session.begin()
                output = self._called(model, args, kwargs, session if stop and counting else None)
                fired = session.current.fired
                if stop and counting and not session.current.is_as_read():
                    # what runs behind the last site may have written to what was read: the pass that stops does not get there
                    bound.count(fired)
                    session.close()
                    session, hooks = self._reading(stop)
                    self._use(session)
                    session.open(hooks)
                    session.begin()
                    output = self._called(model, args, kwargs, None)
                done = session.end()
                self._refuse_missing(done.acts, fired)
                self._turn(done, self._bound.inputs.tokens(args, kwargs))
                if counting or self.calls in ("last", "all"):
                    bound.count(fired)
                if backward and self.target is not None:
                    replace_by_gradients(done, bound.sites, self.target(output))
                values = self._values(done, output)
        finally:
            session.close()
            self._use(None)
        del output, done
        bound.watched = True
        if not self.keep_graph:
            values |= {key: value.clone() for key, value in held_elsewhere(values).items()}
        target = tensordict if tensordict_out is None else tensordict_out
        write_entries(target, values, "Capture")
        self._fill_cache(values)
        return target

    def _called(
        self, model: nn.Module, args: list[Any], kwargs: dict[str, Any], counting: Reading | None
    ) -> Any:
        """The model's output; None where the last site stopped it.

        ``counting`` is the session of a pass that could have stopped, and goes on to count: what fails behind the last site (a
        decoder without inputs) is nobody's concern.
        """
        try:
            return model(*args, **kwargs)
        except StopForward:
            return None
        except Exception as error:
            if counting is not None and counting.has_all() and not isinstance(error, FiredTooOften):
                return None
            self._explain(error, kwargs)
            raise

    def _explain(self, error: Exception, kwargs: dict[str, Any]) -> None:
        """Raise an error that says more, where more is known."""
        if isinstance(error, IndexError) and (said := ids_beyond_vocabulary(self.model, kwargs)) is not None:
            raise ValueError(said) from error
        lacks = needs_decoder_ids(self._bound.inputs.signature, kwargs)
        if lacks and isinstance(error, ValueError | TypeError | AttributeError):
            raise ValueError(
                f"{self._bound.name} failed without 'decoder_input_ids', which its decoder may need for "
                "the sites asked for. Remedy: put 'decoder_input_ids' or 'labels' in the batch, or "
                "ask for encoder sites only."
            ) from error
