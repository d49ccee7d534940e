"""Which weights go: exact counts, patterns, and what is pruned stays pruned."""

from pathlib import Path

import pytest
import torch
from forks import on_ranks

from kdlm.sparsity import SparsitySection
from kdlm.sparsity.masks import follows, masks_of


def scores(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 12), "b": (5, 8)}
    return {name: torch.rand(shape, generator=generator) * (3 if name == "a" else 1) for name, shape in shapes.items()}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.77])
def test_each_layer_loses_its_share_to_the_weight_and_the_lowest_go(share: float) -> None:
    given = scores()
    masks = masks_of(given, {}, SparsitySection(share=0.8), share)
    for name, value in given.items():
        assert masks[name].sum() == round(share * value.numel())
        gone, stays = value[masks[name]], value[~masks[name]]
        assert not len(gone) or gone.max() <= stays.min()


def test_each_row_loses_its_share() -> None:
    masks = masks_of(scores(), {}, SparsitySection(share=0.5, scope="row"), 0.25)
    assert (masks["a"].sum(1) == 3).all() and (masks["b"].sum(1) == 2).all()


def test_all_layers_together_lose_their_share_and_small_layers_lose_more() -> None:
    given = scores()
    masks = masks_of(given, {}, SparsitySection(share=0.5, scope="global"), 0.5)
    flat = torch.cat([value.flatten() for value in given.values()])
    gone = torch.cat([mask.flatten() for mask in masks.values()])
    assert gone.sum() == round(0.5 * len(flat)) and flat[gone].max() <= flat[~gone].min()
    assert masks["b"].float().mean() > masks["a"].float().mean()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2"])
def test_n_of_m_keeps_the_n_largest_of_each_m_neighbours(pattern: str) -> None:
    given, section = scores(), SparsitySection(pattern=pattern)
    masks = masks_of(given, {}, section, section.target)
    kept, group = section.kept_of
    for name, value in given.items():
        assert follows(value.masked_fill(masks[name], 0.0), kept, group)
        groups, gone = value.view(-1, group), masks[name].view(-1, group)
        assert (gone.sum(-1) == group - kept).all()
        largest = torch.zeros_like(gone).scatter(-1, groups.topk(kept).indices, True)
        assert torch.equal(largest, ~gone)


@pytest.mark.parametrize("section", [{"share": 0.9}, {"share": 0.9, "scope": "row"}, {"share": 0.9, "scope": "global"},
                                     {"pattern": "1:4"}], ids=str)  # fmt: skip
def test_what_is_pruned_stays_pruned_whatever_its_score_becomes(section: dict) -> None:
    section = SparsitySection(**section)
    before: dict[str, torch.Tensor] = {}
    for seed, share in enumerate([0.1, 0.3, 0.5, section.target]):
        masks = masks_of(scores(seed), before, section, share)
        assert all((masks[name] | ~before[name]).all() for name in before)
        total = sum(mask.numel() for mask in masks.values())
        assert sum(int(mask.sum()) for mask in masks.values()) == pytest.approx(share * total, abs=7)
        before = masks
    if section.kept_of:
        assert all(follows((~mask).float(), *section.kept_of) for mask in before.values())


def test_equal_scores_go_in_their_order() -> None:
    masks = masks_of({"a": torch.ones(3, 4)}, {}, SparsitySection(share=0.5), 0.5)
    assert masks["a"].flatten().tolist() == [True] * 6 + [False] * 6


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.62, 0.99])
def test_of_many_equal_scores_the_first_of_the_lowest_go(scope: str, share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    given = {name: torch.randint(4, (9, 8), generator=generator).float() for name in ("a", "b")}
    masks = masks_of(given, {}, SparsitySection(share=0.99, scope=scope), share)
    sets = [[name] for name in given] if scope == "layer" else [[*given]]
    for names in sets:
        flat, gone = (torch.cat([of[name].flatten() for name in names]) for of in (given, masks))
        lowest = flat.argsort(stable=True)[: round(share * len(flat))]
        assert torch.equal(gone, torch.zeros_like(gone).index_fill(0, lowest, True))


@pytest.mark.timeout(300)  # ranks import for most of it
def test_ranks_with_some_rows_each_have_the_masks_of_all_rows(tmp_path: Path) -> None:
    on_ranks(4, Path(__file__).with_name("ranks_masks.py"), tmp_path, seconds=280)


def test_rows_that_groups_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"sparsity\.pattern: rows of odd have 6 weights, which 4 do not divide"):
        masks_of({"odd": torch.ones(3, 6)}, {}, SparsitySection(pattern="2:4"), 0.5)


def test_one_shot_goes_before_the_first_step_levels_by_parts_of_the_run() -> None:
    assert [SparsitySection(share=0.5).share_at(step, 10) for step in (0, 9)] == [0.5, 0.5]
    section = SparsitySection(share=0.75, schedule={"name": "levels", "before": [0.5, 0.6]})
    assert [section.share_at(step, 9) for step in range(9)] == [0.5] * 3 + [0.6] * 3 + [0.75] * 3
    assert section.share_at(2, 2) == 0.75


def test_cubic_is_the_papers_polynomial_at_every_pruning_and_rests_at_the_end() -> None:
    section = SparsitySection(share=0.8, schedule={"name": "cubic", "start": 0.1, "end": 0.5, "every": 10})
    shares = [section.share_at(step, 100) for step in range(101)]
    assert shares == sorted(shares) and shares[:20] == [0.0] * 20
    for number in range(5):  # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 with s_i = 0
        assert shares[10 + 10 * number] == pytest.approx(0.8 - 0.8 * (1 - number / 4) ** 3)
    assert len(set(shares)) == 5 and set(shares[50:]) == {0.8}
    short = SparsitySection(share=0.8, schedule={"name": "cubic", "start": 0.1, "end": 0.15})
    assert [short.share_at(step, 10) for step in range(3)] == [0.0, 0.8, 0.8]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "share: missing"),
        ({"pattern": "4:2"}, "prunes nothing"),
        ({"pattern": "2:4", "share": 0.6}, "a share of 0.5"),
        ({"pattern": "2:4", "scope": "global"}, "every layer the same share"),
        ({"share": 0.5, "schedule": {"name": "levels", "before": [0.4, 0.6]}}, "has to rise"),
        ({"share": 0.5, "schedule": {"name": "cubic", "start": 0.6, "end": 0.5}}, "not before end"),
    ],
)
def test_a_section_that_cannot_be_is_refused(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SparsitySection(**given)
