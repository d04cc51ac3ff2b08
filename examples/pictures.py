"""Makes the README's pictures: the front of a sweep, and what an adapter does to the tokens of an answer.

    python examples/pictures.py sea-chosen --sweep sea-chosen/sweep.json --out pictures \
      --prompt "What happens if you swallow chewing gum?" --answer "It stays in your stomach for seven years."

Writes `front.svg` and `front.png`, and `tokens.svg`, each of less than 200 kB, and prints their sizes. It needs the
extra `plots`. Without `--prompt` only the front is drawn, and without `--sweep` only the tokens.
"""

from __future__ import annotations

import argparse
import io
from html import escape
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_edit.adapters.read import load_adapter, load_adapter_config
from peft_edit.choosing.record import read_sweep
from peft_edit.data.prompts import encode_answers
from peft_edit.explaining import explain_edit
from peft_edit.explaining.showing import token_view
from peft_edit.files import write_text
from peft_edit.plotting import front_figure, save_figure


LARGEST = 200_000  # bytes
WIDTH = 80  # columns
# Black on white; the view brings the colours of its tokens.
THEME = TerminalTheme((255, 255, 255), (26, 26, 26), [(0, 0, 0)] * 8, [(0, 0, 0)] * 8)
# Asks for no font: what shows a picture loads nothing else.
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {terminal_width} {terminal_height}" role="img" aria-label="TITLE">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>{lines}</defs>
<rect fill="#ffffff" width="100%" height="100%"/>
<g transform="translate(8, 8)">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def tokens_svg(view: str, title: str) -> str:
    """What a terminal with colours shows, as a picture."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(view), soft_wrap=True)
    return console.export_svg(theme=THEME, code_format=SVG.replace("TITLE", escape(title)), unique_id="tokens")


def explained(adapter: str, base: str | None, prompt: str, answer: str) -> str:
    """The view of an answer's tokens, as a terminal with colours shows it."""
    base = base or load_adapter_config(adapter).base_model_name_or_path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    adapted = load_adapter(model, adapter).eval()
    ((encoded,),) = encode_answers(tokenizer, [prompt], [[answer]])
    found = explain_edit(adapted, tokenizer, encoded.input_ids).since(encoded.prompt_length - 1)
    return token_view(found, color=True, width=WIDTH)


def checked(path: Path) -> None:
    """Print the size of a picture; raises ValueError for one that is too large."""
    size = path.stat().st_size
    if size >= LARGEST:
        raise ValueError(f"{path} has {size} bytes, it must have less than {LARGEST}: take fewer settings or words")
    print(f"{path}: {size / 1000:.0f} kB")


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder, or id on the Hub")
    parser.add_argument("--sweep", type=Path, help="sweep.json, or the folder that has it")
    parser.add_argument("--model", help="base model; default: the one that the adapter names")
    parser.add_argument("--prompt")
    parser.add_argument("--answer", help="to the prompt")
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    options = parser.parse_args()
    if (options.prompt is None) != (options.answer is None):
        parser.error("--prompt and --answer go together")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.sweep is not None:
        figure = front_figure(read_sweep(options.sweep))
        for name in ("front.svg", "front.png"):
            save_figure(figure, options.out / name)
            checked(options.out / name)
    if options.prompt is not None:
        view = explained(options.adapter, options.model, options.prompt, options.answer)
        write_text(options.out / "tokens.svg", tokens_svg(view, f"What an adapter does to: {options.answer}"))
        checked(options.out / "tokens.svg")


if __name__ == "__main__":
    main()
