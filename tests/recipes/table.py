"""The table of recipes in example_yamls/README.md: `python -m tests.recipes.table` writes it anew."""

from __future__ import annotations

from typing import Any

from tests.recipes.recipes import FOLDER, RECIPES, counts, load, weights_bytes

README = FOLDER / "README.md"
BEGIN, END = "<!-- recipes: written by python -m tests.recipes.table -->", "<!-- recipes end -->"
_VARIANTS = {"routed": "PERFT-R", "embedded": "PERFT-E", "dense": "PERFT-D", "single": "PERFT-S"}


def method(recipe: dict[str, Any]) -> str:
    """The recipe's method and its sizes in a few words."""
    if recipe["adapter"] == "lora":
        return f"LoRA, rank {recipe['lora_r']}"
    block = recipe[recipe["adapter"]]
    if recipe["adapter"] == "perft":
        sizes = {"N": block.get("num_experts"), "K": block.get("num_experts_per_tok"), "rank": block["rank"]}
        sizes["at most"] = block.get("rank_allocation", {}).get("max_rank")
        chosen = [f"{100 * block['experts']['keep']:.0f} % of the experts"] if "experts" in block else []
        return ", ".join([_VARIANTS[block["variant"]], *chosen, *(f"{k} {v}" for k, v in sizes.items() if v)])
    if recipe["adapter"] == "tt_lora":
        return f"TT-LoRA, rank {block['rank']}"
    if recipe["adapter"] == "tt_lora_moe":
        return f"TT-LoRA MoE, {len(block['experts'])} experts"
    mixture, factorised = block["num_experts"] > 1, block["rank"] is not None
    name = {(False, False): "PT", (False, True): "DPT", (True, False): "SMoP", (True, True): "PT-MoE"}
    rank = f", rank {block['rank']}" if factorised else ""
    prompts = f"{block['num_experts']} x " if mixture else ""
    return f"{name[mixture, factorised]}, {prompts}{block['num_virtual_tokens']} tokens{rank}"


def table() -> str:
    """The recipes in Markdown, one line each."""
    lines = ["| base model | weights | method | trainable | per token | recipe |", "|---|---:|---|---:|---:|---|"]
    for name in RECIPES:
        recipe = load(name)
        trainable, activated = counts(name)
        link = f"[{name}]({name})"
        base = recipe["base_model"].rpartition("/")[2]
        size = f"{weights_bytes(name) / 1e9:.1f} GB"
        lines.append(f"| {base} | {size} | {method(recipe)} | {trainable:,} | {activated:,} | {link} |")
    return "\n".join(lines)


def readme_table() -> str:
    """The table as the README has it."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    head, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")
