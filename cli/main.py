"""The `kvstore` command: finds the subcommand, runs it, and turns whatever it raises into a message and an exit status.

Commands are modules of this package, imported when they are called: `kvstore --help` reads the table below and nothing else.
A command module has `USAGE`, `configure(parser)`, which adds its options, and `run(args, out) -> int`, which makes one library call.
"""

from __future__ import annotations

import sys

from kvstore.cli.output import Output, safe

from kvstore import __version__
from kvstore.errors import InputError, KvstoreError

TYPE_CHECKING = False  # typing itself costs milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from kvstore.cli.parser import Parser

COMMANDS = {
    "build": "compile documents into a store",
    "calibrate": "learn from documents what the transform codec needs",
    "load": "answer a question from stored documents, or write their KV to a file",
    "ls": "list the stored documents",
    "show": "what one document takes, layer by layer, and where it comes from",
    "stats": "what the whole store takes",
    "plot": "pictures of it: quality against size, bytes by layer, kind and tier",
    "match": "the longest stored run for a text: why was there no hit?",
    "verify": "check every digest, and with --logits the values",
    "diff": "compare two snapshots",
    "snapshots": "list snapshots, name them with tags",
    "rm": "take documents out of the newest snapshot",
    "gc": "delete what no kept snapshot needs",
    "eval": "answer your own questions at every tier, and say which to use",
    "doctor": "measure whether and how a model's cache can be stored",
    "demo": "build, inspect, load and answer, on the bundled model and corpus",
}
INTERRUPTED, BROKEN_PIPE = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv[1:]` by default) and return its exit status: 0, or that of the error's class."""
    words = list(sys.argv[1:] if argv is None else argv)
    out = Output(as_json="--json" in words)
    try:
        status = _dispatch(words, out)
        out.flush()
        return status
    except KvstoreError as error:
        out.error(error)
        return error.exit_status
    except KeyboardInterrupt:
        out.say("interrupted; what was reported as stored is kept")
        return INTERRUPTED
    except BrokenPipeError:
        out.abandon()
        return BROKEN_PIPE
    except SystemExit as leaving:  # argparse, after printing help
        return int(leaving.code or 0)


def _dispatch(words: list[str], out: Output) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        out.write(overview())
        return 0 if words else InputError.exit_status
    if words[0] == "--version":
        out.write(f"kvstore {__version__}\n")
        return 0
    module = command(words[0])
    parser = parser_of(words[0], module)
    args = parser.parse_intermixed_args(words[1:])  # names and options in any order
    return _logged(lambda: int(module.run(args, out)), out)


def _logged(work: Callable[[], int], out: Output) -> int:
    """Run `work` while warnings that the library logs are shown."""
    import logging

    handler, log = out.log_handler(), logging.getLogger("kvstore")
    log.addHandler(handler)
    try:
        return work()
    finally:
        log.removeHandler(handler)
        out.clear()


def command(name: str) -> ModuleType:
    """The module of a command. Raises InputError that names similar ones."""
    import importlib

    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise InputError(
            f"there is no command {safe(name)!r}", remedy=f"did you mean {near[0]!r}?" if near else "`kvstore --help` lists them", code="usage"
        )
    return importlib.import_module(f"kvstore.cli.{name}")


def parser_of(name: str, module: ModuleType) -> Parser:
    """The argument parser of one command."""
    from kvstore.cli.parser import Parser

    description = (module.__doc__ or "").strip()
    parser = Parser(f"kvstore {name}", module.USAGE, description)
    module.configure(parser)
    return parser


def overview() -> str:
    """What `kvstore --help` prints."""
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return f"""usage: kvstore COMMAND [options]

Compile the KV caches of language models offline, keep them in a store, bring them back at question time.

commands:
{commands}

`kvstore COMMAND --help` shows the options of one command; `kvstore --version` the version.
"""


if __name__ == "__main__":
    sys.exit(main())
