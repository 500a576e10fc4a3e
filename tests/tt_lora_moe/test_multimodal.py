"""A pool on models of text and images: each row, with an image or without, has its own expert."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from axolotl_moe_peft import TTLoraConfig, TTLoraMoeConfig
from tests.pt_moe.test_mrope import CLOSE, GREEDY, ROWS, base_of, batch_of


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_rows_with_images_have_their_own_expert(family, side, tmp_path):
    entries = [{"name": name, "path": str(tmp_path / name)} for name in ("a", "b")]
    for seed, entry in enumerate(entries):
        torch.manual_seed(seed)
        config = TTLoraConfig(rank=2, alpha=300, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(base_of(family), config).save_pretrained(entry["path"])
    pool = get_peft_model(base_of(family), TTLoraMoeConfig(experts=entries, task_type="CAUSAL_LM")).eval()
    weight = pool.base_model.model.prompt_router.ttmoe_weight["default"]
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    singles = [PeftModel.from_pretrained(base_of(family), entry["path"]).eval() for entry in entries]
    batch = batch_of(pool, ROWS, side)
    found = pool(**batch).logits
    chosen = pool.base_model.chosen_experts["default"].tolist()
    assert set(chosen) == {0, 1}
    tokens = pool.generate(**batch, **GREEDY)[:, -4:] if side == "left" else [None] * len(ROWS)
    for row, expert, logits, own in zip(ROWS, chosen, found, tokens, strict=True):
        alone = batch_of(pool, [row])
        expected = singles[expert](**alone).logits[0]
        torch.testing.assert_close(logits[-len(row) :] if side == "left" else logits[: len(row)], expected, **CLOSE)
        if own is not None:
            assert torch.equal(singles[expert].generate(**alone, **GREEDY)[0, -4:], own)
