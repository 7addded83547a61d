"""Two files say of two models what a run over both says, and refuse what they cannot know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

import models
import tdgeom as tg
from tdgeom.files.errors import StoreError
from tdgeom.training.geometry_card import GeometryCard, geometry_card
from tdgeom.training.landmarks import Landmarks, text_ids


def batches(seed=0, count=6, size=8, length=24):
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        ids, mask = (
            torch.randint(4, models.VOCAB, (size, length), generator=generator),
            torch.ones(size, length, dtype=torch.long),
        )
        mask[::3, :5] = 0
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


def rows_of(model, loader, site):
    """Every attended row of a site, and its text, by hooks of the test's own."""
    found, texts = [], []
    for batch in loader:
        with torch.no_grad(), tg.Capture(model, [site]) as calls:
            model(**batch, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0))
        mask = batch["attention_mask"].bool()
        found.append(calls[0]["acts", site][mask])
        for ids, kept in zip(batch["input_ids"].tolist(), mask.tolist()):
            own = [one for one, attended in zip(ids, kept) if attended]
            texts += [tuple(own[: n + 1]) for n in range(len(own))]
    return torch.cat(found).double(), texts


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    for name, model in (("a", models.gpt2()), ("b", models.llama())):
        geometry_card(model, batches(), folder / name, k=4, corpus="first")
    return folder


def test_text_ids_know_the_text_and_nothing_else():
    ids = torch.tensor([[5, 6, 7, 8], [0, 5, 6, 7], [5, 6, 9, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    found = text_ids(ids, mask)
    assert torch.equal(found[0, :3], found[1, 1:]) and torch.equal(found[0, :2], found[2, :2])
    distinct = torch.unique(torch.cat((found[0], found[2, 2:])))
    assert len(distinct) == 6 and bool((distinct >= 0).all())


def test_landmarks_are_the_same_in_any_order_and_batches():
    ids = torch.randint(0, 40, (90,), generator=torch.Generator().manual_seed(0))  # many texts come again
    rows = ids[:, None].double()
    wanted = ids.unique()[:16]
    for order in (torch.arange(90), torch.randperm(90, generator=torch.Generator().manual_seed(1))):
        parts = [Landmarks(["x"], size=16) for _ in range(3)]
        for number, part in enumerate(order.split(11)):
            parts[number % 3].update(
                TensorDict({("tokens", "x"): rows[part], ("carried", "text_id"): ids[part]})
            )
        found = parts[0].merge_(parts[1]).merge_(parts[2]).publish(TensorDict())
        assert torch.equal(found["landmark_id"], wanted) and torch.equal(
            found["landmarks", "x"][:, 0], wanted.double()
        )


def test_two_files_give_what_both_models_give(cards):
    a, b = (GeometryCard.load(cards / name) for name in "ab")
    table = a.compare(b)
    assert len(table) == 9 and list(table.columns) == [
        "a",
        "b",
        "linear_cka_debiased",
        "procrustes",
        "feature_subspace_novelty",
        "rows",
    ]
    for row in table.to_dict("records")[::4]:
        (x, texts), (y, _) = (
            rows_of(models.gpt2(), batches(), row["a"]),
            rows_of(models.llama(), batches(), row["b"]),
        )
        first = [texts.index(text) for text in dict.fromkeys(texts)]  # each text once
        assert row["rows"] == len(first)
        for name in ("linear_cka_debiased", "procrustes"):
            assert abs(row[name] - float(getattr(tg.functional, name)(x[first], y[first]))) < 1e-3
            assert abs(row[name] - float(getattr(tg.functional, name)(x, y))) < 0.01  # all rows, repeats too
        u, v = (np.linalg.eigh(np.cov(z.numpy(), rowvar=False))[1][:, :-5:-1] for z in (x, y))
        novelty = np.sqrt(np.clip(1 - np.linalg.svd(u.T @ v)[1] ** 2, 0, None)).mean()
        assert row["feature_subspace_novelty"] == pytest.approx(novelty, abs=2e-3)


def test_a_card_knows_where_it_comes_from(cards):
    card = GeometryCard.load(cards / "a")
    (corpus,) = card.about["corpora"]
    rows, _ = rows_of(models.gpt2(), batches(), card.sites[0])
    assert corpus["name"] == "first" and corpus["rows"] == len(rows) and len(corpus["data_sha256"]) == 64
    assert len(card.about["weights"]["sha256"]) == 64 and card.about["model"] == "GPT2LMHeadModel"
    profile = card.profile().set_index("site")
    values = np.linalg.eigvalsh(np.cov(rows.numpy(), rowvar=False))
    assert profile.loc[card.sites[0], "d_pr"] == pytest.approx(
        values.sum() ** 2 / (values**2).sum(), rel=1e-6
    )
    np.testing.assert_allclose(card.mean[card.sites[0]], rows.mean(0), rtol=1e-4, atol=1e-6)


def test_the_same_corpus_in_another_order_and_batch_size_has_the_same_landmarks(cards):
    whole = {
        name: torch.cat([batch[name] for batch in batches()]) for name in ("input_ids", "attention_mask")
    }
    other = [
        {name: value.flip(0)[first : first + 5] for name, value in whole.items()} for first in range(0, 48, 5)
    ]
    card = geometry_card(models.gpt2(), other, sample_size=100)
    assert torch.equal(card.ids, GeometryCard.load(cards / "a").ids[:100])
    same = card.compare(GeometryCard.load(cards / "a"))
    own = same[same["a"] == same["b"]]
    assert (own["linear_cka_debiased"] - 1).abs().max() < 1e-5 and own["procrustes"].max() < 1e-5


def test_disjoint_corpora_merge_into_the_card_of_both():
    parts = [batches(seed) for seed in (1, 2)]
    model = models.gpt2()
    one, two, both = (
        geometry_card(model, data, sample_size=200, k=16) for data in (*parts, [*parts[0], *parts[1]])
    )
    merged = one.merge(two)
    assert torch.equal(merged.ids, both.ids[: len(merged.ids)]) and len(merged.ids) == 200
    for site in both.sites:
        torch.testing.assert_close(merged.rows[site], both.rows[site], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged.mean[site], both.mean[site], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            merged.values[site], both.values[site], rtol=1e-4, atol=1e-9
        )  # k is the whole width
    assert len(merged.profile()) == 6
    with pytest.raises(ValueError, match="the corpora share texts"):
        one.merge(geometry_card(model, batches(1)[:-1], sample_size=200, k=16))
    with pytest.raises(ValueError, match="weights differ"):
        one.merge(geometry_card(models.llama(), parts[1], sample_size=200, k=16))


def test_files_that_are_too_small_or_no_cards_are_refused(cards, tmp_path):
    card = GeometryCard.load(cards / "a")
    small = card.save(tmp_path / "small", max_bytes=80_000)
    assert small.stat().st_size <= 80_000
    few = GeometryCard.load(small)
    assert 64 <= len(few.ids) < len(card.ids) and torch.equal(few.ids, card.ids[: len(few.ids)])
    size = float(
        (few.rows[few.sites[1]] - card.rows[card.sites[1]][: len(few.ids)]).norm()
        / card.rows[card.sites[1]][: len(few.ids)].norm()
    )
    assert size < 0.04  # 8 bits a value
    with pytest.raises(ValueError, match="landmark rows of 3 sites fit into max_bytes=70,000"):
        card.save(tmp_path / "smaller", max_bytes=70_000)
    (tmp_path / "text").write_text("no card at all, but long enough to be read as one")
    with pytest.raises(StoreError):
        GeometryCard.load(tmp_path / "text")
    whole = bytearray((cards / "a").read_bytes())
    whole[whole.index(b'"sites"') + 1 : whole.index(b'"sites"') + 6] = b"sight"
    (tmp_path / "changed").write_bytes(whole)
    with pytest.raises(StoreError, match="is no whole geometry card"):
        GeometryCard.load(tmp_path / "changed")
    with pytest.raises(ValueError, match="the cards share 0 landmark rows, 64 are needed"):
        card.compare(
            geometry_card(
                models.gpt2(),
                [{"input_ids": batch["input_ids"] * 0 + 3 + batch["input_ids"] % 2} for batch in batches(9)],
            )
        )


def test_directions_in_which_rows_do_not_vary_are_no_novelty():
    """Embeddings of few tokens: the rank is theirs, and the same corpus in other batches has the same directions."""
    model = models.gpt2()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight[9:] = model.transformer.wte.weight[8]
    ids = torch.randint(1, models.VOCAB, (90, 12), generator=torch.Generator().manual_seed(0))
    cards = [
        tg.geometry_card(model, [{"input_ids": part} for part in data.split(size)], sites="embed")
        for data, size in ((ids, 10), (ids.flip(0), 7))
    ]
    found = cards[0].compare(cards[1])
    assert cards[0].directions(str(found["a"][0])).shape[1] == 8 - 1
    assert float(found["feature_subspace_novelty"][0]) < 1e-6
