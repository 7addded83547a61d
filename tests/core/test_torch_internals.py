"""What torch keeps to itself is where this package asks for it; a torch that has moved it is told by its version."""

from __future__ import annotations

import ast
import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tdgeom
from tdgeom.core import torch_internals
from tdgeom.core.torch_internals import default_store, fsdp_groups, group_timeout, is_context_parallel

SOURCE = Path(tdgeom.__file__).parent
OF_TORCH = re.compile(
    r"\b(dist\.distributed_c10d\b|_get_default_|_get_fsdp_state|_fsdp_param|_context_parallel\b)"
)


@pytest.fixture
def group():
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77)
    )
    yield
    dist.destroy_process_group()


def test_they_are_where_they_were(group) -> None:
    default_store().set("a", "b")
    assert group_timeout() == 77.0
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
    [found] = fsdp_groups(model[0])
    assert found.ids == [id(one) for one in model[0].parameters()] and found.mesh.mesh.tolist() == [0]
    assert list(fsdp_groups(model[1])) == [] and not is_context_parallel(model.modules())


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("_get_default_store", lambda _: default_store()),
        ("_get_default_group", lambda _: group_timeout()),
        ("_get_fsdp_state", fsdp_groups),
    ],
)
def test_a_torch_that_has_moved_them_is_named(name, ask, group, monkeypatch) -> None:
    layer = nn.Linear(4, 4)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    if name == "_get_fsdp_state":
        monkeypatch.delattr(type(layer).__mro__[1], name)
    else:
        other = SimpleNamespace(
            get_backend_config=dist.get_backend_config, distributed_c10d=SimpleNamespace()
        )
        monkeypatch.setattr(torch_internals, "dist", other)
    with pytest.raises(
        RuntimeError, match=rf"torch {re.escape(torch.__version__)} keeps .* elsewhere.*{name}"
    ):
        ask(layer)


def test_nobody_else_asks_for_them() -> None:
    for file in SOURCE.rglob("*.py"):
        text = ast.unparse(ast.parse(file.read_text(encoding="utf-8")))
        if file.name != Path(torch_internals.__file__).name:
            assert not OF_TORCH.search(text), file
