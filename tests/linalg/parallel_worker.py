"""The ranks that test_parallel.py starts, forked from one process; a failed assertion is a non-zero exit.

`parallel_worker.py all PROCESSES STORE` or
`parallel_worker.py die STORE FATE`.
"""

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from nestopt.linalg import (
    CG,
    GMRES,
    MINRES,
    DataParallel,
    Dense,
    Diagonal,
    FunctionOperator,
    GaussNewton,
    Hessian,
    KeptGraph,
    Sharded,
    Status,
)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counter:
    """All-reduces of this process, counted where they are made."""

    def __init__(self):
        self.calls, self.numbers, self.real = 0, 0, dist.all_reduce
        dist.all_reduce = self

    def __call__(self, v, *args, **kwargs):
        self.calls, self.numbers = self.calls + 1, self.numbers + v.numel()
        return self.real(v, *args, **kwargs)


def same(left, right):
    gap = float((left - right).abs().max() / right.abs().max())
    assert gap <= 1e-10, gap


def raises(error, words, function):
    try:
        function()
    except error as found:
        assert words in str(found), str(found)
    else:
        raise AssertionError(f"no {error.__name__}")


def data_parallel(rank, size, counter):
    samples = 24
    X, y = rand(samples, 5), torch.arange(samples) % 3
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    mine = slice(rank * samples // size, (rank + 1) * samples // size)

    def loss(p, batch):
        return F.cross_entropy(functional_call(net, p, (batch[0],)), batch[1], reduction="sum") / samples

    def model(p, x):
        return functional_call(net, p, (x,))

    whole = Hessian(lambda p: loss(p, (X, y)), net)
    shards = {
        "kept": Hessian(lambda p: loss(p, (X[mine], y[mine])), net),
        "chunks": Hessian(lambda p: loss(p, (X[mine], y[mine])), net, product=KeptGraph(8)),
        "batches": Hessian(loss, net, data=list(zip(X[mine].split(4), y[mine].split(4), strict=True))),
    }
    V = rand(4, whole.shape[-1], seed=1)
    for shard in shards.values():
        H = DataParallel(shard)
        before = counter.calls, counter.numbers
        for v in (V, V[0], V.reshape(2, 2, -1)):
            same(H @ v, whole @ v)
        assert (counter.calls - before[0], counter.numbers - before[1]) == (3, 2 * V.numel() + V.shape[-1])
        assert H.reductions == 3 and H.reduced_bytes == 8 * (2 * V.numel() + V.shape[-1])
        same(H.all_reduce(shard.gradient), whole.gradient)
        same(H.T @ V, whole @ V)
    G = GaussNewton(lambda p: model(p, X[mine]), lambda z: F.cross_entropy(z, y[mine], reduction="sum") / samples, net)
    true = GaussNewton(lambda p: model(p, X), lambda z: F.cross_entropy(z, y), net)
    same(DataParallel(G) @ V, true @ V)
    A, b = DataParallel(G).shift(0.1), V[:3]
    for solver in (CG(rtol=1e-12), MINRES(rtol=1e-12)):
        alone, together = solver(true.shift(0.1), b), solver(A, b)
        assert together.converged.all() and bool((together.iterations == alone.iterations).all())
        same(together.x, alone.x)
    # blocks of CG: one all-reduce a product, whatever the number of columns
    H = DataParallel(G)
    solution = CG(rtol=1e-8)(H.shift(0.1), b)
    assert H.reductions <= int(solution.iterations.max()) + 2 and H.reductions < solution.products
    wrong = Dense(torch.eye(3 + (rank == 1), dtype=torch.float64), symmetric=True)
    raises(ValueError, "must have one shape", lambda: DataParallel(wrong))
    raises(TypeError, "operator must be a LinearOperator", lambda: DataParallel(V))
    mixed = DataParallel(Dense(torch.eye(2), symmetric=True, definite=rank == 0 or None))
    assert mixed.definite is None


def spd(n):
    Q, _ = torch.linalg.qr(rand(n, n, seed=2))
    return (Q * torch.logspace(0, 1.7, n, dtype=torch.float64)) @ Q.T


def sharded(rank, size, counter):
    n = 16
    matrix = spd(n)
    matrix = (matrix + matrix.T) / 2
    piece = n // size
    mine = slice(rank * piece, (rank + 1) * piece)

    def gathered(v):
        pieces = [torch.empty_like(v) for _ in range(size)]
        dist.all_gather(pieces, v.contiguous())
        return torch.cat(pieces, dim=-1)

    def rows(which):
        return lambda v: gathered(v) @ which[mine].T

    B = rand(2, 1, n, seed=3)
    B[1, 0] = 0
    general = torch.eye(n, dtype=torch.float64) + matrix / 100 + torch.triu(rand(n, n, seed=4), 1) / 20
    indefinite = matrix - 5 * torch.eye(n, dtype=torch.float64)
    for solver, whole in ((CG(), matrix), (MINRES(), indefinite), (GMRES(), general)):
        symmetric = whole is not general
        A = Sharded(FunctionOperator(rows(whole), (piece, piece), torch.float64, symmetric=symmetric))
        alone, together = solver(Dense(whole, symmetric=symmetric), B), solver(A, B[..., mine])
        # sums in another order: a step more or less; GMRES restarts after as many steps as a piece is long
        steps = (together.iterations - alone.iterations).abs().max()
        assert whole is general or int(steps) <= 2, type(solver)
        assert together.converged.all() and alone.converged.all()
        assert float((gathered(together.x) - alone.x).abs().max()) <= 1e-8 * float(alone.x.abs().max()), type(solver)
        torch.testing.assert_close(A.norm(B[..., mine]), B.norm(dim=-1), rtol=1e-13, atol=0)
        tiny, full = 1e-200 * B[..., mine], 1e-200 * B  # squares underflow; one rank's piece of a column may be zero
        if rank:
            tiny[0, 0] = 0
        full[0, 0, piece:] = 0
        torch.testing.assert_close(A.norm(tiny), Dense(whole).norm(full), rtol=1e-13, atol=0)
    A = Sharded(FunctionOperator(rows(matrix), (piece, piece), torch.float64, symmetric=True))
    shifted = CG(preconditioner=Diagonal(1 / (matrix.diagonal()[mine] + 1)))(A.shift(1.0), B[..., mine])
    truth = torch.linalg.solve(matrix + torch.eye(n, dtype=torch.float64), B[..., None])[..., 0]
    assert shifted.converged.all()
    assert float((gathered(shifted.x) - truth).abs().max()) <= 1e-8 * float(truth.abs().max())
    assert CG()(Sharded(-A.operator), B[0, 0, mine]).status == Status.NEGATIVE_CURVATURE
    poisoned = B[0, 0, mine] * (float("nan") if rank == size - 1 else 1.0)
    assert CG()(A, poisoned).status == Status.NON_FINITE  # on every rank
    uneven = Dense(torch.eye(2 + (rank == 0), dtype=torch.float64), symmetric=True)
    raises(ValueError, "pieces of all ranks must have one size", lambda: Sharded(uneven))


def die(rank, fate):
    """Rank 1 multiplies once and then ends, or does nothing; rank 0 must get an error."""
    A = DataParallel(Dense(torch.eye(3), symmetric=True))
    A @ torch.ones(3)
    if rank == 1:
        if fate == "silent":
            time.sleep(60)
        os._exit(0)
    begun = time.monotonic()
    try:
        A @ torch.ones(3)
    except RuntimeError as error:
        print(json.dumps({"message": str(error), "seconds": time.monotonic() - begun}), flush=True)
        os._exit(0)
    os._exit(3)


def agree(rank, size):
    counter = Counter()
    data_parallel(rank, size, counter)
    sharded(rank, size, counter)
    dist.barrier()
    if rank == 0:
        print("all equal", flush=True)
    dist.destroy_process_group()


def start(rank, size, store, seconds, function):
    """Forks a rank: this process has imported, which takes longer than all that a rank does, and has no threads."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
        )
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main():
    if sys.argv[1] == "die":
        store, fate = sys.argv[2:]
        first, last = (start(rank, 2, store, 3, lambda rank=rank: die(rank, fate)) for rank in range(2))
        codes = [os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])]
        os.kill(last, signal.SIGKILL)  # it has ended or sleeps; until it is waited for, its number is its own
        os.waitpid(last, 0)
    else:
        size, store = int(sys.argv[2]), sys.argv[3]
        ranks = [start(rank, size, store, 60, lambda rank=rank: agree(rank, size)) for rank in range(size)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
