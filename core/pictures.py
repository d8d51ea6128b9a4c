"""Pictures as a model takes them: read from a file, brought to its size, and normalised, as CLIP's are.

What is done to a picture is said by preprocessor_config.json beside the model, in the words of transformers'
CLIPImageProcessor, and where there is no such file it is what CLIP does, at the model's size. Files are read by Pillow,
which is imported when the first one is opened.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from portlm.arguments import shown
from portlm.errors import ConfigError, EngineUnavailableError, FormatError, UsageError
from portlm.files import read_json

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
PREPROCESSORS = (PREPROCESSOR, PROCESSOR)  # where transformers says it: 4 writes the first, 5 into the second
FORMATS = ("PNG", "PPM", "JPEG", "BMP")  # by Pillow's names
MAX_PIXELS = 1 << 26  # of a file: 200 MB as bytes of three colours
MAX_SIDE = 1 << 14  # to which a picture may be brought
MAX_BYTES = 1 << 28  # of a file
_LARGEST = 1e12  # number that colours are reckoned with
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", BICUBIC: "bicubic", 4: "box", 5: "hamming"}
# Keys that change nothing: what they name is how transformers loads and calls its class.
_HARMLESS = {
    "_valid_processor_keys", "data_format", "feature_extractor_type", "image_processor_type",
    "processor_class", "use_fast", "return_tensors", "input_data_format", "device", "disable_grouping",
    "default_to_square", "image_seq_length",
}  # fmt: skip

Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a picture, in this order.

    Attributes:
        resize: (height, width) to bring it to; (n,) brings its shorter side to n and keeps its shape; None does not.
        resample: How, a key of RESAMPLING.
        crop: (height, width) of the middle that is kept, with black around it where there is not so much; None for all.
        scale: What each value from 0 to 255 is multiplied by.
        mean: Subtracted from each colour then.
        std: What each colour is divided by then.
    """

    resize: tuple[int, ...] | None
    crop: tuple[int, int] | None
    resample: int = BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def of_size(cls, side: int) -> Self:
        """Return CLIP's, for a model that takes squares of so many pixels."""
        return cls((side,), (side, side))

    @classmethod
    def read(cls, folder: Path, side: int) -> Self:
        """Read what the folder of a model says that takes squares of so many pixels; CLIP's where it says nothing.

        Raises:
            FormatError: A file is damaged, or asks for what is not done here. The key is named.
        """
        for name in PREPROCESSORS:
            path = folder / name
            if not path.exists():
                continue
            data = read_json(path, max_bytes=1 << 20)
            if name == PROCESSOR and isinstance(data, dict):
                data = data.get("image_processor", {})
            if not isinstance(data, dict):
                raise FormatError(f"{path} must hold a JSON object")
            try:
                return cls.from_hf(data, side)
            except ConfigError as error:
                raise FormatError(f"{path}: {error}") from error
        return cls.of_size(side)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], side: int) -> Self:
        """Read the contents of a preprocessor_config.json, strictly.

        Raises:
            ConfigError: A key is unknown, or has a value that cannot be.
        """
        known = {"size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std"}
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
        if unknown := sorted(data.keys() - known - {*steps} - _HARMLESS):
            raise ConfigError(
                f"{shown(unknown[0])} is a key portlm does not know: remove it if it changes nothing"
            )
        does = {}
        for key in steps:
            does[key] = True if data.get(key) is None else data[key]
            if not isinstance(does[key], bool):
                raise ConfigError(f"{key} must be true or false, got {shown(does[key])}")
        resample = BICUBIC if data.get("resample") is None else data["resample"]
        if type(resample) is not int or resample not in RESAMPLING:
            raise ConfigError(
                f"resample must be one of {', '.join(map(str, RESAMPLING))}, got {shown(resample)}"
            )
        scale = 1 / 255 if data.get("rescale_factor") is None else data["rescale_factor"]
        found = cls(
            resize=_extent("size", data.get("size"), side) if does["do_resize"] else None,
            crop=_crop(data.get("crop_size"), side) if does["do_center_crop"] else None,
            resample=resample,
            scale=_numbers("rescale_factor", [scale], 1)[0] if does["do_rescale"] else 1.0,
            mean=_numbers("image_mean", data.get("image_mean") or CLIP_MEAN)
            if does["do_normalize"]
            else (0.0,) * 3,
            std=_numbers("image_std", data.get("image_std") or CLIP_STD)
            if does["do_normalize"]
            else (1.0,) * 3,
        )
        if not all(found.std):
            raise ConfigError("image_std holds 0, by which nothing can be divided")
        return found

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a preprocessor_config.json that transformers reads."""
        size = self.resize or ()
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": self.resize is not None,
            "size": dict(
                zip(("shortest_edge",) if len(size) == 1 else ("height", "width"), size, strict=False)
            ),
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "crop_size": dict(zip(("height", "width"), self.crop or (), strict=False)),
            "do_rescale": True,
            "rescale_factor": self.scale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def __call__(self, picture: Any) -> Pixels:
        """Return the pixels (3, H, W) float32 of a picture.

        Args:
            picture: The path of a file, or (H, W, 3) uint8: rows of red, green and blue.

        Raises:
            FormatError: The file cannot be read, is no picture, or too large a one.
            UsageError: It is neither a path nor such an array.
            EngineUnavailableError: Pillow is not installed, and it is a file, or one that must be resized.
        """
        values = self._cropped(self._resized(open_picture(picture))).astype(np.float32)
        mean, std = (np.array(each, np.float32) for each in (self.mean, self.std))
        scaled = (values * np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(scaled.transpose(2, 0, 1))

    def _resized(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if self.resize is None:
            return values
        height, width = values.shape[:2]
        if len(self.resize) == 1:
            (n,) = self.resize
            longer = int(n * max(height, width) / min(height, width))
            size = (n, longer) if height <= width else (longer, n)
            if longer > MAX_SIDE:
                raise UsageError(
                    f"the picture is {width} x {height} pixels, too narrow to be brought to {n} on its shorter side"
                )
        else:
            size = (self.resize[0], self.resize[1])
        if size == (height, width):
            return values
        image = _pillow().fromarray(values).resize((size[1], size[0]), resample=self.resample)
        return np.asarray(image)

    def _cropped(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if self.crop is None:
            return values
        for axis, wanted in enumerate(self.crop):
            before = (values.shape[axis] - wanted) // 2
            if before < 0:
                missing = wanted - values.shape[axis]
                room = [(0, 0)] * 3
                room[axis] = (math.ceil(missing / 2), missing // 2)
                values = np.pad(values, room)
            else:
                values = values.take(range(before, before + wanted), axis=axis)
        return values


@dataclass(frozen=True)
class Pictures:
    """How a model is shown pictures.

    Attributes:
        token_id: Of the token that stands for one in a prompt.
        prepare: Makes pixels of one.
    """

    token_id: int
    prepare: Preprocessing

    @classmethod
    def read(cls, folder: Path, side: int) -> Self:
        """Read what config.json and preprocessor_config.json of a model's folder say.

        Raises:
            FormatError: One of them is damaged, or config.json names no token.
        """
        data = read_json(folder / "config.json", max_bytes=1 << 20)
        token = data.get("image_token_index", data.get("image_token_id")) if isinstance(data, dict) else None
        if type(token) is not int or token < 0:
            raise FormatError(
                f"{folder / 'config.json'} names no token that stands for a picture: image_token_index"
            )
        return cls(token, Preprocessing.read(folder, side))


def open_picture(picture: Any) -> npt.NDArray[np.uint8]:
    """Return a picture as (H, W, 3) uint8: a file's first and only, or the array itself.

    Raises:
        FormatError, UsageError, EngineUnavailableError: As Preprocessing.__call__.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise UsageError(
                "a picture in memory must be (height, width, 3) uint8, red, green and blue from 0 to 255, got "
                f"{shown(picture)}"
            )
        if picture.shape[0] * picture.shape[1] > MAX_PIXELS:
            raise UsageError(f"a picture has at most {MAX_PIXELS} pixels, got {shown(picture)}")
        return picture
    if not isinstance(picture, str | Path):
        raise UsageError(
            f"a picture is the path of a file or an array (height, width, 3), got {shown(picture)}"
        )
    path = Path(picture)
    try:
        if not path.is_file():
            raise FormatError(f"{path}: {'is no file' if path.exists() else 'there is no such picture'}")
        if path.stat().st_size > MAX_BYTES:
            raise FormatError(f"{path}: more than {MAX_BYTES} bytes, which no picture here may have")
        return _read(path)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as a picture: {error}") from error


def _read(path: Path) -> npt.NDArray[np.uint8]:
    pillow = _pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a large picture, which is refused below, and of odd metadata
        try:
            opened = pillow.open(path, formats=FORMATS)
        except pillow.UnidentifiedImageError as error:
            raise FormatError(f"{path}: is no picture of the kinds {', '.join(FORMATS)}") from error
        except pillow.DecompressionBombError as error:
            raise FormatError(f"{path}: {_too_large()}") from error
        with opened as image:
            if image.width * image.height > MAX_PIXELS:  # before a pixel is unpacked
                raise FormatError(f"{path}: {image.width} x {image.height} pixels: {_too_large()}")
            if getattr(image, "n_frames", 1) > 1:
                raise FormatError(f"{path}: holds {image.n_frames} pictures: give a file with one")
            try:
                return np.array(image.convert("RGB"))
            except SyntaxError as error:  # Pillow's word for a broken PNG
                raise FormatError(f"{path}: is damaged: {error}") from error


def _too_large() -> str:
    return (
        f"a picture has at most {MAX_PIXELS} pixels, since a small file can unpack to more than memory holds"
    )


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise EngineUnavailableError(
            "pictures are read by Pillow, which is not installed: pip install portlm[image]"
        ) from error
    return Image


def _extent(key: str, value: Any, side: int) -> tuple[int, ...]:
    """What a size says: {"shortest_edge": n} or a number, or {"height": h, "width": w}."""
    if value is None:
        return (side,)
    if isinstance(value, dict):
        named = [value.get(name) for name in ("height", "width")]
        sizes: list[Any] = [value["shortest_edge"]] if set(value) == {"shortest_edge"} else named
    else:
        sizes = [value]
    if not all(type(size) is int and 1 <= size <= MAX_SIDE for size in sizes):
        raise ConfigError(
            f"{key} must be shortest_edge, or height and width, from 1 to {MAX_SIDE}, got {shown(value)}"
        )
    return tuple(sizes)


def _crop(value: Any, side: int) -> tuple[int, int]:
    sizes = _extent("crop_size", value, side)
    return sizes[0], sizes[-1]


def _numbers(key: str, values: Any, count: int = 3) -> tuple[float, ...]:
    fits = isinstance(values, list | tuple) and len(values) == count
    if not fits or not all(type(v) in (int, float) and -_LARGEST <= v <= _LARGEST for v in values):
        raise ConfigError(f"{key} must be {count} finite number{'s' * (count > 1)}, got {shown(values)}")
    return tuple(map(float, values))
