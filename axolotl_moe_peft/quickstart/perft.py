"""The first quick start: PERFT on a small real MoE."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import TextStreamer

from .console import Steps, fail
from .heldout import read_heldout
from .models import load, load_tokenizer, moe_model
from .recipes import read_heldout_losses, show_what_is_next, train


def run(work_dir: Path) -> None:
    step = Steps(5)
    model_dir = moe_model(work_dir, step)
    adapter_dir = train("perft.yaml", work_dir, step)
    before, after = read_heldout_losses(adapter_dir)
    step("Held-out loss")
    print(f"  before training {before:.4f}\n  after training  {after:.4f}")
    step("One held-out question, answered by the trained adapter")
    show_answer(model_dir, adapter_dir)
    show_what_is_next("perft.yaml", work_dir, adapter_dir)
    if after >= before:
        fail("the held-out loss did not fall")


def show_answer(model_dir: Path, adapter_dir: Path) -> None:
    """Answer the first held-out question with base model and adapter as plain transformers and PEFT load them."""
    question, reference = read_heldout("gsm8k")[0]
    tokenizer = load_tokenizer(model_dir)
    model = PeftModel.from_pretrained(load(model_dir), adapter_dir).eval()
    chat = [question]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    print(f"\nQuestion: {question['content']}\n\nModel:", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**prompt, max_new_tokens=160, do_sample=False, streamer=streamer)
    print(f"\nReference:\n{reference['content']}", flush=True)
