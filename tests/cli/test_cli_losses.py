"""Losses that Axolotl computes outside the model leave the router losses the main loss's scale."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.utils.schemas.config import AxolotlInputConfig

from tests.cli.cli_helpers import AxolotlPool, adapter_tensors, log_history, write_rows, write_yaml

OURS = "axolotl_moe_peft.MoePeftPlugin"
KD = {
    "plugins": [OURS, "axolotl.integrations.kd.KDPlugin"],
    "kd_trainer": True,
    "kd_ce_alpha": 0.5,
    "kd_alpha": 0.5,
    "kd_temperature": 1.0,
}
DIFFUSION = {
    "plugins": [OURS, "axolotl.integrations.diffusion.DiffusionPlugin"],
    # every token of an answer is masked, so that nothing is random
    "diffusion": {"mask_token_id": 5, "eps": 1.0, "generate_samples": False},
}
# those of the installed host; the rows have equally many labels, so that accumulation must not show
LOSSES = {"own": {}} | {k: {k: True} for k in ("use_eaft", "use_dft") if k in AxolotlInputConfig.model_fields}
LOSSES["kd_trainer"] = KD
# of each of a row's 15 tokens the two best, by a teacher, and their log-probabilities
TEACHER = {"target_token_ids": [[40, 50]] * 15, "logprobs": [[-0.3, -1.5]] * 15}
PERFT = {"num_experts": 4, "num_experts_per_tok": 2, "rank": 4, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 1.0}


@pytest.fixture(scope="module")
def distilling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AxolotlPool]:
    """For distillation, without compiling, which takes longer than running."""
    pool = AxolotlPool(tmp_path_factory.mktemp("pool"), "tests.cli.kd_arguments", TORCHDYNAMO_DISABLE="1")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def train(
    axolotl: AxolotlPool,
    distilling: AxolotlPool,
    base_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """`train(adapter, loss, accumulate)`: the folder of one step over eight rows, with SGD of rate 1."""
    folder = tmp_path_factory.mktemp("losses")
    rows = write_rows(folder / "rows.jsonl", ((f"what is {i}?", "ok") for i in range(8)))
    taught = folder / "taught.jsonl"
    taught.write_text("".join(json.dumps(json.loads(line) | TEACHER) + "\n" for line in rows.read_text().splitlines()))

    @functools.cache
    def run(adapter: str, loss: str, accumulate: int, coef: float = 1.0, pad: bool | None = None) -> Path:
        keys: dict[str, Any] = {"perft": PERFT | {"router_z_loss_coef": coef}}
        if adapter == "pt_moe":
            keys = {"adapter": adapter, "perft": None, "pt_moe": {"num_virtual_tokens": 4, "rank": 2}}
        if adapter == "tt_lora":
            keys = {"adapter": adapter, "perft": None, "tt_lora": {"rank": 2}}
        if loss == "kd_trainer":
            keys["datasets"] = [{"path": str(taught), "type": "axolotl.integrations.kd.chat_template"}]
        config = write_yaml(
            folder / f"{adapter} {loss} {accumulate} {coef} {pad}.yaml",
            base_model("mixtral"),
            rows,
            **keys | {**LOSSES, "diffusion": DIFFUSION}[loss],
            pad_to_sequence_len=pad,
            micro_batch_size=8 // accumulate,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            optimizer="sgd",
            learning_rate=1.0,
            max_grad_norm=1e9,
        )
        result = (distilling if loss == "kd_trainer" else axolotl)("train", config)
        assert result.code == 0, result.output
        return config.with_suffix("")

    return run


def z_step(train: Callable[..., Path], loss: str, accumulate: int, **keys: Any) -> torch.Tensor:
    """How the z-loss moves the routers, which it alone does: the up-projections are 0."""
    ends = [adapter_tensors(train("perft", loss, accumulate, coef, **keys)) for coef in (1.0, 0.0)]
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


@pytest.mark.matrix("loss: {loss}", "tt_lora")
@pytest.mark.parametrize("loss", [*(name for name in LOSSES if name != "own"), "diffusion"])
def test_an_adapter_without_a_router_trains(loss: str, train: Callable[..., Path]) -> None:
    assert log_history(train("tt_lora", loss, 1))[0]["grad_norm"] > 0


@pytest.mark.matrix("loss: diffusion", "perft")
def test_padding_does_not_count_where_the_trainer_makes_masks_of_pairs(train: Callable[..., Path]) -> None:
    step = z_step(train, "diffusion", 1)
    assert step.norm() > 0.01
    torch.testing.assert_close(z_step(train, "diffusion", 1, pad=True), step, rtol=1e-3, atol=1e-6)


def test_diffusion_with_accumulation_and_router_losses_is_refused(
    axolotl: AxolotlPool, base_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [("what is it?", "ok")] * 4)
    keys = DIFFUSION | {"perft": PERFT | {"router_z_loss_coef": 1.0}, "gradient_accumulation_steps": 2}
    result = axolotl("train", write_yaml(tmp_path / "run.yaml", base_model("mixtral"), rows, **keys))
    assert result.code != 0
    assert "`gradient_accumulation_steps: 2` does not work with `adapter: perft` and `diffusion`" in result.output


@pytest.mark.matrix("loss: diffusion", "pt_moe", cell="refused: no room for a prompt in masks of pairs of tokens")
def test_diffusion_by_its_plugin_alone_is_refused_for_prompts(
    axolotl: AxolotlPool, base_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [("what is it?", "ok")] * 4)
    keys = {"plugins": DIFFUSION["plugins"], "adapter": "pt_moe", "perft": None, "pt_moe": {}}
    result = axolotl("train", write_yaml(tmp_path / "run.yaml", base_model("mixtral"), rows, **keys))
    assert result.code != 0
    assert "does not work with `adapter: pt_moe`: it tells of every pair of tokens" in result.output
