"""What each bilevel method asks of a problem, and the refusal of what it cannot take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .problem import Problem

__all__ = ["Assumptions", "MethodTable", "methods", "require"]

_FEATURES = {
    "upper_set": "an upper set",
    "lower_set": "a lower set",
    "lower_prox": "a lower prox",
    "inequality": "inequality constraints",
    "equality": "equality constraints",
}

_SECOND_STAGE = (
    "(1) where the lower level has a set, a prox or constraints, the default second stage `ValueDifference()` takes "
    "products; `debias=None` takes none."
)


@dataclass(frozen=True)
class Assumptions:
    """What a method asks of a problem.

    Attributes:
        family: implicit, through the solver, penalty, or single loop.
        reference: paper.
        upper_set: whether x may be kept in a set.
        lower_set: whether y may be.
        lower_prox: whether the lower level may have a nonsmooth term.
        inequality: whether the lower level may have constraints g(x, y) <= 0.
        equality: whether it may have h(x, y) = 0.
        unique: whether f_yy must be positive definite at y*(x) (or, under constraints, on their tangent space).
        products: whether it takes products with second derivatives, also where the lower level is smooth.
        stochastic: whether it converges on minibatches.
        batched: whether x and y lead with a batch of independent problems, which it solves at once.
    """

    family: str
    reference: str
    upper_set: bool = True
    lower_set: bool = False
    lower_prox: bool = False
    inequality: bool = False
    equality: bool = False
    unique: bool = True
    products: bool = False
    stochastic: bool = False
    batched: bool = False


def require(method: Any, problem: Problem) -> None:
    """Refuse what a method would have to ignore, naming the methods that take it.

    Args:
        method: with `assumptions`.
        problem: the problem.

    Raises:
        ValueError: naming the part and the alternatives.
    """
    present = [name for name in _FEATURES if getattr(problem, name) is not None]
    refused = [name for name in present if not getattr(method.assumptions, name)]
    if refused:
        single = [cls for cls in _classes() if not cls.assumptions.batched]
        able = [cls.__name__ for cls in single if all(getattr(cls.assumptions, name) for name in present)]
        advice = f"use {' or '.join(f'bilevel.{name}()' for name in able)}" if able else "no method takes all of it"
        raise ValueError(
            f"{type(method).__name__} does not take {' and '.join(_FEATURES[name] for name in refused)}, but the "
            f"problem has {' and '.join(refused)}; {advice}."
        )


class MethodTable(list[dict[str, Any]]):
    """One dict a method: its name and the fields of its Assumptions; printed as a Markdown table with a footnote."""

    def __str__(self) -> str:
        heads = "method | family | upper set | lower level | constraints | lower solution | uses | data | paper"
        rows = [f"| {heads} |", "|---" * 9 + "|"]
        for row in self:
            kept = [name for name in ("set", "prox") if row[f"lower_{name}"]]
            sides = [symbol for name, symbol in (("inequality", "g <= 0"), ("equality", "h = 0")) if row[name]]
            cells = (
                f"`{row['method']}`",
                row["family"],
                "yes" if row["upper_set"] else "",
                ", ".join(kept),
                ", ".join(sides),
                "unique" if row["unique"] else "any",
                "products" if row["products"] else f"gradients{' (1)' if kept or sides else ''}",
                "minibatches" if row["stochastic"] else "all, of a batch of problems" if row["batched"] else "all",
                row["reference"],
            )
            rows.append("| " + " | ".join(cells) + " |")
        return "\n".join([*rows, "", _SECOND_STAGE])


def methods() -> MethodTable:
    """The table of all methods and their assumptions; `print` shows it.

    Returns:
        The table, a list of dicts.

    Example:
        >>> from nestopt import bilevel
        >>> next(row["family"] for row in bilevel.methods() if row["method"] == "AID")
        'implicit'
    """
    return MethodTable({"method": cls.__name__, **vars(cls.assumptions)} for cls in _classes())


def _classes() -> list[Any]:
    from .method import Method

    found, todo = [], [Method]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if "assumptions" in vars(cls) and cls.__module__.startswith(__package__ or ""):
            found.append(cls)
    return sorted(found, key=lambda cls: (cls.assumptions.family, cls.__name__))
