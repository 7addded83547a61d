"""A call belongs to the thread that began it; threads that it starts belong to it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import models
import tdgeom as tg
from editing import hook_count
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene

SITES = ["embed", "z.1", "attn_output.0", "residual_output.2"]


def in_thread(run):
    """Run something in a thread of its own; its result, or its error raised here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def batch_of(value, length=6):
    return {
        "input_ids": torch.full((2, length), value),
        "attention_mask": torch.ones(2, length, dtype=torch.long),
    }


@contextmanager
def in_the_middle(module, run):
    """Run something in another thread, once, while this thread's call is inside ``module``."""
    main, todo = threading.get_ident(), [run]

    def between(*_):
        if threading.get_ident() == main and todo:
            in_thread(todo.pop())

    handle = module.register_forward_pre_hook(between)
    yield
    handle.remove()


def alone(model, batch, sites=SITES):
    with torch.no_grad(), Capture(model, sites) as calls:
        model(**batch)
    return calls[0]["acts"]


@pytest.mark.parametrize("form", ["context", "module"])
def test_another_thread_s_call_passes_untouched(form):
    model, mine, other = models.llama(), batch_of(12), batch_of(11, 5)
    right, theirs = alone(model, mine), []
    plain = model(**other).logits

    def second():
        with torch.no_grad():
            theirs.append(model(**other).logits)

    with in_the_middle(model.model.layers[1], second):
        if form == "context":
            with torch.no_grad(), Capture(model, SITES) as calls:
                model(**mine)
            assert len(calls) == 1
            found = calls[0]["acts"]
        else:
            found = Capture(model, SITES)(TensorDict(mine))["acts"]
    for site in SITES:
        assert torch.equal(found[site], right[site])
    assert torch.equal(theirs[0], plain)


@pytest.mark.parametrize(
    "edit", ["residual_output.0", "z.1", "attn_pattern.1", "head_output.1", "residual_mid.1"]
)
def test_edits_leave_another_thread_s_call_alone(edit):
    model, mine, other, theirs = models.llama(), batch_of(12), batch_of(11, 5), []
    other["attention_mask"][0, :2] = 0
    mine["attention_mask"][1, :3] = 0
    edits = {edit: tg.Scale(0.5, positions="last")}
    with torch.no_grad():
        plain = model(**other).logits
        with Intervene(model, edits):
            right = model(**mine).logits
            with in_the_middle(model.model.layers[1], lambda: theirs.append(model(**other).logits)):
                assert torch.equal(model(**mine).logits, right)
        with Intervene(model, edits):
            edited = model(**other).logits
        assert torch.equal(theirs[0], plain) and not torch.equal(edited, plain)
        theirs.clear()
        again = in_the_middle(model.model.layers[1], lambda: theirs.append(model(**other).logits))
        with Intervene(model, edits, threads="all"), again:
            assert torch.equal(model(**mine).logits, right)
        assert torch.equal(theirs[0], edited)


def test_all_threads_on_request():
    model, mine, other = models.llama(), batch_of(12), batch_of(11, 5)
    with torch.no_grad(), Capture(model, SITES, threads="all") as calls:
        with in_the_middle(model.model.layers[1], lambda: model(**other)):
            model(**mine)
        in_thread(lambda: model(**other))
    assert [int(call["input_ids"].unique()) for call in calls] == [11, 12, 11]
    for call, batch in zip(calls, (other, mine, other), strict=True):
        for site, value in alone(model, batch).items():
            assert torch.equal(call["acts", site], value)
    with pytest.raises(ValueError, match="threads= expects 'own' or 'all', got 'mine'"):
        Capture(model, SITES, threads="mine")


def test_a_block_with_only_another_thread_s_calls_says_so():
    model, batch = models.llama(), batch_of(12)
    for context in (Capture(model, SITES), Intervene(model, {"z.1": tg.Scale(0.5)}, missing="ignore")):
        with (
            pytest.raises(
                RuntimeError, match="one call of its own thread, while another thread.*threads='all'"
            ),
            context,
        ):
            in_thread(lambda: model(**batch))
        assert hook_count(model) == 0


@pytest.mark.parametrize("form", ["context", "module", "edit"])
def test_a_hundred_one_call_blocks_in_four_threads(form):
    model = models.gpt2()
    sites = ["residual_output", "attn_output.1", "z.0", "attn_pattern.2"]
    right = {value: alone(model, batch_of(value), sites) for value in range(10, 35)}
    edits = {"residual_output.0": tg.Scale(0.5), "attn_pattern.1": tg.Scale(0.9)}
    logits = {}
    with torch.no_grad(), Intervene(model, edits):
        for value in right:
            logits[value] = model(**batch_of(value)).logits
    start = threading.Barrier(4)

    def blocks(values):
        start.wait()
        found = []
        for value in values:
            with torch.no_grad():
                if form == "edit":
                    with Intervene(model, edits):
                        found.append((value, model(**batch_of(value)).logits))
                elif form == "module":
                    found.append((value, Capture(model, sites)(TensorDict(batch_of(value)))["acts"]))
                else:
                    with Capture(model, sites) as calls:
                        model(**batch_of(value))
                    assert len(calls) == 1
                    found.append((value, calls[0]["acts"]))
        return found

    with ThreadPoolExecutor(4) as pool:
        parts = [pool.submit(blocks, list(right)[i:] + list(right)[:i]) for i in (0, 6, 12, 18)]
        found = [entry for part in parts for entry in part.result()]
    assert len(found) == 100 and hook_count(model) == 0
    for value, got in found:
        if form == "edit":
            torch.testing.assert_close(got, logits[value])
        else:
            for site in right[value].keys():
                torch.testing.assert_close(got[site], right[value][site])


class Replicas(nn.Module):
    """What DataParallel does, on one device: replicas of the model run in threads of their own, each on a part of the batch."""

    def __init__(self, model, parts=2):
        super().__init__()
        self.module, self.parts = model, parts

    def forward(self, *args, **kwargs):
        replicas = [replica(self.module) for _ in range(self.parts)]
        given = [{k: v.chunk(self.parts)[i] for k, v in kwargs.items()} for i in range(self.parts)]
        results, ready = {}, [threading.Event() for _ in range(self.parts + 1)]
        ready[0].set()

        def run(i):
            # one after the other begins, and all are in the middle together
            ready[i].wait()
            handle = replicas[i].transformer.h[0].register_forward_hook(lambda *_: ready[i + 1].set())
            with torch.no_grad():
                results[i] = replicas[i](**given[i]).logits
            handle.remove()

        threads = [threading.Thread(target=run, args=(i,)) for i in range(self.parts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.cat([results[i] for i in range(self.parts)])


def replica(module):
    """A module and all below it as torch replicates them: other objects with the same parameters and the same hooks."""
    twin = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        twin.__dict__.pop(name, None)
        twin._parameters[name] = parameter
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else replica(child)
    twin._forward_hooks, twin._forward_pre_hooks = module._forward_hooks, module._forward_pre_hooks
    return twin


@pytest.mark.parametrize("parts", [2, 3])
def test_replicas_are_parts_of_one_call(parts):
    model = models.gpt2()
    whole, batch = Replicas(model, parts), models.text_batch(batch=6)
    batch["attention_mask"][::2, :3] = 0
    sites = ["embed", "residual_mid.1", "z.1", "head_output.2", "residual_output"]
    with torch.no_grad(), Capture(model, sites) as plain:
        base = model(**batch).logits
    with torch.no_grad(), Capture(whole, sites, in_keys={"input_ids": "input_ids"}) as calls:
        torch.testing.assert_close(whole(**batch), base)
    assert len(calls) == 1
    for site, value in plain[0]["acts"].items():
        torch.testing.assert_close(calls[0]["acts", site], value)
    edits = {
        "residual_output.0": tg.Steer(torch.ones(models.WIDTH), positions="first"),
        "residual_mid.1": tg.Scale(0.5, positions="last"),
        "head_output.2": tg.Ablate(heads=1),
    }
    with torch.no_grad(), Intervene(model, edits):
        right = model(**batch).logits
    with torch.no_grad(), Intervene(whole, edits, in_keys={"input_ids": "input_ids"}):
        torch.testing.assert_close(whole(**batch), right)
    assert not torch.allclose(right, base) and hook_count(model) == 0


def test_threads_that_a_call_starts_for_its_parts():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x):
            with ThreadPoolExecutor(2) as pool:
                return sum(pool.map(lambda tower: tower(x), self.towers))

    torch.manual_seed(0)
    model, x = Parallel(), torch.randn(2, 4)
    sites = ["module_output:towers.0", "module_output:towers.1"]
    with torch.no_grad(), Capture(model, sites) as calls:
        model(x)
        found = Capture(model, sites)(TensorDict({"x": x}))["acts"]
    for i, site in enumerate(sites):
        assert torch.equal(calls[0]["acts", site], model.towers[i](x)) and torch.equal(
            found[site], calls[0]["acts", site]
        )
