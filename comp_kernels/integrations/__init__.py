"""`rope_attention` in other people's vision transformers: attention modules swapped in place, same weights, same outputs.

    from comp_kernels.integrations import patch_transformers
    patch_transformers(model)      # a Hugging Face model; patch_timm for timm
    unpatch(model)                 # as before

Neither library is imported here: the modules to swap are recognised by the class that defines their `forward`.
"""

from ._patching import UnsupportedCall, unpatch
from .timm import patch_timm
from .transformers import patch_transformers, register_attention

__all__ = ["UnsupportedCall", "patch_timm", "patch_transformers", "register_attention", "unpatch"]
