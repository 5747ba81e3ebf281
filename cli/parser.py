"""argparse as kvstore uses it: errors are kvstore's own, help is the same on every Python and terminal up to 100 columns."""

from __future__ import annotations

import argparse
import shutil
from typing import Any, NoReturn

from kvstore.errors import InputError

WIDTH = 100


class Parser(argparse.ArgumentParser):
    """One command's options. A wrong command line raises InputError with the code `usage`."""

    def __init__(self, prog: str, usage: str, description: str):
        super().__init__(prog=prog, usage=f"{prog} {usage}", description=description, allow_abbrev=False, formatter_class=_Formatter)
        self.color = False  # Python 3.14 would paint it

    def error(self, message: str) -> NoReturn:
        raise InputError(message, remedy=f"`{self.prog} --help` shows the options", code="usage")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **options: Any):
        columns = shutil.get_terminal_size((WIDTH, 24)).columns
        super().__init__(prog, max_help_position=27, width=min(WIDTH, columns))
