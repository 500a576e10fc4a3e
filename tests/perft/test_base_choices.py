"""What the base's own routers choose is seen in every MoE family, with an adapter or without."""

from __future__ import annotations

import pytest
import torch

from axolotl_moe_peft.perft.base_choices import BaseRouters
from axolotl_moe_peft.perft.selection import find_moe_blocks
from tests.moe_families import FAMILIES, tiny_family_model
from tests.tiny_adapters import trained
from tests.tiny_models import random_ids

ROWS, LENGTH = 2, 6


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_seen_once(family: str) -> None:
    model = tiny_family_model(family)
    routers = BaseRouters(model)
    assert [block.name for block in routers.blocks] == [b.name for b in find_moe_blocks(model) if b.reads_text]
    with torch.no_grad(), routers.watch():
        model(random_ids(ROWS, LENGTH))
    seen = routers.read()
    assert routers.read() == {}
    assert list(seen) == [block.name for block in routers.blocks]
    for choices in seen.values():
        assert choices is not None and len(choices.indices_TK) == ROWS * LENGTH
        assert 0 <= choices.indices_TK.min() and choices.indices_TK.max() < choices.num_experts
        distinct = choices.indices_TK.sort(1).values.diff(dim=1) > 0
        if choices.chosen_TK is None:
            assert distinct.all()
        else:  # outputs that are no experts
            assert choices.chosen_TK.any() and choices.chosen_TK.shape == choices.indices_TK.shape
    with torch.no_grad():
        model(random_ids(ROWS, LENGTH))
    assert routers.read() == {}


def test_with_an_adapter_beside_the_blocks() -> None:
    bare = tiny_family_model("mixtral")
    model = trained("perft embedded", tiny_family_model("mixtral"), [])
    found = []
    for base, called in ((bare, bare), (model.get_base_model(), model)):
        routers = BaseRouters(base)
        with torch.no_grad(), routers.watch():
            called(random_ids(ROWS, LENGTH))
        found.append(routers.read())
    assert list(found[0]) == list(found[1])
    first = next(iter(found[0]))  # before any adapter has acted
    assert torch.equal(found[0][first].indices_TK, found[1][first].indices_TK)
