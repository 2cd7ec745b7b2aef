"""README.md: every command, flag and file that it names exists."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import config
import fase1_descompresion as fase1
import fase2_generar_vectores_vlm as fase2
import fase4_inferencia_vlm as fase4
import utils

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
OTHERS = {"--help", "--quiet", "--ollama", "--dist", "--protocol"}
"""Flags of argparse, pip, pytest, the demo and Dask."""
SMALL_BYTES = 150_000
"""A picture of the first screen is at most so large."""


def section(title: str) -> str:
    """The text below a heading, up to the next one of any level."""
    return re.split(r"^#+ ", README.split(f"# {title}\n")[1], flags=re.MULTILINE)[0]


def removed_flags() -> set[str]:
    gone = section("Older versions").partition("Gone,")[2]
    return set(re.findall(r"--[a-z-]+", gone))


DECIDED = fase4.Result(
    Path("a.dcm"),
    decision=utils.Decision("FDT", "FDT", "", None, None, 3),
)
FAILED = fase4.Result(Path("b.dcm"), error="is not a DICOM file")


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
    known = known_flags(*config.ALL_PHASES) | removed_flags() | OTHERS
    assert named - known == set()


def test_flags_that_it_calls_gone_are_gone() -> None:
    assert len(removed_flags()) >= 10
    assert removed_flags() & known_flags(*config.ALL_PHASES) == set()


def test_every_picture_is_there_and_small() -> None:
    pictures = [ROOT / name for name in re.findall(r"!\[[^]]+\]\((.+?)\)", README)]
    assert len(pictures) >= 2
    assert [p for p in pictures if not 0 < p.stat().st_size <= SMALL_BYTES] == []


def test_every_name_that_one_may_change_stands_where_it_says() -> None:
    parts = re.findall(r"[^|;]*? in `[\w]+\.py`", section("To change something"))
    assert len(parts) >= 12
    for part in parts:
        *names, file = re.findall(r"`([^`]+)`", part)
        source = (ROOT / file).read_text("utf-8")
        names = [name.lstrip("*") for name in names if not name.startswith("--")]
        assert [name for name in names if name not in source] == [], file


@pytest.mark.parametrize(
    "columns",
    [
        fase1.REJECTED_COLUMNS[2:],
        fase1.COLUMNS[-2:],
        fase2.ROW_COLUMNS,
        fase2.IMAGE_COLUMNS,
        fase4.TABLE_COLUMNS,
    ],
)
def test_every_column_of_a_list_is_described(columns: tuple[str, ...]) -> None:
    assert [name for name in columns if f"`{name}`" not in README] == []


def test_every_key_of_json_is_described() -> None:
    found = fase4.record(DECIDED, {}) | fase4.record(FAILED, {})
    keys = README.split("Keys of `--json`:")[1]
    assert len(found) >= 12
    assert [key for key in found if f"`{key}`" not in keys] == []


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


def test_on_windows_no_line_needs_a_certain_shell() -> None:
    lines = section("Windows").split("```")[1].split("\n")[1:-1]
    assert len(lines) == 3
    assert [line for line in lines if re.search(r"&&|;|/bin/|\$", line)] == []


def test_the_drawn_chest_of_the_demo_is_refused_in_the_sample() -> None:
    assert re.search(rf"^new/1000_9\.dcm: {config.INCONCLUSIVE} · ", README, re.M)


def test_the_quick_start_has_at_most_fifteen_lines() -> None:
    assert len(section("Inicio rápido").strip().splitlines()) <= 15


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
