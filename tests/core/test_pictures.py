"""Pictures are prepared as transformers' CLIP processor does, and what is none, or too large, is an error by name."""

import json
import struct
import zlib

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="Pillow is missing: pip install portlm[image]")

from portlm.data.captions import Caption, read_captions  # noqa: E402
from portlm.errors import ConfigError, FormatError, UsageError  # noqa: E402
from portlm.pictures import MAX_PIXELS, Pictures, Preprocessing, open_picture  # noqa: E402


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


SAID = (
    {},
    {"do_resize": False, "crop_size": {"height": 6, "width": 7}},
    {"size": {"height": 8, "width": 5}, "do_center_crop": False, "resample": 2},
    {"size": {"shortest_edge": 9}, "crop_size": 8, "do_normalize": False},
    {"do_rescale": False, "image_mean": [1.0, 2.0, 3.0], "image_std": [4.0, 5.0, 6.0]},
)


@pytest.mark.parametrize("said", SAID, ids=lambda said: "-".join(said) or "plain")
@pytest.mark.parametrize("size", [(40, 40), (37, 90), (90, 37), (3, 5), (6, 6)], ids=str)
def test_pictures_are_prepared_as_by_transformers(said, size):
    processing = pytest.importorskip(
        "transformers.models.clip.image_processing_pil_clip", reason="pip install portlm[hf]"
    )
    own = {"size": {"shortest_edge": 6}, "crop_size": {"height": 6, "width": 6}}
    array = picture(*size)
    theirs = processing.CLIPImageProcessorPil(**own | said)(Image.fromarray(array), return_tensors="np")
    ours = Preprocessing.from_hf(own | said, 6)(array)
    # The same pixels; their values, up to 255, are scaled in another order.
    assert np.abs(ours - np.asarray(theirs["pixel_values"][0])).max() <= 1e-6 * max(1.0, np.abs(ours).max())


@pytest.mark.parametrize("ending", ["png", "ppm", "bmp"])
def test_a_file_gives_the_pixels_that_were_written(tmp_path, ending):
    array = picture(5, 7)
    Image.fromarray(array).save(tmp_path / f"a.{ending}")
    assert np.array_equal(open_picture(tmp_path / f"a.{ending}"), array)


def test_grey_and_transparent_pictures_become_three_colours(tmp_path):
    grey = picture(4, 4)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(open_picture(str(tmp_path / "grey.png")), np.stack([grey] * 3, axis=2))
    Image.fromarray(picture(4, 4)).convert("RGBA").save(tmp_path / "clear.png")
    assert np.array_equal(open_picture(tmp_path / "clear.png"), picture(4, 4))


def bomb(path, side):
    """Write a PNG whose header says that it is large, and nothing behind."""

    def chunk(body):
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = map(chunk, (header, b"IDAT" + zlib.compress(b""), b"IEND"))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 12_000, 60_000])
def test_a_small_file_of_many_pixels_is_refused_before_they_are_unpacked(tmp_path, side):
    bomb(tmp_path / "bomb.png", side)
    with pytest.raises(FormatError, match="a small file can unpack to more than memory holds"):
        open_picture(tmp_path / "bomb.png")


def test_what_is_no_picture_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(picture(30, 30)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    frames = [Image.fromarray(picture(4, 4, seed)) for seed in range(2)]
    frames[0].save(tmp_path / "two.png", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "other.gif")
    for name, words in (
        ("none.png", "there is no such picture"),
        (".", "is no file"),
        ("text.png", "is no picture of the kinds PNG"),
        ("other.gif", "is no picture of the kinds PNG"),
        ("cut.png", "cut.png: "),
        ("two.png", "holds 2 pictures: give a file with one"),
    ):
        with pytest.raises(FormatError, match=words) as caught:
            open_picture(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
    ids=["grey", "four channels", "floats", "empty"],
)  # fmt: skip
def test_an_array_of_other_channels_or_numbers_is_refused(wrong):
    with pytest.raises(UsageError, match=r"a picture in memory must be \(height, width, 3\) uint8"):
        open_picture(wrong)
    with pytest.raises(UsageError, match="the path of a file or an array"):
        open_picture(3)


def test_a_line_of_pixels_is_not_blown_up_without_end():
    with pytest.raises(UsageError, match="too narrow to be brought to 6 on its shorter side"):
        Preprocessing.of_size(6)(picture(1, 9000))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"surprise": 1}, "'surprise' is a key portlm does not know"),
        ({"do_resize": 1}, "do_resize must be true or false"),
        ({"resample": 9}, "resample must be one of"),
        ({"size": {"longest_edge": 3}}, "size must be shortest_edge"),
        ({"crop_size": {"height": 3}}, "crop_size must be"),
        ({"image_std": [1, 0, 1]}, "image_std holds 0"),
        ({"image_mean": [1, 2]}, "image_mean must be 3 finite numbers"),
        ({"rescale_factor": "x"}, "rescale_factor must be 1 finite number"),
        ({"rescale_factor": 10**400}, "rescale_factor must be 1 finite number"),
    ],
)
def test_preprocessing_that_is_not_done_here_is_refused_by_name(said, words):
    with pytest.raises(ConfigError, match=words):
        Preprocessing.from_hf(said, 6)


def test_preprocessing_is_read_where_transformers_writes_it(tmp_path):
    said = Preprocessing.from_hf({"size": 9, "crop_size": 8, "resample": 0}, 6)
    assert Preprocessing.from_hf(said.to_hf(), 6) == said
    assert Preprocessing.read(tmp_path, 6) == Preprocessing.of_size(6)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": said.to_hf()}))
    assert Preprocessing.read(tmp_path, 6) == said
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 7}))
    assert Preprocessing.read(tmp_path, 6).resize == (7,)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(FormatError, match=r"preprocessor_config\.json must hold a JSON object"):
        Preprocessing.read(tmp_path, 6)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="names no token that stands for a picture"):
        Pictures.read(tmp_path, 6)


# ---- captions ----------------------------------------------------------------------------------------------------


def test_captions_are_the_same_from_a_table_and_from_json(tmp_path):
    Image.fromarray(picture(3, 3)).save(tmp_path / "a.png")
    (tmp_path / "c.tsv").write_text("a.png\tone\na.png\twhat?\ttwo\n")
    lines = [{"image": "a.png", "text": "one"}, {"image": "a.png", "prompt": "what?", "text": "two", "id": 3}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expected = [Caption(tmp_path / "a.png", "one"), Caption(tmp_path / "a.png", "two", "what?")]
    assert read_captions(tmp_path / "c.tsv") == read_captions(tmp_path / "c.jsonl") == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.tsv", "a.png\n", "line 1: a picture, a tab and a text are wanted"),
        ("c.tsv", "a.png\tx\nb.png\ty\n", "line 2: there is no picture"),
        ("c.tsv", "../a.png\tx\n", "line 1: .* is refused"),
        ("c.tsv", "a.png\t \n", "line 1: the text is empty"),
        ("c.jsonl", '{"image": "a.png"}', 'line 1: an object with "image" and "text"'),
        ("c.jsonl", "x", "line 1: no JSON"),
    ],
)
def test_a_line_that_is_no_caption_is_named(tmp_path, name, text, words):
    Image.fromarray(picture(3, 3)).save(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(FormatError, match=words):
        read_captions(tmp_path / name)


def test_captions_of_another_kind_of_file_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"ends in \.tsv or \.jsonl"):
        read_captions(tmp_path / "c.csv")
