"""The operators in other people's models: attention modules swapped in place for `rope_attention`, same weights, same outputs,
and the projection of hyper-connections by `sinkhorn`.

    from comp_kernels.integrations import patch_transformers
    patch_transformers(model)      # a Hugging Face model; patch_timm for timm
    unpatch(model)                 # as before

    from comp_kernels.integrations import liger_mhc_coeffs, patch_megatron, sinkhorn_knopp      # see hyper_connections.py

None of these libraries is imported here: the modules to swap are recognised by the class that defines their `forward`.
"""

from ._patching import UnsupportedCall, unpatch
from .hyper_connections import liger_mhc_coeffs, patch_megatron, sinkhorn_knopp, unpatch_megatron
from .timm import patch_timm
from .transformers import patch_transformers, register_attention

__all__ = [
    "UnsupportedCall",
    "liger_mhc_coeffs",
    "patch_megatron",
    "patch_timm",
    "patch_transformers",
    "register_attention",
    "sinkhorn_knopp",
    "unpatch",
    "unpatch_megatron",
]
