"""Laws of the router: each pack as if it were alone, and the base bit for bit behind all of them."""

import pytest
import torch
from packed_models import a_pair, changed, saved, small_model, weights

from kdlm.packs import Router, merge, pack


@pytest.fixture
def skilled(tmp_path):
    """A base and the packs of two skills; the second leaves the first layer alone."""
    base, first = a_pair(tmp_path, tied=True)
    later = changed(small_model(tied=True), lambda name, weight: torch.full_like(weight, 0.01 * ("layers.1" in name)))
    packs = {"sums": tmp_path / "sums", "code": tmp_path / "code"}
    pack(base, first, packs["sums"], share=0.3)
    pack(base, saved(later, tmp_path / "later"), packs["code"], share=0.3)
    return base, packs


def test_packs_come_on_and_go_without_a_trace(skilled, tmp_path):
    base, packs = skilled
    router, before = Router(base, packs), weights(base)
    merged = {}
    for name, folder in packs.items():
        merge(base, [folder], tmp_path / f"with-{name}")
        merged[name] = weights(tmp_path / f"with-{name}")
    for chosen in ("sums", "code", None, "code", "sums", "sums", None):
        live = router.use(chosen).state_dict()
        assert all(torch.equal(live[name], weight) for name, weight in (merged[chosen] if chosen else before).items())
        assert router.active == ({chosen: 1.0} if chosen else {})


def test_a_weighted_sum_is_that_of_a_merge(skilled, tmp_path):
    base, packs = skilled
    merge(base, list(packs.values()), tmp_path / "both", weights=[0.25, 0.5])
    live = Router(base, packs).use({"sums": 0.25, "code": 0.5}).state_dict()
    assert all(torch.equal(live[name], weight) for name, weight in weights(tmp_path / "both").items())


def test_requests_find_their_pack_by_name_or_by_a_rule(skilled):
    base, packs = skilled
    router = Router(base, packs)
    assert router("code") is router.model
    assert router.active == {"code": 1.0}
    ruled = Router(base, packs, route=lambda text: "sums" if text[0].isdigit() else None)
    ruled("1 + 1")
    assert ruled.active == {"sums": 1.0}
    ruled("hello")
    assert ruled.active == {}


def test_parameters_stay_the_same_objects_and_keep_their_type(skilled):
    base, packs = skilled
    router = Router(base, packs, dtype=torch.bfloat16)
    before = {name: id(weight) for name, weight in router.model.named_parameters()}
    old = router.model.lm_head.weight.clone()
    router.use("sums")
    assert {name: id(weight) for name, weight in router.model.named_parameters()} == before
    assert router.model.lm_head.weight.dtype == torch.bfloat16
    assert router.model.lm_head.weight is router.model.model.embed_tokens.weight
    assert not torch.equal(router.use("sums").lm_head.weight, old)
    assert torch.equal(router.use(None).lm_head.weight, old)


def test_what_cannot_be_routed_is_said_in_words(skilled, tmp_path):
    base, packs = skilled
    with pytest.raises(ValueError, match=r"no pack 'maths'; there are: sums, code"):
        Router(base, packs).use("maths")
    other = saved(small_model(tied=True, seed=5), tmp_path / "another")
    with pytest.raises(ValueError, match="another base"):
        Router(other, packs)
