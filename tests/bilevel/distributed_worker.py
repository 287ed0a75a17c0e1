"""The ranks that test_distributed.py starts, forked from one process; a failed assertion is a non-zero exit.

`distributed_worker.py FOLDER CHECK...` runs checks, each in two ranks, one after the other, and says how each ended.
"""

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

from nestopt import bilevel
from nestopt.linalg import Stopping

DOUBLE = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def same(left, right, tolerance=1e-10, what=None):
    left, right = torch.as_tensor(left, dtype=DOUBLE), torch.as_tensor(right, dtype=DOUBLE)
    assert left.shape == right.shape, (left.shape, right.shape)
    gap = float((left - right).abs().max() / right.abs().max().clamp_min(1e-300))
    assert gap <= tolerance, (what, gap)


def raises(error, words, function):
    try:
        function()
    except error as found:
        assert words in str(found), str(found)
    else:
        raise AssertionError(f"no {error.__name__}")


X, Z, T, U = rand(26, 4), rand(18, 4, seed=1), rand(26, seed=2), rand(18, seed=3)
START = {"x": torch.full((4,), -1.0, dtype=DOUBLE), "y": {"w": torch.zeros(4, dtype=DOUBLE), "b": rand(1)[0] * 0}}


def upper(x, y, batch):
    return ((batch[0] @ y["w"] + y["b"] - batch[1]) ** 2).mean() / 2


def lower(x, y, batch):
    return upper(x, y, batch) + (x.exp() @ y["w"] ** 2) / 2 + 0.05 * y["b"] ** 2


def flat(result):
    return torch.cat([result.x, result.y["b"].reshape(1), result.y["w"]])


def trajectory(problem, method, data):
    points = []

    def keep(k, state):
        points.append(torch.cat([state.x_vector, state.y_vector, state.value[None]]))

    bilevel.solve(problem, START["x"], START["y"], method, data=data, callbacks=[keep])
    return torch.stack(points)


def methods():
    few = Stopping(rtol=None, max_iter=6)
    return {
        "SOBA": (bilevel.SOBA(step_size=0.2, upper_step=0.1, stopping=few), 7),
        "AID": (bilevel.AID(stopping=Stopping(rtol=1e-6, max_iter=3)), None),
        "F2SA": (bilevel.F2SA(debias=None, steps=2, stopping=few), 7),
        "SABA": (bilevel.SABA(step_size=0.2, upper_step=0.1, stopping=few), 7),  # unequal blocks: 7, 7, 7, 5
        "SRBA": (bilevel.SRBA(step_size=0.2, upper_step=0.1, stopping=few), 7),
        "MRBO": (bilevel.MRBO(step_size=0.2, upper_step=0.1, stopping=few), 7),
        "StocBiO": (bilevel.StocBiO(step_size=0.2, upper_step=0.1, inner=2, terms=3, stopping=few), 7),
    }


def first_order():
    """Methods that touch the problem through its Oracle only, with sizes given."""
    few = Stopping(rtol=0.0, max_iter=5)
    inside = {"penalty": 20.0, "auxiliary_step_size": 0.1, "debias": None, "stopping": few}
    sizes = {"upper_step_size": 0.05, "lower_step_size": 0.1, **inside}
    bome = {"steps": 2, "step_size": 0.05, "auxiliary_step_size": 0.1, "debias": None, "stopping": few}
    return {
        "F2SA": bilevel.F2SA(steps=2, **sizes),
        "F3SA": bilevel.F3SA(**sizes),
        "VPBGD": bilevel.VPBGD(steps=2, step_size=0.02, **inside),
        "BOME": bilevel.BOME(**bome),
        "MEHA": bilevel.MEHA(gamma=1.0, **sizes),
    }


def block_loss(y, batch):
    return ((torch.einsum("bnp,bp->bn", batch[0], y) - batch[1]) ** 2).mean() / 2


def blocks(rank, size):
    """Four ridge regressions with one penalty, of which each rank has its samples of every drawn block."""
    problem = bilevel.Problem(
        lambda x, y, d: block_loss(y, d), lambda x, y, d: block_loss(y, d) + x.exp() * (y**2).sum(1).mean() / 2
    )
    start = torch.tensor(0.0, dtype=DOUBLE), torch.zeros(4, 3, dtype=DOUBLE)
    lower, upper = (rand(4, 8, 3, seed=4), rand(4, 8, seed=5)), (rand(4, 8, 3, seed=6), rand(4, 8, seed=7))
    source = bilevel.BlockBatches(lower, upper, blocks=2, batch_size=5, seed=5)
    for track in ("adjoint", "hessian"):
        method = bilevel.BSVRB(track=track, step_size=0.2, upper_step=0.1, stopping=Stopping(rtol=0.0, max_iter=6))
        alone = bilevel.solve(problem, *start, method, data=source)
        together = bilevel.solve(bilevel.data_parallel(problem), *start, method, data=bilevel.Shards(source))
        for part in ("x_vector", "y_vector", "adjoint", "error"):
            same(getattr(together.state, part), getattr(alone.state, part))


def data_parallel(rank, size):
    problem = bilevel.Problem(upper, lower)
    shared = bilevel.data_parallel(problem)
    for name, (method, batch_size) in methods().items():
        source = bilevel.Batches((X, T), (Z, U), batch_size=batch_size, seed=5)
        alone = trajectory(problem, method, source)
        together = trajectory(shared, method, bilevel.Shards(source))
        try:
            same(together, alone)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        everywhere = [torch.empty_like(together) for _ in range(size)]
        dist.all_gather(everywhere, together)
        assert torch.equal(everywhere[0], everywhere[-1]), name  # to the last bit, so that no rank decides otherwise
    # derivatives of all kinds
    source = bilevel.Batches((X, T), (Z, U), batch_size=None)
    whole, mine = source(0), bilevel.Shards(source)(0)
    spaces = bilevel.problem.Spaces.of(START["x"], START["y"])
    x, y = rand(4, seed=6), rand(5, seed=7)
    one = bilevel.problem.Linearization(problem, spaces, x, y, whole)
    two = bilevel.problem.Linearization(shared, spaces, x, y, mine)
    V = rand(3, 5, seed=8)
    for part in ("upper", "lower", "upper_x", "upper_y", "lower_y"):
        same(getattr(two, part), getattr(one, part))
    same(two.hessian @ V, one.hessian @ V)
    same(two.cross.T @ V, one.cross.T @ V)
    same(two.cross @ rand(4, seed=9), one.cross @ rand(4, seed=9))
    hg = bilevel.hypergradient(shared, START["x"], START["y"], data=mine)
    same(hg.value, bilevel.hypergradient(problem, START["x"], START["y"], data=whole).value)
    blocks(rank, size)
    # what must be refused
    raises(ValueError, "the smallest block of the Batches has 1 samples, which 2 ranks cannot share", lambda: (
        bilevel.Shards(bilevel.Batches((X, T), batch_size=5))))  # fmt: skip
    raises(ValueError, "x differs between the ranks", lambda: bilevel.AID()(
        bilevel.data_parallel(problem), START["x"] + rank, START["y"], data=bilevel.Shards(source)))  # fmt: skip
    few = bilevel.Shards(lambda k: (X[:1], T[:1]))
    raises(ValueError, "1 samples cannot be shared by 2 ranks", lambda: few(0))
    poisoned = lambda k: (X * (float("nan") if rank else 1.0), T)  # noqa: E731
    lost = bilevel.solve(shared, START["x"], START["y"], data=poisoned)
    assert lost.status.name == "NON_FINITE", lost.status  # on every rank


class Penalty(nn.Module):
    """The logarithm of the penalty of each layer."""

    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.tensor([-3.0, -2.0, -3.0, -2.0]))

    def forward(self, squares):
        return self.log.exp() @ squares


class Model(nn.Module):
    """A perceptron that returns its layers' squares with the logits, while FSDP has gathered them."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, inputs):
        return self.net(inputs), torch.stack([(p**2).sum() for p in self.net.parameters()])


def modules():
    torch.manual_seed(0)
    return Penalty().double(), Model().double()


def cross_entropy(penalty, model, batch):
    return F.cross_entropy(model(batch[0])[0], batch[1])


def penalised(penalty, model, batch):
    logits, squares = model(batch[0])
    return F.cross_entropy(logits, batch[1]) + penalty(squares)


def fully_sharded(rank, size):
    labels, judged = torch.arange(26) % 3, torch.arange(18) % 3
    source = bilevel.Batches((X, labels), (Z, judged), batch_size=7, seed=5)
    sharded = modules()
    for module in sharded:
        fully_shard(module)
    two = bilevel.fully_sharded(bilevel.from_modules(*sharded, cross_entropy, penalised))
    start = two.x0, two.y0
    for name, method in first_order().items():
        one = bilevel.from_modules(*modules(), cross_entropy, penalised)
        alone = bilevel.solve(one, one.x0, one.y0, method, data=lambda k: source(k))  # a function: its batches' errors
        together = bilevel.solve(two, *start, method, data=bilevel.Shards(source))
        assert together.iterations == alone.iterations == 5, (name, together.status, alone.status)
        two.copy_to(together)
        for module, values in zip(sharded, (alone.x, alone.y), strict=True):
            for key, p in module.named_parameters():
                same(p.detach().full_tensor(), values[key])
                assert p.to_local().numel() < p.numel(), name
        for record, other in zip(together.history, alone.history, strict=True):
            for key in ("value", "error", "lower", "upper"):
                # where BOME's multiplier is 0, its error has a term of the size eps^(1/2) (an estimated curvature)
                limit = 1e-8 if (name, key) == ("BOME", "error") else 1e-10
                same(record[key], other[key], limit, what=(name, record["iteration"], key))
    whole = bilevel.Shards(bilevel.Batches((X, labels), (Z, judged), batch_size=None))
    for automatic in (bilevel.F2SA(debias=None, steps=1), bilevel.VPBGD(debias=None), bilevel.BOME(debias=None)):
        res = bilevel.solve(two, *start, replace(automatic, stopping=Stopping(rtol=0.0, max_iter=2)), data=whole)
        errors = [torch.empty((), dtype=DOUBLE) for _ in range(size)]
        dist.all_gather(errors, res.state.error)
        assert torch.equal(errors[0], errors[1]) and res.value < res.history[0]["value"], (automatic, res.history)
    refused = [
        bilevel.AID(), bilevel.GPBGD(debias=None), bilevel.SOBA(), bilevel.ValueDifference(),
        bilevel.LVHBA.published(), bilevel.BiCGAFFA.published(),
        bilevel.BLOCC(upper_step=bilevel.ConstantStep(0.1), debias=None),
    ]  # fmt: skip
    for other in refused:
        raises(ValueError, "fully_sharded: this method", lambda other=other: bilevel.solve(
            two, *start, other, data=bilevel.Shards(source)))  # fmt: skip
    raises(ValueError, "under fully_shard only backward()", lambda: bilevel.solve(
        two, two.x0, two.y0, data=bilevel.Shards(source)))  # fmt: skip
    raises(ValueError, "is not sharded", lambda: bilevel.fully_sharded(one))


def die(rank, fate):
    """Rank 1 takes some steps and then ends, or does nothing; rank 0 must get an error."""
    begun = time.monotonic()

    def leave(k, state):
        nonlocal begun
        begun = time.monotonic()
        if rank == 1 and k == 3:
            if fate == "silent":
                time.sleep(60)
            os._exit(0)

    source = bilevel.Shards(bilevel.Batches((X, T), (Z, U), batch_size=7))
    problem = bilevel.data_parallel(bilevel.Problem(upper, lower))
    try:
        bilevel.solve(problem, START["x"], START["y"], bilevel.SOBA(), data=source, callbacks=[leave])
    except RuntimeError as error:
        print(json.dumps({"fate": fate, "message": str(error), "seconds": time.monotonic() - begun}), flush=True)
        os._exit(0)
    os._exit(3)


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
        function(rank, size)
        dist.barrier()  # a rank that leaves while another still receives is a lost one
        dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main():
    folder, names = sys.argv[1], sys.argv[2:]
    checks = {"data_parallel": data_parallel, "fully_sharded": fully_sharded}
    checks |= {fate: lambda rank, size, fate=fate: die(rank, fate) for fate in ("ends", "silent")}
    for name in names:
        lost = name in ("ends", "silent")
        ranks = [start(rank, 2, f"{folder}/{name}", 3 if lost else 60, checks[name]) for rank in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(ranks[0], 0)[1])]
        if lost:
            os.kill(ranks[1], signal.SIGKILL)  # it has ended or sleeps; until it is waited for, its number is its own
        last = os.waitstatus_to_exitcode(os.waitpid(ranks[1], 0)[1])
        print(json.dumps({"check": name, "codes": [*codes, *([] if lost else [last])]}), flush=True)


if __name__ == "__main__":
    main()
