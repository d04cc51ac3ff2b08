from __future__ import annotations

from pathlib import Path
from typing import Annotated

from . import common
from .options import Run


def demo(
    output: common.Output,
    run: Run,
    out: Annotated[Path, {"help": "Folder for the activations and the adapters.", "output": True}] = Path(
        "peft-edit-demo"
    ),
) -> None:
    """See edits work in a minute, offline: adapters of a demonstration model are made, evaluated, saved and merged.

    Example: peft-edit demo
    """
    import torch
    from transformers.utils import logging

    from .. import demo as demonstration

    logging.disable_progress_bar()  # Transformers' own, of loading a model this small
    # Its tensors are so small that a second thread costs more than it helps, much more on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = demonstration.run(out)
    finally:
        torch.set_num_threads(threads)
    output.write(run.record(results))
    base = results["rows"][0]
    rows = [
        [
            row["model"],
            f"{100 * row['mc1']:.1f}",
            f"{100 * (row['mc1'] - base['mc1']):+.1f}",
            f"{100 * row['mc2']:.1f}",
            f"{100 * (row['mc2'] - base['mc2']):+.1f}",
            f"{row['perplexity']:.3f}",
            f"{row['perplexity_ratio']:.3f}",
        ]
        for row in results["rows"]
    ]
    print(f"{results['demonstrations']} demonstrations, {results['questions']} held-out questions")
    print(common.table(["model", "MC1 %", "change", "MC2 %", "change", "perplexity", "ratio"], rows))
    print("\n".join(results["lines"]))


COMMANDS = [demo]
