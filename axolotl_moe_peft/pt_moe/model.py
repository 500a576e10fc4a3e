"""PTMoeModel: attaches PT-MoE prompts to the decoder of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..shared.auxiliary import AuxiliaryLosses
from ..shared.batches import find_sequences
from ..shared.evaluation_harness import watch_evaluation
from ..shared.statistics import RouterStatistics
from ..shared.summary import ParameterRow, parameter_row
from ..shared.tuner import Tuner, whole
from .bases import check_base, embedding_width
from .config import PTMoeConfig
from .insertion import PromptInsertion
from .layer import PTMoeLayer
from .mrope import prompted_part

_LAYER_NAME = "soft_prompt"
# Many different tokens, so that the embeddings span almost as many directions as there are virtual tokens.
_NEUTRAL_TEXT = (
    "Read the following text carefully, think about what it asks for, and answer with a correct, complete and short "
    "reply. Use only facts that are given or well known, work through every step in order, check each result once "
    "more, and keep to the form in which the question wants its solution."
)


class PTMoeModel(Tuner):
    """PT-MoE: a mixture of factorised soft prompts, chosen once per sequence (arXiv 2505.09519).

    Args:
        model: a model of transformers whose decoder goes from embeddings to last hidden states.
        config: a PTMoeConfig.
        adapter_name: name of the adapter.

    Attributes:
        auxiliary: the router loss's context.
        statistics: what was measured of the router in training; `.pop()` reads the figures since the last read.

    Raises:
        ValueError: the model or the configuration does not allow a prompt.
    """

    # occurs in no base model; `pt_moe_` does, in `gpt_moe_`
    prefix = "ptmoe_"
    tuner_layer_cls = PTMoeLayer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # a call, not `.forward` as in BaseTuner: the labels reach the prompt through the model's hooks
        return self.model(*args, **kwargs)

    @property
    def auxiliary(self) -> AuxiliaryLosses:
        return self._layer.auxiliary

    @property
    def statistics(self) -> RouterStatistics:
        return self.auxiliary.statistics

    def prepare_trainer(self, trainer: Any) -> None:
        """Tell TRL's trainers that the logits have no places for the prompt, of which they would cut some off."""
        if getattr(trainer, "num_virtual_tokens", 0):
            trainer.num_virtual_tokens = 0

    def _prepare_model(self, peft_config: PTMoeConfig, model: nn.Module) -> None:
        check_base(model, peft_config)
        peft_config.choose_defaults()
        decoder = prompted_part(model)
        self._embedding_name = next(n for n, m in model.named_modules() if m is decoder.get_input_embeddings())

    def _check_target_module_exists(self, peft_config: PTMoeConfig, key: str) -> bool:
        return key == self._embedding_name

    def _create_and_replace(
        self,
        peft_config: PTMoeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Add the adapter to the decoder's layer; the target, the token embeddings, stays as it is."""
        if self._layer is None:
            layer = PTMoeLayer(AuxiliaryLosses(self.model))
            watch_evaluation()
            layer.insertion = PromptInsertion(layer, self.model, prompted_part(self.model))
            prompted_part(self.model).add_module(_LAYER_NAME, layer.train(self.model.training))
        layer, weight = self._layer, target.weight
        layer.update_layer(adapter_name, peft_config, embedding_width(self.model), weight.device)
        if not layer.ptmoe_experts[adapter_name].is_meta:  # else it is loaded, or materialised from another process
            with whole([weight]):
                embeddings_NTD = self._initial_embeddings(adapter_name, peft_config, target)
            layer.reset_parameters(adapter_name, embeddings_NTD)

    @torch.no_grad()
    def _initial_embeddings(self, adapter_name: str, config: PTMoeConfig, embedding: nn.Module) -> Tensor:
        """Embeddings (N or 1, T, D) of the initial texts, tiled or cut to T tokens."""
        texts = config.init_text if isinstance(config.init_text, list) else [config.init_text or _NEUTRAL_TEXT]
        vocab_size, length = embedding.weight.shape[0], config.num_virtual_tokens
        ids = None
        if not config.inference_mode:  # else it is loaded next
            ids = self._tokenise(texts, config)
        if ids is None or max(map(max, ids)) >= vocab_size:
            self._layer.without_text[adapter_name] = self._layer.ptmoe_experts[adapter_name]
            generator = torch.Generator().manual_seed(torch.initial_seed())
            ids = [torch.randint(vocab_size, (length,), generator=generator).tolist()]
        tiled = [(text_ids * length)[:length] for text_ids in ids]
        return embedding(torch.tensor(tiled, device=embedding.weight.device)).float()

    def _tokenise(self, texts: list[str], config: PTMoeConfig) -> list[list[int]] | None:
        """Token ids of each text with the base model's tokenizer; None if it cannot be had."""
        base = self.model.name_or_path or config.base_model_name_or_path
        if not base:
            return None
        try:
            tokenizer = AutoTokenizer.from_pretrained(base, revision=config.revision)
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(f"pt_moe: the tokenizer of {base!r} cannot be loaded: {error}", stacklevel=2)
            return None
        ids = tokenizer(texts, add_special_tokens=False).input_ids
        return ids if all(ids) else None

    @torch.no_grad()
    def measure_on(self, batches: Iterable[Mapping[str, Any]], adapter_name: str = "default") -> None:
        """Measure what the router inputs of the training data have in common, unless the adapter knows it.

        Without it the first prompts of training do. In a model that is to be sharded it has to be called before.

        Args:
            batches: arguments of the model's calls, the same on every process: input_ids (B, S), and as the data have
                them labels, attention_mask and position_ids.
            adapter_name: whose router.
        """
        layer, config = self._layer, self.peft_config[adapter_name]
        embedding = prompted_part(self.model).get_input_embeddings()
        if not config.center_router_input or embedding.weight.is_meta:  # another process gives the mean, too
            return
        if layer.ptmoe_router_mean_count[adapter_name].any():
            return
        inputs = []
        for batch in batches:
            batch = {name: value.to(embedding.weight.device) for name, value in batch.items()}
            embeds_BSD = embedding(batch["input_ids"])
            inputs.append(find_sequences(batch, config.router_input).prompt_mean(embeds_BSD))
        if inputs:
            layer.set_router_mean(adapter_name, torch.cat(inputs).mean(0))

    def parameter_rows(self, adapter_name: str = "default") -> list[ParameterRow]:
        """What is trainable in the model, by part: experts, the factor they share, router, other (nothing)."""
        layer, config = self._layer, self.peft_config[adapter_name]
        experts = [layer.ptmoe_experts[adapter_name]]
        shared = [layer.ptmoe_shared[adapter_name]] if adapter_name in layer.ptmoe_shared else []
        routers = (layer.ptmoe_router_weight, layer.ptmoe_router_bias)
        router = [part[adapter_name] for part in routers if adapter_name in part]  # its mean is not trained
        return [
            parameter_row("experts", experts, experts[0].numel() // config.num_experts * config.top_k),
            parameter_row("shared", shared),
            parameter_row("router", router),
            self.row_of_others(adapter_name),
        ]

    @property
    def _layer(self) -> PTMoeLayer | None:
        return getattr(prompted_part(self.model), _LAYER_NAME, None)

    def unload(self) -> nn.Module:
        """Return the base model without any adapter or hook of ours."""
        self.auxiliary.detach()
        self._layer.insertion.detach()
        delattr(prompted_part(self.model), _LAYER_NAME)
        return super().unload()
