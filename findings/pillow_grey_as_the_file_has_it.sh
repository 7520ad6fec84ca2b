#!/usr/bin/env bash
# Pillow: grey of 1 to 8 bits comes as 0 (black) to 255 (white) whatever the file says, grey of 12 and 16 bits comes as the file has it, and so does a transparent level.
#
# A TIFF file may say that white is zero (tag 262). Pillow turns such grey round up to 8 bits, and not at 16: scans of documents come as
# negatives, in mode I;16, without a warning. 12 bits also come as I;16, and white is 4095 there. One would guess that one mode has one meaning. In PNG files
# of 2 and 4 bits the levels are spread to 0 .. 255, and info["transparency"] still counts in the file's own 4 or 16: of 4 bits, level 7 is pixel 119, and convert("RGBA") looks
# for 7, so nothing is transparent.
#
# Seen: pillow 13.0.0, as below. Needs python3 with pip.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --no-deps --target "$folder/site" pillow==13.0.0
cat > "$folder/grey.py" <<'PY'
import io
import struct
import zlib

import PIL
from PIL import Image


def tiff(bits, pixels, photometric):
    """A picture of 4 x 1 in one strip, little endian."""
    tags = [(256, 4), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1), (279, len(pixels))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def png(depth, row, transparent):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, 0, 0, 0, 0)) + chunk(b"tRNS", struct.pack(">H", transparent))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


print(PIL.__version__)
print("white is zero, all pixels 0:")
for bits, pixels in ((1, b"\0"), (4, bytes(2)), (8, bytes(4)), (16, bytes(8))):
    image = Image.open(io.BytesIO(tiff(bits, pixels, 0)))
    print(f"  {bits} bits: mode {image.mode}, pixel {image.getpixel((0, 0))}")
image = Image.open(io.BytesIO(tiff(12, b"\xff" * 6, 1)))
print(f"black is zero, 12 bits, all ones: mode {image.mode}, pixel {image.getpixel((0, 0))}")
image = Image.open(io.BytesIO(png(4, b"\x77", 7)))
print(f"PNG of 4 bits, level 7 transparent: {image.info}, pixel {image.getpixel((0, 0))}, as RGBA {image.convert('RGBA').getpixel((0, 0))}")
PY
PYTHONPATH="$folder/site" python3 "$folder/grey.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
13.0.0
white is zero, all pixels 0:
  1 bits: mode 1, pixel 255
  4 bits: mode L, pixel 255
  8 bits: mode L, pixel 255
  16 bits: mode I;16, pixel 0
black is zero, 12 bits, all ones: mode I;16, pixel 4095
PNG of 4 bits, level 7 transparent: {'transparency': 7}, pixel 119, as RGBA (119, 119, 119, 255)
SEEN
echo "as seen before"
