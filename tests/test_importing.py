"""What imports what, in processes of their own: the command line starts without torch, and PEFT knows the methods in
whatever order they are imported."""

import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from edits import EDITS, edited_model
from tiny import vivid_model


REPOSITORY = Path(__file__).resolve().parents[1]
WAITING = sorted(
    ".".join(file.relative_to(REPOSITORY).parts[:-1])
    for file in REPOSITORY.glob("peft_edit/**/__init__.py")
    if "on_first_use(__name__)" in file.read_text(encoding="utf-8")
)


def run(*arguments: object) -> list[str]:
    """Lines that Python prints in a new process."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


STARTS = """
import contextlib, io, json, sys
folder = sys.argv[1]
import peft_edit
from peft_edit import cli

dir(peft_edit), hasattr(peft_edit, "nothing")
methods = {"fit-sea", "combine-sea", "train-hpr", "select", "fit-mean-difference", "fit-iti", "train-diff", "lm-eval"}
general = [[listed.name, "--help"] for listed in cli.listed_commands() if listed.name not in methods]
wrong = ["evaluat"], ["evaluate", "--limits"], ["collect", "--config", "none.yaml"]
for arguments in ([], ["--help"], *general, *wrong, ["card", folder]):
    sys.argv[1:] = arguments
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        cli.main()
    loaded = sorted({"torch", "peft", "transformers", "datasets", "numpy"} & set(sys.modules))
    print(json.dumps([" ".join(arguments), loaded, out.getvalue()]))
"""


def test_help_and_errors_of_usage_need_no_torch(tmp_path):
    edited_model("SEA at the MLP").save_pretrained(tmp_path)
    script = tmp_path / "peft-edit"
    script.write_text(STARTS)
    *lines, (_, loaded, out) = map(json.loads, run(script, tmp_path))
    assert "peft" in loaded and f"Card: {tmp_path / 'README.md'}" in out
    told = {arguments: out for arguments, loaded, out in lines if not loaded}
    assert len(told) == len(lines)
    assert "'evaluat'. Did you mean 'evaluate'?: see peft-edit --help" in told.pop("evaluat")
    assert told.pop("evaluate --limits").startswith("peft-edit: No such option: --limits")
    assert told.pop("collect --config none.yaml") == "peft-edit: there is no file none.yaml with options\n"
    assert len(told) > 15 and [out for out in told.values() if not out.startswith("Usage: peft-edit")] == []


ORDERS = """
import json, pickle, sys, threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

_, folder, blob = sys.argv
folder, blob = Path(folder), bytes.fromhex(blob)
import torch, transformers  # once, so that each order takes a second
transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.Trainer

def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] in ("peft", "peft_edit")]:
        del sys.modules[name]

def check(order):
    from peft import PeftConfig, PeftModel, get_peft_config
    for path in folder.glob("*/adapter_config.json"):
        config = PeftConfig.from_pretrained(path.parent)
        assert get_peft_config(json.loads(path.read_text())) == config
        assert type(config).__module__.startswith("peft_edit.tuners."), config
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "SEA at the MLP")
    model.save_pretrained(folder.parent / order)
    assert "peft_edit" in (folder.parent / order / "README.md").read_text()
    print(order)

def at_once(*codes):
    errors, barrier = [], threading.Barrier(len(codes))
    def take(code):
        barrier.wait()
        try:
            exec(code, {})
        except BaseException as error:
            errors.append((code, error))
    threads = [threading.Thread(target=take, args=[code]) for code in codes]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not errors, errors

for order, code in {
    "ours first": "import peft_edit",
    "PEFT first": "from peft import PeftModel; import peft_edit",
    "a module": "import peft_edit.evaluation.measuring",
    "pickle": "pickle.loads(blob)",
}.items():
    forget()
    exec(code, {"pickle": pickle, "blob": blob})
    check(order)
forget()
at_once("import peft", "import peft_edit", "from peft_edit import HPRTrainer", "from peft_edit import fit_sea")
check("threads")
sys.argv[0] = "/bin/peft-edit"  # where the methods wait for a command, in processes that it starts too
with ProcessPoolExecutor(1, get_context("spawn")) as pool:
    assert pool.submit(pickle.loads, blob).result() == pickle.loads(blob)
print("spawned")
"""


def test_peft_knows_the_methods_in_whatever_order_they_are_imported(tmp_path):
    for edit in EDITS:
        edited_model(edit).save_pretrained(tmp_path / "adapters" / edit)
    vivid_model().save_pretrained(tmp_path / "adapters" / "base")
    blob = pickle.dumps(EDITS["SEA at the MLP"]()).hex()
    orders = run("-c", ORDERS, tmp_path / "adapters", blob)
    assert orders == ["ours first", "PEFT first", "a module", "pickle", "threads", "spawned"]


@pytest.mark.parametrize("name", WAITING)
def test_names_that_wait_are_there(name):
    package = importlib.import_module(name)
    found = {name: getattr(package, name) for name in package.__all__}
    assert found and found.keys() <= set(dir(package))
    # One of a submodule's name would be the submodule where that is imported first.
    assert not {path.stem for path in Path(package.__file__).parent.iterdir()} & found.keys()
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018
    with pytest.raises(ImportError):
        exec(f"from {name} import nothing")
