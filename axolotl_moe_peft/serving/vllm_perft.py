"""PerftForCausalLM: a base model in vLLM with a PERFT adapter in its MoE blocks, or beside its MLPs.

    vllm serve BASE --hf-overrides '{"architectures": ["PerftForCausalLM"], "perft_adapter": "ADAPTER"}'

or `LLM(BASE, hf_overrides={...})`; of a dense base it is PerftDenseForCausalLM. vLLM's Transformers backend makes the
base: transformers' modules, of which it replaces attention, experts and linear layers by its own. Blocks keep their
names, by which weights find them.

Shape suffixes: T tokens, D model width, N units, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.transformers.base import Base
from vllm.utils.torch_utils import direct_register_custom_op

from ..perft import PerftConfig
from ..perft.block import FeedForward, MoeBlock
from ..perft.moe_families import BaseRouting
from ..perft.selection import find_dense_mlps, find_moe_blocks, select_blocks
from ..perft.units import Units
from ..perft.variants import VARIANTS, BlockAdapter, adapted_experts, units_of_experts
from ..shared.config import enumerate_names

ADAPTER_KEY = "perft_adapter"
_TENSORS = ("perft_down", "perft_up", "perft_router")


class _WithPerft(Base):
    """A causal language model of transformers, and the adapter that its configuration names.

    Raises:
        ValueError: the adapter cannot be read or does not fit the base model, or it does not go with what vLLM was
            asked for.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        _check_engine(vllm_config)
        hf_config = vllm_config.model_config.hf_config
        self._config, self._tensors = read_adapter(getattr(hf_config, ADAPTER_KEY, None))
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(hf_config)  # with its head, as names in a config are of it
        chosen = select_blocks(model, self._config.target_modules, self._config.layers_to_transform)
        self._block_names = [block.name for block in chosen]
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _patch_config(self) -> None:
        super()._patch_config()
        # by this name vLLM finds how a checkpoint's weights are called, and some activations
        self.config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)].__name__]

    def recursive_replace(self) -> None:
        """Replace transformers' modules by vLLM's, and put the adapter beside them."""
        embedded, adapters = self._config.variant == "embedded", self._adapters()
        if embedded:
            for adapter in adapters:
                # a child that vLLM does not know keeps it from moving the routing into its kernel
                self.model.get_submodule(adapter.parent).perft = adapter
        super().recursive_replace()
        for adapter in adapters:
            # as vLLM's own fusions do; modules in between would change the names of the weights
            if embedded:
                experts = self.model.get_submodule(adapter.experts)
                experts.forward = _experts_with(adapter, experts.forward)
            else:
                block = self.model.get_submodule(adapter.block.name)
                block.perft = adapter
                block.forward = _block_with(adapter, block.forward)

    def _adapters(self) -> list[ServedAdapter]:
        config, prefix = self._config, f"{self.model.base_model_prefix}."  # vLLM has the model without its head
        found = {f"{prefix}{b.name}": b for b in (*find_moe_blocks(self.model), *find_dense_mlps(self.model))}
        by_block: dict[str, dict[str, Tensor]] = {name: {} for name in self._block_names}
        for key, tensor in self._tensors.items():
            name, _, part = key.removeprefix("base_model.model.").rpartition(".")
            if name not in by_block or part not in _TENSORS:
                raise ValueError(
                    f"perft_adapter: {key} has no place in {type(self.model).__name__}. An adapter can be served "
                    f"beside the base model that it was trained on ({config.base_model_name_or_path!r}), and without "
                    "modules and tokens that were trained with it (`lora_modules_to_save`); --engine transformers "
                    "takes those."
                )
            by_block[name][part] = tensor
        context, device = self.compilation_config.static_forward_context, self.device_config.device
        adapters = []
        for name, parts in by_block.items():
            adapter = ServedAdapter(config, found[name], parts, self.model_config.dtype)
            if config.variant == "embedded":
                num_experts = self.model_config.get_num_experts()
                adapter.put_into_experts(adapted_experts(config, name, num_experts), num_experts)
            context[adapter.name] = adapter.to(device)
            adapters.append(adapter)
        return adapters


class PerftForCausalLM(_WithPerft, TransformersMoEForCausalLM):
    """A base model with MoE blocks, and a PERFT adapter beside them or beside its dense MLPs."""


class PerftDenseForCausalLM(_WithPerft, TransformersForCausalLM):
    """A dense base model, and a PERFT adapter beside its MLPs."""


class ServedAdapter(nn.Module):
    """An adapter in one block, for inference.

    Args:
        config: of the adapter.
        block: still as transformers has it.
        tensors: perft_down (N, R, D), perft_up (N, D, R) and for variant routed perft_router (N, D).
        dtype: of the model. The router stays float32.

    Raises:
        ValueError: the tensors do not fit the block, or the block does not go with the variant.
    """

    def __init__(
        self, config: PerftConfig, block: FeedForward, tensors: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config, self.block = config, block
        asked = config.norm_topk_prob
        self.norm_topk_prob = block.norm_topk_prob if asked is None else asked
        missing = {"perft_down", "perft_up", *(["perft_router"] if config.variant == "routed" else [])} - set(tensors)
        if missing:
            raise ValueError(f"perft_adapter: {block.name} has no {enumerate_names(missing)}; its file is not whole.")
        width = tensors["perft_down"].shape[-1]
        if config.variant != "embedded" and width != block.hidden_size:
            raise ValueError(f"perft_adapter: it is for a width of {width}; {block.name} has {block.hidden_size}.")
        if config.variant == "embedded" and not isinstance(block, MoeBlock):
            raise ValueError(f"perft_adapter: variant embedded needs experts, which {block.name} does not have.")
        if config.variant == "embedded" and (block.family.routing or block.family.num_experts):
            raise ValueError(
                f"perft_adapter: variant embedded cannot be served by vLLM in {type(block.module).__name__} "
                f"({block.name}), whose routing differs from that of most families. Use --engine transformers."
            )
        # buffers: vLLM looks for every parameter in the base's checkpoint
        self.register_buffer("down_NRD", tensors["perft_down"].to(dtype), persistent=False)
        self.register_buffer("up_NDR", tensors["perft_up"].to(dtype), persistent=False)
        self.register_buffer("router_ND", tensors.get("perft_router"), persistent=False)
        self.register_buffer("unit_of_expert_E", None, persistent=False)

    def put_into_experts(self, adapted: list[int] | None, num_experts: int) -> None:
        """Give each unit its expert.

        Args:
            adapted: as `adapted_experts` returns it.
            num_experts: of the base model.

        Raises:
            ValueError: there are more or fewer units.
        """
        if len(self.down_NRD) != len(adapted or range(num_experts)):
            raise ValueError(
                f"perft_adapter: {self.block.name} has {len(self.down_NRD)} adapters for "
                f"{len(adapted or range(num_experts))} experts of the base model."
            )
        if adapted is not None:
            self.unit_of_expert_E = torch.tensor(units_of_experts(adapted, num_experts), device=self.down_NRD.device)

    @property
    def name(self) -> str:
        """By which the running call finds it."""
        return f"{self.block.name}.perft"

    @property
    def experts(self) -> str:
        """Full name of the block's experts."""
        return self.block.name if self.block.module is self.block.experts else f"{self.block.name}.experts"

    @property
    def parent(self) -> str:
        """Full name of the module that calls them."""
        return self.experts.rpartition(".")[0]

    def forward(self, x_TD: Tensor, routing: BaseRouting) -> Tensor:
        """What is added to the block's output, or to its experts': (T, D)."""
        units = Units(self.config, self.down_NRD, self.up_NDR, training=False)
        family, unit_of_expert_E = self.block.family, self.unit_of_expert_E
        adapter = BlockAdapter(units, self.router_ND, self.norm_topk_prob, family, unit_of_expert_E)
        variant = VARIANTS[self.config.variant]
        if self.config.variant == "embedded":
            return variant.add_to_experts(adapter, x_TD, routing)
        return variant.add_to_block(adapter, x_TD, routing).delta_TD


def read_adapter(folder: str | None) -> tuple[PerftConfig, dict[str, Tensor]]:
    """Configuration and tensors of a saved PERFT adapter.

    Args:
        folder: folder or hub id; None where nobody said.

    Raises:
        ValueError: it is none, or cannot be served by vLLM.
    """
    if folder is None:
        raise ValueError(
            f"PerftForCausalLM and PerftDenseForCausalLM need an adapter: --hf-overrides "
            f"""'{{"architectures": ["PerftForCausalLM"], "{ADAPTER_KEY}": "folder or hub id"}}'."""
        )
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, PerftConfig):
        raise ValueError(f"perft_adapter: {folder!r} is an adapter of type {config.peft_type.value}, not PERFT.")
    if config.gate_weights == "base":
        raise ValueError(
            f"perft_adapter: {folder!r} has `gate_weights: base`, and the base router's weights stay inside vLLM's "
            "kernel. Use --engine transformers."
        )
    return config, load_peft_weights(folder, device="cpu")


def _check_engine(vllm_config: VllmConfig) -> None:
    parallel, speculation = vllm_config.parallel_config, vllm_config.speculative_config
    asked = {
        "pipeline, data or expert parallelism": parallel.pipeline_parallel_size > 1
        or parallel.data_parallel_size > 1
        or parallel.enable_expert_parallel,
        "a quantised base model": vllm_config.quant_config is not None,
        "speculative decoding but by n-grams": speculation is not None and speculation.method != "ngram",
        "LoRA beside it": vllm_config.lora_config is not None,
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise ValueError(f"a PERFT adapter is not served with {what}. Leave that option out.")


# What an adapter adds is an operation of its own, which torch.compile takes as it is: on a CPU it loops over experts.
# It comes before the experts, whose kernel may write its output over its input.


def _block_with(adapter: ServedAdapter, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a block with the adapter in its (first) output."""
    name = adapter.name

    def forward_with_adapter(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        delta = torch.ops.vllm.perft_block(hidden_states, name)
        output = forward(hidden_states, *args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] + delta, *output[1:])
        return output + delta

    return forward_with_adapter


def _experts_with(adapter: ServedAdapter, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward of a block's experts with the adapter in its output."""
    name, block = adapter.name, adapter.block

    def forward_with_adapter(*args: Any, **kwargs: Any) -> Tensor:
        hidden_states, routing = block.read_experts_call(args, kwargs, BaseRouting())
        delta = torch.ops.vllm.perft_experts(hidden_states, routing.indices_TK, routing.weights_TK, name)
        return forward(*args, **kwargs) + delta

    return forward_with_adapter


def _perft_block(hidden_states: Tensor, name: str) -> Tensor:
    return _perft_experts(hidden_states, None, None, name)


def _perft_experts(hidden_states: Tensor, indices_TK: Tensor | None, weights_TK: Tensor | None, name: str) -> Tensor:
    adapter = get_forward_context().no_compile_layers[name]
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    delta_TD = adapter(x_TD, BaseRouting(weights_TK=weights_TK, indices_TK=indices_TK))
    return delta_TD.view(hidden_states.shape).to(hidden_states.dtype)


def _fake(hidden_states: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden_states)


direct_register_custom_op("perft_block", _perft_block, fake_impl=_fake)
direct_register_custom_op("perft_experts", _perft_experts, fake_impl=_fake)
