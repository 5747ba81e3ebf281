"""One vLLM engine, in vLLM's own environment: reads a job, answers its prompts one step after another, writes what came out. See vllm_run.py."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: errors at the engine's start come out as they are
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(job_file: str, out_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    try:
        found = run(job)
    except Exception as error:  # what the driver is to judge
        found = {"error": type(error).__name__, "message": str(error)}
    Path(out_file).write_text(json.dumps(found))


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(**job["engine"], **transfer(job.get("connector")))
    steps = []
    for step in job["steps"]:
        if step.get("reset"):
            assert llm.reset_prefix_cache()
        prompts = [TokensPrompt(prompt_token_ids=ids, **({"cache_salt": step["salt"]} if step.get("salt") else {})) for ids in step["prompts"]]
        sampling = SamplingParams(temperature=0, max_tokens=step.get("max_tokens", 16), logprobs=2, ignore_eos=True)
        started = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        steps.append([shown(o) | {"seconds": seconds} for o in outputs])
    preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    return {"steps": steps, "preemptions": preemptions}


def transfer(extra: dict[str, Any] | None) -> dict[str, Any]:
    """The engine's argument that registers the connector by its module path."""
    if extra is None:
        return {}
    from vllm.config import KVTransferConfig

    config = KVTransferConfig(
        kv_connector="KVStoreConnector",
        kv_connector_module_path="kvstore.integrations.vllm",
        kv_role="kv_consumer",
        kv_connector_extra_config=extra,
        kv_load_failure_policy="recompute",
    )
    return {"kv_transfer_config": config}


def shown(output: Any) -> dict[str, Any]:
    answer = output.outputs[0]
    tokens = list(answer.token_ids)
    return {
        "tokens": tokens,
        "logprobs": [step[t].logprob for step, t in zip(answer.logprobs, tokens, strict=True)],
        "second": [max((p.logprob, other) for other, p in step.items() if other != t) for step, t in zip(answer.logprobs, tokens, strict=True)],
        "cached": output.num_cached_tokens,
        "store": (output.kv_transfer_params or {}).get("kvstore"),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
