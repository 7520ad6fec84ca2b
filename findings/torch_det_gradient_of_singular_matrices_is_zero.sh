#!/usr/bin/env bash
# torch: the gradient of linalg.det is zero where the determinant is exactly zero, unless create_graph=True asks for it.
#
# The gradient of a determinant is the matrix of cofactors, which is not zero for a matrix that lacks one rank, and the determinant is a plain polynomial: one would
# guess that det([[a, b], [c, d]]) and a * d - b * c have one gradient. backward() multiplies det(A) with a solution in A, and where det(A) is 0.0 the product
# is zero. So a loss that keeps a determinant away from zero (volumes, Jacobians of a warp or a mesh, Vandermonde and Gram matrices) does nothing in the
# one place it is for, and a point that lies on a line or plane by construction stays there. The next matrix, singular but for rounding, is right.
# With create_graph=True, and so in torch.func.grad and jacrev, another formula is used and the cofactors come out; jacfwd and torch.compile have the zeros. No NaN
# and no warning. The product of linalg.svdvals (without the sign) and linalg.eigvals give the right gradient.
#
# Seen: torch 2.13.0 (and 2.14.1) on the CPU, as below; PyTorch's issue 104675. Needs python3 with pip, 1 GB and a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.2.6
cat > "$folder/det.py" <<'PY'
import torch
from torch.linalg import det

print("torch", torch.__version__.split("+")[0])


def by_hand(a):
    return a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0]


def gradient(function, a, **options):
    a = a.clone().requires_grad_()
    return [[round(x, 3) + 0.0 for x in row] for row in torch.autograd.grad(function(a), a, **options)[0].tolist()]


def listed(a):
    return [[round(x, 3) + 0.0 for x in row] for row in a.tolist()]


for dtype in (torch.float32, torch.float64):
    a = torch.tensor([[1, 2], [2, 4]], dtype=dtype)
    print(f"{dtype}, {a.tolist()}: by hand {gradient(by_hand, a)}, det {gradient(det, a)}, with create_graph {gradient(det, a, create_graph=True)}")
    print(f"  func.grad {listed(torch.func.grad(det)(a))}, jacrev {listed(torch.func.jacrev(det)(a))}, jacfwd {listed(torch.func.jacfwd(det)(a))}, "
          f"compiled {gradient(torch.compile(det), a)}")
    print(f"  product of eigenvalues {gradient(lambda m: torch.linalg.eigvals(m).prod().real, a)}")
    near = a.clone()
    near[1, 1] += 1e-6
    print(f"  4.000001 in place of 4: {gradient(det, near)}")
    print(f"  a batch of it and the unit matrix: {torch.autograd.functional.jacobian(lambda m: det(m).sum(), torch.stack([a, torch.eye(2, dtype=dtype)])).add(0.0).tolist()}")
flat = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]])  # three edges of a tetrahedron in one plane
print(f"edges in a plane: {gradient(det, flat)}, with create_graph {gradient(det, flat, create_graph=True)}")
lifted = flat.clone().requires_grad_()
optimizer = torch.optim.SGD([lifted], lr=0.1)
for _ in range(100):
    optimizer.zero_grad()
    (det(lifted) - 1).square().backward()
    optimizer.step()
print(f"100 steps of SGD towards a volume of 1 end at {det(lifted).item()}")
PY
PYTHONPATH="$folder/site" python3 -W ignore "$folder/det.py" 2> "$folder/messages" | tee "$folder/seen" || { cat "$folder/messages"; exit 1; }
diff "$folder/seen" - <<'SEEN'
torch 2.13.0
torch.float32, [[1.0, 2.0], [2.0, 4.0]]: by hand [[4.0, -2.0], [-2.0, 1.0]], det [[0.0, 0.0], [0.0, 0.0]], with create_graph [[4.0, -2.0], [-2.0, 1.0]]
  func.grad [[4.0, -2.0], [-2.0, 1.0]], jacrev [[4.0, -2.0], [-2.0, 1.0]], jacfwd [[0.0, 0.0], [0.0, 0.0]], compiled [[0.0, 0.0], [0.0, 0.0]]
  product of eigenvalues [[4.0, -2.0], [-2.0, 1.0]]
  4.000001 in place of 4: [[4.0, -2.0], [-2.0, 1.0]]
  a batch of it and the unit matrix: [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]
torch.float64, [[1.0, 2.0], [2.0, 4.0]]: by hand [[4.0, -2.0], [-2.0, 1.0]], det [[0.0, 0.0], [0.0, 0.0]], with create_graph [[4.0, -2.0], [-2.0, 1.0]]
  func.grad [[4.0, -2.0], [-2.0, 1.0]], jacrev [[4.0, -2.0], [-2.0, 1.0]], jacfwd [[0.0, 0.0], [0.0, 0.0]], compiled [[0.0, 0.0], [0.0, 0.0]]
  product of eigenvalues [[4.0, -2.0], [-2.0, 1.0]]
  4.000001 in place of 4: [[4.0, -2.0], [-2.0, 1.0]]
  a batch of it and the unit matrix: [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]
edges in a plane: [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], with create_graph [[0.0, 0.0, -1.0], [0.0, 0.0, -1.0], [0.0, 0.0, 1.0]]
100 steps of SGD towards a volume of 1 end at 0.0
SEEN
echo "as seen before"
