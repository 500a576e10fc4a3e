"""Parameters of PERFT on the real models, on the meta device: closed forms and the figures computed from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from axolotl_moe_peft import PerftConfig
from axolotl_moe_peft.shared.summary import format_table

# allenai/OLMoE-1B-7B-0924 and mistralai/Mixtral-8x7B-v0.1: (configuration class, model class, sizes)
BASES = {
    "olmoe": (
        OlmoeConfig,
        OlmoeForCausalLM,
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
    ),
}
BASE_PARAMETERS = {"olmoe": 6_919_161_856, "mixtral": 46_702_792_704}

RANKS = (4, 8, 16, 32)
VARIANTS = {"S": "single", "D": "dense", "R": "routed", "E": "embedded"}
# variant, N, K (all that are active), then trainable/activated parameters in millions for each of RANKS
FIGURES = {
    "olmoe": """
    S  1 1      0.262/0.262     0.524/0.524     1.049/1.049     2.097/2.097
    D  2 2      0.524/0.524     1.049/1.049     2.097/2.097     4.194/4.194
    D  4 4      1.049/1.049     2.097/2.097     4.194/4.194     8.389/8.389
    D  8 8      2.097/2.097     4.194/4.194     8.389/8.389   16.777/16.777
    R  1 1      0.295/0.295     0.557/0.557     1.081/1.081     2.130/2.130
    R  2 1      0.590/0.328     1.114/0.590     2.163/1.114     4.260/2.163
    R  2 2      0.590/0.590     1.114/1.114     2.163/2.163     4.260/4.260
    R  4 1      1.180/0.393     2.228/0.655     4.325/1.180     8.520/2.228
    R  4 2      1.180/0.655     2.228/1.180     4.325/2.228     8.520/4.325
    R  4 4      1.180/1.180     2.228/2.228     4.325/4.325     8.520/8.520
    R  8 1      2.359/0.524     4.456/0.786     8.651/1.311    17.039/2.359
    R  8 2      2.359/0.786     4.456/1.311     8.651/2.359    17.039/4.456
    R  8 4      2.359/1.311     4.456/2.359     8.651/4.456    17.039/8.651
    R  8 8      2.359/2.359     4.456/4.456     8.651/8.651   17.039/17.039
    R 16 1      4.719/0.786     8.913/1.049    17.302/1.573    34.079/2.621
    R 16 2      4.719/1.049     8.913/1.573    17.302/2.621    34.079/4.719
    R 16 4      4.719/1.573     8.913/2.621    17.302/4.719    34.079/8.913
    R 16 8      4.719/2.621     8.913/4.719    17.302/8.913   34.079/17.302
    R 32 8      9.437/3.146    17.826/5.243    34.603/9.437   68.157/17.826
    R 64 8     18.874/4.194    35.652/6.291   69.206/10.486  136.315/18.874
    E 64 8     16.777/2.097    33.554/4.194    67.109/8.389  134.218/16.777
    """,
    "mixtral": """
    S  1 1      1.049/1.049     2.097/2.097     4.194/4.194     8.389/8.389
    D  2 2      2.097/2.097     4.194/4.194     8.389/8.389   16.777/16.777
    D  4 4      4.194/4.194     8.389/8.389   16.777/16.777   33.554/33.554
    D  8 8      8.389/8.389   16.777/16.777   33.554/33.554   67.109/67.109
    R  1 1      1.180/1.180     2.228/2.228     4.325/4.325     8.520/8.520
    R  2 1      2.359/1.311     4.456/2.359     8.651/4.456    17.039/8.651
    R  2 2      2.359/2.359     4.456/4.456     8.651/8.651   17.039/17.039
    R  4 1      4.719/1.573     8.913/2.621    17.302/4.719    34.079/8.913
    R  4 2      4.719/2.621     8.913/4.719    17.302/8.913   34.079/17.302
    R  4 4      4.719/4.719     8.913/8.913   17.302/17.302   34.079/34.079
    R  8 1      9.437/2.097    17.826/3.146    34.603/5.243    68.157/9.437
    R  8 2      9.437/3.146    17.826/5.243    34.603/9.437   68.157/17.826
    R  8 4      9.437/5.243    17.826/9.437   34.603/17.826   68.157/34.603
    R  8 8      9.437/9.437   17.826/17.826   34.603/34.603   68.157/68.157
    R 16 1     18.874/3.146    35.652/4.194    69.206/6.291  136.315/10.486
    R 16 2     18.874/4.194    35.652/6.291   69.206/10.486  136.315/18.874
    R 16 4     18.874/6.291   35.652/10.486   69.206/18.874  136.315/35.652
    R 16 8    18.874/10.486   35.652/18.874   69.206/35.652  136.315/69.206
    R 32 8    37.749/12.583   71.303/20.972  138.412/37.749  272.630/71.303
    R 64 8    75.497/16.777  142.606/25.166  276.824/41.943  545.260/75.497
    E  8 2      8.389/2.097    16.777/4.194    33.554/8.389   67.109/16.777
    """,
}


class Row(NamedTuple):
    family: str
    variant: str
    n: int
    k: int
    millions: dict[int, tuple[str, str]]

    def __str__(self) -> str:
        return f"{self.family}-{self.variant}-{self.n}-{self.k}"


def rows() -> Iterator[Row]:
    for family, table in FIGURES.items():
        for line in table.strip().splitlines():
            variant, n, k, *figures = line.split()
            pairs = [tuple(figure.split("/")) for figure in figures]
            yield Row(family, variant, int(n), int(k), dict(zip(RANKS, pairs, strict=True)))


ROWS = list(rows())


@cache
def meta_model(family: str) -> PreTrainedModel:
    config_class, model_class, sizes = BASES[family]
    with torch.device("meta"):
        return model_class(config_class(**sizes))


@contextmanager
def adapted(row: Row, rank: int, **kwargs) -> Iterator[PeftModel]:
    """The family's model with a row's adapter, which comes off again afterwards."""
    if row.variant in "DR":
        kwargs["num_experts"] = row.n
    if row.variant == "R":
        kwargs["num_experts_per_tok"] = row.k
    config = PerftConfig(variant=VARIANTS[row.variant], rank=rank, task_type="CAUSAL_LM", **kwargs)
    model = get_peft_model(meta_model(row.family), config)
    try:
        yield model
    finally:
        assert model.unload() is meta_model(row.family)


def closed_form(row: Row, rank: int) -> dict[str, tuple[int, int]]:
    """(trainable, activated) by part: N or K units of 2 r d parameters in each layer; a router counts whole."""
    sizes = BASES[row.family][2]
    layers, width = sizes["num_hidden_layers"], sizes["hidden_size"]
    router = layers * row.n * width if row.variant == "R" else 0
    experts = (layers * row.n * 2 * rank * width, layers * row.k * 2 * rank * width)
    return {"experts": experts, "router": (router, router), "other": (0, 0)}


def totals(parts: dict[str, tuple[int, int]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*parts.values(), strict=True))


def counts(model: PeftModel) -> dict[str, tuple[int, int]]:
    return {row.part: (row.parameters, row.activated) for row in model.base_model.parameter_rows()}


def trainable_parameters(model: PeftModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", BASES)
def test_base_model_has_its_published_size(family):
    assert sum(p.numel() for p in meta_model(family).parameters()) == BASE_PARAMETERS[family]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_closed_forms_give_the_tables_figures(row):
    millions = {rank: tuple(f"{n / 1e6:.3f}" for n in totals(closed_form(row, rank))) for rank in RANKS}
    assert millions == row.millions


@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_models_hold_what_the_closed_forms_say(row, rank):
    expected = closed_form(row, rank)
    with adapted(row, rank) as model:
        assert counts(model) == expected
        total, _ = totals(expected)
        assert trainable_parameters(model) == total
        assert sum(p.numel() for p in model.parameters()) == BASE_PARAMETERS[row.family] + total


@pytest.mark.parametrize("row", [r for r in ROWS if (r.n, r.k) in {(1, 1), (2, 2), (4, 2), (64, 8)}], ids=str)
def test_a_parallel_adapter_counts_as_a_lora_of_its_width(row):
    with adapted(row, 8, expert_type="parallel_adapter") as model:
        assert counts(model) == closed_form(row, 8)
        assert trainable_parameters(model) == totals(closed_form(row, 8))[0]


@pytest.mark.parametrize("row", [r for r in ROWS if r.n == 8 or r.variant in "ES"], ids=str)
def test_the_printed_table_holds_the_parts_and_their_totals(row):
    with adapted(row, 16) as model:
        header, *lines = format_table(model.base_model.parameter_rows()).splitlines()
    assert header.split() == ["part", "tensors", "parameters", "per", "token", "dtype"]
    layers, parts = BASES[row.family][2]["num_hidden_layers"], closed_form(row, 16)
    tensors = {"experts": 2 * layers, "router": layers if row.variant == "R" else 0, "other": 0}
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    assert list(cells) == ["experts", "router", "other", "total"]
    for part, (count, activated) in parts.items():
        dtype = ["float32"] if count else []
        assert cells[part] == [str(tensors[part]), f"{count:,}", f"{activated:,}", *dtype]
    assert cells["total"] == [f"{number:,}" for number in (sum(tensors.values()), *totals(parts))]


def test_only_the_chosen_layers_count():
    row = next(r for r in ROWS if str(r) == "olmoe-R-4-2")
    with adapted(row, 16, layers_to_transform=[0, 5, 15]) as model:
        per_layer = 4 * 2 * 16 * 2048 + 4 * 2048
        assert trainable_parameters(model) == 3 * per_layer


def test_whatever_else_is_trainable_shows_in_the_table():
    row = next(r for r in ROWS if str(r) == "olmoe-S-1-1")
    with adapted(row, 4) as model:
        model.base_model.model.model.norm.weight.requires_grad_()
        other = next(r for r in model.base_model.parameter_rows() if r.part == "other")
        assert (other.tensors, other.parameters, other.activated) == (1, 2048, 2048)
