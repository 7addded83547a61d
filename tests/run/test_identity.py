"""What tells one run from another: weights, settings and keys, the same in every process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

import models
import tdgeom as tg
from tdgeom.core.stage_settings import differences
from tdgeom.run.identity import pipeline_identity, tensors_sha256, weights_identity
from tdgeom.run.plan import make_plan

TESTS = Path(__file__).parent.parent


def pipeline(model=None, coefficient=1.0, linear=None, select=None) -> TensorDictSequential:
    model = models.gpt2() if model is None else model
    capture = tg.Capture(model, "residual_input.1", callback=doubled)
    s = capture.sites
    steer = tg.Intervene(
        model, {"residual_output.0": tg.Steer(torch.ones(models.WIDTH), coefficient=coefficient)}
    )
    linear = nn.Linear(models.WIDTH, 2) if linear is None else linear
    return TensorDictSequential(
        capture,
        steer,
        tg.SelectTokens([*s, "logits"], in_keys=[("acts", s[0]), "logits"], **(select or {})),
        TensorDictModule(linear, [("tokens", s[0])], [("tokens", "small")]),
        tg.StreamingMean(in_keys=[("tokens", "small")]),
        tg.StreamingMean(in_keys=[("tokens", "logits")], out_keys="other"),
        tg.MaxActivating(s[0], directions=torch.ones(models.WIDTH, 3)),
    )


def doubled(site, x):
    return 2 * x


doubled.__module__ = "test_identity"  # pytest imports this file under a name of its own


def identity(**changes) -> list:
    torch.manual_seed(0)
    return pipeline_identity(make_plan(pipeline(**changes)))


def test_the_same_pipeline_made_again_has_the_same_identity() -> None:
    assert identity() == identity() == json.loads(json.dumps(identity()))


def test_another_process_makes_the_same_identity() -> None:
    program = "import json, test_identity; print(json.dumps(test_identity.identity()))"
    paths = os.pathsep.join([str(TESTS), str(TESTS / "run"), str(Path(tg.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(said.stdout.splitlines()[-1]) == identity()


def changed_weight(place) -> nn.Module:
    model = models.gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.reshape(-1)[place] += 1e-3
    return model


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"model": changed_weight(0)}, r"\[0\].model.weights.sha256 is \w{64} there and \w{64} here"),
        ({"model": changed_weight(-1)}, r"\[0\].model.weights.sha256 is \w{64} there and \w{64} here"),
        ({"model": models.gpt2().half()}, r"\[0\].model.weights.sha256"),
        ({"model": models.gpt2(n_inner=48)}, r"\[0\].model.weights.values is 12432 there and"),
        ({"coefficient": 2.0}, r"\[1\].settings.edits.0.coefficient is 1.0 there and 2.0 here"),
        ({"linear": nn.Linear(models.WIDTH, 2)}, r"\[3\].weights.sha256"),
        ({"select": {"positions": "last"}}, r"\[2\].settings.positions is all there and last here"),
        ({"select": {"skip_first": 1}}, r"\[2\].settings.skip_first is 0 there and 1 here"),
    ],
    ids=["first weight", "last weight", "half", "wider", "edit", "own weights", "positions", "skip_first"],
)  # fmt: skip
def test_what_changes_a_number_shows(changes, difference) -> None:
    found = differences(identity(), identity(**changes))
    assert found and any(re.search(difference, one) for one in found), found


def test_every_tensor_of_a_model_counts() -> None:
    model = models.mixtral()
    before = weights_identity(model)
    assert before["tensors"] == len(model.state_dict()) and before == weights_identity(models.mixtral())
    for name, value in model.state_dict().items():
        kept = value.clone()
        with torch.no_grad():
            value.add_(0.5)
        assert weights_identity(model)["sha256"] != before["sha256"], name
        with torch.no_grad():
            value.copy_(kept)
    assert weights_identity(model) == before


def test_weights_of_any_kind_have_an_identity() -> None:
    with torch.device("meta"):
        absent = nn.Linear(3, 2)
    found = {
        str(weights_identity(nn.Linear(40, 40).to(dtype))) for dtype in (torch.float32, torch.float8_e4m3fn)
    }
    found |= {str(weights_identity(module)) for module in (absent, nn.Linear(3, 2), nn.Identity())}
    assert len(found) == 5
    transposed = nn.Linear(50, 50)
    plain = nn.Linear(50, 50)
    plain.load_state_dict(transposed.state_dict())
    transposed.weight.data = transposed.weight.data.T.contiguous().T  # the same values, laid out otherwise
    assert weights_identity(plain) == weights_identity(transposed)


def test_long_settings_count_by_their_hash() -> None:
    wide = [tg.MaxActivating("x", directions=torch.full((4, 5000), value)) for value in (1.0, 1.0, 2.0)]
    first, same, other = (pipeline_identity(make_plan(TensorDictSequential(stage))) for stage in wide)
    assert len(json.dumps(first)) < 2000 and first == same and first != other


def test_functions_of_rows_count_by_name() -> None:
    stages = [tg.MeanDifferenceProbe(preprocess=function) for function in (torch.abs, doubled, pipeline)]
    with_functions = [pipeline_identity(make_plan(TensorDictSequential(stage))) for stage in stages[1:]]
    [found] = differences(*with_functions)
    assert re.fullmatch(r"\[0\].settings.preprocess.function is \S*doubled there and \S*pipeline here", found)


def test_a_hash_sees_names_shapes_dtypes_and_values() -> None:
    batches = [
        {"x": torch.ones(2)}, {"y": torch.ones(2)}, {"x": torch.ones(1, 2)}, {"x": torch.ones(2).double()},
        {"x": torch.zeros(2)}, {"x": {"y": torch.ones(2)}}, {},
    ]  # fmt: skip
    found = [tensors_sha256(TensorDict(batch, batch_size=[])) for batch in batches]
    assert len(set(found)) == len(batches)
    assert found[0] == tensors_sha256(TensorDict({"x": torch.ones(2)}, batch_size=[2]))
