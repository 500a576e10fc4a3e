"""The third quick start: PT-MoE beside what it is made of, at about equal numbers of parameters."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file

from .console import Steps, fail
from .heldout import evaluate, read_heldout, tokenize
from .models import dense_model, load, load_tokenizer
from .recipes import show_what_is_next, train

# the ablation of the paper, under its names
SETTINGS = {"PT": "pt.yaml", "DPT": "dpt.yaml", "SMoP": "smop.yaml", "PT-MoE": "pt_moe.yaml"}


def run(work_dir: Path) -> None:
    step = Steps(2 + len(SETTINGS))
    model_dir = dense_model(work_dir, step)
    adapter_dirs = {setting: train(recipe, work_dir, step) for setting, recipe in SETTINGS.items()}
    step("Held-out loss per token of the answers")
    tokenizer = load_tokenizer(model_dir)
    rows = [tokenize(tokenizer, *chat) for chat in read_heldout("gsm8k")]
    before, _ = evaluate(load(model_dir), rows)
    print(f"\n  {'setting':10}{'parameters':>12}{'base':>10}{'trained':>10}", flush=True)
    after = {}
    for setting, folder in adapter_dirs.items():
        after[setting], _ = evaluate(PeftModel.from_pretrained(load(model_dir), folder).eval(), rows)
        parameters = sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
        print(f"  {setting:10}{parameters:12,}{before:10.4f}{after[setting]:10.4f}", flush=True)
    show_what_is_next("pt_moe.yaml", work_dir, adapter_dirs["PT-MoE"])
    if not after["PT-MoE"] < before:
        fail("PT-MoE did not lower the held-out loss")
