"""Names: what a site is called, which layers are meant, and what the errors say."""

from __future__ import annotations

import copy
import pickle

import pytest
from torch import nn

import models
from tdgeom.model.calls.checked_sites import available_sites, resolve_sites
from tdgeom.model.sites import Site, select_layers
from tdgeom.model.structure.match_path import match_path


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("residual_input", ("", None, "residual_input", None, None)),
        ("attn_output.12", ("", None, "attn_output", 12, None)),
        ("encoder.residual_output.3", ("", "encoder", "residual_output", 3, None)),
        ("b/encoder.final_norm", ("b/", "encoder", "final_norm", None, None)),
        ("residual_output.-1", ("", None, "residual_output", -1, None)),
        ("module_output:h.0.mlp", ("", None, "module_output", None, "h.0.mlp")),
        ("b/module_input:h.10", ("b/", None, "module_input", None, "h.10")),
    ],
)
def test_a_name_parses_to_its_parts_and_back(name, parts):
    site = Site(name)
    assert (site.prefix, site.stack, site.kind, site.layer, site.path) == parts
    assert site == name
    assert hash(site) == hash(name)
    for twin in (pickle.loads(pickle.dumps(site)), copy.deepcopy(site), copy.copy(site), Site.parse(name)):
        assert twin == site
        assert type(twin) is Site
        assert (twin.prefix, twin.stack, twin.kind, twin.layer, twin.path) == parts


def test_a_prefix_without_a_slash_survives_copies():
    site = Site.of("residual_input", 0, prefix="second_")
    assert pickle.loads(pickle.dumps(site)).prefix == "second_"


def test_transformer_lens_words_are_aliases():
    assert Site("resid_pre.2") == "residual_input.2"
    assert Site("encoder.resid_post") == "encoder.residual_output"
    assert Site("resid_mid.0") == "residual_mid.0"
    with pytest.raises(ValueError, match="Kinds: embed, residual_input"):
        Site("resid_pst.0")


@pytest.mark.parametrize("name", ["residual_inptu", "", "residual_input.x", "residual_input.1.5", "attn"])
def test_an_unknown_kind_lists_the_kinds(name):
    with pytest.raises(ValueError, match="Kinds: .*router_logits"):
        Site(name)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", [0, 1, 2, 3]),
        (0, [0]),
        (-1, [3]),
        ([0, -1], [0, 3]),
        ([-1, 0, 3], [0, 3]),
        ("0, 2", [0, 2]),
        ("-1", [3]),
        (slice(1, None), [1, 2, 3]),
        (slice(None, None, 2), [0, 2]),
        (range(2), [0, 1]),
    ],
)
def test_layers(layers, chosen):
    assert select_layers(layers, 4) == chosen


@pytest.mark.parametrize(
    ("layers", "error"),
    [(4, IndexError), (-5, IndexError), ("1,9", IndexError), ([], ValueError), (slice(9, 9), ValueError)],
)
def test_layers_that_do_not_exist(layers, error):
    with pytest.raises(error, match="4 blocks"):
        select_layers(layers, 4)


@pytest.mark.parametrize("layers", ["first", 1.5, [True], ["0"]])
def test_layers_of_the_wrong_type(layers):
    with pytest.raises(ValueError, match="layers= expects"):
        select_layers(layers, 4)


@pytest.mark.parametrize(
    ("path", "pattern", "matches"),
    [
        ("h.1", "h.1", True),
        ("h.10", "h.1", False),
        ("model.h.1", "h.1", False),
        ("h.1.mlp", "h.*", False),
        ("h.10.mlp", "h.*.mlp", True),
        ("h.10.mlp", "**.mlp", True),
        ("mlp", "**.mlp", True),
        ("h.3.mlp.fc", "h.[0-3].**", True),
    ],
)
def test_globs_match_whole_paths(path, pattern, matches):
    assert match_path(path, pattern) is matches


def test_sites_come_once_and_in_execution_order():
    model = models.gpt2()
    asked = [
        "residual_output.-1",
        "module_output:transformer.h.1.mlp.c_fc",
        "resid_pre.1",
        "final_norm",
        "module_output:transformer.wte",
        "embed",
        "residual_output.2",
        "module_output:lm_head",
    ]
    assert [entry.site for entry in resolve_sites(model, asked)] == [
        "module_output:transformer.wte",
        "embed",
        "residual_input.1",
        "module_output:transformer.h.1.mlp.c_fc",
        "residual_output.2",
        "final_norm",
        "module_output:lm_head",
    ]


def test_layers_apply_to_kinds_and_not_to_concrete_names():
    found = resolve_sites(models.gpt2(), ["residual_input", "residual_output.0"], layers=[-1])
    assert [entry.site for entry in found] == ["residual_output.0", "residual_input.2"]


def test_a_glob_never_takes_its_longer_namesake():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])
    assert [entry.module_path for entry in resolve_sites(model, "module_output:1")] == ["1"]
    assert [entry.module_path for entry in resolve_sites(model, "module_output:1?")] == ["10", "11"]


@pytest.mark.parametrize(
    ("sites", "error", "match"),
    [
        ("module_output:transformer.h.1.mpl", ValueError, r"Nearest: transformer\.h\.1\.mlp"),
        ("residual_input.3", IndexError, "3 blocks"),
        ("router_logits", ValueError, "it has embed, residual_input.*module_output:<path>"),
        ("encoder.residual_input", ValueError, "one stack without a name"),
        ("final_norm.0", ValueError, "has no layers"),
        ("b/residual_input", ValueError, "prefix"),
        ([], ValueError, "names no site"),
        ([3], ValueError, "a site is a string"),
    ],
)
def test_errors_say_what_exists(sites, error, match):
    with pytest.raises(error, match=match):
        resolve_sites(models.gpt2(), sites)


def test_a_layer_of_several_stacks_has_to_name_one():
    with pytest.raises(ValueError, match=r"Remedy: encoder\.residual_input\.0"):
        resolve_sites(models.t5(), "residual_input.0")
    assert [e.site for e in resolve_sites(models.t5(), "decoder.embed")] == ["decoder.embed"]


def test_a_model_without_repeated_blocks_names_the_remedy():
    model = nn.Sequential(nn.Linear(2, 3), nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match="module_output:<path>"):
        resolve_sites(model, "residual_input")
    assert available_sites(model) == []
    assert [entry.site for entry in resolve_sites(model, "module_output:*")] == [
        "module_output:0",
        "module_output:1",
    ]
