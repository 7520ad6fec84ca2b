#!/usr/bin/env bash
# torch.onnx: scatter_reduce(..., "mean") is exported as a scatter without any reduction: the last value written stands for the mean.
#
# ONNX's ScatterElements adds, multiplies and takes maxima and minima, and has no mean. One would guess that the exporter composes it of a sum and a count, or refuses,
# as it does for index_reduce and for scatter(reduce="add"). It writes reduction="none" into the file, so each place holds the last of its values (which one is last is
# up to the runtime), and include_self is without effect. Pooling by segment, messages in graphs, voxels of points and prototypes by class are exported so, with
# shape and range as expected. With one value per place and include_self=False, as in a small example, nothing is to be seen. No error and no warning. "sum", "prod", "amax"
# and "amin" are right, and so is a mean written as a scatter_add of the values over one of ones.
#
# Seen: torch 2.13.0 (and 2.14.1), onnxscript 0.7.2, onnxruntime 1.32.0, as below; ONNX's issue 5100 asks for a mean. Needs python3.11 or newer with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cat > "$folder/scatter.py" <<'PY'
import onnxruntime
import torch
from torch import nn

print("torch", torch.__version__.split("+")[0], "onnxruntime", onnxruntime.__version__)
values = torch.tensor([1.0, 3, 10, 20, 60])
twice, once = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 3, 4])


class Reduce(nn.Module):
    def __init__(self, how, include_self):
        super().__init__()
        self.how, self.include_self = how, include_self

    def forward(self, x, index):
        zeros = torch.zeros(5)
        if self.how == "mean by two sums":
            count = zeros.scatter_add(0, index, torch.ones_like(x)) + (1 if self.include_self else 0)
            return zeros.scatter_add(0, index, x) / count.clamp(min=1)
        return zeros.scatter_reduce(0, index, x, self.how, include_self=self.include_self)


for how in ("sum", "amax", "mean", "mean by two sums"):
    for include_self in (True, False):
        model = Reduce(how, include_self).eval()
        program = torch.onnx.export(model, (values, twice), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
        reductions = [a.s.decode() for n in program.model_proto.graph.node for a in n.attribute if a.name == "reduction"]
        for name, index in (("two places", twice), ("a place each", once)):
            found = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), (values, index))})[0].tolist()
            expected = model(values, index).tolist()
            same = all(abs(a - b) < 1e-4 for a, b in zip(found, expected))
            shown = "" if same else f", {[round(v, 2) for v in found]} for {[round(v, 2) for v in expected]}"
            print(f"{how}, include_self {include_self}, {name}: last scatter {reductions[-1]}, equal to torch {same}{shown}")
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder/site" python3 -W ignore "$folder/scatter.py" 2> "$folder/messages" | tee "$folder/seen" || { cat "$folder/messages"; exit 1; }
diff "$folder/seen" - <<'SEEN'
torch 2.13.0 onnxruntime 1.32.0
sum, include_self True, two places: last scatter add, equal to torch True
sum, include_self True, a place each: last scatter add, equal to torch True
sum, include_self False, two places: last scatter add, equal to torch True
sum, include_self False, a place each: last scatter add, equal to torch True
amax, include_self True, two places: last scatter max, equal to torch True
amax, include_self True, a place each: last scatter max, equal to torch True
amax, include_self False, two places: last scatter max, equal to torch True
amax, include_self False, a place each: last scatter max, equal to torch True
mean, include_self True, two places: last scatter none, equal to torch False, [3.0, 60.0, 0.0, 0.0, 0.0] for [1.33, 22.5, 0.0, 0.0, 0.0]
mean, include_self True, a place each: last scatter none, equal to torch False, [1.0, 3.0, 10.0, 20.0, 60.0] for [0.5, 1.5, 5.0, 10.0, 30.0]
mean, include_self False, two places: last scatter none, equal to torch False, [3.0, 60.0, 0.0, 0.0, 0.0] for [2.0, 30.0, 0.0, 0.0, 0.0]
mean, include_self False, a place each: last scatter none, equal to torch True
mean by two sums, include_self True, two places: last scatter add, equal to torch True
mean by two sums, include_self True, a place each: last scatter add, equal to torch True
mean by two sums, include_self False, two places: last scatter add, equal to torch True
mean by two sums, include_self False, a place each: last scatter add, equal to torch True
SEEN
echo "as seen before"
