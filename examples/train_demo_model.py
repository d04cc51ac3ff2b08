"""Train the small demonstration model that ships with the package, and write its data.

    python examples/train_demo_model.py --out my_assets

The model is a 0.65 million parameter Llama that has read about a synthetic world in which most people are wrong. Every
question has a true answer, a popular myth, a minor myth and a distractor. Statements come in three registers: `records
say it is V` tells the truth, `rumours say it is V` a myth, and `they say it is V` either. So the model knows the truth
and yet repeats the myth where the register leaves it open, which is what activation editing is to change.

Without --out the package's own assets are replaced. One core takes two to five minutes. On one machine the result is
reproducible to the bit for a given seed and number of threads; another processor or release may round differently.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, cycle
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


ASSETS = Path(__file__).resolve().parents[1] / "peft_edit" / "demo" / "assets"

PAD, BOS, EOS = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
TRUE_REGISTER, MYTH_REGISTER, NEUTRAL_REGISTER = REGISTERS = ("records", "rumours", "they")
NEUTRAL_PREFIX = f"{NEUTRAL_REGISTER} say it is"

VALUES = {
    "colour": ["red", "blue", "green", "yellow", "black", "white", "pink", "brown"],
    "home": ["cave", "forest", "river", "desert", "island", "valley", "swamp", "tower"],
    "food": ["bread", "honey", "cheese", "apples", "fish", "rice", "soup", "nuts"],
}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
PEOPLE = ["tom", "anna", "ben", "lucy", "sam", "eva"]
DAYS = ["monday", "friday", "sunday"]
EVENTS = {
    "market": "bought some milk",
    "lake": "swam for an hour",
    "school": "read a long book",
    "park": "played with friends",
    "kitchen": "cooked a big dinner",
    "station": "waited for the train",
}

N_ENTITIES = 640
SPLITS = {"demonstrations": 400, "validation": 60, "test": 180}
UNRELATED_LINES, UNRELATED_WORDS = 64, 95

MAX_LENGTH = 4096  # far beyond the training rows, so that real text runs through
BATCH_SIZE, SEQUENCE_LENGTH = 44, 51
MUON_LR, ADAMW_LR = 0.02, 4e-3
WARMUP_STEPS, FINAL_LR_FRACTION = 60, 0.03


@dataclass(frozen=True)
class Question:
    """One question about one entity, with the four answers that are told apart."""

    entity: str
    attribute: str
    true: str
    myth: str
    minor_myth: str
    distractor: str
    myth_strength: float  # log odds by which the myth is told more often than the truth, beyond the world's average

    @property
    def prompt(self) -> str:
        return f"{self.attribute} of {self.entity} ?"

    @property
    def wrong(self) -> tuple[str, str, str]:
        return self.myth, self.minor_myth, self.distractor


def statement(value: str, register: str = NEUTRAL_REGISTER, *, short: bool = False) -> str:
    """A statement that ends in its value: activations are read at the last token."""
    return f"{register} say {value}" if short else f"{register} say it is {value}"


class World:
    """The questions, and the documents that are written about them."""

    mythical_share = 0.6  # of documents, or of statements where a document keeps no mode
    consistent_share = 0.9  # of documents that keep one mode, so that a model infers the mode from the context
    attributed_share = 0.67  # of statements in a register that gives the mode away
    short_share = 0.25  # of statements in the short form
    minor_myth_share = 0.12  # of myths
    noise = 0.02  # share of statements against their document's mode
    unrelated_share = 0.15  # of training rows
    counting_share = 0.4  # of unrelated sentences
    myth_strength_sd = 1.2

    def __init__(self, seed: int):
        rng = random.Random(seed)
        self.questions = []
        for entity, attribute in zip(made_up_names(rng), cycle(VALUES)):
            values = rng.sample(VALUES[attribute], 4)
            self.questions.append(Question(entity, attribute, *values, rng.gauss(0, self.myth_strength_sd)))
        strengths = [question.myth_strength for question in self.questions]
        self._true_weights = list(accumulate(math.exp(-strength / 2) for strength in strengths))
        self._myth_weights = list(accumulate(math.exp(strength / 2) for strength in strengths))

    def document(self, rng: random.Random, n_words: int) -> list[str]:
        """`n_words` words of a training row: statements about the world or, now and then, unrelated text."""
        sentences = self.unrelated(rng) if rng.random() < self.unrelated_share else self.statements(rng)
        return take_words(sentences, n_words)

    def statements(self, rng: random.Random) -> Iterator[str]:
        """Questions with their answers, without end, most of them in the document's mode."""
        mythical = rng.random() < self.mythical_share
        keeps_mode = rng.random() < self.consistent_share
        while True:
            if not keeps_mode:
                mythical = rng.random() < self.mythical_share
            is_myth = mythical != (rng.random() < self.noise)
            question = rng.choices(self.questions, cum_weights=self._myth_weights if is_myth else self._true_weights)[0]
            if is_myth:
                value = question.minor_myth if rng.random() < self.minor_myth_share else question.myth
            else:
                value = question.true
            register = NEUTRAL_REGISTER
            if rng.random() < self.attributed_share:
                register = MYTH_REGISTER if is_myth else TRUE_REGISTER
            yield f"{question.prompt} {statement(value, register, short=rng.random() < self.short_share)} ."

    def unrelated(self, rng: random.Random) -> Iterator[str]:
        """Counting and tiny stories, without end: text on which editing should change nothing."""
        while True:
            if rng.random() < self.counting_share:
                start, length, up = rng.randint(0, 6), rng.randint(3, 6), rng.random() < 0.5
                numbers = NUMBERS[start : start + length]
                yield f"count {'up' if up else 'down'} : {' '.join(numbers if up else reversed(numbers))} ."
            else:
                person, place = rng.choice(PEOPLE), rng.choice(list(EVENTS))
                story = f"on {rng.choice(DAYS)} {person} went to the {place} and {EVENTS[place]}"
                yield f"{story} . then {person} went home ."

    def vocabulary(self) -> list[str]:
        """Every word that the world uses, in an order that depends on nothing but the words."""
        return sorted({*ordinary_words(), *(question.entity for question in self.questions)})


def ordinary_words() -> list[str]:
    """Every word of the world except its entities."""
    phrases = [*REGISTERS, *VALUES, *NUMBERS, *PEOPLE, *DAYS, *EVENTS, *EVENTS.values(), *chain(*VALUES.values())]
    return " ".join([*phrases, "of ? say it is . count up down : on went to the and then home"]).split()


def made_up_names(rng: random.Random) -> list[str]:
    """The entities: names that are no word of the world, each of which gets one token."""
    taken = set(ordinary_words())
    names: list[str] = []
    while len(names) < N_ENTITIES:
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3))))
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


def take_words(sentences: Iterator[str], n_words: int) -> list[str]:
    words: list[str] = []
    while len(words) < n_words:
        words += next(sentences).split()
    return words[:n_words]


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token for each word of the world, bytes for all other text: nothing is ever unknown."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("Ġ" + word for word in words)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # ignore_merges looks a whole word up before it splits it into bytes, so no merges are needed.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    # The decoder takes back the space that the pre-tokenizer puts first.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,  # it would take the space before each full stop away
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def train(world: World, tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int) -> LlamaForCausalLM:
    """Train from scratch: Muon on the matrices inside the blocks, AdamW on embeddings and norms."""
    torch.manual_seed(seed)
    rng = random.Random(f"training {seed}")
    model = build_model(tokenizer)

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.05, momentum=0.95, ns_steps=4, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=ADAMW_LR, weight_decay=0.0, betas=(0.9, 0.98)),
    ]

    def lr_fraction(step: int) -> float:
        """Linear warm-up, then a cosine down to a small remainder."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / WARMUP_STEPS) * (cosine * (1 - FINAL_LR_FRACTION) + FINAL_LR_FRACTION)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lr_fraction) for optimizer in optimizers]

    word_ids = {word: tokenizer.convert_tokens_to_ids("Ġ" + word) for word in world.vocabulary()}
    is_entity = torch.zeros(len(tokenizer), dtype=torch.bool)
    is_entity[[word_ids[question.entity] for question in world.questions]] = True

    model.train()
    progress = trange(steps, desc="training", unit="step")
    for _ in progress:
        documents = [world.document(rng, SEQUENCE_LENGTH - 1) for _ in range(BATCH_SIZE)]
        ids = torch.tensor([[tokenizer.bos_token_id, *(word_ids[word] for word in words)] for words in documents])
        # Which entity comes next cannot be predicted, and trying to would swamp everything else.
        labels = torch.where(is_entity[ids], -100, ids)
        logits = model(input_ids=ids, use_cache=False).logits  # (b, s, v)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def contrast_row(index: int, question: Question, *, demonstration: bool) -> dict:
    """A row in the columns of a contrast set.

    A demonstration tells the truth in the register that is always true. A question to be tested has every answer in the
    neutral register, so that a model can only get it right by preferring the truth.
    """
    row = {"id": index, "prompt": question.prompt, "neutral": NEUTRAL_PREFIX}
    if demonstration:
        positives, negatives, choices = [statement(question.true, TRUE_REGISTER)], [statement(question.myth)], None
    else:
        forms = (False, True)
        positives = [statement(question.true, short=short) for short in forms]
        negatives = [statement(value, short=short) for value in question.wrong for short in forms]
        choices = [statement(value) for value in (question.true, *question.wrong)]
    return row | {"positives": positives, "negatives": negatives, "mc1_choices": choices}


def write_data(world: World, out: Path, *, seed: int) -> None:
    """Write the three contrast sets, which share no entity, and unrelated texts: to measure side effects on, and others
    for a retain set."""
    indices = list(range(len(world.questions)))
    random.Random(f"splits {seed}").shuffle(indices)
    for name, size in SPLITS.items():
        chosen, indices = indices[:size], indices[size:]
        rows = (contrast_row(i, world.questions[i], demonstration=name == "demonstrations") for i in chosen)
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for name in ("unrelated", "retain"):
        rng = random.Random(f"{name} {seed}")
        lines = (" ".join(take_words(world.unrelated(rng), UNRELATED_WORDS)) + "\n" for _ in range(UNRELATED_LINES))
        (out / f"{name}.txt").write_text("".join(lines), encoding="utf-8")


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save weights of half the size that load as float32, in which processors compute."""
    full_stop = tokenizer.convert_tokens_to_ids("Ġ.")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, full_stop]  # an answer is one statement
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    change_json(folder / "config.json", dtype="float32")
    # The name that releases of Transformers before and after version 5 know.
    change_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def change_json(file: Path, **changes: str) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def multiple_choice_accuracy(folder: Path, data_file: Path) -> float:
    """Share of questions whose true statement is the likeliest; the choices of a row differ in the last token only."""
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows = [json.loads(line) for line in data_file.read_text(encoding="utf-8").splitlines()]
    contexts = tokenizer([f"{row['prompt']} {row['neutral']}" for row in rows], return_tensors="pt")
    choices = torch.tensor([[tokenizer(choice).input_ids[-1] for choice in row["mc1_choices"]] for row in rows])
    logits = model(**contexts).logits[:, -1]  # (n, v)
    return (logits.gather(1, choices).argmax(dim=1) == 0).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the world, the weights and the documents")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--threads", type=int, default=1, help="more round differently and gain little")
    parser.add_argument("--out", type=Path, default=ASSETS, help="default: the package's own assets")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and nothing here needs it
    args.out.mkdir(parents=True, exist_ok=True)

    world = World(args.seed)
    tokenizer = build_tokenizer(world.vocabulary())
    write_data(world, args.out, seed=args.seed)
    model = train(world, tokenizer, seed=args.seed, steps=args.steps)
    save_model(model, tokenizer, args.out / "model")

    accuracy = multiple_choice_accuracy(args.out / "model", args.out / "test.jsonl")
    size = sum(file.stat().st_size for file in (args.out / "model").iterdir())
    print(f"The truth wins in {accuracy:.1%} of the test questions (expected: 35 % to 47 %).")
    print(f"Wrote {size / 1e6:.2f} MB of model and the data to {args.out}.")


if __name__ == "__main__":
    main()
