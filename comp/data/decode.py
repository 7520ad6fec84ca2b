"""From an image file, or a Pillow image, to one upright picture in 8-bit sRGB; what a file holds besides is applied or refused.

Pillow gives the first plane of pixels as the file stores it. The rest of what a file means is up to the caller: pages and
frames, the sense and range of deep grey, transparency, orientation, and colour profiles.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from ..config import MAX_PIXELS

# Several pictures in one file that show one: a photo with a preview, a gain map or a second view; layers behind their sum.
_ONE_PICTURE = ("MPO", "PSD")
# Formats whose 16-bit grey uses the whole range; None: a picture made in memory.
_FULL_RANGE = ("PNG", "TIFF", "JPEG2000", "PPM", None)
_DISPLAY_GAMMA = 2.2  # of sRGB, as the gAMA chunk of PNG counts
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT, _SUBFILE, _OLD_SUBFILE = 262, 258, 339, 254, 255  # tags of TIFF
_REDUCED, _MASK = 1, 4  # bits of _SUBFILE


def to_rgb(image: Image.Image, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """One upright picture of mode RGB, without metadata; the table in docs/training.md says what is read how.

    It applies EXIF orientation, ICC profiles and PNG's gamma (towards sRGB), transparency (on white), and the sense and range
    of grey of 12 and 16 bits. Raises ValueError for more than `max_pixels` pixels, before they are decoded, for files of
    several pages or frames, and for pixels without a fixed range (32-bit integers, floats, signed samples).
    """
    if type(image) is Image.Image and image.mode == "RGB" and not image.info and not image.getexif():
        return image  # comes from here
    _check_size(image, max_pixels)
    _check_single(image)
    rawmode = _rawmode(image)
    _load(image)
    _check_size(image, max_pixels)  # icons hold files of their own
    file_format, tags = image.format, image.tag_v2 if isinstance(image, TiffImageFile) else {}
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey_of_8_bits(image, file_format, tags)
    image, alpha = _split_alpha(image, rawmode)
    image = _to_srgb(image)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    image.info = {}
    return image


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels exceed max_image_pixels {max_pixels}")


def _check_single(image: Image.Image) -> None:
    if image.format in _ONE_PICTURE:
        return
    if isinstance(image, TiffImageFile):
        count, kind = _tiff_pages(image), "pages"
    else:
        count, kind = getattr(image, "n_frames", 1), "frames"
    if count > 1:
        raise ValueError(f"the file holds {count} {kind}, and a picture is one; store each by itself")


def _tiff_pages(image: TiffImageFile) -> int:
    """Pages of a TIFF file that are no smaller copies of others."""
    subfiles = []
    current = image.tell()
    for page in range(image.n_frames):
        image.seek(page)
        tags = image.tag_v2
        subfiles.append(_REDUCED if tags.get(_OLD_SUBFILE) == 2 else int(tags.get(_SUBFILE, 0)))
    image.seek(current)
    if any(kind & _MASK for kind in subfiles):
        raise ValueError("a page of the file is the transparency mask of another, which is not served")
    if subfiles[current] & _REDUCED:
        raise ValueError(f"page {current} of the file is a smaller copy of a picture that Pillow does not reach")
    return sum(not kind & _REDUCED for kind in subfiles)


def _rawmode(image: Image.Image) -> str:
    """How the file stores its pixels, in Pillow's words; "" where that is not known (any more)."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _load(image: Image.Image) -> None:
    """Pillow maps uncompressed TIFF files that it opened by name into memory, with the sides of the picture already turned:
    grey pixels are scrambled where EXIF turns by a quarter (findings/pillow_turns_a_mapped_tiff.sh)."""
    if not isinstance(image, TiffImageFile) or not image.filename:
        image.load()
        return
    name, image.filename = image.filename, ""  # read, not mapped
    try:
        image.load()
    finally:
        image.filename = name


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says."""
    return image if image.getexif().get(ExifTags.Base.Orientation, 1) == 1 else ImageOps.exif_transpose(image)


def _grey_of_8_bits(image: Image.Image, file_format: str | None, tags: Mapping[int, Any]) -> Image.Image:
    """Grey of 12 or 16 bits as L, or LA where one shade is transparent. tags: of a TIFF file, else none."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PPM")
    if not deep or file_format not in _FULL_RANGE:
        raise ValueError(f"pixels of mode {image.mode} have no fixed range; store 8 or 16 bits per channel")
    values = np.asarray(image).astype(np.uint32)
    largest = 4095 if tags.get(_BITS) in (12, (12,)) else 65535
    grey = ((values * 255 + largest // 2) // largest).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero: Pillow turns 8 bits round, not 16
        grey = 255 - grey
    result = Image.fromarray(grey)
    transparent = image.info.get("transparency")
    if transparent is not None:
        alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        result = Image.merge("LA", (result, alpha))
    result.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return result


def _split_alpha(image: Image.Image, rawmode: str) -> tuple[Image.Image, Image.Image | None]:
    """Colours (L, RGB, CMYK) and alpha; None: opaque."""
    if getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, 1) not in (1, (1,), (1,) * len(image.getbands())):
        raise ValueError("signed samples have no fixed range; store unsigned ones")
    if not image.has_transparency_data:
        return image if image.mode in ("L", "RGB", "CMYK") else _converted(image, "RGB"), None
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and (rawmode.startswith("RGB;16") or max(transparent) > 255):
        raise ValueError("a transparent colour of 16 bits per channel is not served; store an alpha channel")
    if rawmode in ("L;2", "L;4") and isinstance(transparent, int):  # counted in the file's levels, pixels in 0 .. 255
        image = image.copy()
        image.info["transparency"] = transparent * (85 if rawmode == "L;2" else 17)
    is_grey = image.mode in ("L", "LA", "La")
    if image.mode in ("La", "RGBa"):  # colours were multiplied by alpha
        image = image.convert(image.mode.upper())
    image = image.convert("LA" if is_grey else "RGBA")
    return _converted(image, "L" if is_grey else "RGB"), image.getchannel("A")


def _converted(image: Image.Image, mode: str) -> Image.Image:
    converted = image.convert(mode)
    converted.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return converted


def _to_srgb(image: Image.Image) -> Image.Image:
    """RGB from L, RGB or CMYK, by the profile or the gamma of the file. A profile that cannot be read, or is for pixels of
    another kind, counts as none, as in browsers."""
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma")
    transform = _profile_transform(profile, image.mode) if profile else None
    if transform is not None:
        return transform.apply(image)
    rgb = image.convert("RGB")
    if not profile and "srgb" not in image.info and isinstance(gamma, float) and gamma > 0:
        exponent = 1 / (gamma * _DISPLAY_GAMMA)
        if abs(exponent - 1) > 0.05:  # libpng's threshold (PNG_GAMMA_THRESHOLD)
            rgb = rgb.point([round(255 * (level / 255) ** exponent) for level in range(256)] * 3)
    return rgb


@lru_cache(maxsize=64)
def _profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From an ICC profile to sRGB; None where nothing is to be done: the profile is sRGB, damaged, or for other pixels."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
