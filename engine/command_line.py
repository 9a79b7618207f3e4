"""From the words of a command line, the environment and a settings file to one frozen `Settings`.

The grammar is getopt_long's, as in Triton (spec 10-cli): `--flag=value`, `--flag value`, unambiguous beginnings of a
name, and flags and other words in any order. What the flags are stands in `flags.py`.

    python -m forebay.engine.command_line --markdown    prints docs/flags.md
    python -m forebay.engine.command_line --toml        prints conf/forebay.toml
"""

import difflib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec

from forebay.engine.flag_reference import DEMO_HELP, OVERVIEW, help_text, markdown_reference, settings_file, usage_line
from forebay.engine.flags import (
    ENVIRONMENT_SEPARATOR,
    FLAGS,
    FLAGS_BY_NAME,
    Flag,
    Status,
    default_value,
    is_repeatable,
    parse_value,
)
from forebay.engine.option_values import check_restricted_apis, parse_int, parse_trace_level, parse_trace_mode
from forebay.engine.settings import Settings, TraceSettings
from forebay.engine.settings_file import load_settings_file

CommandName = Literal["serve", "validate", "explain", "demo", "version"]

#: Flags of single commands, besides those of the server.
_FORMAT = Flag("format", group="server", metavar="text|json", help="Print for people (the default) or programs.")
EXTRA_FLAGS: dict[str, tuple[Flag, ...]] = {
    "validate": (
        _FORMAT,
        Flag("json", takes_value=False, group="server", help="The same as --format=json."),
        Flag(
            "load",
            takes_value=False,
            group="server",
            help="Also load each model, in processes of its own, and compare its tensors with the configuration.",
        ),
    ),
    "explain": (_FORMAT,),
}

#: Kubernetes describes a service called forebay-http as FOREBAY_HTTP_PORT=tcp://10.0.0.1:8000: not meant for us.
SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d+")

FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What the user asks for.

    Attributes:
        name: the command.
        settings: all settings, checked against each other.
        arguments: words that are no flags: models for `explain`, everything after the command for `demo`.
        output_format: for `validate` and `explain`.
        is_loading: for `validate`: load the models too.
        warnings: lines to print to standard error before anything else.
        sources: for each setting that is not left at its default, by path, who set it.
    """

    name: CommandName
    settings: Settings
    arguments: tuple[str, ...] = ()
    output_format: Literal["text", "json"] = "text"
    is_loading: bool = False
    warnings: tuple[str, ...] = ()
    sources: Mapping[str, str]


class CommandLineExit(Exception):
    """The command line asks for no more than a text: help, a version, or what is wrong with it.

    Attributes:
        text: what to print; to standard output when `is_answer`, else to standard error.
        exit_code: the process's exit code.
        is_answer: whether the user asked for the text.
    """

    def __init__(self, text: str, exit_code: int = 1, is_answer: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.exit_code = exit_code
        self.is_answer = is_answer


@dataclass(frozen=True, slots=True)
class Given:
    """One text given for a flag, and by whom."""

    flag: Flag
    text: str
    source: str


def parse_command_line(argv: Sequence[str], environ: Mapping[str, str]) -> Command:
    """Return what a command line asks for.

    Args:
        argv: the words after the program's name.
        environ: the environment.

    Raises:
        CommandLineExit: there is a text to print instead: help, or an error (exit code 1, spec F-175).
    """
    name, words = _split_command([_utf8(word, "an argument") for word in argv])
    if name == "version":
        return Command(name=name, settings=Settings(), sources={})
    if name == "demo":
        _Parser(name, environ).check_words(words)
        return Command(name=name, settings=Settings(), arguments=tuple(words), sources={})
    return _Parser(name, environ).parse(words)


def _utf8(text: str, what: str) -> str:
    """Return a text of the system as what its bytes are in UTF-8, whatever the locale took them for.

    Raises:
        CommandLineExit: they are no UTF-8, which no message could carry.
    """
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError:
        raise CommandLineExit(f"Error: {what} is not valid UTF-8: {text!a}\n") from None


def _split_command(argv: Sequence[str]) -> tuple[CommandName, list[str]]:
    """Split the command's name off. Words that begin with a flag are `serve`'s, as tritonserver has no commands."""
    if not argv or argv[0] in ("--help", "-h", "help"):
        raise CommandLineExit(OVERVIEW, exit_code=0, is_answer=True)
    if argv[0] == "--version":
        return "version", []
    if argv[0].startswith("-"):
        return "serve", list(argv)
    for name in get_args(CommandName):
        if argv[0] == name:
            return name, list(argv[1:])
    close = difflib.get_close_matches(argv[0], get_args(CommandName), n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise CommandLineExit(f'{OVERVIEW}\nUnknown command: "{argv[0]}".{hint}\n')


class _Parser:
    """One parse: collects what each source gives, merges it, checks it."""

    def __init__(self, command: CommandName, environ: Mapping[str, str]) -> None:
        self.command: CommandName = command
        self.environ = environ
        self.extra_flags = EXTRA_FLAGS.get(command, ())
        self.flags = FLAGS_BY_NAME | {flag.name: flag for flag in self.extra_flags}
        self.warnings: list[str] = []

    def parse(self, words: Sequence[str]) -> Command:
        from_words, arguments = self._scan(words)
        from_environment = self._read_environment()
        files = [given for given in (*from_environment, *from_words) if given.flag.name == "settings"]
        from_file = self._read_file(files[-1]) if files else []

        given = _winners((from_file, from_environment, from_words))
        settings, sources = self._build(given)
        settings, arguments = self._place_arguments(settings, arguments)
        for flag in {item.flag.name: item.flag for item in (*from_environment, *from_words)}.values():
            if flag.deprecated:
                self.warnings.append(flag.deprecated)
        settings = self._settle(settings, given)
        if self.command == "serve":
            self._check(settings, given)
            self._refuse_unimplemented(given)
        return Command(
            name=self.command,
            settings=settings,
            arguments=tuple(arguments),
            output_format=self._output_format(given),
            is_loading=any(item.flag.name == "load" for item in given),
            warnings=tuple(self.warnings),
            sources=sources,
        )

    def check_words(self, words: Sequence[str]) -> None:
        """Refuse, before anything is started, words that the server would refuse."""
        _given, arguments = self._scan(words)
        if arguments:
            raise CommandLineExit(f"{usage_line(self.command)}\n\nUnexpected argument: {arguments[0]}\n")

    # --- where values come from

    def _scan(self, words: Sequence[str]) -> tuple[list[Given], list[str]]:
        """Split words into flags and others, as getopt_long does with its long options."""
        given: list[Given] = []
        others: list[str] = []
        rest = iter(words)
        for word in rest:
            if word == "--":
                others += rest
            elif word.startswith("--"):
                name, equals, text = word[2:].partition("=")
                flag = self._find(name)
                if flag.name == "help":
                    raise self._help()
                if not flag.takes_value:
                    if equals:
                        raise self._bad_option(flag.name, f"option '--{flag.name}' doesn't allow an argument")
                    text = "true"
                elif not equals:
                    following = next(rest, None)
                    if following is None:
                        raise self._bad_option(flag.name, f"option '--{flag.name}' requires an argument")
                    text = following
                given.append(Given(flag, text, "command line"))
            elif word.startswith("-") and word != "-":
                close = [name for name in self.flags if name == word[1:].partition("=")[0]]
                hint = f"Did you mean --{close[0]}?" if close else "Flags begin with two dashes."
                raise self._bad_option(word, hint, dashes="")
            else:
                others.append(word)
        return given, others

    def _help(self) -> CommandLineExit:
        if self.command == "demo":
            return CommandLineExit(DEMO_HELP, exit_code=0, is_answer=True)
        width = min(shutil.get_terminal_size().columns, 110)
        # Exit code 1 is Triton's (spec 10-cli), which has no other commands.
        exit_code = 1 if self.command == "serve" else 0
        return CommandLineExit(help_text(self.command, self.extra_flags, width), exit_code, is_answer=True)

    def _find(self, name: str) -> Flag:
        """Return the flag that a name, or an unambiguous beginning of one, means."""
        if name in self.flags:
            return self.flags[name]
        matches = [flag for known, flag in self.flags.items() if name and known.startswith(name)]
        # Two names of one setting are no ambiguity: --model-store is --model-repository.
        if len(matches) == 1 or (matches and len({flag.path or flag.name for flag in matches}) == 1):
            return matches[0]
        if matches:
            choices = " ".join(f"'--{flag.name}'" for flag in matches)
            raise self._bad_option(name, f"option '--{name}' is ambiguous; possibilities: {choices}")
        close = difflib.get_close_matches(name.replace("_", "-").lower(), list(self.flags), n=1)
        raise self._bad_option(name, f"Did you mean --{close[0]}?" if close else "")

    def _read_environment(self) -> list[Given]:
        given: list[Given] = []
        # Vertex AI's and Triton's own variables first: ours say more precisely what is meant.
        if self.environ.get("AIP_MODE") == "PREDICTION":
            given += [
                Given(FLAGS_BY_NAME[name], text, "AIP_MODE")
                for name, text in (("allow-vertex-ai", "true"), ("allow-http", "false"), ("allow-grpc", "false"))
            ]
            if "AIP_HTTP_PORT" in self.environ:
                given.append(Given(FLAGS_BY_NAME["vertex-ai-port"], self.environ["AIP_HTTP_PORT"], "AIP_HTTP_PORT"))
        if self.environ.get("AIP_STORAGE_URI"):
            given.append(Given(FLAGS_BY_NAME["model-repository"], self.environ["AIP_STORAGE_URI"], "AIP_STORAGE_URI"))
        for flag in FLAGS:
            if flag.name == "help":
                continue
            for variable in (*flag.environment, flag.variable):
                text = _utf8(self.environ.get(variable, ""), f"the environment variable {variable}")
                if not text or SERVICE_LINK.fullmatch(text):
                    continue
                texts = text.split(ENVIRONMENT_SEPARATOR) if is_repeatable(flag) else [text]
                given += [Given(flag, part, variable) for part in texts if part]
        self._warn_of_misspelt_variables()
        return _last_source_of_each(given)

    def _warn_of_misspelt_variables(self) -> None:
        known = {flag.variable for flag in FLAGS}
        for variable in self.environ:
            if variable.startswith("FOREBAY_") and variable not in known:
                close = difflib.get_close_matches(variable, known, n=1, cutoff=0.85)
                if close:
                    self.warnings.append(
                        f"Warning: the environment variable {variable} sets nothing. Did you mean {close[0]}?"
                    )

    def _read_file(self, settings_file: Given) -> list[Given]:
        try:
            texts = load_settings_file(settings_file.text)
        except ValueError as error:
            raise CommandLineExit(f"Error: {error}\n") from None
        return [Given(flag, text, settings_file.text) for flag, parts in texts.items() for text in parts]

    # --- from texts to settings

    def _build(self, given: Iterable[Given]) -> tuple[Settings, dict[str, str]]:
        """Parse the texts and put the values into `Settings`; the last of several wins, unless they add up."""
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for item in given:
            if not item.flag.path:
                continue
            try:
                value = parse_value(item.flag, item.text)
            except ValueError as error:
                origin = "" if item.source == "command line" else f"\n(set by {item.source})"
                raise self._bad_option(item.flag.name, f"{error}{origin}") from None
            path = item.flag.path
            values[path] = (*values.get(path, ()), value) if is_repeatable(item.flag) else value
            sources[path] = item.source
        groups: dict[str, dict[str, Any]] = {}
        for path, value in values.items():
            section, _, field = path.partition(".")
            groups.setdefault(section, {})[field] = value
        settings = Settings()
        changed = {
            section: msgspec.structs.replace(getattr(settings, section), **fields) for section, fields in groups.items()
        }
        return msgspec.structs.replace(settings, **changed), sources

    def _place_arguments(self, settings: Settings, arguments: list[str]) -> tuple[Settings, list[str]]:
        """Give the words that are no flags their meaning: functions for serve, directories for validate."""
        repository = settings.repository
        if self.command == "serve" and arguments:
            for word in arguments:
                if not FUNCTION.fullmatch(word):
                    raise CommandLineExit(f"{usage_line('serve')}\n\nUnexpected argument: {word}\n")
            repository = msgspec.structs.replace(repository, functions=tuple(dict.fromkeys(arguments)))
            arguments = []
        if self.command == "validate" and arguments:
            repository = msgspec.structs.replace(repository, paths=(*repository.paths, *arguments))
            arguments = []
        # `explain` asks a server that runs already.
        if self.command != "explain" and not repository.paths and not repository.functions:
            text = (
                "--model-repository must be specified\n(for a first look: forebay demo)"
                if self.command == "serve"
                else "name a model repository, as in: forebay validate models/"
            )
            raise CommandLineExit(f"{usage_line(self.command)}\n\nError: {text}\n")
        # Triton keeps them in a set: naming a directory twice is naming it once.
        repository = msgspec.structs.replace(repository, paths=tuple(dict.fromkeys(repository.paths)))
        return msgspec.structs.replace(settings, repository=repository), arguments

    def _settle(self, settings: Settings, given: Sequence[Given]) -> Settings:
        """Apply what one setting implies for another (Triton's post-parsing step)."""
        by_flag = {item.flag.name: item for item in given}
        repository, http, grpc, metrics = settings.repository, settings.http, settings.grpc, settings.metrics
        both = [by_flag.get(name) for name in ("disable-auto-complete-config", "strict-model-config")]
        if [item and parse_value(item.flag, item.text) for item in both] == [True, False]:
            self.warnings.append(
                "Warning: Overriding deprecated '--strict-model-config' from False to True in favor of "
                "'--disable-auto-complete-config'!"
            )
            repository = msgspec.structs.replace(repository, disable_auto_complete_config=True)
        if grpc.use_ssl_mutual:
            grpc = msgspec.structs.replace(grpc, use_ssl=True)
        metrics = msgspec.structs.replace(
            metrics,
            address=metrics.address or http.address,
            allow_gpu=metrics.allow_gpu and metrics.allow,
            allow_cpu=metrics.allow_cpu and metrics.allow,
        )
        return msgspec.structs.replace(
            settings,
            repository=repository,
            grpc=grpc,
            metrics=metrics,
            trace=self._fold_trace_config(settings.trace, by_flag),
        )

    def _fold_trace_config(self, trace: TraceSettings, by_flag: Mapping[str, Given]) -> TraceSettings:
        """Put the entries of --trace-config into the fields that they mean; they win over the old flags (F-118)."""
        changes: dict[str, Any] = {}
        levels = list(trace.level)
        in_file_format = {"file": "trace-file", "log-frequency": "trace-log-frequency"}
        for entry in trace.config:
            try:
                if entry.name == "" and entry.setting in ("rate", "count"):
                    self._warn_of_override(f"trace-{entry.setting}", by_flag)
                    changes[entry.setting] = parse_int(entry.value, 1 if entry.setting == "rate" else -1)
                elif entry.name == "" and entry.setting == "level":
                    self._warn_of_override("trace-level", by_flag)
                    levels.append(parse_trace_level(entry.value))
                elif entry.name == "" and entry.setting == "mode":
                    changes["mode"] = parse_trace_mode(entry.value)
                elif entry.name == "triton" and entry.setting in in_file_format:
                    self._warn_of_override(in_file_format[entry.setting], by_flag)
                    if entry.setting == "file":
                        changes["file"] = entry.value
                    else:
                        changes["log_frequency"] = parse_int(entry.value, 0)
            except ValueError as error:
                prefix = f"{entry.name}," if entry.name else ""
                raise self._bad_option(f"trace-config {prefix}{entry.setting}", str(error)) from None
        changes["level"] = ("OFF",) if "OFF" in levels else tuple(dict.fromkeys(levels))
        return msgspec.structs.replace(trace, **changes)

    def _warn_of_override(self, old_flag: str, by_flag: Mapping[str, Given]) -> None:
        if old_flag in by_flag and by_flag[old_flag].source == "command line":
            what = {"trace-rate": "rate value", "trace-file": "file", "trace-log-frequency": "log-frequency"}
            self.warnings.append(
                f"Warning: Overriding deprecated '--{old_flag}' in favor of provided "
                f"{what.get(old_flag, old_flag.removeprefix('trace-'))} in --trace-config!"
            )

    # --- checks of one setting against another

    def _check(self, settings: Settings, given: Sequence[Given]) -> None:
        """Refuse combinations that Triton refuses (F-135, F-170 to F-172)."""
        repository = settings.repository
        if repository.load_models and repository.control_mode != "explicit":
            raise CommandLineExit(
                "Error: Use of '--load-model' requires setting '--model-control-mode=explicit' as well.\n"
            )
        if "*" in repository.load_models and len(set(repository.load_models)) > 1:
            raise CommandLineExit(
                "Error: Wildcard model name '*' must be the ONLY startup model if specified at all.\n"
            )
        if {"cache-config", "response-cache-byte-size"} <= {item.flag.name for item in given}:
            raise CommandLineExit(
                "Error: Incompatible flags --response-cache-byte-size and --cache-config both provided. "
                "Please provide one or the other.\n"
            )
        if len({entry.name for entry in settings.cache.config}) > 1:
            raise self._bad_option("cache-config", "Only one cache can be configured.")
        try:
            cache_bytes = settings.cache.size_bytes
        except ValueError as error:
            raise self._bad_option("cache-config", str(error)) from None
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if cache_bytes > memory_bytes:
            raise CommandLineExit(
                f"Error: a response cache of {cache_bytes} bytes does not fit into the {memory_bytes} bytes of memory "
                "that this machine has.\n"
            )
        for name, groups, feature in (
            ("http-restricted-api", settings.http.restricted_apis, "api"),
            ("grpc-restricted-protocol", settings.grpc.restricted_protocols, "protocol"),
        ):
            try:
                check_restricted_apis(groups, feature)
            except ValueError as error:
                raise self._bad_option(name, str(error)) from None
        self._check_pattern("http-header-forward-pattern", settings.http.header_forward_pattern)
        self._check_pattern("grpc-header-forward-pattern", settings.grpc.header_forward_pattern)
        check_port_collision(settings)

    def _check_pattern(self, name: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise self._bad_option(name, f"invalid regular expression {pattern!r}: {error}") from None

    def _refuse_unimplemented(self, given: Sequence[Given]) -> None:
        """End the start-up on a flag that would be ignored otherwise."""
        for item in given:
            flag = item.flag
            if flag.status is not Status.NOT_YET:
                continue
            value = parse_value(flag, item.text)
            if value == default_value(flag):
                continue
            origin = "" if item.source == "command line" else f", set by {item.source},"
            advice = f": {flag.note}" if flag.note else ""
            raise CommandLineExit(
                f"Error: --{flag.name}={item.text}{origin} is not implemented yet in forebay {version()}. "
                f"Leave it out{advice}.\n"
            )

    def _output_format(self, given: Iterable[Given]) -> Literal["text", "json"]:
        chosen: Literal["text", "json"] = "text"
        for item in given:
            if item.flag.name == "format":
                if item.text == "json":
                    chosen = "json"
                elif item.text == "text":
                    chosen = "text"
                else:
                    raise self._bad_option("format", f"invalid argument for --format: {item.text}")
            elif item.flag.name == "json":
                chosen = "json"
        return chosen

    def _bad_option(self, name: str, reason: str, dashes: str = "--") -> CommandLineExit:
        lines = [usage_line(self.command), f"       forebay {self.command} --help explains every flag.", ""]
        lines += [f'Bad option: "{dashes}{name}".', *([reason] if reason else [])]
        return CommandLineExit("\n".join(lines) + "\n")


def check_port_collision(settings: Settings) -> None:
    """Refuse two endpoints at one address, and ports outside SageMaker's range (F-170, CheckPortCollision).

    Raises:
        CommandLineExit: with Triton's text.
    """
    cloud = settings.cloud
    endpoints = [
        (name, address, port)
        for is_allowed, name, address, port in (
            (settings.http.allow, "HTTP", settings.http.address, settings.http.port),
            (settings.grpc.allow, "GRPC", settings.grpc.address, settings.grpc.port),
            (settings.metrics.allow, "metrics", settings.metrics.address, settings.metrics.port),
            (cloud.allow_sagemaker, "SageMaker", settings.http.address, cloud.sagemaker_port),
            (cloud.allow_vertex_ai, "Vertex AI", settings.http.address, cloud.vertex_ai_port),
        )
        if is_allowed
    ]
    allowed = cloud.sagemaker_safe_port_range if cloud.allow_sagemaker else None
    for index, (name, address, port) in enumerate(endpoints):
        if allowed is not None and name != "SageMaker" and not allowed.first <= port <= allowed.last:
            raise CommandLineExit(
                f"The server cannot listen to {name} requests at port {port}, "
                f"allowed port range is [{allowed.first}, {allowed.last}]\n"
            )
        for other_name, other_address, other_port in endpoints[index + 1 :]:
            # Port 0 is a free one, a different one each time.
            if address == other_address and port == other_port != 0:
                raise CommandLineExit(
                    f"The server cannot listen to {name} requests and {other_name} requests at the same address and "
                    f"port {address}:{port}\n"
                )


def _winners(sources: Sequence[Sequence[Given]]) -> list[Given]:
    """Return what counts when a later source's word on a setting replaces that of all earlier ones."""
    winners: dict[str, Sequence[Given]] = {}
    for source in sources:
        by_setting: dict[str, list[Given]] = {}
        for item in source:
            by_setting.setdefault(item.flag.path or item.flag.name, []).append(item)
        winners |= by_setting
    return [item for items in winners.values() for item in items]


def _last_source_of_each(given: Sequence[Given]) -> list[Given]:
    """Return, where several variables set one setting, the values of the last of them only."""
    last = {item.flag.path or item.flag.name: item.source for item in given}
    return [item for item in given if last[item.flag.path or item.flag.name] == item.source]


def version() -> str:
    """Return the installed version."""
    # Takes longer to import than all the rest of this module.
    import importlib.metadata

    return importlib.metadata.version("forebay")


def main(argv: Sequence[str]) -> int:
    """Print a reference made from the table of flags."""
    references = {"--markdown": markdown_reference, "--toml": settings_file}
    if len(argv) != 1 or argv[0] not in references:
        print(f"Usage: python -m forebay.engine.command_line {' | '.join(references)}", file=sys.stderr)
        return 1
    sys.stdout.write(references[argv[0]]())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
