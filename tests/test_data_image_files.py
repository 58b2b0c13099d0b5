# SPDX-License-Identifier: Apache-2.0
"""Image files that a user names, in whatever way names and file systems allow."""

import os
import re
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from deperceiver_hf.data import image_files
from deperceiver_hf.data.image_files import describe_left_out, find_images, search_images
from deperceiver_hf.data.images import has_more_frames

NFC, NFD = (unicodedata.normalize(form, "Zürich") for form in ("NFC", "NFD"))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that makes empty files in the working directory, which is a new one."""
    monkeypatch.chdir(tmp_path)

    def make_files(*names: str) -> None:
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()

    return make_files


def found(*inputs: str, **options) -> list[str]:
    return [path.as_posix() for path in find_images(inputs, **options)]


def test_what_is_there_as_it_stands_is_no_pattern(make):
    make("photos[1]/a.png", "photos[1]/b.jpg", "photos1/c.png", "[x].png", "x.png")
    assert found("photos[1]") == ["photos[1]/a.png", "photos[1]/b.jpg"]
    assert found("photos[1]/*.png") == ["photos[1]/a.png"]
    assert found("[x].png") == ["[x].png"]
    assert found("photos?/*.png") == ["photos1/c.png"]


def test_any_capitals_of_a_suffix_and_none_if_named(make):
    make("d/a.JPG", "d/b.Jpeg", "d/c.TIFF", "d/plain", "d/notes.txt")
    assert found("d") == ["d/a.JPG", "d/b.Jpeg", "d/c.TIFF"]
    assert found("d/plain") == ["d/plain"]


@pytest.mark.skipif(os.sep != "/", reason="backslashes are separators here")
def test_backslashes_part_directories_where_nothing_else_fits(make):
    make("d/e/a.png", "d/e/b.png", "odd\\name.png")
    assert found("d\\e\\a.png") == ["d/e/a.png"]
    assert found(r"d\e\*.png") == ["d/e/a.png", "d/e/b.png"]
    assert found("odd\\name.png") == ["odd\\name.png"]


def test_both_forms_of_accents(make):
    make(f"{NFC}/a.png", f"{NFD}.png")
    for spelling in (NFC, NFD):
        (one,) = found(f"{spelling}/*.png")
        assert unicodedata.normalize("NFC", one) == f"{NFC}/a.png"
        (one,) = found(f"{spelling}.png")
        assert unicodedata.normalize("NFC", one) == f"{NFC}.png"


def test_home_directory(make, monkeypatch, tmp_path):
    make("home/a.png", "home/d/b.png")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    home = (tmp_path / "home").as_posix()
    assert found("~/a.png", "~/d", "~/*.png") == [f"{home}/a.png", f"{home}/d/b.png"]


def test_directories_named_as_images_and_links(make):
    make("x.jpg/a.png", "d/sub.png/b.png", "elsewhere/c.png")
    os.symlink(Path("elsewhere").absolute(), "d/linked")
    os.symlink(Path("d").absolute(), "d/sub.png/circle")
    os.symlink("nowhere", "d/broken.png")
    assert found("x.jpg") == ["x.jpg/a.png"]
    search = search_images(["d"])
    assert [path.as_posix() for path in search.files] == ["d/linked/c.png", "d/sub.png/b.png"]
    assert search.refused == {"d/broken.png": "it is a link to nowhere, which is not there"}
    with pytest.raises(ValueError, match="link to nowhere"):
        find_images(["d/broken.png"])


def test_a_file_is_taken_once_whichever_directory_leads_to_it(make):
    make("d/a.png", "d/b.png")
    os.symlink(Path("d").absolute(), "same")
    os.link("d/a.png", "d/hard.png")
    assert found("d", "same", "./d/a.png", "same/../d/b.png") == ["d/a.png", "d/b.png", "d/hard.png"]
    os.symlink(Path("d/a.png").absolute(), "d/soft.png")  # its own name, as tools that store files by content make it
    assert found("same") == ["same/a.png", "same/b.png", "same/hard.png", "same/soft.png"]


def test_unreadable_directory_is_said(make, monkeypatch):
    make("d/a.png", "d/locked/b.png")
    scandir = os.scandir

    def locked(path="."):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    search = search_images(["d"])
    assert [path.as_posix() for path in search.files] == ["d/a.png"]
    assert {Path(path).as_posix(): reason for path, reason in search.refused.items()} == {
        "d/locked": "the directory cannot be read: Permission denied"
    }


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_text(make):
    try:
        make(os.fsdecode(b"d/caf\xe9.png"))
    except OSError:
        pytest.skip("this file system refuses them")
    assert found("d") == [os.fsdecode(b"d/caf\xe9.png")]
    make("d/" + "x" * 251 + ".png")
    assert len(found("d")) == 2


def test_kinds_that_are_not_read_are_counted_once(make):
    make("d/a.png", "d/b.HEIC", "d/c.heic", "d/e/clip.MOV", "d/raw.CR2", "d/labels.txt", "d/.hidden.heic")
    search = search_images(["d", "d/*"])
    assert search.counts_left_out == {".cr2": 1, ".heic": 2, ".mov": 1}
    text = describe_left_out(search.counts_left_out)
    assert "2 .heic" in text
    assert "pillow-heif" in text
    assert "1 .mov" in text
    assert "ffmpeg" in text
    with pytest.raises(FileNotFoundError, match=r"No images in d/\*\.HEIC.*1 \.heic .*pillow-heif"):
        find_images(["d/*.HEIC"])


def test_heif_is_read_where_there_is_a_decoder(make, monkeypatch):
    make("d/a.heic")
    with pytest.raises(ValueError, match=r"d/a\.heic.*pip install pillow-heif"):
        find_images(["d/a.heic"])
    monkeypatch.setattr(image_files, "_is_heif_readable", lambda: True)
    assert found("d") == found("d/a.heic") == found("d/*") == ["d/a.heic"]
    assert search_images(["d"]).counts_left_out == {}


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a.png",
        "http://x/y*.jpg",
        "s3://bucket/a.png",
        "gs://b/a.png",
        "data:image/png;base64,iVBO",
    ],
)
def test_urls_are_refused_by_name(make, url):
    make("a.png")
    with pytest.raises(ValueError, match=re.escape(url) + r".*URL.*download"):
        find_images(["a.png", url])


def test_videos_are_refused_by_name_and_others_go_on(make):
    make("clip.mp4", "a.png")
    with pytest.raises(ValueError, match=r"clip\.mp4: it is a video.*ffmpeg"):
        find_images(["clip.mp4"])
    search = search_images(["clip.mp4", "a.png"])  # as a shell makes it of `*`
    assert [path.name for path in search.files] == ["a.png"]
    assert list(search.refused) == ["clip.mp4"]


@pytest.mark.parametrize(
    ("entry", "hint"),
    [("Photo.PNG", "photo.png"), ("phto.png", "photo.png"), ("*.PNG", "photo.png"), ("", "''")],
)
def test_what_may_have_been_meant(make, entry, hint):
    make("photo.png", "other.txt")
    if os.path.exists(entry):
        pytest.skip("capitals make no difference here")
    with pytest.raises(FileNotFoundError, match=re.escape(hint)):
        find_images([entry])


def test_pictures_of_an_earlier_run_are_named_where_there_are_no_others(make):
    make("out/annotated/a.png")
    with pytest.raises(FileNotFoundError, match="earlier run"):
        find_images(["out"], leave_out="out/annotated")
    assert found("out/annotated/a.png", leave_out="out/annotated") == ["out/annotated/a.png"]


def test_pipes_are_no_files(make):
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are none here")
    make("d/a.png")
    os.mkfifo("d/pipe.png")
    assert found("d") == ["d/a.png"]
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        find_images(["d/pipe.png"])


def test_frames_behind_the_first(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green")]
    for name, several in (("a.gif", True), ("b.tif", True), ("c.gif", False), ("d.jpg", False), ("e.png", True)):
        more = {"save_all": True, "append_images": frames[1:]} if several else {}
        frames[0].save(tmp_path / name, **more)
        assert has_more_frames(tmp_path / name) == several
    camera = tmp_path / "f.jpg"
    frames[0].save(camera, format="MPO", save_all=True, append_images=frames[1:])
    assert not has_more_frames(camera)
