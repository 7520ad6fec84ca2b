"""setup.py: the architectures that the CUDA library is asked for, and what nvcc is told of them."""

import runpy
from pathlib import Path

import pytest

build = runpy.run_path(str(Path(__file__).parent.parent / "setup.py"))
kernel, kernel_sm90 = Path("forward.cu"), Path("forward_sm90.cu")


def codes(source, capabilities):
    return [flag.removeprefix("-gencode=arch=") for flag in build["generated_code"](source, capabilities)]


def test_ptx_is_kept_of_the_architecture_that_names_it(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX;12.0")
    capabilities = build["architectures"]()
    assert capabilities == {"80": False, "90a": False, "100": True, "120": False}
    assert codes(kernel, capabilities) == [
        "compute_80,code=sm_80",
        "compute_90,code=sm_90",
        "compute_100,code=sm_100",
        "compute_100,code=compute_100",
        "compute_120,code=sm_120",
    ]


def test_kernels_of_wgmma_are_compiled_for_it_alone(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    capabilities = build["architectures"]()
    assert codes(kernel_sm90, capabilities) == ["compute_90a,code=sm_90a"]
    assert codes(kernel, capabilities) == ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]


def test_an_architecture_named_twice_is_compiled_once(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0 9.0a")
    assert codes(kernel, build["architectures"]()) == ["compute_90,code=sm_90"]


@pytest.mark.parametrize("listed", ["Hopper", "8.0;native", "7.5", ";"])
def test_what_cannot_be_built_is_said(monkeypatch, listed):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(RuntimeError, match="TORCH_CUDA_ARCH_LIST must"):
        build["architectures"]()


@pytest.mark.parametrize(("release", "flags"), [("12.8, V12.8.93", []), ("13.0, V13.0.88", ["--compress-mode=size"])])
def test_device_code_is_compressed_where_every_driver_reads_it(tmp_path, release, flags):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}'\n")
    nvcc.chmod(0o755)
    assert build["compression"](str(nvcc)) == flags
