"""Small tokenizers of the families that matter, trained on Python's own help texts, with chat templates like theirs."""

from __future__ import annotations

import json
from functools import cache
from pydoc_data.topics import topics
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [t.strip() for t in topics.values()]
TRAINING = [*TEXTS[:40], *["\n", "\n\n", "\n\n\n"] * 300]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{b:02X}>" for b in range(256)]

# Jinja removes the newline behind each `-%}`, so that the templates can be written one statement a line.
CHATML = """
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
LLAMA3 = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '\\n\\n' -}}
{{ messages[0].content | trim + '<|eot_id|>' }}
{%- endif -%}
{%- for m in messages if m.role != 'system' -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""
LLAMA2 = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{ raise_exception('Only user and assistant roles!') }}{%- endif -%}
{%- for m in messages -%}{{ '[INST] ' + m.content | trim + ' [/INST]' }}{%- endfor -%}
"""
GEMMA = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for m in messages -%}
{{ '<start_of_turn>' + m.role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""


def wrapped(tokenizer: Tokenizer, template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = template
    return made


def _byte_level(pattern: str | None, specials: list[str], in_vocabulary: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=pattern is not None))
    splitter = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=specials if in_vocabulary else [],
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.add_special_tokens(specials)
    return tokenizer


@cache
def gpt2() -> PreTrainedTokenizerFast:
    """GPT-2's pattern: `\\n\\n` is one token only where nothing follows."""
    return wrapped(
        _byte_level(None, ["<|endoftext|>", "<|pad|>"], True),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )


@cache
def llama3() -> PreTrainedTokenizerFast:
    """Llama 3's pattern: `.\\n\\n` may be one token; special tokens lie outside the vocabulary."""
    specials = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return wrapped(_byte_level(LLAMA3_PATTERN, specials, False), LLAMA3, bos_token=specials[0], eos_token=specials[3])


@cache
def chatml() -> PreTrainedTokenizerFast:
    """Qwen's kind: no BOS, non-special control tokens, a control token that swallows white space."""
    tokenizer = _byte_level(LLAMA3_PATTERN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], False)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>", "<tool_call>")])
    tokenizer.add_tokens([AddedToken("<|tail|>", special=True, rstrip=True, lstrip=True), AddedToken("        ", normalized=False)])
    return wrapped(tokenizer, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _pieces() -> dict[str, Any]:
    """A BPE over whole words with `▁`, as JSON, trained on single lines as SentencePiece is."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *BYTES])
    tokenizer.train_from_iterator([line for t in TEXTS[:40] for line in t.split("\n")], trainer)
    return json.loads(tokenizer.to_str())


def _sentence_piece(normalizer: normalizers.Normalizer, specials: list[str], ordinary: list[str] | None = None) -> Tokenizer:
    state = _pieces()
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in BYTES]
    state["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(s, normalized=False) for s in specials])
    tokenizer.add_tokens([AddedToken(s, normalized=False) for s in ordinary or []])
    return tokenizer


@cache
def llama2() -> PreTrainedTokenizerFast:
    """A dummy space before the text and after every control token; `[INST]` is plain text."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return wrapped(_sentence_piece(normalizer, ["<s>", "</s>"]), LLAMA2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def mistral() -> PreTrainedTokenizerFast:
    """`[INST]` is a control token and a space stands behind it; no dummy space."""
    tokenizer = _sentence_piece(normalizers.Replace(" ", "▁"), ["<s>", "</s>", "[INST]", "[/INST]"])
    return wrapped(tokenizer, LLAMA2.replace(" [/INST]", "[/INST]"), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def gemma() -> PreTrainedTokenizerFast:
    tokenizer = _sentence_piece(normalizers.Replace(" ", "▁"), ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
                                ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "<h1>"])  # fmt: skip
    return wrapped(tokenizer, GEMMA, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@cache
def unigram() -> PreTrainedTokenizerFast:
    """The plain vocabulary itself holds `<s>` with the best score; a dummy space at the start of the text only."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(vocab_size=1200, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>")
    tokenizer.train_from_iterator([line for t in TEXTS[:40] for line in t.split("\n")], trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"] += [["\n", -4.0]]
    state["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return wrapped(Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


ALL = {f.__name__: f for f in (gpt2, llama3, chatml, llama2, mistral, gemma, unigram)}
