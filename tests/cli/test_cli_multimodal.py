"""Rows with images through Axolotl's own multimodal path (`processor_type: AutoProcessor`)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.cli import pil_images  # noqa: F401
from tests.cli.cli_helpers import AxolotlPool, adapter_tensors, log_history, write_yaml
from tests.cli.images import save_multimodal_base, write_image_rows
from tests.multimodal_models import IMAGE

ADAPTERS = {
    "perft routed": {"adapter": "perft", "perft": {"rank": 4, "num_experts": 5, "router_z_loss_coef": 0.01}},
    "perft embedded": {"adapter": "perft", "perft": {"rank": 4, "variant": "embedded"}},
    "tt_lora": {"adapter": "tt_lora", "tt_lora": {"rank": 2}},
}


@pytest.fixture(scope="module")
def axolotl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AxolotlPool]:
    pool = AxolotlPool(tmp_path_factory.mktemp("pool"), "tests.cli.pil_images")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_multimodal_base(folder)
    return folder


def image_yaml(folder: Path, base: Path, **keys) -> Path:
    settings = {
        "processor_type": "AutoProcessor",
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "sample_packing": False,
        "perft": None,
        "max_steps": 8,
        "micro_batch_size": 4,
        "learning_rate": 0.02,
    }
    return write_yaml(folder / "run.yaml", base, write_image_rows(folder), **settings | keys)


@pytest.mark.matrix("multimodal: rows with images", "{adapter}")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_it_trains_on_rows_with_images_and_of_text(axolotl, base, tmp_path, adapter):
    config = image_yaml(tmp_path, base, **ADAPTERS[adapter])
    result = axolotl("train", config)
    assert result.code == 0, result.output
    losses = [line["loss"] for line in log_history(config.with_suffix(""))]
    assert losses[-1] < losses[0] - 0.1
    tensors = adapter_tensors(config.with_suffix(""))
    assert tensors and all(tensor.abs().sum() > 0 for tensor in tensors.values())
    assert not any("visual" in name for name in tensors)
    trained = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), config.with_suffix(""))
    answers = {colour: loss_of_answer(trained, base, tmp_path / f"{colour}.png", colour) for colour in ("red", "blue")}
    with trained.disable_adapter():
        before = {colour: loss_of_answer(trained, base, tmp_path / f"{colour}.png", colour) for colour in answers}
    assert all(answers[colour] < before[colour] for colour in answers)


def loss_of_answer(model: PeftModel, base: Path, image: Path, answer: str) -> float:
    """The loss of a right answer about an image."""
    processor = AutoProcessor.from_pretrained(base)
    question = [{"type": "image", "path": str(image)}, {"type": "text", "text": "which colour?"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    batch = processor.apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt")
    assert (batch["input_ids"] == IMAGE).sum() == 4
    labels = batch["input_ids"].clone()
    labels[:, : -len(answer) - 1] = -100  # and <eos>
    with torch.no_grad():
        return model(**batch, labels=labels).loss.item()


@pytest.mark.parametrize("keys", [{"variant": "routed", "target_modules": ["visual.blocks.0.mlp"]}], ids=["perft"])
def test_what_does_not_fit_the_base_fails_before_its_data_are_read(axolotl, base, tmp_path, keys):
    result = axolotl("train", image_yaml(tmp_path, base, adapter="perft", perft=keys))
    assert result.code != 0
    assert "'visual.blocks.0.mlp' matches no MoE block" in result.error
    assert "Loading weights" not in result.output


@pytest.mark.matrix("multimodal: rows with images", "tt_lora_moe", cell="refused: rows have no expert there")
@pytest.mark.matrix("multimodal: rows with images", "pt_moe", cell="refused: rows have no prompt there")
def test_the_adapters_of_sequences_are_refused(axolotl, base, tmp_path):
    for adapter, block in (("pt_moe", {}), ("tt_lora_moe", {"experts": [{"name": "a", "path": "a"}]})):
        datasets = [{"path": str(tmp_path / "rows.jsonl"), "type": "chat_template"}]
        datasets[0] |= {"expert": "a"} if adapter == "tt_lora_moe" else {}
        result = axolotl("train", image_yaml(tmp_path, base, adapter=adapter, datasets=datasets, **{adapter: block}))
        assert result.code != 0
        assert f"`processor_type` does not work with `adapter: {adapter}`" in result.output
