"""What is counted for a tracker's picture of an evaluation is what a pass over the same rows counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from axolotl_moe_peft.host.usage_images import UsageImages, takes_images
from axolotl_moe_peft.report.measure import Row, measure
from tests.tiny_adapters import trained
from tests.tiny_models import PAD, random_ids, tiny_model

LENGTHS = (9, 17, 5, 12, 20)


class Seen(UsageImages):
    """Keeps what would be drawn."""

    def _figure(self, layers: list[dict[str, Any]]) -> Any:
        self.layers = layers
        return super()._figure(layers)


def padded(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(f["input_ids"]) for f in features)
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    rows = [{"attention_mask": [1] * len(f["input_ids"]), **f} for f in features]
    return {k: torch.tensor([r[k] + [v] * (length - len(r[k])) for r in rows]) for k, v in fill.items()}


def train(
    model: PeftModel,
    rows: list[dict[str, list[int]]],
    tracker: str,
    folder: Path,
    collator: Callable[..., Any] = padded,
) -> Seen:
    """Two steps that hardly move the adapter, with an evaluation after each."""
    model.config.use_cache = False
    settings = {"max_steps": 2, "eval_steps": 1, "eval_strategy": "steps", "learning_rate": 1e-30, "use_cpu": True}
    arguments = TrainingArguments(str(folder), report_to=[tracker], per_device_eval_batch_size=2, **settings)
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows, eval_dataset=rows)
    assert takes_images(trainer)
    images = Seen(trainer)
    trainer.add_callback(images)
    trainer.train()
    return images


def rows_of(lengths: Iterable[int]) -> list[dict[str, list[int]]]:
    texts = [random_ids(1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    return [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in texts]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "family"), [("perft", "olmoe"), ("pt_moe", "llama")])
def test_the_counts_are_those_of_the_report(kind: str, family: str, packed: bool, tmp_path: Path) -> None:
    rows = rows_of(LENGTHS)
    model = trained(kind, tiny_model(family), [])
    found = measure(model, [Row(**row, dataset=0) for row in rows], ["a"], str, tokens_per_batch=64)
    images = train(model, rows, "tensorboard", tmp_path, DataCollatorWithFlattening() if packed else padded)
    of_adapter = found["routers"][0]["layers"]
    assert images.layers == [{k: v for k, v in layer.items() if k != "typical_tokens"} for layer in of_adapter]
    (events,) = tmp_path.rglob("events.*")
    read = EventAccumulator(str(events))
    read.Reload()
    assert [event.step for event in read.Images("routing/usage")] == [1, 2]
    assert all(
        event.width > 200 and event.encoded_image_string[1:4] == b"PNG" for event in read.Images("routing/usage")
    )


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb, which Axolotl brings, is not installed")
def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(trained("perft", tiny_model("olmoe"), []), rows_of(LENGTHS), "wandb", tmp_path)
    pictures = list(tmp_path.rglob("media/images/**/usage*.png"))
    assert len(pictures) == 2
    assert all(min(Image.open(picture).size) > 100 for picture in pictures)


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    train(trained("perft", tiny_model("olmoe"), []), rows_of(LENGTHS), "mlflow", tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("routing/*.png")) == ["usage-1.png", "usage-2.png"]


def test_without_a_tracker_nothing_is_counted(tmp_path: Path) -> None:
    model = trained("perft", tiny_model("olmoe"), [])
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    assert not takes_images(trainer)
