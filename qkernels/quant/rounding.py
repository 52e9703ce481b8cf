"""Groups of weights to codes: the nearest ones for a scale and a zero, and the search for these."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import QuantSpec

# Clips tried per group. On MiniLM's weights, 4 bits in groups of 32, the relative error is 8.42%
# for 5 of them, 8.40% for 9, and 8.39% for 33; with integer zeros 7.97%, 7.88%, 7.87%.
_CANDIDATES = 9
_TINY = 2.0**-100  # a smaller scale counts as 0: its inverse must stay finite


def store(scale: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float8_e8m0fnu:  # powers of two already
        exponent = torch.where(scale > 0, torch.frexp(scale).exponent - 1, -127)
        return (exponent + 127).to(torch.uint8).view(dtype)
    return scale.to(dtype)


def representable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale as the format holds it, in float32. e8m0: rounded up, so that clips of 1/2 step through
    the powers."""
    if dtype == torch.float32:
        return scale
    if dtype == torch.float8_e8m0fnu:
        mantissa, exponent = torch.frexp(scale)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 127)
        return torch.where(scale > 0, torch.ldexp(torch.ones_like(scale), exponent), 0.0)
    rounded = scale.to(dtype).float()
    # float8 saturates where the others overflow; 464 is half a step above its largest, 448.
    return (
        torch.where(scale.abs() >= 464.0, torch.inf, rounded)
        if dtype == torch.float8_e4m3fn
        else rounded
    )


def inverse(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() > _TINY, 1.0 / scale, 0.0)


class Rounding:
    """Groups x [n, groups, group] float32 and how codes for them follow from a scale and a zero,
    both [n, groups].

    The zero is subtracted from codes (symmetric and integer) or from values (minimum: x = scale *
    code - zero).
    """

    def __init__(self, x: Tensor, spec: QuantSpec, last: int) -> None:
        """last: columns of the last group that are not padding."""
        self.x, self.spec, self.last = x, spec, last
        self.top = (1 << spec.bits) - 1
        self.buffer, self.other = torch.empty_like(x), torch.empty_like(x)
        self.lo, self.hi = x.amin(dim=2), x.amax(dim=2)  # aminmax takes five times both
        real = x if last == x.shape[2] else x.clone()
        real[:, -1, last:] = 0.0
        self.sum, self.square = real.sum(dim=2), torch.mul(real, real, out=self.other).sum(dim=2)
        self.count = torch.full((x.shape[1],), float(x.shape[2]), device=x.device)
        self.count[-1] = last
        if spec.table is not None:
            levels, code = torch.tensor(spec.table, dtype=torch.float32, device=x.device).sort(
                stable=True
            )
            first = torch.ones_like(levels, dtype=torch.bool)
            first[1:] = levels[1:] != levels[:-1]  # of equal values the lowest code
            levels, code = levels[first], code[first].to(torch.uint8)
            # Levels are integers, so that twice a value, rounded up, tells which one is nearest.
            self.ends = (int(2 * levels[0]), int(2 * levels[-1]))
            halves = torch.arange(self.ends[0], self.ends[1] + 1, device=x.device)
            index = torch.bucketize(halves.float(), levels[1:] + levels[:-1])
            self.nearest, self.nearest_code = levels[index], code[index]

    def full(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The scale (representable in dtype, as float32) and zero whose codes span each group."""
        return self._clipped(1.0, dtype)

    def search(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The scale (representable in dtype, as float32) and zero of least squared error found.

        Each of a few clips of the range gives codes; for those codes the best scale (with a
        minimum: scale and minimum) has a closed form, and so has its error. The best of them is
        rounded and fitted once more. The whole range wins where that is no better.
        """
        scale, zero = self.full(dtype)
        if dtype == torch.float8_e8m0fnu:  # powers of two: nothing between to fit
            return self._better(scale, zero, *self._clipped(0.5, dtype))
        shape = scale.shape
        best = torch.full(shape, -torch.inf, device=scale.device)
        fit_scale, fit_zero = scale, zero
        for clip in self._clips():
            found = self._fit(*self._clipped(clip, torch.float32))
            better = found[0] > best
            best = torch.where(better, found[0], best)
            fit_scale = torch.where(better, found[1], fit_scale)
            fit_zero = torch.where(better, found[2], fit_zero)
        _, fit_scale, fit_zero = self._fit(fit_scale, fit_zero)
        fit_scale = representable(fit_scale, dtype)
        if self.spec.zero == "minimum":
            fit_zero = representable(fit_zero, dtype)
        return self._better(scale, zero, fit_scale, fit_zero)

    def _clips(self) -> list[float]:
        """Parts of the range that codes are tried to span, as steps more or fewer than they have:
        for 4 bits from 15/13.6 to 15/19.2, symmetric from 8/7 to 8/9."""
        if self.spec.zero == "symmetric":
            top, low, high = 1 << (self.spec.bits - 1), -1.0, 1.0
        else:
            top, low, high = self.top, -1.4, 4.2
        steps = _CANDIDATES - 1
        return [top / (top + low + (high - low) * i / steps) for i in range(_CANDIDATES)]

    def _better(
        self, scale: Tensor, zero: Tensor, other_scale: Tensor, other_zero: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Per group, of two scales and zeros the better; the first where they are as good."""
        error = self._error(scale, zero)
        # The margin is for values that decode from this very format: they are kept.
        better = self._error(other_scale, other_zero) < error - 1e-10 * self.square
        return torch.where(better, other_scale, scale), torch.where(better, other_zero, zero)

    def _fit(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rounds with this scale and zero; of the codes, the best scale and zero there are.

        -> by how much they lower the error below that of all zeros [n, groups], scale, zero. The
        zero point of integer and symmetric formats stays.
        """
        q = self.levels_of(scale, zero)
        q[:, -1, self.last :] = 0.0
        qx = torch.mul(q, self.x, out=self.other).sum(dim=2)
        qq = torch.mul(q, q, out=self.other).sum(dim=2)
        alone = qx / qq.clamp(min=_TINY)
        gain = qx * alone
        if self.spec.zero != "minimum":
            return gain, alone, zero
        # Least squares of x = scale * q - minimum over both.
        sum_q = q.sum(dim=2)
        spread = self.count * qq - sum_q * sum_q
        both = (self.count * qx - sum_q * self.sum) / spread.clamp(min=_TINY)
        minimum = (both * sum_q - self.sum) / self.count
        joint = both * qx - minimum * self.sum
        usable = spread > 0
        if self.spec.scale == "uint4":
            usable &= minimum >= 0
        return (
            torch.where(usable, joint, gain),
            torch.where(usable, both, alone),
            torch.where(usable, minimum, 0.0),
        )

    def levels_of(self, scale: Tensor, zero: Tensor) -> Tensor:
        """What the scale multiplies, in the buffer: table values, codes less zero, or codes."""
        if self.spec.table is not None:
            place = self._place(scale).view(-1)
            torch.index_select(self.nearest, 0, place, out=self.buffer.view(-1))
            return self.buffer
        q = self._code(scale, zero)
        return q if self.spec.zero == "minimum" else q.sub_(zero[..., None])

    def codes(self, scale: Tensor, zero: Tensor) -> Tensor:
        """[n, groups, group] uint8."""
        if self.spec.table is not None:
            return self.nearest_code[self._place(scale)]
        return self._code(scale, zero).to(torch.uint8)

    def _clipped(self, clip: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """scale and zero that make the codes span this part of each group's range."""
        spec, lo, hi = self.spec, self.lo, self.hi
        if spec.zero == "symmetric":
            # The value of largest magnitude, with its sign, takes the code of largest magnitude:
            # -2^(bits-1), or the extreme of the table. So negative scales are normal, except where
            # the ends are alike or the format has no sign: there both ends must fit.
            ends = (
                (-spec.zero_point, spec.zero_point - 1)
                if spec.table is None
                else (min(spec.table), max(spec.table))
            )
            unsigned = spec.scale in ("e8m0", "e4m3") or ends[0] == -ends[1]
            if unsigned and ends[0] < 0 < ends[1]:
                full = torch.maximum(lo / ends[0], hi / ends[1])
            else:
                full = torch.where(-lo > hi, lo, hi) / max(ends, key=abs)
            scale = representable(full * clip, dtype)
            return scale, torch.full_like(scale, float(spec.zero_point))
        if spec.scale == "uint4":  # its minima are what is subtracted, and have no sign
            lo = lo.clamp(max=0.0)
        if spec.zero == "integer":
            lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
            scale = representable((hi - lo) * (clip / self.top), dtype)
            return scale, torch.round(-lo * clip * inverse(scale)).clamp_(0, self.top)
        middle, half = hi / 2 + lo / 2, (hi / 2 - lo / 2) * clip
        if spec.scale == "uint4":  # a range that begins at 0 stays there
            minimum = (half - middle).clamp(min=0.0)
        else:
            minimum = -lo if clip == 1.0 else half - middle
        return representable(half * (2.0 / self.top), dtype), representable(minimum, dtype)

    def _code(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes as floats, in the buffer."""
        q = torch.mul(self.x, inverse(scale)[..., None], out=self.buffer)
        if self.spec.zero == "minimum":
            q = q.add_((zero * inverse(scale))[..., None]).round_()
        else:
            q = q.round_().add_(zero[..., None])
        return q.clamp_(0, self.top)

    def _place(self, scale: Tensor) -> Tensor:
        """Where the nearest levels stand in `nearest` and `nearest_code`."""
        low, high = self.ends
        twice = torch.mul(self.x, (2 * inverse(scale))[..., None], out=self.buffer)
        return twice.ceil_().clamp_(low, high).sub_(low).int()

    def _error(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Sum of squares over each group, [n, groups]; infinite where the scale is."""
        q = self.levels_of(scale, zero).mul_(scale[..., None])
        if self.spec.zero == "minimum":
            q = q.sub_(zero[..., None])
        q = q.sub_(self.x)
        q[:, -1, self.last :] = 0.0
        error = q.square_().sum(dim=2)
        return torch.where(torch.isfinite(error), error, torch.inf)
