"""What people read about the flags: `--help`, docs/flags.md and conf/forebay.toml, all made from the table of flags."""

import textwrap

import msgspec

from forebay.engine.flags import (
    ENVIRONMENT_SEPARATOR,
    FLAGS,
    FLAGS_BY_PATH,
    SECTION_TITLES,
    Flag,
    Status,
    default_value,
    explanation,
    is_repeatable,
    placeholder,
)
from forebay.engine.settings import ConfigEntry

OVERVIEW = """\
Usage: forebay COMMAND [options]

  serve     serve model repositories; `serve` may be left out before --model-repository
  validate  check model repositories without serving them
  explain   show why a running server batched a model's requests as it did
  demo      serve the example repository, send requests and show the answers
  version   print the version

Each has its own --help. Every flag can also be given as an environment variable or in a settings file.
"""

USAGES = {
    "serve": "forebay serve --model-repository DIRECTORY [options] [MODULE:FUNCTION ...]",
    "validate": "forebay validate [options] DIRECTORY ...",
    "explain": "forebay explain [--http-port PORT] [options] MODEL[:VERSION] ...",
    "demo": "forebay demo [options of serve]",
}

DEMO_HELP = f"""\
Usage: {USAGES["demo"]}

Serves the example repository on free ports, sends requests as a client does, compares every answer with the same model
run in process, prints the latencies and ends the server. Options go to the server; see: forebay serve --help
"""


def usage_line(command: str) -> str:
    """Return the one line that tells how a command is used."""
    return f"Usage: {USAGES[command]}"


def help_text(command: str, extra_flags: tuple[Flag, ...] = (), width: int = 100) -> str:
    """Return the help of a command: its flags under their headings, wrapped to `width` columns."""
    lines = [usage_line(command), ""]
    lines += textwrap.wrap(
        "A flag is written --flag=value or --flag value; an unambiguous beginning of its name is enough. The same is "
        "set by the environment variable FOREBAY_<FLAG_NAME>, as in FOREBAY_HTTP_PORT=8000 (several values: "
        f"separated by '{ENVIRONMENT_SEPARATOR}'), and by the settings file. A flag wins over the environment, the "
        "environment over the file.",
        width,
    )
    groups = [(f"Of {command} alone", list(extra_flags))] if extra_flags else []
    groups += [(title, [flag for flag in FLAGS if flag.section == name]) for name, title in SECTION_TITLES.items()]
    for title, flags in groups:
        lines += ["", f"{title}:"]
        for flag in flags:
            lines += _help_entry(flag, width)
    return "\n".join(lines) + "\n"


def markdown_reference() -> str:
    """Return docs/flags.md."""
    lines = [
        "# Flags",
        "",
        "Made from `engine/flags.py` and `engine/settings.py` by `make reference`.",
        "",
        "Every setting has a flag, an environment variable and a place in the settings file (`--settings FILE` or",
        "`FOREBAY_SETTINGS`; `conf/forebay.toml` explains each). A flag wins over the environment, the environment",
        "over the file. A setting that may be repeated is an array in the file, and its values are separated by",
        f"`{ENVIRONMENT_SEPARATOR}` in the environment. *Accepted*: there is nothing to set in forebay, for the reason",
        "given. *Not yet*: any value but the default ends the start-up, saying so.",
        "",
        "Also read: `AIP_MODE`, `AIP_HTTP_PORT` and `AIP_STORAGE_URI` (Vertex AI). `TRITON_PARALLEL_INSTANCE_LOADING`",
        "has no effect, because instances always load in parallel.",
    ]
    for section, title in SECTION_TITLES.items():
        lines += ["", f"## {title}", "", "| flag | default | environment | file | meaning | status |"]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for flag in FLAGS:
            if flag.section == section:
                lines.append(_markdown_row(flag))
    return "\n".join(lines) + "\n"


def settings_file() -> str:
    """Return conf/forebay.toml: every setting with its explanation, set to its default and commented out."""
    lines = [
        "# Settings of a forebay server: every one that there is, explained and at its default.",
        "# Made from engine/settings.py by: make reference",
        "#",
        "# Copy this file, take the '# ' away before what you change, and start the server with",
        "#   forebay serve --settings FILE        (or FOREBAY_SETTINGS=FILE in the environment)",
        "# A flag wins over an environment variable, and that over this file.",
    ]
    for section, title in SECTION_TITLES.items():
        lines += ["", "", f"# --- {title} " + "-" * (100 - len(title) - 7), f"[{section}]"]
        for flag in FLAGS_BY_PATH.values():
            if flag.section == section:
                lines.append("")
                lines += _wrap(_full_explanation(flag), 118, "# ")
                lines.append(f"# {flag.field} = {_toml_value(flag)}".rstrip())
    return "\n".join(lines) + "\n"


def _help_entry(flag: Flag, width: int) -> list[str]:
    head = f"  --{flag.name} {placeholder(flag)}".rstrip()
    body = explanation(flag)
    remarks = _remarks(flag)
    if remarks:
        body += f" ({'; '.join(remarks)})"
    return [head, *_wrap(body, width, " " * 8)]


def _remarks(flag: Flag) -> list[str]:
    remarks: list[str] = []
    default = default_text(flag)
    if default:
        remarks.append(f"default {default}")
    if flag.path and is_repeatable(flag):
        remarks.append("may be repeated")
    if flag.deprecated:
        remarks.append("deprecated")
    if flag.status is Status.ACCEPTED:
        remarks.append(f"accepted, without effect: {flag.note}")
    if flag.status is Status.NOT_YET:
        remarks.append("not implemented yet")
    return remarks


def _markdown_row(flag: Flag) -> str:
    status = flag.status.value + (f": {flag.note}" if flag.note and flag.status is Status.ACCEPTED else "")
    variables = ", ".join(f"`{name}`" for name in (flag.variable, *flag.environment)) if flag.name != "help" else ""
    value = placeholder(flag)
    cells = (
        f"`--{flag.name}{' ' + value if value else ''}`",
        f"`{default_text(flag)}`" if default_text(flag) else "",
        variables,
        f"`{flag.path}`" if flag.path else "",
        explanation(flag) + (" Deprecated." if flag.deprecated else ""),
        status,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _full_explanation(flag: Flag) -> str:
    text = f"{explanation(flag)} Flag: --{flag.name}."
    if flag.status is Status.ACCEPTED:
        text += f" Without effect: {flag.note}."
    if flag.status is Status.NOT_YET:
        text += " Not implemented yet."
    return text


def default_text(flag: Flag) -> str:
    """Return a setting's default as one would write it on the command line; empty when there is none."""
    if not flag.path or not flag.takes_value:
        return ""
    default = default_value(flag)
    if default is None or default == "" or default == ():
        return ""
    return value_text(default)


def value_text(value: object) -> str:
    """Return a value as one would write it on the command line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, ConfigEntry):
        return f"{value.name},{value.setting}={value.value}".lstrip(",")
    return str(value)


def _wrap(text: str, width: int, indent: str) -> list[str]:
    # Flags stay whole: a name broken at its dashes could not be copied or searched for.
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _toml_value(flag: Flag) -> str:
    default = default_value(flag)
    if default is None:
        return ""
    if default == ():
        return "[]"
    if isinstance(default, bool | int | float):
        return value_text(default)
    return msgspec.json.encode(default).decode()
