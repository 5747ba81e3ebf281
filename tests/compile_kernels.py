"""Compiles the kernels for a GPU of compute capability 9.0, in a process without Triton's interpreter, and prints the names of those that did."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvstore.device import decode_kernels, place_kernels

NARROW, WIDE = "*i16", "*i32"
POINTERS = {"levels": NARROW, "coefficients": "*fp16", "sums": "*fp32", "mean": "*fp32", "keys": NARROW, "cos": NARROW, "sin": NARROW}
INTEGERS = ("words", "table", "classes", "values", "thirds", "flags", "names", "targets")


def kind_of(name: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    return POINTERS.get(name) or (WIDE if name in INTEGERS else "fp32" if name in ("one", "factor") else "i32")


def build(kernel: Any, constants: dict[str, Any], **options: Any) -> None:
    signature = {parameter.name: kind_of(parameter.name, constants) for parameter in kernel.params}
    if kernel.__name__ == "place":
        signature["values"] = NARROW
    made = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 90, 32), options=options)
    if made.asm["cubin"] and ".local" not in made.asm["ptx"]:
        print(kernel.__name__)


if __name__ == "__main__":
    build(decode_kernels.decode_streams, {"LAST": True, "KEEP": True, "LANES": 32, "PART": 13}, num_warps=1)
    build(decode_kernels.correct, {"LAST": True, "KEEP": True, "LANES": 128})
    build(place_kernels.place, {"KIND": 0, "PRODUCT": 0, "INTERLEAVED": False, "ROWS": 8, "WIDTH": 128}, enable_fp_fusion=False)
