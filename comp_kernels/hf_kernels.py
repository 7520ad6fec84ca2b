"""Writes this package as a kernel repository for Hugging Face `kernels`: `python -m comp_kernels.hf_kernels OUT`.

    from kernels import get_local_kernel
    comp_kernels = get_local_kernel(Path("OUT"))       # or get_kernel("you/comp-kernels", version=1) once OUT is uploaded
    comp_kernels.rope_attention(q, k, v, cos, sin, cu_seqlens)

OUT/build gets one folder per build variant: torch-cuda and torch-rocm (Triton), torch-cpu (the plain definitions), and, where
the CPU library is built, torch-stable-abi210-cpu-ARCH-OS with it: the library knows nothing of torch, so it serves 2.10 and
newer. Files are copied from the package; nothing of this layout is kept in the source tree.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import _native
from ._checks import check_integer

PACKAGE = Path(__file__).parent
# Commands and test tools stay behind, and what imports other libraries than torch.
LEFT_OUT = ("hf_kernels.py", "info.py", "testing.py", "warm_up.py", "_triton_compile.py", "integrations", "lib", "__pycache__")
NOARCH = {"torch-cpu": "cpu", "torch-cuda": "cuda", "torch-rocm": "rocm"}
CPU_LIBRARY = ("lib/libcomp_kernels_cpu.so", "lib/cpu.sources")


def emit(out: Path, version: int = 1) -> list[Path]:
    """Write the build variants to `out`/build and a card to `out`/README.md; returns the folders of the variants.

    version: the major version that `get_kernel` asks for, at least 1. Raises FileExistsError where `out` has a build already,
    and ValueError for another version.
    """
    check_integer("version", version, least=1)
    build = out / "build"
    if build.exists():
        raise FileExistsError(f"out must not have a build folder, {build} exists")
    sources = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]
    sources = [path for path in sources if path.parts[0] not in LEFT_OUT]
    variants = {name: (backend, sources) for name, backend in NOARCH.items()}
    if _native.cpu_unavailable_reason() is None:  # neither missing nor built from other sources; warns where it is
        variants[_with_cpu_library()] = ("cpu", sources + [Path(path) for path in CPU_LIBRARY])
    for name, (backend, files) in variants.items():
        _write_variant(build / name, backend, files, version)
    (out / "README.md").write_text(_card(version))
    return [build / name for name in variants]


def _with_cpu_library() -> str:
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return f"torch-stable-abi210-cpu-{machine}-{platform.system().lower()}"


def _write_variant(folder: Path, backend: str, files: Sequence[Path], version: int) -> None:
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / path, folder / path)
    digests = {path.as_posix(): hashlib.sha256((folder / path).read_bytes()).digest() for path in files}
    everything = hashlib.sha256(b"".join(name.encode() + digest for name, digest in digests.items())).hexdigest()
    metadata: dict[str, Any] = {
        # also the namespace of the operators: two versions in one process must differ
        "id": f"_comp_kernels_{backend}_{everything[:7]}",
        "name": "comp-kernels",
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _card(version: int) -> str:
    return f"""---
license: apache-2.0
tags: [kernels]
---

# comp_kernels

Fused kernels for vision transformers at native resolution: `rope_attention` (2D rotary embedding and attention over packed
sequences, forward and backward), `sinkhorn`, `alignment_loss`, and the layer `layers.RopeAttention`.

    from kernels import get_kernel
    comp_kernels = get_kernel("OWNER/comp-kernels", version={version}, trust_remote_code=True)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the kernel repository")
    parser.add_argument("--version", type=int, default=1, help="major version of the kernel (default: 1)")
    options = parser.parse_args(arguments)
    try:
        folders = emit(options.out, options.version)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(map(str, folders)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
