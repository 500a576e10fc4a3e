"""Losses that Axolotl computes outside the model leave the router losses the main loss's scale."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.utils.schemas.config import AxolotlInputConfig

from tests.cli.cli_helpers import AxolotlPool, adapter_tensors, log_history, write_rows, write_yaml

# those of the installed host; the rows have equally many labels, so that accumulation must not show
LOSSES = {"own": {}} | {k: {k: True} for k in ("use_eaft", "use_dft") if k in AxolotlInputConfig.model_fields}
PERFT = {"num_experts": 4, "num_experts_per_tok": 2, "rank": 4, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 1.0}


@pytest.fixture(scope="module")
def train(
    axolotl: AxolotlPool, base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`train(adapter, loss, accumulate)`: the folder of one step over eight rows, with SGD of rate 1."""
    folder = tmp_path_factory.mktemp("losses")
    rows = write_rows(folder / "rows.jsonl", ((f"what is {i}?", "ok") for i in range(8)))

    @functools.cache
    def run(adapter: str, loss: str, accumulate: int, coef: float = 1.0) -> Path:
        keys: dict[str, Any] = {"perft": PERFT | {"router_z_loss_coef": coef}}
        if adapter == "pt_moe":
            keys = {"adapter": adapter, "perft": None, "pt_moe": {"num_virtual_tokens": 4, "rank": 2}}
        config = write_yaml(
            folder / f"{adapter} {loss} {accumulate} {coef}.yaml",
            base_model("mixtral"),
            rows,
            **keys | LOSSES[loss],
            micro_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            optimizer="sgd",
            learning_rate=1.0,
            max_grad_norm=1e9,
        )
        result = axolotl("train", config)
        assert result.code == 0, result.output
        return config.with_suffix("")

    return run


def z_step(train: Callable[..., Path], loss: str, accumulate: int) -> torch.Tensor:
    """How the z-loss moves the routers, which it alone does: the up-projections are 0."""
    ends = [adapter_tensors(train("perft", loss, accumulate, coef)) for coef in (1.0, 0.0)]
    return torch.cat([(ends[0][n] - ends[1][n]).flatten() for n in ends[0] if "perft_router" in n])


@pytest.mark.matrix("loss: {loss}", "perft")
@pytest.mark.parametrize("loss", LOSSES)
def test_accumulation_does_not_change_the_router_losses(loss: str, train: Callable[..., Path]) -> None:
    reference = z_step(train, "own", 1)
    assert reference.norm() > 0.01
    torch.testing.assert_close(z_step(train, loss, 4), reference, rtol=1e-3, atol=1e-6)


@pytest.mark.matrix("loss: {loss}", "pt_moe")
@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "own"])
def test_prompts_are_chosen_as_with_the_models_own_loss(loss: str, train: Callable[..., Path]) -> None:
    """Their labels tell where the prompts end although the model does not get them."""
    figures = [
        {key: value for key, value in log_history(train("pt_moe", name, 1))[0].items() if key.startswith("expert_")}
        for name in ("own", loss)
    ]
    assert figures[0] and figures[0] == pytest.approx(figures[1], rel=1e-4)


def test_a_row_without_a_prompt_is_found_before_training(
    axolotl: AxolotlPool, base_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    answer, question = {"label": True, "text": "ok"}, {"label": False, "text": "what is it?"}
    segments = [[question, answer]] * 3 + [[answer]] + [[question, answer]] * 4
    rows.write_text("".join(json.dumps({"segments": row}) + "\n" for row in segments))
    keys = {"adapter": "pt_moe", "perft": None, "pt_moe": {"num_virtual_tokens": 4, "rank": 2}}
    keys["datasets"] = [{"path": str(rows), "type": "input_output"}]
    result = axolotl("train", write_yaml(tmp_path / "run.yaml", base_model("llama"), rows, **keys))
    assert result.code != 0
    assert "1 of 8 rows begin with a supervised token" in result.output
    assert "router_input: sequence" in result.output
