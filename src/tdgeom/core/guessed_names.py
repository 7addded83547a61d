"""Arguments under the names that one guesses: answered with the name, or the way, that is right here."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

__all__ = ["answer_guesses", "is_about", "refuse_unknown", "right_name"]

Given = ParamSpec("Given")
Result = TypeVar("Result")

# what other libraries call it -> what it is called here, the first that a callable takes
SYNONYMS = {
    "k": ("n_neighbors", "num_neighbors", "neighbors", "n_neighbours", "topk", "n_components", "num_components", "maxk"),
    "n": ("n_components", "num_components", "k"),
    "seed": ("random_state", "rng", "generator", "random_seed"),
    "sites": (
        "hook_points", "hooks", "hook_names", "names_filter", "names", "modules", "module_names", "module", "targets",
        "target_modules", "locations", "site", "kinds", "layer_names", "relative",
    ),
    "layers": ("layer", "layer_idx", "layer_index", "layer_indices", "block", "blocks"),
    "heads": ("head", "head_idx", "head_index"),
    "positions": ("position", "pos", "token_positions", "pos_slice", "token", "tokens", "locs"),
    "metrics": ("measures", "measure", "metric", "scores"),
    "max_rows": ("max_tokens", "n_tokens", "num_tokens", "max_samples", "limit", "n_rows", "max_n"),
    "sample_size": ("sample_limit", "n_samples", "num_samples", "sample", "subset_size"),
    "size": ("n_samples", "num_samples", "n", "max_rows", "sample_size", "capacity"),
    "dataloader": ("loader", "data", "dataset", "batches", "inputs", "texts"),
    "progress": ("verbose", "progress_bar", "tqdm", "disable_tqdm"),
    "save_dir": ("out", "output_dir", "save_path", "path", "out_dir", "output"),
    "labels": ("label", "y", "target", "targets", "label_key", "classes"),
    "memory": ("memory_limit", "max_memory", "chunk_bytes"),
    "max_length": ("seq_len", "max_seq_len", "sequence_length"),
    "alpha": ("l2", "penalty", "regularization", "C", "alphas", "reg"),
    "ridge": ("alpha", "l2", "regularization", "lam"),
    "learning_rate": ("lr",),
    "halflife": ("half_life", "span", "com", "decay", "window"),
    "epochs": ("n_epochs", "num_epochs", "max_iter", "steps"),
    "discard": ("discard_fraction", "discarded"),
    "range_max": ("n_max", "range", "max_rank", "nmax"),
    "coefficient": ("alpha", "strength", "scale", "coeff", "multiplier", "magnitude", "factor"),
    "vector": ("direction", "steering_vector", "delta"),
    "basis": ("direction", "directions", "vector", "vectors", "subspace"),
    "factor": ("scale", "coefficient", "multiplier"),
    "how": ("method", "mode", "type", "ablation_type"),
    "source": ("input", "on", "from_", "sample"),
    "keep": ("return_keys", "outputs", "keys"),
    "model": ("net", "network", "model_name", "hf_model"),
    "model_outputs": ("outputs", "return_logits", "return_outputs"),
    "keep_graph": ("detach", "requires_grad", "retain_grad", "grad"),
    "skip_special": ("skip_special_tokens", "special", "exclude_special"),
    "skip_first": ("skip_bos", "drop_first", "ignore_first"),
    "pool": ("pooling", "reduce", "aggregation"),
    "also": ("carry", "carried", "labels", "extra", "extra_keys"),
    "mask_key": ("attention_mask", "mask"),
    "in_keys": ("in_key", "input_keys", "inputs"),
    "out_keys": ("out_key", "output_keys"),
    "answers": ("answer", "answer_tokens", "tokens", "token_ids", "labels", "targets", "correct"),
    "by": ("granularity", "mode", "level", "components", "per"),
    "variants": ("normalizations", "normalisations", "norms"),
    "untrained": ("baseline", "random_baseline", "random_init"),
    "estimator": ("model", "clf", "classifier", "probe"),
    "holdout": ("test_size", "val_fraction", "split", "test_fraction"),
    "folds": ("cv", "n_folds", "n_splits"),
    "clone": ("copy",),
    "callback": ("hook_fn", "hook", "fn"),
    "direction": ("incl_bwd", "backward", "bwd"),
    "fraction": ("sigma_frac", "sigma", "bandwidth", "threshold"),
    "comparison": ("method", "compare", "correlation"),
    "kind": ("metric", "rdm", "dissimilarity"),
    "batch_size": ("bs", "batchsize"),
    "select": ("positions", "pool", "skip_first", "skip_special", "also", "tokens"),
    "capture": ("layers", "heads"),
}  # fmt: skip

# where it is not said by another name, but in another way
WAYS = {
    ("LinearCKA", "debiased"): "estimator='debiased'",
    ("LinearCKA", "unbiased"): "estimator='debiased'",
    ("LinearCKA", "biased"): "estimator='biased' (the default)",
    ("TwoNN", "fraction"): "discard=, the share that is left out (0.1 where other tools keep a fraction of 0.9)",
    ("twonn", "fraction"): "discard=, the share that is left out (0.1 where other tools keep a fraction of 0.9)",
    ("linear_cka", "debiased"): "linear_cka_debiased(x, y)",
    ("linear_cka", "unbiased"): "linear_cka_debiased(x, y)",
    ("linear_cka", "kernel"): "rbf_cka(x, y)",
    ("LinearCKA", "kernel"): "tg.RBFCKA()",
    ("Capture", "positions"): "tg.SelectTokens(sites, positions=...) behind it, or tg.CaptureSpec(positions=...)",
    ("Capture", "pool"): "tg.SelectTokens(sites, pool=...) behind it",
    ("Capture", "device"): "model.to(device): the batch follows the model",
    ("Capture", "dtype"): "model.to(dtype)",
    ("Capture", "detach"): "keep_graph=True to keep the graph; else what is read is detached",
    ("Capture", "stop_at_layer"): "nothing: the module form stops behind the last site",
    ("run", "model"): "tg.Capture(model, ...) as the first stage of the pipeline",
    ("run", "num_batches"): "max_rows=, or itertools.islice(dataloader, n)",
    ("run", "max_batches"): "max_rows=, or itertools.islice(dataloader, n)",
    ("analyze_model", "positions"): "select={'positions': ...}",
    ("analyze_model", "pool"): "select={'pool': ...}",
    ("analyze_model", "skip_first"): "select={'skip_first': ...}",
    ("analyze_model", "also"): "select={'also': [...]}",
    ("analyze_model", "dtype"): "model_kwargs={'dtype': ...}",
    ("analyze_model", "k"): "novelty_k=, neighbors=, or a stage such as metrics=[tg.NeighborhoodOverlap(k=...)]",
    ("Steer", "layer"): "tg.Intervene(model, {'residual_output.3': tg.Steer(...)})",
    ("Steer", "layers"): "tg.Intervene(model, {'residual_output': tg.Steer(...)}, layers=...)",
    ("NearestNeighbors", "algorithm"): "backend=",
    ("NearestNeighbors", "n_jobs"): "torch.set_num_threads(n)",
    ("RowSample", "replace"): "nothing: rows are drawn without replacement",
    ("EigenSpectrum", "center"): "nothing: moments are centred",
    ("EigenSpectrum", "centered"): "nothing: moments are centred",
    ("StreamingCovariance", "unbiased"): "nothing: the covariance is unbiased (divided by N - 1)",
    ("StreamingCovariance", "ddof"): "nothing: the covariance is unbiased (divided by N - 1)",
    ("StreamingCovariance", "dim"): "nothing: the width is that of the first rows",
    ("LinearProbe", "C"): "alpha=1/C with solver='logistic'",
    ("LinearProbe", "num_classes"): "nothing: classes are those of the labels",
}  # fmt: skip


def right_name(owner: str, given: str, known: Iterable[str]) -> str:
    """What to write in place of an argument that ``owner`` does not take.

    >>> right_name("LinearCKA", "debiased", ["estimator"]), right_name("TwoNN", "dicard", ["discard", "method"])
    ("Write estimator='debiased'.", 'Write discard=.')
    """
    known = list(known)
    if way := WAYS.get((owner, given)):
        return f"Write {way}."
    if near := get_close_matches(given, known, n=1, cutoff=0.75):
        return f"Write {near[0]}=."
    if meant := [name for name, others in SYNONYMS.items() if name in known and given in others]:
        return f"Write {meant[0]}=."
    if near := get_close_matches(given, known, n=1, cutoff=0.55):
        return f"Did you mean {near[0]}=?"
    return f"It takes {', '.join(known)}." if known else "It takes no settings."


def refuse_unknown(owner: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise a TypeError at the first argument that is none, with what to write."""
    for name in given:
        if name not in known:
            raise TypeError(f"{owner} takes no argument {name!r}. {right_name(owner, name, known)}")


def is_about(error: TypeError, name: str) -> bool:
    """Whether Python refused a call for an argument of this name, or before it came to it."""
    return bool(re.search(rf"unexpected keyword argument '{name}'|\) missing \d+ required", str(error)))


def answer_guesses(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function without ``**kwargs`` that answers an argument it does not take with the one that is meant; a class's by its
    ``__init__``.

    >>> answer_guesses(lambda max_rows=1: max_rows)(max_rowz=2)
    Traceback (most recent call last):
    TypeError: <lambda> takes no argument 'max_rowz'. Write max_rows=.
    """
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        own = function.__name__ == "__init__"
        refuse_unknown(type(args[0]).__name__ if own else function.__name__, kwargs, known[own:])
        return function(*args, **kwargs)

    return called
