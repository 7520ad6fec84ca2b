"""What alignment_loss launches and takes on a GPU, counted without one: on shapes alone, with a launcher that only counts."""

import collections

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from comp_kernels._backends import implementation
from comp_kernels._triton import launches_go_to
from comp_kernels.ops.alignment_loss import streaming
from comp_kernels.ops.alignment_loss.call import Call

pytest.importorskip("triton", reason="triton is not installed")

MIB = 1 << 20
NO_LAUNCH = {"promote_types", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class Counter(TorchDispatchMode):
    """Counts torch's operators that run on the device, and the memory of the storages that are alive."""

    def __init__(self):
        super().__init__()
        self.launches: list[str] = []
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the device is waited for")
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        if name not in NO_LAUNCH and not is_view:
            self.launches.append(name)
        found = kwargs["out"] if func is torch.ops.aten.mm.dtype_out else func(*args, **kwargs)
        if isinstance(found, torch.Tensor) and not is_view:
            self.notice(found)
        return found

    def notice(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        reference = StorageWeakRef(storage)
        self.alive = [(other, size) for other, size in self.alive if not other.expired()]
        if all(other.cdata != reference.cdata for other, _ in self.alive):
            self.alive.append((reference, storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.alive))

    def launcher(self, kernel, grid, *args, **options):
        self.launches.append(kernel.__name__)


def count(rows, words, dim, features=torch.float32, prototypes=torch.float32, mode="sinkhorn", masked=False, **gradients):
    """The counter after one forward pass with its gradients."""
    gradients = dict(gradient=True, prototype_gradient=False) | gradients
    backend = implementation("alignment_loss", "triton")
    vision, text = (torch.empty(rows, dim, dtype=features, device="meta") for _ in range(2))
    matrix = torch.empty(words, dim, dtype=prototypes, device="meta")
    prior = torch.empty(words, dtype=torch.int64, device="meta")
    valid = torch.empty(rows, dtype=torch.bool, device="meta") if masked else None
    with Counter() as counter, launches_go_to(counter.launcher, "sm_90"):
        backend.forward(Call(vision, text, matrix, prior, valid, mode, 0.005, 0.005, 3, 0.05, True, None, **gradients))
    return counter


SHAPE = (256, 151936, 896)
PLAIN = 1589 * MIB  # what the plain version takes beside its inputs at this shape: docs/hardware/2026-11-27-h200.md
WIDENED = 4 * 151936 * 896  # and its float32 copy of 16-bit prototypes


PRECISIONS = [  # of features and of prototypes
    *((x, x) for x in ("float32", "bfloat16", "float16")),
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("bfloat16", "float32"),
]


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("features, prototypes", PRECISIONS)
@pytest.mark.parametrize("mode", ("sinkhorn", "literal", "released", "softmax"))
def test_launches(mode, features, prototypes, masked):
    """At most 30 for a model of half a billion parameters, none of which waits for the device."""
    counter = count(*SHAPE, getattr(torch, features), getattr(torch, prototypes), mode, masked)
    assert len(counter.launches) <= 30, counter.launches
    assert counter.peak <= (PLAIN + (prototypes != "float32") * WIDENED) / 4


@pytest.mark.parametrize("features, prototypes", PRECISIONS)
def test_launches_per_tile_of_many_rows(features, prototypes):
    """15 at most, in every precision."""
    rows, words, dim = 2048, 151936, 896
    tile = streaming.tile_columns(rows, dim, words, implementation("alignment_loss", "triton").LIMITS)
    launches = count(rows, words, dim, getattr(torch, features), getattr(torch, prototypes)).launches
    assert len(launches) <= 15 * (words / tile + 1), collections.Counter(launches)


def test_launches_do_not_grow_with_the_vocabulary_but_by_tiles():
    """Where everything is kept, not at all; else by what a tile that is not kept needs."""
    assert len(count(256, 300000, 896).launches) == len(count(256, 151936, 896).launches)
    few, many = (len(count(2048, words, 896).launches) for words in (100000, 400000))
    tile = streaming.tile_columns(2048, 896, 400000, implementation("alignment_loss", "triton").LIMITS)
    assert many - few <= 13 * 300000 / tile + 13  # norms, two products, seven steps, the loss, the gradient's product


def test_memory_of_many_rows():
    """An eighth of five matrices [n, V] and normalised prototypes, which is less than the plain version takes."""
    for rows, words, dim in ((2048, 151936, 896), (2048, 49152, 576), (4096, 151936, 3584)):
        for features, prototypes in PRECISIONS:
            wide = 4 * words * dim * (prototypes != "float32")
            found = count(rows, words, dim, getattr(torch, features), getattr(torch, prototypes))
            assert found.peak <= (4 * (words * dim + 5 * rows * words) + wide) / 8, (rows, words, dim, features, prototypes)


def test_prototypes_have_no_float32_copy():
    """Beside their gradient, where that is asked for."""
    for features, asked in ((torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)):
        counter = count(64, 151936, 3584, features, torch.bfloat16, prototype_gradient=asked)
        result = 4 * 151936 * 3584
        assert counter.peak < asked * result + result / 4


def test_products_follow_the_precision_the_user_set():
    before = torch.get_float32_matmul_precision()
    matrix = torch.empty(100, 8, dtype=torch.bfloat16, device="meta")
    try:
        for precision, terms in (("highest", 3), ("high", 2), ("medium", 1)):
            torch.set_float32_matmul_precision(precision)
            assert streaming.choose_products(matrix, 8, torch.float32, torch.float32, False, on_gpu=True).terms == terms
            assert streaming.choose_products(matrix, 8, torch.float32, torch.bfloat16, False, on_gpu=True).terms == 1
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting", ("all", "cuda", "mkldnn"))
def test_products_follow_the_precision_of_a_backend(setting):
    """torch's newer settings, after which torch.get_float32_matmul_precision raises."""
    matrix = torch.empty(100, 8, dtype=torch.bfloat16, device="meta")
    places = {"all": torch.backends, "cuda": torch.backends.cuda.matmul, "mkldnn": torch.backends.mkldnn.matmul}
    try:
        for place in reversed(places.values()):
            place.fp32_precision = "none"  # the old function may have been called
        places[setting].fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            torch.get_float32_matmul_precision()
        terms = streaming.choose_products(matrix, 8, torch.float32, torch.float32, False, on_gpu=True).terms
        assert terms == (3 if setting == "mkldnn" else 2)
    finally:
        places[setting].fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"
