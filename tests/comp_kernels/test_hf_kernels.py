"""The package in the layout of Hugging Face `kernels`: what is written, and that it runs on its own and under that loader."""

import ast
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from comp_kernels import _native
from comp_kernels.hf_kernels import PACKAGE, emit, main

pytestmark = pytest.mark.slow

NOARCH = ["torch-cpu", "torch-cuda", "torch-rocm"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub")
    emit(out, version=3)
    return out


def run(code, *arguments):
    """Run Python code in a process that has neither this source tree nor PYTHONPATH, from the root of the file system."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


CHECK = """
import json, sys
from pathlib import Path
import torch

def compare(kernel, backend):
    torch.manual_seed(0)
    positions = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in [(3, 5), (4, 4)]])
    cos, sin = kernel.rope_tables(positions, kernel.axial_freqs(16))
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 31, 2, 16))
    arguments = (q, k, v, cos, sin, torch.tensor([0, 15, 31]))
    out = kernel.rope_attention(*arguments, backend=backend)
    expected = kernel.reference.rope_attention(*arguments)
    for a, b in zip((out, *torch.autograd.grad(out.sum(), (q, k, v))),
                    (expected, *torch.autograd.grad(expected.sum(), (q, k, v)))):
        assert torch.allclose(a, b, atol=1e-5)
    plan = kernel.sinkhorn(torch.randn(4, 8), epsilon=0.1)
    assert torch.allclose(plan.sum(1), torch.ones(4), atol=1e-5)
    return out.detach()

def load(variant):
    import importlib.util
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


def test_variants_and_metadata(repository):
    variants = {path.name: path for path in (repository / "build").iterdir()}
    with_library = [name for name in variants if name.startswith("torch-stable-abi210-cpu-")]
    assert sorted(set(variants) - set(with_library)) == NOARCH
    assert len(with_library) == (_native.cpu_unavailable_reason() is None)
    known = set()
    for name, folder in variants.items():
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["version"] == 3 and metadata["id"].isidentifier()
        assert metadata["backend"] == {"type": name.split("-")[3 if name in with_library else 1]}
        known.add(metadata["id"])
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p.name != "metadata.json"}
        digests = {key: base64.b64encode(hashlib.sha256(p.read_bytes()).digest()).decode() for key, p in files.items()}
        assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
    assert len(known) == len(variants)


def test_sources_are_copies(repository):
    """Nothing is edited on the way, so there is nothing to keep in step."""
    for path in (repository / "build" / "torch-cuda").rglob("*.py"):
        assert path.read_bytes() == (PACKAGE / path.relative_to(repository / "build" / "torch-cuda")).read_bytes()


def test_imports_are_relative_or_torch_or_triton(repository):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in (repository / "build" / "torch-cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_runs_without_the_source_tree(repository):
    code = (
        CHECK
        + """
kernel = load(Path(sys.argv[1]))
compare(kernel, "reference")
assert "comp_kernels" not in sys.modules
print(kernel.available_backends("rope_attention"))
"""
    )
    assert run(code, repository / "build" / "torch-cuda") == ["['reference']"]


def test_two_variants_and_the_installed_package_in_one_process(repository):
    folders = [repository / "build" / name for name in ("torch-cuda", "torch-rocm")]
    with_library = sorted((repository / "build").glob("torch-stable-abi*"))
    code = (
        CHECK
        + """
sys.path.insert(0, sys.argv[1])
import comp_kernels
kernels = [load(Path(path)) for path in sys.argv[2:]] + [comp_kernels]
backends = [kernel.available_backends("rope_attention")[0] for kernel in kernels]
results = [compare(kernel, backend) for kernel, backend in zip(kernels, backends)]
assert all(torch.allclose(results[0], result, atol=1e-5) for result in results)
spaces = [kernel._namespace.NAMESPACE for kernel in kernels]
assert len(set(spaces)) == len(spaces) and spaces[-1] == "comp_kernels"
print(*backends)
"""
    )
    backends = run(code, PACKAGE.parent, *folders, *with_library)
    assert backends[:2] == ["reference", "reference"] and backends[2:-1] == ["cpu"] * len(with_library)


def test_loaded_by_hugging_face_kernels(repository):
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("kernels is not installed (pip install kernels)")
    code = (
        CHECK
        + """
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_forward_from_hub, use_kernel_mapping
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
compare(kernel, None)

@use_kernel_forward_from_hub("RopeAttention")
class Attention(torch.nn.Module):
    def forward(self, q, k, v, cos=None, sin=None, cu_seqlens=None):
        raise AssertionError("not replaced")

layer = LocalLayerRepository(repo_path=Path(sys.argv[1]), layer_name="RopeAttention")
with use_kernel_mapping({"RopeAttention": {"cpu": layer}}):
    model = kernelize(torch.nn.Sequential(Attention()), mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
q = torch.randn(7, 2, 16, requires_grad=True)
out = model[0](q, q, q, cu_seqlens=torch.tensor([0, 3, 7]))
out.sum().backward()
assert torch.allclose(out, kernel.reference.rope_attention(q, q, q, cu_seqlens=torch.tensor([0, 3, 7])), atol=1e-5)
print(kernel.available_backends("rope_attention")[0])
"""
    )
    with_library = list((repository / "build").glob("torch-stable-abi*"))
    assert run(code, repository) == ["cpu" if with_library else "reference"]


def test_an_existing_build_is_not_overwritten(repository, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(repository)])
    assert "out must not have a build folder" in capsys.readouterr().err
    assert main([str(tmp_path / "new")]) == 0
    assert "torch-cuda" in capsys.readouterr().out


def test_what_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    for arguments, message in (
        ([str(tmp_path / "file")], "Not a directory"),
        ([str(tmp_path / "new"), "--version", "0"], "version must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_layer_is_pure():
    """The loader takes layers without state, constructor or further methods."""
    from comp_kernels.layers import RopeAttention

    assert issubclass(RopeAttention, torch.nn.Module) and "__init__" not in vars(RopeAttention)
    public = {name for name in vars(RopeAttention) if not name.startswith("__")}
    assert public == {"forward", "has_backward", "can_torch_compile"}
    assert Path(sys.modules[RopeAttention.__module__].__file__).parent == PACKAGE
