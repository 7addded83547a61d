"""verify_sites says ok of what is right, failed of what is wrong, and why something was not checked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models
import tdgeom as tg
from tdgeom.model.verification.plain_hooks import changed, columns_in, distance, floats, ratio, recorded

COLUMNS = ["site", "stack", "kind", "layer", "check", "difference", "outcome", "note"]


def of(table, kind, check):
    """The outcomes of one check of one kind."""
    rows = table[(table["kind"] == kind) & (table["check"] == check)]
    assert len(rows), (kind, check, sorted(set(zip(table["kind"], table["check"]))))
    return set(rows["outcome"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "gemma2", "gpt_neox", "granite"])
def test_a_sound_model_passes_every_check_that_is_made(name):
    table = tg.verify_sites(models.TEXT_MODELS[name](), models.text_batch())
    assert list(table.columns) == COLUMNS
    assert not (table["outcome"] == "failed").any(), table[table["outcome"] == "failed"].to_string()
    assert set(table["site"]) == {str(e.site) for e in tg.available_sites(models.TEXT_MODELS[name]())}
    for kind in (
        "residual_input",
        "attn_output",
        "mlp_output",
        "z",
        "mlp_act",
        "attn_pattern",
        "head_output",
    ):
        assert of(table, kind, "edit") == {"ok"}, kind
    assert of(table, "residual_input", "hidden states") == {"ok"}
    assert of(table, "attn_pattern", "eager attention") == {"ok"}
    assert of(table, "attn_output", "sum onto the stream") == {"ok"}
    assert of(table, "mlp_output", "arrives in the stream") == {"ok"}
    assert of(table, "head_output", "sum over heads") == {"ok"}
    made = table[table["outcome"] != "unchecked"]
    assert made["difference"].notna().all() and (made["difference"] < 1e-3).all()
    assert (table[table["outcome"] == "unchecked"]["note"] != "").all()


class Scaled(nn.Module):
    """What its MLP gives is halved by the block: it is not what is added."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        return x + 0.5 * self.mlp(x)


def test_what_is_not_added_as_it_is_fails():
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(), Scaled())
    table = tg.verify_sites(model, {"input": torch.randn(3, 5, 4)})
    if "mlp_output" in set(
        table[table["outcome"] != "unchecked"]["kind"]
    ):  # else it is refused, which is as good
        assert of(table, "mlp_output", "arrives in the stream") == {"failed"}
    assert of(table, "residual_output", "edit") == {"ok"}


class Deaf(nn.Module):
    """Its second block's output goes nowhere."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

    def forward(self, x):
        x = self.blocks[0](x)
        self.blocks[1](x)
        return x


def test_an_edit_that_cannot_be_seen_is_not_called_right():
    table = tg.verify_sites(Deaf(), {"x": torch.randn(3, 4)}, sites="residual_output")
    edits = table[table["check"] == "edit"].set_index("layer")
    assert edits.loc[0, "outcome"] == "ok" and edits.loc[1, "outcome"] == "unchecked"
    assert "does not depend on this place" in edits.loc[1, "note"]


def test_what_is_refused_is_unchecked_with_the_refusal():
    table = tg.verify_sites(
        models.llama(), models.text_batch(), sites=["residual_input", "module_output:model.layers.*.mlp"]
    )
    assert set(table["kind"]) == {"residual_input", "module_output"}
    model = models.llama()
    # a forward that does not run the modules' hooks
    layer = model.model.layers[1]
    model.model.layers[1].mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj.forward(
        mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    )
    table = tg.verify_sites(model, models.text_batch(), sites="mlp_act", edits=False).set_index("layer")
    assert table.loc[1, "outcome"] == "unchecked" and table.loc[1, "note"].startswith("refused: ")
    assert table.loc[0, "outcome"] == "ok"


def test_layers_and_edits_are_obeyed():
    table = tg.verify_sites(models.gpt2(), models.text_batch(), layers=[0, -1], edits=False)
    assert set(table["layer"].dropna()) == {0, models.DEPTH - 1} and "edit" not in set(table["check"])
    with pytest.raises(IndexError, match="out of range"):
        tg.verify_sites(models.gpt2(), models.text_batch(), layers=[9])
    with pytest.raises(ValueError, match=r"no repeated blocks.*Remedy: sites='module_output"):
        tg.verify_sites(nn.Linear(4, 4), {"input": torch.randn(2, 4)})


def test_the_model_stays_as_it_is():
    model = models.llama().train()

    def look():
        return {
            name: (*m._forward_hooks, *m._forward_pre_hooks, m.training) for name, m in model.named_modules()
        }

    state, before = {name: value.clone() for name, value in model.state_dict().items()}, look()
    tg.verify_sites(model, models.text_batch())
    assert look() == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    states = model.eval()(**models.text_batch(), output_hidden_states=True).hidden_states
    assert len(states) == models.DEPTH + 1  # whose recording the model installs anew


def test_padding_is_masked_in_scores():
    batch = models.text_batch()
    batch["attention_mask"][0, :3] = 0
    table = tg.verify_sites(models.llama(), batch)
    assert not (table["outcome"] == "failed").any(), table[table["outcome"] == "failed"].to_string()
    assert of(table, "attn_scores", "edit") == {"ok"}


def test_plain_hooks():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    x = torch.randn(4, 3)
    with recorded(model, ["0", "1"]) as runs:
        model(x)
    assert [run.path for run in runs] == ["0", "1"] and not runs[0].holds(runs[1])
    torch.testing.assert_close(runs[1].inputs[0], model[0](x).detach())
    with changed(model[0], "output", lambda value: value + 1, 3):
        torch.testing.assert_close(model(x), model[1](model[0].forward(x) + 1))
    with changed(model[1], "input", lambda value: value * 0, 3):
        torch.testing.assert_close(model(x), model[1].bias.expand(4, 2))
    plain = model(x)
    with changed(model[1], "input", lambda value: value * 0, 3, call=1):
        torch.testing.assert_close(model(x), plain)  # its first run
        torch.testing.assert_close(model(x), model[1].bias.expand(4, 2))
    assert list(floats({"a": (torch.ones(1), [torch.zeros(2)]), "b": torch.ones(1, dtype=torch.long)}))[
        1
    ].shape == (2,)
    assert distance(torch.ones(2, 3), torch.ones(3, 2)) == float("inf") and distance(
        2 * x, x
    ) == pytest.approx(1.0)
    assert ratio(3 * x, x) == pytest.approx(3.0) and ratio(x + 1, x) is None
    assert columns_in(x[:, [2, 0]], x).tolist() == [2, 0] and columns_in(x + 1, x) is None


def test_stored_with_an_analysis(tmp_path):
    loader = [{k: v for k, v in models.text_batch().items()}] * 2
    results = tg.analyze_model(
        model=models.gpt2(), dataloader=loader, progress=False, verify=True, save_dir=tmp_path / "run"
    )
    table = results.diagnostics["verified_sites"]
    assert set(table["kind"]) == {"residual_input"} and set(table["outcome"]) == {"ok"}
    again = tg.AnalysisResults.load(tmp_path / "run").diagnostics["verified_sites"]
    assert (
        again["outcome"].tolist() == table["outcome"].tolist()
        and again["site"].tolist() == table["site"].tolist()
    )
    with pytest.raises(ValueError, match="verify= reads the data twice"):
        tg.analyze_model(model=models.gpt2(), dataloader=iter(loader), verify=True)
