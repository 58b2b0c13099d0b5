# SPDX-License-Identifier: Apache-2.0
"""Names of classes on pictures: in whatever script, with whatever characters."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deperceiver_hf import drawing
from deperceiver_hf.drawing import Boxes, ContactSheetRow, draw_boxes, draw_contact_sheet
from deperceiver_hf.jobs import printable

pytest.importorskip("supervision")


@pytest.fixture
def fonts(monkeypatch):
    """A function that sets the fonts which the machine has, by their paths."""

    def set_fonts(*paths: Path) -> None:
        drawing._written_names.cache_clear()
        monkeypatch.setattr(drawing, "font_files", lambda: tuple(map(str, paths)))

    yield set_fonts
    drawing._written_names.cache_clear()


def make_font(path: Path, letters: str, digits: bool = True) -> Path:
    """A font whose letters are bars of different heights, and that draws a square for all others."""
    builder_of = pytest.importorskip("fontTools.fontBuilder").FontBuilder
    pen_of = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen
    characters = [*letters, *(drawing.DIGITS if digits else "")]
    names = {character: f"uni{ord(character):04X}" for character in characters}

    def glyph(width: int, height: int):
        pen = pen_of(None)
        for place, point in enumerate([(50, 0), (50, height), (50 + width, height), (50 + width, 0)]):
            (pen.lineTo if place else pen.moveTo)(point)
        pen.closePath()
        return pen.glyph()

    builder = builder_of(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap({ord(character): name for character, name in names.items()})
    shapes = {name: glyph(300, 150 + 600 * place // len(names)) for place, name in enumerate(names.values())}
    builder.setupGlyf({".notdef": glyph(500, 800), **shapes})
    builder.setupHorizontalMetrics({name: (600, 50) for name in (".notdef", *names.values())})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Bars", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def picture(names, labels=(0,), scores=(0.5,), size=(640, 480)) -> np.ndarray:
    """What is drawn for objects of these classes that all lie at the same place."""
    boxes = np.array([[100, 200, 300, 300]] * len(labels))
    return np.asarray(draw_boxes(Image.new("RGB", size, "gray"), Boxes(boxes, labels, scores), names))


def test_names_are_drawn_in_a_font_that_has_their_letters(fonts, tmp_path, caplog):
    (tmp_path / "broken.ttf").write_text("no font")
    latin = make_font(tmp_path / "latin.ttf", "cat")
    fonts(tmp_path / "broken.ttf", latin, make_font(tmp_path / "chinese.ttf", "红青"))
    pictures = [picture([name]) for name in ("红", "青", "红青", "#0")]
    for place, one in enumerate(pictures):
        assert not any((one == other).all() for other in pictures[:place] if one.shape == other.shape)
    assert not caplog.records


def test_pillows_own_font_is_kept_for_names_that_it_has(fonts, tmp_path):
    fonts()
    alone = picture(["cat", "dog"], labels=[1])
    fonts(make_font(tmp_path / "all.ttf", "catdog红"))
    assert (picture(["cat", "dog"], labels=[1]) == alone).all()
    assert (picture(["cat", "dog", "红"], labels=[1]) == alone).all()


def test_names_of_several_scripts_are_drawn_each_in_its_font(fonts, tmp_path, caplog):
    fonts(make_font(tmp_path / "chinese.ttf", "红"), make_font(tmp_path / "thai.ttf", "แมว", digits=False))
    written = drawing._written_names(((0, "cat"), (1, "红"), (2, "แมว")))
    assert [Path(name.font or "own").name for name in written.values()] == ["own", "chinese.ttf", "thai.ttf"]
    assert [name.with_score for name in written.values()] == [True, True, False]
    picture(["cat", "红", "แมว"], labels=[0, 1, 2, 1], scores=[0.1, 0.2, 0.3, 0.4])
    assert not caplog.records


def test_font_with_digits_is_preferred(fonts, tmp_path):
    fonts(make_font(tmp_path / "a.ttf", "แมว", digits=False), make_font(tmp_path / "b.ttf", "แมว"))
    assert Path(drawing._written_names(((0, "แมว"),))[0].font or "").name == "b.ttf"


def test_names_that_no_font_has_become_numbers_with_a_legend(fonts, caplog):
    fonts()
    with caplog.at_level(logging.WARNING):
        numbered = [picture(["cat", "红", "青"], labels=[label]) for label in (1, 2)]
    assert (numbered[0] != numbered[1]).any()
    assert (numbered[0] == picture(["#0", "#1"], labels=[1])).all()
    (record,) = caplog.records  # once for all pictures
    assert "#1 is 红, #2 is 青" in record.message
    assert "font" in record.message
    assert "Noto" in record.message


def test_right_to_left_names_are_numbers_where_they_cannot_be_laid_out(fonts, tmp_path, monkeypatch, caplog):
    fonts(make_font(tmp_path / "hebrew.ttf", "חתול"))
    with_layout = drawing._written_names(((0, "חתול"),))[0]
    monkeypatch.setattr(drawing.features, "check", lambda feature: False)
    drawing._written_names.cache_clear()
    assert drawing._written_names(((0, "חתול"),))[0].text == "#0"
    assert any("FriBiDi" in record.message for record in caplog.records)
    monkeypatch.undo()
    assert with_layout.text == ("חתול" if drawing.features.check("raqm") else "#0")


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("two\nlines", r"two\nlines"),
        ("\u202egod", r"\u202egod"),
        ("ca\u200bt", r"ca\u200bt"),
        ("  cat ", "cat"),
        ("", "#0"),
        ("cafe\u0301", "café"),
    ],
)
def test_what_is_not_seen_in_a_name_is_drawn_as_an_escape(name, drawn):
    assert (picture([name]) == picture([drawn])).all()


def test_any_name_can_be_drawn():
    odd = ["👩\u200d🚀", "e" + "\u0301" * 50, "\ud800", "\U0010ffff", "\ue000", "٣", "x" * 5000, "\0", "𒀀", "が", "ﷺ"]
    for size in ((640, 480), (3, 900), (900, 3)):
        boxes = np.array([[0, 0, size[0], size[1]]] * len(odd))
        draw_boxes(Image.new("RGB", size), Boxes(boxes, range(len(odd)), [0.5] * len(odd)), odd)
        draw_boxes(Image.new("RGB", size), Boxes(boxes, range(len(odd))), dict(enumerate(odd)))
    rows = [ContactSheetRow(Image.new("RGB", (60, 40)), Boxes(), Boxes(), caption=name) for name in odd]
    draw_contact_sheet(rows, odd, cell_width=100)


def test_long_names_are_shortened_and_keep_their_score():
    long, longer = "w" * 300, "w" * 400
    assert (picture([long]) == picture([longer])).all()
    assert (picture([long], scores=[0.1]) != picture([long], scores=[0.9])).any()
    changed = (picture([long]) != picture(["w"])).any(axis=(0, 2))
    assert np.flatnonzero(changed).max() < 500  # half of the picture, from the box on


def test_fonts_are_found_without_fontconfig(monkeypatch, tmp_path):
    for name in ("b/Family-Bold.otf", "b/FamilySans.ttf", "Family.TTC", "LastResort.otf", "readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(drawing.shutil, "which", lambda program: None)
    monkeypatch.setattr(drawing, "FONT_DIRECTORIES", ("/nowhere", str(tmp_path)))
    found = drawing.font_files.__wrapped__()
    assert [Path(path).name for path in found] == ["FamilySans.ttf", "Family.TTC", "Family-Bold.otf"]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain text, 红, é, C:\\x", "plain text, 红, é, C:\\x"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("caf\udce9.png", r"caf\udce9.png"),
        ("line\u2028end\r", r"line\u2028end\r"),
        ("\u2066isolated\u2069", r"\u2066isolated\u2069"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),  # of Persian
        ("a\u200db", r"a\u200db"),
    ],
)
def test_printable_text(text, escaped):
    assert printable(text) == escaped
    assert printable(f"{text}\n", keep="\n") == f"{escaped}\n"
