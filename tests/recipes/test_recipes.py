"""Every recipe of example_yamls: Axolotl takes all its keys, its adapter holds what its header says, and it trains."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import normalize_config, validate_config
from axolotl.utils.dict import DictDefault
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl_moe_peft.host.args import CONFIGS
from axolotl_moe_peft.host.memory import estimate, total_bytes
from tests.cli import pil_images  # noqa: F401
from tests.cli.cli_helpers import AxolotlPool, Result, log_history, save_tokenizer
from tests.cli.images import save_multimodal_base, write_image_rows
from tests.moe_families import FAMILIES, tiny_family_model
from tests.published_formats import save_mxfp4
from tests.recipes.recipes import (
    FOLDER,
    RECIPES,
    ROOT,
    counts,
    expert_recipes,
    header,
    load,
    real_architecture,
    real_config,
    save_untrained_experts,
    weights_bytes,
    with_experts,
)
from tests.recipes.table import readme_table, table
from tests.tiny_models import BOS, EOS, PAD, VOCAB_SIZE

# all of this package's by `SWEEP=all`, as an estimate takes some seconds
ESTIMATED = [
    name
    for name in RECIPES
    if "GB in all" in header(name) or (os.environ.get("SWEEP") == "all" and load(name)["adapter"] in CONFIGS)
]
every_recipe = pytest.mark.parametrize("name", RECIPES)

# what the host would find on a machine with H100s
GPUS = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 4, "compute_capability": "sm_90"}
# billions of parameters, as the models' cards and papers give them
BASE_BILLIONS = {
    "allenai/OLMoE-1B-7B-0924": "6.9",
    "mistralai/Mixtral-8x7B-v0.1": "46.7",
    "Qwen/Qwen3-30B-A3B": "30.5",
    "Qwen/Qwen3-VL-30B-A3B-Instruct": "31",
    "unsloth/gpt-oss-20b-BF16": "20.9",
    "openai/gpt-oss-20b": "20.9",
    "deepseek-ai/DeepSeek-V2-Lite-Chat": "15.7",
    "zai-org/GLM-4.5-Air": "106",
    "meta-llama/Llama-3.2-1B": "1.23",
    "meta-llama/Llama-3.2-1B-Instruct": "1.23",
}
# trainable and activated parameters, as the papers' tables and formulas give them (of the prompts: the trainable
# ones); millions for PERFT
PAPERS = {
    "olmoe/1b-7b-perft-routed-*.yaml": ("8.651", "2.359"),
    "olmoe/1b-7b-perft-embedded-*.yaml": ("16.777", "2.097"),
    "olmoe/1b-7b-perft-dense-*.yaml": ("2.097", "2.097"),
    "olmoe/1b-7b-perft-single-*.yaml": ("2.097", "2.097"),
    "mixtral/8x7b-perft-routed-*.yaml": ("17.826", "5.243"),
    "mixtral/8x7b-perft-embedded-*.yaml": ("16.777", "4.194"),
    "mixtral/8x7b-perft-dense-*.yaml": ("16.777", "16.777"),
    "mixtral/8x7b-perft-single-*.yaml": ("4.194", "4.194"),
    "llama-3.2/1b-tt-lora-????.yaml": ("33920", "33920"),
    "llama-3.2/1b-pt-moe.yaml": ("80706", "80706"),
    "llama-3.2/1b-pt.yaml": ("81920", "81920"),
    "llama-3.2/1b-dpt.yaml": ("81432", "81432"),
    "llama-3.2/1b-smop.yaml": ("86018", "45058"),
}


@pytest.fixture(autouse=True)
def no_plugins() -> Iterator[None]:
    """The host as in a new process: its plugins are those of the recipe, not of the one before."""
    PluginManager.get_instance().plugins.clear()
    yield
    PluginManager.get_instance().plugins.clear()


@every_recipe
def test_axolotl_keeps_every_key_on_a_gpu_machine(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    recipe = with_experts(recipe, save_untrained_experts(recipe, tmp_path))
    cfg = DictDefault(json.loads(json.dumps(recipe)))
    prepare_plugins(cfg)
    validated = validate_config(cfg, GPUS, {"torch_version": torch.__version__.partition("+")[0]})
    for dataset in (*validated.datasets, *(validated.test_datasets or ())):
        if dataset.conversation:  # where the plugin puts them
            dataset.update({k: v for k, v in json.loads(dataset.conversation).items() if k in ("type", "expert")})
    assert lost_or_changed(recipe, validated.to_dict()) == []


def test_axolotl_keeps_every_key_of_the_readme() -> None:
    example = (ROOT / "README.md").read_text().partition("## Train your model\n\n")[2].partition("\n\nand\n")[0]
    recipe = yaml.safe_load(textwrap.dedent(example))
    cfg = DictDefault(recipe)
    prepare_plugins(cfg)
    validated = validate_config(cfg, GPUS, {"torch_version": torch.__version__.partition("+")[0]}).to_dict()
    assert lost_or_changed(recipe, validated) == []


def lost_or_changed(given: Any, kept: Any, path: str = "") -> list[str]:
    """The keys of `given` that `kept` has not, or not with the same value."""
    if isinstance(given, dict) and isinstance(kept, dict):
        pairs = [(f"{path}.{key}", value, kept.get(key)) for key, value in given.items()]
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = [(f"{path}[{i}]", *values) for i, values in enumerate(zip(given, kept))]
    else:
        return [] if given == kept else [f"{path}: {given!r} became {kept!r}"]
    return [problem for where, value, other in pairs for problem in lost_or_changed(value, other, where)]


def computed(formula: str) -> int:
    """The value of a sum of products of integers, with brackets."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            return node.value
        assert isinstance(node, ast.BinOp) and type(node.op) in (ast.Add, ast.Mult), ast.dump(node)
        left, right = value(node.left), value(node.right)
        return left + right if isinstance(node.op, ast.Add) else left * right

    return value(ast.parse(formula.strip(), mode="eval").body)


@every_recipe
def test_the_header_says_what_the_adapter_holds_on_the_real_architecture(name: str) -> None:
    stated = re.search(r"Trainable: ([\d,]+) = ([\d +*()]+); ([\d,]+) per token", header(name))
    assert stated, "the header has no `Trainable: 8,388,608 = 16 * 2 * 8 * 16 * 2048; 2,097,152 per token`"
    total, closed_form, activated = (computed(text.replace(",", "")) for text in stated.groups())
    assert (total, activated) == counts(name)
    assert closed_form == total
    assert "Checked with" in header(name)


@every_recipe
def test_the_header_says_how_large_the_weights_are_as_they_are_loaded(name: str) -> None:
    stated = re.search(r"(\d+) GB of weights", header(name))
    assert stated or load(name)["adapter"] != "perft"
    assert not stated or int(stated[1]) == round(weights_bytes(name) / 1e9)


@pytest.mark.parametrize("name", ESTIMATED)
def test_the_run_fits_the_gpus_of_its_header(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number, gigabytes = re.search(r"[Ff]or (one|\d+) GPUs? with (\d+) GB", header(name)).groups()
    monkeypatch.setenv("WORLD_SIZE", "1" if number == "one" else number)
    recipe = load(name)
    real_config(recipe).save_pretrained(tmp_path)
    recipe = with_experts(recipe, save_untrained_experts(recipe, tmp_path)) | {"base_model": str(tmp_path)}
    cfg = DictDefault(json.loads(json.dumps(recipe)))
    prepare_plugins(cfg)
    cfg = validate_config(cfg, GPUS, {"torch_version": torch.__version__.partition("+")[0]})
    normalize_config(cfg)
    parts = estimate(cfg)
    assert all(part.bytes is not None for part in parts)
    needed = total_bytes(parts)
    assert needed < (int(gigabytes) - 2) * 1e9, f"{name}: {needed / 1e9:.1f} GB"  # what CUDA takes, and fragments
    stated = re.search(r"(\d+) GB in all", header(name))
    assert not stated or int(stated[1]) == round(needed / 1e9), f"{name}: {needed / 1e9:.1f} GB"


@pytest.mark.parametrize("pattern", PAPERS)
def test_parameters_are_those_of_the_papers(pattern: str) -> None:
    recipes = [str(path.relative_to(FOLDER)) for path in FOLDER.glob(pattern)]
    assert recipes
    for name in recipes:
        found = counts(name)
        unit = (lambda n: f"{n / 1e6:.3f}") if "perft" in name else str
        assert tuple(map(unit, found)) == PAPERS[pattern], name


@every_recipe
def test_the_base_is_the_real_one_and_knows_the_recipes_kernels_and_layers(name: str) -> None:
    recipe = load(name)
    model = real_architecture(recipe)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert str(billions).startswith(BASE_BILLIONS[recipe["base_model"]])
    if recipe["attn_implementation"] == "flash_attention_2":
        assert model._supports_flash_attn and not model._compatible_flash_implementations
    if any(key.startswith("liger_") for key in recipe):
        assert model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN
    if recipe.get("fsdp_version"):
        layer = recipe["fsdp_config"]["transformer_layer_cls_to_wrap"]
        assert sum(type(m).__name__ == layer for m in model.modules()) == model.config.num_hidden_layers


def test_no_recipe_writes_where_another_does() -> None:
    folders = [load(name)["output_dir"] for name in RECIPES]
    assert len(set(folders)) == len(folders)


def test_the_readmes_table_is_that_of_the_recipes() -> None:
    assert readme_table() == table(), "write it anew: python -m tests.recipes.table"


# ---- two steps on a tiny model

STEPS = 2
# What a CPU cannot do is replaced by what it can, and what takes long by what is short. None removes a key. All the
# rest of a recipe, its adapter above all, is trained as it stands.
ON_A_CPU = {
    "plugins": ["axolotl_moe_peft.MoePeftPlugin"],
    "liger_rope": None,
    "liger_rms_norm": None,
    "liger_fused_linear_cross_entropy": None,
    "bf16": False,
    "tf32": None,
    "fsdp_version": None,
    "fsdp_config": None,
    "eot_tokens": None,  # the tiny tokenizer has only its own
}
ATTENTION_ON_A_CPU = {"flash_attention_2": "sdpa"}
SHORT = {
    "max_steps": STEPS,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "sequence_len": 256,
    "logging_steps": 1,
    "eval_batch_size": 1,
    "evals_per_epoch": None,
    "eval_steps": STEPS,
    "saves_per_epoch": None,
    "save_steps": STEPS,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def axolotl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AxolotlPool]:
    pool = AxolotlPool(tmp_path_factory.mktemp("pool"), "tests.cli.pil_images")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def trained(axolotl: AxolotlPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Result, Path]]:
    """`trained(name)`: what two steps of a recipe on a tiny base have printed, and where its adapter is."""
    folder = tmp_path_factory.mktemp("recipes")
    save_tokenizer(folder / "tokenizer")
    runs: dict[str, tuple[Result, Path]] = {}

    def train(name: str) -> tuple[Result, Path]:
        recipe = with_experts(load(name), {e: train(r)[1] for e, r in expert_recipes(load(name)).items()})
        attention = recipe["attn_implementation"]
        settings = recipe | ON_A_CPU | SHORT
        settings |= {
            "base_model": str(tiny_base(recipe, folder)),
            "tokenizer_config": str(folder / "tokenizer"),
            "dataset_prepared_path": str(folder / "prepared"),  # tokenised once for all recipes with such rows
            "attn_implementation": ATTENTION_ON_A_CPU.get(attention, attention),
        }
        del settings["output_dir"]
        if recipe.get("quantize_moe_experts"):
            settings["device_map"] = "cpu"
            settings["plugins"] = ["tests.cli.cpu_training.QuantiseExpertsOnCpu", *settings["plugins"]]
        if recipe.get("val_set_size"):
            settings["val_set_size"] = 8
        if "processor_type" in recipe:
            # the tiny processor's own, and its own tokenizer
            settings |= {"chat_template": "tokenizer_default", "tokenizer_config": None}
        for key, rows in (("datasets", 24), ("test_datasets", 4)):
            if key in recipe:
                images = "processor_type" in recipe
                settings[key] = [local(dataset, folder / key, rows, images) for dataset in recipe[key]]
        # recipes that differ in data of one type or in FSDP alone are the same run here
        run = json.dumps(settings, sort_keys=True)
        if run not in runs:
            output = folder / Path(name).stem
            config = output.with_suffix(".yaml")
            settings["output_dir"] = str(output)
            config.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
            runs[run] = axolotl("train", config), output
        return runs[run]

    return train


def tiny_base(recipe: dict[str, Any], folder: Path) -> Path:
    """The folder of a tiny random model of the family of the recipe's base."""
    # bitsandbytes packs matrices of such sizes on a CPU
    sizes = {"hidden_size": 64} if recipe.get("quantize_moe_experts") else {}
    path = folder / "-".join([recipe["base_model"].rpartition("/")[2], *map(str, sizes.values())])
    if path.exists():
        return path
    family = real_config(recipe).model_type
    if recipe.get("model_quantization_config") == "Mxfp4Config":
        save_mxfp4(path)
        save_tokenizer(path)
        return path
    if "processor_type" in recipe:
        save_multimodal_base(path)
        return path
    if family in FAMILIES:
        model = tiny_family_model(family, **sizes)
    else:  # factors and prompts need the real width
        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 1, "intermediate_size": 24, "vocab_size": VOCAB_SIZE}
        special = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
        model = AutoModelForCausalLM.from_config(real_config(recipe, **sizes, **special))
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


def local(dataset: dict[str, Any], folder: Path, rows: int, images: bool = False) -> dict[str, Any]:
    """The dataset with a few rows of its `type` in a file."""
    folder.mkdir(exist_ok=True)
    if images:
        return dataset | {"path": str(write_image_rows(folder)), "ds_type": "json", "split": "train"}
    kind = dataset["type"]
    if kind == "chat_template":
        names = dataset.get("message_property_mappings", {"role": "role", "content": "content"})

        def row(i: int) -> dict[str, Any]:
            turns = (("user", f"what is {i} + {i}?"), ("assistant", f"it is {2 * i}"))
            messages = [{names["role"]: role, names["content"]: content} for role, content in turns]
            return {dataset.get("field_messages", "messages"): messages}
    else:
        texts = {"instruction": "what is {0} + {0}?", "input": "number {0}", "output": "it is {0} + {0}"}
        names = {part: part if kind == "alpaca" else kind.get(f"field_{part}") for part in texts}

        def row(i: int) -> dict[str, Any]:
            return {names[part]: text.format(i) for part, text in texts.items() if names[part]}

    path = folder / ("alpaca.jsonl" if kind == "alpaca" else f"{Path(dataset['path']).stem}.jsonl")
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(rows)))
    # a local file has no subsets, and only this split
    return {k: v for k, v in dataset.items() if k != "name"} | {"path": str(path), "ds_type": "json", "split": "train"}


@every_recipe
def test_two_steps_on_a_tiny_model_of_the_family(name: str, trained: Callable[[str], tuple[Result, Path]]) -> None:
    result, folder = trained(name)
    assert result.code == 0, result.output
    lines = log_history(folder)
    assert len(lines) == STEPS
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["peft_type"] == load(name)["adapter"].upper()
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "adapter_model.safetensors").values())
