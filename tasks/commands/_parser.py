"""Command lines that say what was meant, where something was mistyped."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from common.nearest import did_you_mean

if TYPE_CHECKING:
    _Base = argparse.ArgumentParser
else:
    _Base = object


class Suggesting(_Base):
    """A parser, to be mixed with argparse's or jsonargparse's, whose errors name what is near."""

    def error(self, message: str, *args: Any) -> Any:
        """Print a message with what may have been meant, and exit with 2."""
        known: list[str] = []
        odd = ""
        if match := re.search(r"argument (\S+): invalid choice: '([^']*)'", message):
            odd = match[2]
            known = [
                str(choice)
                for action in self._actions
                if match[1] in (action.dest, action.metavar, "/".join(action.option_strings))
                for choice in action.choices or ()
            ]
        elif match := re.search(r"unrecognized arguments: (-[^\s=]*)", message, re.IGNORECASE):
            odd = match[1]
            known = [option for action in self._actions for option in action.option_strings]
        return super().error(message + did_you_mean(odd, known), *args)


class Parser(Suggesting, argparse.ArgumentParser):
    """argparse's, with suggestions."""
