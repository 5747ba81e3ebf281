"""Ask the bundled model about every fact in a corpus and write the questions that it answers with confidence.

    python examples/make_sample_questions.py CORPUS_DIR OUT.jsonl [--model MODEL_DIR] [--floor 0.5]

A fact is a sentence phrased as in the model's training: `The access code of the silver tower is 4821.` It must not
begin a paragraph, since in training a space came before it. The prompt is the whole document, prefilled live, then the
question. An answer counts when greedy decoding gives exactly the value and a full stop, and when each of its tokens
has a probability of at least `--floor`, so that other machines and compressed caches still agree.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvstore.bundled

ATTRIBUTES = "access code|number|password|age|price|weight|keeper|owner|secret word|colour"
FACT = re.compile(rf"\bThe ({ATTRIBUTES}) of the ([a-z]+ [a-z]+) is (\w+)\.")


class Asked(NamedTuple):
    """One question, the answer wanted, the answer given and the least probability among its tokens."""

    source: str
    question: str
    answer: str
    given: str
    margin: float


def facts_of(root: Path) -> list[tuple[str, str, str]]:
    """(source, question, answer) of every fact under `root`; a question that two documents would answer is an error."""
    found: list[tuple[str, str, str]] = []
    for path in sorted(p for p in root.rglob("*") if p.suffix in {".md", ".txt"}):
        for attribute, entity, value in FACT.findall(path.read_text(encoding="utf-8")):
            found.append((path.relative_to(root).as_posix(), f"What is the {attribute} of the {entity}?", value))
    questions = [question for _, question, _ in found]
    if repeated := sorted({q for q in questions if questions.count(q) > 1}):
        raise SystemExit(f"asked more than once: {repeated}")
    return found


@torch.inference_mode()
def ask(model: Any, tokenizer: Any, text: str, question: str, answer: str) -> tuple[str, float]:
    """The greedy answer to `question` after `text`, and the least probability of a token of the right answer."""
    prompt = [
        tokenizer.bos_token_id,
        *tokenizer(f"{text}\nQuestion: {question} Answer:", add_special_tokens=False).input_ids,
    ]
    wanted = tokenizer(f" {answer}.", add_special_tokens=False).input_ids
    logits = model(torch.tensor([prompt + wanted])).logits[0, len(prompt) - 1 : -1].float()
    best = logits.argmax(-1)
    # Right at every step of the teacher-forced pass is the same as right when decoding greedily.
    margin = logits.softmax(-1).gather(1, torch.tensor(wanted)[:, None]).min().item()
    return tokenizer.decode(best), margin


def ask_all(root: Path, model_path: Path) -> list[Asked]:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    asked = []
    for source, question, answer in facts_of(root):
        given, margin = ask(model, tokenizer, (root / source).read_text(encoding="utf-8").rstrip(), question, answer)
        asked.append(Asked(source, question, answer, given, margin))
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=kvstore.bundled.model_path())
    parser.add_argument("--floor", type=float, default=0.5)
    args = parser.parse_args()
    asked = ask_all(args.corpus, args.model)
    kept = [a for a in asked if a.given == f" {a.answer}." and a.margin >= args.floor]
    for a in sorted(set(asked) - set(kept)):
        print(f"left out: {a.source}: {a.question} wanted {a.answer!r}, given {a.given!r}, {a.margin:.3f}")
    with args.out.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(json.dumps({"source": a.source, "question": a.question, "answer": a.answer}) + "\n" for a in kept)
    least = min((a.margin for a in kept), default=0.0)
    right = sum(a.given == f" {a.answer}." for a in asked)
    print(
        f"{len(asked)} facts, {right} answered right, {len(kept)} kept from {len({a.source for a in kept})} documents; least probability {least:.3f}"
    )


if __name__ == "__main__":
    main()
