"""`reward_model` and `process_reward_model`: the adapter and the head are trained, saved, resumed and continued."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from axolotl_moe_peft import PerftConfig
from tests.cli.adapters import adapter_keys
from tests.cli.cli_helpers import AxolotlPool, adapter_tensors, log_history, write_yaml

ADAPTERS = ("lora", "perft", "tt_lora", "pt_moe")
KINDS = ("reward_model", "process_reward_model")
QUESTIONS = [f"what is {i}?" for i in range(8)]
SYSTEM, CHOSEN, REJECTED = "be brief", "ok yes", "no"
STEPS_OF_ANSWER, SEPARATOR = (("ok", 1), ("no", 0)), "\n"
ROWS: dict[str, list[dict[str, Any]]] = {
    "reward_model": [{"system": SYSTEM, "input": q, "chosen": CHOSEN, "rejected": REJECTED} for q in QUESTIONS],
    "process_reward_model": [
        {"prompt": q, "completions": [s for s, _ in STEPS_OF_ANSWER], "labels": [bool(x) for _, x in STEPS_OF_ANSWER]}
        for q in QUESTIONS
    ],
}
TYPES = {"reward_model": "bradley_terry.chat_template", "process_reward_model": "stepwise_supervised"}
STEPS = 3
SGD = {"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 1}


@pytest.fixture(scope="module")
def train(
    axolotl: AxolotlPool, base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`train(kind, adapter, name, **keys)`: the folder of three steps over all rows."""
    folder = tmp_path_factory.mktemp("rewards")
    for kind, rows in ROWS.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(kind: str, adapter: str, name: str = "straight", **keys: Any) -> Path:
        rows = folder / f"{kind}.jsonl"
        settings = {
            **adapter_keys(adapter, folder),
            "datasets": [{"path": str(rows), "type": TYPES[kind]}],
            kind: True,
            "micro_batch_size": len(QUESTIONS),
            "max_steps": STEPS,
            "save_steps": 1,
            "learning_rate": 0.02,
        }
        config = write_yaml(folder / f"{kind} {adapter} {name}.yaml", base_model("mixtral"), rows, **settings | keys)
        result = axolotl("train", config)
        assert result.code == 0, result.output
        return config.with_suffix("")

    return run


@pytest.fixture(scope="module")
def trained(train: Callable[..., Path]) -> Callable[[str, str], Path]:
    """`trained(kind, adapter)`: the folder of the run without further settings."""
    return functools.cache(train)


def bare_model(kind: str, base: Path) -> PreTrainedModel:
    if kind == "reward_model":
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).eval()
    return AutoModelForTokenClassification.from_pretrained(base, num_labels=2).eval()


def main_loss(kind: str, model: torch.nn.Module, base: Path) -> Tensor:
    """The loss of all rows, written out."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    if kind == "reward_model":
        rewards = []
        for answer in (CHOSEN, REJECTED):
            roles = ("system", "user", "assistant")
            chats = [
                [{"role": role, "content": text} for role, text in zip(roles, (SYSTEM, question, answer))]
                for question in QUESTIONS
            ]
            ids = torch.tensor(tokenizer.apply_chat_template(chats, return_dict=False))
            rewards.append(model(input_ids=ids).logits[:, 0])
        return -F.logsigmoid(rewards[0] - rewards[1]).mean()
    ids, labels = [], []
    for question in QUESTIONS:
        row = [tokenizer.bos_token_id, *tokenizer.encode(question, add_special_tokens=False)]
        where = []
        for step, _ in STEPS_OF_ANSWER:
            row += tokenizer.encode(step + SEPARATOR, add_special_tokens=False)
            where.append(len(row) - 1)
        ids.append(row)
        labels.append(where)
    logits = model(input_ids=torch.tensor(ids)).logits[:, labels[0]]
    return F.cross_entropy(logits.flatten(0, 1), torch.tensor([x for _, x in STEPS_OF_ANSWER] * len(ids)))


@pytest.mark.matrix("loss: {kind}", "{adapter}")
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_head_and_adapter_are_trained_saved_and_loaded(
    kind: str, adapter: str, trained: Callable[[str, str], Path], base_model: Callable[[str], Path]
) -> None:
    folder = trained(kind, adapter)
    first, last = (adapter_tensors(folder / f"checkpoint-{step}") for step in (1, STEPS))
    assert any("score" in name for name in last) and first.keys() == last.keys()
    assert all(not torch.equal(first[name], last[name]) for name in last if "ptmoe" not in name)
    base = base_model("mixtral")
    saved = PeftModel.from_pretrained(bare_model(kind, base), folder / f"checkpoint-{STEPS - 1}")
    with torch.no_grad():
        loss = main_loss(kind, saved, base).item()
    assert log_history(folder)[STEPS - 1]["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(("kind", "adapter"), [(KINDS[0], "perft"), (KINDS[1], "pt_moe")])
def test_a_resumed_run_is_as_uninterrupted(
    kind: str, adapter: str, train: Callable[..., Path], trained: Callable[[str, str], Path]
) -> None:
    straight = trained(kind, adapter)
    resumed = train(kind, adapter, "resumed", resume_from_checkpoint=str(straight / f"checkpoint-{STEPS - 1}"))
    assert log_history(resumed)[-1]["loss"] == log_history(straight)[-1]["loss"]
    expected = adapter_tensors(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_tensors(resumed).items())


@pytest.mark.parametrize("kind", KINDS)
def test_router_losses_have_the_main_losss_scale(
    kind: str, train: Callable[..., Path], base_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """From a saved adapter, in four micro-batches: the head shows the scale of the main loss."""
    base = base_model("mixtral")
    torch.manual_seed(1)
    # the up-projections are 0, so that the z-loss alone moves the routers
    config = PerftConfig(rank=4, num_experts=4, router_aux_loss_coef=0.0, router_z_loss_coef=1.0)
    config.task_type = "SEQ_CLS" if kind == "reward_model" else "TOKEN_CLS"
    start = get_peft_model(bare_model(kind, base), config)
    start.save_pretrained(tmp_path)
    block = {"rank": 4, "num_experts": 4, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 1.0}
    folder = train(
        kind,
        "perft",
        "scale",
        perft=block,
        lora_model_dir=str(tmp_path),
        micro_batch_size=2,
        gradient_accumulation_steps=4,
        **SGD,
    )
    inputs: list[Tensor] = []
    for name, module in start.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    main_loss(kind, start, base).backward()
    before, after = adapter_tensors(tmp_path), adapter_tensors(folder)
    steps = {name: before[name] - after[name] for name in before}
    head = next(name for name in before if name.endswith("score.weight"))
    gradient = next(p.grad for name, p in start.named_parameters() if "score" in name and p.grad is not None)
    scale = (steps[head] * gradient).sum() / gradient.square().sum()
    torch.testing.assert_close(steps[head], scale * gradient, rtol=1e-3, atol=1e-5)
    routers = [name for name in before if "perft_router" in name]
    for i, name in enumerate(routers):
        router = before[name].clone().requires_grad_()
        tokens = torch.cat([x.flatten(0, -2) for x in inputs[i :: len(routers)]])
        z_loss = (tokens @ router.T).logsumexp(-1).square().mean() / len(routers)
        z_loss.backward()
        torch.testing.assert_close(steps[name], scale * router.grad, rtol=1e-3, atol=1e-6)
    assert log_history(folder)[0]["router_z_loss"] > 0
