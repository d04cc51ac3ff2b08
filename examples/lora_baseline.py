"""LoRA on the questions that an edit is learnt from, the baseline of fine-tuning: supervised, with PEFT and TRL.

    pip install trl
    python examples/lora_baseline.py HuggingFaceTB/SmolLM2-135M-Instruct truthful_qa lora-truthful --split train
    peft-edit evaluate HuggingFaceTB/SmolLM2-135M-Instruct truthful_qa --split test --adapter lora-truthful

Every positive answer of a question is an example; the loss is that of the answer's tokens. Prompts are plain text, as
with `--prompt-format plain`. The adapter is one of PEFT's own.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_edit import load_contrast_set


def examples(data: Dataset) -> Dataset:
    """Prompt and completion of every positive answer of a contrast set, joined by one space."""
    rows = [(row["prompt"].rstrip(), answer) for row in data for answer in row["positives"]]
    return Dataset.from_list([{"prompt": prompt, "completion": f" {answer.strip()}"} for prompt, answer in rows])


def train(args: argparse.Namespace) -> None:
    data = load_contrast_set(args.data, data_files=args.data_files, split=args.split)
    data = data.select(range(min(args.limit or len(data), len(data))))
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        args=SFTConfig(
            output_dir=str(args.out),
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            seed=args.seed,
            use_cpu=args.cpu,
            bf16=False,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=examples(data),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"
        ),
    )
    trainer.train()
    trainer.model.save_pretrained(args.out)
    print(f"LoRA adapter, {trainer.state.global_step} steps on {len(trainer.train_dataset)} answers: {args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="base model: id on the Hub or local folder")
    parser.add_argument("data", help="contrast set: known name or file")
    parser.add_argument("out", type=Path, help="folder of the adapter")
    parser.add_argument("--data-files", help="local copy of a known data set")
    parser.add_argument("--split", help="split of the data set")
    parser.add_argument("--limit", type=int, help="use so many questions only")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1, help="so many steps instead of epochs")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
