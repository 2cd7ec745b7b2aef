"""README.md: every command, flag and file that it names exists."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
OTHERS = {"--help", "--quiet", "--ollama"}
"""Flags of argparse, pip and the demo."""


def known_flags(*phases: int) -> set[str]:
    knobs = [k for k in fields(config.Config) if {*phases} & {*k.metadata["phases"]}]
    names = [knob.metadata["flag"] or knob.name for knob in knobs]
    return {"--" + name.replace("_", "-") for name in names}


def test_every_script_that_it_runs_exists() -> None:
    scripts = set(re.findall(r"python3? ([\w/]+\.py)", README))
    assert len(scripts) >= 5
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_every_flag_that_it_names_exists() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named - known_flags(*config.ALL_PHASES) - OTHERS == set()


def test_every_command_uses_only_flags_of_its_phase() -> None:
    commands = re.findall(r"^(?:\$ )?python fase(\d)\S+(.*)$", README, re.MULTILINE)
    assert len(commands) >= 4
    for phase, rest in commands:
        flags = set(re.findall(r"--[a-z-]+", rest))
        assert flags <= known_flags(int(phase)), f"phase {phase}"


def test_every_file_of_the_contract_is_described() -> None:
    names = [
        value
        for name, value in vars(config).items()
        if name.isupper() and isinstance(value, str) and re.search(r"\.\w{3,6}$", value)
    ]
    assert len(names) >= 10
    assert [name for name in names if name not in README] == []


def test_the_two_commands_install_into_an_environment_of_their_own() -> None:
    for kind in ("demo", "test"):
        found = re.search(rf"<!-- {kind} command -->\n```\n(.*)\n```", README)
        assert found
        assert found[1].startswith("python3 -m venv .venv && .venv/bin/python -m pip")


def test_links_to_its_own_sections_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }
    links = set(re.findall(r"\]\(#([\w-]+)\)", README))
    assert links
    assert links <= anchors


@pytest.mark.parametrize("name", ["_OUTPUT", "TODO"])
def test_no_placeholder_is_left(name: str) -> None:
    assert name not in README
