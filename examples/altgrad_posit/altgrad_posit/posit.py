"""The values of an 8-bit posit, decoded from its bit strings.

After the sign bit a posit spends a varying number of bits on its magnitude's order, so that values near 1 get
the longest fractions (Gustafson and Yonemoto 2017; Standard for Posit Arithmetic, 2022):

    regime     a run of equal bits, ended by the opposite bit or by the end of the string;
               r = (length of the run) - 1 for ones, -(length of the run) for zeros
    exponent   the next `es` bits, an integer e; bits that fall off the end count as 0
    fraction   what is left, f in [0, 1)

    magnitude = (1 + f) · 2^(r · 2^es + e)

With es = 2 the string 0 10 01 100 has r = 0, e = 1, f = 1/2: it is 3. A negative value is the two's
complement of its magnitude's string, so that strings, read as signed integers, are in the order of their
values: the string *is* the rung. The one string left over, 10000000, is NaR ("not a real"). A table of values
has no code for it: NaN passes through `quantize` and is refused by `encode`.

Two limits, both far from 1:

- Rounding is not the standard's. A `Format` rounds to the nearest *value*, a tie to the even rung. The
  standard rounds the *bit string*: to the upper of two neighbors past the value whose string is one bit
  longer and lies between theirs; and never a nonzero number to zero. The two agree where the added bit
  belongs to the fraction, for es = 2 from 2^-16 to 2^16. Further out it belongs to exponent or regime: from
  2^16 to 2^18 the standard rounds up past 2^17, this format past 2.5 · 2^16; below 2^-24 the standard gives
  2^-24, this format the nearer of that and 0.
- The default scale puts a tensor's largest element just below the format's largest value, where neighbors are
  a factor of 16 apart. `margin = 2^22` puts it between 2 and 4 instead.
"""

from __future__ import annotations

from altgrad_core.format import Format
from altgrad_posit import BITS, PositOptions

LARGEST_CODE = 2 ** (BITS - 1) - 1


def from_options(options: PositOptions) -> Format:
    """Return the format of 255 values: every bit string but NaR."""
    name = "posit8" if options == PositOptions() else f"posit8(es={options.es})"
    codes = range(-LARGEST_CODE, LARGEST_CODE + 1)
    return Format(name=name, bits=BITS, values=[decoded(code, options.es) for code in codes])


def decoded(code: int, es: int) -> float:
    """Return the value of a bit string, given as the signed integer that it is in two's complement."""
    if code == 0:
        return 0.0
    return magnitude(code, es) if code > 0 else -magnitude(-code, es)


def magnitude(code: int, es: int) -> float:
    """Return the value of a positive bit string, exactly: a float64 has bits to spare."""
    string = f"{code:0{BITS - 1}b}"  # without the sign bit
    run = len(string) - len(string.lstrip(string[0]))
    regime = run - 1 if string[0] == "1" else -run
    rest = string[run + 1 :]  # the bit that ends the run says nothing else
    exponent = int(rest[:es].ljust(es, "0") or "0", 2)
    fraction = rest[es:]
    significand = int("1" + fraction, 2) / 2 ** len(fraction)
    return significand * 2.0 ** (regime * 2**es + exponent)
