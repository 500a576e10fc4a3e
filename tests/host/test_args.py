"""The adapters' blocks and their checks, through Axolotl's own reading of a YAML."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault
from peft import PeftConfig

from axolotl_moe_peft import PerftConfig, PTMoeConfig, TTLoraConfig
from axolotl_moe_peft.host.saved import own_fields

PLUGIN = "axolotl_moe_peft.MoePeftPlugin"
DEFAULTS = {
    "variant": "routed",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_type": "lora",
    "rank": 16,
    "alpha": 32,
    "dropout": 0.0,
    "hidden_act": "silu",
    "norm_topk_prob": None,
    "gate_weights": "own",
    "init": "zero",
    "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.0,
    "base_router_aux_loss_coef": 0.0,
    "target_modules": None,
    "layers_to_transform": None,
}
TT_LORA_DEFAULTS = {
    "rank": 5,
    "alpha": 16,
    "dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"],
    "factors": "auto",
    "num_cores": None,
    "init": "normalized",
}
ADAPTERS = ("perft", "tt_lora")
# keys of the host and a value, with the key of the block to write instead: perft's, tt_lora's
REPLACED = {
    "lora_r": (8, ("rank", "rank")),
    "lora_alpha": (16, ("alpha", "alpha")),
    "lora_dropout": (0.05, ("dropout", "dropout")),
    "lora_target_modules": (["q_proj"], ("linear_target_modules", "target_modules")),
    "lora_target_linear": (True, ("linear_target_modules", "target_modules")),
    "peft_layers_to_transform": ([0], ("layers_to_transform", "target_modules")),
}
MEANINGLESS = {
    "lora_target_parameters": ["mlp.experts.gate_up_proj"],
    "lora_fan_in_fan_out": True,
    "lora_mlp_kernel": True,
    "lora_qkv_kernel": True,
    "lora_o_kernel": True,
    "loraplus_lr_ratio": 16,
    "peft_use_dora": True,
    "peft_use_rslora": True,
    "peft_init_lora_weights": "pissa",
    "peft_ensure_weight_tying": True,
    "relora": True,
}
QUANTISED_OTHERWISE = ("gptq",)
# blocks with a value out of range or of the wrong kind, and the key that the message must name
WRONG_VALUES: dict[str, list[dict[str, Any]]] = {
    "num_experts": [{"num_experts": 0}, {"num_experts": 2.5}, {"num_experts": "many"}],
    "num_experts_per_tok": [{"num_experts_per_tok": 0}, {"num_experts": 1, "num_experts_per_tok": 2}],
    "rank": [{"rank": 0}, {"rank": -4}, {"rank": "wide"}],
    "alpha": [{"alpha": 0}, {"alpha": -1}],
    "dropout": [{"dropout": 1.0}, {"dropout": -0.1}],
    "variant": [{"variant": "r"}],
    "expert_type": [{"expert_type": "LoRA"}],
    "hidden_act": [{"expert_type": "parallel_adapter", "hidden_act": "none"}],
    "gate_weights": [{"gate_weights": "adapter"}],
    "init": [{"init": "kaiming"}],
    "router_aux_loss_coef": [{"router_aux_loss_coef": -0.01}],
    "router_z_loss_coef": [{"router_z_loss_coef": -0.01}],
    "base_router_aux_loss_coef": [{"base_router_aux_loss_coef": -0.01}],
    "norm_topk_prob": [{"norm_topk_prob": "perhaps"}],
}
TT_LORA_WRONG_VALUES: dict[str, list[dict[str, Any]]] = {
    "rank": [{"rank": 0}, {"rank": -4}, {"rank": "wide"}],
    "alpha": [{"alpha": 0}, {"alpha": "large"}],
    "dropout": [{"dropout": 1.0}, {"dropout": -0.1}],
    "target_modules": [{"target_modules": []}],
    "factors": [
        {"factors": {"q_proj": {"in": [32]}}},
        {"factors": {"q_proj": {"in": [32], "out": [32], "rank": [4]}}},
        {"factors": {"q_proj": {"in": [1, 32], "out": [32]}}},
    ],
    "num_cores": [{"num_cores": 1}, {"num_cores": 2.5}],
    "init": [{"init": "zeros"}],
}
# blocks in which one key makes another meaningless
MEANS_NOTHING = [
    ("num_experts", {"variant": "embedded", "num_experts": 4}),
    ("num_experts", {"variant": "single", "num_experts": 1}),
    ("num_experts_per_tok", {"variant": "dense", "num_experts_per_tok": 2}),
    ("num_experts_per_tok", {"variant": "embedded", "num_experts_per_tok": 2}),
    ("norm_topk_prob", {"variant": "dense", "norm_topk_prob": False}),
    ("gate_weights", {"variant": "embedded", "gate_weights": "base"}),
    ("alpha", {"expert_type": "parallel_adapter", "alpha": 16}),
    ("hidden_act", {"expert_type": "lora", "hidden_act": "gelu"}),
    ("router_aux_loss_coef", {"variant": "dense", "router_aux_loss_coef": 0.01}),
    ("router_z_loss_coef", {"variant": "single", "router_z_loss_coef": 0.001}),
]

Load = Callable[..., DictDefault]


def keys_of(adapter: str, block: dict[str, Any] | None) -> dict[str, Any]:
    """The keys of a YAML that choose this adapter and its block."""
    return {"adapter": adapter, "perft": None, adapter: block}


def adapter_config(cfg: DictDefault) -> PeftConfig:
    """The PEFT config that the host gets from the plugin."""
    model, config = PluginManager.get_instance().plugins[PLUGIN].load_adapter(None, cfg, config_only=True)
    assert model is None
    return config


@pytest.mark.parametrize(("adapter", "defaults"), [("perft", DEFAULTS), ("tt_lora", TT_LORA_DEFAULTS)], ids=ADAPTERS)
def test_empty_block_takes_the_documented_defaults(adapter: str, defaults: dict[str, Any], load: Load) -> None:
    config = adapter_config(load(**keys_of(adapter, {})))
    assert config.peft_type == adapter.upper()
    assert {key: getattr(config, key) for key in defaults} == defaults
    assert config.task_type == "CAUSAL_LM"


def test_every_key_reaches_the_adapter(load: Load) -> None:
    block = {
        "variant": "routed",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "expert_type": "parallel_adapter",
        "rank": 5,
        "dropout": 0.1,
        "hidden_act": "gelu",
        "norm_topk_prob": False,
        "gate_weights": "base",
        "init": "paper",
        "router_aux_loss_coef": 0.0,
        "router_z_loss_coef": 0.002,
        "base_router_aux_loss_coef": 0.02,
        "target_modules": r"model\.layers\.\d+\.mlp",
        "layers_to_transform": [1],
    }
    assert block.keys() | {"alpha"} == DEFAULTS.keys()
    config = adapter_config(load(perft=block))
    assert {key: getattr(config, key) for key in block} == block
    assert adapter_config(load(perft={"alpha": 7})).alpha == 7


def test_every_key_of_tt_lora_reaches_the_adapter(load: Load) -> None:
    block = {
        "rank": 6,
        "alpha": 0.5,
        "dropout": 0.1,
        "target_modules": ["q_proj", "o_proj"],
        "factors": {"self_attn.q_proj": {"in": [8, 4], "out": [4, 8]}},
        "num_cores": 7,
        "init": "zero",
    }
    assert block.keys() == TT_LORA_DEFAULTS.keys()
    config = adapter_config(load(**keys_of("tt_lora", block)))
    assert {key: getattr(config, key) for key in block} == block
    for targets in ("all-linear", r".*layers\.0\..*q_proj"):
        assert adapter_config(load(**keys_of("tt_lora", {"target_modules": targets}))).target_modules == targets


@pytest.mark.parametrize(
    "block",
    [
        {"variant": "embedded", "rank": 8},
        {"variant": "dense", "num_experts": 3},
        {"variant": "single", "expert_type": "parallel_adapter", "hidden_act": "relu"},
        {"target_modules": ["mlp"], "layers_to_transform": 0},
        # written out, with the value that means nothing
        {"variant": "dense", "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "norm_topk_prob": None},
    ],
)
def test_blocks_that_make_sense_pass(block: dict[str, Any], load: Load) -> None:
    config = adapter_config(load(perft=block))
    assert {key: getattr(config, key) for key in block} == block


def test_command_line_reaches_into_the_block(load: Load) -> None:
    assert adapter_config(load({"perft__rank": "8"}, perft={"variant": "single"})).rank == 8
    assert adapter_config(load({"tt_lora__rank": "8"}, **keys_of("tt_lora", {"init": "zero"}))).rank == 8


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("key", REPLACED)
def test_lora_keys_are_refused_with_the_key_to_write(key: str, adapter: str, load: Load) -> None:
    value, own = REPLACED[key]
    message = f"`{key}` means nothing with `adapter: {adapter}`; write `{own[ADAPTERS.index(adapter)]}` in the "
    with pytest.raises(ValueError, match=f"{message}`{adapter}:`"):
        load(**keys_of(adapter, {}), **{key: value})


@pytest.mark.parametrize("key", MEANINGLESS)
def test_lora_keys_without_a_counterpart_are_refused(key: str, load: Load) -> None:
    with pytest.raises(ValueError, match=f"`{key}` means nothing with `adapter: perft`; remove it"):
        load(**{key: MEANINGLESS[key]})


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("key", QUANTISED_OTHERWISE)
def test_other_quantisation_than_by_bitsandbytes_is_refused(key: str, adapter: str, load: Load) -> None:
    with pytest.raises(ValueError, match=f"`{key}` does not work with `adapter: {adapter}`"):
        load(**keys_of(adapter, {}), **{key: True})


@pytest.mark.parametrize(
    ("adapter", "key", "block"),
    [("perft", key, block) for key, blocks in WRONG_VALUES.items() for block in blocks]
    + [("tt_lora", key, block) for key, blocks in TT_LORA_WRONG_VALUES.items() for block in blocks],
)
def test_wrong_values_are_refused_by_name(adapter: str, key: str, block: dict[str, Any], load: Load) -> None:
    with pytest.raises(ValueError, match=rf"1 validation error(.|\n)*{adapter}\.{key}\b"):
        load(**keys_of(adapter, block))


@pytest.mark.parametrize(("key", "block"), MEANS_NOTHING)
def test_keys_that_mean_nothing_are_refused(key: str, block: dict[str, Any], load: Load) -> None:
    with pytest.raises(ValueError, match=rf"perft\.{key}.*means nothing"):
        load(perft=block)


@pytest.mark.parametrize(
    ("adapter", "misspelt"),
    [(adapter, key) for adapter in ADAPTERS for key in ("ranks", "r", "lora_alpha")]
    + [("perft", "num_expert"), ("tt_lora", "num_core"), ("tt_lora", "layers_to_transform")],
)
def test_unknown_keys_are_refused_by_name(adapter: str, misspelt: str, load: Load) -> None:
    with pytest.raises(ValueError, match=rf"{adapter}\.{misspelt}\b"):
        load(**keys_of(adapter, {misspelt: 4}))


@pytest.mark.parametrize("block", ADAPTERS)
@pytest.mark.parametrize("adapter", ["lora", "qlora", None])
def test_block_under_another_adapter_is_refused(adapter: str | None, block: str, load: Load) -> None:
    with pytest.raises(ValueError, match=f"Write `adapter: {block}`, or remove the block"):
        keys = keys_of(block, {}) | {"adapter": adapter}
        load(**keys, lora_r=8, lora_alpha=16, lora_target_modules=["q_proj"])


@pytest.mark.parametrize(("adapter", "other"), [ADAPTERS, ADAPTERS[::-1]])
def test_one_adapters_block_under_the_other_is_refused(adapter: str, other: str, load: Load) -> None:
    with pytest.raises(ValueError, match=f"`{other}:` is given, but `adapter:` is '{adapter}'"):
        load(**{"adapter": adapter, adapter: {}, other: {}})


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_without_its_block_is_refused(adapter: str, load: Load) -> None:
    with pytest.raises(ValueError, match=f"`adapter: {adapter}` needs a `{adapter}:` block"):
        load(**keys_of(adapter, None))


def test_other_adapters_work_beside_the_plugin(load: Load) -> None:
    cfg = load(adapter="lora", perft=None, lora_r=8, lora_alpha=16, lora_target_modules=["q_proj"], load_in_8bit=True)
    plugin = PluginManager.get_instance().plugins[PLUGIN]
    assert cfg.adapter == "lora" and cfg.lora_r == 8
    assert plugin.load_adapter(None, cfg) is None
    assert plugin.add_callbacks_post_trainer(cfg, None) == []
    assert plugin.load_datasets(cfg) is None


def test_merging_is_refused(load: Load) -> None:
    with pytest.raises(ValueError, match="`axolotl merge-lora` cannot merge an adapter of type perft"):
        load({"merge_lora": True})


def test_tt_lora_is_merged_in_memory_and_in_no_other_way(load: Load) -> None:
    assert load({"merge_lora": True}, **keys_of("tt_lora", {})).merge_method == "legacy"
    assert load({"merge_lora": True, "merge_method": "legacy"}, **keys_of("tt_lora", {})).merge_method == "legacy"
    with pytest.raises(ValueError, match="`merge_method: memory_efficient` .* cannot merge .* Remove the key"):
        load({"merge_lora": True, "merge_method": "memory_efficient"}, **keys_of("tt_lora", {}))


@pytest.mark.parametrize(("adapter", "config"), [("perft", PerftConfig), ("tt_lora", TTLoraConfig)], ids=ADAPTERS)
def test_inference_needs_a_trained_adapter(adapter: str, config: type[PeftConfig], load: Load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without `lora_model_dir`"):
        load({"inference": True}, **keys_of(adapter, {}))
    config().save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    given = {"inference": True, "lora_model_dir": str(tmp_path / "adapter")}
    assert load(given, **keys_of(adapter, {})).lora_model_dir


def test_lora_model_dir_that_looks_like_a_hub_id_is_looked_for_at_once(load: Load) -> None:
    with pytest.raises(ValueError, match="lora_model_dir: there is no folder 'outputs/typo' here, and the hub"):
        load(lora_model_dir="outputs/typo")


@pytest.mark.parametrize("folder", ["outputs/typo", "./outputs/typo", "outputs/run/typo"])
def test_base_model_that_is_no_folder_here_is_named(
    folder: str, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"base_model: there is no folder '{folder}' here, and the hub"):
        load(base_model=folder)


def test_experts_path_that_looks_like_a_hub_id_is_looked_for_at_once(load: Load) -> None:
    experts = {"experts": [{"name": "a", "path": "outputs/typo"}]}
    with pytest.raises(ValueError, match=r"tt_lora_moe.experts: a \(outputs/typo\).*there is no such folder here"):
        datasets = [{"path": "rows.jsonl", "type": "chat_template", "expert": "a"}]
        load(datasets=datasets, **keys_of("tt_lora_moe", experts))


@pytest.mark.parametrize("folder", ["outputs/run/final", "./adapter", "/adapter", "adapter", "../adapter"])
def test_lora_model_dir_on_disk_must_exist(folder: str, load: Load) -> None:
    with pytest.raises(ValueError, match="lora_model_dir.*holds no adapter_config.json"):
        load(lora_model_dir=folder)


@pytest.mark.parametrize("key", ["num_experts", "alpha", "variant", "gate_weights", "norm_topk_prob"])
def test_lora_model_dir_must_agree_with_the_block(key: str, load: Load, tmp_path: Path) -> None:
    saved = {"num_experts": 8, "alpha": 16, "variant": "dense", "gate_weights": "base", "norm_topk_prob": True}[key]
    PerftConfig(**{key: saved}).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=rf"{key}: .* was made with {saved!r}"):
        load(lora_model_dir=str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("key", "saved"),
    [
        ("rank", 8),
        ("alpha", 4),
        ("target_modules", "all-linear"),
        ("factors", {"q_proj": {"in": [32], "out": [32]}}),
        ("num_cores", 4),
    ],
)
def test_lora_model_dir_must_agree_with_the_block_of_tt_lora(key: str, saved: Any, load: Load, tmp_path: Path) -> None:
    TTLoraConfig(**{key: saved}, dropout=0.1, init="zero").save_pretrained(tmp_path / "adapter")  # these may differ
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=f"{key}: .* was made with {re.escape(repr(saved))}"):
        load(**keys_of("tt_lora", {}), lora_model_dir=str(tmp_path / "adapter"))
    assert load(**keys_of("tt_lora", {key: saved}), lora_model_dir=str(tmp_path / "adapter")).lora_model_dir


def test_lora_model_dir_may_differ_in_what_shapes_training(load: Load, tmp_path: Path) -> None:
    PerftConfig(router_aux_loss_coef=0.1, router_z_loss_coef=0.1).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    cfg = load(lora_model_dir=str(tmp_path / "adapter"), perft={"dropout": 0.1, "base_router_aux_loss_coef": 0.01})
    assert cfg.perft.dropout == 0.1


@pytest.mark.parametrize("auto", [False, True], ids=["resume_from_checkpoint", "auto_resume_from_checkpoints"])
@pytest.mark.parametrize(
    ("config", "block"),
    [
        (PerftConfig(alpha=16), {}),
        (PerftConfig(num_experts_per_tok=1), {}),
        (PerftConfig(gate_weights="base"), {}),
        (PTMoeConfig(num_experts=3, top_k=2), {"num_experts": 3, "top_k": 1}),
        (PTMoeConfig(router_input="sequence"), {}),
        (TTLoraConfig(rank=8), {}),
    ],
    ids=["alpha", "num_experts_per_tok", "gate_weights", "top_k", "router_input", "rank"],
)
def test_a_run_resumes_only_the_adapter_that_it_was(
    config: PeftConfig, block: dict[str, Any], auto: bool, load: Load, tmp_path: Path
) -> None:
    folder = tmp_path / "out" / "checkpoint-3"
    config.save_pretrained(folder)
    (folder / "adapter_model.safetensors").touch()
    adapter = config.peft_type.value.lower()
    given = {"auto_resume_from_checkpoints": True} if auto else {"resume_from_checkpoint": str(folder)}
    before = (folder / "adapter_config.json").read_text()
    with pytest.raises(ValueError, match=rf"{next(iter(given))}\).* was made with"):
        load(**keys_of(adapter, block), **given)
    assert (folder / "adapter_config.json").read_text() == before
    made_with = {key: getattr(config, key) for key in own_fields(type(config)) if key not in config.idle_fields}
    assert load(**keys_of(adapter, made_with), **given)


@pytest.mark.parametrize("key", ["resume_from_checkpoint", "lora_model_dir"])
def test_a_run_may_move_ranks_in_another_way_and_not_in_another_room(key: str, load: Load, tmp_path: Path) -> None:
    block = {"variant": "embedded", "rank": 3}
    PerftConfig(**block, rank_allocation={"score": "gate", "max_rank": 5}).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    moves = {"score": "saliency", "max_rank": 5, "every_steps": 7}
    assert load(**keys_of("perft", block | {"rank_allocation": moves}), **{key: str(tmp_path)})
    for moves in ({"score": "gate", "max_rank": 6}, None):
        with pytest.raises(ValueError, match=rf"the block says rank_allocation: .*\({key}\) was made with"):
            load(**keys_of("perft", block | {"rank_allocation": moves}), **{key: str(tmp_path)})


def test_a_checkpoint_to_resume_from_must_be_there(load: Load) -> None:
    with pytest.raises(ValueError, match="resume_from_checkpoint: there is no folder 'outputs/typo'"):
        load(resume_from_checkpoint="outputs/typo")
    assert load(auto_resume_from_checkpoints=True)  # the first run has none


@pytest.mark.parametrize("adapter", ["perft", "tt_lora"])
def test_target_modules_that_are_no_regular_expression_are_refused_by_name(adapter: str, load: Load) -> None:
    with pytest.raises(ValueError, match=rf"{adapter}.target_modules: '\(q_proj' is no regular expression"):
        load(**keys_of(adapter, {"target_modules": "(q_proj"}))


@pytest.mark.parametrize("adapter", ["perft", "tt_lora", "pt_moe"])
def test_what_peft_trains_beside_the_adapter_reaches_its_config(adapter: str, load: Load) -> None:
    cfg = load(**keys_of(adapter, {}), lora_modules_to_save=["lm_head"], peft_trainable_token_indices=[3])
    config = adapter_config(cfg)
    assert list(config.modules_to_save) == ["lm_head"] and list(config.trainable_token_indices) == [3]


def test_datasets_of_other_adapters_may_have_keys_of_ours(load: Load) -> None:
    datasets = [{"path": "rows.jsonl", "type": "chat_template", "expert": "theirs"}]
    assert load(adapter="lora", perft=None, lora_r=8, lora_alpha=8, lora_target_linear=True, datasets=datasets)
    with pytest.raises(ValueError, match=r"datasets\[0\].expert means nothing with `adapter: perft`"):
        load(datasets=datasets)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("rl", ["dpo", "ipo", "kto"])
def test_preference_trainers_refuse_lora_model_dir(rl: str, adapter: str, load: Load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`lora_model_dir` does not work .* `rl: {rl}`.*Remove `lora_model_dir`"):
        load(**keys_of(adapter, {}), rl=rl, lora_model_dir=str(tmp_path), remove_unused_columns=False)


@pytest.mark.parametrize(
    "keys",
    [
        {"rl": "dpo", "dpo_use_liger_kernel": True},
        {"rl": "grpo", "trl": {"use_liger_loss": True, "num_generations": 2}, "micro_batch_size": 2},
    ],
    ids=["dpo", "grpo"],
)
def test_liger_losses_of_rl_are_refused_where_router_losses_act(keys: dict[str, Any], load: Load) -> None:
    key = "dpo_use_liger_kernel" if "dpo_use_liger_kernel" in keys else "trl.use_liger_loss"
    with pytest.raises(ValueError, match=f"`{key}` does not work .* set perft.router_aux_loss_coef: 0.0\\."):
        load(**keys)
    with pytest.raises(ValueError, match=f"`{key}` .* 0.0 and perft.router_z_loss_coef: 0.0\\."):
        load(**keys, perft={"router_z_loss_coef": 0.1})
    for block in ({"router_aux_loss_coef": 0.0}, {"variant": "dense"}):
        assert load(**keys, perft=block).rl
    assert load(**keys, **keys_of("tt_lora", {})).rl


@pytest.mark.matrix("processes: 2, DeepSpeed", "tt_lora_moe", cell="refused: its checkpoints lack the frozen experts")
@pytest.mark.parametrize("deepspeed", ["zero2.json", {"zero_optimization": {"stage": 3}}], ids=["path", "dict"])
def test_deepspeed_is_refused_where_the_adapter_has_frozen_parts(deepspeed: str | dict[str, Any], load: Load) -> None:
    block = {"experts": [{"name": "a", "path": "./a"}]}
    datasets = [{"path": "rows.jsonl", "type": "chat_template", "expert": "a"}]
    with pytest.raises(ValueError, match="`deepspeed` does not work .* `fsdp_version: 2`"):
        load(**keys_of("tt_lora_moe", block), datasets=datasets, deepspeed=deepspeed)


def test_a_report_needs_evaluation_data_and_a_router(load: Load) -> None:
    report = {"perft": {"routing_report": True}}
    with pytest.raises(ValueError, match="perft.routing_report: true needs evaluation data"):
        load(**report, val_set_size=0)
    assert load(**report, val_set_size=0.1).perft.routing_report is True
    tests = [{"path": "more.jsonl", "type": "chat_template", "split": "train"}]
    assert load(**report, val_set_size=0, test_datasets=tests).perft.routing_report is True
    with pytest.raises(ValueError, match="tt_lora.routing_report: a TT-LoRA has no router, so that there is nothing"):
        load(adapter="tt_lora", perft=None, tt_lora=report["perft"], val_set_size=0.1)
