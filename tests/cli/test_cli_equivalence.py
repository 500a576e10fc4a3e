"""Settings of the host that must not change what is learnt: packing, accumulation, gradient checkpointing.

Every run starts from one adapter whose parameters all have gradients from the first step on (PERFT's up-projections
away from zero), and steps with SGD without clipping, so that the weights show every gradient's size.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from axolotl_moe_peft import PerftConfig, TTLoraConfig
from tests.cli.cli_helpers import AxolotlPool, adapter_tensors, log_history, tokenised, write_rows, write_yaml
from tests.tiny_models import randomise_adapters

N, K, RANK, ALPHA = 4, 2, 4, 8
# large enough to be a good part of the gradient
AUX, Z = 0.5, 0.1
STEPS = 2
PERFT = {"num_experts": N, "num_experts_per_tok": K, "rank": RANK, "alpha": ALPHA}
TT_LORA = {
    "rank": RANK,
    "alpha": ALPHA,
    "target_modules": ["q_proj", "v_proj"],
    "factors": {"q_proj": {"in": [8, 2, 2], "out": [4, 8]}},
}
ADAPTERS = ("perft", "tt_lora")


@dataclass
class Run:
    """A finished training run: its log lines and the adapter it saved."""

    lines: list[dict[str, float]]
    tensors: dict[str, Tensor]
    output: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equivalence")


@pytest.fixture(scope="module")
def rows(folder: Path) -> Path:
    """Four rows of different lengths: one batch, and together one packed row."""
    pairs = [("what is 1?", "one"), ("what is seven?", "7"), ("and?", "twenty-two"), ("what is the last one?", "n")]
    return write_rows(folder / "rows.jsonl", pairs)


@pytest.fixture(scope="module")
def equal_rows(folder: Path) -> Path:
    """Four rows with equally many tokens, equally many of them supervised."""
    return write_rows(folder / "equal_rows.jsonl", ((f"what is {i}?", f"{7 * i}!") for i in range(2, 6)))


@pytest.fixture(scope="module")
def start(folder: Path, base_model: Callable[[str], Path]) -> Callable[[str], Path]:
    """`start("perft")`: the adapter of that method that every run starts from."""

    @functools.cache
    def save(adapter: str) -> Path:
        config = (PerftConfig if adapter == "perft" else TTLoraConfig)(**_block(adapter), task_type="CAUSAL_LM")
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model("mixtral")), config)
        randomise_adapters(model)  # PERFT's
        model.save_pretrained(folder / f"start {adapter}")
        return folder / f"start {adapter}"

    return save


def _block(adapter: str) -> dict[str, Any]:
    return PERFT if adapter == "perft" else TT_LORA


@pytest.fixture(scope="module")
def train(
    axolotl: AxolotlPool,
    base_model: Callable[[str], Path],
    folder: Path,
    start: Callable[[str], Path],
    rows: Path,
    equal_rows: Path,
) -> Callable[[str, str], Run]:
    """`train(adapter, name)`: two steps with the settings of that name."""
    accumulation = {"rows": equal_rows, "aux": 0.0}
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "reentrant": {"gradient_checkpointing": True},
        "non-reentrant": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
        "packed": {"sample_packing": True, "sample_packing_eff_est": 1.0, "micro_batch_size": 1},
        "1 x 4": accumulation | {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
        "4 x 1": accumulation | {"micro_batch_size": 4, "gradient_accumulation_steps": 1},
    }

    @functools.cache
    def run(adapter: str, name: str) -> Run:
        keys = dict(settings[name])
        losses = {"router_aux_loss_coef": keys.pop("aux", AUX), "router_z_loss_coef": Z}
        block = _block(adapter) | (losses if adapter == "perft" else {})
        config = write_yaml(
            folder / f"{adapter} {name}.yaml",
            base_model("mixtral"),
            keys.pop("rows", rows),
            **{"adapter": adapter, "perft": None, adapter: block},
            lora_model_dir=str(start(adapter)),
            max_steps=STEPS,
            optimizer="sgd",
            learning_rate=0.1,
            max_grad_norm=1e6,
            **keys,
        )
        result = axolotl("train", config)
        assert result.code == 0, result.output
        lines = log_history(config.with_suffix(""))
        assert len(lines) == STEPS
        return Run(lines, adapter_tensors(config.with_suffix("")), result.output)

    return run


def assert_same(one: Run, other: Run, tolerance: float) -> None:
    for line, other_line in zip(one.lines, other.lines, strict=True):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(other_line[key], rel=tolerance), key
        for key in ("router_aux_loss", "router_z_loss", "expert_entropy", "expert_max_share", "expert_used_fraction"):
            # the host rounds them to five decimals
            assert line.get(key) == pytest.approx(other_line.get(key), abs=1.5e-5), key
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[name], rtol=0, atol=tolerance)


@pytest.mark.matrix("gradient checkpointing: {mode}", "{adapter}")
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_gradient_checkpointing_changes_nothing(mode: str, adapter: str, train: Callable[[str, str], Run]) -> None:
    checkpointed = train(adapter, mode)
    assert f'"use_reentrant": {str(mode == "reentrant").lower()}' in checkpointed.output  # what the host turned on
    assert_same(train(adapter, "plain"), checkpointed, 1e-6)  # the same operations, gradients added in another order


@pytest.mark.matrix("packing: as unpacked", "{adapter}")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_packing_changes_nothing(adapter: str, train: Callable[[str, str], Run]) -> None:
    assert_same(train(adapter, "plain"), train(adapter, "packed"), 1e-5)  # attention over one long row, not four


@pytest.mark.matrix("accumulation: 1 x 4 as 4 x 1", "{adapter}")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_accumulation_equals_one_batch(adapter: str, train: Callable[[str, str], Run]) -> None:
    assert_same(train(adapter, "4 x 1"), train(adapter, "1 x 4"), 1e-5)  # float32 sums in another order


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["plain", "packed", "1 x 4"])
def test_first_step_equals_a_plain_reference(
    name: str,
    adapter: str,
    train: Callable[[str, str], Run],
    base_model: Callable[[str], Path],
    start: Callable[[str], Path],
    rows: Path,
    equal_rows: Path,
) -> None:
    line = train(adapter, name).lines[0]
    accumulated = name == "1 x 4"
    given_rows = equal_rows if accumulated else rows
    if adapter == "perft":
        aux_coef = 0.0 if accumulated else AUX
        loss, aux, z, grad_norm = reference_step(base_model("mixtral"), start(adapter), given_rows, aux_coef)
        assert line["router_z_loss"] == pytest.approx(z, abs=2e-5)  # rounded to five decimals by the host
        assert line.get("router_aux_loss") == (None if accumulated else pytest.approx(aux, abs=2e-5))
    else:
        loss, grad_norm = tt_lora_reference_step(base_model("mixtral"), start(adapter), given_rows)
    assert line["loss"] == pytest.approx(loss, rel=1e-5)  # float32
    assert line["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)


def tt_lora_reference_step(base: Path, start: Path, rows: Path) -> tuple[float, float]:
    """(cross-entropy, norm of the cores' gradient) of the rows as one batch, row by row."""
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    base_loss = mean_loss(model, rows).item()
    tensors = {name: tensor.requires_grad_() for name, tensor in adapter_tensors(start).items()}
    for name, layer in model.named_modules():
        prefix = f"base_model.model.{name}.ttcore_"
        if f"{prefix}in_0" in tensors:
            layer.register_forward_hook(
                lambda _, args, out, prefix=prefix: out + ALPHA * contracted(tensors, prefix, args[0])
            )
    loss = mean_loss(model, rows)
    assert abs(loss.item() - base_loss) > 1e-3
    loss.backward()
    return loss.item(), torch.cat([tensor.grad.flatten() for tensor in tensors.values()]).norm().item()


def contracted(tensors: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """x (..., inputs) through one core after the other: the first has the fastest digit of the inputs, the last that
    of the outputs."""
    cores_in, cores_out = (
        [tensors[name] for name in sorted(tensors) if name.startswith(prefix + side)] for side in ("in", "out")
    )
    state = x.reshape(-1, *(core.shape[1] for core in reversed(cores_in)), 1)
    for core in cores_in:
        state = torch.einsum("...ip,piq->...q", state, core)
    for core in cores_out:
        state = torch.einsum("...p,pjq->...jq", state, core)
    return state.reshape(*x.shape[:-1], -1)


def mean_loss(model: torch.nn.Module, rows: Path) -> Tensor:
    """Cross-entropy over all supervised tokens, one row at a time."""
    total, tokens = torch.zeros(()), 0
    for row in tokenised(rows):
        labels = torch.tensor(row["labels"])
        row_logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        total = total + torch.nn.functional.cross_entropy(row_logits[:-1], labels[1:], reduction="sum")
        tokens += (labels[1:] != -100).sum()
    return total / tokens


def reference_step(base: Path, start: Path, rows: Path, aux_coef: float) -> tuple[float, float, float, float]:
    """(cross-entropy, balance loss, z-loss, norm of the adapter's gradient) of the rows as one batch, row by row."""
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    tensors = {name: tensor.requires_grad_() for name, tensor in adapter_tensors(start).items()}
    logits: dict[int, list[Tensor]] = {}

    def adapt(index: int, x: Tensor, out: Tensor) -> Tensor:
        down, up, router = (
            tensors[f"base_model.model.model.layers.{index}.mlp.perft_{part}"] for part in ("down", "up", "router")
        )
        logits.setdefault(index, []).append(x[0] @ router.T)
        weights, chosen = (x @ router.T).softmax(-1).topk(K)
        weights = weights / weights.sum(-1, keepdim=True)  # as Mixtral does
        per_token = torch.zeros(*x.shape[:-1], N).scatter(-1, chosen, weights)
        units = torch.einsum("ndr,nre,bte->btnd", up, down, x) * (ALPHA / RANK)
        return out + torch.einsum("btn,btnd->btd", per_token, units)

    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda _, args, out, index=index: adapt(index, args[0], out))
    loss = mean_loss(model, rows)
    aux = z = torch.zeros(())
    for per_row in logits.values():
        layer_logits = torch.cat(per_row)  # real tokens only: nothing was padded
        probabilities = layer_logits.softmax(-1)
        chosen = torch.nn.functional.one_hot(probabilities.topk(K).indices, N).sum(1).float()
        aux = aux + N * (chosen.mean(0) * probabilities.mean(0)).sum() / len(logits)
        z = z + layer_logits.logsumexp(-1).square().mean() / len(logits)
    (loss + aux_coef * aux + Z * z).backward()
    gradient = torch.cat([tensor.grad.flatten() for tensor in tensors.values()])
    return loss.item(), aux.item(), z.item(), gradient.norm().item()
