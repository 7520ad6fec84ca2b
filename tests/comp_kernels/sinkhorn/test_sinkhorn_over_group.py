"""sinkhorn and alignment_loss over processes (gloo): 2 and 4 with a share of the rows each equal 1 with all of them."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import comp_kernels as ck

ROWS = 8


def make_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    text, vision, prototypes = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (ROWS, ROWS, 70))
    marginals = torch.rand(70, generator=generator, dtype=torch.float64)
    marginals[5] = 0
    return dict(
        scores=torch.randn(3, ROWS, 70, generator=generator, dtype=torch.float64),
        columns=ROWS * marginals / marginals.sum(),
        vision=vision,
        text=text,
        prototypes=prototypes,
        prior=torch.randint(0, 50, (70,), generator=generator),
        valid=torch.arange(ROWS) != 5,
    )


def compute(rows: slice, group, backend: str) -> dict[str, torch.Tensor]:
    """All results for a share of the rows, by name; those that belong to rows are named "row ..."."""
    inputs = make_inputs()
    results = {}
    for dtype in (torch.float64, torch.float32):
        scores = inputs["scores"].to(dtype)[:, rows]
        settings = dict(epsilon=0.3, group=group, backend=backend, return_potentials=True)
        for name, extra in {
            "default": {},
            "marginals": dict(col_marginals=inputs["columns"].to(dtype)),
            "tol": dict(num_iters=50, tol=1e-3),
        }.items():
            plan, u, v = ck.sinkhorn(scores, **settings, **extra)
            results |= {f"row plan {name} {dtype}": plan.mT, f"row u {name} {dtype}": u, f"v {name} {dtype}": v}
        for mode in ("sinkhorn", "released"):
            vision = inputs["vision"][rows].to(dtype).requires_grad_()
            loss = ck.alignment_loss(
                vision,
                inputs["text"][rows].to(dtype),
                inputs["prototypes"].to(dtype),
                prior=inputs["prior"],
                mode=mode,
                epsilon=0.1,
                temperature=0.1,
                valid=inputs["valid"][rows],
                group=group,
                backend=backend,
            )
            loss.backward()
            results |= {f"loss {mode} {dtype}": loss.detach(), f"row gradient {mode} {dtype}": vision.grad.mT}
    return results


def work(rank: int, shares: tuple[int, ...], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(shares))
    begin = sum(shares[:rank])
    for backend in ("reference", "cpu"):
        results = compute(slice(begin, begin + shares[rank]), dist.group.WORLD, backend)
        torch.save(results, f"{folder}/{backend}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("rows", ((8, 0), (2, 2, 2, 2)), ids=str)
def test_shares_equal_the_whole(rows, tmp_path):
    """A process may have no rows at all."""
    mp.spawn(work, (rows, str(tmp_path)), nprocs=len(rows))
    for backend in ("reference", "cpu"):
        whole = compute(slice(0, ROWS), None, backend)
        shares = [torch.load(tmp_path / f"{backend}{rank}.pt") for rank in range(len(rows))]
        for name, expected in whole.items():
            tolerance = dict(rtol=1e-9, atol=1e-11) if "64" in name else dict(rtol=2e-4, atol=2e-5)
            if name.startswith("row"):
                torch.testing.assert_close(torch.cat([share[name] for share in shares], dim=-1), expected, **tolerance)
            else:
                for share in shares:
                    torch.testing.assert_close(share[name], expected, **tolerance)


def test_differentiable_modes_stay_within_a_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="group must be None"):
            ck.sinkhorn(torch.randn(2, 3), epsilon=1.0, gradient="unrolled", group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
