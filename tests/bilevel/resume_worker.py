"""The runs of test_resume_families.py, each forked three times: whole, killed at its sixth step, and started again.

`resume_worker.py FOLDER RUN...`
"""

import json
import os
import signal
import sys
import traceback

import optree
import torch
from problems import quadratic
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nestopt import bilevel
from nestopt.linalg import Stopping

STOPPING = Stopping(rtol=0.0, max_iter=9)
CASE = quadratic(12, 5)


def adam():
    return bilevel.TorchOptimizer(
        lambda params: torch.optim.Adam(params, lr=0.05),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    )


def samples(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)


def loss(x, y, batch):
    return ((batch[0] @ y - batch[1]) ** 2).mean() / 2


def regression():
    """Ridge regression on samples."""
    problem = bilevel.Problem(loss, lambda x, y, batch: loss(x, y, batch) + (x.exp() * y**2).sum() / 2)
    return problem, torch.full((4,), -1.0, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)


def block_samples(seed):
    X, t = samples(40, seed)
    return X.reshape(5, 8, 4), t.reshape(5, 8)


def block_loss(x, y, batch):
    return ((torch.einsum("bnp,bp->bn", batch[0], y) - batch[1]) ** 2).mean() / 2


def blocks():
    """Five ridge regressions with one penalty."""
    problem = bilevel.Problem(block_loss, lambda x, y, d: block_loss(x, y, d) + x.exp() * (y**2).sum(1).mean() / 2)
    return problem, torch.tensor(-1.0, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64)


def batches():
    return bilevel.Batches(samples(30, 0), samples(20, 1), batch_size=5, seed=2)


def loader(data, batch_size):
    return DataLoader(TensorDataset(*data), batch_size=batch_size, shuffle=True, generator=torch.Generator())


def networks():
    """Two modules with dropout, a new mask at each step."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.2), nn.Tanh(), nn.Linear(3, 1)).double()
    penalty = nn.ParameterDict({"log": torch.full((2,), -1.0, dtype=torch.float64)})

    def upper_loss(penalty, model, batch):
        return ((model(batch[0])[:, 0] - batch[1]) ** 2).mean()

    def lower_loss(penalty, model, batch):
        squares = torch.stack([(model[i].weight ** 2).sum() for i in (0, 3)])
        biases = sum((model[i].bias ** 2).sum() for i in (0, 3))
        return upper_loss(penalty, model, batch) + penalty["log"].exp() @ squares + biases

    train, valid = loader(samples(30, 0), 7), loader(samples(20, 1), 7)
    return bilevel.from_modules(penalty, model, upper_loss, lower_loss, train, valid, dropout="different")


def prepared(name):
    """Problem, starts, method and data of a run."""
    plain = CASE.problem, CASE.x0, CASE.y0
    if name == "modules":
        problem = networks()
        method = bilevel.SOBA(step_size=0.05, upper_step=adam(), stopping=STOPPING)
        return problem, problem.x0, problem.y0, method, problem.data
    methods = {
        "AID, Adam": lambda: bilevel.AID(upper_step=adam(), stopping=STOPPING),
        "F2SA, second stage": lambda: bilevel.F2SA(
            debias=bilevel.ValueDifference(stopping=Stopping(rtol=0.0, max_iter=5)),
            stopping=Stopping(rtol=0.0, max_iter=2),
        ),
        "BAMM": lambda: bilevel.BAMM(stopping=STOPPING),
        "Unrolled": lambda: bilevel.Unrolled(stopping=STOPPING),
        "SOBA": lambda: bilevel.SOBA(stopping=STOPPING),
        "SABA": lambda: bilevel.SABA(stopping=STOPPING),
        "MRBO": lambda: bilevel.MRBO(stopping=STOPPING),
        "BSVRB": lambda: bilevel.BSVRB(track="hessian", stopping=STOPPING),
    }
    if name == "BSVRB":
        return *blocks(), methods[name](), bilevel.BlockBatches(block_samples(0), blocks=2, batch_size=3)
    if name in ("SOBA", "SABA", "MRBO"):
        return *regression(), methods[name](), batches()
    return *plain, methods[name](), None


def run(name, path, kill_at):
    problem, x0, y0, method, data = prepared(name)
    begun = []

    def watch(k, state):
        begun.append(int(state.iterations))
        if int(state.iterations) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.manual_seed(3)
    callbacks = [bilevel.Checkpoint(path, every=4), watch]
    res = bilevel.solve(problem, x0, y0, method, data=data, callbacks=callbacks)
    saved = res.state.to_dict()
    tensors = [leaf for leaf in optree.tree_leaves(saved) if isinstance(leaf, Tensor)]
    values = torch.tensor([record["value"] for record in res.history])
    answer = {"tensors": [*tensors, values], "steps": int(res.iterations), "begun": begun[0]}
    torch.save(answer, path + ".answer")


def main():
    torch.set_num_threads(1)
    folder, names = sys.argv[1], sys.argv[2:]
    for name in names:
        codes = []
        for kind, kill_at in (("whole", -1), ("killed", 6), ("killed", -1)):
            child = os.fork()
            if not child:
                try:
                    run(name, f"{folder}/{name} {kind}", kill_at)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(json.dumps({"run": name, "codes": codes}), flush=True)


if __name__ == "__main__":
    main()
