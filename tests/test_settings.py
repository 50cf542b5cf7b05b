"""Settings: flags take precedence over the environment, and that over defaults."""

import argparse
import re
from pathlib import Path

import pytest

from rednet.service.settings import Settings, SettingsError, add_flags, check_files, read_settings


def test_flags_override_the_environment_which_overrides_defaults() -> None:
    """With all three at once."""
    settings = read_settings({"port": "9001"}, {"REDNET_PORT": "9000", "REDNET_MAX_QUEUE": "7", "HOME": "/"})
    assert (settings.port, settings.max_queue, settings.host) == (9001, 7, "127.0.0.1")


def test_every_option_is_a_flag_and_a_variable() -> None:
    """Each flag has help text with its default."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    for name in Settings.model_fields:
        flag, variable = "--" + name.replace("_", "-"), "REDNET_" + name.upper()
        assert vars(parser.parse_args([flag, "3"])) == {name: "3"}
        assert flag in parser.format_help()
        message = ""
        try:
            read_settings({}, {variable: "3"})
        except SettingsError as error:  # for settings whose value cannot be 3
            message = str(error)
        assert "is not an option" not in message


def test_misspelt_variable_is_an_error() -> None:
    """A server that silently ignored it would run with another setting than intended."""
    with pytest.raises(SettingsError, match=r"REDNET_PROT is not an option.*REDNET_PORT"):
        read_settings({}, {"REDNET_PROT": "80"})


def test_variable_of_the_model_is_accepted() -> None:
    """REDNET_NATIVE selects the native build for every command, and the server ignores it."""
    assert read_settings({}, {"REDNET_NATIVE": "off"}) == Settings()


def test_variables_of_kubernetes_services_are_ignored() -> None:
    """Every pod has such variables if Services are called rednet or rednet-canary."""
    found = {
        "REDNET_SERVICE_HOST": "10.0.0.1",
        "REDNET_SERVICE_PORT": "8000",
        "REDNET_SERVICE_PORT_HTTP": "8000",
        "REDNET_PORT": "tcp://10.0.0.1:8000",
        "REDNET_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "REDNET_PORT_8000_TCP_ADDR": "10.0.0.1",
        "REDNET_CANARY_SERVICE_HOST": "10.0.0.2",
        "REDNET_CANARY_PORT": "tcp://10.0.0.2:8000",
    }
    assert read_settings({}, found) == Settings()
    assert read_settings({}, found | {"REDNET_PORT": "80"}).port == 80


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"),
        ("port", "http"),
        ("max_batch_size", "0"),
        ("max_batch_size", "many"),
        ("threads", "-1"),
        ("precision", "int7"),
        ("max_wait_ms", "-1"),
        ("request_timeout_s", "0"),
        ("request_timeout_s", "nan"),
        ("request_timeout_s", "1e-300"),
        ("drain_timeout_s", "nan"),
        ("drain_timeout_s", "inf"),
        ("max_wait_ms", "nan"),
        ("max_wait_ms", "inf"),
        ("max_body_mb", "nan"),
        ("max_body_mb", "1e-9"),
        ("max_batch_size", "1000000000"),
        ("max_queue", "1000000000000"),
        ("max_queue", "9" * 5000),
        ("max_pixels", "1" + "0" * 30),
        ("threads", "100000"),
        ("threads", ""),
        ("port", ""),
        ("port", "-1"),
        ("port", "1e99"),
        ("host", ""),
        ("host", " "),
        ("host", "a b"),
        ("host", "127.0.0.1,"),
        ("host", ",::1"),
        ("device", ""),
        ("device", "gpu"),
        ("device", "cuda:99999999999999999999"),
        ("device", "cpu,,cpu"),
        ("checkpoint", ""),
        ("api_key_file", ""),
        ("max_body_mb", "inf"),
        ("metrics_access", "key"),  # no key file is set
        ("log_level", "loud"),
        ("log_format", "yaml"),
    ],
)
def test_value_out_of_range_is_reported_with_its_source(name: str, value: str) -> None:
    """The message names the flag or the variable."""
    with pytest.raises(SettingsError, match="--" + name.replace("_", "-")) as refused:
        read_settings({name: value}, {})
    assert not re.search(r"Input should|String should|Value error|\\", str(refused.value))  # Pydantic's wording
    with pytest.raises(SettingsError, match="REDNET_" + name.upper()):
        read_settings({}, {"REDNET_" + name.upper(): value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("threads", "0", "--threads cannot be '0'; expected: auto or a whole number from 1 to 1024"),
        ("max_body_mb", "x", "--max-body-mb cannot be 'x'; expected: a number from 0.001 to 10000"),
        ("grpc_port", "-1", "--grpc-port cannot be '-1'; expected: a whole number from 0 to 65535"),
        ("precision", "fp8", "--precision cannot be 'fp8'; expected: auto, fp32, bf16, fp16 or int8"),
        ("metrics_access", "key", "--metrics-access cannot be 'key'; it requires --api-key-file"),
        ("allow_origins", "a b", "--allow-origins cannot be 'a b'; expected: origins such as https://app.example, "),
        (
            "device",
            "gpu",
            "--device cannot be 'gpu'; expected: device that runs the network: auto, cpu, cuda or cuda:N",
        ),
    ],
)
def test_message_about_an_invalid_value_says_what_is_expected(name: str, value: str, message: str) -> None:
    """The limits or the list of values; for text that has neither, the description of the option."""
    with pytest.raises(SettingsError) as refused:
        read_settings({name: value}, {})
    assert str(refused.value).startswith(message)


def test_help_shows_the_limits_of_numbers() -> None:
    """Beside the default, or what the description says about it."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    shown = " ".join(parser.format_help().split())
    for text in ("(1 to 4096; default: auto)", "(0.001 to 3600; default: 30)", "(0 to 65535; default: no gRPC)"):
        assert text in shown


def test_long_invalid_value_is_shortened_in_the_message() -> None:
    """The message is one line, however long the value is."""
    with pytest.raises(SettingsError) as refused:
        read_settings({"max_queue": "x" * 10_000}, {})
    assert len(str(refused.value)) < 300


def test_unreadable_file_is_reported_with_its_option(tmp_path: Path) -> None:
    """A missing file, or a folder where a file is required, before any slow work."""
    none = tmp_path / "none"
    for name, path in (("checkpoint", none), ("api_key_file", none), ("api_key_file", tmp_path)):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(SettingsError, match=f"{flag} .*cannot be read"):
            check_files(read_settings({name: str(path)}, {}))


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b", "a?", "é", "x" * 254, "a\n"])
def test_model_name_that_is_not_one_url_segment_is_rejected(name: str) -> None:
    """`/v2/models/<name>` must be the path of the model."""
    with pytest.raises(SettingsError, match="--model-name cannot be"):
        read_settings({"model_name": name}, {})
    assert read_settings({"model_name": "flowers-v2.1_x"}, {}).model_name == "flowers-v2.1_x"


def test_settings_are_frozen() -> None:
    """Units are those that users expect."""
    settings = read_settings({"max_body_mb": "1.5", "checkpoint": "x.pth", "threads": "2"}, {})
    assert settings.max_body_bytes == 1_500_000
    assert settings.checkpoint == Path("x.pth")
    assert (settings.threads, settings.max_batch_size) == (2, "auto")
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
