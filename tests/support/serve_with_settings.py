"""Run ``serve`` with settings that no flag gives: ``serve_with_settings.py {"repository": {...}} serve --flags``."""

from __future__ import annotations

import os
import sys

import msgspec

from forebay.engine.command_line import parse_command_line
from forebay.engine.main import serve
from forebay.engine.settings import Settings


def main() -> int:
    """Parse the flags as ever, then replace the given fields."""
    settings = parse_command_line(sys.argv[2:], os.environ).settings
    groups = msgspec.to_builtins(settings)
    for name, fields in msgspec.json.decode(sys.argv[1]).items():
        groups[name].update(fields)
    return serve(msgspec.convert(groups, Settings))


if __name__ == "__main__":
    sys.exit(main())
