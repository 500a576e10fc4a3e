"""One process equals two, with DDP and with FSDP2: the log, and the adapter that is saved, resumed and started from.

On CPUs by gloo, with the patches of cpu_processes.py. Where two processes split one batch, the coefficient of the
balance loss, which is not linear in the batch, is 0. Runs that train start from a saved adapter whose parameters all
have gradients, and step with Adam with so large an epsilon that a step shows the gradient's size.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.cli.adapters import ADAPTERS, adapter_keys, dataset_keys
from tests.cli.cli_helpers import (
    CPU_PROCESSES,
    ROOT,
    AxolotlPool,
    adapter_tensors,
    log_history,
    run_command,
    write_rows,
    write_yaml,
)
from tests.tiny_adapters import BLOCKS

STEPS = 3
HANGS = 120  # s; a run takes 5
SEED = 42
SHIM, PLUGIN = "tests.cli.cpu_processes.CpuProcesses", "axolotl_moe_peft.MoePeftPlugin"
OURS = [adapter for adapter in ADAPTERS if adapter != "lora"]
FSDP2 = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "MixtralDecoderLayer",
    "reshard_after_forward": True,
    "offload_params": False,
}


def _fsdp2(state_dict_type: str, cpu_ram_efficient_loading: bool) -> dict[str, Any]:
    settings = {"state_dict_type": state_dict_type, "cpu_ram_efficient_loading": cpu_ram_efficient_loading}
    return {"fsdp_version": 2, "fsdp_config": FSDP2 | settings}


MODES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP2 full state dict": _fsdp2("FULL_STATE_DICT", False),
    "FSDP2 sharded state dict, cpu_ram_efficient_loading": _fsdp2("SHARDED_STATE_DICT", True),
}


@dataclass
class Run:
    """A finished training run."""

    folder: Path

    @property
    def lines(self) -> list[dict[str, float]]:
        return log_history(self.folder)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return adapter_tensors(self.folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with equally many tokens."""
    folder = tmp_path_factory.mktemp("processes")
    answers = ("one", "two", "six", "ten")
    write_rows(folder / "rows.jsonl", [(f"what is {i}?", answer) for i, answer in enumerate(answers)])
    return folder


@pytest.fixture(scope="module")
def write_config(
    folder: Path,
    base_model: Callable[[str], Path],
    experts: Callable[[str], Path],
    start: Callable[[str, str], Path],
) -> Callable[..., Path]:
    """`write_config(adapter, mode, name, **keys)`: 4 rows in a batch, in one process if the mode is None."""

    def write(adapter: str, mode: str | None, name: str = "", balanced: bool = False, **keys: Any) -> Path:
        rows = folder / "rows.jsonl"
        settings = {
            "plugins": [SHIM] * (mode is not None) + [PLUGIN] * (adapter != "lora"),
            **adapter_keys(adapter, experts("mixtral"), balanced),
            **dataset_keys(adapter, rows),
            "lora_model_dir": str(start("mixtral", adapter)),
            "gradient_checkpointing": True,
            "adam_epsilon": 1.0,
            "max_grad_norm": 0.0,
            "max_steps": STEPS,
            "save_steps": 1,
            "micro_batch_size": 2 if mode else 4,
            "seed": SEED,
            **MODES.get(mode, {}),
        }
        return write_yaml(folder / f"{adapter} {mode} {name}.yaml", base_model("mixtral"), rows, **settings | keys)

    return write


@pytest.fixture(scope="module")
def train(axolotl: AxolotlPool, write_config: Callable[..., Path]) -> Callable[..., Run]:
    """`train(adapter, mode, name, **keys)`: the finished run of such a configuration.

    `launcher` is what the launcher adds to the environment.
    """

    def run(adapter: str, mode: str | None, *args: Any, launcher: dict[str, str] = {}, **keys: Any) -> Run:
        config = write_config(adapter, mode, *args, **keys)
        result = axolotl("train", config, processes=mode and 2, timeout=HANGS, **launcher)
        assert result.code == 0, result.error or result.output
        return Run(config.with_suffix(""))

    return run


@pytest.fixture(scope="module")
def trained(train: Callable[..., Run]) -> Callable[[str, str | None], Run]:
    """`trained(adapter, mode)`: the run without further settings."""
    return functools.cache(train)


def assert_same(run: Run, expected: Run, rel: float = 1e-3, steps: slice = slice(None)) -> None:
    lines = expected.lines[steps]
    assert len(run.lines) == len(expected.lines)
    for line, expected_line in zip(run.lines[steps], lines):
        for key in ("loss", "grad_norm", *(key for key in expected_line if key.startswith(("router_", "expert_")))):
            # the host rounds what it logs; float32 sums in another order
            assert line[key] == pytest.approx(expected_line[key], rel=rel, abs=1e-4), key
    tensors, found = expected.tensors, run.tensors
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def frozen(name: str) -> bool:
    return "ttmoe_cores" in name


@pytest.mark.matrix("processes: 2, {mode}", "{adapter}")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_two_processes_log_and_save_what_one_does(
    adapter: str, mode: str, trained: Callable[[str, str | None], Run], start: Callable[[str, str], Path]
) -> None:
    one, two = trained(adapter, None), trained(adapter, mode)
    assert len(one.lines) == STEPS
    assert_same(two, one)
    before, saved = adapter_tensors(start("mixtral", adapter)), two.tensors
    assert saved.keys() == before.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == before[name].dtype
        assert frozen(name) == torch.equal(tensor, before[name]), name
    if adapter != "lora" or mode == "DDP":
        for name, tensor in adapter_tensors(two.folder / f"checkpoint-{STEPS}").items():
            assert torch.equal(tensor, saved[name]), name


@pytest.mark.parametrize(("adapter", "mode"), [("perft", "FSDP2 full state dict"), ("pt_moe", "DDP")])
def test_a_balance_loss_over_the_global_batch_is_that_of_one_process(
    adapter: str, mode: str, train: Callable[..., Run], experts: Callable[[str], Path]
) -> None:
    own = adapter_keys(adapter, experts("mixtral"))[adapter] | {"router_aux_loss_coef": 10.0}
    shared = own | {"router_aux_loss_scope": "global_batch"}
    of_one = train(adapter, None, f"balanced {mode}", **{adapter: own}).tensors
    of_two = train(adapter, mode, "balanced", **{adapter: shared}).tensors
    each_its_own = train(adapter, mode, "balanced each", **{adapter: own}).tensors
    routers = [name for name in of_one if "router" in name]
    assert any(not torch.allclose(each_its_own[name], of_one[name], atol=1e-5, rtol=1e-4) for name in routers)
    for name in of_one:
        torch.testing.assert_close(of_two[name], of_one[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("mode", ["DDP", "FSDP2 sharded state dict, cpu_ram_efficient_loading"])
def test_what_a_router_of_prompts_reads_is_centred_alike_in_all_processes(
    mode: str, train: Callable[..., Run]
) -> None:
    block = BLOCKS["pt_moe"][1] | {"top_k": 3, "center_router_input": True, "router_aux_loss_coef": 0.0}
    settings = {"pt_moe": block, "lora_model_dir": None}
    one = train("pt_moe", None, f"centred {mode}", **settings)
    two = train("pt_moe", mode, "centred", **settings)
    assert_same(two, one)
    mean, count = (next(t for n, t in two.tensors.items() if n.endswith(e)) for e in ("router_mean", "mean_count"))
    assert mean.norm() > 0 and count.item() == 256
    resumed = train(
        "pt_moe", mode, "centred resumed", resume_from_checkpoint=str(two.folder / "checkpoint-1"), **settings
    )
    assert_same(resumed, two, rel=0)


@pytest.mark.parametrize(
    ("adapter", "mode"),
    [
        *(
            pytest.param(adapter, mode, marks=pytest.mark.matrix("processes: resume on 2, {mode}", "{adapter}"))
            for adapter in ADAPTERS
            for mode in ("DDP", "FSDP2 full state dict")
            if (adapter in ("perft", "pt_moe") if mode == "DDP" else adapter != "lora")
        ),
        *(
            pytest.param(
                adapter,
                "FSDP2 sharded state dict, cpu_ram_efficient_loading",
                marks=pytest.mark.matrix("processes: resume on 2, FSDP2 sharded state dict", "{adapter}"),
            )
            for adapter in ("lora", "perft", "pt_moe")
        ),
    ],
)
def test_resumed_equals_straight(
    adapter: str, mode: str, train: Callable[..., Run], trained: Callable[[str, str | None], Run]
) -> None:
    straight = trained(adapter, mode)
    resumed = train(adapter, mode, "resumed", resume_from_checkpoint=str(straight.folder / f"checkpoint-{STEPS - 1}"))
    assert_same(resumed, straight, rel=0)


def test_parts_of_a_checkpoint_resume_where_a_full_state_dict_is_asked_for(
    train: Callable[..., Run], trained: Callable[[str, str | None], Run]
) -> None:
    """As with those that were written by an accelerate which does not gather adapters."""
    straight = trained("perft", "FSDP2 sharded state dict, cpu_ram_efficient_loading")
    checkpoint = str(straight.folder / f"checkpoint-{STEPS - 1}")
    resumed = train("perft", "FSDP2 full state dict", "from parts", resume_from_checkpoint=checkpoint)
    assert_same(resumed, straight, rel=0)


@pytest.mark.parametrize("adapter", ["perft", "tt_lora_moe"])
def test_a_full_state_dict_is_written_where_the_host_resumes_from_it(
    adapter: str,
    train: Callable[..., Run],
    trained: Callable[[str, str | None], Run],
    record_property: Callable[[str, Any], None],
) -> None:
    """`lora` shows where: before accelerate 1.15 it holds the first process's part alone (accelerate#4206)."""
    mode = "FSDP2 full state dict"
    straight = trained("lora", mode)
    resumed = train("lora", mode, "resumed", resume_from_checkpoint=str(straight.folder / f"checkpoint-{STEPS - 1}"))
    resumes = resumed.lines[-1]["loss"] == straight.lines[-1]["loss"]
    if resumes:
        assert_same(resumed, straight, rel=0)
    written = trained(adapter, mode).folder / f"checkpoint-{STEPS}"
    assert (written / "pytorch_model_fsdp.bin").exists() == resumes
    assert (written / "pytorch_model_fsdp_0").exists() != resumes
    lost = "not by the host: accelerate saves the first process's part of an adapter in it (accelerate#4206)"
    record_property("matrix", ["processes: resume on 2, FSDP2 full state dict", "lora", "CPU" if resumes else lost])


# as `accelerate launch` sets them by its options, or by its own configuration file
LAUNCHER = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "MixtralDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE",
    "FSDP_USE_ORIG_PARAMS": "true",
}


@pytest.mark.matrix("processes: 2, FSDP2 by accelerate's configuration", "{adapter}")
@pytest.mark.parametrize("adapter", ["perft", "tt_lora_moe"])
def test_fsdp2_of_the_launcher_is_that_of_the_yaml(
    adapter: str, train: Callable[..., Run], trained: Callable[[str, str | None], Run]
) -> None:
    run = train(adapter, "DDP", "by the launcher", launcher=LAUNCHER)
    expected = trained(adapter, "FSDP2 full state dict")
    assert_same(run, expected, rel=0)
    for kind in ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_0"):
        paths = [folder / f"checkpoint-{STEPS}" / kind for folder in (run.folder, expected.folder)]
        assert paths[0].exists() == paths[1].exists()


def test_what_the_host_does_with_fsdp2_of_the_launcher(
    axolotl: AxolotlPool, write_config: Callable[..., Path], record_property: Callable[[str, Any], None]
) -> None:
    """0.21 saves a LoRA of its own; other adapters, and with 0.19 LoRA too, are trained and then not saved."""
    result = axolotl("train", write_config("lora", "DDP", "by the launcher"), processes=2, timeout=HANGS, **LAUNCHER)
    assert result.code == 0 or "UnboundLocalError" in result.output
    cell = "CPU" if result.code == 0 else "not by the host: it fails once it has trained"
    record_property("matrix", ["processes: 2, FSDP2 by accelerate's configuration", "lora", cell])


BESIDE = {"lora_modules_to_save": ["lm_head"], "peft_trainable_token_indices": [50, 60]}


@pytest.mark.matrix("processes: 2, FSDP2 sharded state dict: lora_modules_to_save", "{adapter}")
@pytest.mark.parametrize("adapter", ["perft"])
def test_what_peft_trains_beside_an_adapter_is_in_its_checkpoints(adapter: str, train: Callable[..., Run]) -> None:
    mode = "DDP"
    keys = {**BESIDE, "lora_model_dir": None}
    sharded = _fsdp2("SHARDED_STATE_DICT", False)
    one, two = train(adapter, None, "beside", **keys), train(adapter, mode, "beside", **keys, **sharded)
    assert_same(two, one)
    for part in ("lm_head", "token_adapter"):
        assert any(part in name for name in two.tensors), part
    for step in range(1, STEPS + 1):
        saved, expected = (adapter_tensors(run.folder / f"checkpoint-{step}") for run in (two, one))
        assert saved.keys() == expected.keys()
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    checkpoint = str(two.folder / f"checkpoint-{STEPS - 1}")
    assert_same(
        train(adapter, mode, "beside, resumed", resume_from_checkpoint=checkpoint, **keys, **sharded), two, rel=0
    )


@pytest.mark.parametrize(
    ("adapter", "wrapped"),
    [
        *(
            pytest.param(adapter, False, marks=pytest.mark.matrix("processes: 2, FSDP2, each part saved", "{adapter}"))
            for adapter in OURS
        ),
        *(
            pytest.param(
                adapter, True, marks=pytest.mark.matrix("processes: 2, FSDP2 activation_checkpointing", "{adapter}")
            )
            for adapter in ("perft", "tt_lora_moe", "pt_moe")
        ),
    ],
)
def test_what_is_saved_has_each_process_part(
    adapter: str,
    wrapped: bool,
    train: Callable[..., Run],
    start: Callable[[str, str], Path],
    base_model: Callable[[str], Path],
) -> None:
    plugins = [SHIM, PLUGIN, "tests.cli.cpu_processes.FillParts"]
    mode, keys = "FSDP2 full state dict", {}
    if wrapped:  # every decoder layer, by torch
        fsdp_config = MODES[mode]["fsdp_config"] | {"activation_checkpointing": True}
        keys = {"gradient_checkpointing": False, "fsdp_config": fsdp_config}
    run = train(adapter, mode, f"parts {wrapped}", plugins=plugins, learning_rate=0.0, max_steps=1, **keys)
    for saved in (run.folder, run.folder / "checkpoint-1"):
        base = AutoModelForCausalLM.from_pretrained(base_model("mixtral"))
        loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, saved))
        assert loaded.keys() == adapter_tensors(start("mixtral", adapter)).keys()
        for name in [name for name in loaded if not name.endswith("_count")]:
            tensor = loaded[name]
            parts = torch.chunk(torch.zeros_like(tensor), 2)
            expected = torch.cat([torch.full_like(part, rank + 1) for rank, part in enumerate(parts)])
            assert torch.equal(tensor, expected), name
        size = sum(tensor.numel() for tensor in loaded.values())
        assert f": {size:,} parameters" in (saved / "README.md").read_text()


@pytest.mark.matrix("processes: 2, FSDP2 bf16 base", "{adapter}")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_two_processes_with_a_bf16_base_do_what_one_does(adapter: str, train: Callable[..., Run]) -> None:
    # a random start, too: it has to be the same in every process. The host's differs, so the control has a saved one
    start = {} if adapter == "lora" else {"lora_model_dir": None}
    one, two = (
        train(adapter, mode, "bf16", bf16=True, plugins=[SHIM] + [PLUGIN] * (adapter != "lora"), **start)
        for mode in (None, "FSDP2 full state dict")
    )
    for line, expected_line in zip(two.lines, one.lines, strict=True):
        # 8 bits of mantissa; FSDP2 casts parameters to bf16, autocast casts the operands of products
        assert line["loss"] == pytest.approx(expected_line["loss"], rel=1e-2)
        assert line["grad_norm"] == pytest.approx(expected_line["grad_norm"], rel=5e-2)
    tensors = two.tensors
    for name, tensor in one.tensors.items():
        assert tensors[name].dtype == torch.float32
        torch.testing.assert_close(tensors[name], tensor, atol=2e-3, rtol=1e-2, msg=name)


EDGES = {"DDP": "DDP", "FSDP2": "FSDP2 full state dict"}


@pytest.fixture(scope="module")
def edge_rows(folder: Path) -> Path:
    """Rows in batches of one, of which every second is the second process's.

    First the shortest row that the host keeps: of eight experts at most four have a token in it, of an adapter's two
    experts per sequence one. Then a row that is all padding. Each row has one supervised token: the host averages
    processes, `lora`'s too, and since 0.21 tokens where it accumulates.
    """
    long = list(range(40, 60))
    rows = [
        {"input_ids": long, "attention_mask": [1] * 20, "labels": [-100] * 19 + long[-1:]},
        {"input_ids": [70, 71], "attention_mask": [1, 1], "labels": [-100, 71]},
        {"input_ids": [0, 0, 0], "attention_mask": [0, 0, 0], "labels": [-100, -100, 0]},
        {"input_ids": long[::-1], "attention_mask": [1] * 20, "labels": [-100] * 19 + long[:1]},
    ]
    path = folder / "edges.jsonl"
    path.write_text("".join(json.dumps(row | {"expert_labels": [i % 2]}) + "\n" for i, row in enumerate(rows)))
    return path


@pytest.fixture(scope="module")
def train_edges(train: Callable[..., Run], edge_rows: Path) -> Callable[[str, str | None], Run]:
    @functools.cache
    def run(adapter: str, mode: str | None) -> Run:
        return train(
            adapter,
            mode,
            "edges",
            balanced=True,
            datasets=[
                {"path": str(edge_rows), "ds_type": "json"} | ({"expert": "a"} if adapter == "tt_lora_moe" else {})
            ],
            dataset_prepared_path=str(edge_rows.with_suffix(f".{adapter}.prepared")),
            shuffle_merged_datasets=False,
            curriculum_sampling=True,
            micro_batch_size=1,
            gradient_accumulation_steps=1 if mode else 2,
            max_steps=2,
        )

    return run


@pytest.mark.matrix("processes: 2, {mode}: no token for an expert, a row of padding", "{adapter}")
@pytest.mark.parametrize("mode", EDGES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_process_without_tokens_for_some_parameters(
    adapter: str, mode: str, train_edges: Callable[[str, str | None], Run]
) -> None:
    one, two = train_edges(adapter, None), train_edges(adapter, EDGES[mode])
    for line in two.lines:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float)), line
    # the same batches, so that the balance losses agree as well
    assert_same(two, one)


@pytest.mark.matrix("processes: 2, launched by axolotl train", "perft")
def test_the_real_command_trains_as_the_pool_does(
    write_config: Callable[..., Path], trained: Callable[[str, str | None], Run]
) -> None:
    config = write_config("perft", "DDP", "command")
    launch = ("--launcher", "torchrun", "--", "--standalone", "--nproc_per_node=2")
    result = run_command("axolotl", "train", str(config), *launch, **CPU_PROCESSES, PYTHONPATH=str(ROOT))
    assert result.code == 0, result.output
    assert_same(Run(config.with_suffix("")), trained("perft", "DDP"), rel=0)


@pytest.mark.parametrize(
    ("adapter", "ddp", "use_reentrant", "code"),
    [("lora", None, True, 1), ("perft", True, True, 0), ("perft", None, False, 0)],
)
def test_one_process_under_torchrun_with_reentrant_checkpointing_needs_ddp(
    adapter: str,
    ddp: bool | None,
    use_reentrant: bool,
    code: int,
    axolotl: AxolotlPool,
    write_config: Callable[..., Path],
) -> None:
    """Without it the host's DDP looks for unused parameters, which reentrant checkpointing does not allow."""
    kwargs = {"use_reentrant": use_reentrant}
    config = write_config(adapter, "DDP", f"alone {kwargs}", ddp=ddp, gradient_checkpointing_kwargs=kwargs)
    result = axolotl("train", config, processes=1, timeout=HANGS)
    assert result.code == code, result.error or result.output
    assert ("mark a variable ready only once" in result.output) == (code == 1)
