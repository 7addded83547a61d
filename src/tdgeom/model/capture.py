"""Capture: read a model's activations, as a TensorDict module or around the user's own calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch, set_skip_existing
from torch import Tensor, nn

from tdgeom.core.keys import Key, key_tuple
from tdgeom.model.calls.bound_model import eval_mode, may_stop
from tdgeom.model.calls.hooking_context import HookingContext
from tdgeom.model.calls.model_inputs import InKeys, bound_tensors, ids_beyond_vocabulary, needs_decoder_ids
from tdgeom.model.calls.reading import Pass, Reading, StopForward, read_named_outputs
from tdgeom.model.calls.recorded_calls import LastRecord, held_elsewhere, write_entries
from tdgeom.model.gradients import await_gradients, differentiable, replace_by_gradients
from tdgeom.model.sites import LayerSpec, Site, split_element
from tdgeom.model.structure.resolve import resolve_sites
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
    reads what the edits left, one outside of it reads what was there before.

    Args:
        model: any ``nn.Module`` that is not compiled. It stays the user's: neither registered, moved nor saved.
        sites: kinds, concrete names (``"residual_output.-1"``), ``"module_output:<glob>"``, compiled regular expressions
            (they match a whole module path and stand for its output), or a list of them. ``[1]`` or ``['name']`` behind a path
            is that tensor of a tuple, mapping or dataclass; ``"module_output:<root>"`` is what the model itself gives.
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
        super().__init__(
            model, model_outputs=model_outputs, keep_graph=keep_graph, withhold=withhold, in_keys=in_keys
        )
        self.direction, self.target, self.callback, self.heads = direction, target, callback, heads
        self.nested, self.cache, self.prefix, self.clone = nested, cache, prefix, clone
        self.sites = [entry.site for entry in self._bound.sites]
        root: Key = "acts" if direction == "forward" else "grads"
        self._leaves = self._name_leaves(root if out_keys is None else out_keys)
        self._last = LastRecord(self._leaves)
        self.out_keys: list[Any] = list(self._leaves)

    def resolve(self, model: nn.Module) -> list[ResolvedSite]:
        """The sites asked for, in a model."""
        return resolve_sites(model, **self._asked)

    def _name_leaves(self, out_keys: Key | list[Key]) -> list[Key]:
        outputs = [self.prefix + name for name in self.model_outputs]
        if isinstance(out_keys, str | tuple):
            root = key_tuple(out_keys)
            return [*((*root, *self._parts(site)) for site in self.sites), *outputs]
        if len(out_keys) != len(self.sites) + len(outputs):
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
        modules = list(model.modules())
        backward = self.direction == "backward"
        stop = not self.model_outputs and not backward and may_stop(modules)
        if backward and self.target is None:
            raise ValueError(
                "Capture(direction='backward') needs target= in module form, a function of the model's output that gives "
                "the scalar to differentiate. Remedy: target=lambda out: out.logits[:, -1, token].sum(), or the context "
                "form around your own backward()."
            )
        session = self._session = self._reading(stop)
        try:
            session.open()
            with eval_mode(modules), differentiable(model) if backward else self._grad_mode():
                session.begin()
                output = self._called(model, args, kwargs)
                done = session.end()
                self._refuse_missing(done.acts)
                if backward and self.target is not None:
                    replace_by_gradients(done, bound.sites, self.target(output))
                values = self._values(done, output)
        finally:
            session.close()
            self._session = None
        del output, done
        bound.watched = True
        if not self.keep_graph:
            values |= {key: value.clone() for key, value in held_elsewhere(values).items()}
        target = tensordict if tensordict_out is None else tensordict_out
        write_entries(target, values, "Capture")
        self._fill_cache(values)
        return target

    def _called(self, model: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The model's output; None where the last site stopped it."""
        try:
            return model(*args, **kwargs)
        except StopForward:
            return None
        except IndexError as error:
            if (said := ids_beyond_vocabulary(model, kwargs)) is None:
                raise
            raise ValueError(said) from error
        except (ValueError, TypeError, AttributeError) as error:
            if not needs_decoder_ids(self._bound.inputs.signature, kwargs):
                raise
            raise ValueError(
                f"{self._bound.name} failed without 'decoder_input_ids', which its decoder may need for "
                "the sites asked for. Remedy: put 'decoder_input_ids' or 'labels' in the batch, or "
                "ask for encoder sites only."
            ) from error

    def _reading(self, stop: bool) -> Reading:
        bound = self._bound
        return Reading(
            bound.places,
            stop=stop,
            clone=self.clone,
            keep_graph=self.keep_graph,
            watch=not bound.watched,
            backward=self.direction == "backward",
            callback=self.callback,
        )

    def _fill_cache(self, values: dict[Key, Tensor]) -> None:
        if self.cache is not None:
            write_entries(self.cache, values, "Capture")

    def _values(self, done: Pass, output: Any) -> dict[Key, Tensor]:
        values = {key: done.acts[s] for key, s in zip(self._leaves, self.sites) if s in done.acts}
        named = read_named_outputs(output, self.model_outputs) if self.model_outputs else {}
        for key, value in zip(self._leaves[len(self.sites) :], named.values()):
            values[key] = self._kept(value).clone() if self.clone else self._kept(value)
        return values

    # ------------------------------------------------------------------------------------- context form

    def __enter__(self) -> list[TensorDictBase]:
        model = self.model
        self._refuse_entered()
        self._bound.refuse_compiled(self)
        session = self._reading(stop=False)

        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._last.secure()
            session.begin()

        session.open()
        try:
            # around the sites' own hooks: first in, last out
            session.before(model, begin, prepend=True)
            session.after(model, partial(self._record, session), with_kwargs=True)
        except BaseException:
            session.close()
            raise
        self._session = session
        return session.calls

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        session, self._session = self._session, None
        if not isinstance(session, Reading):
            return
        early = session.early
        session.close()
        if kind is not None:
            return
        if session.calls and self.direction == "forward":
            self._bound.watched = True
            read = {key for call in session.calls for key in call.keys(True)}
            self._refuse_missing(site for site, key in zip(self.sites, self._leaves) if key in read)
        elif early is not None and early.acts:
            raise RuntimeError(
                f"the sites {sorted(map(str, early.acts))} fired, but the {self._bound.name} itself was "
                "never called: a part of it was. Remedy: call the model that Capture was given, or give "
                "Capture the part that you call."
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

    def _record(self, session: Reading, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        done = session.end()
        if session.disabled:
            return
        values = self._values(done, output)
        td = TensorDict({}, batch_size=[])
        for name, value in bound_tensors(self._bound.inputs.signature, args, kwargs).items():
            # the caller may fill the same tensors again for the next call
            td.set(name, value if value.requires_grad else value.clone())
        if self.direction == "backward":
            leaves = dict(zip(self.sites, self._leaves))
            await_gradients(done, self._bound.sites, leaves, td, clone=self.clone)
            values = {k: v for k, v in values.items() if k in self._leaves[len(self.sites) :]}
        values = self._last.own(values)
        write_entries(td, values, "Capture")
        self._last.keep(td)
        self._fill_cache(values)
        session.calls.append(td)

    def _refuse_missing(self, fired: Iterable[str]) -> None:
        have = set(fired)
        missing = [site for site in self.sites if site not in have]
        if missing:
            paths = ", ".join(f"{site!s} ({self.module_paths[site]})" for site in missing[:5])
            raise RuntimeError(
                f"expected every site to fire, {len(missing)} never did: {paths}. The forward pass did not "
                "run these modules through their __call__ (skipped, compiled, replaced since the Capture "
                "was made, or called by another method). Remedy: leave them out, or make a new Capture "
                "after changing the model."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": LastRecord(self._leaves)}
