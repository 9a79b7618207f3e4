"""From the text of a flag, an environment variable or a settings file to a typed value, with Triton's error texts.

One function per grammar. Each takes the text and raises `ValueError`, whose message is what the user reads below
`Bad option: "--x".` (texts: spec 10-cli; Triton's command_line_parser.cc, ParseOption and the functions named here).
"""

from collections.abc import Callable
from typing import NoReturn

from forebay.engine.settings import (
    RESTRICTED_APIS,
    ConfigEntry,
    DeviceBytes,
    DeviceFraction,
    PortRange,
    RateLimitResource,
    RestrictedApi,
    TraceLevel,
)

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1

#: Bounds of a latency objective, ms.
SLO_MS_MIN, SLO_MS_MAX = 0.1, 3_600_000.0

#: `--wait spin`: microseconds, by default and at most.
SPIN_US_DEFAULT, SPIN_US_MAX = 50, 10_000

TRUE_WORDS = frozenset({"true", "on", "1"})
FALSE_WORDS = frozenset({"false", "off", "0"})


def parse_bool(text: str) -> bool:
    """Return what true/false, on/off or 1/0 mean, in any letter case."""
    word = text.lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ValueError(f"invalid value for bool option: {text}")


def parse_int(text: str, minimum: int = -INT32_MAX - 1, maximum: int = INT32_MAX) -> int:
    """Return a decimal integer from `minimum` to `maximum`.

    Stricter than Triton's std::stoi, which takes "8000abc" for 8000.
    """
    digits = text.strip()
    # int() alone would also take underscores and other scripts' digits, at any length.
    if not digits.lstrip("+-").isascii() or not digits.lstrip("+-").isdigit() or len(digits) > 20:
        raise ValueError(f"Invalid option value. Got {text}")
    try:
        value = int(digits)
    except ValueError:
        raise ValueError(f"Invalid option value. Got {text}") from None
    if not minimum <= value <= maximum:
        raise ValueError(f"Provided option value is out of bound. Got {text}")
    return value


def parse_float(text: str, minimum: float = float("-inf"), maximum: float = float("inf")) -> float:
    """Return a finite number from `minimum` to `maximum`."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"Invalid option value. Got {text}") from None
    if not minimum <= value <= maximum or value in (float("inf"), float("-inf")):
        raise ValueError(f"Provided option value is out of bound. Got {text}")
    return value


def parse_verbosity(text: str) -> int:
    """Return a log level: a number, or true and false for 1 and 0 (ParseIntBoolOption)."""
    words = {"true": 1, "false": 0}
    return words[text.lower()] if text.lower() in words else parse_int(text, 0)


def parse_choice(text: str, choices: tuple[str, ...], flag: str) -> str:
    """Return the choice that the text spells, exactly or in other letter case."""
    if text in choices:
        return text
    folded = {choice.lower(): choice for choice in choices}
    # Triton folds the case of its modes, but takes the log format as it is written (F-173).
    if flag != "log-format" and text.lower() in folded:
        return folded[text.lower()]
    raise ValueError(f"invalid argument for --{flag}: expected {' or '.join(choices)}, got {text}")


def parse_interval_ms(text: str) -> int:
    """Return milliseconds: declared as a float in Triton's help, parsed as an integer (F-115)."""
    return parse_int(text.split(".", 1)[0], 1)


def parse_pair(text: str, delimiter: str) -> tuple[str, str]:
    """Return the two sides of `<first><delimiter><second>` (ParsePairOption)."""
    first, found, second = text.partition(delimiter)
    if not found:
        raise ValueError(
            "Cannot parse pair option due to incorrect number of inputs."
            f"--<pair option> argument requires format <first>{delimiter}<second>. Found: {text}"
        )
    return first, second


def parse_device_bytes(text: str) -> DeviceBytes:
    """Return `<device>:<bytes>`."""
    device, byte_size = parse_pair(text, ":")
    return DeviceBytes(parse_int(device, 0), parse_int(byte_size, 0, INT64_MAX))


def parse_device_fraction(text: str) -> DeviceFraction:
    """Return `<device>:<fraction>`."""
    device, fraction = parse_pair(text, ":")
    return DeviceFraction(parse_int(device, 0), parse_float(fraction, 0.0, 1.0))


def parse_port_range(text: str) -> PortRange:
    """Return `<first>-<last>`."""
    first, last = parse_pair(text, "-")
    return PortRange(parse_int(first, 0, 65535), parse_int(last, 0, 65535))


def parse_batching(text: str) -> str:
    """Return `triton`, `eager` or `slo=<milliseconds>ms`; the unit may be left out."""
    word = text.strip().lower()
    if word in ("triton", "eager"):
        return word
    name, separator, value = word.partition("=")
    if name != "slo" or not separator:
        raise ValueError(f"--batching must be one of [triton, eager, slo=<milliseconds>]. Got {text}")
    return f"slo={parse_slo_ms(value):g}ms"


def parse_wait(text: str) -> str:
    """Return `park`, or `spin=<microseconds>`; `spin` alone means the default time."""
    word = text.strip().lower()
    if word == "park":
        return word
    name, separator, value = word.partition("=")
    if name != "spin":
        raise ValueError(f"--wait must be one of [park, spin, spin=<microseconds>]. Got {text}")
    return f"spin={parse_int(value, 1, SPIN_US_MAX) if separator else SPIN_US_DEFAULT}"


def spin_us(wait: str) -> int:
    """Return how many microseconds a process looks for work before it sleeps, from a parsed `--wait`."""
    return int(wait.partition("=")[2] or 0)


def parse_slo_ms(text: str) -> float:
    """Return a latency objective in milliseconds, written with or without its unit."""
    return parse_float(text.strip().removesuffix("ms"), SLO_MS_MIN, SLO_MS_MAX)


def parse_config_name(text: str) -> str:
    """Return the name of a custom model configuration (F-027: no spaces)."""
    if any(character.isspace() for character in text):
        raise ValueError(f"a model configuration name cannot contain spaces. Got {text}")
    if "/" in text or text in (".", ".."):
        raise ValueError(f"a model configuration name is a file name without its directory. Got {text}")
    return text


def parse_rate_limit_resource(text: str) -> RateLimitResource:
    """Return `<name>:<count>[:<device>]` (ParseRateLimiterResourceOption)."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or not parts[0]:
        raise ValueError(
            "--rate-limit-resource option format is '<resource_name>:<count>:<device>' or '<resource_name>:<count>'. "
            f"Got {text}"
        )
    device = parse_int(parts[2], -1) if len(parts) == 3 else -1
    return RateLimitResource(parts[0], parse_int(parts[1], 0), device)


def parse_backend_config(text: str) -> ConfigEntry:
    """Return `[<backend>,]<setting>=<value>` (ParseBackendConfigOption)."""
    name, setting, value = _split_config(text)
    if name == "" and text.startswith(","):
        raise ValueError(
            "No backend specified. --backend-config option format is "
            f"<backend name>,<setting>=<value> or <setting>=<value>. Got {text}"
        )
    if not setting or not value:
        raise ValueError(f"--backend-config option format is '<backend name>,<setting>=<value>'. Got {text}")
    return ConfigEntry(name, setting, value)


def parse_cache_config(text: str) -> ConfigEntry:
    """Return `<cache>,<setting>=<value>` (ParseCacheConfigOption)."""
    name, setting, value = _split_config(text)
    if not name:
        raise ValueError(
            f"No cache specified. --cache-config option format is <cache name>,<setting>=<value>. Got {text}"
        )
    if not setting or not value:
        raise ValueError(f"--cache-config option format is '<cache name>,<setting>=<value>'. Got {text}")
    return ConfigEntry(name, setting, value)


def parse_cache_byte_size(text: str) -> ConfigEntry:
    """Return what the deprecated --response-cache-byte-size means: a local cache of that size (F-135)."""
    return ConfigEntry("local", "size", str(parse_int(text, 0, INT64_MAX)))


def parse_metrics_config(text: str) -> ConfigEntry:
    """Return `<setting>=<value>`; a name before the setting is an error (F-116)."""
    setting, _, value = text.partition("=")
    if "," in setting or not setting or not value:
        raise ValueError(f"--metrics-config option format is <setting>=<value>. Got {text}")
    return ConfigEntry("", setting, value)


def parse_trace_config(text: str) -> ConfigEntry:
    """Return `[<mode>,]<setting>=<value>` (ParseTraceConfigOption)."""
    name, setting, value = _split_config(text)
    if name == "" and text.startswith(","):
        raise ValueError(
            "No trace mode specified. --trace-config option format is "
            f"<trace mode>,<setting>=<value> or <setting>=<value>. Got {text}"
        )
    if name:
        name = parse_trace_mode(name)
    if not setting or not value:
        raise ValueError(f"--trace-config option format is '<trace mode>,<setting>=<value>'. Got {text}")
    return ConfigEntry(name, setting, value)


def parse_trace_level(text: str) -> TraceLevel:
    """Return a trace level; the words of old versions still count (ParseTraceLevelOption)."""
    word = text.lower()
    if word in ("false", "off"):
        return "OFF"
    if word in ("true", "on", "min", "max", "timestamps"):
        return "TIMESTAMPS"
    if word == "tensors":
        return "TENSORS"
    raise ValueError(f"invalid value for trace level option: {word}")


def parse_trace_mode(text: str) -> str:
    """Return `triton` or `opentelemetry` (ParseTraceModeOption)."""
    word = text.lower()
    if word in ("triton", "opentelemetry"):
        return word
    raise ValueError(f'invalid value for trace mode option: {word}. Available options are "triton" and "opentelemetry"')


def parse_host_policy(text: str) -> ConfigEntry:
    """Return `<policy>,<setting>=<value>` with a NUMA node or a range of cores (F-155)."""
    name, setting, value = _split_generic(text, ",", "host-policy", "policy name")
    if setting == "numa-node":
        parse_int(value, 0)
    elif setting == "cpu-cores":
        first, last = parse_pair(value, "-")
        if parse_int(first, 0) > parse_int(last, 0):
            raise ValueError(f"the range of cpu-cores ends before it begins. Got {text}")
    else:
        raise ValueError(f"unknown host policy setting '{setting}', expected numa-node or cpu-cores. Got {text}")
    return ConfigEntry(name, setting, value)


def parse_restricted_api(feature: str, flag: str) -> Callable[[str], RestrictedApi]:
    """Return the parser of `<api>[,<api>...]:<key>=<value>` (ParseRestrictedFeatureOption).

    Args:
        feature: what the error texts call one of them, "api" or "protocol".
        flag: the flag's name, for the error text.
    """

    def parse(text: str) -> RestrictedApi:
        apis, key, value = _split_generic(text, ":", flag, "config name")
        names = tuple(apis.split(","))
        for name in names:
            if name not in RESTRICTED_APIS:
                raise ValueError(f"unknown restricted {feature} '{name}'")
            if names.count(name) > 1:
                _refuse_second_group(feature, name)
        return RestrictedApi(names, key, value)

    return parse


def check_restricted_apis(groups: tuple[RestrictedApi, ...], feature: str) -> None:
    """Raise `ValueError` when an API stands in more than one group."""
    seen: set[str] = set()
    for group in groups:
        for name in group.apis:
            if name in seen:
                _refuse_second_group(feature, name)
            seen.add(name)


def _refuse_second_group(feature: str, name: str) -> NoReturn:
    raise ValueError(f"restricted {feature} '{name}' can not be specified in multiple config groups")


def _split_config(text: str) -> tuple[str, str, str]:
    """Split `[<name>,]<setting>=<value>`; the value may hold commas only when a name stands before the setting."""
    name, comma, rest = text.partition(",")
    if not comma:
        name, rest = "", text
    setting, equals, value = rest.partition("=")
    return name, setting, value if equals else ""


def _split_generic(text: str, delimiter: str, flag: str, what: str) -> tuple[str, str, str]:
    """Split `<name><delimiter><setting>=<value>`, all parts required (ParseGenericConfigOption)."""
    name, _, rest = text.partition(delimiter)
    setting, _, value = rest.partition("=")
    if not name or not setting or not value:
        raise ValueError(f"--{flag} option format is '<{what}>{delimiter}<setting>=<value>'. Got {text}")
    return name, setting, value
