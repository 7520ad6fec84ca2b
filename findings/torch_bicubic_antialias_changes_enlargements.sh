#!/usr/bin/env bash
# torch: antialias=True changes bicubic results where an image or a position table becomes larger, though there is nothing to smooth.
#
# Antialiasing widens the filter by the factor of the reduction, and for an enlargement that factor is 1. So one would guess that the flag is without effect
# there, as it is for "bilinear". For "bicubic" the two are different kernels: Keys' cubic with a = -0.75 without the flag (as
# OpenCV has it) and with a = -0.5 with it (as Pillow has it). Libraries of vision towers differ in the flag: transformers interpolates the position
# tables of DINOv2 and SigLIP without it, timm's resample_abs_pos_embed has it by default. So the same weights see a larger image with two different tables, 4 %
# apart below, and no shape tells.
#
# Seen: torch 2.13.0 on the CPU, as below. Needs python3 with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/enlarge.py" <<'PY'
import torch
from torch.nn.functional import interpolate

print("torch", torch.__version__.split("+")[0])
table = torch.linspace(0, 50, 64).sin().view(1, 1, 8, 8)
for mode in ("bilinear", "bicubic"):
    plain, smooth = (interpolate(table, size=(18, 18), mode=mode, antialias=flag) for flag in (False, True))
    print(f"{mode} 8 x 8 -> 18 x 18, largest value {plain.abs().max():.2f}, largest difference {(plain - smooth).abs().max():.2f}")
impulse = torch.zeros(1, 1, 1, 16)
impulse[..., 8] = 1
for flag in (False, True):
    row = interpolate(impulse, size=(1, 32), mode="bicubic", antialias=flag)[0, 0, 0, 13:17]
    print(f"an impulse twice as wide, antialias={flag}:", " ".join(f"{x:.4f}" for x in row))


def keys(x, a):
    x = abs(x)
    return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a


for a in (-0.75, -0.5):
    print(f"the cubic with a = {a}:", " ".join(f"{keys((i + 0.5) / 2 - 0.5 - 8, a):.4f}" for i in range(13, 17)))
PY
PYTHONPATH="$folder/site" python3 "$folder/enlarge.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torch 2.13.0
bilinear 8 x 8 -> 18 x 18, largest value 0.98, largest difference 0.00
bicubic 8 x 8 -> 18 x 18, largest value 1.03, largest difference 0.04
an impulse twice as wide, antialias=False: -0.0352 -0.1055 0.2617 0.8789
an impulse twice as wide, antialias=True: -0.0234 -0.0703 0.2266 0.8672
the cubic with a = -0.75: -0.0352 -0.1055 0.2617 0.8789
the cubic with a = -0.5: -0.0234 -0.0703 0.2266 0.8672
SEEN
echo "as seen before"
