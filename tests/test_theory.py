"""What a constant pullback does to the limiting error of the average on noisy quadratics: derived, proved, simulated.

Au and Block, arXiv 2606.25086, eq. 8 and Propositions 2 and 3. The paper's own wording of the propositions was not at
hand; they are taken as: "for any admissible learning rate and averaging weight, some gain strictly lowers the limiting
error of the average" (2), "and by any factor on some instance" (3). What is true of them is derived here.

**Setting.** f(x) = ½ Σ h x², h > 0, gradient g = h x + σ ξ with independent standard normal ξ. Every coordinate is on
its own; with a = α h, ρ = 1 − β, 0 < β < 1, and errors in units of (α σ)²:

    x₊ = (1 − a − Π) x + Π e − ξ                (1)
    e₊ = ρ e + β x₊                             (2)

"Limiting error" is V = lim E[e²]. Admissible: SGD itself is stable, 0 < a < 2.

**The average is an AR(2) process.** (2) gives β x₊ = e₊ − ρ e and, a step earlier, β x = e − ρ e₋. In β times (1):

    e₊ = φ1 e + φ2 e₋ − β ξ,    φ1 = ρ + (1 − a − Π) + β Π,    φ2 = −ρ (1 − a − Π)                  (3)

No other noise enters: an AR(2) process, not an ARMA. It has a limit if and only if (φ1, φ2) lies in the triangle

    φ1 + φ2 < 1,    φ2 − φ1 < 1,    φ2 > −1                                                         (4)

(Box and Jenkins, Time Series Analysis, section 3.2.4). Its Yule-Walker equations, from (3) times e, e₋ and e₋₋, are
γ0 = φ1 γ1 + φ2 γ2 + β², γ1 = φ1 γ0 + φ2 γ1, γ2 = φ1 γ1 + φ2 γ0. The second gives γ1, the third γ2, the first then

    V = γ0 = β² (1 − φ2) / ((1 + φ2) (1 − φ1 − φ2) (1 + φ1 − φ2))                                   (5)

(the same section; Hamilton, Time Series Analysis, 1994, section 3.4).

**In one variable.** Let y = 1 − φ2 = 1 + ρ (1 − a − Π), which falls as Π grows, and k = β a. From (3),
1 − φ1 − φ2 = k, whatever the gain, 1 + φ2 = 2 − y, and 1 + φ1 − φ2 = 2 y − k. So

    V = (β / a) y / ((2 − y) (2 y − k)),    stable for k/2 < y < 2                                  (6)

In gains from 0 on, stable means Π < (2 − β) (2 − a) / (2 (1 − β)): a gain of 1 about halves the largest learning rate.
d log V / dy = 2 (y² − k) / (y (2 − y) (2 y − k)): V falls until y = √k and grows after it. Hence

    best gain Π* = 1 − a + (1 − √k) / (1 − β), there V* = β / (a (2 − √k)²)                         (7)

and, since V(y) = V(y0) is a quadratic in y whose roots multiply to k, with y0 = 1 + ρ (1 − a) the y of gain 0:

    V(Π) < V(0)    if and only if    y(Π) lies strictly between y0 and k / y0                       (8)

**Proposition 2.** By (8), some gain strictly lowers V unless y0 = √k, and a positive one does if and only if y0 > √k,
that is, 1 + (1 − β) (1 − a) > √(β a), that is, a < a*(β), where a* falls from 2 (β → 0) to 1 (β → 1).
- Learning rates up to 1 / max h, all β: true, and for all gains at once. With y1 = 1 − ρ a, the y of Π = 1,
  y1 y0 − k = (1 − a) (1 + ρ − ρ² a): positive for a < 1, so by (8) EVERY gain in (0, 1] lowers EVERY coordinate's
  error.
- Learning rates up to 2 / max h: false as worded. For a > a* (say β = 1/2, a = 3/2) every positive gain raises V.
- Measured from the stepped weights (pullback_from="step") it is true as worded. There, with s = 1 − Π, w = s ρ (1 − a),
  (1) is x₊ = s (1 − a) x + Π e − s ξ, so φ1 = ρ + s (1 − a) + β Π, φ2 = −w, the noise is β s ξ, and

      V = (β s / a) (1 + w) / ((1 − w) (2 + 2 w − β s a))                                           (9)

  d log V / d log s = 2 ((1 + w)² − β s a w) / ((1 − w²) (2 + 2 w − β s a)), and (1 + w)² ≥ 4 w > β s a w for w > 0: V
  falls in Π all the way, for every 0 < a < 2 and 0 < β < 1. Nor does this pullback ever make the recursion unstable.

**Proposition 3.** Take a = β = ε and the gain 1. (6) gives, as a polynomial in δ = 1 − ε,

    V(0) / V(1) − 1 / (2 ε)  =  (1 + δ + 2 δ² + 5 δ³ + δ⁴ + 2 δ⁵) / (positive)  >  0                (10)

so ε = 1 / (2 F) improves by more than F. For a fixed instance eq. 8 can not: V(0) / V* is finite. From the stepped
weights any instance will do: V(0) ≥ β / (4 a) by (7), and for s ≤ 1/4 (9) is at most (β / a) 5 s / 3: s = 3 / (20 F).

**What it costs.** The roots 1 − d and 1 − c, d ≤ c, of z² = φ1 z + φ2 say how fast the start is forgotten. d c is 1 −
φ1 − φ2 = β a s (s = 1 for eq. 8) and β s the scale of the noise, so V = (d c / a)² F(1 − d, 1 − c), with F(r1, r2) =
(1 + r1 r2) / ((1 − r1 r2) (1 − r1²) (1 − r2²)), which is (5) in the roots. SGD WITHOUT a gain and with the averaging
weight d has the roots 1 − d and 1 − a, and V = d² F(1 − d, 1 − a). The ratio of the two is H(c) / H(a) with H(c) = c²
F(1 − d, 1 − c). H grows in c: in r2 = 1 − c, d log H / d r2 has the sign of −(1 − r1) (1 + r1 r2²). And c > a: at z =
1 − β s the polynomial z² − φ1 z − φ2 is −ρ β Π (eq. 8), or −s (1 − a) β Π from the stepped weights, below 0 for a <
1, so d < β s. Hence for 0 < a < 1 every pullback is beaten by averaging longer, with the smaller weight d, which
forgets the start no later. The propositions compare at the SAME averaging weight.

**Simulation.** n independent coordinates, one time slice: n times the mean of e² over V is χ² with n degrees of freedom
(standard error √(2 / n)). Laurent and Massart (Annals of Statistics 28, 2000, lemma 1): for every t > 0 it leaves
n ± (2 √(n t) + 2 t) with probability at most 2 exp(−t). With t = log(2 K / risk) none of K comparisons does, but for
that risk (Bonferroni), however they depend on each other: about 6 standard errors here. Rounding: a step of float32
moves e by at most a few 2^−24 |e|, which the recursion forgets in 1 / d steps: at d = 0.0024, the slowest here, 1e−4 of
|e| if all errors had one sign, and less as they come (5e−6 of V, measured below), where the sampling bound is 2 %.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "research"))
import quadratics
from quadratics import autoregression, is_stable, limiting_error

FORMS = ("weights", "step")
COORDINATES = 1 << 17
RISK = 1e-6  # of one false alarm in all comparisons of a test


def between(low: Fraction | int, high: Fraction | int) -> st.SearchStrategy[Fraction]:
    """Fractions strictly between the two."""
    return st.fractions(0, 1, max_denominator=1000).filter(lambda t: 0 < t < 1).map(lambda t: low + t * (high - low))


CURVATURES, WEIGHTS, GAINS = between(0, 2), between(0, 1), between(0, 1)
forms = pytest.mark.parametrize("form", FORMS)


def one_step(
    x: Fraction, e: Fraction, noise: Fraction, a: Fraction, beta: Fraction, gain: Fraction, form: str
) -> tuple[Fraction, Fraction]:
    """The rule itself, with α = σ = 1."""
    stepped = x - (a * x + noise)
    x_new = stepped + gain * (e - (x if form == "weights" else stepped))
    return x_new, (1 - beta) * e + beta * x_new


def solve(matrix: list[list[Fraction]], right: list[Fraction]) -> list[Fraction]:
    """Gauss and Jordan, in exact arithmetic."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        pivot = next(j for j in range(i, len(rows)) if rows[j][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(len(rows)):
            if j != i:
                rows[j] = [value - rows[j][i] * top for value, top in zip(rows[j], rows[i], strict=True)]
    return [row[-1] for row in rows]


def lyapunov_error(a: Fraction, beta: Fraction, gain: Fraction, form: str) -> Fraction:
    """E[e²] from the stationary covariance P = M P Mᵀ + b bᵀ of (x, e), where M and b are read off `one_step`."""
    one, zero = Fraction(1), Fraction(0)
    (m_xx, m_ex), (m_xe, m_ee), (b_x, b_e) = (
        one_step(*unit, a, beta, gain, form) for unit in ((one, zero, zero), (zero, one, zero), (zero, zero, one))
    )
    kept = [  # of (P_xx, P_xe, P_ee), after a step
        [m_xx**2, 2 * m_xx * m_xe, m_xe**2],
        [m_xx * m_ex, m_xx * m_ee + m_xe * m_ex, m_xe * m_ee],
        [m_ex**2, 2 * m_ex * m_ee, m_ee**2],
    ]
    matrix = [[(i == j) - kept[i][j] for j in range(3)] for i in range(3)]
    return solve(matrix, [b_x * b_x, b_x * b_e, b_e * b_e])[2]


# The closed form.


@forms
@given(a=CURVATURES, beta=WEIGHTS, gain=GAINS, seed=st.integers(0, 2**32))
def test_average_is_an_ar2_process(form: str, a: Fraction, beta: Fraction, gain: Fraction, seed: int) -> None:
    phi1, phi2, scale = autoregression(a, beta, gain, form)
    random = Random(seed)
    x, averages = Fraction(1), [Fraction(1)]
    for _ in range(6):
        noise = Fraction(random.randint(-50, 50), 10)
        x, e = one_step(x, averages[-1], noise, a, beta, gain, form)
        averages.append(e)
        if len(averages) > 2:  # at the first step, x was no result of a step before
            assert e == phi1 * averages[-2] + phi2 * averages[-3] - scale * noise


@forms
@given(a=CURVATURES, beta=WEIGHTS, gain=between(-1, 2))
def test_yule_walker_equals_lyapunov_exactly(form: str, a: Fraction, beta: Fraction, gain: Fraction) -> None:
    assume(is_stable(a, beta, gain, form))
    assert limiting_error(a, beta, gain, form) == lyapunov_error(a, beta, gain, form)


@forms
def test_yule_walker_equals_lyapunov_exactly_on_a_grid(form: str) -> None:
    stable = 0
    for i in range(1, 8):
        for j in range(1, 16):
            for m in range(-4, 17):
                a, beta, gain = Fraction(j, 8), Fraction(i, 8), Fraction(m, 8)
                if is_stable(a, beta, gain, form):
                    stable += 1
                    assert limiting_error(a, beta, gain, form) == lyapunov_error(a, beta, gain, form)
    assert stable > 1000


@given(a=CURVATURES, beta=WEIGHTS, gain=between(-1, 2))
def test_closed_form_in_one_variable(a: Fraction, beta: Fraction, gain: Fraction) -> None:
    y, k = 1 + (1 - beta) * (1 - a - gain), a * beta
    assert is_stable(a, beta, gain) == (k / 2 < y < 2)
    assume(is_stable(a, beta, gain))
    assert limiting_error(a, beta, gain) == beta / a * y / ((2 - y) * (2 * y - k))


@forms
def test_stable_where_both_roots_are_inside_the_unit_circle(form: str) -> None:
    """Not on the boundary: no (a, β, Π) of this grid is within 1e-3 of it but those left out."""
    a, beta, gain = torch.meshgrid(
        torch.linspace(0.013, 2.6, 41, dtype=torch.float64),
        torch.linspace(0.01, 0.99, 21, dtype=torch.float64),
        torch.linspace(-0.5, 2.2, 41, dtype=torch.float64),
        indexing="ij",
    )
    phi1, phi2, _ = autoregression(a, beta, gain, form)
    companion = torch.stack([torch.stack([phi1, phi2], -1), torch.tensor([1.0, 0.0]).expand(*phi1.shape, 2)], -2)
    radius = torch.linalg.eigvals(companion).abs().amax(-1)
    clear = (radius - 1).abs() > 1e-3
    assert clear.double().mean() > 0.95
    assert torch.equal(is_stable(a, beta, gain, form)[clear], (radius < 1)[clear])


@given(a=CURVATURES, beta=WEIGHTS, gain=between(0, 3))
def test_a_gain_from_the_weights_lowers_the_largest_learning_rate(a: Fraction, beta: Fraction, gain: Fraction) -> None:
    assert is_stable(a, beta, gain) == (gain < (2 - beta) * (2 - a) / (2 * (1 - beta)))


@given(a=CURVATURES, beta=WEIGHTS, gain=GAINS)
def test_a_gain_from_the_stepped_weights_keeps_every_learning_rate_stable(
    a: Fraction, beta: Fraction, gain: Fraction
) -> None:
    assert is_stable(a, beta, gain, "step")


# Proposition 2.


@given(a=CURVATURES, beta=WEIGHTS, t=GAINS)
def test_a_gain_helps_exactly_between_zero_and_the_even_gain(a: Fraction, beta: Fraction, t: Fraction) -> None:
    lowest, highest = 1 - a - 1 / (1 - beta), (2 - beta) * (2 - a) / (2 * (1 - beta))
    gain = lowest + t * (highest - lowest)
    even = quadratics.even_gain(a, beta)
    helps = limiting_error(a, beta, gain) < limiting_error(a, beta, Fraction(0))
    assert helps == (min(0, even) < gain < max(0, even))
    assert (even > 0) == ((1 + (1 - beta) * (1 - a)) ** 2 > a * beta)


def test_every_gain_up_to_one_helps_for_learning_rates_below_one_over_the_curvature() -> None:
    """Exactly, on a grid; a = 31/32 included, where the gain 1 helps least."""
    for i in range(1, 16):
        for j in range(1, 32):
            beta, a = Fraction(i, 16), Fraction(j, 32)
            errors = [limiting_error(a, beta, Fraction(m, 8)) for m in range(9)]
            assert all(is_stable(a, beta, Fraction(m, 8)) for m in range(9))
            assert max(errors[1:]) < errors[0]


@given(a=between(0, 1), beta=WEIGHTS, gain=between(0, 1) | st.just(Fraction(1)))
def test_proposition_2_for_learning_rates_below_one_over_the_curvature(
    a: Fraction, beta: Fraction, gain: Fraction
) -> None:
    assert limiting_error(a, beta, gain) < limiting_error(a, beta, Fraction(0))


@given(a=CURVATURES, beta=WEIGHTS, gains=st.tuples(GAINS, GAINS))
def test_proposition_2_for_every_stable_learning_rate_from_the_stepped_weights(
    a: Fraction, beta: Fraction, gains: tuple[Fraction, Fraction]
) -> None:
    """More: the larger the gain, the smaller the error."""
    low, high = sorted(gains)
    assume(low < high)
    errors = [limiting_error(a, beta, gain, "step") for gain in (Fraction(0), low, high)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(("beta", "a"), [(Fraction(1, 2), Fraction(3, 2)), (Fraction(1, 100), Fraction(19, 10))])
def test_proposition_2_fails_for_positive_gains_near_the_stability_limit(beta: Fraction, a: Fraction) -> None:
    highest = (2 - beta) * (2 - a) / (2 * (1 - beta))
    errors = [limiting_error(a, beta, highest * m / 1000) for m in range(1000)]
    assert errors == sorted(errors) and errors[0] < errors[1]


@given(beta=st.floats(1e-6, 0.999))
def test_small_gains_help_up_to_the_largest_curvature(beta: float) -> None:
    """1e-6 to either side, where even_gain, of slope about −1 in a, is far above its rounding, 1e-16 / (1 − β)."""
    largest = quadratics.largest_curvature(beta)
    assert 1 < largest < 2
    assert quadratics.even_gain(largest * (1 - 1e-6), beta) > 0 > quadratics.even_gain(largest * (1 + 1e-6), beta)


@given(root=between(0, 1), beta=WEIGHTS, t=GAINS)
def test_best_gain(root: Fraction, beta: Fraction, t: Fraction) -> None:
    """√(a β) drawn rational, so that all is exact but the square root within the functions."""
    a = root**2 / beta
    assume(a < 2)
    gain, error = 1 - a + (1 - root) / (1 - beta), beta / (a * (2 - root) ** 2)
    assert limiting_error(a, beta, gain) == error
    lowest, highest = 1 - a - 1 / (1 - beta), (2 - beta) * (2 - a) / (2 * (1 - beta))
    other = lowest + t * (highest - lowest)
    assert limiting_error(a, beta, other) > error or other == gain
    assert quadratics.best_gain(a, beta) == pytest.approx(float(gain), rel=1e-12, abs=1e-12)
    assert quadratics.best_error(a, beta) == pytest.approx(float(error), rel=1e-12)


# Proposition 3.


@pytest.mark.parametrize("factor", [2, 10, 100, 1000])
def test_proposition_3(factor: int) -> None:
    epsilon, none, full = Fraction(1, 2 * factor), Fraction(0), Fraction(1)
    assert limiting_error(epsilon, epsilon, none) > factor * limiting_error(epsilon, epsilon, full)


@given(epsilon=between(0, 1))
def test_proposition_3_improves_by_more_than_one_over_two_epsilon(epsilon: Fraction) -> None:
    improved = limiting_error(epsilon, epsilon, Fraction(0)) / limiting_error(epsilon, epsilon, Fraction(1))
    delta = 1 - epsilon
    positive = 2 * (2 - epsilon) ** 3 * (1 - epsilon + epsilon**2)
    gap = (1 + delta + 2 * delta**2 + 5 * delta**3 + delta**4 + 2 * delta**5) / positive
    assert improved - 1 / (2 * epsilon) == gap > 0


@pytest.mark.parametrize("factor", [2, 10, 100, 1000])
@given(a=CURVATURES, beta=WEIGHTS)
def test_proposition_3_on_every_instance_from_the_stepped_weights(factor: int, a: Fraction, beta: Fraction) -> None:
    gain = 1 - Fraction(3, 20 * factor)
    assert limiting_error(a, beta, Fraction(0)) >= factor * limiting_error(a, beta, gain, "step")


# What it costs.


@forms
@given(a=between(0, 1), beta=WEIGHTS, t=GAINS)
def test_averaging_longer_reaches_less_error_with_the_same_memory(
    form: str, a: Fraction, beta: Fraction, t: Fraction
) -> None:
    d = t * min(a, beta)

    def at_root(gain: Fraction) -> Fraction:  # affine in the gain
        phi1, phi2, _ = autoregression(a, beta, gain, form)
        return (1 - d) ** 2 - phi1 * (1 - d) - phi2

    none, full = at_root(Fraction(0)), at_root(Fraction(1))
    assume(none != full)
    gain = none / (none - full)  # so that 1 − d is a root
    assume(gain > 0 and is_stable(a, beta, gain, form))
    assert limiting_error(a, d, Fraction(0)) < limiting_error(a, beta, gain, form)
    if form == "weights":
        assert quadratics.slowest_rate(float(a), float(beta), float(gain)) == pytest.approx(float(d), rel=1e-9)


# Simulated with the kernels.


@dataclass(frozen=True)
class Run:
    gain: float
    form: str = "weights"


RUNS = (Run(0.0), Run(0.1), Run(0.5), Run(1.0), Run(0.1, "step"), Run(0.5, "step"))
MODERATE = (0.1, 0.5, 0.9)  # curvatures at which all of RUNS are stable
STEEP = (1.4,)  # and at which those with gains up to 0.5 are
SIMULATED = [(beta, RUNS, MODERATE) for beta in (0.05, 0.3)]
SIMULATED += [(0.3, tuple(run for run in RUNS if run.gain <= 0.5), STEEP)]
COMPARISONS = sum(len(runs) * len(curvatures) for _, runs, curvatures in SIMULATED)


def sampling_bound(comparisons: int, coordinates: int = COORDINATES) -> float:
    """How far, relative to V, the mean of e² may be off in one of so many comparisons."""
    t = math.log(2 * comparisons / RISK)
    return 2 * math.sqrt(t / coordinates) + 2 * t / coordinates


def closed_form(beta: float, runs: Sequence[Run], curvatures: Sequence[float]) -> torch.Tensor:
    return torch.tensor(
        [[limiting_error(a, beta, run.gain, run.form) for a in curvatures] for run in runs], dtype=torch.float64
    )


def simulated(
    beta: float, runs: Sequence[Run], curvatures: Sequence[float], coordinates: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """After as many steps as bring the slowest within 1e-4 of its limit."""
    steps = max(quadratics.settling_steps(a, beta, run.gain, run.form) for a in curvatures for run in runs)
    build = [quadratics.pulled_sgd(beta, run.gain, run.form) for run in runs]
    return quadratics.simulate(build, curvatures, coordinates, steps, seed=2606, dtype=dtype)


@pytest.mark.parametrize(("beta", "runs", "curvatures"), SIMULATED)
def test_kernels_reach_the_limiting_error(beta: float, runs: Sequence[Run], curvatures: Sequence[float]) -> None:
    off = simulated(beta, runs, curvatures, COORDINATES) / closed_form(beta, runs, curvatures) - 1
    assert off.abs().max() < sampling_bound(COMPARISONS) + 1e-4, off


def test_a_wrong_rule_would_be_seen() -> None:
    """Each of these moves some simulated error by five times the bound: the comparison above can fail."""
    bound = sampling_bound(COMPARISONS)
    pulled = tuple(run for run in RUNS if 0 < run.gain < 1)
    right = closed_form(0.05, pulled, MODERATE)
    other = {run: Run(run.gain, FORMS[1 - FORMS.index(run.form)]) for run in pulled}
    wrong = {
        "no pullback": closed_form(0.05, [Run(0.0)] * len(pulled), MODERATE),
        "the other form": closed_form(0.05, [other[run] for run in pulled], MODERATE),
        "a gain 30 % too large": closed_form(0.05, [Run(1.3 * run.gain, run.form) for run in pulled], MODERATE),
        "an averaging weight of 0.06": closed_form(0.06, pulled, MODERATE),
    }
    for name, errors in wrong.items():
        assert (errors / right - 1).abs().max() > 5 * bound, name


def test_proposition_3_simulated() -> None:
    """An improvement by more than 10, in the simulation itself; the closed form says 10.7."""
    runs = (Run(0.0), Run(1.0))
    errors = simulated(0.05, runs, (0.05,), COORDINATES)
    off = errors / closed_form(0.05, runs, (0.05,)) - 1
    assert off.abs().max() < sampling_bound(len(runs)) + 1e-4, off
    assert errors[0] > 10 * errors[1]


def test_rounding_is_far_below_the_sampling_error() -> None:
    """float32 against float64, with the same noise, in the slowest of the simulations."""
    runs = (Run(0.0), Run(1.0))
    single, double = (simulated(0.05, runs, (0.05,), 1 << 12, dtype) for dtype in (torch.float32, torch.float64))
    assert (single / double - 1).abs().max() < sampling_bound(2) / 1000
