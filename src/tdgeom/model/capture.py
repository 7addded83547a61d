"""Capture: read a model's activations, as a TensorDict module or around the user's own calls."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch, set_skip_existing
from torch import Tensor, nn

from tdgeom.core.keys import Key, key_tuple
from tdgeom.model.calls.bound_model import eval_mode, has_other_forwards, may_stop, modules_within
from tdgeom.model.calls.call_info import CallInfo
from tdgeom.model.calls.call_paths import is_inside
from tdgeom.model.calls.checked_sites import choices_beside, resolve_sites
from tdgeom.model.calls.hooking_context import HookingContext
from tdgeom.model.calls.model_inputs import (
    InKeys,
    ids_beyond_vocabulary,
    needs_decoder_ids,
)
from tdgeom.model.calls.reading import Pass, Reading, StopForward, read_named_outputs
from tdgeom.model.calls.recorded_calls import LastRecord, held_elsewhere, write_entries
from tdgeom.model.calls.repeated_calls import CallsSpec, FiredTooOften
from tdgeom.model.calls.site_hooks import Place
from tdgeom.model.calls.token_axis import is_time_first
from tdgeom.model.gradients import await_gradients, differentiable, replace_by_gradients
from tdgeom.model.sites import LayerSpec, Site, split_element, token_side
from tdgeom.model.structure.resolved_site import ResolvedSite
from tdgeom.model.structure.select_heads import HeadSpec


class Capture(HookingContext):
    """Reads named places of a model: a TensorDict module, and a context manager around the user's own calls.

    **Module form**, ``capture(td)``: runs the model in eval mode without gradients and without a cache, on every
    tensor of ``td`` that its forward takes (labels and row identities excepted), and stops right after the last site. Nothing
    is made up for a batch without padding; a padded one gets ``position_ids`` only in a numbering with which a sequence gives
    what it gives alone: checked once a model and padding side on one of its sequences, and refused with the remedy where
    there is none. Writes ``("acts", site)``, shape (B, T, D), or
    (B, D) where the model gives that; everything else in ``td`` stays.

    **Context form**, ``with capture as calls:``: changes nothing about the calls the user makes; ``calls`` gets
    one TensorDict a model call with the keys of the module form and the tensors that the call was given.

    **Order.** Contexts on one model act in the order in which they are entered: a Capture inside an ``Intervene``
    reads what the edits left, one outside of it reads what was there before. Hooks of others are run before a Capture reads,
    except by one around an ``Intervene``.

    **Calls.** A call is what the outermost module runs: the model, or a part of it that is called instead (by a wrapper's
    ``generate``). A part that ran on its own right before (an encoder) belongs to the call of the whole that does not run it
    again. It belongs to the thread that began it, with the threads that it starts itself (replicas, whose parts of the batch
    are put together).

    Args:
        model: any ``nn.Module`` that is not compiled. It stays the user's: neither registered, moved nor saved.
        sites: kinds, concrete names (``"residual_output.-1"``), ``"module_output:<glob>"``, compiled regular expressions
            (they match a whole module path and stand for its output), or a list of them. ``[1]`` or ``['name']`` behind a path
            is that tensor of a tuple, mapping or dataclass; ``"module_output:<root>"`` is what the model itself gives.
            ``"router_logits"`` brings what the routers have chosen along, under the names of ``router_choice``.
        layers: ``"all"``, an int, a list (negative counts from the end), a slice or ``"0,3,7"``; applies to kinds, and to
            globs and expressions, of which those in the blocks of these layers are kept.
        heads: query heads to read at sites with heads, (B, T, heads, Dh) or (B, heads, Tq, Tk), or a mapping from layers to
            heads; where queries share key/value heads, ``k`` and ``v`` give the one that each of these heads uses.
        direction: ``"forward"``, or ``"backward"`` for gradients, ``("grads", site)``: in module form of ``target``, in
            context form of what the user calls ``backward`` on inside the ``with`` block. The gradient of what a module
            receives is the one through that module alone.
        target: output of the model -> scalar, what the module form takes gradients of (needed for ``"backward"``).
        callback: called with the site and its tensor as it is read; what it returns (unless None) is kept instead.
        classes, skip_classes: classes of modules to take or leave among those that ``sites`` stands for.
        nested: put module sites under their path's parts, ``("acts", "h", "0", "mlp")``.
        cache: a TensorDict that every call's activations are also written to, the last call winning.
        model_outputs: names of the model's outputs to keep, under ``prefix + name``; the pass then runs to its end.
        prefix: put before each site's name, ``"b/"``, to keep two models apart.
        keep_graph: keep the autograd graph (and the ambient grad mode) instead of detaching.
        clone: copy what is read, for models that modify it in place later in the pass. (What a model writes again at its next
            call, a static buffer say, is seen and copied without.)
        withhold: further entries that the model is never called with; ``["position_ids"]`` also leaves padded batches
            unchecked.
        in_keys: what the module form demands: a list of keys, or a mapping of forward names to keys. Default: the
            model's main input, or every parameter of forward without a default. The attribute ``in_keys`` goes on with the
            other tensors that forward takes, which are passed where the batch has them (``optional_in_keys``).
        out_keys: the root of the activations' keys (default ``"acts"``; ``"grads"`` for gradients), or a list naming every
            leaf.
        calls: which call is meant of a module that runs several times in one pass: ``"first"``, ``"last"``, a number from 0, or
            ``"all"`` of them, (B, calls, ...). Default: such a module is an error. Layers that share a block are told apart
            without it.
        threads: ``"all"`` reads the calls of every thread in context form, default the entering thread's ``"own"``.

    Attributes: ``sites``, a list of :class:`Site` in execution order; ``module_paths``, site -> module path.

    What is *added* to the stream (``attn_output``, ``mlp_output``) is read before the block's residual dropout, which
    does nothing in eval mode. ``embed`` is the input of the first block. A block listed several times is one layer
    each time. Raises an error that says what was expected, what came and the remedy for unknown kinds, layers out of
    range, paths that match nothing, compiled models, and sites that never fire or fire more often than they should.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> capture = Capture(model, "residual_output", in_keys=["x"])
    >>> td = capture(TensorDict({"x": torch.ones(3, 4)}))
    >>> td["acts", "residual_output.1"].shape
    torch.Size([3, 4])
    >>> with capture as calls:
    ...     _ = model(torch.ones(2, 4))
    >>> calls[0]["acts", "residual_output.0"].shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        sites: str | re.Pattern | Iterable[str | re.Pattern] = "residual_input",
        *,
        layers: LayerSpec = "all",
        heads: HeadSpec = None,
        direction: str = "forward",
        target: Callable[[Any], Tensor] | None = None,
        callback: Callable[[Site, Tensor], Tensor | None] | None = None,
        classes: Sequence[type[nn.Module]] = (),
        skip_classes: Sequence[type[nn.Module]] = (),
        nested: bool = False,
        cache: TensorDictBase | None = None,
        model_outputs: str | Sequence[str] | None = None,
        prefix: str = "",
        keep_graph: bool = False,
        clone: bool = False,
        withhold: Sequence[str] = (),
        in_keys: InKeys | None = None,
        out_keys: Key | list[Key] | None = None,
        calls: CallsSpec = None,
        threads: str = "own",
    ) -> None:
        if direction not in ("forward", "backward"):
            raise ValueError(f"direction= expects 'forward' or 'backward', got {direction!r}.")
        self._asked: dict[str, Any] = {
            "sites": sites if isinstance(sites, str | re.Pattern) else list(sites),
            "layers": layers,
            "prefix": prefix,
            "heads": heads,
            "classes": tuple(classes),
            "skip_classes": tuple(skip_classes),
        }
        # what a router has chosen comes with its logits, where nothing counts the sites one by one
        self._with_choices = direction == "forward" and callback is None and not isinstance(out_keys, list)
        super().__init__(
            model,
            model_outputs=model_outputs,
            keep_graph=keep_graph,
            withhold=withhold,
            in_keys=in_keys,
            calls=calls,
            threads=threads,
        )
        if self.calls == "all" and direction == "backward":
            raise ValueError(
                "calls='all' gives activations; for gradients give the number of a call, 'first' or 'last'."
            )
        self.direction, self.target, self.callback, self.heads = direction, target, callback, heads
        self.nested, self.cache, self.prefix, self.clone = nested, cache, prefix, clone
        self._all_sites = [entry.site for entry in self._bound.sites]
        self.sites = self._all_sites[: self._asked_for]
        root: Key = "acts" if direction == "forward" else "grads"
        self._leaves = self._name_leaves(root if out_keys is None else out_keys)
        self._last = LastRecord(self._leaves)
        self._readings: tuple[tuple, Reading] | None = None
        self._recording = Lock()
        self.out_keys: list[Any] = list(self._leaves)

    def resolve(self, model: nn.Module) -> list[ResolvedSite]:
        """The sites asked for, in a model, and behind them those that come along."""
        entries = resolve_sites(model, **self._asked)
        self._asked_for = len(entries)
        return [*entries, *(choices_beside(model, entries) if self._with_choices else ())]

    def _name_leaves(self, out_keys: Key | list[Key]) -> list[Key]:
        outputs = [
            (self.prefix + name[0], *name[1:]) if isinstance(name, tuple) else self.prefix + name
            for name in self.model_outputs
        ]
        if isinstance(out_keys, str | tuple):
            root = key_tuple(out_keys)
            return [*((*root, *self._parts(site)) for site in self._all_sites), *outputs]
        if len(out_keys) != len(self._all_sites) + len(outputs):
            raise ValueError(
                f"out_keys= expected {len(self.sites) + len(outputs)} keys, for "
                f"{[*map(str, self.sites), *outputs]}, got {len(out_keys)}. Remedy: give one root key "
                "instead of a list."
            )
        return list(out_keys)

    def _parts(self, site: Site) -> tuple[str, ...]:
        if not self.nested or site.path is None:
            return (str(site),)
        head, side = site.prefix.rstrip("/"), "input" if site.kind == "module_input" else ""
        path, element = split_element(site.path)
        return tuple(part for part in (head, *path.split("."), *map(str, element or ()), side) if part)

    @property
    def resolved(self) -> tuple[ResolvedSite, ...]:
        """The sites with their modules, heads and scales, in execution order."""
        return self._bound.sites

    def call_model(self, tensordict: TensorDictBase, output: str = "logits") -> Tensor:
        """The model's output on a batch, called as the module form does but read nowhere and run to its end."""
        args, kwargs = self._arguments(tensordict)
        return read_named_outputs(self.model(*args, **kwargs), [output])[output]

    # -------------------------------------------------------------------------------------- module form

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
        session = self._reading(stop and not counting)
        self._use(session)
        try:
            session.open()
            with eval_mode(modules), differentiable(model) if backward else self._grad_mode():
                session.begin()
                output = self._called(model, args, kwargs, session if stop and counting else None)
                fired = session.current.fired
                if stop and counting and not session.current.is_as_read():
                    # what runs behind the last site may have written to what was read: the pass that stops does not get there
                    bound.count(fired)
                    session.close()
                    session = self._reading(stop)
                    self._use(session)
                    session.open()
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

    def _reading(self, stop: bool, *, context: bool = False) -> Reading:
        """The hooks of one use; made again only where they would not be the same as last time."""
        bound = self._bound
        told = (self.clone, self.keep_graph, self.direction, self.calls, self.threads, self.callback)
        wanted = (bound, stop, context, bound.watched, *told)
        if self._readings is None or self._readings[0] != wanted:
            reading = Reading(
                bound.places,
                stop=stop,
                clone=self.clone,
                keep_graph=self.keep_graph,
                watch=not bound.watched,
                backward=self.direction == "backward",
                calls=self.calls,
                threads=self.threads if context else "own",
                callback=self.callback,
                record=self._record if context else None,
                secure=self._last.secure if context else None,
            )
            self._readings = wanted, reading
        return self._readings[1]

    def _fill_cache(self, values: dict[Key, Tensor]) -> None:
        if self.cache is not None:
            write_entries(self.cache, values, "Capture")

    def _turn(self, done: Pass, tokens: Callable[[str], tuple[int, int] | None]) -> None:
        """Make (B, T, ...) of (T, B, ...), where a model works on that."""
        for entry in self._bound.sites:
            value = done.acts.get(entry.site)
            if value is None or value.ndim < 3:
                continue
            if is_time_first(self.model, entry, value, tokens(token_side(entry.site)), self._bound.sites):
                if self.direction == "backward":
                    raise RuntimeError(
                        f"the site {str(entry.site)!r} is (T, B, D), of which gradients cannot be given as (B, T, D). Remedy: "
                        "direction='forward', or torch.autograd.grad of what it gives with keep_graph=True."
                    )
                done.acts[entry.site] = value.transpose(0, 1)

    def _values(self, done: Pass, output: Any, *, whole: bool = True) -> dict[Key, Tensor]:
        values = {key: done.acts[s] for key, s in zip(self._leaves, self._all_sites) if s in done.acts}
        for key, name in zip(self._leaves[len(self._all_sites) :], self.model_outputs):
            # a part that is called instead of the model (an encoder) need not have all of them
            named = read_named_outputs(output, [name]) if whole or _has(output, name) else {}
            for value in named.values():
                values[key] = self._kept(value).clone() if self.clone else self._kept(value)
        return values

    # ------------------------------------------------------------------------------------- context form

    def __enter__(self) -> list[TensorDictBase]:
        self._refuse_entered()
        self._bound.refuse_compiled(self)
        session = self._reading(stop=False, context=True)
        session.open()
        self._use(session)
        return session.calls

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        session = self._session
        self._use(None)
        if not isinstance(session, Reading):
            return
        try:
            if kind is None:
                session.flush()
        finally:
            session.close()
        if kind is not None:
            return
        calls, session.calls, session.part = session.calls, [], None
        if calls and self.direction == "forward":
            self._bound.watched = True
            read = {key for call in calls for key in call.keys(True)}
            self._refuse_missing(site for site, key in zip(self._all_sites, self._leaves) if key in read)
        elif not session.called:
            self._refuse_foreign(session)
            warnings.warn(
                f"no call of {self._bound.name} was seen in this Capture's block. Compiled code (a torch.compile around the "
                "model, called before) and copies of the model run without hooks. Remedy: call the model that Capture was "
                "given.",
                stacklevel=2,
            )

    @contextmanager
    def disable_hooks(self) -> Iterator[None]:
        """Inside, calls of the model are neither read nor listed (this Capture must be entered)."""
        session = self._session
        if not isinstance(session, Reading):
            raise RuntimeError(
                "disable_hooks() expects an entered Capture. Remedy: call it inside the with block."
            )
        before, session.disabled = session.disabled, True
        try:
            yield
        finally:
            session.disabled = before

    def _record(
        self,
        session: Reading,
        done: Pass,
        module: nn.Module | None,
        args: tuple,
        kwargs: dict,
        output: Any,
    ) -> None:
        with self._recording:
            whole = module is not None and not done.path
            info = done.told.get(done.path) or CallInfo()
            self._turn(done, info.tokens)
            values, td = self._values(done, output, whole=whole), self._part_of(session, done)
            for name, value in info.recorded(done.acts.values(), self._bound.inputs.recorded).items():
                # the caller may fill the same tensors again for the next call
                td.set(name, value if not isinstance(value, Tensor) or value.requires_grad else value.clone())
            if self.direction == "backward":
                leaves = dict(zip(self._all_sites, self._leaves))
                await_gradients(done, self._bound.sites, leaves, td, clone=self.clone)
                values = {k: v for k, v in values.items() if k in self._leaves[len(self._all_sites) :]}
            values = self._last.own(values)
            write_entries(td, values, "Capture")
            self._last.keep(td)
            self._fill_cache(values)
            session.part = None if whole else (done, td)

    def _part_of(self, session: Reading, done: Pass) -> TensorDictBase:
        """A new entry, or the one of a part that ran on its own right before a call of the whole that did not run it."""
        calls, part = session.calls, session.part
        if part is not None and calls and calls[-1] is part[1]:
            inside = is_inside(part[0].path, done.path)
            if inside and part[0].acts.keys().isdisjoint(done.acts):
                return part[1]
        calls.append(TensorDict({}, batch_size=[]))
        return calls[-1]

    def _refuse_missing(self, read: Iterable[str], fired: Mapping[Place, int] | None = None) -> None:
        have = set(read)
        missing = [site for site in self.sites if site not in have]
        if not missing:
            return
        paths = ", ".join(f"{site!s} ({self.module_paths[site]})" for site in missing[:5])
        if isinstance(self.calls, int) and fired is not None:
            places = [(entry.module_path, entry.side) for entry in self._bound.sites if entry.site in missing]
            raise RuntimeError(
                f"calls={self.calls} means the call after {self.calls} others, but {paths} fired "
                f"{[fired.get(place, 0) for place in places][:5]} times in the pass. Remedy: a smaller number, or 'last'."
            )
        raise RuntimeError(
            f"expected every site to fire, {len(missing)} never did: {paths}. The forward pass did not "
            "run these modules through their __call__ (skipped, compiled, replaced since the Capture "
            "was made, or called by another method). Remedy: leave them out, or make a new Capture "
            "after changing the model."
        )

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_last": LastRecord(self._leaves), "_readings": None, "_recording": None}
        return {**super().__getstate__(), **fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_recording": Lock()})


def _has(output: Any, name: str) -> bool:
    value = (
        output.get(name, None) if isinstance(output, dict | TensorDictBase) else getattr(output, name, None)
    )
    return isinstance(value, Tensor)
