"""Which linear layers adapters can go beside: what their targets match, and what those layers are to the model."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Protocol

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .linear import has_plain_weight, linear_shape

# What is asked of a weight without computing with it.
_METADATA = (
    "data_ptr",
    "device",
    "dim",
    "dtype",
    "element_size",
    "is_cuda",
    "is_meta",
    "ndim",
    "numel",
    "shape",
    "size",
)
_INDEXER = "Indexer"  # of sparse attention: DeepSeek-V3.2's, and what came after it
_INSPECTIONS = ("getattr", "hasattr", "id", "isinstance", "len", "type")


class Targets(Protocol):
    """What a configuration says of them; PEFT reads it, too.

    Attributes:
        target_modules: names or suffixes of names, one regular expression, or all-linear.
        modules_to_save: modules that are trained whole.
        is_saved: whether they are those of a saved adapter.
    """

    target_modules: list[str] | str
    modules_to_save: list[str] | None
    is_saved: bool


def target_layers(config: Targets, model: nn.Module, key: str = "tt_lora.target_modules") -> dict[str, nn.Module]:
    """The linear layers that `config.target_modules` matches, by name, as they were before any adapter.

    Of a model of text and images they are those of its text part; other parts have to be named, by targets that match
    nothing in it, or by a regular expression. A saved adapter may have matched layers that a new one is refused
    beside: version 0.1 did not ask what they are to the model.

    Raises:
        ValueError: a target matches nothing, or something else than linear layers that the model calls. The message
            begins with `key`.
    """
    modules = _unwrapped_modules(model)
    linear = {name: module for name, module in modules.items() if is_linear(module)}
    targets = config.target_modules
    if targets == "all-linear":
        return _all_linear(config, model, modules, linear)
    matched = {n: module for n, module in modules.items() if n and BaseTuner._check_target_module_exists(config, n)}
    if isinstance(targets, list):
        of_text = set(_of_text(model, matched))
        elsewhere = [t for t in targets if not any(has_suffix(name, t) for name in of_text)]
        matched = {
            name: module
            for name, module in matched.items()
            if name in of_text or any(has_suffix(name, target) for target in elsewhere)
        }
        unmatched = [repr(t) for t in targets if not any(has_suffix(name, t) for name in matched)]
    else:
        unmatched = [] if matched else [f"the regular expression {targets!r}"]
    if unmatched:
        raise ValueError(
            f"{key}: {', '.join(unmatched)} matches no module of {type(model).__name__}. The "
            f"names of its linear layers end with {endings(linear)}."
        )
    for name in matched:
        if name not in linear:
            raise ValueError(
                f"{key}: {targets!r} matches {name}, which is no linear layer but "
                f"{type(matched[name]).__name__}. The names of the linear layers end with {endings(linear)}."
            )
        if not config.is_saved and (reason := why_idle(name, modules)):
            others = {n: module for n, module in linear.items() if not why_idle(n, modules)}
            raise ValueError(
                f"{key}: {targets!r} matches {name}, beside which an adapter would do nothing: "
                f"{reason}. Leave it out; the names of the other linear layers end with {endings(others)}."
            )
    return matched


def _all_linear(
    config: Targets, model: nn.Module, modules: dict[str, nn.Module], linear: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """All linear layers but the output layer or head, those that are trained whole, and those that are not called."""
    output_layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = () if output_layer is not None else SEQ_CLS_HEAD_NAMES
    among = SimpleNamespace(target_modules=set(linear), modules_to_save=config.modules_to_save)
    return {
        name: module
        for name, module in _of_text(model, linear).items()
        if module is not output_layer
        and name not in heads
        and BaseTuner._check_target_module_exists(among, name)
        and not why_idle(name, modules)
    }


def _of_text(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of these modules that are in the text part of a model of text and images (or sounds); else all of them."""
    if not isinstance(model, PreTrainedModel) or model.config.get_text_config() is model.config:
        return modules
    text = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is text)
    return {n: module for n, module in modules.items() if not name or n.startswith(f"{name}.")}


def is_linear(module: nn.Module) -> bool:
    """Whether the module maps (..., inputs) to (..., outputs), as a router that is an nn.Linear may not."""
    shape = linear_shape(module)
    if shape is None or type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return shape is not None
    if not has_plain_weight(module):
        return True  # quantised layers have forward passes of their own
    try:
        with torch.no_grad():
            output = module(module.weight.new_zeros(1, shape[0]))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return isinstance(output, Tensor) and output.shape == (1, shape[1])


def why_idle(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Why an adapter beside this layer would not act, or not learn; None if it would."""
    if is_read(name, modules):
        reader = type(modules[name.rpartition(".")[0]]).__name__
        return f"{reader} reads the layer's weight itself where it does not call the layer"
    while name := name.rpartition(".")[0]:
        around = type(modules[name])
        if _INDEXER in around.__name__:
            return f"{around.__name__} only chooses positions, through which no gradient comes"
    return None


def is_read(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the code of the module around this layer computes with the layer's weight by itself."""
    parent, _, attribute = name.rpartition(".")
    return attribute in _weights_read(type(modules[parent]))


def layers_of_version_0_1(config: Targets, model: nn.Module) -> list[str]:
    """The linear layers that these targets matched in version 0.1, which asked nothing else of them."""
    linear = [name for name, module in _unwrapped_modules(model).items() if linear_shape(module) is not None]
    if config.target_modules == "all-linear":
        return linear
    return [name for name in linear if BaseTuner._check_target_module_exists(config, name)]


def idle_layers(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Those of these linear layers beside which an adapter would not act everywhere, or not learn: name and reason."""
    modules = _unwrapped_modules(model)
    return {name: reason for name in names if (reason := why_idle(name, modules))}


def read_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of these layers whose weight the module around them computes with by itself."""
    modules = _unwrapped_modules(model)
    return [name for name in names if is_read(name, modules)]


@functools.cache
def _weights_read(cls: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose weight as a whole is an operand somewhere in the code of this class.

    A slice is none: that is how BLOOM imitates tensor parallelism, which PEFT switches off.
    """
    names = set()
    for function in _functions(cls):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            continue
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
                owner = node.value
                of_self = isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name)
                if of_self and owner.value.id == "self" and _is_operand(parents[node]):
                    names.add(owner.attr)
    return frozenset(names)


def _functions(cls: type[nn.Module]) -> Iterator[object]:
    """The methods that a call may run, as they are inherited; what initialises a model is not among them."""
    for name in dir(cls):
        function = inspect.getattr_static(cls, name)
        own = inspect.isfunction(function) and getattr(nn.Module, name, None) is not function
        if own and not name.startswith("__") and "init" not in name and "reset" not in name:
            yield function


def _is_operand(parent: ast.AST) -> bool:
    if isinstance(parent, ast.Attribute):
        return parent.attr not in _METADATA
    if isinstance(parent, ast.Call):
        return not (isinstance(parent.func, ast.Name) and parent.func.id in _INSPECTIONS)
    return not isinstance(parent, (ast.Subscript, ast.Compare))


def _unwrapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name as they were before any adapter."""
    modules, inside = {}, ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
            module = module.get_base_layer()
        modules[name] = module
    return modules


def has_suffix(name: str, suffix: str) -> bool:
    """Whether these are the last parts of a module's name."""
    return name == suffix or name.endswith(f".{suffix}")


def endings(layers: dict[str, nn.Module]) -> str:
    """The last parts of the layers' names."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
