"""What an image file holds beside the first plane of pixels: applied, or refused by name. Files are made here, byte by byte."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from comp.data.decode import to_rgb
from comp.data.encode import load_image
from comp.data.images import prepare_image
from comp.data.records import BadSampleError

PAGE = np.zeros((32, 48))
PAGE[10:14] = 1  # a line


def tiff(path, pixels, *tags, bits=8, photometric=1, big=False):
    """One strip without compression; `pixels` are an array or bytes of 4 rows of 6, `tags` are (number, type, value)."""
    order, data = (">", bytes(pixels)) if big else ("<", bytes(pixels))
    height, width = getattr(pixels, "shape", (4, 6))
    tags = {n: (n, kind, value) for n, kind, value in tags}
    basic = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height}
    tags = {n: (n, 3, value) for n, value in basic.items()} | {273: (273, 4, 8), 279: (279, 4, len(data))} | tags
    entries = b""
    for n, kind, value in sorted(tags.values()):
        entries += struct.pack(order + "HHI", n, kind, 1) + struct.pack(
            order + ("HH" if kind == 3 else "I"), value, *[0] * (kind == 3)
        )
    head = struct.pack(order + "2sHI", b"MM" if big else b"II", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4))
    return path


def png(path, depth, colour_type, rows, *chunks, width=4):
    """A PNG file of `rows` of bytes, with further chunks (name, data) before the pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    more = b"".join(chunk(*c) for c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + more + pixels + chunk(b"IEND", b""))
    return path


def pixels(path):
    """The picture of a file as [h, w, 3]."""
    return np.asarray(load_image(str(path), "s")).astype(int)


def colour(path):
    """The one colour of a file."""
    found = pixels(path)
    assert (found == found[0, 0]).all()
    return found[0, 0].tolist()


def refusal(path):
    with pytest.raises(BadSampleError) as caught:
        load_image(str(path), "s")
    assert str(caught.value).startswith(f"s: image {path}: ")
    return str(caught.value)


# --- pages and frames ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two.tiff", "two.gif", "two.png", "two.webp", "two.avif"])
def test_files_of_several_pictures_are_refused(tmp_path, name):
    if name.endswith(("webp", "avif")) and not features.check(name[4:]):
        pytest.skip(f"this Pillow has no {name[4:]}")
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    red.save(tmp_path / name, save_all=True, append_images=[blue])
    assert "the file holds 2" in refusal(tmp_path / name)
    red.save(tmp_path / name)
    assert pixels(tmp_path / name)[..., 0].mean() > 240, "one picture is read"


def test_a_photo_with_a_second_view_is_one_picture(tmp_path):
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (20, 15), "blue")
    red.save(tmp_path / "photo.mpo", save_all=True, append_images=[blue])
    assert pixels(tmp_path / "photo.mpo").shape == (30, 40, 3) and colour(tmp_path / "photo.mpo")[0] > 250


def test_smaller_copies_in_a_tiff_are_no_pages(tmp_path):
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (20, 15), "blue")
    for subfile, outcome in ((1, "read"), (4, "transparency mask of another"), (2, "holds 2 pages")):
        blue.encoderinfo = {"tiffinfo": {254: subfile}}
        red.save(tmp_path / "copies.tiff", save_all=True, append_images=[blue])
        if outcome == "read":
            assert colour(tmp_path / "copies.tiff") == [255, 0, 0]
        else:
            assert outcome in refusal(tmp_path / "copies.tiff")
    tiff(tmp_path / "small.tiff", PAGE.astype("u1"), (254, 4, 1))
    assert "page 0 of the file is a smaller copy" in refusal(tmp_path / "small.tiff")


# --- grey ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(("kind", "bits"), [("u1", 8), ("<u2", 16)])
def test_white_is_zero(tmp_path, kind, bits, photometric):
    page = 1 - PAGE if photometric else PAGE
    path = tiff(tmp_path / "page.tiff", (page * (2**bits - 1)).astype(kind), bits=bits, photometric=photometric)
    assert np.array_equal(pixels(path)[..., 1], 255 * (1 - PAGE))


def test_deep_grey_uses_its_range(tmp_path):
    assert colour(tiff(tmp_path / "12.tiff", b"\xff" * 36, bits=12)) == [255] * 3, "4095 is white"
    assert colour(tiff(tmp_path / "16.tiff", np.full((4, 6), 257 * 90, ">u2"), bits=16, big=True)) == [90] * 3
    (tmp_path / "16.pgm").write_bytes(b"P5 4 2 65535\n" + b"\x80\x80" * 8)
    (tmp_path / "10.pgm").write_bytes(b"P5 4 2 1023\n" + b"\x03\xff" * 8)
    assert colour(tmp_path / "16.pgm") == [128] * 3 and colour(tmp_path / "10.pgm") == [255] * 3
    assert colour(png(tmp_path / "rgb16.png", 16, 2, [b"\x80\x80" * 12])) == [128] * 3
    assert colour(png(tmp_path / "2.png", 2, 0, [b"\x55"] * 2)) == [85] * 3


@pytest.mark.parametrize(("kind", "bits", "sample_format"), [("i1", 8, 2), ("<i2", 16, 2), ("<f4", 32, 3), ("<u4", 32, 1)])
def test_samples_without_a_fixed_range_are_refused(tmp_path, kind, bits, sample_format):
    path = tiff(tmp_path / "odd.tiff", np.ones((4, 6), kind), (339, 3, sample_format), bits=bits)
    assert "fixed range" in refusal(path)


# --- orientation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["u1", "<u2"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_grey_tiff_files_are_turned(tmp_path, kind, photometric, orientation, turns):
    """Pillow scrambles them where it maps the file into memory: findings/pillow_turns_a_mapped_tiff.sh."""
    shades = np.arange(24).reshape(4, 6) * 10
    stored = shades if kind == "u1" else shades * 257
    bits = 8 if kind == "u1" else 16
    path = tiff(tmp_path / "turned.tiff", stored.astype(kind), (274, 3, orientation), bits=bits, photometric=photometric)
    expected = np.rot90(shades if photometric else 255 - shades, turns)
    assert np.array_equal(pixels(path)[..., 0], expected)


@pytest.mark.parametrize("name", ["e.jpg", "e.png", "e16.png", "e.webp", "e.tiff", "e.mpo"])
def test_files_are_turned_once(tmp_path, name):
    image = Image.fromarray(np.zeros((16, 40), np.uint16)) if "16" in name else Image.new("RGB", (40, 16))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / name, exif=exif, **(dict(save_all=True, append_images=[image]) if "mpo" in name else {}))
    assert pixels(tmp_path / name).shape == (40, 16, 3)


# --- transparency ----------------------------------------------------------------------------------------------------------


def test_transparent_parts_are_white(tmp_path):
    clear = {
        "rgba.png": (Image.new("RGBA", (8, 8), (9, 9, 9, 0)), {}),
        "rgba.tiff": (Image.new("RGBA", (8, 8), (9, 9, 9, 0)), {}),
        "rgba.gif": (Image.new("RGBA", (8, 8), (9, 9, 9, 0)), {}),
        "palette.png": (Image.new("RGBA", (8, 8), (9, 9, 9, 0)).quantize(4), {}),
        "la.png": (Image.new("LA", (8, 8), (9, 0)), {}),
        "l.png": (Image.new("L", (8, 8), 9), dict(transparency=9)),
        "1.png": (Image.new("1", (8, 8), 0), dict(transparency=0)),
        "rgb.png": (Image.new("RGB", (8, 8), (1, 2, 3)), dict(transparency=(1, 2, 3))),
        "deep.png": (Image.fromarray(np.full((8, 8), 777, np.uint16)), dict(transparency=777)),
    }
    for name, (image, options) in clear.items():
        image.save(tmp_path / name, **options)
        assert colour(tmp_path / name) == [255] * 3, name
    Image.fromarray(np.full((8, 8), 777, np.uint16)).save(tmp_path / "deep.png", transparency=778)
    assert colour(tmp_path / "deep.png") == [3] * 3


@pytest.mark.parametrize(("depth", "row", "level"), [(2, b"\x55", 1), (4, b"\x77\x77", 7)])
def test_a_transparent_level_counts_in_the_file_s_levels(tmp_path, depth, row, level):
    assert colour(png(tmp_path / "clear.png", depth, 0, [row], (b"tRNS", struct.pack(">H", level)))) == [255] * 3
    opaque = png(tmp_path / "opaque.png", depth, 0, [row], (b"tRNS", struct.pack(">H", level - 1)))
    assert colour(opaque) == [level * 255 // (2**depth - 1)] * 3


@pytest.mark.parametrize("value", [200, 40000])
def test_a_transparent_colour_of_16_bits_is_refused(tmp_path, value):
    path = png(tmp_path / "c.png", 16, 2, [struct.pack(">H", value) * 12], (b"tRNS", struct.pack(">H", value) * 3))
    assert "store an alpha channel" in refusal(path)


def test_colours_that_were_multiplied_by_alpha():
    image = Image.new("RGBA", (2, 2), (200, 100, 50, 128))
    straight = np.asarray(to_rgb(image)).astype(int)
    assert straight[0, 0].tolist() == [227, 177, 152]
    assert np.abs(np.asarray(to_rgb(image.convert("RGBa"))).astype(int) - straight).max() <= 1


# --- colours ---------------------------------------------------------------------------------------------------------------


def wide_gamut():
    """An ICC profile whose red, green and blue are those of sRGB in another order: what it does cannot be missed."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    entries = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, blue = (bytes(data[entries[tag] + 4 : entries[tag] + 12]) for tag in (b"rXYZ", b"bXYZ"))
    data[entries[b"rXYZ"] + 4 : entries[b"rXYZ"] + 12], data[entries[b"bXYZ"] + 4 : entries[b"bXYZ"] + 12] = blue, red
    return bytes(data).replace("sRGB".encode("utf-16-be"), "xBGR".encode("utf-16-be"))


@pytest.mark.parametrize("name", ["icc.png", "icc.jpg", "icc.tiff", "icc.webp", "alpha.png", "palette.png"])
def test_icc_profiles_are_applied(tmp_path, name):
    image = Image.new("RGBA" if "alpha" in name else "RGB", (16, 16), "red")
    if "palette" in name:
        image = image.quantize(4)
    image.save(tmp_path / name, icc_profile=wide_gamut())
    assert np.abs(np.array(colour(tmp_path / name)) - (0, 0, 255)).max() <= 8, "its red is our blue"


def test_profiles_of_srgb_and_those_that_cannot_be_applied_change_nothing(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number, profile in enumerate((srgb, b"no profile", wide_gamut()[:200])):
        Image.new("RGB", (8, 8), (10, 200, 30)).save(tmp_path / f"{number}.png", icc_profile=profile)
        assert colour(tmp_path / f"{number}.png") == [10, 200, 30]
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png", icc_profile=wide_gamut())
    assert colour(tmp_path / "grey.png") == [77] * 3, "a profile of RGB says nothing about grey"


@pytest.mark.parametrize(("gamma", "shade"), [(100000, 186), (45455, 128), (0, 128), (50000, 136)])
def test_png_gamma(tmp_path, gamma, shade):
    """128 / 255 of linear light is 186 on a display of 2.2: 255 * (128 / 255) ** (1 / 2.2)."""
    path = png(tmp_path / "g.png", 8, 2, [b"\x80" * 12], (b"gAMA", struct.pack(">I", gamma)))
    assert colour(path) == [shade] * 3
    path = png(tmp_path / "g.png", 8, 2, [b"\x80" * 12], (b"gAMA", struct.pack(">I", gamma)), (b"sRGB", b"\0"))
    assert colour(path) == [128] * 3, "sRGB counts more"


def test_cmyk(tmp_path):
    for name in ("c.jpg", "c.tiff"):
        Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / name)
        assert np.abs(np.array(colour(tmp_path / name)) - (255, 0, 0)).max() <= 2


# --- size, and what comes out ----------------------------------------------------------------------------------------------


def test_large_pictures_are_refused_before_they_are_decoded(tmp_path):
    Image.new("L", (40, 30)).save(tmp_path / "large.png")
    data = (tmp_path / "large.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: data.index(b"IDAT") + 6])  # decoding it would fail with another message
    for name in ("large.png", "cut.png"):
        with pytest.raises(BadSampleError, match=rf"s: image .*{name}: .*40 x 30 pixels exceed max_image_pixels 1199"):
            load_image(str(tmp_path / name), "s", 1199)
    assert load_image(str(tmp_path / "large.png"), "s", 1200).size == (40, 30)
    with pytest.raises(ValueError, match="40 x 30 pixels exceed max_image_pixels 1199"):
        prepare_image(
            Image.open(tmp_path / "large.png"), patch_size=4, merge_size=2, mean=(0,) * 3, std=(1,) * 3, max_pixels=1199
        )


def test_the_picture_given_is_left_as_it_was():
    data = io.BytesIO()
    Image.new("L", (8, 8), 9).save(data, "PNG", transparency=9)
    given = Image.open(data)
    assert to_rgb(given).info == {} and given.info == {"transparency": 9} and given.mode == "L"
    plain = Image.new("RGB", (8, 8))
    assert to_rgb(plain) is plain, "nothing is copied twice"
