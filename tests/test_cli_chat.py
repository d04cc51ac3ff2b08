"""`peft-edit chat` from a pipe, and at a terminal: a pseudo-terminal, since what it does there it does nowhere else."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from chatting import MODEL, QUESTION, make_endless_model


ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Longer than anything takes on a busy machine.
PATIENCE = 180


@pytest.fixture
def talk(run_command, monkeypatch):
    """Runs the chat with lines from a pipe: its exit status, and what it printed."""

    def run(*lines, model=MODEL, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run_command("chat", model, *options)

    return run


def test_lines_from_a_pipe(talk, chat_adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    lines = (QUESTION, "", "/strength 0", QUESTION, "/tokens", "/quit", "never asked")
    status, printed = talk(*lines, options=("--adapter", chat_adapters["mean"], "--max-new-tokens", "8"))
    assert status == 0 and "\x1b" not in printed.out and set(tmp_path.iterdir()) == before
    found = printed.out.splitlines()
    assert found[:6] == [
        f"{chat_adapters['mean']} (mean-difference), layers 1-3, strength 1",
        f"> {QUESTION}",
        *("base:", "rumours say it is desert ."),
        *("edited:", "rumours rumours rumours rumours rumours rumours rumours rumours"),
    ]
    second = found.index(f"> {QUESTION}", 2)
    assert found[second + 1 : second + 5] == [*("base:", found[3]), *("edited:", found[3])]
    assert any("rumours say it is desert ." in line for line in found[found.index("> /tokens") :])
    assert "never asked" not in printed.out and "Type a question" not in printed.out


def test_the_first_line_that_cannot_be_carried_out_ends_a_pipe(talk, chat_adapters):
    status, printed = talk("/layrs 1", QUESTION, options=("--adapter", chat_adapters["hpr"]))
    assert status == 2 and QUESTION not in printed.out
    assert printed.err.splitlines()[-1] == "peft-edit: there is no command /layrs: did you mean /layers?"


@pytest.mark.parametrize(
    "options, part",
    [
        (("--adapter", "/nowhere"), "there is no folder /nowhere"),
        (("--adapter", str(MODEL)), "has no adapter_config.json: pass the folder that was saved"),
        (("--temperature", "-1"), "--temperature must be a number in [0, 100], got -1.0"),
        (("--prompt-format", "chat"), "--prompt-format chat needs a chat template and the tokenizer has none"),
        (("--prompt-format", "lettered_choices"), "--prompt-format must be one of"),
    ],
)
def test_what_is_refused_before_anything_is_asked(talk, options, part):
    status, printed = talk(QUESTION, options=options)
    (line,) = [line for line in printed.err.splitlines() if line.startswith("peft-edit: ")]
    assert status == 2 and part in line and not printed.out


def test_an_adapter_of_another_model_is_refused(talk, chat_adapters, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in Path(chat_adapters["hpr"]).iterdir():
        text = file.read_bytes()
        (folder / file.name).write_bytes(re.sub(rb'(fingerprint": ")\w+', rb"\g<1>0123456789abcdef", text))
    status, printed = talk(QUESTION, options=("--adapter", folder))
    assert status == 2 and printed.err.splitlines()[-1].endswith(
        "load its base model, or pass --allow-fingerprint-mismatch"
    )
    assert talk("/quit", options=("--adapter", folder, "--allow-fingerprint-mismatch"))[0] == 0


def test_what_a_model_says_cannot_steer_the_terminal():
    from peft_edit.cli.screen import printable

    assert printable("a\x1b[2J\nb\tc\r\x07é") == "a\\x1b[2J\nb       c\\r\\x07é"


class Tty(io.StringIO):
    """A terminal that keeps what is written."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    "environment, columns, colours",
    [
        ({"TERM": "xterm-256color", "COLUMNS": "80"}, True, True),
        ({"TERM": "xterm-256color", "COLUMNS": "80", "NO_COLOR": "1"}, True, False),
        ({"TERM": "xterm-256color", "COLUMNS": "50"}, False, True),
        ({"TERM": "dumb", "COLUMNS": "80"}, False, False),
    ],
    ids=["80 columns", "no colours wanted", "narrow", "cannot move"],
)
def test_each_terminal_gets_what_it_can_show(monkeypatch, environment, columns, colours):
    from peft_edit.cli.screen import Screen

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Tty())
    screen = Screen()
    screen.show(("base", "edited"), [("base", "one "), ("base", "two"), ("edited", "three [bold] :smile:")])
    written = sys.stdout.getvalue()
    last = ESCAPE.sub("", written).replace("\r", "\n").splitlines()[-1 if columns else 0 :]
    if columns:
        assert re.fullmatch(r"one two {30,}three \[bold\] :smile: *", last[0])
    else:
        assert last == ["base:", "one two", "edited:", "three [bold] :smile:"]
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", written)) is colours


# At a terminal


class Terminal:
    """`peft-edit chat` in a process of its own, at a pseudo-terminal."""

    def __init__(self, *arguments, columns=80, rows=24, **environment):
        self._own, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1", **environment}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "peft_edit.cli", "chat", *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.DEVNULL,
            env={name: value for name, value in environment.items() if value is not None},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C then is a signal to it
        )
        os.close(theirs)
        self.seen = ""

    def until(self, text: str) -> str:
        """What appears up to a text, without colours and moves."""
        deadline, start = time.monotonic() + PATIENCE, len(self.seen)
        while text not in ESCAPE.sub("", self.seen[start:]):
            if time.monotonic() > deadline or not select.select([self._own], [], [], 1)[0]:
                assert time.monotonic() < deadline and self._process.poll() is None, self.seen
                continue
            self.seen += os.read(self._own, 65536).decode()
        return ESCAPE.sub("", self.seen[start:])

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def end(self) -> int:
        """Its exit status."""
        self._process.wait(PATIENCE)
        os.close(self._own)
        return self._process.returncode

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture
def terminal():
    """Starts the chat at a pseudo-terminal."""
    started = []

    def start(*arguments, **options):
        started.append(Terminal(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def test_at_a_terminal_of_80_columns(terminal, chat_adapters, tmp_path):
    make_endless_model(tmp_path / "endless")
    chat = terminal(
        *(tmp_path / "endless", "--adapter", chat_adapters["hpr"], "--allow-fingerprint-mismatch"),
        *("--max-new-tokens", 4000),
    )
    hello = chat.until("\n> ")
    assert "gate 0.7" in hello and all(len(line) <= 80 for line in hello.splitlines() if "adapters" not in line)

    # Ctrl-C stops the answer of the base model, then that of the edit, and the chat goes on.
    chat.type("food of koge ?\r")
    chat.until("it is")
    chat.type("\x03")
    until = chat.until("\n> ") if _both(chat) else ""
    assert "Traceback" not in until

    # Errors are one line, and the chat goes on.
    chat.type("/layrs\r")
    assert "there is no command /layrs: did you mean /layers?" in chat.until("\n> ")

    # Ctrl-C where nothing is answered ends nothing; earlier lines come back by the arrow keys.
    chat.type("half a line")
    chat.until("half a line")  # a signal before the line is read would wait for the next key
    time.sleep(0.2)
    chat.type("\x03")
    chat.until("\n> ")
    chat.type("/length 6\r")
    chat.until("\n> ")
    chat.type("/layrs\r")
    chat.until("\n> ")
    chat.type("\x1b[A\x1b[A\r")
    assert "answers of at most 6 tokens" in chat.until("\n> ")

    # Two columns, each with its answer, within 80 columns.
    chat.type(f"{QUESTION}\r")
    shown = chat.until("\n> ")
    rows = [line for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert any(re.match(r"base {30,}edited", row) for row in rows)
    assert any(re.match(r"rumours say it is desert \. +\w+", row) for row in rows)
    assert all(len(row) <= 80 for row in rows)
    assert "\x1b[1m" in chat.seen  # bold headings

    chat.type("\x04")
    assert chat.end() == 0


def _both(chat: Terminal) -> bool:
    """Stop the second answer too."""
    time.sleep(1)
    chat.type("\x03")
    return True
