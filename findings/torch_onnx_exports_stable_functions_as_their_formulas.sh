#!/usr/bin/env bash
# torch.onnx: logaddexp, logsigmoid, log1p, expm1, erfc and binary_cross_entropy_with_logits are exported as the formulas that they exist to avoid.
#
# These functions are written in place of log(exp(a) + exp(b)), log(sigmoid(x)) or log(1 + x) since the formulas overflow or cancel. ONNX has none of them, and one
# would guess that the exporter composes them with a maximum taken off, as its decompositions do elsewhere (logsumexp, log_softmax, softplus and sinh
# are right). It writes the formulas. logaddexp(100, 0) is infinite; logsigmoid(-20) is -inf, since onnxruntime's Sigmoid is 0 there, and logsigmoid(20) is 0, so
# log-probabilities and losses of sure answers are infinite; log1p and expm1 of 1e-8 are 0, and of 1e-7 off by a fifth; erfc(4) is 0. A check on random
# normal inputs with a tolerance of 1e-4 passes them all. torch.logsumexp of a stack and -softplus(-x) are right.
#
# Seen: torch 2.13.0 (and 2.14.1), onnxscript 0.7.2, onnxruntime 1.32.0, as below. Needs python3.11 or newer with pip, 1 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cat > "$folder/functions.py" <<'PY'
import onnxruntime
import torch
from torch import nn
from torch.nn import functional as F

print("torch", torch.__version__.split("+")[0], "onnxruntime", onnxruntime.__version__)
CASES = {
    "logaddexp(x, 0)": (lambda x: torch.logaddexp(x, torch.zeros_like(x)), [1, 100]),
    "logsumexp of x and 0": (lambda x: torch.logsumexp(torch.stack([x, torch.zeros_like(x)]), 0), [1, 100]),
    "logsigmoid": (F.logsigmoid, [20, -20, -200]),
    "-softplus(-x)": (lambda x: -F.softplus(-x), [20, -20, -200]),
    "binary_cross_entropy_with_logits, target 1": (lambda x: F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none"), [20, -20, -200]),
    "log1p": (torch.log1p, [1e-8, 1e-7, 1e-3]),
    "expm1": (torch.expm1, [1e-8, 1e-7, 1e-3]),
    "sinh": (torch.sinh, [1e-8, 1e-7, 1e-3]),
    "erfc": (torch.erfc, [4, 2]),
    "log_softmax": (lambda x: x.log_softmax(0), [0, 200]),
}


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def exported(function, x):
    """Of the function, by onnxruntime, and the names of its operators."""
    program = torch.onnx.export(Model(function).eval(), (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    run = lambda given: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: given.numpy()})[0])
    return run(x), run, [n.op_type for n in program.model_proto.graph.node]


torch.manual_seed(0)
for name, (function, inputs) in CASES.items():
    x = torch.tensor(inputs, dtype=torch.float32)
    found, run, operators = exported(function, x)
    expected = function(x.double()).float()
    right = [bool(abs(a - b) <= 1e-3 * abs(b)) for a, b in zip(found, expected)]
    shown = [f"{a:.2g} for {b:.2g}" for a, b, good in zip(found.tolist(), expected.tolist(), right) if not good]
    normal = torch.randn(len(inputs))
    usual = torch.allclose(run(normal), function(normal), atol=1e-4, equal_nan=True)
    print(f"{name} of {inputs} as {'+'.join(operators)}: within 0.1 % {right} {shown}; normal numbers within 1e-4 {usual}")
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder/site" python3 -W ignore "$folder/functions.py" 2> "$folder/messages" | tee "$folder/seen" || { cat "$folder/messages"; exit 1; }
diff "$folder/seen" - <<'SEEN'
torch 2.13.0 onnxruntime 1.32.0
logaddexp(x, 0) of [1, 100] as Exp+Add+Log: within 0.1 % [True, False] ['inf for 1e+02']; normal numbers within 1e-4 True
logsumexp of x and 0 of [1, 100] as Unsqueeze+Concat+ReduceLogSumExp: within 0.1 % [True, True] []; normal numbers within 1e-4 True
logsigmoid of [20, -20, -200] as Sigmoid+Log: within 0.1 % [False, False, False] ['0 for -2.1e-09', '-inf for -20', '-inf for -2e+02']; normal numbers within 1e-4 True
-softplus(-x) of [20, -20, -200] as Neg+Softplus+Greater+Where+Neg: within 0.1 % [True, True, True] []; normal numbers within 1e-4 True
binary_cross_entropy_with_logits, target 1 of [20, -20, -200] as Mul+Sigmoid+Log+Sub: within 0.1 % [False, False, False] ['0 for 2.1e-09', 'inf for 20', 'inf for 2e+02']; normal numbers within 1e-4 True
log1p of [1e-08, 1e-07, 0.001] as Add+Log: within 0.1 % [False, False, True] ['0 for 1e-08', '1.2e-07 for 1e-07']; normal numbers within 1e-4 True
expm1 of [1e-08, 1e-07, 0.001] as Exp+Sub: within 0.1 % [False, False, True] ['0 for 1e-08', '1.2e-07 for 1e-07']; normal numbers within 1e-4 True
sinh of [1e-08, 1e-07, 0.001] as Sinh: within 0.1 % [True, True, True] []; normal numbers within 1e-4 True
erfc of [4, 2] as Erf+Sub: within 0.1 % [False, True] ['0 for 1.5e-08']; normal numbers within 1e-4 True
log_softmax of [0, 200] as LogSoftmax: within 0.1 % [True, True] []; normal numbers within 1e-4 True
SEEN
echo "as seen before"
