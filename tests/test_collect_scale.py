"""Collections go on from caches, survive kills and full disks, keep others out, and are shared out over processes."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from filelock import FileLock
from launching import launch
from peft import PromptTuningConfig, get_peft_model
from test_collect import BLOCKS, MLP_OUTPUTS, QUESTIONS, TOKENIZER, Literal, close, contrast, expected_pairs, files
from test_prompts import byte_tokenizer
from tiny import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, JambaConfig, MistralConfig, OpenAIGPTConfig, Phi3Config

import peft_edit.files
from peft_edit import ActivationStore, HPRConfig, SEAConfig, collect_activations, fit_sea
from peft_edit.activations import batches as schedule
from peft_edit.activations import collect as collecting
from peft_edit.activations import neutral as generating
from peft_edit.activations.store import ShardFile, StoreShape, begin, is_whole, locked, read_index, shards
from peft_edit.activations.store.index import write_tensors
from peft_edit.models.run import cache_name, can_share_prompts, prompt_cache, select_rows


GENERATED = {"batch_size": 2, "neutral": "generated", "answers": "all", "max_new_tokens": 3}


@pytest.fixture
def sharing(monkeypatch):
    """Forward passes cost nothing beside their tokens, so that caches are shared however short the prompts are."""
    monkeypatch.setattr(schedule, "FORWARD_TOKENS", 0)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(schedule, "SHARD_SEQUENCES", 2)


def cuts(path):
    return read_index(Path(path), ["bucket_cuts"])["bucket_cuts"].tolist()


# Caches of prompts


def assert_rows(found, model, family, site, neutral=None):
    names = {"mlp": MLP_OUTPUTS, "block": BLOCKS}[site]
    literal = Literal(model, *(names[family].format(layer) for layer in found.layers))
    for layer in found.layers:
        name = names[family].format(layer)
        expected = {"positive": [], "negative": [], "neutral": []}
        for question in QUESTIONS:
            for positive, negative in expected_pairs(question, "all"):
                expected["positive"].append(literal(positive, name)[-1])
                expected["negative"].append(literal(negative, name)[-1])
                at = question[0] if neutral == "prompt" else question[0] + question[3]
                expected["neutral"].append(literal(at, name)[-1])
        for sign, rows in expected.items():
            close(getattr(found, sign)(layer), torch.stack(rows))


@pytest.mark.parametrize("neutral", ["text", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_go_on_from_a_cache_are_those_of_single_passes(tmp_path, sharing, family, neutral):
    model = tiny_model(family)
    options = {"answers": "all", "neutral": neutral}
    for i, batching in enumerate(({}, {"batch_size": 2}, {"max_tokens_per_batch": 13}, {"batch_size": 1})):
        path = tmp_path / str(i)
        collect_activations(model, TOKENIZER, contrast(), path, site=("mlp", "block"), **options, **batching)
        assert any(cut for _, cut in cuts(path))
        for site in ("mlp", "block"):
            assert_rows(ActivationStore(path, site), model, family, site, neutral)


@pytest.mark.parametrize("window", [4, 100])
def test_sliding_windows_go_on_from_a_cache(tmp_path, sharing, window):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=64, intermediate_size=48, sliding_window=window, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    found = collect_activations(model, TOKENIZER, contrast(), tmp_path, neutral="text", answers="all")
    assert max(cut for _, cut in cuts(tmp_path)) == 6
    assert_rows(found, model, "llama", "mlp")


def test_what_all_prompts_begin_with_is_run_once(tmp_path, sharing, llama):
    questions = [([40, 41, 42, 43, *q[0]], *q[1:]) for q in QUESTIONS]
    rows = []
    llama.model.register_forward_pre_hook(lambda m, a, kwargs: rows.append(kwargs["input_ids"]), with_kwargs=True)
    found = collect_activations(llama, TOKENIZER, contrast(questions), tmp_path, tokens="answer")
    assert [ids.tolist() for ids in rows if len(ids) == 1].count([[40, 41, 42, 43]]) == len(
        [common for common, _ in cuts(tmp_path) if common]
    )
    plain = collect_activations(tiny_model(), TOKENIZER, contrast(questions), tmp_path / "b", tokens="answer")
    close(found.positive(1), plain.positive(1))
    assert torch.equal(found.questions(), plain.questions())


def test_an_answer_that_ends_at_once_goes_on_from_a_shorter_cache(tmp_path, sharing, monkeypatch, llama):
    monkeypatch.setattr(generating, "batch_answers", lambda m, t, p, batches, *_: ([[] for _ in b] for b in batches))
    data = contrast([(*q[:3], None) for q in QUESTIONS])
    found = collect_activations(llama, TOKENIZER, data, tmp_path, answers="all")
    literal = Literal(llama, MLP_OUTPUTS["llama"].format(1))
    neutral = [literal(q[0])[-1] for q in QUESTIONS for _ in expected_pairs(q, "all")]
    close(found.neutral(1), torch.stack(neutral))


def test_models_whose_state_cannot_be_copied_run_whole_sequences(tmp_path, sharing):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = JambaConfig(
        **sizes, intermediate_size=48, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
        num_experts=1, num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip
    recurrent = AutoModelForCausalLM.from_config(config).eval()
    assert not can_share_prompts(recurrent)
    collect_activations(recurrent, TOKENIZER, contrast(), tmp_path, neutral="text", site="block", answers="all")
    assert cuts(tmp_path) == [[0, 0]]
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    factors["original_max_position_embeddings"] = 32
    long = Phi3Config(
        **sizes, intermediate_size=48, max_position_embeddings=64, rope_parameters=factors, pad_token_id=0
    )
    assert not can_share_prompts(AutoModelForCausalLM.from_config(long))
    assert all(can_share_prompts(tiny_model(family)) for family in FAMILIES)


def test_blocks_that_return_a_list_are_collected_and_edited(tmp_path):
    config = OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    options = {"neutral": "generated", "max_new_tokens": 3, "answers": "all", "site": "block"}
    found = collect_activations(model, TOKENIZER, contrast(), tmp_path, **options)
    assert found.modules[1] == "transformer.h.1" and not can_share_prompts(model)
    literal = Literal(model, found.modules[1])
    close(found.positive(1)[0], literal(expected_pairs(QUESTIONS[0], "all")[0][0])[-1])
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(ids).logits
        adapted = get_peft_model(model, SEAConfig(site="block", init_weights=False))
        assert not torch.allclose(adapted(ids).logits, before, atol=1e-3)


def test_selecting_rows_of_a_cache_leaves_it_as_it_is(llama):
    with torch.no_grad():
        cache = prompt_cache(llama, [(3, 4), (5, 6)])
        before = [layer.keys.clone() for layer in cache.layers]
        selected = select_rows(cache, [1, 1, 0])
        llama.model(input_ids=torch.tensor([[7]] * 3), use_cache=True, **{cache_name(llama): selected})
    assert selected.get_seq_length() == 3 and cache.get_seq_length() == 2
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_makes_no_difference(tmp_path, llama, side):
    for pad_token in (None, "w1"):
        TOKENIZER.padding_side, TOKENIZER.pad_token = side, pad_token
        path = tmp_path / str(pad_token)
        found = collect_activations(llama, TOKENIZER, contrast(), path, neutral="text", answers="all")
        assert_rows(found, llama, "llama", "mlp")


def test_an_edit_that_depends_on_padding_is_refused(tmp_path, llama):
    model = get_peft_model(llama, HPRConfig(token_scope="last", init_weights=False))
    with pytest.raises(ValueError, match="depends on padding"):
        collect_activations(model, TOKENIZER, contrast(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_virtual_tokens_are_refused(tmp_path, llama):
    model = get_peft_model(llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"prompt learning \(PROMPT_TUNING\) puts virtual tokens before the prompts"):
        collect_activations(model, TOKENIZER, contrast(), tmp_path / "a")


def test_a_model_without_a_head_generates_nothing(tmp_path, llama):
    with pytest.raises(ValueError, match=r"LlamaModel cannot generate neutral answers: .*, or pass neutral='prompt'"):
        collect_activations(llama.model, TOKENIZER, contrast(), tmp_path / "a", neutral="generated")
    assert not (tmp_path / "a").exists()
    found = collect_activations(llama.model, TOKENIZER, contrast(), tmp_path / "a", neutral="prompt")
    close(
        found.positive(1),
        collect_activations(llama, TOKENIZER, contrast(), tmp_path / "b", neutral="prompt").positive(1),
    )


# Several sites


@pytest.mark.parametrize("tokens", ["last", "answer"])
def test_both_sites_in_one_pass(tmp_path, llama, tokens):
    options = {"tokens": tokens, "neutral": "prompt", "answers": "all"}
    passes = []
    llama.model.register_forward_pre_hook(lambda *call: passes.append(call))
    both = collect_activations(llama, TOKENIZER, contrast(), tmp_path / "both", site=["block", "mlp"], **options)
    assert len(passes) == 1 and both.sites == ["block", "mlp"] and both.site == "block"
    for site in ("mlp", "block"):
        alone = collect_activations(llama, TOKENIZER, contrast(), tmp_path / site, site=site, **options)
        opened = both.at(site)
        assert (opened.site, opened.layers, opened.modules) == (site, alone.layers, alone.modules)
        for layer in alone.layers:
            assert torch.equal(opened.positive(layer), alone.positive(layer))
            assert torch.equal(opened.negative(layer), alone.negative(layer))
    with pytest.raises(ValueError, match="holds 'mlp', asked for is 'block'"):
        ActivationStore(tmp_path / "mlp", "block")


def test_a_fit_takes_its_site(tmp_path, llama):
    collect_activations(llama, TOKENIZER, contrast(), tmp_path, site=("mlp", "block"), neutral="prompt", answers="all")
    for site in ("mlp", "block"):
        model = get_peft_model(tiny_model(), SEAConfig(site=site))
        fit = fit_sea(model, tmp_path)
        assert {f.site for f in fit.layers} == set(ActivationStore(tmp_path, site).modules.values())


@pytest.mark.parametrize("site", [(), 3, "head", ("mlp", "head")])
def test_unknown_sites_are_named(tmp_path, llama, site):
    with pytest.raises(ValueError, match="site must be one of 'mlp', 'block', 'attention' or several, got "):
        collect_activations(llama, TOKENIZER, contrast(), tmp_path / "a", site=site)
    with pytest.raises(ValueError, match="target_modules replace one site"):
        collect_activations(
            llama, TOKENIZER, contrast(), tmp_path / "a", site=("mlp", "block"), target_modules=["up_proj"]
        )
    assert not (tmp_path / "a").exists()


# Truncation


def test_prompts_are_cut_on_the_left_when_asked(tmp_path):
    model = tiny_model("llama", max_position_embeddings=16)
    prompt = list(range(3, 23))
    questions = [(prompt, [[30, 31], [32]], [[33, 34, 35]], [36]), ([3, 4], [[5]], [[6]], [7])]
    options = {"tokens": "answer", "truncate": True}
    found = collect_activations(model, TOKENIZER, contrast(questions, [0, 1]), tmp_path / "a", **options)
    literal = Literal(model, MLP_OUTPUTS["llama"].format(1))
    kept = prompt[-13:]  # the longest answer has three tokens, and all answers follow the same prompt
    close(found.positive(1)[0], literal([*kept, 30, 31])[-2])
    close(found.positive(1)[2], literal([*kept, 32])[-1])
    close(found.negative(1)[1], literal([*kept, 33, 34, 35])[-2])
    close(found.positive(1)[3], literal([3, 4, 5])[-1])

    options = {"truncate": True, "neutral": "generated", "max_new_tokens": 6}
    found = collect_activations(model, TOKENIZER, contrast(questions, [0, 1]), tmp_path / "b", **options)
    close(found.positive(1)[0], literal([*prompt[-10:], 30, 31])[-1])
    questions[0][1][0].extend(range(40, 56))
    with pytest.raises(ValueError, match=r"row 0: without a prompt its longest .* lower max_new_tokens, or"):
        collect_activations(model, TOKENIZER, contrast(questions, [0, 1]), tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_the_token_that_begins_every_text_is_not_cut_off(tmp_path):
    tokenizer = byte_tokenizer("<s> $A")
    model = tiny_model("llama", vocab_size=300, max_position_embeddings=16)
    data = contrast(
        [([], [[]], [[]], None)], [0], prompt=["abcdefghijklmnopqrstuvwxyz"], positives=[["1"]], negatives=[["2"]]
    )
    collect_activations(model, tokenizer, data, tmp_path, neutral=None, truncate=True)
    index = read_index(tmp_path)
    for ids in index["token_ids"].split(index["sequence_lengths"].tolist()):
        assert len(ids) == 16 and ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) in ("nopqrstuvwxyz 1", "nopqrstuvwxyz 2")


def test_the_tokenizer_of_another_model_is_noticed(tmp_path, llama):
    data = contrast([([], [[]], [[]], None)], [7], prompt=["ab"], positives=[["1"]], negatives=[["2"]])
    with pytest.raises(ValueError, match=r"row 7: the tokenizer gives the id \d+, the model has embeddings for 64 ids"):
        collect_activations(llama, byte_tokenizer("<s> $A"), data, tmp_path / "a", neutral="prompt")
    assert not (tmp_path / "a").exists()


# Kills, full disks, and two at once


def collect_slowly(path, arguments):
    collect_activations(tiny_model(), TOKENIZER, contrast(), path, **arguments)


@pytest.mark.parametrize("tokens", ["last", "answer"])
def test_twenty_kills_at_random_instants_leave_the_same_bytes(tmp_path, sharing, monkeypatch, tokens):
    monkeypatch.setattr(schedule, "SHARD_SEQUENCES", 1)
    arguments = GENERATED | {"tokens": tokens, "batch_size": 1}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    collect_slowly(whole, arguments)
    duration = time.monotonic() - start
    # As fork copies what is imported, a run takes as long as the one above. Threads do not survive a fork: the tests
    # have one in each process.
    processes, chance = multiprocessing.get_context("fork"), random.Random(0)
    kills = 0
    for _ in range(20):
        process = processes.Process(target=collect_slowly, args=(killed, arguments))
        process.start()
        # Short enough that the twenty do not get through before the last of them.
        process.join(chance.uniform(0, duration / 8))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if killed.exists() and (killed / "meta.json").exists():
            json.loads((killed / "meta.json").read_text())  # whole at every instant
    assert kills >= 10
    collect_slowly(killed, arguments)
    assert files(killed) == files(whole)


def test_a_store_that_was_being_replaced_is_not_taken_for_complete(tmp_path, llama, monkeypatch):
    options = {"neutral": "prompt"}
    collect_activations(llama, TOKENIZER, contrast(), tmp_path, **options)
    before = files(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Path, "unlink", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("killed")))
        begin(tmp_path, json.loads(before["meta.json"]))
    with pytest.raises(ValueError, match="not collected completely"):
        ActivationStore(tmp_path)
    collect_activations(llama, TOKENIZER, contrast(), tmp_path, **options)
    assert files(tmp_path) == before


def test_damaged_answers_are_generated_again(tmp_path, small_shards, monkeypatch, llama):
    collect_activations(llama, TOKENIZER, contrast(), tmp_path / "whole", **GENERATED)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(collecting, "write_index", lambda *args: (_ for _ in ()).throw(RuntimeError("killed")))
        collect_activations(llama, TOKENIZER, contrast(), tmp_path / "a", **GENERATED)
    (tmp_path / "a" / "generated-00000.json").write_text("[[1")
    (tmp_path / "a" / "generated-00001.json").write_text("[]")
    collect_activations(llama, TOKENIZER, contrast(), tmp_path / "a", **GENERATED)
    assert files(tmp_path / "a") == files(tmp_path / "whole")


def test_an_offloaded_model_gives_the_same(tmp_path, sharing, llama):
    options = {"site": ("mlp", "block"), "tokens": "answer"}
    whole = collect_activations(llama, TOKENIZER, contrast(), tmp_path / "whole", **options)
    offloaded = cpu_offload(tiny_model(), execution_device=torch.device("cpu"))
    found = collect_activations(offloaded, TOKENIZER, contrast(), tmp_path / "offloaded", **options)
    for site in ("mlp", "block"):
        assert torch.equal(found.at(site).positive(1), whole.at(site).positive(1))


def test_a_full_disk_is_said_and_the_store_goes_on(tmp_path, small_shards, monkeypatch, llama):
    collect_activations(llama, TOKENIZER, contrast(), tmp_path / "whole", **GENERATED)
    full, opened = tmp_path / "full", []

    def allocate(file, start, size):
        opened.append(size)
        if len(opened) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.ftruncate(file, size)

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "posix_fallocate", allocate)
        with pytest.raises(
            OSError, match=r"no space left for .*full: .* MB are needed, .* free.*; 4 of \d+ sequences"
        ) as caught:
            collect_activations(llama, TOKENIZER, contrast(), full, **GENERATED)
    assert "\n" not in str(caught.value)
    assert sorted(name for name in files(full) if name.startswith((".", "shard"))) == [
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    collect_activations(llama, TOKENIZER, contrast(), full, **GENERATED)
    assert files(full) == files(tmp_path / "whole")


@pytest.mark.parametrize("when", ["begin", "finish"])
def test_a_disk_that_is_full_before_or_after_the_shards_is_said(tmp_path, monkeypatch, llama, when):
    def fail(path, text):
        if path.name == "meta.json" and ('"complete": true' in text) == (when == "finish"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_text(path, text)

    write_text = peft_edit.files.write_text
    with monkeypatch.context() as patch:
        patch.setattr(peft_edit.files, "write_text", fail)
        with pytest.raises(OSError, match=r"no space left for .*: 0\.0 MB are needed, .*; what was collected is kept"):
            collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="prompt")
    assert (tmp_path / "shard-00000.safetensors").exists() == (when == "finish")
    assert len(collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="prompt"))


def test_too_small_a_disk_is_said_before_the_first_forward_pass(tmp_path, monkeypatch, llama):
    passes = []
    llama.model.register_forward_pre_hook(lambda *call: passes.append(call))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(OSError, match=r"no space left for .* 0\.0 MB are needed, 0\.0 MB are free"):
        collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="prompt")
    assert passes == [] and list(files(tmp_path)) == ["meta.json"]


def test_an_error_of_the_disk_that_is_no_lack_of_space_is_passed_on(tmp_path, monkeypatch, llama):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shards.os, "pwrite", fail)
    with pytest.raises(OSError, match="Input/output error"):
        collect_activations(llama, TOKENIZER, contrast(), tmp_path, neutral="prompt")
    assert sorted(files(tmp_path)) == ["index.safetensors", "meta.json"]


def test_a_second_run_on_the_same_folder_is_refused(tmp_path, llama):
    path = tmp_path / "store"
    refused = []

    def second(*args):
        with pytest.raises(
            ValueError, match=r"another run is collecting into .*store: wait for it, or choose"
        ) as caught:
            collect_activations(tiny_model(), TOKENIZER, contrast(), path, neutral="prompt")
        refused.append(str(caught.value))

    llama.model.register_forward_pre_hook(second)
    collect_activations(llama, TOKENIZER, contrast(), path, neutral="prompt")
    assert len(refused) == 1 and sorted(files(path)) == ["index.safetensors", "meta.json", "shard-00000.safetensors"]
    with locked(path):  # a complete store can be read whoever has the lock
        assert len(collect_activations(tiny_model(), TOKENIZER, contrast(), path, neutral="prompt")) == len(QUESTIONS)


def test_the_lock_of_a_killed_run_is_free(tmp_path, llama):
    def hold(path):
        FileLock(path / ".lock").acquire()
        time.sleep(60)

    tmp_path.joinpath("store").mkdir()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "store",))
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "store" / ".lock").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(collect_activations(llama, TOKENIZER, contrast(), tmp_path / "store", neutral="prompt"))


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path, llama, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(ValueError, match=r"a cannot be written to \(Permission denied\): choose another folder"):
        collect_activations(llama, TOKENIZER, contrast(), tmp_path / "a", neutral="prompt")


# What a shard is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_shard_is_what_safetensors_writes(tmp_path, dtype, rows):
    from safetensors.torch import load_file

    shape = StoreShape(("mlp.0", "mlp.10", "block.2"), 5, dtype)
    tensors = {name: torch.randn(rows, 5).to(dtype) for name in shape.names}
    with ShardFile(tmp_path / "s.safetensors", shape, rows) as shard:
        for name, tensor in tensors.items():
            for first in range(0, rows, 2):
                shard.write(name, first, tensor[first : first + 2])
        assert shard.publish() == shards.shard_digest(shard.path, shape, rows)
    found = load_file(tmp_path / "s.safetensors")
    assert set(found) == set(shape.names)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    digest = shards.shard_digest(tmp_path / "s.safetensors", shape, rows)
    assert digest and shards.shard_digest(tmp_path / "s.safetensors", shape, rows + 1) is None
    content = bytearray((tmp_path / "s.safetensors").read_bytes())
    for place in random.Random(0).sample(range(len(content)), 20):
        content[place] ^= 1
        (tmp_path / "s.safetensors").write_bytes(content)
        assert shards.shard_digest(tmp_path / "s.safetensors", shape, rows) is None, place
        content[place] ^= 1


def test_a_change_of_any_byte_of_an_index_is_noticed(tmp_path):
    file = tmp_path / "index.safetensors"
    write_tensors(file, {"question": torch.arange(3), "token_ids": torch.arange(5, dtype=torch.int32)})
    content = bytearray(file.read_bytes())
    assert is_whole(file) and not is_whole(tmp_path / "none")
    for place in range(len(content)):
        content[place] ^= 1
        file.write_bytes(content)
        assert not is_whole(file), place
        content[place] ^= 1
    file.write_bytes(content[:-1])
    assert not is_whole(file)


def test_a_shard_that_fails_leaves_nothing(tmp_path):
    shape = StoreShape(("mlp.0",), 4, torch.float32)
    with pytest.raises(RuntimeError, match="stop"), ShardFile(tmp_path / "s.safetensors", shape, 3) as shard:
        shard.write("mlp.0", 0, torch.ones(1, 4))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


# Several processes


def test_two_processes_end_with_the_store_and_the_adapter_of_one(tmp_path):
    import collect_processes

    printed = launch(tmp_path / "printed", "collect_processes", 2, tmp_path / "two")
    collect_processes.main(tmp_path / "one")
    for folder in ("store", "adapter"):
        assert files(tmp_path / "two" / folder) == files(tmp_path / "one" / folder)
    # Both took part, and an error of one of them was raised by it alone.
    assert json.loads((tmp_path / "two" / "passes-0.json").read_text()) > 0
    assert json.loads((tmp_path / "two" / "passes-1.json").read_text()) > 0
    assert "".join(out for out, _ in printed).count("row 10 has no neutral text") == 1


# Named formats


def test_lettered_choices_are_collected(tmp_path):
    tokenizer, model = byte_tokenizer("<s> $A"), tiny_model("llama", vocab_size=300, max_position_embeddings=128)
    store = collect_activations(
        model, tokenizer, contrast(), tmp_path, prompt_format="lettered_choices", neutral="prompt"
    )
    assert store.metadata["prompt_format"] == "lettered_choices"
    index = read_index(tmp_path)
    texts = [tokenizer.decode(ids) for ids in index["token_ids"].split(index["sequence_lengths"].tolist())]
    for row, text in enumerate(texts):
        ending = "Answer:" if row in index["neutral"] else tuple(f"Answer: {letter}" for letter in "ABCDE")
        assert text.endswith(ending) and "A. " in text
