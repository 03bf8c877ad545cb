"""The full posterior of the linearised model, as a Gaussian process over the training outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora.errors import DataError
from pyrolora.guides import Latent
from pyrolora.inference.jacobian import Batches, Part, examples, hessian, slabs
from pyrolora.matrices import check_finite, decomposing
from pyrolora.model import JointModel

MOST_ROWS = 4096
"""Largest n k that `Dual` takes: its matrices then have 128 MiB each, and a Newton step takes some
seconds on one core."""
DECADES = range(-6, 4)
"""Exponents of λ at which the evidence is evaluated, relative to the largest eigenvalue of the
curvature at outputs of zero."""
REMEDY = "choose a lora_alpha nearer to the default, or scale the features"
COLUMNS = 2**13
"""Columns of the Jacobian that are multiplied at a time, in double precision."""


@dataclass(frozen=True)
class Mode:
    """The mode of the posterior for one λ.

    α with θ* − θ₀ = J̃ᵀ α / λ; per example the root S (n, k, k) of the Hessian H_i = S Sᵀ of −log p
    there; the lower factor of I + Sᵀ K S / λ; and the evidence.
    """

    alpha: Tensor
    root: Tensor
    factor: Tensor
    log_evidence: float


class Dual:
    """The linearised model's posterior of all P latent entries θ, without a P × P matrix.

        f_i(θ) = f_i(θ̄) + J_i (θ − θ̄),   θ ~ N(θ₀, I / λ),   p(θ | y) ≈ N(θ*, (λ I + Jᵀ H J)⁻¹)

    with θ* its mode and H the Hessian of −log p(y|f) there, block by block S_i S_iᵀ. Both depend on
    θ through the training outputs only, that is, on K = J Jᵀ (n k, n k) and on J (θ₀ − θ̄); J has k
    rows per example, one for each direction in which the likelihood depends on its outputs. The
    mode is found by Newton's method on g = J (θ − θ₀), a Gaussian process with covariance K / λ;
    then

        log p(y | λ) ≈ log p(y | f(θ*)) − ½ λ ‖θ* − θ₀‖² − ½ log |I + Sᵀ K S / λ|.

    All of it is exact for a Gaussian law. Draws come by Matheron's rule, with z ~ N(0, I) and
    ε ~ N(0, I):

        θ = θ* + λ^(−½) z − Jᵀ S (Sᵀ K S + λ I)⁻¹ (λ^(−½) Sᵀ J z + ε)

    Time: at construction, per slab of layers (`slabs`) a forward pass over the examples and k
    backward ones, and n² k² P multiplications in double precision; per Newton step (n k)³ / 3; for
    draws, the slabs once more unless there is only one. Memory: 32 (n k)² bytes, draws x P numbers
    twice, and a slab.

    All entries share one λ: with one each for A and B the evidence often switches a factor off,
    and the predictions do not change.

    Parameters
    ----------
    joint
        The model at θ̄; its heads and its task are constants here.
    batches
        The training examples.
    centre
        θ₀, (P,).
    latent
        The factors that θ consists of.
    draws
        Number of draws that `deviations` returns.

    Raises
    ------
    DataError
        For more than `MOST_ROWS` rows.

    References
    ----------
    C. E. Rasmussen and C. K. I. Williams (2006), "Gaussian Processes for Machine Learning",
    sections 3.4 and 3.5. A. Immer et al. (2021), "Improving predictions of Bayesian neural nets via
    local linearization", AISTATS. J. Wilson et al. (2020), "Efficiently Sampling Functions from
    Gaussian Process Posteriors", ICML.
    """

    def __init__(
        self, joint: JointModel, batches: Batches, centre: Tensor, latent: Latent, draws: int
    ) -> None:
        self.joint, self.batches, self.latent = joint, batches, latent
        self.parts = examples(joint, batches)
        self.k = self.parts[0].basis.shape[-1]
        self.n = sum(len(part.output) for part in self.parts)
        check_size(self.n, self.k)
        bank = joint.program.bank
        self.shift = (centre - bank.latent_part(latent, bank.means())).detach()
        self.z = torch.randn(draws, len(self.shift), device=centre.device)
        rows = self.n * self.k
        self.K = torch.zeros(rows, rows, dtype=torch.float64, device=centre.device)
        self.Jz = torch.zeros(rows, draws, dtype=torch.float64, device=centre.device)
        self.start = torch.zeros(rows, dtype=torch.float64, device=centre.device)
        self._only: tuple[Tensor, Tensor] | None = None
        self.noise = torch.randn_like(self.Jz)
        for number, (columns, J) in enumerate(slabs(joint, batches, self.parts, latent)):
            for few in J.split(COLUMNS, dim=1):  # in float32 K may have negative eigenvalues
                few = few.double()
                self.K.addmm_(few, few.T)
            self.Jz += J @ self.z[:, columns].T
            self.start += J @ self.shift[columns]
            self._only = (columns, J) if number == 0 else None
        self._last = torch.zeros_like(self.start)
        outputs = [part.output for part in self.parts]
        name = "the Jacobian of the training outputs"
        check_finite(name, self.K, self.Jz, self.start, *outputs, remedy=REMEDY)

    @torch.no_grad()
    def best_precision(self) -> float:
        """Return the λ of the highest evidence.

        It is the best of `DECADES`, refined between its neighbours by golden section of log λ.
        """
        flat = [self._root(part, torch.zeros_like(part.output)) for part in self.parts]
        inner = self._inner(torch.cat(flat))
        with decomposing("the curvature of the loss", inner, remedy=REMEDY):
            scale = float(torch.linalg.eigvalsh(inner)[-1])
        if scale <= 0:
            raise DataError(
                "no output depends on the latent factors, and the evidence prefers no λ; give "
                "prior_scale"
            )

        def evidence(x: float) -> float:
            return self.mode(scale * 10**x).log_evidence

        best = max(DECADES, key=evidence)
        return scale * 10 ** _golden(evidence, best - 1, best + 1)

    @torch.no_grad()
    def mode(self, precision: float) -> Mode:
        """Return the mode of θ for that λ.

        Damped Newton steps on a concave objective start from the mode of the last λ, or from the
        prior's mean if that is better.
        """
        points = [(alpha, self.K @ alpha / precision) for alpha in (self._last, 0 * self._last)]
        values = [self._law(self.start + g)[0] - 0.5 * float(alpha @ g) for alpha, g in points]
        value = max(values)
        alpha, g = points[values.index(value)]
        _, slope, root = self._law(self.start + g)
        for _ in range(100):
            factor = self._factor(root, precision)
            b = self._times(root, self._transposed(root, g)) + slope
            inner = self._transposed(root, self.K @ b / precision)
            step = b - self._times(root, _solve(factor, inner)) - alpha
            step_g = self.K @ step / precision
            rise = float(step_g @ (slope - alpha))
            if rise < 1e-9 * (1 + abs(value)):
                break
            size = self._size(rise, alpha, g, step, step_g)
            alpha, g = alpha + size * step, g + size * step_g
            task, slope, root = self._law(self.start + g)
            value = task - 0.5 * float(alpha @ g)
        self._last = alpha
        factor = self._factor(root, precision)
        return Mode(alpha, root, factor, value - float(factor.diagonal().log().sum()))

    def _size(self, first: float, alpha: Tensor, g: Tensor, step: Tensor, step_g: Tensor) -> float:
        """Return the share of a step to take.

        All of it, or, where the objective falls at its end, a part that ends before it does.
        ``first`` is the slope of the concave objective at the beginning.
        """
        low, size, high = 0.0, 1.0, 1.0
        for _ in range(50):
            _, slope, _ = self._law(self.start + g + size * step_g)
            now = float(step_g @ (slope - alpha - size * step))
            if abs(now) <= 0.1 * first or (now >= 0 and (size == 1 or now <= 0.5 * first)):
                return size
            low, high = (size, high) if now > 0 else (low, size)
            size = 0.5 * (low + high)
        return low

    @torch.no_grad()
    def deviations(self, precision: float) -> Tensor:
        """Return draws of θ − θ̄, (draws, P)."""
        mode = self.mode(precision)
        z, root = self.z * precision**-0.5, mode.root
        seen = self._transposed(root, self.Jz * precision**-0.5) + self.noise
        # (Sᵀ K S + λ I)⁻¹ = (1 / λ) (I + Sᵀ K S / λ)⁻¹
        weights = mode.alpha[:, None] - self._times(root, _solve(mode.factor, seen))
        weights = (weights / precision).to(z.dtype)
        deviations = self.shift + z
        again = slabs(self.joint, self.batches, self.parts, self.latent)
        for columns, J in again if self._only is None else [self._only]:
            deviations[:, columns] += weights.T @ J
        return deviations

    def _law(self, moved: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return log p(y|f̄ + Q g), its gradient in g (n k,), and roots (n, k, k) of its Hessian."""
        total, slopes, roots, start = 0.0, [], [], 0
        for part in self.parts:
            count = len(part.output)
            g = moved.view(self.n, self.k)[start : start + count].detach()
            start += count
            with torch.enable_grad():
                g.requires_grad_()
                output = part.at(g)
                log_prob = self.joint.task.log_prob(output, part.batch).double().sum()
                slopes.append(torch.autograd.grad(log_prob, g)[0])
            total += float(log_prob.detach())
            roots.append(self._root(part, output.detach()))
        return total, torch.cat(slopes).flatten(), torch.cat(roots)

    def _root(self, part: Part, output: Tensor) -> Tensor:
        """Return the root S (b, k, k) of the Hessian at these outputs."""
        full = hessian(self.joint.task, output.reshape(part.shape), part.batch)
        values, vectors = torch.linalg.eigh(part.basis.mT @ full @ part.basis)
        return vectors * values.clamp(min=0).sqrt()[:, None]

    def _factor(self, root: Tensor, precision: float) -> Tensor:
        inner = self._inner(root).div_(precision)
        inner.diagonal().add_(1.0)
        factor, failed = torch.linalg.cholesky_ex(inner)
        if failed:
            raise DataError(
                f"with a prior of the scale {precision**-0.5:.4g} the curvature of the data is "
                "singular in double precision; give a smaller prior_scale"
            )
        return factor

    def _inner(self, root: Tensor) -> Tensor:
        """Return Sᵀ K S."""
        half = self._transposed(root, self.K)
        return self._transposed(root, half.T)

    def _transposed(self, root: Tensor, right: Tensor) -> Tensor:
        """Return Sᵀ times (n k, ...)."""
        return self._times(root.mT, right)

    def _times(self, root: Tensor, right: Tensor) -> Tensor:
        """Return S times (n k, ...)."""
        columns = right.reshape(self.n, self.k, -1)
        return (root @ columns).reshape(right.shape)


def check_size(examples: int, directions: int = 1) -> None:
    """Raise `DataError` for a curvature that is too large."""
    rows = examples * directions
    if rows > MOST_ROWS:
        raise DataError(
            f"curvature='full' takes a matrix with a row for each training example and output, "
            f"{examples} x {directions} here, and at most {MOST_ROWS}; fit on "
            f"{MOST_ROWS // directions} examples, or choose curvature='kronecker'"
        )


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    columns = right.reshape(len(factor), -1)
    return torch.cholesky_solve(columns, factor).reshape(right.shape)


def _golden(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the maximiser of a function with one maximum, to within 0.02."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > 0.02:
        if at_left > at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return 0.5 * (low + high)
