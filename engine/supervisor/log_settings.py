"""The verbs log_get and log_set: how the whole server logs, at run time (spec H-260..H-263)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgspec

from forebay.ipc.errors import InvalidArgument
from forebay.ipc.log import ENVIRONMENT_VARIABLE, LogOptions, log
from forebay.ipc.messages import LogChanged


class LogSettings:
    """Answers both verbs. Used in the supervisor's event loop only."""

    def __init__(self, announce: Callable[[LogChanged], None]) -> None:
        """``announce`` tells every running process, and those that zygotes fork later."""
        self._announce = announce

    async def get(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        options = log.options
        return {
            "log_file": options.file,
            "log_info": options.info,
            "log_warning": options.warning,
            "log_error": options.error,
            "log_verbose_level": options.verbose,
            "log_format": options.format,
        }

    async def set(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Change what the whole server logs (spec H-261..H-263)."""
        names = {
            "log_info": "info",
            "log_warning": "warning",
            "log_error": "error",
            "log_verbose_level": "verbose",
            "log_format": "format",
        }
        try:
            given = msgspec.convert(arguments.get("settings"), dict[str, Any])
            changes = {names[name]: value for name, value in given.items() if name in names}
            options = msgspec.convert({**msgspec.structs.asdict(log.options), **changes}, LogOptions)
        except msgspec.ValidationError as error:
            raise InvalidArgument(str(error)) from None
        log.configure(options)
        # For those that are started from now on, and for those that run.
        os.environ[ENVIRONMENT_VARIABLE] = msgspec.json.encode(options).decode()
        self._announce(LogChanged(options=msgspec.structs.asdict(options)))
        return await self.get({})
