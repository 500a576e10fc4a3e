"""`rl:` with perft and tt_lora: TRL's trainers train, score with and save the adapter as they do a LoRA.

Four rows of equal length, all in one step: two micro-batches of two rows.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from axolotl_moe_peft import TTLoraConfig
from tests.cli.cli_helpers import (
    AxolotlPool,
    adapter_tensors,
    checksums,
    lines_to_worry_about,
    log_history,
    write_yaml,
)

PROMPTS = [f"what is {i}?" for i in range(4)]
CHOSEN, REJECTED = "ok", "no"
BETA = 0.1
STEPS = 2
PAIRS = [{"prompt": prompt, "chosen": CHOSEN, "rejected": REJECTED} for prompt in PROMPTS]
CHATS = [
    {
        key: [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for key, answer in (("chosen", CHOSEN), ("rejected", REJECTED))
    }
    for prompt in PROMPTS
]
# of each value of `rl:` the rows and the keys that it needs
METHODS: dict[str, tuple[list[dict[str, Any]], Any, dict[str, Any]]] = {
    "dpo": (PAIRS, {"field_prompt": "prompt"}, {"rl_beta": BETA}),
    "kto": (
        [
            {"prompt": prompt, "completion": REJECTED if i % 2 else CHOSEN, "label": not i % 2}
            for i, prompt in enumerate(PROMPTS)
        ],
        {"field_prompt": "prompt"},
        {"rl_beta": BETA, "remove_unused_columns": False},
    ),
    "grpo": (
        [{"prompt": prompt} for prompt in PROMPTS],
        None,
        {
            "micro_batch_size": 4,  # two completions of each prompt
            "trl": {
                "beta": BETA,
                "num_generations": 2,
                "max_completion_length": 6,
                "reward_funcs": ["tests.cli.rewards.share_of_a"],
            },
        },
    ),
    "orpo": (CHATS, "chat_template.argilla", {"orpo_alpha": BETA, "remove_unused_columns": False}),
    "simpo": (PAIRS, {"field_prompt": "prompt"}, {"rl_beta": BETA, "simpo_gamma": 0.5}),
}
ROUTED = {"rank": 4, "router_z_loss_coef": 0.1}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora", "perft": None, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj"]},
    "perft routed": {"perft": ROUTED},
    "perft embedded": {"perft": {"rank": 4, "variant": "embedded"}},
    "perft dense": {"perft": {"rank": 4, "variant": "dense", "num_experts": 2}},
    "tt_lora": {"adapter": "tt_lora", "perft": None, "tt_lora": {"rank": 4}},  # not zero at the start
}
CASES = [(rl, adapter) for rl in ("dpo", "kto", "grpo") for adapter in ADAPTERS]
CASES += [(rl, adapter) for rl in ("orpo", "simpo") for adapter in ("perft routed", "tt_lora")]
FIGURES = {"router_aux_loss", "router_z_loss", "expert_entropy", "expert_max_share", "expert_used_fraction"}


@dataclass
class Run:
    """A finished training run."""

    base: Path
    output_dir: Path
    output: str
    base_checksums: dict[str, str]

    @property
    def lines(self) -> list[dict[str, float]]:
        return log_history(self.output_dir)


@pytest.fixture(scope="module")
def axolotl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AxolotlPool]:
    """With what the trainers of TRL import, too."""
    pool = AxolotlPool(
        tmp_path_factory.mktemp("pool"),
        "axolotl.core.builders",
        "axolotl.core.trainers.grpo",
        "trackio",
        "trl.experimental.cpo",
        "trl.experimental.orpo",
    )
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of every method."""
    folder = tmp_path_factory.mktemp("rl")
    for rl, (rows, _, _) in METHODS.items():
        (folder / f"{rl}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def write_config(folder: Path, base_model: Callable[[str], Path]) -> Callable[..., Path]:
    """`write_config("dpo", "tt_lora", name, learning_rate=0)`"""

    def write(rl: str, adapter: str, name: str, **keys: Any) -> Path:
        _, dataset_type, of_method = METHODS[rl]
        rows = folder / f"{rl}.jsonl"
        settings = {
            "rl": rl,
            "datasets": [{"path": str(rows), "ds_type": "json", "split": "train", "type": dataset_type}],
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "max_steps": STEPS,
            "save_steps": 1,
            "learning_rate": 0.01,
        }
        return write_yaml(
            folder / f"{name}.yaml",
            base_model("mixtral"),
            rows,
            **settings | of_method | ADAPTERS.get(adapter, {"adapter": adapter, "perft": None}) | keys,
        )

    return write


@pytest.fixture(scope="module")
def trained(
    axolotl: AxolotlPool, base_model: Callable[[str], Path], write_config: Callable[..., Path]
) -> Callable[[str, str], Run]:
    """`trained("dpo", "tt_lora")`: two steps."""

    @functools.cache
    def train(rl: str, adapter: str) -> Run:
        base = base_model("mixtral")
        before = checksums(base)
        config = write_config(rl, adapter, f"{rl} {adapter}")
        result = axolotl("train", config)
        assert result.code == 0, result.output
        return Run(base, config.with_suffix(""), result.output, before)

    return train


@pytest.mark.matrix("RL: {rl}", "{adapter}")
@pytest.mark.parametrize(("rl", "adapter"), CASES)
def test_every_step_moves_the_adapter_and_nothing_else(
    rl: str, adapter: str, trained: Callable[[str, str], Run]
) -> None:
    run = trained(rl, adapter)
    assert len(run.lines) == STEPS
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in run.lines)
    first, last = (adapter_tensors(folder) for folder in (run.output_dir / "checkpoint-1", run.output_dir))
    assert first.keys() == last.keys()
    # at the first step a router behind zeros has the gradient of its losses, a LoRA's A none
    assert [name for name in last if torch.equal(first[name], last[name])] == []
    assert checksums(run.base) == run.base_checksums
    assert lines_to_worry_about(run.output) == []


@pytest.mark.matrix("RL: {rl}", "{adapter}")
@pytest.mark.parametrize(("rl", "adapter"), CASES)
def test_the_saved_adapter_is_the_trained_one(rl: str, adapter: str, trained: Callable[[str, str], Run]) -> None:
    run = trained(rl, adapter)
    assert (run.output_dir / "adapter_config.json").is_file()
    model = load(run.base, run.output_dir)
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters()}
    for name, tensor in adapter_tensors(run.output_dir).items():
        assert torch.equal(loaded[name], tensor), name
    if rl in ("dpo", "kto"):
        # what the second step saw is what the first one saved
        model = load(run.base, run.output_dir / "checkpoint-1")
        assert run.lines[1]["logps/chosen"] == pytest.approx(log_probability(model, rl), abs=1e-4)  # float32, padded


@pytest.mark.matrix("RL: {rl}", "{adapter}")
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("rl", ["dpo", "kto"])
def test_the_reference_is_the_base(rl: str, adapter: str, trained: Callable[[str, str], Run]) -> None:
    run = trained(rl, adapter)
    start, second = run.lines
    of_base = log_probability(AutoModelForCausalLM.from_pretrained(run.base), rl)
    for line in (start, second):
        reference = line["logps/chosen"] - line["rewards/chosen"] / BETA
        assert reference == pytest.approx(of_base, abs=1e-4)  # float32, padded there
    if adapter == "tt_lora":
        assert max(abs(start["rewards/chosen"]), abs(start["rewards/rejected"])) > 1e-4  # its start is not the base
    else:
        assert start["rewards/chosen"] == start["rewards/margins"] == 0
    assert second["rewards/chosen"] != 0


@pytest.mark.parametrize("rl", METHODS)
def test_the_start_is_that_of_the_seed(
    rl: str, axolotl: AxolotlPool, base_model: Callable[[str], Path], write_config: Callable[..., Path]
) -> None:
    config = write_config(rl, "tt_lora", f"{rl} seed", learning_rate=0.0, max_steps=1)
    result = axolotl("train", config)
    assert result.code == 0, result.output
    set_seed(42)
    expected = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_model("mixtral")), TTLoraConfig(rank=4, task_type="CAUSAL_LM")
    )
    parameters = {name.replace(".default", ""): p for name, p in expected.named_parameters()}
    for name, start in adapter_tensors(config.with_suffix("")).items():
        assert torch.equal(start, parameters[name]), name


@pytest.mark.parametrize("rl", METHODS)
def test_every_log_line_has_the_routers_figures(rl: str, trained: Callable[[str, str], Run]) -> None:
    lines = trained(rl, "perft routed").lines
    assert len(lines) == STEPS
    for line in lines:
        assert FIGURES <= line.keys()
        assert 0 < line["expert_entropy"] <= 1


# ------------------------------------------------------------------------------- the router losses' gradient, by hand


@pytest.fixture(scope="module")
def one_step(axolotl: AxolotlPool, write_config: Callable[..., Path]) -> Callable[[str, str, float], Run]:
    """`one_step("dpo", "reentrant", coefficient of the z-loss)`: with SGD and a learning rate of 1."""
    modes = {
        "off": {"gradient_checkpointing": False},
        "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "non-reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    }

    @functools.cache
    def train(rl: str, mode: str, coef: float) -> tuple[dict[str, float], dict[str, Tensor]]:
        keys = {"perft": {"rank": 4, "router_aux_loss_coef": 0.0, "router_z_loss_coef": coef}}
        if rl == "grpo":  # the likeliest token, which the reference knows, too
            keys["trl"] = METHODS["grpo"][2]["trl"] | {"top_k": 1, "max_completion_length": 1}
        settings = {"max_steps": 1, "optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e6} | modes[mode]
        config = write_config(rl, "perft routed", f"{rl} {mode} {coef}", **settings | keys)
        result = axolotl("train", config)
        assert result.code == 0, result.output
        return log_history(config.with_suffix(""))[0], adapter_tensors(config.with_suffix(""))

    return train


@pytest.mark.matrix("RL: {rl}", "perft routed")
@pytest.mark.parametrize(
    ("rl", "mode"),
    [("dpo", "off"), ("dpo", "reentrant"), ("dpo", "non-reentrant"), ("kto", "reentrant"), ("grpo", "non-reentrant")],
)
def test_router_losses_have_the_gradient_of_the_policys_own_tokens(
    rl: str, mode: str, one_step: Callable[..., Any], base_model: Callable[[str], Path]
) -> None:
    """References, generations, two micro-batches and recomputation neither add to it nor change its size."""
    coef = 0.5
    # up-projections are zero: without router losses a router gets no gradient, and each layer's input is the base's
    _, start = one_step(rl, "off", 0.0)
    line, tensors = one_step(rl, mode, coef)
    routers = {name: start[name].requires_grad_() for name in start if "perft_router" in name}
    z = z_loss(AutoModelForCausalLM.from_pretrained(base_model("mixtral")), rl, list(routers.values()))
    assert line["router_z_loss"] == pytest.approx(z.item(), rel=1e-5)  # float32
    gradients = torch.autograd.grad(coef * z, list(routers.values()))
    for (name, router), gradient in zip(routers.items(), gradients):
        assert gradient.norm() > 0.01
        torch.testing.assert_close(tensors[name], (router - gradient).detach(), rtol=1e-4, atol=1e-6)  # float32


def z_loss(model: PreTrainedModel, rl: str, routers: list[Tensor]) -> Tensor:
    """Mean of logsumexp(logits)^2 over all tokens of the rows and over the layers."""
    rows = [ids for ids, _ in sequences(model, rl)]
    seen: dict[int, list[Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, args, index=index: seen.setdefault(index, []).append(args[0][0]))
    with torch.no_grad():
        for ids in rows:
            model(ids)
    layers = [torch.cat(seen[index]) @ router.T for index, router in enumerate(routers)]
    return sum(logits.logsumexp(-1).square().mean() for logits in layers) / len(layers)


@torch.no_grad()
def sequences(model: PreTrainedModel, rl: str) -> list[tuple[Tensor, int]]:
    """Token ids (1, S) of every row that is trained on, and the length of its prompt."""
    tokenizer, found = AutoTokenizer.from_pretrained(model.name_or_path), []
    for row in METHODS[rl][0]:
        prompt = tokenizer(row["prompt"], return_tensors="pt").input_ids
        for key in ("chosen", "rejected", "completion"):
            if key in row:
                answer = tokenizer(row[key] + tokenizer.eos_token, return_tensors="pt").input_ids
                found.append((torch.cat([prompt, answer], 1), prompt.shape[1]))
        if rl == "grpo":
            found.append((torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], 1), prompt.shape[1]))
    return found


@torch.no_grad()
def log_probability(model: PreTrainedModel | PeftModel, rl: str) -> float:
    """Mean over the chosen (desirable) answers of the logarithm of their probability."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    values = []
    for ids, length in sequences(base, rl)[::2]:
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        values.append(log_probs.gather(-1, ids[0, 1:, None])[length - 1 :].sum())
    return torch.stack(values).mean().item()


def load(base: Path, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


# ------------------------------------------------------------------------------------------- continuing, and refusals


@pytest.mark.matrix("RL: grpo, lora_model_dir", "{adapter}")
@pytest.mark.parametrize("adapter", ["lora", "perft routed", "tt_lora"])
def test_grpo_continues_a_saved_adapter_which_is_its_reference(
    adapter: str, axolotl: AxolotlPool, trained: Callable[[str, str], Run], write_config: Callable[..., Path]
) -> None:
    given = trained("dpo", adapter).output_dir
    config = write_config("grpo", adapter, f"grpo {adapter} continued", learning_rate=0.0)
    result = axolotl("train", config, f"--lora-model-dir={given}")
    assert result.code == 0, result.output
    assert all(line["kl"] == 0 for line in log_history(config.with_suffix("")))
    expected, saved = adapter_tensors(given), adapter_tensors(config.with_suffix(""))
    assert expected.keys() == saved.keys()
    assert all(torch.equal(expected[name], saved[name]) for name in expected)


@pytest.mark.matrix(
    "RL: {rl}, lora_model_dir", "{adapter}", cell="refused: the host builds the adapter from its configuration alone"
)
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "lora"])
@pytest.mark.parametrize("rl", ["dpo", "kto"])
def test_lora_model_dir_is_refused_where_the_host_would_ignore_it(
    rl: str, adapter: str, axolotl: AxolotlPool, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(rl, adapter, f"{rl} refused", output_dir=str(tmp_path / "out"))
    result = axolotl("train", config, f"--lora-model-dir={tmp_path}")
    assert (result.code, result.tracebacks) == (1, 1), result.output
    assert (
        "`lora_model_dir` does not work" in result.error
        and f"`rl: {rl}`" in result.error
        and "Remove `lora_model_dir`" in result.error
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.matrix(
    "RL: {rl}", "{adapter}", cell="refused: its router reads the prompts of labelled rows, RL trainers pass no labels"
)
@pytest.mark.parametrize("adapter", ["tt_lora_moe", "pt_moe"])
@pytest.mark.parametrize("rl", METHODS)
def test_adapters_with_a_router_over_prompts_refuse(
    rl: str, adapter: str, axolotl: AxolotlPool, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    block = {"experts": [{"name": "a", "path": "nowhere"}]} if adapter == "tt_lora_moe" else {}
    dataset = {"path": "nowhere", "type": "chat_template"} | ({"expert": "a"} if block else {})
    keys = {adapter: block, "datasets": [dataset], "output_dir": str(tmp_path / "out")}
    config = write_config(rl, adapter, f"{rl} refused", **keys)
    result = axolotl("train", config)
    assert (result.code, result.tracebacks) == (1, 1), result.output
    assert f"`rl: {rl}` does not work with `adapter: {adapter}`" in result.error and "without labels" in result.error
    assert not (tmp_path / "out").exists()
