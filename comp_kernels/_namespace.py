"""The namespace of the operators in torch.ops: the name under which this package is imported.

It is "comp_kernels" where the package is installed. A loader that imports a copy under another name (Hugging Face `kernels`
does) gets operators of its own, so that several versions can live in one process.
"""

import torch

NAMESPACE = __package__
OPS = getattr(torch.ops, NAMESPACE)
