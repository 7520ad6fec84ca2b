#!/usr/bin/env bash
# torchmetrics: two metrics of a MetricCollection whose counts are equal after the first batch are one metric from then on, whatever their settings.
#
# A collection computes metrics that need the same counts (precision and recall of the same threshold) once. One would guess that it
# looks at their settings for that, and that accuracy with an ignore_index, or precision at another threshold, is another metric. It compares the counts themselves
# after the first batch. A first batch without the ignored class, or with confident scores only, makes the two equal by chance;
# afterwards the first one (by name) is updated and the other one reads its counts, through reset() and all later epochs. No warning; whether
# it happens depends on the first batch, so on the seed and on the size of batches: small first batches are what tests and sanity checks have.
# compute_groups=False is right, and so are the metrics by themselves.
#
# Seen: torchmetrics 1.9.0 with torch 2.13.0, as below; torchmetrics' issues 2596 and 2916 have other cases. Needs python3 with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
python3 -m pip install --quiet --no-deps --target "$folder/site" torchmetrics==1.9.0 lightning-utilities==0.15.2 packaging==25.0
cat > "$folder/groups.py" <<'PY'
import torchmetrics
from torch import tensor
from torchmetrics.classification import BinaryPrecision, MulticlassAccuracy


def accuracies():
    return {
        "all": MulticlassAccuracy(3, average="micro"),
        "without class 0": MulticlassAccuracy(3, average="micro", ignore_index=0),
    }


def precisions():
    return {"at 50 %": BinaryPrecision(threshold=0.5), "at 90 %": BinaryPrecision(threshold=0.9)}


def show(title, metrics):
    print(f"  {title}:", ", ".join(f"{name} {float(value):.2f}" for name, value in metrics.items()))


def watch(make, batches):
    """The batches as one epoch, then the last batch alone as the next."""
    together, apart, ungrouped = torchmetrics.MetricCollection(make()), make(), torchmetrics.MetricCollection(make(), compute_groups=False)
    for batch in batches:
        together.update(*batch)
        ungrouped.update(*batch)
        for metric in apart.values():
            metric.update(*batch)
    show("collection", together.compute())
    show("compute_groups=False", ungrouped.compute())
    show("by themselves", {name: metric.compute() for name, metric in apart.items()})
    together.reset()
    together.update(*batches[-1])
    show("next epoch, collection", together.compute())
    for metric in apart.values():
        metric.reset()
        metric.update(*batches[-1])
    show("next epoch, by themselves", {name: metric.compute() for name, metric in apart.items()})


print("torchmetrics", torchmetrics.__version__)
no_class_0, mixed = (tensor([1, 2, 1]), tensor([1, 1, 1])), (tensor([0, 1, 2, 0]), tensor([0, 0, 0, 2]))
for first, second in ((no_class_0, mixed), (mixed, no_class_0)):
    print("accuracy, first batch", "without class 0" if first is no_class_0 else "with class 0")
    watch(accuracies, [first, second])
confident, doubtful = (tensor([0.95, 0.10]), tensor([1, 0])), (tensor([0.60, 0.70, 0.95]), tensor([0, 0, 1]))
print("precision, first batch confident")
watch(precisions, [confident, doubtful])
PY
PYTHONPATH="$folder/site" python3 "$folder/groups.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
torchmetrics 1.9.0
accuracy, first batch without class 0
  collection: all 0.43, without class 0 0.43
  compute_groups=False: all 0.43, without class 0 0.50
  by themselves: all 0.43, without class 0 0.50
  next epoch, collection: all 0.25, without class 0 0.25
  next epoch, by themselves: all 0.25, without class 0 0.00
accuracy, first batch with class 0
  collection: all 0.43, without class 0 0.50
  compute_groups=False: all 0.43, without class 0 0.50
  by themselves: all 0.43, without class 0 0.50
  next epoch, collection: all 0.67, without class 0 0.67
  next epoch, by themselves: all 0.67, without class 0 0.67
precision, first batch confident
  collection: at 50 % 0.50, at 90 % 0.50
  compute_groups=False: at 50 % 0.50, at 90 % 1.00
  by themselves: at 50 % 0.50, at 90 % 1.00
  next epoch, collection: at 50 % 0.33, at 90 % 0.33
  next epoch, by themselves: at 50 % 0.33, at 90 % 1.00
SEEN
echo "as seen before"
