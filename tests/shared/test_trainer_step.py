"""Losses that a trainer computes outside the model: router losses keep the main loss's scale, prompts their labels.

The reference for perft is the z-loss alone: with up-projections of 0 it is all of the routers' gradient, and linear in
the batch, so that accumulation and unequal rows must not show.
"""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.perft import PerftLayer
from axolotl_moe_peft.shared.trainer_step import current_step
from tests.pt_moe.prompts import pt_moe
from tests.pt_moe.test_trainers import tokenizer
from tests.tiny_models import random_ids, tiny_config, tiny_model
from tests.tt_lora_moe.pools import pool_of, save_experts

PROMPT = 3


def rows(lengths: list[int]) -> Dataset:
    ids = [random_ids(1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "labels": [[-100] * PROMPT + row[PROMPT:] for row in ids],
        }
    )


EQUAL, UNEQUAL = rows([8] * 8), rows([5, 6, 7, 8, 9, 10, 11, 12])


def perft(family: str = "mixtral", **settings) -> PeftModel:
    """Routers that the task gives no gradient."""
    coefs = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 1.0} | settings
    torch.manual_seed(0)
    return get_peft_model(tiny_model(family), PerftConfig(task_type="CAUSAL_LM", num_experts=4, rank=4, **coefs))


def sum_over_items(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=-100)
    return total / num_items_in_batch


class OutsideLoss(Trainer):
    """As Axolotl's diffusion or a reward trainer: a mean over the batch, which the trainer divides."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        return outputs.logits.float().square().mean()


class FromHiddenStates(OutsideLoss):
    """As Liger's fused losses: the decoder's output and the head's weight, past the model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        base = model.get_base_model()
        hidden = base.model(**{k: v for k, v in inputs.items() if k != "labels"}).last_hidden_state
        return (hidden @ base.lm_head.weight.T).float().square().mean()


LOSSES = {
    "own": (Trainer, {}, {}),
    "label_smoothing": (Trainer, {"label_smoothing_factor": 0.1}, {}),
    "compute_loss_func": (Trainer, {}, {"compute_loss_func": sum_over_items}),
    "outside": (OutsideLoss, {}, {}),
    "hidden_states": (FromHiddenStates, {}, {}),
}


def train(folder, model, loss, dataset, batch, accumulate, steps=1, **arguments) -> dict[str, torch.Tensor]:
    """The gradients of the last step."""
    trainer_cls, extra, kwargs = LOSSES[loss]
    found: dict[str, torch.Tensor] = {}

    class Watched(trainer_cls):
        def _clip_grad_norm(self, model):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            return super()._clip_grad_norm(model)

    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "max_steps": steps,
        "max_grad_norm": 1e9,
        "learning_rate": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    trainer = Watched(
        model,
        TrainingArguments(**settings | extra | arguments),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer()) if isinstance(dataset[0]["labels"], list) else None,
        **kwargs,
    )
    trainer.train()
    assert found and current_step() is None
    return found


def router_gradients(*args, **kwargs) -> torch.Tensor:
    gradients = train(*args, **kwargs)
    return torch.cat([g.flatten() for n, g in gradients.items() if "perft_router" in n])


@pytest.fixture(scope="module")
def at_once(tmp_path_factory) -> torch.Tensor:
    """The router losses' gradient of all rows in one batch, with the model's own loss."""
    gradient = router_gradients(tmp_path_factory.mktemp("at_once"), perft(), "own", EQUAL, 8, 1)
    assert gradient.norm() > 0.01
    return gradient


@pytest.mark.parametrize("loss", LOSSES)
def test_accumulation_does_not_change_the_router_losses(loss, at_once, tmp_path):
    found = router_gradients(tmp_path, perft(), loss, EQUAL, 2, 4)
    torch.testing.assert_close(found, at_once, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["outside", "hidden_states"])
def test_nor_does_checkpointing(loss, at_once, tmp_path):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    found = router_gradients(tmp_path, perft(), loss, EQUAL, 4, 2, **settings)
    torch.testing.assert_close(found, at_once, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["label_smoothing", "compute_loss_func"])
def test_micro_batches_weigh_what_they_weigh_in_the_main_loss(loss, tmp_path):
    """Of unequal rows: the model's own loss, which has the labels, is the reference."""
    own = router_gradients(tmp_path, perft(), "own", UNEQUAL, 2, 4)
    found = router_gradients(tmp_path, perft(), loss, UNEQUAL, 2, 4)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)


def test_the_last_step_of_an_epoch_has_fewer_micro_batches(tmp_path):
    reference = router_gradients(tmp_path, perft(), "own", EQUAL.select(range(6)), 2, 4)
    found = router_gradients(tmp_path, perft(), "outside", EQUAL.select(range(6)), 2, 4)
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)


def test_a_scaler_of_fp16_multiplies_them_as_it_does_the_loss(tmp_path, monkeypatch):
    class Scaler:
        def get_scale(self) -> float:
            return 1024.0

    class Scaled(OutsideLoss):
        def training_step(self, *args, **kwargs):
            self.accelerator.scaler = Scaler()
            return super().training_step(*args, **kwargs)

    monkeypatch.setitem(LOSSES, "scaled", (Scaled, {}, {}))
    backward = torch.Tensor.backward
    plain = router_gradients(tmp_path, perft(), "outside", EQUAL, 2, 4)
    monkeypatch.setattr("accelerate.Accelerator.backward", lambda self, loss, **kwargs: backward(loss * 1024.0))
    scaled = router_gradients(tmp_path, perft(), "scaled", EQUAL, 2, 4)
    torch.testing.assert_close(scaled / 1024, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 1), (1, 1), (2, 2)])
def test_a_class_for_each_row_leaves_the_router_losses_the_weight_of_the_loss(batch, accumulate, tmp_path):
    """The model's loss is a mean over the rows of a micro-batch, and the trainer adds these up."""
    ids = torch.cat([random_ids(1, 6, seed=i) for i in range(batch * accumulate)])
    dataset = Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": [1] * len(ids)}
    )

    def model() -> PeftModel:
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_config(tiny_config("mixtral", num_labels=3))
        config = PerftConfig(task_type="SEQ_CLS", num_experts=4, rank=4, router_z_loss_coef=1.0)
        config.router_aux_loss_coef = 0.0
        return get_peft_model(base, config)

    found = router_gradients(tmp_path, model(), "own", dataset, batch, accumulate, data_seed=0)
    reference, seen = model().train(), []
    layers = [m for m in reference.modules() if type(m).__name__ == "PerftLayer"]
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        reference(input_ids=ids, attention_mask=torch.ones_like(ids))
    z = [(x @ m.perft_router["default"].T).logsumexp(-1).square().mean() for m, x in zip(layers, seen, strict=True)]
    expected = torch.autograd.grad(accumulate * sum(z) / len(z), [m.perft_router["default"] for m in layers])
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["label_smoothing", "compute_loss_func"])
def test_a_prompt_is_chosen_by_what_is_before_the_labels_that_the_trainer_took(loss, tmp_path):
    """Weights of label smoothing aside, the prompt's choice is that of a model which sees the labels."""
    outside, own = pt_moe(router_aux_loss_coef=0.5), pt_moe(router_aux_loss_coef=0.5)
    train(tmp_path, outside, loss, UNEQUAL, 2, 1)
    train(tmp_path, own, "own", UNEQUAL, 2, 1)
    assert outside.base_model.statistics.pop() == pytest.approx(own.base_model.statistics.pop())


def test_evaluation_reads_no_answer_either(tmp_path):
    """compute_loss pops the labels there, too."""
    model, losses = pt_moe(), {}
    for loss in ("own", "compute_loss_func"):
        trainer_cls, extra, kwargs = LOSSES[loss]
        arguments = TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=8, use_cpu=True, report_to=[], disable_tqdm=True, **extra
        )
        if loss != "own":
            kwargs = {
                "compute_loss_func": lambda outputs, labels, num_items_in_batch=None: sum_over_items(
                    outputs, labels, (labels[:, 1:] != -100).sum()
                )
            }
        trainer = trainer_cls(
            model, arguments, eval_dataset=UNEQUAL, data_collator=DataCollatorForSeq2Seq(tokenizer()), **kwargs
        )
        losses[loss] = trainer.evaluate()["eval_loss"]
    assert losses["compute_loss_func"] == pytest.approx(losses["own"], rel=1e-5)


def test_a_pool_whose_labels_the_trainer_took_says_why_it_cannot_train(tmp_path):
    model = pool_of(save_experts(tmp_path / "experts"))
    with pytest.raises(ValueError, match="computes no logits in training.*Leave out `label_smoothing_factor`"):
        train(tmp_path, model, "label_smoothing", EQUAL, 2, 1)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_global_batch_is_balanced_over_the_micro_batches_of_its_step_so_far(reentrant, tmp_path):
    model, seen = perft(router_aux_loss_coef=1.0, router_z_loss_coef=0.0, router_aux_loss_scope="global_batch"), []
    layers = [m for m in model.modules() if isinstance(m, PerftLayer)]
    for layer in layers:

        def see(module, args):
            if model.base_model.auxiliary.current.running:  # not once more for checkpointing
                seen.append(args[0].detach().flatten(0, 1))

        layer.register_forward_pre_hook(see)
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    settings = {} if reentrant is None else checkpointing
    found = router_gradients(tmp_path, model, "outside", EQUAL, 2, 2, steps=2, **settings)
    expected = []
    for i, layer in enumerate(layers):
        router_ND = layer.perft_router["default"]
        # of the second step, whose routers are those of the first
        probs = [(x @ router_ND.T).softmax(-1) for x in seen[2 * len(layers) + i :: len(layers)]]
        chosen = [torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0) for p in probs]
        load = [torch.cat(chosen[: k + 1]).mean(0) for k in range(2)]
        loss = sum(4 * (f @ p.mean(0)) for f, p in zip(load, probs, strict=True)) / 2 / len(layers)
        expected.append(torch.autograd.grad(loss, router_ND)[0].flatten())
    assert found.norm() > 1e-3
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-6)
