"""What the README.md of a saved adapter says of it: its method, base and size, and how it is loaded and served.

PEFT writes a model card with every adapter, transformers' Trainer rewrites it at the end, and Axolotl has the Trainer
do so; all end in PeftModel.create_or_update_model_card, which asks the tuner nothing. So that is wrapped, once the
first of our tuners is made: it does what it did, and then the card gets a part of ours.
"""

from __future__ import annotations

import functools
import os

from huggingface_hub import ModelCard
from peft import PeftModel, TaskType

from .config import found_from_anywhere
from .method import Method

BEGIN, END = "<!-- by axolotl-moe-peft -->", "<!-- end -->"
_MARK = "_of_axolotl_moe_peft"
_AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
}


def describe_adapters_in_cards() -> None:
    """Have PEFT's model cards of this package's adapters say what they are."""
    if hasattr(PeftModel.create_or_update_model_card, _MARK):
        return
    write_card = PeftModel.create_or_update_model_card

    @functools.wraps(write_card)
    def write_and_describe(self: PeftModel, output_dir: str) -> None:
        write_card(self, output_dir)
        if isinstance(self.active_peft_config, Method):
            path = os.path.join(output_dir, "README.md")
            card = ModelCard.load(path)
            card.text = _with_part(card.text, f"{BEGIN}\n{describe(self)}\n{END}")
            card.save(path)

    setattr(write_and_describe, _MARK, True)
    PeftModel.create_or_update_model_card = write_and_describe  # nosemgrep: no-patching-of-others


def describe(model: PeftModel) -> str:
    """The active adapter, in Markdown."""
    config = model.active_peft_config
    base = config.base_model_name_or_path or getattr(model.get_base_model(), "name_or_path", "")
    base = found_from_anywhere(base) or "BASE"
    rows = [row for row in model.base_model.parameter_rows(model.active_adapter) if row.parameters]
    total = model.base_model.num_saved_parameters(model.active_adapter)
    parts = ", ".join(f"{row.part} {row.parameters:,}" for row in rows if row.parameters != total)
    counts = f"{total:,} parameters" + (f" ({parts})" if parts else "")
    auto_class = _AUTO_CLASSES.get(config.task_type, "AutoModel")
    return f"""\
## The adapter

{config.title} for `{base}`: {counts}.
All settings are in `adapter_config.json`. With the package axolotl-moe-peft, where ADAPTER is this folder or the id of
its repository:

```python
import axolotl_moe_peft  # makes the method known; without it loading ends in KeyError: '{config.peft_type.value}'
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "ADAPTER").eval()
```

Programs that load adapters by themselves run with `python -m axolotl_moe_peft run` before their name, and
`axolotl moe-serve ADAPTER` serves it behind an OpenAI-compatible API."""


def _with_part(text: str, part: str) -> str:
    """The card's text with this part instead of its older version, or else as the first section."""
    head, begin, rest = text.partition(BEGIN)
    if begin:
        return f"{head}{part}{rest.partition(END)[2]}"
    lines, fenced = text.splitlines(), False
    for i, line in enumerate(lines):
        fenced ^= line.startswith("```")
        if line.startswith("# ") and not fenced:
            return "\n".join([*lines[: i + 1], "", part, *lines[i + 1 :]])
    return f"{part}\n{text}"
