"""A decision belongs to its sequence: with every cache, without one, in threads, and whoever generates."""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, pipeline

from tests.pt_moe.prompts import pt_moe
from tests.tiny_models import PAD, VOCAB_SIZE, random_ids, tiny_model
from tests.tt_lora_moe.pools import pool_of, save_experts

METHODS = ("pt_moe", "tt_lora_moe")
ROWS, LENGTH, NEW = 5, 6, 3
# float32, rows alone or beside others
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def entries(tmp_path_factory) -> list[dict]:
    return save_experts(tmp_path_factory.mktemp("experts"))


@pytest.fixture(params=METHODS)
def model(request, entries) -> PeftModel:
    return pt_moe() if request.param == "pt_moe" else pool_of(entries)


@pytest.fixture
def ids() -> Tensor:
    return random_ids(ROWS, LENGTH)


@pytest.fixture
def new() -> Tensor:
    return random_ids(ROWS, NEW, seed=7)


def filled(model: PeftModel, ids: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def continued(model: PeftModel, cache: DynamicCache, new: Tensor) -> Tensor:
    return model(input_ids=new, past_key_values=cache, use_cache=True).logits


def row_by_row(model: PeftModel, ids: Tensor, new: Tensor) -> Tensor:
    """Each row alone, through a cache of its own."""
    return torch.cat([continued(model, filled(model, i[None]), n[None]) for i, n in zip(ids, new, strict=True)])


def generate(model, ids: Tensor, **kwargs) -> Tensor:
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **kwargs}
    return model.generate(input_ids=ids, **settings)[:, ids.shape[1] :]


def loop(model: PeftModel, ids: Tensor, count: int = 6) -> Tensor:
    """Greedy decoding of one row (1, S) by hand."""
    cache, tokens = DynamicCache(config=model.config), ids
    for _ in range(count):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
        tokens = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, tokens], 1)
    return ids[:, -count:]


# -------------------------------------------------------------------------------------------------------------- caches


def permute(cache: DynamicCache) -> list[int]:
    cache.reorder_cache(torch.tensor([4, 2, 0, 1, 3]))
    return [4, 2, 0, 1, 3]


def select(cache: DynamicCache) -> list[int]:
    cache.batch_select_indices(torch.tensor([3, 1, 1]))
    return [3, 1, 1]


def repeat(cache: DynamicCache) -> list[int]:
    cache.batch_repeat_interleave(2)
    return [row for row in range(ROWS) for _ in range(2)]


def all_of_it(cache: DynamicCache) -> list[int]:
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([9, 0, 5, 2]))
    cache.reorder_cache(torch.tensor([3, 0, 1]))
    return [1, 4, 0]


COPIES = {"itself": lambda cache: cache, "copy": copy.deepcopy, "pickle": lambda c: pickle.loads(pickle.dumps(c))}


@pytest.mark.parametrize("move", [permute, select, repeat, all_of_it])
@pytest.mark.parametrize("how", COPIES)
@torch.no_grad()
def test_rows_of_a_cache_go_on_with_their_own_decision_wherever_they_are(model, ids, new, how, move):
    expected = row_by_row(model, ids, new)
    cache = COPIES[how](filled(model, ids))
    rows = move(cache)
    cache = COPIES[how](cache)
    torch.testing.assert_close(continued(model, cache, new[rows]), expected[rows], **CLOSE)


@torch.no_grad()
def test_a_copy_and_its_original_go_separate_ways(model, ids, new):
    cache = filled(model, ids)
    twin = copy.deepcopy(cache)
    twin.batch_select_indices(torch.tensor([2]))
    expected = row_by_row(model, ids, new)
    torch.testing.assert_close(continued(model, cache, new), expected, **CLOSE)
    torch.testing.assert_close(continued(model, twin, new[2:3]), expected[2:3], **CLOSE)


@torch.no_grad()
def test_a_cropped_cache_goes_on_from_there(model, ids, new):
    cache = filled(model, ids)
    expected = continued(model, copy.deepcopy(cache), new)
    continued(model, cache, random_ids(ROWS, 2, seed=8))
    cache.crop(-2)
    torch.testing.assert_close(continued(model, cache, new), expected, **CLOSE)


@torch.no_grad()
def test_a_cache_cropped_to_nothing_begins_anew(model, ids):
    cache = filled(model, random_ids(ROWS, 4, seed=9))
    cache.crop(-cache.get_seq_length())
    found = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, model(input_ids=ids).logits, **CLOSE)


@torch.no_grad()
def test_a_cache_of_another_adapter_or_of_none_is_refused(model, ids, new):
    with model.disable_adapter():
        foreign = filled(model, ids)
        continued(model, foreign, new)
    with pytest.raises(ValueError, match="was filled with no .*but now it is the .*of adapter 'default'"):
        continued(model, foreign, new)
    own = filled(model, ids)
    with model.disable_adapter(), pytest.raises(ValueError, match="'default'.*but now it is no "):
        continued(model, own, new)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="'default'.*but now it is .*'other'"):
        continued(model, own, new)


@torch.no_grad()
def test_without_return_dict_a_cache_continues_as_with_it(model, ids, new):
    cache = model(input_ids=ids, use_cache=True, return_dict=False)[1]
    found = model(input_ids=new, past_key_values=cache, return_dict=False)[0]
    torch.testing.assert_close(found, row_by_row(model, ids, new), **CLOSE)


def test_tensors_that_were_moved_by_hand_are_refused(entries, ids, new):
    model = pool_of(entries)
    cache = filled(model, ids)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.flip(0), layer.values.flip(0)
    with pytest.raises(ValueError, match="replaced past its methods"):
        continued(model, cache, new)


def test_a_cache_of_an_unknown_kind_is_refused(model, ids):
    with pytest.raises(ValueError, match="a cache of type tuple cannot keep"):
        model(input_ids=ids, past_key_values=((torch.zeros(1), torch.zeros(1)),))


# --------------------------------------------------------------------------------------------- generate, without cache


def by_whom(model: PeftModel, who: str, tmp_path):
    """What generates: the PeftModel, its base, or the base into which transformers loaded the adapter."""
    if who in ("peft", "base"):
        return model if who == "peft" else model.get_base_model()
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    if who == "from_pretrained":
        return AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    return loaded.eval()


@pytest.mark.parametrize("who", ["peft", "base", "load_adapter", "from_pretrained"])
def test_no_generated_token_is_read_by_a_router_whoever_generates(model, ids, who, tmp_path):
    expected = torch.cat([loop(model, row[None]) for row in ids])
    found = by_whom(model, who, tmp_path)
    for use_cache in (True, False):
        assert torch.equal(generate(found, ids, use_cache=use_cache), expected)


def test_a_second_adapter_of_transformers_load_adapter_is_as_of_peft(model, ids, entries, tmp_path):
    expected = generate(model, ids)
    other = pt_moe(seed=23) if "soft_prompt" in str(model) else pool_of(entries[::-1])
    loaded = by_whom(model, "load_adapter", tmp_path)
    other.save_pretrained(tmp_path / "second")
    loaded.load_adapter(str(tmp_path / "second"), "second")
    for name, tokens in (("second", generate(other, ids)), ("default", expected)):
        for module in loaded.modules():  # transformers' own set_adapter asks for a newer PEFT from 5.24 on
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(name)
        for use_cache in (True, False):
            assert torch.equal(generate(loaded, ids, use_cache=use_cache), tokens)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", [None, 1, 3, 9])
def test_guidance_decides_for_each_of_its_prompts(model, ids, negative, use_cache):
    """Against a loop of two caches; the shorter prompt is the beginning of the other one."""
    scale = 1.7
    for row in ids:
        row = row[None]
        other = row[:, -1:] if negative is None else torch.cat([row, random_ids(1, 3, seed=5)], 1)[:, :negative]
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        feeds, expected = [row, other], []
        with torch.no_grad():
            for _ in range(6):
                conditional, unconditional = (
                    model(input_ids=feed, past_key_values=cache, use_cache=True).logits[:, -1].log_softmax(-1)
                    for feed, cache in zip(feeds, caches)
                )
                token = (scale * (conditional - unconditional) + unconditional).argmax(-1, keepdim=True)
                feeds = [token, token]
                expected.append(token)
        given = {} if negative is None else {"negative_prompt_ids": other}
        found = generate(model, row, guidance_scale=scale, use_cache=use_cache, **given)
        assert torch.equal(found, torch.cat(expected, 1))


def test_training_mode_generates_as_evaluation_mode(model, ids):
    expected = generate(model, ids)
    assert torch.equal(generate(model.train(), ids), expected)


def test_a_run_of_generate_that_fails_leaves_nothing_behind(model, ids):
    def fail(*args):
        raise KeyError("in the middle")

    with torch.no_grad():
        expected, tokens = model(input_ids=ids).logits, generate(model, ids, use_cache=False)
    for module in (model.get_base_model().model.layers[1], model.get_base_model().lm_head):
        handle = module.register_forward_hook(fail)
        for call in (lambda: model(input_ids=ids), lambda: generate(model, ids[:, :2], use_cache=False)):
            with pytest.raises(KeyError, match="in the middle"):
                call()
        handle.remove()
        with torch.no_grad(), model.disable_adapter():
            bare = tiny_model("llama")(input_ids=ids).logits
            assert torch.equal(model(input_ids=ids).logits, bare)
            assert torch.equal(model.get_base_model().model(input_ids=ids)[0], tiny_model("llama").model(ids)[0])
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(generate(model, ids, use_cache=False), tokens)


def test_unload_gives_generate_back(model, ids):
    base = model.unload()
    assert not {"generate", "prepare_inputs_for_generation"} & set(vars(base))
    assert torch.equal(generate(base, ids), generate(tiny_model("llama"), ids))


# ------------------------------------------------------------------------------------------------------------- threads


def test_threads_that_share_a_model_get_their_own_results(model):
    prompts = [random_ids(2, 4 + seed % 3, seed=seed) for seed in range(12)]
    expected = [generate(model, prompt) for prompt in prompts]
    wrong, turns = [], 84 if os.environ.get("SWEEP") == "all" else 10  # of 12 generations
    together = threading.Barrier(3)

    def work(part: int) -> None:
        together.wait()
        for turn in range(turns):
            for i in range(part, len(prompts), 3):
                use_cache = bool((turn + i) % 3)
                if not torch.equal(generate(model, prompts[i], use_cache=use_cache), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ------------------------------------------------------------------------------------ a cache and its weights


def other_weights(model: PeftModel) -> None:
    parts = ("ptmoe_experts", "ttmoe_cores")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.mul_(1.5)


@pytest.mark.parametrize("how", ["loaded in its place", "loaded after it was deleted", "written to"])
@torch.no_grad()
def test_a_cache_is_not_continued_with_other_weights_of_the_same_name(model, ids, new, how, tmp_path):
    model.save_pretrained(tmp_path / "same")
    other = copy.deepcopy(model.state_dict())
    other_weights(model)
    model.save_pretrained(tmp_path / "other")
    model.load_state_dict(other)
    cache, expected = filled(model, ids), row_by_row(model, ids, new)
    torch.testing.assert_close(continued(model, copy.deepcopy(cache), new), expected, **CLOSE)
    if how == "written to":
        other_weights(model)
    else:
        if "deleted" in how:
            model.load_adapter(tmp_path / "same", "beside")
            model.set_adapter("beside")
            model.delete_adapter("default")
        model.load_adapter(tmp_path / "other", "default")
        model.set_adapter("default")
    model.eval()
    with pytest.raises(ValueError, match="whose weights are others now"):
        continued(model, copy.deepcopy(cache), new)
    model.load_adapter(tmp_path / "same", "default")
    torch.testing.assert_close(continued(model, pickle.loads(pickle.dumps(cache)), new), expected, **CLOSE)


# ----------------------------------------------------------------------------------------------------------- pipelines


def words() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": PAD, **{f"w{i}": i for i in range(1, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")


@pytest.mark.parametrize("of", ["peft", "folder"])
def test_a_pipeline_gives_the_greedy_tokens_of_generate(model, of, tmp_path):
    tokenizer, texts = words(), ["w17 w30 w41", "w5 w6 w7 w8 w9 w10", "w80 w20"]
    expected = [generate(model, torch.tensor([[int(w[1:]) for w in text.split()]]))[0].tolist() for text in texts]
    served = model
    if of == "folder":
        tiny_model("llama").save_pretrained(tmp_path / "base")
        model.base_model.model.name_or_path = str(tmp_path / "base")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapter")
        served = str(tmp_path / "adapter")
    pipe = pipeline("text-generation", model=served, tokenizer=tokenizer)
    for batch_size in (1, 3):
        outputs = pipe(texts, batch_size=batch_size, max_new_tokens=6, do_sample=False, return_tensors=True)
        for text, output, tokens in zip(texts, outputs, expected, strict=True):
            found = [t for t in output[0]["generated_token_ids"] if t != PAD]
            assert found == [int(w[1:]) for w in text.split()] + tokens


# -------------------------------------------------------------------------------------------------------------- copies


def through_torch(model: PeftModel) -> PeftModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch])
def test_copies_of_a_model_are_whole_and_independent(method, ids, copied, tmp_path):
    """With GPT-2, as a Llama with kernels cannot be pickled itself."""
    family = "gpt2"
    if method == "pt_moe":
        model = pt_moe(family)
    else:
        model = pool_of(save_experts(tmp_path, family, ("a", "b"), target_modules=["c_attn"]), family)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        tokens = generate(model, ids, use_cache=False)
        twin = copied(model)
        assert torch.equal(twin(input_ids=ids).logits, expected)
        assert torch.equal(generate(twin, ids, use_cache=False), tokens)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert not torch.equal(twin(input_ids=ids).logits, expected)
