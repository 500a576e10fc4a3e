"""Adapters that transformers loads by itself are loaded whole, or not at all, as those that PEFT loads.

`AutoModelForCausalLM.from_pretrained(adapter)`, `pipeline` and `model.load_adapter` attach an adapter without a
PeftModel and set its tensors one by one; what a file lacks, or has too much, is a table in the log, and the adapter
computes with what it was initialised with. No method of the tuner's is called once the file is read. So the one method
through which they all go is wrapped here: it does what it did, and then what it reports of an adapter of ours is read.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from .config import enumerate_names

if TYPE_CHECKING:
    from .tuner import Tuner

_attached: ContextVar[list[tuple[Tuner, str]] | None] = ContextVar("attached", default=None)
_ORIGINAL = "_of_transformers"


def note_attached(tuner: Tuner, adapter_name: str) -> None:
    """Say that a tuner has attached an adapter, for whom transformers may be about to load it."""
    attached = _attached.get()
    if attached is not None:
        attached.append((tuner, adapter_name))


def check_what_transformers_loads() -> None:
    """Have transformers' loader refuse files that are not what an adapter of this package needs."""
    from transformers.integrations import PeftAdapterMixin

    load_adapter = getattr(PeftAdapterMixin.load_adapter, _ORIGINAL, PeftAdapterMixin.load_adapter)

    @functools.wraps(load_adapter)
    def whole_or_not_at_all(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached: list[tuple[Tuner, str]] = []
        token = _attached.set(attached)
        try:
            report = load_adapter(self, *args, **kwargs)
            for _, adapter_name in attached:
                _check(report, adapter_name)
        except BaseException:
            for tuner, adapter_name in attached:
                tuner.undo_attaching(adapter_name)
            raise
        finally:
            _attached.reset(token)
        return report

    setattr(whole_or_not_at_all, _ORIGINAL, load_adapter)
    PeftAdapterMixin.load_adapter = whole_or_not_at_all  # nosemgrep: no-patching-of-others


def _check(report: Any, adapter_name: str) -> None:
    # with a second adapter those of the first are missing, too
    missing = {key for key in report.missing_keys if f".{adapter_name}." in f"{key}."}
    problems = {
        "adapter tensors missing": missing,
        "tensors that this adapter does not have": set(report.unexpected_keys),
    }
    said = [f"{what}: {enumerate_names(names)}" for what, names in problems.items() if names]
    if said:
        raise RuntimeError(
            f"the adapter's file is not what its adapter_config.json describes; {'; '.join(said)}. The model is as it "
            "was before."
        )
