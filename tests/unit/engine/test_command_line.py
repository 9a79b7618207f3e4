"""From words, environment and file to settings, with Triton's grammar, texts and exit codes (spec 10-cli)."""

import dataclasses
import re

import pytest

from forebay.engine.command_line import CommandLineExit, main, parse_command_line
from forebay.engine.flag_reference import default_text
from forebay.engine.flags import FLAGS, FLAGS_BY_NAME, FLAGS_BY_PATH, Status
from forebay.engine.settings import (
    ConfigEntry,
    DeviceBytes,
    DeviceFraction,
    PortRange,
    RateLimitResource,
    RestrictedApi,
    Settings,
)

#: Every flag of spec 10-cli, F-001 to F-156.
TRITON_FLAGS = re.findall(
    r"\S+",
    """
    help id exit-timeout-secs log-verbose log-info log-warning log-error log-format log-file model-repository
    model-store exit-on-error disable-auto-complete-config strict-readiness model-control-mode repository-poll-secs
    load-model model-config-name model-load-thread-count model-load-retry-count model-namespacing enable-peer-access
    strict-model-config allow-http http-address http-port reuse-http-port http-header-forward-pattern
    http-thread-count http-max-input-size http-restricted-api allow-client-shm allow-grpc grpc-address grpc-port
    reuse-grpc-port grpc-header-forward-pattern grpc-infer-thread-count grpc-infer-allocation-pool-size
    grpc-max-response-pool-size grpc-use-ssl grpc-use-ssl-mutual grpc-server-cert grpc-server-key grpc-root-cert
    grpc-infer-response-compression-level grpc-keepalive-time grpc-keepalive-timeout
    grpc-keepalive-permit-without-calls grpc-http2-max-pings-without-data
    grpc-http2-min-recv-ping-interval-without-data grpc-http2-max-ping-strikes grpc-max-connection-age
    grpc-max-connection-age-grace grpc-restricted-protocol allow-sagemaker sagemaker-port sagemaker-safe-port-range
    sagemaker-thread-count allow-vertex-ai vertex-ai-port vertex-ai-thread-count vertex-ai-default-model
    allow-metrics allow-gpu-metrics allow-cpu-metrics metrics-address metrics-port metrics-interval-ms
    metrics-config trace-config trace-file trace-level trace-rate trace-count trace-log-frequency backend-directory
    backend-config repoagent-directory cache-config cache-directory response-cache-byte-size rate-limit
    rate-limit-resource pinned-memory-pool-byte-size cuda-memory-pool-byte-size cuda-virtual-address-size
    min-supported-compute-capability buffer-manager-thread-count host-policy model-load-gpu-limit
    """,
)


def serve(*words, environ=None, repository="m"):
    """Parse `forebay serve --model-repository m WORDS`."""
    head = ["serve", *(["--model-repository", repository] if repository else [])]
    return parse_command_line([*head, *words], environ or {})


def check(word, path, expected):
    """Assert what one flag sets, looking past whether it has an effect yet."""
    section, field = path.split(".")
    # `validate` parses every flag of the server and starts nothing.
    command = parse_command_line(["validate", "m", word], {})
    assert getattr(getattr(command.settings, section), field) == expected


def refuse(*words, environ=None, repository="m"):
    """Return the text with which a command line is refused, after checking the exit code (F-175)."""
    with pytest.raises(CommandLineExit) as caught:
        serve(*words, environ=environ, repository=repository)
    assert caught.value.exit_code == 1
    assert not caught.value.is_answer
    return caught.value.text


# --- commands


def test_flags_without_a_command_mean_serve():
    """F-176: charts call `tritonserver --model-repository=...`."""
    command = parse_command_line(["--model-repository=/models"], {})
    assert (command.name, command.settings.repository.paths) == ("serve", ("/models",))


def test_bytes_that_are_no_text_are_refused():
    assert refuse("--id=\udcff") == "Error: an argument is not valid UTF-8: '--id=\\udcff'\n"
    text = refuse(environ={"FOREBAY_ID": "\udcff"})
    assert text == "Error: the environment variable FOREBAY_ID is not valid UTF-8: '\\udcff'\n"


def test_text_is_utf_8_whatever_the_locale_says():
    """In a locale of plain ASCII each byte of it comes as a surrogate."""
    check("--id=w\udcc3\udcb6rld", "server.id", "wörld")


@pytest.mark.parametrize(
    "word", ["--response-cache-byte-size=99999999999999", "--cache-config=local,size=99999999999999"]
)
def test_a_cache_larger_than_the_machine_is_refused(word):
    assert refuse(word).startswith("Error: a response cache of 99999999999999 bytes does not fit into the ")


@pytest.mark.parametrize("flag", ["http-header-forward-pattern", "grpc-header-forward-pattern"])
@pytest.mark.parametrize("pattern", ["[", "(?<x>", "a{99999999999}"])
def test_a_pattern_that_is_none_is_refused(flag, pattern):
    assert f"invalid regular expression '{pattern}': " in refuse(f"--{flag}={pattern}")


def test_no_words_print_the_overview():
    for words in ([], ["--help"], ["help"], ["-h"]):
        with pytest.raises(CommandLineExit, match="Usage: forebay COMMAND") as caught:
            parse_command_line(words, {})
        assert (caught.value.exit_code, caught.value.is_answer) == (0, True)


def test_misspelt_command_is_refused_with_a_hint():
    with pytest.raises(CommandLineExit, match=r'Unknown command: "serv"\. Did you mean serve\?') as caught:
        parse_command_line(["serv"], {})
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("words", [["version"], ["--version"]])
def test_version_is_a_command(words):
    assert parse_command_line(words, {}).name == "version"


def test_demo_keeps_its_words():
    assert parse_command_line(["demo", "--log-verbose", "1"], {}).arguments == ("--log-verbose", "1")


def test_help_of_the_demo_says_what_it_does():
    with pytest.raises(CommandLineExit) as caught:
        parse_command_line(["demo", "--help"], {})
    assert (caught.value.exit_code, caught.value.is_answer) == (0, True)
    assert caught.value.text.startswith("Usage: forebay demo [options of serve]\n")


@pytest.mark.parametrize(("word", "text"), [("extra", "Unexpected argument: extra"), ("--nope", "Usage: forebay demo")])
def test_demo_refuses_what_the_server_would_refuse_before_it_starts_one(word, text):
    with pytest.raises(CommandLineExit, match=text):
        parse_command_line(["demo", word], {})


def test_validate_without_a_directory_says_how_to_name_one():
    with pytest.raises(CommandLineExit, match=r"Error: name a model repository, as in: forebay validate models/"):
        parse_command_line(["validate"], {})


def test_validate_takes_directories_and_a_format():
    command = parse_command_line(["validate", "a", "--model-repository=b", "c", "--format=json"], {})
    assert command.settings.repository.paths == ("b", "a", "c")
    assert command.output_format == "json"
    with pytest.raises(CommandLineExit, match="invalid argument for --format: xml"):
        parse_command_line(["validate", "a", "--format", "xml"], {})


def test_explain_takes_models():
    command = parse_command_line(["explain", "--http-port=9000", "alpha_model"], {})
    assert (command.name, command.arguments) == ("explain", ("alpha_model",))
    assert command.settings.http.port == 9000


# --- getopt_long's grammar


def test_every_triton_flag_is_recognised():
    assert [name for name in TRITON_FLAGS if name not in FLAGS_BY_NAME] == []


@pytest.mark.parametrize("words", [["--http-port=8080"], ["--http-port", "8080"], ["--http-po=8080"]])
def test_value_follows_in_the_same_or_the_next_word_and_names_may_be_cut(words):
    assert serve(*words).settings.http.port == 8080


def test_an_exact_name_wins_over_longer_ones():
    assert serve("--id", "x").settings.server.id == "x"
    check("--grpc-max-connection-age=5", "grpc.max_connection_age", 5)


def test_cut_name_that_two_names_of_one_setting_share_is_not_ambiguous():
    command = parse_command_line(["--model-rep=a", "--model-st=b"], {})
    assert command.settings.repository.paths == ("a", "b")


def test_ambiguous_name_is_refused():
    text = refuse("--http", "1")
    assert 'Bad option: "--http".\n' in text
    assert "option '--http' is ambiguous; possibilities: '--http-address' '--http-port'" in text


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--http_port=1", "--http-port"),
        ("--htp-port=1", "--http-port"),
        ("--model-repositry=1", "--model-repository"),
    ],
)
def test_unknown_flag_shows_usage_and_the_likely_one(word, hint):
    text = refuse(word)
    assert text.startswith("Usage: forebay serve --model-repository DIRECTORY")
    assert f'Bad option: "{word.partition("=")[0]}".\nDid you mean {hint}?\n' in text


def test_flag_of_one_dash_is_refused():
    assert 'Bad option: "-http-port".\nDid you mean --http-port?' in refuse("-http-port", "1")


def test_missing_value_is_refused():
    assert "Bad option: \"--http-port\".\noption '--http-port' requires an argument" in refuse("--http-port")


def test_flag_without_value_takes_none():
    """F-022."""
    assert serve("--disable-auto-complete-config").settings.repository.disable_auto_complete_config
    assert "doesn't allow an argument" in refuse("--disable-auto-complete-config=true")


def test_last_value_wins_and_repeatable_flags_add_up():
    command = serve("--id=a", "--id=b", "--model-store=n", "--model-repository=m")
    assert command.settings.server.id == "b"
    assert command.settings.repository.paths == ("m", "n")


def test_other_words_are_refused():
    assert "Unexpected argument: models" in refuse("models")
    assert "Unexpected argument: --id" in refuse("--", "--id")


def test_python_functions_are_recognised():
    functions = ("package.module:function", "module:Class.method")
    assert serve(*functions, functions[0]).settings.repository.functions == functions


@pytest.mark.parametrize("command", ["serve", "validate", "explain"])
def test_help_lists_every_flag(command):
    with pytest.raises(CommandLineExit) as caught:
        parse_command_line([command, "--help"], {})
    # Triton's help ends with 1; it has no commands but the server.
    assert (caught.value.exit_code, caught.value.is_answer) == (int(command == "serve"), True)
    assert [name for name in TRITON_FLAGS if f"--{name}" not in caught.value.text] == []


# --- values


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "on", "1"])
def test_true_has_several_spellings(text):
    assert serve(f"--exit-on-error={text}").settings.repository.exit_on_error is True


@pytest.mark.parametrize("text", ["false", "False", "off", "0"])
def test_false_has_several_spellings(text):
    assert serve(f"--exit-on-error={text}").settings.repository.exit_on_error is False


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("--exit-on-error=yes", "invalid value for bool option: yes"),
        ("--http-port=abc", "Invalid option value. Got abc"),
        ("--http-port=80a", "Invalid option value. Got 80a"),
        ("--http-port=", "Invalid option value. Got "),
        ("--http-port=1_0", "Invalid option value. Got 1_0"),
        ("--http-port=--1", "Invalid option value. Got --1"),
        ("--http-port=" + "9" * 5000, "Invalid option value. Got 999"),
        ("--http-port=65536", "Provided option value is out of bound. Got 65536"),
        ("--exit-timeout-secs=99999999999", "Provided option value is out of bound. Got 99999999999"),
        ("--grpc-infer-thread-count=1", "Provided option value is out of bound. Got 1"),
        ("--grpc-max-response-pool-size=0", "Provided option value is out of bound. Got 0"),
        ("--min-supported-compute-capability=x", "Invalid option value. Got x"),
        ("--min-supported-compute-capability=nan", "Provided option value is out of bound. Got nan"),
        ("--model-control-mode=x", "invalid argument for --model-control-mode"),
        ("--log-format=iso8601", "invalid argument for --log-format"),
        ("--rate-limit=x", "invalid argument for --rate-limit"),
        ("--grpc-infer-response-compression-level=x", "invalid argument for --grpc-infer-response-compression-level"),
        ("--model-config-name=a b", "a model configuration name cannot contain spaces"),
        ("--model-config-name=../a", "a model configuration name is a file name"),
        ("--metrics-config=a", "--metrics-config option format is <setting>=<value>. Got a"),
        ("--metrics-config=n,a=b", "--metrics-config option format is <setting>=<value>. Got n,a=b"),
        ("--backend-config=a", "--backend-config option format is '<backend name>,<setting>=<value>'. Got a"),
        ("--backend-config=,a=b", "No backend specified. --backend-config option format is <backend name>,"),
        ("--cache-config=size=1", "No cache specified. --cache-config option format is <cache name>,"),
        ("--cache-config=local,size", "--cache-config option format is '<cache name>,<setting>=<value>'. Got local,"),
        ("--trace-config=a", "--trace-config option format is '<trace mode>,<setting>=<value>'. Got a"),
        ("--trace-config=x,a=b", 'invalid value for trace mode option: x. Available options are "triton" and'),
        ("--trace-config=,a=b", "No trace mode specified. --trace-config option format is <trace mode>,"),
        ("--trace-level=x", "invalid value for trace level option: x"),
        ("--rate-limit-resource=a", "--rate-limit-resource option format is '<resource_name>:<count>:<device>'"),
        ("--rate-limit-resource=a:1:2:3", "--rate-limit-resource option format is '<resource_name>:<count>:<device>'"),
        ("--rate-limit-resource=a:b", "Invalid option value. Got b"),
        ("--batching=fast", "--batching must be one of [triton, eager, slo=<milliseconds>]. Got fast"),
        ("--batching=slo=soon", "Invalid option value. Got soon"),
        ("--batching=slo=0", "Provided option value is out of bound. Got 0"),
        ("--host-policy=a", "--host-policy option format is '<policy name>,<setting>=<value>'. Got a"),
        ("--host-policy=a,b=c", "unknown host policy setting 'b'"),
        ("--host-policy=a,cpu-cores=3-1", "the range of cpu-cores ends before it begins"),
        ("--model-load-gpu-limit=0", "Cannot parse pair option due to incorrect number of inputs."),
        ("--model-load-gpu-limit=0:1.5", "Provided option value is out of bound. Got 1.5"),
        ("--cuda-memory-pool-byte-size=1", "Cannot parse pair option due to incorrect number of inputs."),
        ("--http-restricted-api=x:k=v", "unknown restricted api 'x'"),
        ("--http-restricted-api=health", "--http-restricted-api option format is '<config name>:<setting>=<value>'."),
        ("--http-restricted-api=trace,trace:k=v", "restricted api 'trace' can not be specified in multiple config"),
        ("--grpc-restricted-protocol=x:k=v", "unknown restricted protocol 'x'"),
        ("--wait=sleep", "--wait must be one of [park, spin, spin=<microseconds>]. Got sleep"),
    ],
)
def test_bad_value_is_refused_with_tritons_text(word, reason):
    """F-173, F-116 and the grammars of Triton's command_line_parser.cc."""
    text = refuse(word)
    assert f'Bad option: "{word.partition("=")[0]}".\n{reason}' in text


@pytest.mark.parametrize(
    ("word", "path", "expected"),
    [
        ("--log-verbose=true", "log.verbose", 1),
        ("--log-verbose=false", "log.verbose", 0),
        ("--log-verbose=2", "log.verbose", 2),
        ("--log-format=ISO8601", "log.format", "ISO8601"),
        ("--model-control-mode=EXPLICIT", "repository.control_mode", "explicit"),
        ("--rate-limit=Execution_Count", "rate_limit.mode", "execution_count"),
        ("--batching=slo=10ms", "scheduler.batching", "slo=10ms"),
        ("--batching=SLO=2.5", "scheduler.batching", "slo=2.5ms"),
        ("--batching=eager", "scheduler.batching", "eager"),
        ("--rate-limit-resource=R1:4", "rate_limit.resources", (RateLimitResource("R1", 4, -1),)),
        ("--rate-limit-resource=R1:4:1", "rate_limit.resources", (RateLimitResource("R1", 4, 1),)),
        ("--metrics-interval-ms=1000.5", "metrics.interval_ms", 1000),
        (
            "--metrics-config=summary_quantiles=0.5:0.05,0.99:0.001",
            "metrics.config",
            (ConfigEntry("", "summary_quantiles", "0.5:0.05,0.99:0.001"),),
        ),
        (
            "--backend-config=default-max-batch-size=8",
            "backend.config",
            (ConfigEntry("", "default-max-batch-size", "8"),),
        ),
        ("--backend-config=onnxruntime,a=b=c,d", "backend.config", (ConfigEntry("onnxruntime", "a", "b=c,d"),)),
        ("--cache-config=local,size=1048576", "cache.config", (ConfigEntry("local", "size", "1048576"),)),
        ("--response-cache-byte-size=9", "cache.config", (ConfigEntry("local", "size", "9"),)),
        (
            "--http-restricted-api=health,trace:k=v=w",
            "http.restricted_apis",
            (RestrictedApi(("health", "trace"), "k", "v=w"),),
        ),
        ("--host-policy=gpu_0,cpu-cores=0-3", "process.host_policies", (ConfigEntry("gpu_0", "cpu-cores", "0-3"),)),
        ("--cuda-memory-pool-byte-size=1:67108864", "gpu.memory_pool_byte_sizes", (DeviceBytes(1, 67108864),)),
        ("--model-load-gpu-limit=0:0.5", "gpu.model_load_limits", (DeviceFraction(0, 0.5),)),
        ("--sagemaker-safe-port-range=8000-8010", "cloud.sagemaker_safe_port_range", PortRange(8000, 8010)),
        ("--pinned-memory-pool-byte-size=8589934592", "memory.pinned_pool_byte_size", 8589934592),
        ("--grpc-use-ssl-mutual=true", "grpc.use_ssl", True),
        ("--strict-model-config=true", "repository.disable_auto_complete_config", True),
        ("--trace-config=rate=5", "trace.rate", 5),
        ("--trace-config=count=2", "trace.count", 2),
        ("--trace-config=level=TIMESTAMPS", "trace.level", ("TIMESTAMPS",)),
        ("--trace-config=mode=opentelemetry", "trace.mode", "opentelemetry"),
        ("--trace-config=triton,file=/tmp/trace.json", "trace.file", "/tmp/trace.json"),
        ("--trace-config=triton,log-frequency=50", "trace.log_frequency", 50),
        ("--trace-level=max", "trace.level", ("TIMESTAMPS",)),
        ("--wait=park", "process.wait", "park"),
        ("--wait=spin", "process.wait", "spin=50"),
        ("--wait=spin=200", "process.wait", "spin=200"),
    ],
)
def test_value_is_parsed(word, path, expected):
    check(word, path, expected)


def test_trace_levels_add_up_until_one_is_off():
    """F-117: the level is repeatable; OFF wins."""
    words = ["--trace-config=level=TIMESTAMPS", "--trace-config=level=TENSORS"]
    assert parse_command_line(["validate", "m", *words], {}).settings.trace.level == ("TIMESTAMPS", "TENSORS")
    off = parse_command_line(["validate", "m", *words, "--trace-config=level=OFF"], {})
    assert off.settings.trace.level == ("OFF",)


def test_bad_trace_setting_names_itself():
    assert 'Bad option: "--trace-config rate".\nInvalid option value. Got x' in refuse("--trace-config=rate=x")


def test_metrics_listen_where_http_does_unless_told_otherwise():
    """F-113, M-004."""
    assert serve("--http-address=127.0.0.1").settings.metrics.address == "127.0.0.1"
    assert serve("--http-address=127.0.0.1", "--metrics-address=::1").settings.metrics.address == "::1"


def test_without_metrics_there_are_no_machine_metrics():
    metrics = serve("--allow-metrics=false").settings.metrics
    assert (metrics.allow_cpu, metrics.allow_gpu) == (False, False)


# --- one setting against another


def test_a_repository_is_required():
    """F-020."""
    assert "--model-repository must be specified" in refuse(repository=None)


@pytest.mark.parametrize(
    ("words", "names", "port"),
    [
        (["--http-port=8001"], "HTTP requests and GRPC", 8001),
        (["--metrics-port=8000"], "HTTP requests and metrics", 8000),
        (["--metrics-port=8001"], "GRPC requests and metrics", 8001),
    ],
)
def test_two_endpoints_on_one_port_are_refused(words, names, port):
    """F-170."""
    expected = f"The server cannot listen to {names} requests at the same address and port 0.0.0.0:{port}\n"
    assert refuse(*words) == expected


def test_equal_ports_are_fine_at_other_addresses_or_when_one_is_off():
    assert serve("--metrics-port=8000", "--metrics-address=127.0.0.1").settings.metrics.port == 8000
    assert serve("--http-port=8001", "--allow-grpc=false").settings.http.port == 8001
    assert serve("--http-port=0", "--metrics-port=0").settings.http.port == 0


def test_port_outside_sagemakers_range_is_refused():
    """F-170."""
    text = refuse("--allow-sagemaker=true", "--sagemaker-safe-port-range=8000-8001")
    assert text == "The server cannot listen to metrics requests at port 8002, allowed port range is [8000, 8001]\n"


def test_load_model_needs_explicit_control():
    """F-171."""
    assert refuse("--load-model=a") == (
        "Error: Use of '--load-model' requires setting '--model-control-mode=explicit' as well.\n"
    )


def test_wildcard_stands_alone():
    """F-172."""
    assert "Wildcard model name '*' must be the ONLY startup model if specified at all." in refuse(
        "--model-control-mode=explicit", "--load-model=*", "--load-model=a"
    )


def test_old_and_new_cache_flags_exclude_each_other():
    """F-135."""
    assert refuse("--response-cache-byte-size=1", "--cache-config=local,size=1") == (
        "Error: Incompatible flags --response-cache-byte-size and --cache-config both provided. "
        "Please provide one or the other.\n"
    )


def test_only_one_cache():
    """F-133."""
    assert "Only one cache" in refuse("--cache-config=local,size=1", "--cache-config=redis,host=h")


def test_an_api_in_two_groups_is_refused():
    words = ["--http-restricted-api=health:a=1", "--http-restricted-api=health,trace:b=2"]
    assert "restricted api 'health' can not be specified in multiple config groups" in refuse(*words)


def test_deprecated_flag_warns():
    """F-032."""
    assert serve("--strict-model-config=true").warnings == (
        "Warning: '--strict-model-config' has been deprecated! Please use '--disable-auto-complete-config' instead.",
    )


@pytest.mark.parametrize("order", [1, -1])
def test_disabling_auto_complete_overrides_the_deprecated_flag(order):
    words = ["--disable-auto-complete-config", "--strict-model-config=false"][::order]
    command = serve(*words)
    assert command.settings.repository.disable_auto_complete_config
    assert any("Overriding deprecated '--strict-model-config' from False to True" in line for line in command.warnings)


def test_trace_config_overrides_the_deprecated_flag():
    """F-118."""
    command = parse_command_line(["validate", "m", "--trace-config=count=7", "--trace-count=3"], {})
    assert command.settings.trace.count == 7
    assert (
        "Warning: Overriding deprecated '--trace-count' in favor of provided count in --trace-config!"
        in command.warnings
    )


# --- what is not implemented yet


def test_every_default_can_be_given_explicitly_whatever_works_by_now():
    """Charts write out defaults: --grpc-port=8001 must not end the start-up before there is gRPC."""
    for flag in FLAGS:
        text = default_text(flag)
        if text:
            assert serve(f"--{flag.name}={text}").settings == serve().settings, flag.name


@pytest.fixture
def unimplemented_flag(monkeypatch):
    """Take --id as not implemented, whatever works by now."""
    changed = dataclasses.replace(FLAGS_BY_NAME["id"], status=Status.NOT_YET, note="do without")
    monkeypatch.setitem(FLAGS_BY_NAME, "id", changed)
    return changed


def test_unimplemented_flag_ends_the_start_up_in_one_line(unimplemented_flag):
    text = refuse("--id=x")
    assert re.fullmatch(r"Error: --id=x is not implemented yet in forebay \S+\. Leave it out: do without\.\n", text)


def test_unimplemented_flag_names_the_file_it_stands_in(tmp_path, monkeypatch):
    changed = dataclasses.replace(FLAGS_BY_NAME["http-frontends"], status=Status.NOT_YET)
    monkeypatch.setitem(FLAGS_BY_PATH, "http.frontends", changed)
    path = tmp_path / "settings.toml"
    path.write_text("[http]\nfrontends = 3\n")
    text = refuse("--settings", str(path))
    assert f"--http-frontends=3, set by {path}, is not implemented yet" in text


# --- environment and file


def test_flag_wins_over_environment_and_environment_over_file(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('[http]\nport = 1\naddress = "127.0.0.1"\n[server]\nid = "file"\nexit_timeout_secs = 5\n')
    environ = {"FOREBAY_SETTINGS": str(path), "FOREBAY_HTTP_PORT": "2", "FOREBAY_ID": "environment"}
    command = serve("--http-port=3", environ=environ)
    settings = command.settings
    assert (settings.http.port, settings.server.id, settings.server.exit_timeout_secs) == (3, "environment", 5)
    assert settings.http.address == "127.0.0.1"
    assert command.sources == {
        "repository.paths": "command line",
        "http.port": "command line",
        "http.address": str(path),
        "server.id": "FOREBAY_ID",
        "server.exit_timeout_secs": str(path),
    }


def test_settings_flag_wins_over_the_variable(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('[repository]\npaths = ["a", "b"]\n')
    command = parse_command_line(["serve", f"--settings={path}"], {"FOREBAY_SETTINGS": "/nowhere"})
    assert command.settings.repository.paths == ("a", "b")


def test_bad_settings_file_is_one_line():
    assert refuse("--settings=/nowhere") == (
        "Error: cannot read the settings file /nowhere: No such file or directory\n"
    )


def test_repeated_values_in_the_environment_are_separated():
    command = parse_command_line(["serve"], {"FOREBAY_MODEL_REPOSITORY": "a;b"})
    assert command.settings.repository.paths == ("a", "b")


def test_bad_value_names_the_variable_it_came_from():
    text = refuse(environ={"FOREBAY_HTTP_PORT": "x"})
    assert 'Bad option: "--http-port".\nInvalid option value. Got x\n(set by FOREBAY_HTTP_PORT)' in text


def test_flag_without_value_can_be_set_by_the_environment():
    assert serve(environ={"FOREBAY_DISABLE_AUTO_COMPLETE_CONFIG": "1"}).settings.repository.disable_auto_complete_config


def test_what_kubernetes_says_of_a_service_is_no_port():
    """A service called forebay-http puts FOREBAY_HTTP_PORT=tcp://... into every pod."""
    assert serve(environ={"FOREBAY_HTTP_PORT": "tcp://10.0.0.1:8000"}).settings.http.port == 8000


def test_misspelt_variable_is_pointed_out():
    command = serve(environ={"FOREBAY_HTP_PORT": "1", "FOREBAY_SERVICE_HOST": "10.0.0.1"})
    assert command.warnings == (
        "Warning: the environment variable FOREBAY_HTP_PORT sets nothing. Did you mean FOREBAY_HTTP_PORT?",
    )


def test_tritons_variables_set_what_they_set_there():
    """F-174."""
    environ = {"TRITON_SERVER_CPU_ONLY": "1", "TRITON_SERVER_ESCAPE_LOG_MESSAGES": "false"}
    settings = serve(environ=environ).settings
    assert (settings.gpu.cpu_only, settings.log.escape) == (True, False)
    ours_wins = serve(environ=environ | {"FOREBAY_CPU_ONLY": "false"}).settings
    assert not ours_wins.gpu.cpu_only


def test_vertex_ai_mode_turns_its_endpoint_on_and_the_others_off():
    """F-094, F-095, H-301."""
    environ = {"AIP_MODE": "PREDICTION", "AIP_HTTP_PORT": "9000", "AIP_STORAGE_URI": "/models"}
    settings = parse_command_line(["validate"], environ).settings
    assert (settings.cloud.allow_vertex_ai, settings.cloud.vertex_ai_port) == (True, 9000)
    assert (settings.http.allow, settings.grpc.allow) == (False, False)
    assert settings.repository.paths == ("/models",)


def test_defaults_are_tritons():
    """Column "default" of spec 10-cli."""
    settings = Settings()
    assert settings.server.exit_timeout_secs == 30
    assert (settings.http.port, settings.grpc.port, settings.metrics.port) == (8000, 8001, 8002)
    assert (settings.grpc.keepalive_time, settings.grpc.keepalive_timeout) == (7200000, 20000)
    assert (settings.trace.rate, settings.trace.count) == (1000, -1)
    assert settings.memory.pinned_pool_byte_size == 268435456


# --- the pages made from the table


@pytest.mark.parametrize(("word", "start"), [("--markdown", "# Flags"), ("--toml", "# Settings")])
def test_references_are_printed(capsys, word, start):
    assert main([word]) == 0
    assert capsys.readouterr().out.startswith(start)


def test_reference_without_a_format_is_an_error(capsys):
    assert main([]) == 1
    assert "--markdown" in capsys.readouterr().err
