#!/usr/bin/env bash
# datasets: with_format("numpy") gives columns of float64 as float32, and map writes them back: a column that says float64 loses half of its digits.
#
# "numpy" has float64, and one would guess that a format changes the container and not the numbers; a single row even gives a float64. Lists, whole columns and batches
# come as float32 ("torch" gives float32 as well, rows included). map hands such batches to the function and writes what it returns into columns of the old type: seconds since 1970
# are rounded to 128 seconds, metres of a map to half a metre, ids kept as floats change; the schema still says float64. A function that returns its batch, or
# one other key, decides: columns it does not return keep their digits, so a quick look at another column is fine. Integers with a missing value become float32 and
# lose their digits above 16777216 alike. with_format("numpy", dtype=np.float64) and a format of None or "arrow" during map are right.
#
# Seen: datasets 5.2.0 with NumPy 2.4.6, as below; its issue 5517 has the columns. Needs python3.11 or newer with pip.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# dill pickles modules that lie in no "site-packages", and fails.
python3 -m pip install --quiet --target "$folder/site-packages" datasets==5.2.0 pyarrow==26.0.1 numpy==2.4.6
cat > "$folder/digits.py" <<'PY'
import datasets
import numpy as np

print("datasets", datasets.__version__)
datasets.disable_progress_bars()
COLUMNS = {"time": [1700000050.25, 1700000051.5], "place": [[500000.12, 4649776.46], [1.0, 2.0]], "id": [16777217, None]}
plain = datasets.Dataset.from_dict(COLUMNS)
formatted = {"numpy": plain.with_format("numpy"), "numpy, dtype float64": plain.with_format("numpy", dtype=np.float64), "None": plain}
for name, data in formatted.items():
    one, column = data[0]["time"], data["time"][:]
    print(f"{name}: time of a row {one!r}, of the column {getattr(column, 'dtype', 'a list')}, place of a row {getattr(data[0]['place'], 'dtype', 'a list')}")
    mapped = {
        "batches as they came": data.map(lambda batch: batch, batched=True),
        "rows as they came": data.map(lambda row: row),
        "rows, time alone returned": data.map(lambda row: {"time": row["time"]}),
        "filter": data.filter(lambda row: True),
    }
    for way, result in mapped.items():
        result = result.with_format(None)
        kept = {key: result[key][0] == COLUMNS[key][0] for key in COLUMNS}
        print(f"  map, {way}: time is a {result.features['time'].dtype} of {result['time'][0]}, place {result['place'][0]}, id {result['id'][0]}; unchanged {kept}")
PY
HF_HOME="$folder/cache" PYTHONPATH="$folder/site-packages" python3 -W ignore "$folder/digits.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
datasets 5.2.0
numpy: time of a row np.float64(1700000050.25), of the column float32, place of a row float32
  map, batches as they came: time is a float64 of 1700000000.0, place [500000.125, 4649776.5], id 16777216.0; unchanged {'time': False, 'place': False, 'id': False}
  map, rows as they came: time is a float64 of 1700000050.25, place [500000.125, 4649776.5], id 16777217.0; unchanged {'time': True, 'place': False, 'id': True}
  map, rows, time alone returned: time is a float64 of 1700000050.25, place [500000.12, 4649776.46], id 16777217; unchanged {'time': True, 'place': True, 'id': True}
  map, filter: time is a float64 of 1700000050.25, place [500000.12, 4649776.46], id 16777217; unchanged {'time': True, 'place': True, 'id': True}
numpy, dtype float64: time of a row np.float64(1700000050.25), of the column float64, place of a row float64
  map, batches as they came: time is a float64 of 1700000050.25, place [500000.12, 4649776.46], id 16777217.0; unchanged {'time': True, 'place': True, 'id': True}
  map, rows as they came: time is a float64 of 1700000050.25, place [500000.12, 4649776.46], id 16777217.0; unchanged {'time': True, 'place': True, 'id': True}
  map, rows, time alone returned: time is a float64 of 1700000050.25, place [500000.12, 4649776.46], id 16777217; unchanged {'time': True, 'place': True, 'id': True}
  map, filter: time is a float64 of 1700000050.25, place [500000.12, 4649776.46], id 16777217; unchanged {'time': True, 'place': True, 'id': True}
None: time of a row 1700000050.25, of the column a list, place of a row a list
  map, batches as they came: time is a float64 of 1700000050.25, place [500000.12, 4649776.46], id 16777217; unchanged {'time': True, 'place': True, 'id': True}
  map, rows as they came: time is a float64 of 1700000050.25, place [500000.12, 4649776.46], id 16777217; unchanged {'time': True, 'place': True, 'id': True}
  map, rows, time alone returned: time is a float64 of 1700000050.25, place [500000.12, 4649776.46], id 16777217; unchanged {'time': True, 'place': True, 'id': True}
  map, filter: time is a float64 of 1700000050.25, place [500000.12, 4649776.46], id 16777217; unchanged {'time': True, 'place': True, 'id': True}
SEEN
echo "as seen before"
