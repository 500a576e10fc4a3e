"""Every causal language model of transformers that can be made tiny: right with an adapter of any base, or refused.

A few model types by day; all of them, some 160, with `SWEEP=all` in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from axolotl_moe_peft import PerftConfig, TTLoraConfig, TTLoraMoeConfig
from axolotl_moe_peft.tt_lora import TTLoraLinear
from tests.causal_models import causal_model_types, is_tiny, tiny_causal_model
from tests.pt_moe.prompts import T, adapter_tensors, config, randomise_prompts
from tests.tiny_models import PAD, random_ids, randomise_adapters

# one of a kind: positions that are learned, offset, ALiBi's, none; a wrapped decoder; states; an encoder; own caches
_BY_DAY = (
    "bart",
    "bert",
    "bloom",
    "ctrl",
    "falcon",
    "llama4_text",
    "mamba",
    "mpt",
    "opt",
    "qwen3_next",
    "rwkv",
    "xglm",
)
if os.environ.get("SWEEP") == "all":
    TYPES = [model_type for model_type in causal_model_types() if is_tiny(model_type)]
else:
    TYPES = sorted(set(_BY_DAY) & set(causal_model_types()))
CLOSE = {"rtol": 2e-3, "atol": 2e-4}
GREEDY = {
    "max_new_tokens": 4,
    "do_sample": False,
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "pad_token_id": PAD,
}

pytestmark = pytest.mark.sweep


def attached(base: PreTrainedModel, adapter: Callable) -> PeftModel | None:
    """The base with the adapter; None if it was refused, and then it is as it was."""
    modules, hooks, own = list(base.modules()), hooks_of(base), dict(vars(base))
    try:
        return get_peft_model(base, adapter()).eval()
    except ValueError as error:
        assert str(error).startswith(("perft", "pt_moe", "tt_lora", "Target modules"))
        assert list(base.modules()) == modules
        assert hooks_of(base) == hooks
        assert vars(base).keys() == own.keys()
        return None


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows and their mask."""
    width = max(map(len, rows))
    pads = [(width - len(r), 0) if side == "left" else (0, width - len(r)) for r in rows]
    ids = torch.stack([F.pad(r, p, value=PAD) for r, p in zip(rows, pads)])
    return ids, torch.stack([F.pad(torch.ones_like(r), p) for r, p in zip(rows, pads)])


def unpadded(values: Tensor, rows: list[Tensor], side: str) -> list[Tensor]:
    return [v[-len(r) :] if side == "left" else v[: len(r)] for v, r in zip(values, rows)]


def bare_pads_rightly(model: PreTrainedModel, rows: list[Tensor], side: str) -> bool:
    """Whether padding does not matter to the model itself."""
    ids, mask = padded(rows, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    try:
        logits = model(**call, position_ids=positions).logits
    except (TypeError, ValueError):
        logits = model(**call).logits
    alone = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    return all(torch.allclose(a, b, **CLOSE) for a, b in zip(unpadded(logits, rows, side), alone))


def bare_caches_rightly(model: PreTrainedModel, row: Tensor) -> bool:
    """Whether a cache does not matter to the model itself, as it does to Dory, whose layers run several times."""
    uncached = model(input_ids=row[None], use_cache=False).logits
    return torch.allclose(model(input_ids=row[None], use_cache=True).logits, uncached, **CLOSE)


def greedy_or_refused(model: PeftModel, row: Tensor, **kwargs) -> Tensor | None:
    try:
        return model.generate(input_ids=row[None], **GREEDY, **kwargs)[0, len(row) :]
    except ValueError as error:
        assert "pt_moe" in str(error) or "tt_lora_moe" in str(error) or "cache of type" in str(error)
        return None


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_a_soft_prompt_is_as_one_built_by_hand_or_refused(model_type):
    model = attached(tiny_causal_model(model_type), lambda: config("pt"))
    if model is None:
        return
    randomise_prompts(model)
    bare, prompt = tiny_causal_model(model_type), adapter_tensors(model)["experts"][0].detach()

    def by_hand(ids: Tensor) -> Tensor:
        embeds = torch.cat([prompt, bare.get_input_embeddings()(ids)])[None]
        return bare(inputs_embeds=embeds, use_cache=False).logits[0, T:]

    rows = [random_ids(1, 9, seed=1)[0], random_ids(1, 6, seed=2)[0]]
    expected = [by_hand(row) for row in rows]
    for row, logits in zip(rows, expected):
        torch.testing.assert_close(model(input_ids=row[None], use_cache=False).logits[0], logits, **CLOSE)
    for side in ("left", "right"):
        if bare_pads_rightly(bare, rows, side):
            ids, mask = padded(rows, side)
            found = model(input_ids=ids, attention_mask=mask, use_cache=bare_caches_rightly(bare, rows[0])).logits
            found = unpadded(found, rows, side)
            for logits, own in zip(found, expected):
                torch.testing.assert_close(logits, own, **CLOSE)
    packed = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }
    try:
        found = model(**packed, use_cache=False).logits[0].split([len(row) for row in rows])
    except (TypeError, ValueError) as error:
        assert "pt_moe" in str(error) or "position_ids" in str(error)
    else:
        for logits, own in zip(found, expected):
            torch.testing.assert_close(logits, own, **CLOSE)
    tokens = rows[0]
    for _ in range(GREEDY["max_new_tokens"]):
        tokens = torch.cat([tokens, by_hand(tokens)[-1:].argmax(-1)])
    for use_cache in (True, False):
        if use_cache and not bare_caches_rightly(bare, rows[0]):
            continue
        found = greedy_or_refused(model, rows[0], use_cache=use_cache)
        assert found is None or torch.equal(found, tokens[len(rows[0]) :])


@torch.no_grad()
def merged_by_hand(bare: PreTrainedModel, model: PeftModel) -> PreTrainedModel:
    """The bare model with the product of each layer's cores, one core after the other, added to its weight."""
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, TTLoraLinear):
            cores_in, cores_out = layer.cores("default")
            down_IR, up_RO = cores_in[0][0], cores_out[0]
            for core in cores_in[1:]:  # the first core has the fastest digit of the inputs
                down_IR = torch.einsum("sb,btc->tsc", down_IR, core).flatten(0, 1)
            for core in cores_out[1:]:  # the last one that of the outputs
                up_RO = torch.einsum("asb,btc->astc", up_RO, core).flatten(1, 2)
            delta_IO = layer.tt_config["default"].alpha * down_IR @ up_RO[..., 0]
            weight = bare.get_submodule(name).weight
            weight += delta_IO if isinstance(layer.base_layer, Conv1D) else delta_IO.T
    return bare


@pytest.mark.parametrize("model_type", TYPES)
def test_a_low_rank_update_is_as_in_the_weights_and_learns_or_is_refused(model_type):
    adapter = TTLoraConfig(rank=2, alpha=30, target_modules="all-linear", task_type="CAUSAL_LM")
    model = attached(tiny_causal_model(model_type), lambda: adapter)
    if model is None:
        return
    merged, rows = merged_by_hand(tiny_causal_model(model_type), model), random_ids(2, 9)
    with torch.no_grad():
        expected = merged(input_ids=rows, use_cache=False).logits
        torch.testing.assert_close(model(input_ids=rows, use_cache=False).logits, expected, **CLOSE)
        for use_cache in (True, False):
            tokens = merged.generate(input_ids=rows, **GREEDY, use_cache=use_cache)
            assert torch.equal(model.generate(input_ids=rows, **GREEDY, use_cache=use_cache), tokens)
    bare, batch = tiny_causal_model(model_type), {"input_ids": random_ids(8, 16), "labels": random_ids(8, 16)}
    for trained in (bare, model):
        trained(**batch, use_cache=False).loss.backward()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, TTLoraLinear) and has_gradient(bare.get_submodule(name).weight):
            assert all(has_gradient(core) for side in layer.cores("default") for core in side), name


def has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_a_pool_gives_each_row_its_own_expert_or_is_refused(model_type, tmp_path):
    names = ("a", "b")
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        expert = attached(
            tiny_causal_model(model_type),
            lambda: TTLoraConfig(rank=2, alpha=300, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        if expert is None:
            return
        expert.save_pretrained(tmp_path / name)
    entries = [{"name": name, "path": str(tmp_path / name)} for name in names]
    pool = attached(tiny_causal_model(model_type), lambda: TTLoraMoeConfig(experts=entries, task_type="CAUSAL_LM"))
    if pool is None:
        return
    weight = pool.base_model.model.prompt_router.ttmoe_weight["default"]
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    singles = [PeftModel.from_pretrained(tiny_causal_model(model_type), e["path"]).eval() for e in entries]
    rows = random_ids(6, 8)
    logits = pool(input_ids=rows, use_cache=False).logits
    chosen = pool.base_model.chosen_experts["default"].tolist()
    for row, expert, found in zip(rows, chosen, logits):
        torch.testing.assert_close(found, singles[expert](input_ids=row[None], use_cache=False).logits[0], **CLOSE)
    for row, expert in list(zip(rows, chosen))[:3]:
        for use_cache in (True, False):
            expected = singles[expert].generate(input_ids=row[None], **GREEDY, use_cache=use_cache)[0, len(row) :]
            found = greedy_or_refused(pool, row, use_cache=use_cache)
            assert found is None or torch.equal(found, expected)


@pytest.mark.parametrize("model_type", TYPES)
def test_adapters_beside_dense_mlps_act_and_learn_or_are_refused(model_type):
    settings = {"target_modules": "mlp", "num_experts": 3, "rank": 4, "task_type": "CAUSAL_LM"}
    base, ids = tiny_causal_model(model_type), random_ids(2, 12)
    with torch.no_grad():  # with gradients Doge takes another kernel
        expected = base(input_ids=ids, use_cache=False).logits
        model = attached(base, lambda: PerftConfig(**settings))
        if model is None:
            return
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
        randomise_adapters(model)
        assert not torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, **CLOSE)
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert model.base_model.statistics.pop()["router_aux_loss"] > 0
