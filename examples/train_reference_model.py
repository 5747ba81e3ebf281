"""Train the bundled model: a small Llama that can read English prose and recall facts stated in its context.

    python examples/train_reference_model.py BOOKS_DIR OUT_DIR [--minutes 100] [--init CHECKPOINT]

BOOKS_DIR holds public-domain books as Markdown, one folder an author; the authors in HELD_OUT are never read.
Half to two fifths of the sequences are recall exercises: facts scattered through a stretch of a book, then questions
about them. The learning rate follows elapsed time, so the script fits whatever machine and time it is given. The
bundled weights came from a first leg of 1,000 steps at 512 tokens (peak rate 3e-3, three tenths recall), then one run
of this script from there.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = {"Anna Sewell", "H.G. Wells", "Kenneth Grahame", "Robert Louis Stevenson"}
VOCAB = 4096
END, PAD = "<|endoftext|>", "<|pad|>"
COMMON = set("the of and to a in that he was it his with as for had is you i not be her at on by".split())

ADJECTIVES = """
    old red quiet northern silver broken hidden eastern golden tall narrow blue ancient black green white southern
    western crooked empty stone little grey royal wooden iron distant lonely bright cold
""".split()
NOUNS = """
    harbour lantern orchard captain mirror engine garden letter sparrow castle river candle bridge merchant violin
    compass statue market temple meadow pilot farmer kettle wagon tower island forest doctor window cellar station
    library museum anchor basket hammer ladder helmet curtain tailor baker miller sailor widow student teacher
    painter soldier hunter bishop prince judge nurse poet sister brother cousin uncle
""".split()
NAMES = """
    Ashford Bellamy Carver Dunmore Ellery Farrow Garland Hawthorne Ives Jessop Kendrick Lambert Mercer Norwood
    Osborne Pemberton Quincy Radcliffe Sutton Thornton Underhill Vickers Wexford Yardley
""".split()
WORDS = """
    amber copper velvet marble cedar falcon juniper saffron indigo thistle granite willow crimson ebony pearl
    scarlet maple bronze lavender ivory coral hazel onyx topaz walnut olive sable cobalt
""".split()
DIGITS = {"access code", "number", "password"}
AMOUNTS = {"price", "age", "weight"}
PEOPLE = {"owner", "keeper"}
ATTRIBUTES = [*sorted(DIGITS), *sorted(AMOUNTS), *sorted(PEOPLE), "secret word", "colour"]


def read_books(root: Path) -> list[str]:
    """English books under `root`, plain ASCII punctuation, held-out authors left out."""
    books = []
    for path in sorted(root.rglob("*.md")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        words = re.findall(r"[a-zA-Z']+", text[:200_000].lower())
        foreign = sum(w in COMMON for w in words) < 0.28 * len(words)
        if path.parent.name in HELD_OUT or len(words) < 2000 or foreign:
            continue
        text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", text.replace("\r", "")))
        for fancy, plain in {"“": '"', "”": '"', "’": "'", "‘": "'", "—": "--", "…": "..."}.items():
            text = text.replace(fancy, plain)
        books.append(text.encode("ascii", "ignore").decode())
    return books


def stretches(book: str, length: int) -> list[str]:
    """Up to four stretches of a book, taken at random."""
    starts = range(max(1, len(book) - length))
    return [book[i : i + length] for i in random.sample(starts, min(4, max(1, len(book) // length)))]


def train_tokenizer(books: list[str]) -> Tokenizer:
    """Byte-level BPE; digits one by one, so that numbers are recalled digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END, PAD], initial_alphabet=alphabet)
    sample = [piece for book in books for piece in stretches(book, 20_000)]
    question = "Question: What is the access code of the harbour? Answer: 48213."
    sample += [f"{question}\nThe colour of the lantern is green.\n"] * 50
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def value_of(attribute: str) -> str:
    if attribute in DIGITS:
        return "".join(random.choice("0123456789") for _ in range(random.randint(3, 6)))
    if attribute in AMOUNTS:
        return str(random.randint(2, 999))
    return random.choice(NAMES if attribute in PEOPLE else WORDS)


class Exercises:
    """Sequences of token ids with a loss weight per token."""

    def __init__(self, tokenizer: Tokenizer, ids: np.ndarray, seed: int = 0):
        self.tokenizer, self.ids, self.rng = tokenizer, ids, np.random.default_rng(seed)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch(texts)]

    def prose(self, length: int) -> list[int]:
        start = int(self.rng.integers(0, len(self.ids) - length - 1))
        return self.ids[start : start + length].tolist()

    def plain(self, length: int) -> tuple[list[int], list[float]]:
        return self.prose(length + 1), [1.0] * (length + 1)

    def recall(self, length: int) -> tuple[list[int], list[float]]:
        """Facts scattered through prose, then one question per fact; answers weigh 4, question words 0.3."""
        low, high = (2, 6) if length <= 256 else (3, 10) if length <= 512 else (6, 24)
        facts: dict[tuple[str, str], str] = {}
        for _ in range(random.randint(low, high)):
            attribute = random.choice(ATTRIBUTES)
            facts[attribute, f"{random.choice(ADJECTIVES)} {random.choice(NOUNS)}"] = value_of(attribute)
        stated = self.encode([f" The {a} of the {e} is {v}." for (a, e), v in facts.items()])
        asked = random.sample(list(facts.items()), len(facts))
        questions = self.encode([f"\nQuestion: What is the {a} of the {e}? Answer:" for (a, e), _ in asked])
        answers = self.encode([f" {v}." for _, v in asked])
        room = max(0, length + 1 - sum(map(len, stated)) - sum(map(len, questions)) - sum(map(len, answers)))
        some = int(room * random.uniform(0.5, 1.0)) if random.random() < 0.5 else room
        filler = self.prose(some) if some else []
        cuts = sorted(random.randint(0, len(filler)) for _ in stated)
        ids: list[int] = []
        for start, stop, fact in zip([0, *cuts], cuts, stated, strict=False):
            ids += filler[start:stop] + fact
        ids += filler[cuts[-1] :]
        weights = [1.0] * len(ids)
        for question, answer in zip(questions, answers, strict=True):
            ids += question + answer
            weights += [0.3] * len(question) + [4.0] * len(answer)
        ids, weights = [*ids, 0], [*weights, 0.5]
        if len(ids) < length + 1:
            more = self.prose(length + 1 - len(ids))
            ids, weights = ids + more, weights + [1.0] * len(more)
        return ids[: length + 1], weights[: length + 1]

    def batch(self, size: int, length: int, recall_share: float) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [self.recall(length) if random.random() < recall_share else self.plain(length) for _ in range(size)]
        return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])


def new_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def curriculum(progress: float) -> tuple[int, int, float]:
    """Batch size, sequence length, share of recall exercises."""
    return (32, 256, 0.5) if progress < 0.35 else (16, 512, 0.4) if progress < 0.8 else (4, 2048, 0.4)


def train(model: LlamaForCausalLM, exercises: Exercises, minutes: float, out: Path, peak: float = 2.5e-3) -> None:
    """bf16 forward and backward, float32 master weights."""
    master = [p.detach().clone().float() for p in model.parameters()]
    model.to(torch.bfloat16)
    params = list(model.parameters())
    matrices = {"params": [m for m in master if m.ndim > 1], "weight_decay": 0.1}
    vectors = {"params": [m for m in master if m.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=peak, betas=(0.9, 0.95), fused=True)

    @torch.compile(dynamic=False)
    def loss_of(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = model.lm_head(model.model(ids[:, :-1]).last_hidden_state).reshape(-1, VOCAB)
        losses = F.cross_entropy(logits.float(), ids[:, 1:].reshape(-1), reduction="none")
        return (losses * weights[:, 1:].reshape(-1)).sum() / weights[:, 1:].sum()

    started, step = time.time(), 0
    while (progress := (time.time() - started) / (60 * minutes)) < 1:
        rate = peak * min(1, (step + 1) / 150) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p, m in zip(params, master, strict=True):
            p.data.copy_(m)
        loss = loss_of(*exercises.batch(*curriculum(progress)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for p, m in zip(params, master, strict=True):
            m.grad, p.grad = p.grad.float(), None
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step} {progress:.0%} loss {loss.item():.3f}", flush=True)
    for p, m in zip(params, master, strict=True):
        p.data.copy_(m)
    model.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--init", type=Path, help="continue from this checkpoint and its tokenizer")
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    books = read_books(args.books)
    tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json")) if args.init else train_tokenizer(books)
    args.out.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD)
    fast.save_pretrained(args.out)
    random.shuffle(books)
    ids = np.concatenate([np.array([*e.ids, 0], dtype=np.uint16) for e in tokenizer.encode_batch(books)])
    model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32) if args.init else new_model()
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"books": len(books), "tokens": len(ids), "parameters": parameters}))
    train(model, Exercises(tokenizer, ids), args.minutes, args.out)


if __name__ == "__main__":
    main()
