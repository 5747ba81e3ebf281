"""Train the benchmark's second model: a small Llama with multi-head attention and heads of 32, on books and fact recall.

    python benchmarks/train_model.py BOOKS_DIR OUT_DIR [--minutes 90]

BOOKS_DIR holds text files. The tokenizer is the bundled model's. The learning rate follows elapsed time, so that the script fits whatever
machine and time it is given. It exists because figures of one geometry say little: this one has no grouped queries, and other head sizes.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from facts import Facts
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from kvstore import bundled

PEAK = 3e-3
ASCII = str.maketrans({"“": '"', "”": '"', "’": "'", "‘": "'", "—": "--", "…": "..."})
Batch = tuple[torch.Tensor, torch.Tensor]


def new_model(vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def curriculum(progress: float) -> tuple[int, int, float]:
    """Sequences a batch, tokens a sequence, share of recall exercises."""
    if progress < 0.55:
        return 32, 256, 0.5
    return (16, 512, 0.4) if progress < 0.85 else (4, 2304, 0.4)


class Exercises:
    """Batches of token ids and loss weights."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: npt.NDArray[np.uint16]):
        self.tokenizer, self.facts, self.chance = tokenizer, Facts(tokenizer, ids, seed=1), random.Random(2)

    def batch(self, size: int, length: int, recall: float) -> Batch:
        rows = [self.recall(length + 1) if self.chance.random() < recall else self.prose(length + 1) for _ in range(size)]
        return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])

    def prose(self, length: int) -> tuple[list[int], list[float]]:
        return self.facts.stretch(length), [1.0] * length

    def recall(self, length: int) -> tuple[list[int], list[float]]:
        """A document and its questions, `length` tokens in all; answers weigh 4, question words 0.3."""
        count = self.chance.randint(2, 6) if length < 300 else self.chance.randint(3, 10) if length < 600 else self.chance.randint(6, 24)
        document = self.facts.document(max(26 * count, length - 26 * count), count)
        ids, weights = list(document.ids), [1.0] * len(document.ids)
        for question in document.questions:
            for text, weight in ((question.text, 0.3), (question.answer, 4.0)):
                more = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                ids, weights = ids + more, weights + [weight] * len(more)
        rest = max(0, length - len(ids))
        return (ids + self.facts.stretch(rest + 1))[:length], (weights + [1.0] * (rest + 1))[:length]


def rate_at(step: int, progress: float) -> float:
    return PEAK * min(1.0, (step + 1) / 150) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, exercises: Exercises, minutes: float, out: Path) -> None:
    groups = [[p for p in model.parameters() if (p.ndim > 1) == decayed] for decayed in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], lr=PEAK, betas=(0.9, 0.95)
    )
    started, step, tokens, saved = time.time(), 0, 0, time.time()
    while (progress := (time.time() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, progress)
        ids, weights = exercises.batch(*curriculum(progress))
        logits = model(ids[:, :-1]).logits.flatten(0, 1)
        losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + ids.numel()
        if step % 50 == 0:
            print(f"step {step} {progress:.0%} tokens {tokens / 1e6:.1f}M loss {loss.item():.3f}", flush=True)
        if time.time() - saved > 600:
            model.save_pretrained(out)
            saved = time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=90)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_path())
    texts = [p.read_text(encoding="utf-8").translate(ASCII).encode("ascii", "ignore").decode() for p in sorted(args.books.glob("[0-9]*.txt"))]
    pieces = [t[i : i + 100_000] for t in texts for i in range(0, len(t), 100_000)]
    ids = np.concatenate([np.array(row, np.uint16) for row in tokenizer(pieces, add_special_tokens=False)["input_ids"]])
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    model = new_model(len(tokenizer))
    print(f"{len(ids):,} tokens of books, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, Exercises(tokenizer, ids), args.minutes, args.out)
    model.to(torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
