"""Every test runs without a network, in one thread a process."""

import functools
import gc
import os
import signal
import sys


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from browser import headless_chromium
from copying import Original
from hypothesis import settings
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


# A shell has what it starts in the background ignore interrupts, and all that this starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
logging.disable_progress_bar()
torch.set_num_threads(1)
# An example takes as long as the other programs of the machine let it. Every run draws others.
settings.register_profile("shared machine", deadline=None, max_examples=50)
settings.load_profile("shared machine")
ASSETS = Path(__file__).resolve().parents[1] / "peft_edit" / "demo" / "assets"


@pytest.fixture(scope="module", autouse=True)
def no_old_garbage():
    """The Trainer, and others, collect garbage: without this they would look through all that was ever imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "model")


@functools.cache
def _demo_model():
    return Original(AutoModelForCausalLM.from_pretrained(ASSETS / "model").eval())


@pytest.fixture
def demo_model():
    """A fresh copy of the demonstration model, float32."""
    return _demo_model().copy()


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.fixture
def run_command(capsys, monkeypatch):
    """Runs `peft-edit` with arguments: its exit status, and what it printed."""
    from peft_edit.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["peft-edit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of Playwright: `browser.new_page()`. Of a module and not of the session, because Playwright
    keeps an event loop in the thread, in which no other test could start one."""
    with headless_chromium() as started:
        yield started


@pytest.fixture(scope="session")
def chat_adapters(tmp_path_factory):
    """Name to folder of adapters of the demonstration model that change its answers, see `chatting`."""
    from chatting import make_adapters

    folder = tmp_path_factory.mktemp("adapters")
    make_adapters(folder)
    return {path.name: str(path) for path in sorted(folder.iterdir())}
