"""Text files for the recipes on the small model: a retain set, and texts for side effects of its kind and of another.

    python examples/passages.py passages                             # from the Hub
    python examples/passages.py passages --halueval qa_data.json --bbq data/Age.jsonl data/SES.jsonl --crows crows.csv

HaluEval's questions come with passages of Wikipedia, which no edit here has read; BBQ's contexts are of another kind.
OUT gets retain.txt (200 passages), retain-mixed.txt (370, and 300 sentences of CrowS-Pairs), and for measuring
tuning.txt (30 other passages), tuning-mixed.txt (these, and 30 contexts of BBQ), wikipedia.txt (40 others) and
contexts.txt (60 others of BBQ).
"""

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset

from peft_edit import load_contrast_set


# Of HaluEval's passages.
PASSAGES = {"retain.txt": slice(0, 200), "tuning.txt": slice(200, 230), "wikipedia.txt": slice(400, 440)}
# What a retain set of two kinds has besides those of retain.txt: passages, and the less stereotyping sentences.
MORE_PASSAGES, SENTENCES = slice(230, 400), slice(0, 300)
# Of BBQ's rows: neighbours share a context.
CONTEXTS, TUNING_CONTEXTS = slice(10, 1200, 20), slice(0, 1200, 40)


def records(files: list[str] | None, hub: tuple[str, str], split: str) -> Dataset:
    """Rows of local files of JSON lines, or of a data set on the Hub, in their order."""
    if files:
        return load_dataset("json", data_files=files, split="train")
    return load_dataset(*hub, split=split)


def write(path: Path, texts: list[str]) -> None:
    lines = [" ".join(text.split()) for text in texts]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} texts: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the text files")
    parser.add_argument("--halueval", nargs="+", help="local copy of HaluEval's qa_data.json")
    parser.add_argument("--bbq", nargs="+", help="local copies of BBQ's .jsonl files")
    parser.add_argument("--crows", help="local copy of CrowS-Pairs' .csv file")
    args = parser.parse_args()
    halueval = records(args.halueval, ("pminervini/HaluEval", "qa"), "data")
    crows = load_contrast_set("crows_pairs", data_files=args.crows)
    bbq = records(args.bbq, ("oskarvanderwal/bbq", "All"), "test")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in PASSAGES.items():
        write(args.out / name, halueval["knowledge"][part])
    sentences = [row["positives"][0] for row in crows.select(range(len(crows))[SENTENCES])]
    passages = [*halueval["knowledge"][PASSAGES["retain.txt"]], *halueval["knowledge"][MORE_PASSAGES]]
    write(args.out / "retain-mixed.txt", [*passages, *sentences])
    write(args.out / "contexts.txt", bbq["context"][CONTEXTS])
    tuning = [*halueval["knowledge"][PASSAGES["tuning.txt"]], *bbq["context"][TUNING_CONTEXTS]]
    write(args.out / "tuning-mixed.txt", tuning)


if __name__ == "__main__":
    main()
