"""Functions that run in another process, for which the Hub is the tests' server."""

import contextlib
import io
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path


ASSETS = Path(__file__).resolve().parents[1] / "peft_edit" / "demo" / "assets"


@contextlib.contextmanager
def client_process(environment: dict[str, str]):
    """A function that calls a function of this file, with arguments, in a process with this environment."""
    before = dict(os.environ)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        os.environ.clear()
        os.environ.update(environment)
        try:
            pool.submit(os.getpid).result()  # starts the process
        finally:
            os.environ.clear()
            os.environ.update(before)
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def attempt(function, *args, **kwargs) -> str:
    """Kind and text of the error that a function raises; "done" where it raises none."""
    try:
        function(*args, **kwargs)
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def base_model(name=ASSETS / "model"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name).eval()


def adapted(method: str, *names: str, base=ASSETS / "model"):
    """The demonstration model with random adapters, that are not the identity."""
    import torch
    from peft import get_peft_model

    from peft_edit.tuners.method import methods

    torch.manual_seed(0)
    config_cls = methods()[method].config
    first, *others = names or ("default",)
    model = get_peft_model(base_model(base), config_cls(init_weights=False, task_type="CAUSAL_LM"), adapter_name=first)
    for name in others:
        model.add_adapter(name, config_cls(init_weights=False, task_type="CAUSAL_LM"))
    return model.eval()


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits.tolist()


def push_model(method: str, repo_id: str, *names: str, base=ASSETS / "model", **kwargs):
    """Push a model with adapters; the logits with each of them."""
    from peft_edit import push_to_hub

    model = adapted(method, *names, base=base)
    push_to_hub(model, repo_id, **kwargs)
    found = {}
    for name in list(model.peft_config):
        model.set_adapter(name)
        found[name] = logits(model)
    return found


def push_native(repo_id: str, **kwargs):
    """Push a Transformers model's adapter; the logits with it."""
    from peft_edit import SEAConfig, push_to_hub

    model = base_model()
    model.add_adapter(SEAConfig(init_weights=False))
    push_to_hub(model, repo_id, **kwargs)
    return logits(model)


def push_folder(folder, repo_id: str, **kwargs) -> str:
    from peft_edit.adapters.hub import push_folder

    return attempt(push_folder, folder, repo_id, **kwargs)


def push_by_transformers(method: str, repo_id: str, **kwargs) -> None:
    adapted(method).push_to_hub(repo_id, **kwargs)


def load(repo_id: str, **kwargs):
    """The logits of the base model with an adapter from the Hub."""
    from peft import PeftModel

    import peft_edit  # noqa: F401

    return logits(PeftModel.from_pretrained(base_model(), repo_id, **kwargs))


def load_auto(repo_id: str, **kwargs):
    from peft import AutoPeftModelForCausalLM

    import peft_edit  # noqa: F401

    return logits(AutoPeftModelForCausalLM.from_pretrained(repo_id, **kwargs))


def try_to_load(repo_id: str, **kwargs) -> str:
    return attempt(load, repo_id, **kwargs)


def command(*arguments, token: str | None = None) -> tuple[int, str, str]:
    """Status, output and errors of the command line."""
    from peft_edit.cli import main

    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    sys.argv = ["peft-edit", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as exit_:
            status = exit_.code or 0
    os.environ.pop("HF_TOKEN", None)
    return status, out.getvalue(), err.getvalue()
