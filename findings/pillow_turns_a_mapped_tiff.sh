#!/usr/bin/env bash
# Pillow: an uncompressed grey TIFF file whose orientation turns it by a quarter is scrambled when it is opened by name, and right from a file object.
#
# Pillow turns TIFF pictures itself while loading, and gives their size already turned. Pixels of modes L, P, CMYK and I;16 in one uncompressed strip of a file
# opened by name are mapped into memory instead of read, and that mapping takes the turned size: rows of 6 pixels are cut into rows of 4 before the
# picture is turned. One would guess that how a file is opened does not change its pixels, and that a picture whose size is right is
# right. Sides are exchanged and pixels are in a wrong order, without an error or a warning. Opening a file object (no mapping), or clearing
# image.filename before load(), gives the right picture.
#
# Seen: pillow 13.0.0: by name 20 16 12 8 4 0 ... of size (6, 4), from a file object 18 12 6 0 ... of size (4, 6). Needs python3 with pip.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --no-deps --target "$folder/site" pillow==13.0.0
cat > "$folder/turn.py" <<'PY'
import sys

import PIL
from PIL import Image

path = sys.argv[1]
stored = Image.frombytes("L", (6, 4), bytes(range(24)))  # four rows: 0..5, 6..11, 12..17, 18..23
exif = Image.Exif()
exif[0x0112] = 6  # to be turned by a quarter, clockwise
stored.save(path, exif=exif)
print(PIL.__version__)
for opened in (path, open(path, "rb")):
    with Image.open(opened) as image:
        image.load()
        print(image.size, *image.tobytes())
PY
PYTHONPATH="$folder/site" python3 "$folder/turn.py" "$folder/turned.tiff" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
13.0.0
(6, 4) 20 16 12 8 4 0 21 17 13 9 5 1 22 18 14 10 6 2 23 19 15 11 7 3
(4, 6) 18 12 6 0 19 13 7 1 20 14 8 2 21 15 9 3 22 16 10 4 23 17 11 5
SEEN
echo "as seen before"
