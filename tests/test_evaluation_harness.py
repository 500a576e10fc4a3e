"""lm_eval's hf backend on a local task: the log-likelihoods of plain PEFT, in batches of rows of unlike lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.cli_helpers import fill_vocabulary, save_base_model
from tests.tiny_adapters import families, trained
from tests.tiny_models import tiny_model
from tests.tt_lora_moe.pools import save_experts

# contexts and continuations of unlike lengths, of one token, too; some pairs have a length in common
QUESTIONS = {
    "what is 1? ": ["yes", "no, it is 2", "a"],
    "12345 ": ["no", "a", "it is not a text"],
    "why? ": ["b", "as"],
}
KINDS = ("perft", "tt_lora", "tt_lora_moe", "tt_lora_moe embeddings", "pt_moe", "pt_moe one prompt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bases, and a task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    for family in ("llama", "mixtral"):
        save_base_model(folder / family, family)
        fill_vocabulary(folder / family)
    rows = [{"question": question, "choices": choices, "label": 0} for question, choices in QUESTIONS.items()]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tiny.yaml").write_text(f"""
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")
    return folder


@pytest.fixture(scope="module")
def saved(folder: Path) -> Callable[[str], tuple[Path, Path]]:
    """`saved(kind)`: the folders of a base and of a trained adapter."""

    def save(kind: str) -> tuple[Path, Path]:
        base, out = folder / families(kind)[0], folder / kind.replace(" ", "_")
        if not out.exists():
            experts = save_experts(folder / "experts", families(kind)[0]) if kind.startswith("tt_lora_moe") else []
            trained(kind, AutoModelForCausalLM.from_pretrained(base), experts).save_pretrained(out)
        return base, out

    return save


@torch.no_grad()
def log_likelihood(model: torch.nn.Module, context: list[int], continuation: list[int]) -> float:
    """By plain PEFT, for one row whose answer has labels, as in training."""
    ids = torch.tensor([context + continuation])
    labels = torch.tensor([[-100] * len(context) + continuation])
    logits = model(input_ids=ids, labels=labels).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(continuation)[:, None]).sum().item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tasks_log_likelihoods_are_those_of_plain_peft(kind, saved, folder):
    base, out = saved(kind)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={base},peft={out},dtype=float32",
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=3,
        log_samples=True,
        bootstrap_iters=0,
    )
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    samples = results["samples"]["tiny"]
    assert len(samples) == len(QUESTIONS)
    for sample in samples:
        question, choices = sample["doc"]["question"], sample["doc"]["choices"]
        pairs = [HFLM._encode_pair(_Encoder(tokenizer), question, choice) for choice in choices]
        expected = [log_likelihood(model, *pair) for pair in pairs]
        assert [float(answer) for answer, _ in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-5)


class _Encoder:
    """What `_encode_pair` needs of an HFLM."""

    backend = "causal"

    def __init__(self, tokenizer) -> None:
        self.tok_encode = lambda text, **kwargs: tokenizer(text, add_special_tokens=False).input_ids


def _requests(texts: dict[str, list[str]]) -> list[Instance]:
    pairs = [(question, choice) for question, choices in texts.items() for choice in choices]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def test_a_model_that_was_there_before_and_a_batch_size_that_lm_eval_finds(saved):
    base, out = saved("tt_lora_moe")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    one_by_one = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(_requests(QUESTIONS))
    found = HFLM(pretrained=model, tokenizer=tokenizer, batch_size="auto", max_batch_size=4)
    answers = found.loglikelihood(_requests(QUESTIONS))
    assert [a for a, _ in answers] == pytest.approx([a for a, _ in one_by_one], rel=1e-5)
    assert found.loglikelihood([]) == []
    # cut from the left where it is too long for the model
    found = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=12)
    (answer,) = found.loglikelihood(_requests({"a long question?" * 3: ["an answer"]}))
    ids = tokenizer("a long question?" * 3 + "an answer", add_special_tokens=False).input_ids[-13:]
    assert answer[0] == pytest.approx(log_likelihood(model, ids[:-9], ids[-9:]), rel=1e-5)


def test_other_adapters_are_evaluated_as_ever(saved, monkeypatch):
    base, _ = saved("tt_lora_moe")  # from whose attaching on lm_eval is watched
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    calls = []
    method = HFLM._loglikelihood_tokens.__wrapped__
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(base), batch_size=8)
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    answers = lm.loglikelihood(_requests(QUESTIONS))
    assert calls == [{}]  # one batch, without labels
    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", method)
    assert lm.loglikelihood(_requests(QUESTIONS)) == answers
