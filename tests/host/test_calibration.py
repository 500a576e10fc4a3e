"""What the host hands a base to read before its adapter is attached, and where the base is meanwhile."""

import pytest
import torch
from datasets import Dataset

from axolotl_moe_peft import PerftConfig, calibrate_experts
from axolotl_moe_peft.host.calibration import _batches, _runs_on, calibrated
from tests.tiny_models import random_ids, tiny_model

LENGTHS = (5, 3, 0, 7, 2, 9, 4)


def rows() -> Dataset:
    return Dataset.from_dict({"input_ids": [random_ids(1, n, seed=n)[0].tolist() if n else [] for n in LENGTHS]})


def test_batches_hold_the_first_rows_and_no_more_tokens_than_a_step():
    batches = list(_batches(rows(), 6, 10))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 5), (1, 7), (1, 2), (1, 9)]
    found = [row[mask > 0].tolist() for b in batches for row, mask in zip(b["input_ids"], b["attention_mask"])]
    assert found == [row for row in rows()["input_ids"][:6] if row]


@pytest.mark.parametrize("most_tokens", [1, 16, 1000])
def test_the_experts_are_those_of_rows_one_at_a_time(most_tokens):
    base, config = tiny_model("olmoe"), PerftConfig(variant="embedded", experts={"keep": 0.25, "calibrate": 6})
    one_at_a_time = [{"input_ids": torch.tensor([row])} for row in rows()["input_ids"][:6] if row]
    assert calibrated(config, base, rows(), most_tokens).expert_ids == calibrate_experts(base, one_at_a_time, 0.25)


def test_rows_without_tokens_and_divided_bases_are_refused():
    base, config = tiny_model("olmoe"), PerftConfig(variant="embedded", experts={"keep": 0.25})
    with pytest.raises(ValueError, match="128 rows of tokens are to be counted .* this dataset has none"):
        calibrated(config, base, Dataset.from_dict({"messages": ["a"]}), 8)
    base.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="DeepSpeed's ZeRO-3 divides the base"):
        calibrated(config, base, rows(), 8)


@pytest.mark.gpu
def test_a_base_on_the_cpu_is_counted_with_on_the_gpu_and_stays_where_it_was():
    base, batch = tiny_model("olmoe"), {"input_ids": random_ids(4, 30)}
    expected, before = calibrate_experts(base, [batch], 0.25), dict(base.named_parameters())
    seen = []
    base.model.layers[1].register_forward_hook(lambda layer, args, output: seen.append(args[0].device.type))
    with _runs_on(torch.device("cuda"), base):
        assert calibrate_experts(base, [batch], 0.25) == expected
    assert seen == ["cuda"]
    assert all(parameter is before[name] for name, parameter in base.named_parameters())
    assert {tensor.device.type for tensor in (*base.parameters(), *base.buffers())} == {"cpu"}
