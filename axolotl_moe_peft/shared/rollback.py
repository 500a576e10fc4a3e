"""Puts a model back as it was when attaching or loading an adapter fails."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn

_CONTAINERS = (dict, OrderedDict, list, set)
_MARK = "_of_axolotl_moe_peft"


class ModelState:
    """What the modules of a model are made of: their children, parameters, hooks and attributes, not the values.

    Args:
        model: is not copied, only what refers to its parts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(module, dict(vars(module))) for module in model.modules()]
        # the containers themselves stay, as the handles of hooks know them
        self._contents = [
            (value, copy.copy(value))
            for _, attributes in self._attributes
            for value in attributes.values()
            if type(value) in _CONTAINERS
        ]
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Make the model again what it was. Modules that came to it since are left to themselves."""
        for module, attributes in self._attributes:
            vars(module).clear()
            vars(module).update(attributes)
        for container, content in self._contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in self._requires_grad:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad = requires_grad


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[ModelState]:
    """Within it, an exception puts the model back as it was."""
    state = ModelState(model)
    try:
        yield state
    except BaseException:
        state.restore()
        raise


def undo_failed_loads() -> None:
    """Let PeftModel.load_adapter, and so from_pretrained, leave a model as it was if our adapter cannot be loaded.

    PEFT attaches an adapter before it reads its file, calls nothing of ours if that fails, and leaves it there. So
    this is the one method of PEFT's that is replaced, once the first of our tuners is made: other methods' runs have
    their own PEFT.
    """
    if hasattr(PeftModel.load_adapter, _MARK):
        return
    load_adapter = PeftModel.load_adapter

    @functools.wraps(load_adapter)
    def undone_on_failure(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        adapter_name = inspect.signature(load_adapter).bind(self, *args, **kwargs).arguments["adapter_name"]
        is_unused = getattr(self.base_model, "is_unused", None)  # of our tuners only
        unused = is_unused is not None and is_unused(adapter_name)
        try:
            return load_adapter(self, *args, **kwargs)
        except BaseException as error:
            missing = None if is_unused is None else self.base_model.missing_from_file(adapter_name, error)
            if unused:
                self.base_model.undo_attaching(adapter_name)
            if missing:
                raise RuntimeError(missing) from None
            raise

    setattr(undone_on_failure, _MARK, True)
    PeftModel.load_adapter = undone_on_failure  # nosemgrep: no-patching-of-others
