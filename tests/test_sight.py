"""The sight test: a server that does not look at the pictures is caught."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from conftest import TEST, LabelFolder, server_flags
from fake_ollama import FakeOllama
from numpy.typing import NDArray

import config
import fase2_generar_vectores_vlm as fase2
import utils
from config import Config, parse_config
from utils import (
    AnswerBook,
    BlindError,
    PipelineError,
    ServerFacts,
    SightTest,
    VlmServer,
)

EYES = ("blind", "former", "stuck", "merged")


def flags(url: str) -> list[str]:
    return [flag for flag in server_flags(url) if flag != "--no-sight-test"]


def phase2(base: Path, fake: FakeOllama, *more: str) -> int:
    asked = ["--descriptions", "5", *more]
    return fase2.main(["--base", str(base), *flags(fake.url), *asked])


def look(fake: FakeOllama, *more: str) -> list[NDArray[np.float64]]:
    """One sight test."""
    cfg: Config = parse_config(2, "", [*flags(fake.url), *more])[0]

    async def run() -> list[NDArray[np.float64]]:
        async with utils.open_servers(cfg, print) as [server]:
            book = AnswerBook(None, cfg, await server.preflight())
            test = SightTest(utils.slots_of(cfg, [server]), book)
            await test.run()
            return [pairs for _, pairs in test.found]

    return asyncio.run(run())


def answers_kept(base: Path) -> int:
    """Answers in the journals that no line takes back."""
    folder = base / "dataset_final_vlm" / config.JOURNAL_DIR
    paths = [path for path in folder.glob("*.jsonl") if len(path.stem) == 64]
    records = [one for path in paths for _, one in utils.Journal(path).items()]
    return sum("prompt" in one for one in records)


def questions(fake: FakeOllama) -> int:
    return sum(asked["asked"] for asked in fake.stats()["asked"] if asked["prompt"])


def test_a_server_that_sees_passes_on_every_slot() -> None:
    with FakeOllama(num_parallel=3) as fake:
        found = look(fake, "--server-parallel", "3")
        assert questions(fake) == 3 * TEST
    assert [len(pairs) for pairs in found] == [6, 6, 6]
    assert all(own < other for pairs in found for own, other in pairs)


@pytest.mark.parametrize("fault", EYES)
def test_eyes_that_fail_are_caught(fake: FakeOllama, fault: str) -> None:
    fake.control(faults={fault: 1.0})
    with pytest.raises(BlindError, match=r"slot 1 .* does not see.*restart the server"):
        look(fake)


def test_answers_of_the_picture_before_are_caught_from_the_first_test_on(
    fake: FakeOllama,
) -> None:
    look(fake)  # the fault begins with a server's third question
    fake.control(faults={"former": 1.0})
    with pytest.raises(BlindError, match=r"[3-6] of 6 answers fit another"):
        look(fake)


def test_answers_without_an_embedding_do_not_pass(fake: FakeOllama) -> None:
    rule = {"endpoint": "/api/embed", "when": 5, "times": 99, "fault": "embed_zero"}
    fake.control(script=[rule])  # after the preflight
    with pytest.raises(PipelineError, match=r"demo-embed .* gives other numbers"):
        look(fake)


def test_one_blind_slot_of_several_is_caught() -> None:
    with FakeOllama(num_parallel=4, faults={"blind_slot": 1.0}) as fake:
        fake.control(time_model="gpu", time_scale=0.01)
        with pytest.raises(BlindError, match="does not see"):
            look(fake, "--server-parallel", "4")


def test_one_answer_in_each_of_two_slots_is_one_too_many() -> None:
    book = AnswerBook(None, Config(), ServerFacts("", "", "", np.ones(2, np.float32)))
    slots = [utils.Slot(VlmServer(Config(), print), 1, []) for _ in range(2)]
    for slot in slots:
        slot.server.facts = book.facts
    test = SightTest(slots, book)
    looks = np.array([[[[1, 0.1]] * 3, [[0.1, 1]] * 3]] * 2, np.float32)
    assert test._doubtful(looks) == []
    looks[0, 0, 0] = 0.1, 1
    assert test._doubtful(looks) == []
    looks[1, 1, 2] = 1, 0.1
    assert test._doubtful(looks) == [1, 1]


def test_what_is_in_flight_when_a_run_is_ended_is_not_kept() -> None:
    book = AnswerBook(None, Config(), ServerFacts("", "", "", np.ones(2, np.float32)))
    answers = book.of(utils.PreparedImage("image", "view", b""))
    question = utils.questions("generic", 1)[0]
    answers.keep(question, 0, {"text": "kept", "done": True})
    book.set_aside("", [], why=BlindError("it does not see"))
    with pytest.raises(BlindError, match="it does not see"):
        answers.keep(question, 1, {"text": "in flight", "done": True})


def test_a_run_is_tested_at_its_start_and_its_end(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    assert phase2(base, fake) == 0
    assert questions(fake) == 15 + 2 * TEST


def test_a_second_run_with_nothing_to_ask_is_not_tested(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    phase2(base, fake)
    before = questions(fake)
    assert phase2(base, fake) == 0
    assert questions(fake) == before


@pytest.mark.parametrize("fault", EYES)
def test_a_server_that_goes_blind_leaves_no_row(
    fake: FakeOllama,
    labelled: LabelFolder,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    base = labelled()
    rule = {"endpoint": "/api/chat", "when": 16, "times": 10**6, "fault": fault}
    fake.control(script=[rule])
    assert phase2(base, fake) == 2
    assert "answers since the last passed test are set aside" in caplog.text
    assert answers_kept(base) == 0
    assert not (base / "dataset_final_vlm" / config.MANIFEST).exists()
    fake.control(script=[])
    assert phase2(base, fake) == 0
    assert answers_kept(base) == 30


def test_answers_of_a_killed_run_stand_or_fall_with_the_next_test(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    assert phase2(base, fake, "--no-sight-test") == 0  # as if killed before its test
    assert answers_kept(base) == 15
    fake.control(faults={"blind": 1.0})
    assert phase2(base, fake) == 2
    assert answers_kept(base) == 0


def test_a_pass_in_the_future_is_none(fake: FakeOllama, labelled: LabelFolder) -> None:
    base = labelled(per_class=1)
    assert phase2(base, fake) == 0
    journals = base / "dataset_final_vlm" / config.JOURNAL_DIR
    servers = utils.Journal(journals / utils.AnswerBook.SERVERS)
    later = {"time": "2999-01-01T00:00:00.000+00:00"}  # a clock was wrong
    servers.add({"key": "sight", **(servers.get("sight") or {}), **later})
    fake.control(faults={"blind": 1.0})
    assert phase2(base, fake) == 2


def test_another_vlm_that_does_not_see_takes_back_only_its_own(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    assert phase2(base, fake, "--no-sight-test") == 0
    fake.control(models=("demo-vlm", "other-vlm", "demo-embed"), faults={"blind": 1.0})
    assert phase2(base, fake, "--vlm", "other-vlm") == 2
    assert answers_kept(base) == 15


def test_answers_before_the_last_pass_stand_and_so_does_their_dataset(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    base = labelled(per_class=1)
    assert phase2(base, fake) == 0
    fake.control(faults={"blind": 1.0})
    assert phase2(base, fake, "--descriptions", "8") == 2
    assert answers_kept(base) == 15
    assert (base / "dataset_final_vlm" / config.MANIFEST).exists()


def test_a_reconnect_is_followed_by_a_test(
    fake: FakeOllama, labelled: LabelFolder
) -> None:
    rule = {"endpoint": "/api/chat", "when": 14, "fault": "refuse", "seconds": 0.3}
    fake.control(script=[rule])
    assert phase2(labelled(), fake) == 0
    assert questions(fake) >= 30 + 3 * TEST


def test_every_so_many_answers_there_is_a_test(
    fake: FakeOllama, labelled: LabelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "SIGHT_EVERY", 10)
    assert phase2(labelled(), fake) == 0
    # At the start, at the end, and once or twice between, as the images fall.
    assert questions(fake) in (30 + 3 * TEST, 30 + 4 * TEST)


def test_the_test_alone_prints_every_distance(
    fake: FakeOllama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phase2(tmp_path, fake, "--sight-test-only") == 0
    out = capsys.readouterr().out
    assert out.count(" / ") == 6 + 1
    assert "passed" in out
    assert list(tmp_path.iterdir()) == []


def test_the_test_alone_prints_every_distance_also_where_it_fails(
    fake: FakeOllama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.control(faults={"blind": 1.0})
    assert phase2(tmp_path, fake, "--sight-test-only") == 2
    out = capsys.readouterr().out
    assert out.count(" / ") == 6 + 1
    assert "passed" not in out
