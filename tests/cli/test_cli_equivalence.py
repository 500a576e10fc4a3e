"""Settings of the host that must not change what is learnt, for every adapter and the host's own LoRA beside them.

Every run starts from one adapter whose parameters all have gradients from the first step on (up-projections away from
zero), and steps with SGD without clipping, so that the weights show every gradient's size. What is random (noise,
dropout) is off.
"""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.cli.adapters import ADAPTERS, adapter_keys, dataset_keys
from tests.cli.cli_helpers import AxolotlPool, adapter_tensors, log_history, tokenised, write_rows, write_yaml
from tests.tiny_adapters import ALPHA, AUX, RANK, K, N, Z

STEPS = 2
CHECKPOINTING = {"gradient_checkpointing": True}
REENTRANT = CHECKPOINTING | {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
PACKED = {"sample_packing": True, "sample_packing_eff_est": 1.0, "micro_batch_size": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"save_steps": 1},
    # by name: Axolotl's default is the one before 0.20 and the other since
    "reentrant": REENTRANT,
    "non-reentrant": CHECKPOINTING | {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "hidden_states": CHECKPOINTING
    | {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "activation_offloading": "hidden_states"},
    "packed": PACKED,
    "packed, reentrant": PACKED | REENTRANT,
    "1 x 4": {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
    "4 x 1": {},
    "eager attention": {"attn_implementation": "eager"},
    "eager": {"experts_implementation": "eager"},
    "batched_mm": {"experts_implementation": "batched_mm"},
    "grouped_mm": {"experts_implementation": "grouped_mm"},
    "bf16": {
        "bf16": True,
        "plugins": ["axolotl_moe_peft.MoePeftPlugin", "tests.cli.cpu_training.UseCpu"],
    },
}


@dataclass
class Run:
    """A finished training run: its log lines and the adapter it saved."""

    config: Path
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
def train(
    axolotl: AxolotlPool,
    base_model: Callable[[str], Path],
    folder: Path,
    experts: Callable[[str], Path],
    start: Callable[[str, str], Path],
    rows: Path,
    equal_rows: Path,
) -> Callable[[str, str], Run]:
    """`train(adapter, name)`: two steps with the settings of that name."""

    @functools.cache
    def run(adapter: str, name: str) -> Run:
        accumulation = name in ("1 x 4", "4 x 1")
        given_rows = equal_rows if accumulation else rows
        keys = adapter_keys(adapter, experts("mixtral"), balanced=not accumulation) | dataset_keys(adapter, given_rows)
        config = write_yaml(
            folder / f"{adapter} {name}.yaml",
            base_model("mixtral"),
            given_rows,
            **keys,
            lora_model_dir=str(start("mixtral", adapter)),
            max_steps=STEPS,
            optimizer="sgd",
            learning_rate=0.1,
            max_grad_norm=1e6,
            **SETTINGS[name],
        )
        result = axolotl("train", config)
        assert result.code == 0, result.output
        lines = log_history(config.with_suffix(""))
        assert len(lines) == STEPS
        return Run(config, lines, adapter_tensors(config.with_suffix("")), result.output)

    return run


def assert_same(one: Run, other: Run, tolerance: float) -> None:
    for line, other_line in zip(one.lines, other.lines, strict=True):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(other_line[key], rel=tolerance), key
        figures = {key for key in line if key.startswith(("router_", "base_router_", "expert_"))}
        assert figures == {key for key in other_line if key.startswith(("router_", "base_router_", "expert_"))}
        for key in figures:
            # the host rounds them to five decimals
            assert line[key] == pytest.approx(other_line[key], abs=max(tolerance, 1.5e-5)), key
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[name], rtol=0, atol=tolerance)


every_adapter = pytest.mark.parametrize("adapter", ADAPTERS)


@pytest.mark.matrix("gradient checkpointing: {mode}", "{adapter}")
@every_adapter
@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_gradient_checkpointing_changes_nothing(mode: str, adapter: str, train: Callable[[str, str], Run]) -> None:
    checkpointed = train(adapter, mode)
    assert f'"use_reentrant": {str(mode == "reentrant").lower()}' in checkpointed.output  # what the host turned on
    assert_same(train(adapter, "plain"), checkpointed, 1e-6)  # the same operations, gradients added in another order


@pytest.mark.matrix("gradient checkpointing: activation_offloading: hidden_states", "{adapter}")
@every_adapter
def test_offloading_changes_nothing(adapter: str, train: Callable[[str, str], Run]) -> None:
    assert_same(train(adapter, "plain"), train(adapter, "hidden_states"), 1e-6)  # as above


@pytest.mark.matrix("packing: as padded rows", "{adapter}")
@every_adapter
@pytest.mark.parametrize("name", ["packed", "packed, reentrant"])
def test_packing_changes_nothing(name: str, adapter: str, train: Callable[[str, str], Run]) -> None:
    if adapter == "pt_moe":
        assert train(adapter, "plain").lines[0]["expert_used_fraction"] > 1 / 3  # several prompts in one batch
    assert_same(train(adapter, "plain"), train(adapter, name), 1e-5)  # attention over one long row, not four


@pytest.mark.matrix("accumulation: 1 x 4 as 4 x 1", "{adapter}")
@every_adapter
def test_accumulation_equals_one_batch(adapter: str, train: Callable[[str, str], Run]) -> None:
    assert_same(train(adapter, "4 x 1"), train(adapter, "1 x 4"), 1e-5)  # float32 sums in another order


@pytest.mark.matrix("attention: eager as sdpa", "{adapter}")
@every_adapter
def test_attention_implementations_agree(adapter: str, train: Callable[[str, str], Run]) -> None:
    assert_same(train(adapter, "plain"), train(adapter, "eager attention"), 1e-5)  # float32 sums in another order


@pytest.mark.matrix("experts_implementation: {name} as grouped_mm", "{adapter}")
@every_adapter
@pytest.mark.parametrize("name", ["eager", "batched_mm"])
def test_experts_implementations_agree(name: str, adapter: str, train: Callable[[str, str], Run]) -> None:
    assert_same(train(adapter, "grouped_mm"), train(adapter, name), 1e-5)  # float32 sums in another order


@pytest.mark.matrix("precision: bf16 as float32", "{adapter}")
@every_adapter
def test_bf16_is_near_float32(adapter: str, train: Callable[[str, str], Run]) -> None:
    exact, rounded = train(adapter, "plain"), train(adapter, "bf16")
    for line, rounded_line in zip(exact.lines, rounded.lines, strict=True):
        for key in ("loss", "grad_norm"):
            assert rounded_line[key] == pytest.approx(line[key], rel=0.03), key  # bf16 has three digits
    for name, tensor in exact.tensors.items():
        assert rounded.tensors[name].dtype == torch.float32
        torch.testing.assert_close(rounded.tensors[name], tensor, rtol=0, atol=0.01)


@pytest.mark.matrix("resume: as uninterrupted", "{adapter}")
@every_adapter
def test_resuming_changes_nothing(
    adapter: str, train: Callable[[str, str], Run], axolotl: AxolotlPool, folder: Path
) -> None:
    straight, resumed = train(adapter, "plain"), folder / f"resumed {adapter}"
    shutil.copytree(straight.config.with_suffix("") / "checkpoint-1", resumed / "checkpoint-1")
    result = axolotl(
        "train", straight.config, f"--output-dir={resumed}", f"--resume-from-checkpoint={resumed / 'checkpoint-1'}"
    )
    assert result.code == 0, result.output
    again = Run(straight.config, log_history(resumed), adapter_tensors(resumed), result.output)
    assert_same(straight, again, 0.0)  # the same operations on the same numbers


@pytest.mark.parametrize("adapter", ["perft", "tt_lora"])
@pytest.mark.parametrize("name", ["plain", "packed", "1 x 4"])
def test_first_step_equals_a_plain_reference(
    name: str,
    adapter: str,
    train: Callable[[str, str], Run],
    base_model: Callable[[str], Path],
    start: Callable[[str, str], Path],
    rows: Path,
    equal_rows: Path,
) -> None:
    line = train(adapter, name).lines[0]
    accumulated = name == "1 x 4"
    given_rows = equal_rows if accumulated else rows
    if adapter == "perft":
        aux_coef = 0.0 if accumulated else AUX
        loss, aux, z, grad_norm = reference_step(
            base_model("mixtral"), start("mixtral", adapter), given_rows, aux_coef
        )
        assert line["router_z_loss"] == pytest.approx(z, abs=2e-5)  # rounded to five decimals by the host
        assert line.get("router_aux_loss") == (None if accumulated else pytest.approx(aux, abs=2e-5))
    else:
        loss, grad_norm = tt_lora_reference_step(base_model("mixtral"), start("mixtral", adapter), given_rows)
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
