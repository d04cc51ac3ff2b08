"""The README and the pages in examples/ are short, link to each other, and name files and commands that are there."""

import re
from pathlib import Path

import pytest

from peft_edit import cli


REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
PAGES = sorted((REPOSITORY / "examples").rglob("*.md"))
ALL = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text("utf-8")
    for path in (README, *PAGES, REPOSITORY / "model_cards" / "README.md")
}
COMMANDS = {
    name: {option for parameter in command.loaded.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for name, command in cli.application().commands.items()
}
OTHERS_OPTIONS = {"--help", "--max-lora-rank", "--device", "--quick"}  # of every command, of vLLM, of the benchmarks
PASSED_ON = {"lm-eval"}  # commands whose options are those of another program
FENCED = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n\n", flags=re.DOTALL)  # of a Space
LINK = re.compile(r"\]\(([^()\s]+)\)")
LOCATION = re.compile(r"(?<![\w/.-])(?:examples|model_cards|peft_edit|tests)/[\w./*-]*[\w/*]")


def anchors(text: str) -> set[str]:
    """Fragments that lead to the headings of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) < 200


@pytest.mark.parametrize("name", ALL)
def test_links_resolve(name):
    for link in LINK.findall(FENCED.sub("", ALL[name])):
        if link.startswith("https://"):
            continue
        path, _, fragment = link.partition("#")
        target = ((REPOSITORY / name).parent / path).resolve() if path else REPOSITORY / name
        assert target.exists(), link
        if fragment:
            assert fragment in anchors(target.read_text("utf-8")), link


def test_readme_lists_every_page():
    links = LINK.findall(ALL["README.md"].split("## Read on")[1])
    assert sorted(links) == [page.relative_to(REPOSITORY).as_posix() for page in PAGES]


@pytest.mark.parametrize("name", ALL)
def test_named_files_exist(name):
    missing = [place for place in LOCATION.findall(ALL[name]) if not any(REPOSITORY.glob(place.rstrip("/")))]
    assert missing == []


@pytest.mark.parametrize("name", ALL)
def test_named_commands_and_options_exist(name):
    text = re.sub(r" +# .*", "", ALL[name])
    for command, rest in re.findall(r"(?:peft-edit|-m peft_edit\.cli) ([a-z][a-z-]*)([^`\n]*)", text):
        assert command in COMMANDS
        if command not in PASSED_ON:
            assert set(re.findall(r"--[a-z0-9-]+", rest)) <= COMMANDS[command], (command, rest)
    options = set(re.findall(r"`(--[a-z0-9_-]+)[^`]*`", FENCED.sub("", text)))
    options = {option for option in options if "_" not in option}  # those of lm-evaluation-harness
    assert options <= OTHERS_OPTIONS.union(*COMMANDS.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_start_with_what_they_explain(page):
    """A title, then a command or a snippet before the first section."""
    start = FRONT_MATTER.sub("", page.read_text("utf-8")).split("\n## ")[0]
    assert start.startswith("# ") and re.search(r"^```(bash|python)$", start, flags=re.MULTILINE)


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_left_to_be_filled_in(name):
    assert not re.search(r"\b(FIGURES|TODO|TBD|XXX)\b", ALL[name])
