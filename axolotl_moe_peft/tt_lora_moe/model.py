"""TTLoraMoeModel: a pool of frozen low-rank experts, and a router that picks one for each sequence.

Top-1 routing gives the router no gradient from the task loss, so training does not run the experts at all: a step is
one frozen pass of the base model over the batch and the router's cross-entropy. In evaluation and generation the
router reads the prompt first, and the model then runs with each sequence's expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..shared.auxiliary import share_of_accumulated_batch
from ..shared.batches import IGNORE_INDEX
from ..shared.decoder import decoder_of
from ..shared.evaluation_harness import watch_evaluation
from ..shared.statistics import RouterStatistics
from ..shared.summary import ParameterRow, parameter_row
from ..shared.trainer_step import labels_of, watch_trainers
from ..shared.tuner import Tuner
from .chooser import ExpertChooser, cross_entropies, labels_of_sequences, record
from .config import TTLoraMoeConfig, check_expert_entry
from .experts import load_expert
from .head import TTLoraPoolHead, head_name
from .layer import NO_CORES, TTLoraPoolLinear
from .router import PromptRouter


class TTLoraMoeModel(Tuner):
    """TT-LoRA MoE (arXiv 2504.21190, stage 2): exactly one frozen expert for each sequence, a TT-LoRA or a LoRA.

    In training mode a call needs `labels`, which tell the prompts, and `expert_labels`, the index of the right expert:
    (B,), or (B, S) where rows are packed, -100 for unknown. It returns the router's cross-entropy as the loss and no
    logits. Otherwise it returns what the base model returns, computed with the chosen experts.

    On a model for sequence classification the experts are classifiers (tt_lora, SEQ_CLS), each with its head and its
    number of classes. The router reads the whole input and chooses both; a class that an expert does not have gets the
    logit `head.NO_CLASS`. Training needs `expert_labels` only.

    Args:
        model: a causal language model of transformers.
        config: a TTLoraMoeConfig.
        adapter_name: name of the adapter.

    Attributes:
        chosen_experts: of the last call that chose, by adapter name: int64 (N,), in reading order of the sequences.
        statistics, eval_statistics: loss and accuracy of the router in training and in evaluation with
            `expert_labels`; `.pop()` reads them.

    Raises:
        ValueError: an expert cannot be read, or does not fit the model.
    """

    prefix = "ttmoe_"
    tuner_layer_cls = BaseTunerLayer  # the pool's layers and the router

    def _prepare_model(self, peft_config: TTLoraMoeConfig, model: nn.Module) -> None:
        if decoder_of(model) is model:
            raise ValueError(
                f"tt_lora_moe needs a causal language model with a decoder; {type(model).__name__} has none."
            )

    def _attach(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        self._experts = [load_expert(entry, model) for entry in config.experts]
        if head_name(model):
            _check_num_labels([expert.num_labels for expert in self._experts], model)
        config.experts = [expert.entry for expert in self._experts]
        first = not hasattr(model, "prompt_router")
        super()._attach(model, adapter_name, *args, **kwargs)
        del self._experts
        if first:
            self.train(model.training)  # as the base was, which itself stays in evaluation mode

    def _check_target_module_exists(self, peft_config: TTLoraMoeConfig, key: str) -> bool:
        return any(key in expert.shapes for expert in self._experts) or key == head_name(self.model)

    def _create_and_replace(
        self,
        peft_config: TTLoraMoeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not hasattr(self.model, "prompt_router"):
            # a child of the model, where PEFT looks for what to switch and to delete
            router = PromptRouter(self.model.config.get_text_config().hidden_size)
            router.chooser = ExpertChooser(self.model, router)
            watch_trainers()
            watch_evaluation()
            self.model.prompt_router = router
        if adapter_name not in self._router.ttmoe_weight:
            self._chooser.configs[adapter_name] = peft_config
            self._router.update_layer(adapter_name, peft_config, self.model.get_input_embeddings().weight.device)
        if current_key == head_name(self.model):
            self._add_heads(adapter_name, target, target_name, parent)
            return
        layer = self._pool_layer(target, target_name, parent)
        if any(expert.cores is None for expert in self._experts):
            self._chooser.placeholders[adapter_name] = layer.ttmoe_cores
            cores = None
        else:
            cores = torch.cat([e.cores[current_key] for e in self._experts if current_key in e.cores])
        shapes = [expert.shapes.get(current_key, NO_CORES) for expert in self._experts]
        layer.update_layer(adapter_name, shapes, cores)

    def _pool_layer(self, target: nn.Module, target_name: str, parent: nn.Module) -> TTLoraPoolLinear:
        """The layer with pools that is there, or takes this one's place."""
        if isinstance(target, TTLoraPoolLinear):
            return target
        layer = TTLoraPoolLinear(target, self._chooser.choices)
        self._chooser.layers.append(layer)
        self._replace_module(parent, target_name, layer, target)
        return layer

    def _add_heads(self, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module) -> None:
        head = target
        if not isinstance(target, TTLoraPoolHead):
            head = TTLoraPoolHead(target, self._chooser.choices)
            self._replace_module(parent, target_name, head, target)
        heads = [expert.head for expert in self._experts]
        loaded = None if any(part is None for part in heads) else torch.cat(heads)
        head.update_layer(adapter_name, [expert.num_labels for expert in self._experts], loaded)

    def add_expert(self, name: str, path: str, adapter_name: str = "default") -> None:
        """Put one more trained expert into the pool.

        The experts of the pool and their rows of the router stay as they are, bit by bit; the new expert's rows are
        random until the router is trained again.

        Args:
            name, path: as in `experts`.
            adapter_name: name of the adapter.

        Raises:
            ValueError: the name is taken, or the expert cannot be read or does not fit.
        """
        config, entry = self.peft_config[adapter_name], {"name": name, "path": path}
        check_expert_entry(entry)
        if name in config.expert_names:
            raise ValueError(f"tt_lora_moe.experts: the pool has an expert {name!r} already; names must differ.")
        expert = load_expert(entry, self.model)
        if head := head_name(self.model):
            _check_num_labels([*(e["num_labels"] for e in config.experts), expert.num_labels], self.model)
            self.model.get_submodule(head).add_expert(adapter_name, expert.num_labels, expert.head)
        for key in expert.shapes:
            parent_name, _, child = key.rpartition(".")
            parent = self.model.get_submodule(parent_name)
            layer = self._pool_layer(getattr(parent, child), child, parent)
            if adapter_name not in layer.experts:
                layer.update_layer(adapter_name, [NO_CORES] * len(config.experts), torch.empty(0))
                layer.set_adapter(self._router.active_adapters)
        for key, layer in self.model.named_modules():
            if isinstance(layer, TTLoraPoolLinear) and adapter_name in layer.experts:
                key = key.removesuffix(".base_layer")
                cores = expert.cores.get(key, torch.empty(0))
                layer.add_expert(adapter_name, expert.shapes.get(key, NO_CORES), cores)
        self._router.add_expert(adapter_name)
        config.experts = [*config.experts, expert.entry]
        config._tensor_names = frozenset(self._tensor_names(adapter_name))

    def add_what_is_new(self, config: TTLoraMoeConfig) -> None:
        for expert in config.experts[len(self.peft_config["default"].experts) :]:
            self.add_expert(expert["name"], expert["path"])

    def train(self, mode: bool = True) -> TTLoraMoeModel:
        super().train(mode)
        self.model.eval()  # frozen features: no dropout, and nothing to checkpoint
        return self

    def forward(self, *args: Any, expert_labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Call the base model with each sequence's expert, or in training mode take a step of the router."""
        if self.training and not self._router.disable_adapters:
            return self._router_step(self._chooser.batch(args, kwargs), expert_labels)
        self._chooser.running.expert_labels = expert_labels
        try:
            return self.model(*args, **kwargs)
        finally:
            self._chooser.running.expert_labels = None

    def _router_step(self, batch: dict[str, Any], expert_labels: Tensor | None) -> CausalLMOutputWithPast:
        if batch.get("labels") is None and labels_of(batch) is not None:
            raise ValueError(
                "tt_lora_moe trains by its router's cross-entropy and computes no logits in training, but the trainer "
                "has taken the labels out of the batch for a loss of its own. Leave out `label_smoothing_factor` and "
                "`compute_loss_func`."
            )
        for key, tensor in (("labels", batch.get("labels")), ("expert_labels", expert_labels)):
            if tensor is None and not (key == "labels" and head_name(self.model)):
                raise ValueError(
                    f"tt_lora_moe trains its router on batches with `labels`, which tell where the prompts end, and "
                    f"`expert_labels`, the index of each row's expert; there are no `{key}`. In Axolotl give every "
                    "dataset an `expert:`; in transformers' Trainer set remove_unused_columns=False."
                )
        loss = 0.0
        for adapter_name in self.active_adapters:
            config = self.peft_config[adapter_name]
            sequences = self._chooser.sequences(config, batch)
            features = self._chooser.features(config, sequences, batch)
            logits_NE = self._router(features.for_logits_NH, adapter_name)
            noisy_NE = logits_NE
            if config.router_noise:
                std_NE = self._router.noise_std(features.for_noise_NH, adapter_name)
                noisy_NE = logits_NE + torch.randn_like(std_NE) * std_NE
            labels_N = labels_of_sequences(expert_labels, sequences)
            losses_N = cross_entropies(noisy_NE, labels_N)
            loss = loss + losses_N.sum() / (labels_N != IGNORE_INDEX).sum().clamp(min=1)
            self.chosen_experts[adapter_name] = logits_NE.argmax(-1)
            record(self.statistics.of(adapter_name), config, losses_N, logits_NE, labels_N)
        return CausalLMOutputWithPast(loss=loss * share_of_accumulated_batch(batch, self.model))

    @property
    def chosen_experts(self) -> dict[str, Tensor]:
        return self._chooser.chosen_experts

    @property
    def statistics(self) -> RouterStatistics:
        return self._chooser.statistics

    @property
    def eval_statistics(self) -> RouterStatistics:
        return self._chooser.eval_statistics

    @property
    def _chooser(self) -> ExpertChooser:
        return self._router.chooser

    @property
    def _router(self) -> PromptRouter:
        return self.model.prompt_router

    def _layers_of_any_dtype(self) -> Iterator[BaseTunerLayer]:
        yield self._router  # the experts stay as they were trained

    def parameter_rows(self, adapter_name: str = "default") -> list[ParameterRow]:
        """What is trainable in the model, by part: the router, and anything else (nothing)."""
        by_name = (getattr(self._router, name) for name in self._router.adapter_layer_names)
        router = [parameters[adapter_name] for parameters in by_name if adapter_name in parameters]
        return [parameter_row("router", router), self.row_of_others(adapter_name)]

    def unload(self) -> nn.Module:
        """Return the base model without any adapter, router or hook of ours."""
        self._chooser.detach()
        model = super().unload()
        del model.prompt_router
        return model


def _check_num_labels(num_labels: list[int | None], model: nn.Module) -> None:
    """Check that the logits of a classifier have room for every expert's classes, and no more."""
    if None in num_labels or max(num_labels) != model.config.num_labels:
        raise ValueError(
            f"tt_lora_moe.experts: the experts classify into {', '.join(map(str, num_labels))} classes, but this "
            f"{type(model).__name__} has num_labels={model.config.num_labels}. Load it with the largest of theirs: "
            "from_pretrained(..., num_labels=...)."
        )
