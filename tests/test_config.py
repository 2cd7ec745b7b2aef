"""config.py: flags come from the fields, prompts give nothing away."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import config
from config import Config, parse_config


def parse(phase: int, *argv: str) -> Config:
    return parse_config(phase, "doc", argv)[0]


@pytest.mark.parametrize("phase", config.ALL_PHASES)
def test_no_flags_give_the_defaults(phase: int) -> None:
    assert parse(phase) == Config()


@pytest.mark.parametrize("phase", config.ALL_PHASES)
def test_help_shows_every_knob_of_the_phase_with_its_default(
    phase: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(phase, "50 % of it", ["--help"])
    assert stop.value.code == 0
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines anywhere
    assert "50%ofit" in text
    for knob in fields(Config):
        if phase in knob.metadata["phases"]:
            flag = "--" + (knob.metadata["flag"] or knob.name).replace("_", "-")
            assert flag in text
            shown = knob.default not in (None, "", ())
            if shown and not isinstance(knob.default, bool):
                assert f"(default:{knob.default})" in text


def test_a_flag_sets_its_field() -> None:
    cfg = parse(2, "--base", "x", "--descriptions", "7", "--pull")
    assert (cfg.base, cfg.descriptions, cfg.pull) == (Path("x"), 7, True)


def test_phase_4_counts_its_own_descriptions() -> None:
    cfg = parse(4, "--descriptions", "3")
    assert (cfg.inference_descriptions, cfg.descriptions) == (3, 50)


def test_a_flag_of_another_phase_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(1, "--vlm", "x")
    assert stop.value.code == 2
    assert "--vlm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("phase", "flag", "value"),
    [
        (2, "--descriptions", "0"),
        (2, "--num-predict", "3"),
        (2, "--generic-share", "1.5"),
        (2, "--generic-share", "nan"),
        (2, "--server-parallel", "0"),
        (2, "--keep-alive", "for ever"),
        (2, "--dask", "local:0"),
        (2, "--dask", "somewhere"),
        (3, "--c", "inf"),
        (3, "--seed", "5000000000"),
        (3, "--folds", "1"),
        (3, "--group-by", "moon"),
        (1, "--jobs", "-1"),
        (1, "--item-timeout-s", "inf"),
        (2, "--wait", "1e10"),
    ],
)
def test_a_senseless_value_is_refused_by_name(
    phase: int, flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(phase, flag, value)
    assert stop.value.code == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize("value", ["30m", "1h30m", "-1", "300", "0"])
def test_every_form_of_keep_alive_that_ollama_takes_is_taken(value: str) -> None:
    assert parse(2, "--keep-alive", value).keep_alive == value


def test_a_model_is_the_same_with_and_without_latest() -> None:
    cfg = parse(4, "--vlm", "a/llava:latest", "--embed-model", "nomic:latest")
    assert (cfg.vlm, cfg.embed_model) == ("a/llava", "nomic")
    assert parse(2, "--vlm", "llava:13b").vlm == "llava:13b"


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(3, "--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == config.PROGRAM_VERSION


@pytest.mark.parametrize("value", ["", "local:2", "tcp://a:8786", "tls://a:8786"])
def test_every_form_of_scheduler_is_taken(value: str) -> None:
    assert parse(4, "--dask", value).dask == value


def test_requests_in_flight_follow_the_servers_slots() -> None:
    assert Config().in_flight == 2
    assert Config(server_parallel=4).in_flight == 5
    assert Config(server_parallel=4, concurrency=3).in_flight == 3


def test_the_host_flag_wins_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    assert Config().host_url == "http://127.0.0.1:11434"
    monkeypatch.setenv("OLLAMA_HOST", "http://there:1")
    assert Config().host_url == "http://there:1"
    assert Config(host="http://here:2").host_url == "http://here:2"


def test_folders_lie_below_the_base() -> None:
    cfg = Config(base=Path("b"))
    assert cfg.folder("dataset_dir") == Path("b/dataset_final_vlm")


def test_no_prompt_names_a_class_a_folder_or_a_phantom() -> None:
    forbidden = (*config.CLASS_NAMES, "Leeds", "phantom", "transfer function", "flat")
    pattern = re.compile(r"\b(" + "|".join(forbidden) + r")\b", re.IGNORECASE)
    for prompts in config.PROMPT_SETS.values():
        assert [p for p in prompts if pattern.search(p)] == []


def test_prompts_are_varied_and_the_sets_do_not_overlap() -> None:
    prompts = [p for prompts in config.PROMPT_SETS.values() for p in prompts]
    assert len(prompts) == len(set(prompts)) == 50
