"""What is checked once the host has its trainer."""

import pytest
from peft import get_peft_model
from transformers import TrainerControl, TrainerState

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.host.callback import AdapterCallback
from axolotl_moe_peft.host.trainer import _check_trainable
from tests.tiny_models import tiny_model


def test_what_would_be_trained_is_what_is_saved() -> None:
    config = PerftConfig(rank=4, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("mixtral"), config)
    _check_trainable(model)
    norm = model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 parameters .* model\.norm\.weight .*lora_modules_to_save"):
        _check_trainable(model)
    norm.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name and parameter.requires_grad)
    with pytest.raises(ValueError, match="none of the adapter's 6 parameters would be trained"):
        _check_trainable(model)


def test_a_run_without_a_step_saves_no_untrained_adapter() -> None:
    callback = AdapterCallback.__new__(AdapterCallback)
    callback.on_train_end(None, TrainerState(global_step=1), TrainerControl())
    with pytest.raises(RuntimeError, match="no step was trained, .* the rows do not fill a batch"):
        callback.on_train_end(None, TrainerState(), TrainerControl())
