"""The page: what stands on it, that nothing on it can do harm, and how it is used."""

import csv
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import phantoms
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import utils
from utils import Chart, Section, Sheet, Tile

CLASSES = ("FDT", "MTF", "TOR")
HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=document.title='owned'>",
    "\"' onload=alert(1) x='",
    "'}};document.title='owned'//",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egnp.exe\u2066\u200f",
    "long " * 60,
    "=cmd|' /C calc'!A0",
    "&lt;b&gt;&amp;",
    "</title></style><!--",
)


class Parsed(HTMLParser):
    """Text, tags and attribute values of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.values: list[tuple[str, str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(
        self, tag: str, attrs: Sequence[tuple[str, str | None]]
    ) -> None:
        self.tags.append(tag)
        self.values += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.values if (t, n) == (tag, name)]


def picture(seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(60, 90, (40, 60), np.uint8)
    return utils.thumbnail(noise)


def make_sheet(count: int, **changes: Any) -> Sheet:
    """A sheet of `count` images; the third of every six lies in a class folder."""
    names = [f"{number:04d}.dcm" for number in range(count)]
    tiles = [
        Tile(
            name=name,
            picture=name,
            file="" if at % 6 == 2 else name,
            label="TOR" if at % 6 == 2 else "",
            state="odd" if at % 2 else "even",
            group=f"day {at // 10}",
            lines=[f"{60 + at} kVp"],
        )
        for at, name in enumerate(names)
    ]
    sheet = Sheet(
        title="A sheet",
        folder="/somewhere",
        tiles=tiles,
        pictures={name: picture(at) for at, name in enumerate(names)},
        classes=CLASSES,
        order="in order of exposure",
        foot=["made by a test"],
    )
    return sheet._replace(**changes)


def parsed(path: Path, sheet: Sheet) -> Parsed:
    utils.page(path, sheet)
    return Parsed(path.read_text("utf-8"))


# --- What stands on it --------------------------------------------------------------


def test_every_value_of_an_image_stands_on_the_page(tmp_path: Path) -> None:
    tile = Tile(
        name="a name.dcm",
        picture="p",
        file="/a/file.dcm",
        group="a group",
        label="a label",
        state="a state",
        lines=["a line", "another line"],
        shares={"FDT": 0.25, "MTF": 0.75},
        near=[("q", "a neighbour")],
        details=["a description"],
    )
    pictures = {"p": picture(1), "q": picture(2)}
    page = parsed(tmp_path / "x.html", make_sheet(0, tiles=[tile], pictures=pictures))
    for value in (
        *("a name.dcm", "a group", "a label", "a state", "a line", "another line"),
        *("25.0% FDT", "75.0% MTF", "a neighbour", "a description", "made by a test"),
    ):
        assert value in " ".join(page.text.split())
    assert page.all("article", "data-file") == ["/a/file.dcm"]
    assert page.all("article", "data-rank") == ["0"]
    assert [uri.partition(",")[0] for uri in page.all("img", "src")] == [
        "data:image/jpeg;base64"
    ] * 2


def test_sections_show_lines_tables_and_every_point_of_a_chart(tmp_path: Path) -> None:
    section = Section(
        title="Figures",
        lines=["a warning"],
        rows=[("is", "FDT"), ("MTF", ("13", "MTF as FDT"))],
        charts=[Chart("A curve", "descriptions", [(3, 0.61, 0.5, 0.72)], x_max=10)],
        warning=True,
    )
    page = parsed(tmp_path / "x.html", make_sheet(1, sections=[section]))
    for value in ("a warning", "is", "13", "A curve", "3: 61 % (50 % to 72 %)"):
        assert value in " ".join(page.text.split())
    assert page.all("button", "data-show") == ["MTF as FDT"]
    assert page.all("section", "class") == ["warning"]
    assert page.all("circle", "cx") == ["125.0"]
    assert page.all("circle", "cy") == ["82.6"]


def test_a_picture_that_is_shown_twice_is_embedded_once(tmp_path: Path) -> None:
    tiles = [Tile(name=str(n), picture="p", near=[("p", "like it")]) for n in range(3)]
    page = parsed(
        tmp_path / "x.html", make_sheet(0, tiles=tiles, pictures={"p": picture()})
    )
    assert page.all("img", "data-key") == ["p"] * 6
    assert len(page.all("img", "src")) == 1


def test_a_picture_that_is_missing_leaves_its_name(tmp_path: Path) -> None:
    page = parsed(tmp_path / "x.html", make_sheet(1, pictures={}))
    assert page.all("img", "src") == []
    assert page.all("img", "alt") == ["0000.dcm"]


def test_an_empty_sheet_is_a_page(tmp_path: Path) -> None:
    assert "A sheet" in parsed(tmp_path / "x.html", make_sheet(0)).text


def test_every_500_images_have_a_page_and_a_list_of_their_own(tmp_path: Path) -> None:
    utils.page(tmp_path / "x.html", make_sheet(1001, pictures={}))
    names = ["x.html", "x_2.html", "x_3.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    pages = [Parsed((tmp_path / name).read_text("utf-8")) for name in names]
    assert [len(page.all("article", "data-file")) for page in pages] == [500, 500, 1]
    assert all(page.all("a", "href") == names for page in pages)
    assert [page.all("body", "data-save") for page in pages] == [
        ["etiquetas_1.csv"],
        ["etiquetas_2.csv"],
        ["etiquetas_3.csv"],
    ]


def test_only_a_page_whose_images_changed_is_written_again(tmp_path: Path) -> None:
    sheet = make_sheet(501, pictures={}, order="")
    utils.page(tmp_path / "x.html", sheet)
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    changed = [*sheet.tiles[:-1], sheet.tiles[-1]._replace(label="FDT")]
    utils.page(tmp_path / "x.html", sheet._replace(tiles=changed))
    after = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False]


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.sampled_from(HOSTILE) | st.text(max_size=300))
def test_no_text_becomes_markup(tmp_path: Path, text: str) -> None:
    def made_of(word: str) -> Sheet:
        return Sheet(
            title=word,
            folder=word,
            tiles=[
                Tile(
                    name=word,
                    picture=word,
                    file=word,
                    group=word,
                    label=word,
                    state=word,
                    lines=[word],
                    shares={word: 0.5},
                    near=[(word, word)],
                    details=[word],
                )
            ],
            pictures={word: picture()},
            classes=[word],
            sections=[Section(word, [word], [[word], [(word, word)]],
                              [Chart(word, word, [(1, 0.5, 0.4, 0.6)])])],
            order=word,
            foot=[word],
        )  # fmt: skip

    harmless = parsed(tmp_path / "x.html", made_of("harmless"))
    page = parsed(tmp_path / "y.html", made_of(text or "x"))
    assert page.tags == harmless.tags
    assert [v[:2] for v in page.values] == [v[:2] for v in harmless.values]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_shown_as_it_is(tmp_path: Path, text: str) -> None:
    tile = Tile(name=text, file=text, label=text, lines=[text])
    page = parsed(tmp_path / "x.html", make_sheet(0, tiles=[tile], classes=[text]))
    assert page.words.count(text) == 3
    assert page.all("article", "data-file") == [text]
    assert json.loads(page.all("body", "data-classes")[0]) == [text]


def test_half_a_character_in_a_file_name_stops_no_page(tmp_path: Path) -> None:
    page = parsed(tmp_path / "x.html", make_sheet(0, tiles=[Tile(name="a\udcffb")]))
    assert "a\\udcffb" in page.text


def test_pages_of_more_images_than_there_are_now_go_if_they_are_ours(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.html"
    utils.page(path, make_sheet(1001))
    assert (tmp_path / "x_3.html").exists()
    (tmp_path / "x_4.html").write_text("<!doctype html>somebody's")
    utils.page(path, make_sheet(3))
    assert {one.name for one in tmp_path.iterdir()} == {"x.html", "x_4.html"}


@pytest.mark.parametrize("shape", [(2000, 1500), (160, 160), (3, 900), (1, 1)])
def test_a_thumbnail_keeps_to_160_pixels(shape: tuple[int, int]) -> None:
    grey = np.full(shape, 90, np.uint8)
    image = Image.open(io.BytesIO(utils.thumbnail(grey)))
    assert max(image.size) == min(160, max(shape))
    assert image.mode == "L"


def test_a_thumbnail_of_noise_keeps_to_four_kilobytes() -> None:
    noise = np.random.default_rng(0).normal(128, 12, (160, 160)).astype(np.uint8)
    assert len(utils.thumbnail(noise)) <= 4000


def test_a_sheet_of_1000_images_is_smaller_than_6_mb(tmp_path: Path) -> None:
    pictures = []
    for seed in range(12):
        exposure = phantoms.exposure(CLASSES[seed % 3], seed, side=336)
        path = phantoms.write(exposure, tmp_path / "image.dcm")
        png = io.BytesIO(utils.prepare_image(path).png)
        pictures.append(utils.thumbnail(np.asarray(Image.open(png))))
    sheet = make_sheet(1000)
    utils.page(
        tmp_path / "x.html",
        sheet._replace(
            pictures={key: pictures[at % 12] for at, key in enumerate(sheet.pictures)},
            # no picture stands twice on a page, so that none is left out
        ),
    )
    total = sum(path.stat().st_size for path in tmp_path.glob("*.html"))
    assert 1e6 < total < 6e6


# --- How it is used: in a browser ---------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = [shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome")]
    program = next((path for path in found if path), None)
    if program is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-background-networking"],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def window(browser: Any) -> Iterator[Any]:
    """A window of its own; ends with what it asked the network for, and complained."""
    view = browser.new_page(viewport={"width": 1280, "height": 900})
    asked: list[str] = []
    complaints: list[str] = []
    view.on("request", lambda request: asked.append(request.url))
    view.on("console", lambda message: complaints.append(message.text))
    view.on("pageerror", lambda error: complaints.append(str(error)))
    yield view
    assert not [u for u in asked if not u.startswith(("file:", "data:", "blob:"))]
    assert complaints == []
    view.context.close()


def opened(window: Any, path: Path, sheet: Sheet) -> None:
    utils.page(path, sheet)
    window.goto(path.as_uri())


def reload(window: Any) -> None:
    """As a person does it: the browser takes a moment to keep what it was given."""
    window.wait_for_timeout(300)
    window.reload()


def given_classes(window: Any) -> dict[str, str]:
    """What the images say: file and the class given in the browser."""
    found: dict[str, str] = window.evaluate(
        """Object.fromEntries([...document.querySelectorAll(".mark")].map((tile) =>
        [tile.dataset.file, tile.querySelector(".mine").textContent])
        .filter(([, name]) => name))"""
    )
    return found


def saved(window: Any, folder: Path) -> list[list[str]]:
    with window.expect_download() as download:
        window.click("#save")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def shown(window: Any) -> list[str]:
    names: list[str] = window.locator(".tile:visible h3").all_inner_texts()
    return names


def test_a_run_of_images_gets_a_class_and_it_is_saved_and_kept(
    window: Any, tmp_path: Path
) -> None:
    opened(window, tmp_path / "x.html", make_sheet(24))
    tiles = window.locator(".tile > img")
    tiles.nth(0).click()
    tiles.nth(4).click(modifiers=["Shift"])
    window.keyboard.press("2")
    one_to_five = {f"{n:04d}.dcm": "MTF" for n in (0, 1, 3, 4)}
    assert given_classes(window) == one_to_five  # 0002 lies in a class folder
    tiles.nth(6).hover()
    window.mouse.down()
    tiles.nth(9).hover()
    window.mouse.up()
    window.keyboard.press("1")
    tiles.nth(7).click()
    window.keyboard.press("u")
    expected = one_to_five | {"0006.dcm": "FDT", "0009.dcm": "FDT"}
    assert given_classes(window) == expected
    assert window.locator("#classes").inner_text().split("\n") == [
        *("1 FDT: 2", "2 MTF: 4", "3 TOR: 4")
    ]
    rows = saved(window, tmp_path)
    assert rows == [["file", "class"], *([k, v] for k, v in expected.items())]
    reload(window)
    assert given_classes(window) == expected


def test_a_typed_name_is_a_class_and_gets_a_key(window: Any, tmp_path: Path) -> None:
    opened(window, tmp_path / "x.html", make_sheet(6))
    window.locator(".tile > img").nth(0).click()
    window.keyboard.press("n")
    window.keyboard.type("Las Vegas 2")
    window.keyboard.press("Enter")
    window.locator(".tile > img").nth(1).click()
    window.keyboard.press("4")
    assert given_classes(window) == dict.fromkeys(
        ("0000.dcm", "0001.dcm"), "Las Vegas 2"
    )


def test_a_name_that_no_folder_can_have_is_refused(window: Any, tmp_path: Path) -> None:
    opened(window, tmp_path / "x.html", make_sheet(6))
    window.locator(".tile > img").nth(0).click()
    bad = ("../up", ".hidden", "a:b", "end.", "x/y", 'q"', "a\u200eb", "No concluyente")
    for name in bad:
        window.fill("#name", name)
        window.press("#name", "Enter")
        assert given_classes(window) == {}
        assert window.inner_text("#said") == "No folder can have that name."


def test_control_click_adds_one_image_and_takes_it_out_again(
    window: Any, tmp_path: Path
) -> None:
    opened(window, tmp_path / "x.html", make_sheet(12))
    tiles = window.locator(".tile > img")
    tiles.nth(0).click()
    for place in (4, 6, 4):
        tiles.nth(place).click(modifiers=["Control"])
    window.keyboard.press("3")
    assert sorted(given_classes(window)) == ["0000.dcm", "0006.dcm"]


def test_everything_can_be_done_from_the_keyboard(window: Any, tmp_path: Path) -> None:
    opened(window, tmp_path / "x.html", make_sheet(24))
    window.keyboard.press("ArrowRight")
    window.keyboard.press("1")
    window.keyboard.press("ArrowRight")
    window.keyboard.press("Shift+ArrowRight")
    window.keyboard.press("Shift+ArrowRight")
    window.keyboard.press("2")
    window.keyboard.press("Escape")
    window.keyboard.press("ArrowDown")
    first, *others = ("0000.dcm", "0001.dcm", "0003.dcm", "0004.dcm")
    assert given_classes(window) == {first: "FDT", **dict.fromkeys(others, "MTF")}
    window.keyboard.press("/")
    window.keyboard.type("83 kvp")
    assert shown(window) == ["0023.dcm"]


def test_a_key_without_a_marked_image_says_what_to_do(
    window: Any, tmp_path: Path
) -> None:
    opened(window, tmp_path / "x.html", make_sheet(6))
    window.keyboard.press("1")
    assert window.inner_text("#said").startswith("Mark images first")
    assert given_classes(window) == {}


def test_images_are_found_by_text_class_and_state(window: Any, tmp_path: Path) -> None:
    opened(window, tmp_path / "x.html", make_sheet(12))
    window.fill("#find", "DAY")
    assert shown(window) == []
    window.fill("#find", "71 kVp")
    assert shown(window) == ["0011.dcm"]
    window.fill("#find", "")
    window.select_option("#only", "TOR")
    assert shown(window) == ["0002.dcm", "0008.dcm"]
    window.select_option("#only", "odd")
    assert len(shown(window)) == 6
    window.select_option("#only", "no class")
    assert len(shown(window)) == 10
    assert window.locator("main h2:visible").count() == 0
    window.select_option("#only", "")
    assert window.locator("main h2:visible").all_inner_texts() == ["day 0", "day 1"]


def test_an_image_that_is_not_shown_gets_no_class(window: Any, tmp_path: Path) -> None:
    opened(window, tmp_path / "x.html", make_sheet(6))
    window.locator(".tile > img").nth(0).click()
    window.locator(".tile > img").nth(5).click(modifiers=["Shift"])
    window.select_option("#only", "odd")
    window.click("#classes button >> nth=0")
    window.select_option("#only", "")
    window.click("#classes button >> nth=1")
    odd = ["0001.dcm", "0003.dcm", "0005.dcm"]
    assert given_classes(window) == dict.fromkeys(odd, "FDT")


def test_a_key_gives_its_class_to_what_is_marked_now(
    window: Any, tmp_path: Path
) -> None:
    """Not to what got a class before; a second key at once corrects the first."""
    opened(window, tmp_path / "x.html", make_sheet(6))
    for key in ("ArrowRight", "Space", "1", "ArrowRight", "Space", "2"):
        window.keyboard.press(key)
    assert given_classes(window) == {"0000.dcm": "FDT", "0001.dcm": "MTF"}
    window.keyboard.press("3")
    assert given_classes(window) == {"0000.dcm": "FDT", "0001.dcm": "TOR"}
    for key in ("ArrowRight", "1"):  # without a mark: the image in focus
        window.keyboard.press(key)
    assert given_classes(window)["0003.dcm"] == "FDT"
    assert given_classes(window)["0001.dcm"] == "TOR"


def test_a_run_from_an_image_that_a_filter_hides_begins_where_it_is_seen(
    window: Any, tmp_path: Path
) -> None:
    opened(window, tmp_path / "x.html", make_sheet(12))
    window.locator(".tile > img").nth(6).click()
    window.select_option("#only", "odd")
    window.locator(".tile > img").nth(9).click(modifiers=["Shift"])
    window.keyboard.press("1")
    assert given_classes(window) == {"0009.dcm": "FDT"}


def test_the_keyboard_goes_on_where_it_was(window: Any, tmp_path: Path) -> None:
    """After a typed name, and after a filter has hidden the image in focus."""
    opened(window, tmp_path / "x.html", make_sheet(12))
    for key in ("ArrowRight", "ArrowRight", "n"):
        window.keyboard.press(key)
    window.keyboard.type("Las Vegas")
    for key in ("Enter", "ArrowRight", "1"):
        window.keyboard.press(key)
    expected = {"0001.dcm": "Las Vegas", "0003.dcm": "FDT"}
    assert given_classes(window) == expected
    window.select_option("#only", "no class")
    window.keyboard.press("Escape")
    for key in ("ArrowRight", "ArrowRight", "2", "3", "ArrowRight", "2"):
        window.keyboard.press(key)
    expected |= dict.fromkeys(("0004.dcm", "0005.dcm"), "MTF")
    assert given_classes(window) == expected
    window.keyboard.press("ArrowLeft")
    window.keyboard.press("3")
    assert given_classes(window) == expected | {"0000.dcm": "TOR"}


def test_what_was_just_given_a_class_is_left_alone_after_a_click_or_a_filter(
    window: Any, tmp_path: Path
) -> None:
    opened(window, tmp_path / "x.html", make_sheet(12))
    for leave in ("click", "filter"):
        window.locator(".tile > img").nth(3).click()
        window.locator(".tile > img").nth(5).click(modifiers=["Shift"])
        window.keyboard.press("1")
        assert "for the last 3 again" in window.inner_text("#said")
        if leave == "click":
            window.locator("h1").click()
        else:
            window.fill("#find", "dcm")
            window.keyboard.press("Escape")
        window.keyboard.press("2")
        assert set(given_classes(window).values()) == {"FDT"}


def test_a_name_that_differs_in_case_only_is_the_class_that_is_there(
    window: Any, tmp_path: Path
) -> None:
    opened(window, tmp_path / "x.html", make_sheet(6))
    window.locator(".tile > img").nth(0).click()
    for name in ("mtf", "  "):  # nothing typed takes nothing back
        window.fill("#name", name)
        window.press("#name", "Enter")
        assert given_classes(window) == {"0000.dcm": "MTF"}


def test_the_image_in_focus_is_not_behind_the_bar(window: Any, tmp_path: Path) -> None:
    opened(window, tmp_path / "x.html", make_sheet(60))
    for key in [*["ArrowDown"] * 9, *["ArrowUp"] * 8]:
        window.keyboard.press(key)
        top, bar, bottom = window.evaluate(
            """[document.activeElement.closest(".tile").getBoundingClientRect().top,
            document.getElementById("bar").getBoundingClientRect().bottom,
            document.activeElement.closest(".tile").getBoundingClientRect().bottom]"""
        )
        assert bar <= top
        assert bottom <= window.viewport_size["height"]


def test_a_class_keeps_its_key(window: Any, tmp_path: Path) -> None:
    opened(window, tmp_path / "x.html", make_sheet(6))
    for at, name in ((4, "LATER"), (0, "SOONER")):
        window.locator(".tile > img").nth(at).click()
        window.keyboard.press("n")
        window.keyboard.type(name)
        window.keyboard.press("Enter")
    assert "4 LATER" in " ".join(window.locator("#classes button").all_inner_texts())
    reload(window)
    now = " ".join(window.locator("#classes button").all_inner_texts())
    assert "4 LATER: 1 5 SOONER: 1" in now


def test_the_second_order_begins_with_various_images(
    window: Any, tmp_path: Path
) -> None:
    names = [f"{n:04d}.dcm" for n in range(6)]
    alike = {name: picture(at // 3) for at, name in enumerate(names)}
    opened(window, tmp_path / "x.html", make_sheet(6, pictures=alike))
    window.select_option("#order", "various first")
    assert sorted(shown(window)) == names
    assert shown(window)[:2] == [names[0], names[5]]
    assert window.locator("main h2:visible").count() == 0
    window.select_option("#order", "in order of exposure")
    assert shown(window) == names


def test_a_cell_of_a_table_shows_its_images(window: Any, tmp_path: Path) -> None:
    table = Section("Matrix", rows=[("", "odd"), ("x", ("3", "odd"))])
    opened(window, tmp_path / "x.html", make_sheet(6, sections=[table]))
    window.click("[data-show]")
    assert shown(window) == ["0001.dcm", "0003.dcm", "0005.dcm"]


def test_another_folder_has_classes_of_its_own(window: Any, tmp_path: Path) -> None:
    opened(window, tmp_path / "x.html", make_sheet(6))
    window.locator(".tile > img").nth(0).click()
    window.keyboard.press("1")
    opened(window, tmp_path / "y.html", make_sheet(6, folder="/elsewhere"))
    assert given_classes(window) == {}


def test_hostile_names_run_nothing_and_are_saved_without_a_formula(
    window: Any, tmp_path: Path
) -> None:
    tiles = [
        Tile(name=text, picture="p", file=text, state=text, lines=[text], group=text)
        for text in HOSTILE
    ]
    sheet = make_sheet(0, tiles=tiles, pictures={"p": picture()}, title="harmless")
    opened(window, tmp_path / "x.html", sheet)
    window.locator(".tile > img").nth(0).click()
    window.locator(".tile > img").nth(len(HOSTILE) - 1).click(modifiers=["Shift"])
    window.fill("#name", "=1+1")
    window.press("#name", "Enter")
    rows = saved(window, tmp_path)
    assert rows[1:] == [[("'" if t[0] in "='" else "") + t, "'=1+1"] for t in HOSTILE]
    assert window.title() == "harmless"


def test_the_pictures_of_a_page_are_all_drawn(window: Any, tmp_path: Path) -> None:
    tiles = [Tile(name=str(n), picture="p", near=[("p", "like")]) for n in range(3)]
    sheet = make_sheet(0, tiles=tiles, pictures={"p": picture()})
    opened(window, tmp_path / "x.html", sheet)
    widths = "[...document.images].map((image) => image.naturalWidth)"
    assert window.evaluate(widths) == [60] * 6
