import json
import shlex

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file

from axolotl_moe_peft import PTMoeConfig, TTLoraMoeConfig
from axolotl_moe_peft.quickstart import heldout, models, pt_moe, recipes
from tests.cli.cli_helpers import save_tokenizer
from tests.tiny_models import tiny_model
from tests.tt_lora_moe.pools import save_experts

EXPERT_RECIPES = [f"tt_lora_{task}.yaml" for task in heldout.TASKS]


def read(name: str) -> dict:
    return yaml.safe_load((recipes.RECIPES / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["perft.yaml", *EXPERT_RECIPES, "tt_lora_moe.yaml", *pt_moe.SETTINGS.values()])
def test_the_data_of_a_recipe_are_shipped_questions_with_answers(name):
    for key in ("datasets", "test_datasets"):
        for dataset in read(name)[key]:
            for line in (recipes.ROOT / dataset["path"]).read_text(encoding="utf-8").splitlines():
                assert [message["role"] for message in json.loads(line)["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize("task", heldout.TASKS)
def test_no_heldout_question_is_trained_on(task):
    train, held_out = (
        {json.loads(line)["messages"][0]["content"] for line in path.read_text(encoding="utf-8").splitlines()}
        for path in (recipes.RECIPES / f"{task}_train.jsonl", recipes.RECIPES / f"{task}_heldout.jsonl")
    )
    assert not train & held_out


def test_the_pool_is_made_of_the_experts_that_the_quick_start_trains():
    pool = read("tt_lora_moe.yaml")
    trained = {task: read(f"tt_lora_{task}.yaml") for task in heldout.TASKS}
    assert {e["name"]: e["path"] for e in pool["tt_lora_moe"]["experts"]} == {
        task: recipe["output_dir"] for task, recipe in trained.items()
    }
    assert {recipe["base_model"] for recipe in trained.values()} == {pool["base_model"]}
    for key in ("datasets", "test_datasets"):
        assert {d["expert"]: d["path"] for d in pool[key]} == {t: r[key][0]["path"] for t, r in trained.items()}


def test_the_ablation_differs_in_the_prompt_alone_and_not_in_its_size():
    settings = {name: read(recipe) for name, recipe in pt_moe.SETTINGS.items()}
    blocks = {name: recipe.pop("pt_moe") for name, recipe in settings.items()}
    assert len({recipe.pop("output_dir") for recipe in settings.values()}) == len(settings)
    assert all(recipe == settings["PT-MoE"] for recipe in settings.values())
    assert {name: (b["num_experts"] > 1, b["rank"] is not None) for name, b in blocks.items()} == {
        "PT": (False, False),
        "DPT": (False, True),
        "SMoP": (True, False),
        "PT-MoE": (True, True),
    }
    assert len({block["init_text"] for block in blocks.values()}) == 1
    with torch.device("meta"):
        bases = [tiny_model("llama", hidden_size=576) for _ in blocks]  # SmolLM2-135M's width
        models = [peft.get_peft_model(base, PTMoeConfig(**block)) for base, block in zip(bases, blocks.values())]
    sizes = [model.get_nb_trainable_parameters()[0] for model in models]
    assert max(sizes) < 1.05 * min(sizes)


def test_another_work_dir_replaces_every_path_in_the_default_one(tmp_path):
    recipe = read("tt_lora_moe.yaml")
    moved = recipes._in_work_dir(recipe, tmp_path)
    assert recipes.WORK_DIR.name not in json.dumps(moved)
    assert moved["tt_lora_moe"]["experts"][0] == {"name": "gsm8k", "path": str(tmp_path / "tt_lora_gsm8k")}
    assert moved["datasets"] == recipe["datasets"]
    assert recipes._in_work_dir(recipe, recipes.WORK_DIR)["base_model"] == str(recipes.WORK_DIR / "dense")


def test_it_ends_with_a_command_that_the_host_takes_where_it_says(tmp_path, capsys):
    for work_dir in (recipes.WORK_DIR, tmp_path):
        recipes.show_what_is_next("perft.yaml", work_dir, work_dir / "adapter")
        said = capsys.readouterr().out
        program, command, recipe, _, folder, launcher = shlex.split(said.splitlines()[-2])
        assert (program, command, launcher) == ("axolotl", "inference", "--launcher=python")
        expected = recipes.RECIPES if work_dir == recipes.WORK_DIR else tmp_path
        assert (recipes.ROOT / recipe).resolve() == expected.resolve() / "perft.yaml"
        assert (recipes.ROOT / folder).resolve() == work_dir.resolve() / "adapter"
        assert f"in {recipes.ROOT}" in said


def test_the_loss_is_the_mean_over_all_supervised_tokens_and_the_choices_are_the_routers(tmp_path):
    torch.manual_seed(0)
    rows = []
    for prompt, answer in ((5, 3), (9, 7), (4, 1)):
        ids = torch.randint(3, 128, (1, prompt + answer))
        rows.append({"input_ids": ids, "labels": torch.cat([torch.full((1, prompt), -100), ids[:, prompt:]], dim=1)})
    base = tiny_model("llama")
    token_losses = []
    with torch.no_grad():
        for row in rows:
            logits = base(row["input_ids"]).logits[0, :-1].log_softmax(-1)
            targets = row["labels"][0, 1:]
            token_losses += [-logits[t, target].item() for t, target in enumerate(targets) if target != -100]
    loss, chosen = heldout.evaluate(base, rows)
    assert chosen == []
    assert loss == pytest.approx(sum(token_losses) / 11, rel=1e-5)  # float32 sums in another order

    pool = peft.get_peft_model(base, TTLoraMoeConfig(experts=save_experts(tmp_path), task_type="CAUSAL_LM")).eval()
    _, chosen = heldout.evaluate(pool, rows)
    own = []
    for row in rows:
        pool(**row)
        own += pool.base_model.chosen_experts["default"].tolist()
    assert chosen == own


def test_every_held_out_row_is_counted_for_the_expert_with_its_largest_share(tmp_path):
    base = tmp_path / "base"
    tiny_model("llama", max_position_embeddings=2048).save_pretrained(base)
    save_tokenizer(base)
    blocks = {"PT": {"num_experts": 1, "rank": None}, "PT-MoE": {"num_experts": 2, "rank": 4}}
    sizes = {}
    for setting, block in blocks.items():
        torch.manual_seed(0)
        model = peft.get_peft_model(
            models.load(base), PTMoeConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", **block)
        )
        if setting == "PT-MoE":
            model.base_model.measure_on([{"input_ids": torch.randint(32, 127, (1, 9))} for _ in range(8)])
        model.save_pretrained(tmp_path / setting)
        sizes[setting] = model.get_nb_trainable_parameters()[0]
    results = dict(pt_moe.measure(base, {setting: tmp_path / setting for setting in blocks}))
    assert {setting: result.parameters for setting, result in results.items()} == {"base": 0, **sizes}
    for task in heldout.TASKS:
        assert [results[setting].rows[task] for setting in ("base", "PT")] == [[], [0]]
    # with its bias at 0 the router's largest logit is that of the largest product
    states = load_file(tmp_path / "PT-MoE" / "adapter_model.safetensors")
    weight, mean = (next(t for n, t in states.items() if n.endswith(f"router_{of}")) for of in ("weight", "mean"))
    embedding, tokenizer = models.load(base).get_input_embeddings().weight, models.load_tokenizer(base)
    for task in heldout.TASKS:
        chosen = [0, 0]
        for chat in heldout.read_heldout(task):
            row = heldout.tokenize(tokenizer, *chat)
            prompt = embedding[row["input_ids"][row["labels"] == -100]].mean(0)
            chosen[int((weight @ (prompt - mean)).argmax())] += 1
        assert results["PT-MoE"].rows[task] == chosen
    assert torch.tensor([*results["PT-MoE"].rows.values()]).sum(0).min() > 0
