#!/usr/bin/env bash
# datasets: a picture that was opened by name and then changed in place is stored as it was before; one from bytes is made a JPEG again, of quality 75.
#
# Pillow changes pictures in place with thumbnail, paste, putalpha, ImageDraw and exif_transpose(in_place=True): boxes drawn for a model to read,
# faces blacked out, sizes cut. One would guess that the Image feature stores the pixels it is handed, as it does for arrays. It looks for
# the attribute `filename`, which such a picture still has, and stores the path alone: the thumbnail is large again, and what was
# blacked out is back. The same within Dataset.map where the data set holds paths. copy(), convert and resize drop the name. A picture from bytes
# still knows its format, and is stored as a JPEG in Pillow's quality of 75, whatever it had; a copy of it is stored as PNG.
#
# Seen: datasets 5.2.0, pillow 13.0.0, as below. Needs python3 with pip, 400 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# dill pickles modules that lie in no "site-packages", and fails.
python3 -m pip install --quiet --target "$folder/site-packages" datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
cat > "$folder/pictures.py" <<'PY'
import io
from importlib.metadata import version

import numpy as np
from datasets import Dataset, Image, disable_progress_bars
from PIL import Image as Pillow

print("datasets", version("datasets"), "pillow", version("pillow"))
disable_progress_bars()
noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
Pillow.fromarray(noise).save("photo.jpg", quality=95)


def stored(name, image):
    data = Dataset.from_dict({"image": [image]})
    raw = data.cast_column("image", Image(decode=False))[0]["image"]
    back, pixels = data[0]["image"], np.asarray(image).astype(int)
    same = back.size == image.size and not np.any(pixels - np.asarray(back))
    print(f"{name}: {image.size} {image.getpixel((0, 0))} is stored as {back.size}, equal {same}, {'path' if raw['path'] else back.format}")


thumbnail, black, copied = (Pillow.open("photo.jpg") for _ in range(3))
thumbnail.thumbnail((16, 16))
for image in (black, copied):
    image.paste((0, 0, 0), (0, 0, 64, 64))
stored("thumbnail", thumbnail)
stored("blacked out", black)
stored("blacked out, copy()", copied.copy())
from_bytes = Pillow.open(io.BytesIO(open("photo.jpg", "rb").read()))
stored("from bytes", from_bytes)
stored("from bytes, copy()", from_bytes.copy())


def black_out(example):
    example["image"].paste((0, 0, 0), (0, 0, 64, 64))
    return example


data = Dataset.from_dict({"image": ["photo.jpg"]}).cast_column("image", Image())
print("blacked out by map: largest pixel", np.asarray(data.map(black_out)[0]["image"]).max())
PY
cd "$folder" && HF_HOME="$folder/home" HF_HUB_OFFLINE=1 PYTHONPATH="$folder/site-packages" python3 pictures.py | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
datasets 5.2.0 pillow 13.0.0
thumbnail: (16, 16) (123, 134, 142) is stored as (64, 64), equal False, path
blacked out: (64, 64) (0, 0, 0) is stored as (64, 64), equal False, path
blacked out, copy(): (64, 64) (0, 0, 0) is stored as (64, 64), equal True, PNG
from bytes: (64, 64) (75, 141, 189) is stored as (64, 64), equal False, JPEG
from bytes, copy(): (64, 64) (75, 141, 189) is stored as (64, 64), equal True, PNG
blacked out by map: largest pixel 255
SEEN
echo "as seen before"
