"""The faults that published conjugate gradients have, planted in ours: the laws must find each of them."""

from dataclasses import replace

import pytest
import torch
from laws import Promises, check_linear_solver

from nestopt.linalg import CG, Status
from nestopt.linalg.result import evolve, iterate

PROMISES = Promises(condition=1e4, indefinite=Status.NEGATIVE_CURVATURE)


class ReturnsPreviousIterate(CG):
    """Hands back the x before the last step, with the figures of the one after it."""

    def _solve(self, A, b, x0):
        trail = []

        def step(s):
            trail.append(s.x)
            return self.step(A, b, s)

        solution = self._finish(A, b, iterate(step, self.init(A, b, x0), max_iter=self.max_iter))
        return replace(solution, x=trail[-1]) if trail else solution


class DropsTheScalingOfX0(CG):
    """Solves for b / |b| and forgets that x0 has to be divided too."""

    def _solve(self, A, b, x0):
        norm = A.norm(b)
        norm = torch.where((norm > 0) & norm.isfinite(), norm, 1)
        inner = super()._solve(A, b / norm[..., None], x0)
        x, tolerance, error = inner.x * norm[..., None], inner.state.tolerance * norm, inner.state.error * norm
        return self._finish(A, b, evolve(inner.state, x=x, tolerance=tolerance, error=error))


class DropsTheScalingOfB(CG):
    """Solves for b / |b| and forgets to multiply the solution by |b| again."""

    def _solve(self, A, b, x0):
        norm = A.norm(b)
        norm = torch.where((norm > 0) & norm.isfinite(), norm, 1)
        return super()._solve(A, b / norm[..., None], x0)


class StopsOnTheMean(CG):
    """Calls every column converged once the mean of their errors is within the mean of their tolerances."""

    def step(self, A, b, s, look=1):
        s = super().step(A, b, s, look)
        if s.error.ndim and bool(s.error.mean() <= s.tolerance.mean()):
            s = evolve(s, codes=torch.full_like(s.codes, Status.CONVERGED.code))
        return s


class BelievesTheRecurrence(CG):
    """Takes the recurrence's residual for the true one."""

    def _settle(self, A, b, s, columns):
        s = evolve(s, codes=torch.where(columns, Status.CONVERGED.code, s.codes))
        return s, s.r * s.unit[..., None], torch.zeros_like(columns)


class FloorsTheTolerance(CG):
    """Is content with 1e-5, whatever was asked for."""

    def init(self, A, b, x0=None):
        s = super().init(A, b, x0)
        return evolve(s, tolerance=s.tolerance.clamp_min(1e-5), goal=s.goal.clamp_min(1e-5))


FAULTS = [
    (ReturnsPreviousIterate, "check_truth"),
    (DropsTheScalingOfX0, "check_warm_start"),
    (DropsTheScalingOfB, "check_truth"),
    (StopsOnTheMean, "verify"),
    (BelievesTheRecurrence, "check_truth"),
    (FloorsTheTolerance, "check_warm_start"),
]


@pytest.mark.parametrize(("faulty", "law"), FAULTS)
def test_the_laws_find_a_fault(faulty, law, dtype):
    with pytest.raises(AssertionError) as found:
        check_linear_solver(faulty, PROMISES, dtype)
    assert law in [entry.name for entry in found.traceback], found.value  # for the right reason


def test_the_laws_pass_the_healthy_solver(dtype):
    check_linear_solver(CG, PROMISES, dtype)
