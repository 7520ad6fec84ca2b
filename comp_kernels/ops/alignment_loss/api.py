"""The public alignment_loss: argument checks, defaults, choice of backend."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..._backends import choose_backend
from ..._checks import (
    check_bool,
    check_choice,
    check_dense,
    check_float,
    check_group,
    check_num_iters,
    check_real,
    check_same,
    check_temperature,
    check_tensor,
    has_values,
    readable,
)
from . import reference, reference_backend
from .call import Call
from .registration import loss_of


def alignment_loss(
    vision: Tensor,
    text: Tensor,
    prototypes: Tensor,
    *,
    prior: Tensor | None = None,
    mode: str = "sinkhorn",
    epsilon: float = 0.005,
    temperature: float = 0.005,
    num_iters: int = 3,
    prior_temperature: float = 0.05,
    valid: Tensor | None = None,
    normalize: bool = True,
    prototype_gradient: bool = False,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """CoMP's Alignment Loss (arXiv 2503.18931v2, Eqs. 7 to 10): the pooled visual feature must predict, over the word
    embeddings of a language model, the distribution that the pooled text feature produces.

        c_v, c_t = cosines of vision and text with every prototype (plain products when normalize is False)
        p_t      = target from c_t, by `mode`                     p_v = softmax(c_v / temperature)
        loss     = mean over valid rows of - sum_k p_t[k] log p_v[k]

    Args:
        vision:  [n, D] pooled visual features. They receive a gradient; text does not, nor do prototypes unless asked for.
        text:  [n, D] pooled text features.
        prototypes:  [V, D] word embeddings. On GPUs bfloat16 (or float16 like the features) is multiplied as it is, with
            float32 results, and float32 features as sums of bfloat16 terms. float32 products follow
            `torch.set_float32_matmul_precision` or `torch.backends.cuda.matmul.fp32_precision`, exact by default. Autocast
            changes nothing.
        prior:  [V] word counts of the corpus, zeros allowed (not all of them in mode "released"). None: uniform.
        mode:  how the target is made, w = max(prior, 1) / sum max(prior, 1):

            - "sinkhorn": transport plan of c_t / epsilon: rows sum to 1, columns to n w over the group, num_iters iterations
            - "literal": softmax(c_t / epsilon + log w), the paper's Eq. 9 as printed
            - "released": softmax(c_t / epsilon + num_iters (max(prior, 1) / sum prior) / prior_temperature), what the
              authors' code computes in closed form
            - "softmax": softmax(c_t / epsilon)
        epsilon:  temperature of the text scores. A number, as are all settings: a tensor would receive no gradient and is
            refused.
        temperature:  of the vision scores.
        num_iters:  iterations of the modes "sinkhorn" and "released".
        prior_temperature:  of the prior, in mode "released" only.
        valid:  [n] bool, rows that count. No valid row: the loss is 0 and still attached to the graph.
        normalize:  L2-normalise the rows of vision, text and prototypes in float32. A row of zeros (shorter than 1e-12) has
            cosine 0 with everything and receives no gradient.
        prototype_gradient:  prototypes receive the gradient through c_v as well; the target stays a constant.
        group:  a process group; the n rows are this process's share. The value is then the mean over all rows of the group,
            the same everywhere; gradients are those of the local rows, to be *summed* over the processes.
        backend:  "reference", "cpu", "triton" or None (by device).

    Returns:
        A float32 scalar (float64 for float64 features).

    Warns:
        RuntimeWarning: once, if kernels of a backend that nobody named cannot be compiled or launched; the next one runs.

    Raises:
        ValueError: shapes, dtypes, devices or a mode that do not fit; on the CPU also counts that are negative or not finite.
        RuntimeError: a named backend cannot run this call; the message says why.
    """
    check_features(vision, text, prototypes, valid)
    check_prior(prior, vision, prototypes, mode)
    check_bool("normalize", normalize)
    epsilon = check_temperature("epsilon", epsilon, vision.dtype, of_cosines=normalize)
    temperature = check_temperature("temperature", temperature, vision.dtype, of_cosines=normalize)
    prior_temperature = check_temperature("prior_temperature", prior_temperature, vision.dtype)
    check_num_iters(num_iters)
    check_group(group)

    check_bool("prototype_gradient", prototype_gradient)
    name = None if group is None else group.group_name
    settings = (mode, epsilon, temperature, num_iters, prior_temperature, normalize, name)
    recorded = torch.is_grad_enabled()
    wanted = (vision.requires_grad and recorded, prototype_gradient and prototypes.requires_grad and recorded)
    call = Call(vision, text.detach(), prototypes if wanted[1] else prototypes.detach(), prior, valid, *settings, *wanted)
    backend, fallback = choose_backend("alignment_loss", backend, vision.device, call)
    if backend == "reference" and has_values(vision):  # else the operators tell the shapes
        return reference_backend.definition(call)
    # The processes of a group exchange sums in their backend's units: none may go on with another by itself.
    return loss_of(call, backend, fallback and group is None)


def check_features(vision: Tensor, text: Tensor, prototypes: Tensor, valid: Tensor | None) -> None:
    for name, x, shape in (("vision", vision, "[n, D]"), ("text", text, "[n, D]"), ("prototypes", prototypes, "[V, D]")):
        check_tensor(name, x, shape, dim=2)
        check_dense(name, x)
        check_float(name, x)
        check_same(name, x, "vision", vision, dtype=False)
        if x.dtype == torch.float64 and vision.dtype != torch.float64:
            raise ValueError(f"{name} is float64 but vision is {vision.dtype}: pass {name}.to(vision.dtype)")
    if vision.shape != text.shape:
        raise ValueError(f"text must have the shape of vision {tuple(vision.shape)}, got {tuple(text.shape)}")
    if prototypes.shape[1] != vision.shape[1]:
        raise ValueError(f"prototypes must be [V, {vision.shape[1]}] to match vision, got {tuple(prototypes.shape)}")
    if valid is not None:
        check_tensor("valid", valid, "[n] of bool", dim=1)
        check_dense("valid", valid)
        if valid.shape != vision.shape[:1] or valid.dtype != torch.bool:
            raise ValueError(f"valid must be bool ({vision.shape[0]},), got {valid.dtype} {tuple(valid.shape)}")
        check_same("valid", valid, "vision", vision, dtype=False)


def check_prior(prior: Tensor | None, vision: Tensor, prototypes: Tensor, mode: str) -> None:
    """Shape and kind everywhere; values where they may be looked at. Elsewhere counts that are no numbers make the loss NaN."""
    check_choice("mode", mode, reference.MODES)
    if prior is None:
        return
    check_tensor("prior", prior, "[V], one count per prototype", dim=1)
    check_dense("prior", prior)
    if prior.shape != prototypes.shape[:1]:
        raise ValueError(f"prior must have one count per prototype, ({prototypes.shape[0]},), got {tuple(prior.shape)}")
    check_real("prior", prior)
    check_same("prior", prior, "vision", vision, dtype=False)
    if not readable(prior) or prior.numel() == 0:
        return
    least, total = float(prior.min()), float(prior.sum(dtype=torch.promote_types(vision.dtype, torch.float32)))
    if not (least >= 0 and total < float("inf")):
        raise ValueError(
            f"prior must hold counts that are not negative, with a finite sum, got a minimum of {least} and a sum of {total}"
        )
    if mode == "released" and total == 0:
        raise ValueError("prior must have a positive sum in mode 'released', got zeros alone")
