"""How long the commands that run no model take as whole processes.

python benchmarks/startup.py [--runs 9]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from common import median, model_of, paired, parser, show

import kvstore
from kvstore import bundled

KVSTORE = [sys.executable, "-m", "kvstore"]


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "kv.zarr"
        kvstore.build(bundled.corpus_path(), store, model_of(args))
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "--help": [*KVSTORE, "--help"],
            "ls": [*KVSTORE, "ls", "--store", str(store)],
            "verify": [*KVSTORE, "verify", "--store", str(store)],
        }
        seconds = paired({n: lambda c=c: subprocess.run(c, check=True, capture_output=True) for n, c in commands.items()}, args.runs)  # type: ignore[misc]
    show("Start-up", ["command", "ms"], [[n, median(s) * 1e3] for n, s in seconds.items()], "startup", {"documents": "the sample corpus"})


if __name__ == "__main__":
    main()
