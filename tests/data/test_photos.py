"""Photos from folders, shards and tables: the same photo for the same number, and broken sources refused by name."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from counterpoint.conditions.image import read_image, read_shape
from counterpoint.data import tables
from counterpoint.data.balance import Balanced
from counterpoint.data.photos import ImageFolder, Photo, read_segments
from counterpoint.data.samples import PhotoSamples, open_photos
from counterpoint.data.tables import parquet, saved_dataset
from counterpoint.data.tars import TarShards
from counterpoint.types import UserError
from tests.data.test_published import parquet as write_parquet


def png(value: int, width: int = 48, height: int = 32) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def segments_png() -> bytes:
    """The left half is segment 7, the right one 70000, as COCO codes them."""
    file = io.BytesIO()
    numbers = np.where(np.arange(48) < 24, 7, 70000)[None].repeat(32, 0)
    PIL.Image.fromarray(np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], -1).astype(np.uint8)).save(
        file, "PNG"
    )
    return file.getvalue()


def folder(root: Path, *rows: dict | bytes) -> Path:
    root.mkdir(exist_ok=True)
    for i in range(3):
        (root / f"{i}.png").write_bytes(png(i * 10))
    (root / "edges.png").write_bytes(png(255))
    (root / "segments.png").write_bytes(segments_png())
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (root / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return root


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


FULL = {"file_name": "1.png", "text": "one", "canny_file_name": "edges.png", "segments_file_name": "segments.png"}


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """A kind of one's own is, by its name; what nobody asks for may be missing, or damaged."""
    named = {f"{what}_file_name": "edges.png" for what in ("glow", "canny")}
    place = folder(tmp_path / "set", {"file_name": "1.png", "depth_file_name": "absent.png", **named})
    files = {"1.png": png(0), "1.glow.png": png(255), "1.canny.png": png(255), "1.depth.png": b"cut"}
    tar = shard(tmp_path / "1.tar", files)
    for source, lacking in ((place, "absent.png"), (tar, "depth")):
        photos = open_photos(source, 16, kinds=["glow"])
        assert set(photos[0].maps) == {"glow"}
        assert photos.having("glow") == [0]
        with pytest.raises(UserError, match=lacking):
            open_photos(source, 16)[0]
    table = write_parquet(tmp_path, ["image", "text", "glow", "control_canny"])
    assert set(parquet(table, 16, split="validation", kinds=["glow"])[0].maps) == {"glow"}
    assert set(parquet(table, 16, split="validation")[0].maps) == {"canny"}


def test_an_image_folder(tmp_path: Path) -> None:
    photos = open_photos(folder(tmp_path / "set", FULL, {"file_name": "2.png"}), 16)
    assert isinstance(photos, ImageFolder)
    one, two = photos[0], photos[1]
    assert (len(photos), one.text, two.text) == (2, "one", "")
    assert one.image.shape == (16, 16, 3)
    assert (one.image == 10).all()
    assert (one.maps["canny"] == 255).all()
    assert two.maps == {}
    assert two.segments is None
    np.testing.assert_array_equal(one.segments, np.where(np.arange(16) < 8, 7, 70000)[None].repeat(16, 0))
    assert read_segments(segments_png(), "x").shape == (32, 48)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"file_name": "9.png"}], "line 1: there is no file 9.png"),
        ([FULL, {"file_name": "2.png", "canny_file_name": "no.png"}], "line 2: there is no file no.png"),
        ([{"file_name": "../edges.png"}], "line 1: there is no file ../edges.png"),
        ([FULL, FULL], "line 2: 1.png is there twice, first in line 1"),
        ([b'{"file_name": "1.png", "text": "caf\xe9"}'], "line 1: not UTF-8"),
        ([b"{"], "line 1: no JSON object"),
        ([b"[1]"], "line 1: no JSON object"),
        ([b"[" * 100_000], "line 1: no JSON object"),
        ([{"text": "x"}], "line 1: no JSON object with a file_name"),
        ([{"file_name": "1.png", "text": 3}], "line 1: names of files and the text are strings"),
        ([], "is empty"),
        ([b'{"file_name": "1.png", "text": "a", "text": "b"}'], "line 1: the key text is there twice"),
        ([FULL, b"", b"{"], "line 3: no JSON object"),
    ],
)
def test_a_broken_image_folder(tmp_path: Path, rows: list, said: str) -> None:
    root = folder(tmp_path / "set", *rows)
    if not rows:
        (root / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match=said):
        open_photos(root, 16)


def test_empty_lines_are_no_rows(tmp_path: Path) -> None:
    assert len(open_photos(folder(tmp_path / "set", FULL, b"", b"  ", {"file_name": "2.png"}), 16)) == 2


def test_a_file_that_goes_away_is_damage(tmp_path: Path) -> None:
    photos = open_photos(folder(tmp_path / "set", FULL), 16)
    (tmp_path / "set" / "edges.png").unlink()
    with pytest.raises(UserError, match=r"there is no file .*edges.png"):
        photos[0]
    plain = shard(tmp_path / "a.tar", {"a.png": png(1)})
    photos = open_photos(plain, 16)
    plain.unlink()
    with pytest.raises(UserError, match=r"a.tar:a cannot be read"):
        photos[0]


def test_maps_of_other_proportions_belong_to_no_photo(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", FULL)
    (root / "edges.png").write_bytes(png(255, 24, 16))
    assert open_photos(root, 16)[0].maps["canny"].shape == (16, 16, 3)
    (root / "edges.png").write_bytes(png(255, 48, 48))
    with pytest.raises(UserError, match=r"1.png \(canny\) has 48 x 48 pixels, its photo 48 x 32: other proportions"):
        open_photos(root, 16)[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_and_what_was_drawn_of_it(orientation: int, tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    whole = PIL.Image.open(io.BytesIO(png(90, 96, 64)))
    whole.save(tmp_path / "a.jpg", exif=exif)
    shown = read_image(tmp_path / "a.jpg")
    assert read_shape(tmp_path / "a.jpg") == shown.shape[:2]
    (tmp_path / "canny").mkdir()
    (tmp_path / "canny" / "settings.json").write_text("{}")
    PIL.Image.fromarray(shown).save(tmp_path / "canny" / "a.png")
    assert open_photos(tmp_path, 32)[0].maps["canny"].shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not an image that can be read"),
        (b"P5\n4 x\n255\n" + bytes(16), "is damaged or incomplete"),
        (png(3)[:60], "is damaged or incomplete"),
    ],
)
def test_segments_that_are_none(content: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_segments(content, "x")


def test_splits_as_the_hub_has_them(tmp_path: Path) -> None:
    folder(tmp_path / "validation", {"file_name": "2.png"})
    assert open_photos(tmp_path, 16)[0].name == "2.png"
    folder(tmp_path / "test", {"file_name": "0.png"})
    with pytest.raises(UserError, match="has no split train; name one of its folders test, validation"):
        open_photos(tmp_path, 16)
    folder(tmp_path / "train", FULL)
    assert open_photos(tmp_path, 16)[0].text == "one"


def test_segments_by_sam_will_do(tmp_path: Path) -> None:
    row = {"file_name": "1.png", "sam_file_name": "segments.png"}
    one = open_photos(folder(tmp_path / "set", row), 16)[0]
    np.testing.assert_array_equal(one.segments, np.where(np.arange(16) < 8, 7, 70000)[None].repeat(16, 0))
    samples = PhotoSamples([one], ("control:canny", "segments"), {"canny": lambda photo: np.full_like(photo, 255)})
    halves = {tuple(Balanced(samples, "canny", seed).batch([0])["control:canny"][0, 0, ::15, 0]) for seed in range(30)}
    assert {tuple(map(int, half)) for half in halves} == {(255, 255), (255, 0), (0, 255)}


def test_splits_at_any_depth(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        folder(tmp_path / "data" / split, FULL)
    assert (len(open_photos(tmp_path, 16)), open_photos(tmp_path, 16)[0].text) == (1, "one")
    (tmp_path / "data" / "test" / "metadata.jsonl").unlink()
    assert len(open_photos(tmp_path, 16)) == 1
    (tmp_path / "data" / "train").rename(tmp_path / "data" / "album")
    with pytest.raises(UserError, match=r"has pictures beside .*album, which alone has a metadata.jsonl"):
        open_photos(tmp_path, 16)


def test_splits_without_metadata(tmp_path: Path) -> None:
    for split, count in (("train", 2), ("test", 1)):
        (tmp_path / split).mkdir()
        for i in range(count):
            (tmp_path / split / f"{i}.png").write_bytes(png(i))
    assert len(open_photos(tmp_path, 16)) == 2
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(UserError, match=r"metadata.csv is not read: write it as metadata.jsonl"):
        open_photos(tmp_path, 16)


def test_what_lies_about(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", FULL)
    shard(root / "backup.tar", {"a.png": png(1)})
    with pytest.raises(UserError, match=r"holds both photos and backup.tar"):
        open_photos(root, 16)
    (tmp_path / "plain" / "more").mkdir(parents=True)
    for name in ("a.png", "._a.png", "more/b.PNG"):
        (tmp_path / "plain" / name).write_bytes(png(1))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.jpg").write_bytes(png(2))
    (tmp_path / "plain" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "plain" / "more" / "up").symlink_to(tmp_path / "plain")
    assert [one.name for one in open_photos(tmp_path / "plain", 16)] == ["a.png", "linked/c.jpg", "more/b.PNG"]
    (tmp_path / "deep" / "in").mkdir(parents=True)
    shard(tmp_path / "deep" / "in" / "0.tar", {"a.png": png(1)})
    with pytest.raises(UserError, match=r"holds no pictures \(jpg, png or webp\); .*0.tar is read by name"):
        open_photos(tmp_path / "deep", 16)


def test_captions_that_are_odd(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    assert open_photos(tmp_path, 16)[0].text == "with a mark"
    (tmp_path / "a.txt").unlink()
    for content, said in (('{"caption": {"en": "x"}}', "the caption is no text"), ("[" * 100_000, "holds no object")):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match=said):
            open_photos(tmp_path, 16)[0]


def test_photos_as_img2dataset_leaves_them(tmp_path: Path) -> None:
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "0.jpg").write_bytes(png(1))
    (tmp_path / "00000" / "0.json").write_text('{"caption": "from the list", "url": "x"}')
    assert open_photos(tmp_path, 16)[0].text == "from the list"


def test_a_list_of_addresses_is_no_set_of_pictures(tmp_path: Path) -> None:
    listed = pa.Table.from_pydict({"URL": ["x"], "TEXT": ["a"]})
    pq.write_table(listed, tmp_path / "part.parquet")
    for place in (tmp_path, tmp_path / "part.parquet"):
        with pytest.raises(UserError, match="becomes pictures with img2dataset"):
            open_photos(place, 16)
    (tmp_path / "data").mkdir()
    (tmp_path / "part.parquet").rename(tmp_path / "data" / "train-0.parquet")
    with pytest.raises(UserError, match=r"has no pictures; .* img2dataset"):
        open_photos(tmp_path, 16)


def test_maps_among_photos_are_not_taken_for_photos(tmp_path: Path) -> None:
    for part in ("images", "canny"):
        (tmp_path / part).mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "images" / "a.png")
    edges = np.zeros_like(noise)
    edges[20] = 255
    PIL.Image.fromarray(edges).save(tmp_path / "canny" / "a.png")
    with pytest.raises(UserError, match=r"canny.a.png looks like a map of the photo of its name"):
        open_photos(tmp_path, 16)
    PIL.Image.fromarray(noise[::-1].copy()).save(tmp_path / "canny" / "a.png")
    assert len(open_photos(tmp_path, 16)) == 2, "photos may share their names"


def test_columns_by_other_names(tmp_path: Path) -> None:
    write_parquet(tmp_path, ["picture", "prompt", "hint"])
    for path in (tmp_path / "data").iterdir():
        path.rename(path.with_name(path.name.replace("validation", "train")))
    photos = open_photos(tmp_path, 16, image="picture", text="prompt", maps={"depth": "hint"})
    assert (photos[5].text, photos[5].maps["depth"].max()) == ("row 5", 50)
    with pytest.raises(UserError, match="has no columns to be named"):
        open_photos(folder(tmp_path / "set", FULL), 16, text="prompt")


def test_row_groups_are_read_once_while_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path, ["image", "text"])
    photos = parquet(tmp_path, 16, split="validation")
    asked = []
    for group in photos.rows.parts:
        file = group.file
        group.file = SimpleNamespace(read_row_group=lambda *a, file=file: asked.append(a) or file.read_row_group(*a))
    order = [6, 0, 3, 1, 5, 2, 0, 6, 4]
    assert [photos[number].text for number in order] == [f"row {number}" for number in order]
    assert len(asked) == 4, "four groups, in any order"
    monkeypatch.setattr(tables, "MOST_CACHED", 0)
    photos[0], photos[6]
    assert len(tables._Group.cached) == 1


def test_a_damaged_page_is_damage(tmp_path: Path) -> None:
    write_parquet(tmp_path, ["image", "text"])
    path = tmp_path / "data" / "validation-00000-of-00002.parquet"
    content = bytearray(path.read_bytes())
    content[4:300] = b"\xff" * 296
    path.write_bytes(content)
    photos = parquet(tmp_path, 16, split="validation")
    with pytest.raises(UserError, match="row group 0 is damaged"):
        photos[0]
    assert photos[6].text == "row 6"


def test_shards_in_place(tmp_path: Path) -> None:
    first = {
        "a/0.jpg": png(1),
        "a/0.txt": "caf\u00e9".encode(),
        "a/0.canny.png": png(255),
        "a/0.segments.png": segments_png(),
    }
    second = {
        "b.png": png(2),
        "b.json": b'{"caption": "second", "url": "x"}',
        "c.txt": b"no picture",
        "d.webp": b"broken",
    }
    shard(tmp_path / "0.tar", first)
    shard(tmp_path / "1.tar", second)
    photos = open_photos(tmp_path, 16)
    assert isinstance(photos, TarShards)
    assert len(photos) == 3
    assert [photos[i].text for i in (1, 0)] == ["second", "caf\u00e9"]
    assert (photos[0].maps["canny"] == 255).all()
    assert set(np.unique(photos[0].segments)) == {7, 70000}
    with pytest.raises(UserError, match=r"1.tar:d is not an image"):
        photos[2]
    assert len(open_photos(tmp_path / "1.tar", 16)) == 2


def test_broken_shards(tmp_path: Path) -> None:
    whole = shard(tmp_path / "0.tar", {"a.png": png(1), "b.png": np.random.default_rng(0).bytes(3000)}).read_bytes()
    for cut in (600, whole.index(b"b.png") + 300, whole.index(b"b.png") + 2000):
        (tmp_path / "1.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"1.tar is cut"):
            TarShards([tmp_path / "1.tar"], 16)
    (tmp_path / "1.tar").write_bytes(whole)
    with pytest.raises(UserError, match=r"1.tar: the key a is there twice, first in .*0.tar"):
        open_photos(tmp_path, 16)
    shard(tmp_path / "3.tar", {"a.png": png(1)})
    with tarfile.open(tmp_path / "3.tar", "a") as tar:
        tar.add(tmp_path / "0.tar", "a.png")
    with pytest.raises(UserError, match=r"3.tar: a.png is there twice"):
        TarShards([tmp_path / "3.tar"], 16)
    with pytest.raises(UserError, match="hold no pictures"):
        TarShards([shard(tmp_path / "2.tar", {"a.txt": b""})], 16)
    with pytest.raises(UserError, match=r"0.tar:b: the caption is not UTF-8"):
        TarShards([shard(tmp_path / "0.tar", {"b.png": png(1), "b.txt": b"\xe9"})], 16)[0]


def test_tables_by_the_names_of_their_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path, ["image", "text", "control_depth"])
    for path in (tmp_path / "data").iterdir():
        path.rename(path.with_name(path.name.replace("validation", "train")))
    photos = open_photos(tmp_path, 16)
    assert (len(photos), photos[5].text) == (7, "row 5")
    assert (photos[5].maps["depth"] == 50).all()
    with pytest.raises(UserError, match="no column caption"):
        parquet(tmp_path, 16, text="caption")


def test_a_saved_data_set(tmp_path: Path) -> None:
    rows = {"image": [PIL.Image.open(io.BytesIO(png(i))) for i in range(3)], "text": ["a", None, "c"]}
    rows["canny"] = [PIL.Image.open(io.BytesIO(png(255))), None, None]
    picture = datasets.Image()
    columns = datasets.Features({"image": picture, "text": datasets.Value("string"), "canny": picture})
    made = datasets.Dataset.from_dict(rows, columns)
    made.save_to_disk(str(tmp_path / "one"))
    photos = open_photos(tmp_path / "one", 16)
    assert [photos[i].text for i in range(3)] == ["a", "", "c"]
    assert [list(photos[i].maps) for i in range(3)] == [["canny"], [], []]
    assert (photos[2].image == 2).all()
    datasets.DatasetDict({"test": made}).save_to_disk(str(tmp_path / "split"))
    with pytest.raises(UserError, match="no split train; it has test"):
        open_photos(tmp_path / "split", 16)
    with pytest.raises(UserError, match="no saved data set"):
        saved_dataset(tmp_path, 16)


@pytest.fixture(params=["folder", "shards", "parquet", "parquet without statistics", "saved"])
def partly(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Five photos, 1 and 4 of which came with a pose, and all with segments."""
    there = (1, 4)
    if request.param == "folder":
        for i in range(5):
            (tmp_path / f"{i}.png").write_bytes(png(i))
        for name in ("pose.png", "segments.png"):
            (tmp_path / name).write_bytes(png(9))
        rows = [{"file_name": f"{i}.png", "segments_file_name": "segments.png"} for i in range(5)]
        for i in there:
            rows[i]["pose_file_name"] = "pose.png"
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif request.param == "shards":
        for part, numbers in enumerate(((0, 1), (2, 3, 4))):
            files = {f"{i}.png": png(i) for i in numbers} | {f"{i}.segments.png": png(9) for i in numbers}
            shard(tmp_path / f"{part}.tar", files | {f"{i}.pose.png": png(9) for i in numbers if i in there})
    else:
        cell = {"bytes": png(9), "path": None}
        rows = [
            {
                "image": {"bytes": png(i), "path": None},
                "text": "",
                "pose": cell if i in there else None,
                "seg_map": cell,
            }
            for i in range(5)
        ]
        picture = datasets.Image()
        columns = {"image": picture, "text": datasets.Value("string"), "pose": picture, "seg_map": picture}
        made = datasets.Dataset.from_list(rows, datasets.Features(columns))
        if request.param == "saved":
            made.save_to_disk(str(tmp_path))
        else:
            (tmp_path / "data").mkdir()
            statistics = "without" not in request.param
            pq.write_table(made.data.table, tmp_path / "data" / "train-0.parquet", None, write_statistics=statistics)
    return tmp_path


def test_photos_without_the_control_are_left_out(partly: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos = open_photos(partly, 16)
    samples = PhotoSamples(photos, ("image", "control:pose", "segments"))
    assert samples.batch([0, 1])["image"][:, 0, 0, 0].tolist() == [1, 4]
    assert (samples.batch([1])["segments"] % 256 == 9).all()
    assert len(samples) == 2
    assert "3 of 5 photos have no pose image and are left out" in caplog.text
    assert len(PhotoSamples(photos, ("image", "control:pose"), most=1)) == 1
    assert len(PhotoSamples(photos, ("image", "control:pose"), {"pose": lambda photo: photo})) == 5
    with pytest.raises(UserError, match=r"5 of 5 photos have no depth image, and nothing here makes one: .* --batch"):
        PhotoSamples(photos, ("control:depth",))


def test_damage_in_tables_is_counted(tmp_path: Path) -> None:
    picture = datasets.Image()
    rows = {"image": [{"bytes": png(1), "path": None}, {"bytes": b"broken", "path": None}], "text": ["a", "b"]}
    made = datasets.Dataset.from_dict(rows, datasets.Features({"image": picture, "text": datasets.Value("string")}))
    made.save_to_disk(str(tmp_path / "one"))
    photos = open_photos(tmp_path / "one", 16)
    assert photos[0].text == "a"
    with pytest.raises(UserError, match="row 1 is not an image"):
        photos[1]
    (tmp_path / "cut" / "data").mkdir(parents=True)
    (tmp_path / "cut" / "data" / "train-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="a Parquet file is cut"):
        open_photos(tmp_path / "cut", 16)


def test_the_first_photos_only() -> None:
    assert len(PhotoSamples(Made(), ("image",), most=7)) == 7
    assert len(PhotoSamples(Made(), ("image",), most=700)) == 100


def test_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder of photos"):
        open_photos(tmp_path / "nowhere", 16)
    with pytest.raises(UserError, match="holds no pictures"):
        open_photos(tmp_path, 16)


class Made:
    """A hundred photos; some are damaged."""

    def __init__(self, *damaged: int) -> None:
        self.damaged = damaged

    def __len__(self) -> int:
        return 100

    def __getitem__(self, number: int) -> Photo:
        if number in self.damaged:
            raise UserError(f"{number} is damaged")
        maps = {"canny": np.full((8, 8, 3), 255, np.uint8)} if number % 2 else {}
        segments = np.arange(8)[None].repeat(8, 0)
        return Photo(np.full((8, 8, 3), number, np.uint8), str(number), maps, segments=segments)


def test_samples_of_a_trainer(caplog: pytest.LogCaptureFixture) -> None:
    fields = ("image", "caption", "control:canny")
    samples = PhotoSamples(Made(4), fields, {"canny": lambda photo: photo})
    batch = samples.batch([3, 4, 8])
    assert batch["caption"] == ["3", "5", "8"], "the next whole photo stands in for a damaged one"
    assert batch["control:canny"][:, 0, 0, 0].tolist() == [255, 255, 8]
    assert batch["image"].shape == (3, 8, 8, 3)
    assert "skipped (1 of at most 1): 4 is damaged" in caplog.text
    samples.batch([4])
    assert caplog.text.count("skipped") == 1
    with pytest.raises(UserError, match=r"photo 8 has no canny image, .* counterpoint extract canny --batch"):
        PhotoSamples(Made(), fields).batch([8])
    with pytest.raises(UserError, match="2 of 100 photos are damaged, 1 may be; the last one: 5 is damaged"):
        PhotoSamples(Made(4, 5), fields).batch([4])


def test_balanced_samples() -> None:
    samples = PhotoSamples(Made(), ("control:canny", "segments"), {"canny": lambda photo: photo})
    first = Balanced(samples, "canny", 3).batch(range(1, 40, 2))["control:canny"]
    columns = first[:, 0, :, 0]
    assert (first[..., 0] == columns[:, None]).all(), "whole segments are silenced"
    assert columns.unique().tolist() == [0, 255]
    assert len(columns.unique(dim=0)) > 10, "a different subset for each photo"
    assert (columns.sum(1) > 0).all()
    assert (Balanced(samples, "canny", 3).batch([5, 1])["control:canny"][1] == first[0]).all()
    assert not (Balanced(samples, "canny", 4).batch(range(1, 40, 2))["control:canny"] == first).all()


def test_segments_are_found_only_if_asked() -> None:
    photos = [Photo(np.zeros((32, 32, 3), np.uint8))]
    with pytest.raises(UserError, match="photo 0 has no segments"):
        PhotoSamples(photos, ("segments",)).batch([0])
    assert PhotoSamples(photos, ("segments",), find_segments=True).batch([0])["segments"].shape == (1, 32, 32)
