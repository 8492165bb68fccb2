"""Layer 2. The quick reader's loop over the bytes of XMC text, compiled by numba.

Before it: nothing. After it: `parser` calls `scan_rows` for chunks of text. A module of its own, because numba takes a
quarter of a second to import and only files of some size are worth it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xmc_midx.compiled import compiled

__all__ = ["scan_rows"]

_LEAST_POWER, _LARGEST_POWER = -70, 40
_EXACT_POWER = 22
"""Powers of ten up to this one are float64 numbers."""
_POWERS = np.array([float(f"1e{power}") for power in range(_LEAST_POWER, _LARGEST_POWER + 1)])
_EXACT_MANTISSA = 2**53
_TEN_TO_18 = 10**18

_ONE = np.uint64(1)
"""Unsigned positions need no look whether they count from the end: a quarter of the time."""

_DOUBT = 2.0**-50
"""Four times what the three roundings of `mantissa * power` and the digits after the nineteenth can add up to, relative
to the result."""

_TAB, _LF, _CR, _SPACE, _PLUS, _COMMA, _MINUS, _POINT, _0, _9, _COLON = b"\t\n\r +,-.09:"
_LOWER_E, _UPPER_E = b"eE"


@compiled
def _to_float32(mantissa: Any, power: Any) -> tuple[Any, Any]:
    """`float32(float64(mantissa * 10**power))`, each of the two roundings to the nearest number.

    Parameters
    ----------
    mantissa : uint64, the first 19 digits from the first that is not 0; exact if there are no more.
    power : of ten, any int64.

    Returns
    -------
    Whether the number is known and finite, and the number. Up to 2**53 and 10**22 the float64 is exact but for one
    rounding, the right one. Else it is known within `_DOUBT`; where both ends round to the same float32, so does all
    that is between them. One in 2**25 long numbers is left in doubt.
    """
    if mantissa == 0 or power < _LEAST_POWER:  # 10**19 * 10**-71 is less than half the least float32
        return True, np.float32(0.0)
    if power > _LARGEST_POWER:
        return False, np.float32(0.0)
    if mantissa <= np.uint64(_EXACT_MANTISSA) and -_EXACT_POWER <= power <= _EXACT_POWER:
        if power < 0:
            number = np.float64(mantissa) / _POWERS[-power - _LEAST_POWER]
        else:
            number = np.float64(mantissa) * _POWERS[power - _LEAST_POWER]
        low = high = np.float32(number)
    else:
        number = np.float64(mantissa) * _POWERS[power - _LEAST_POWER]
        low, high = np.float32(number * (1.0 - _DOUBT)), np.float32(number * (1.0 + _DOUBT))
    return low == high and high < np.inf, high


@compiled
def scan_rows(
    text: Any,
    feature_limit: int,
    label_limit: int,
    label_ids: Any,
    num_labels: Any,
    feature_ids: Any,
    values: Any,
    num_features: Any,
) -> tuple[bool, bool, bool, int, int]:
    """Read whole lines of well-formed text.

    Parameters
    ----------
    text : (bytes,) uint8, ends with a newline.
    feature_limit, label_limit : ids are below these. Without labels (0) a line has no label list.
    label_ids, feature_ids, values : int32, int32 and float32, long enough for what the text can hold; filled.
    num_labels, num_features : (rows,) int64; filled.

    Returns
    -------
    Whether all is well, whether all labels and all features ascend strictly inside their rows, and the numbers of
    labels and of features.
    """
    size = np.uint64(len(text))
    position = np.uint64(0)
    row = 0
    labels = 0
    features = 0
    labels_ascend = True
    features_ascend = True
    failed = False, False, False, 0, 0
    while position < size:
        first_label = labels
        first_feature = features
        last = np.int64(-1)
        byte = text[position]
        may_be_label = label_limit > 0
        while True:
            # At the start of a token, blanks or the end of the line. Every line ends with a newline, which no inner
            # loop passes: none needs to look at `size`.
            while byte in (_SPACE, _TAB):
                position += _ONE
                byte = text[position]
                may_be_label = False
            if byte == _CR:
                position += _ONE
                byte = text[position]
                if byte != _LF:
                    return failed
            if byte == _LF:
                break
            start = position
            number = np.int64(0)
            while _0 <= byte <= _9:
                number = number * 10 + (np.int64(byte) - _0)
                position += _ONE
                byte = text[position]
            if position == start or position - start > np.uint64(18):
                return failed
            if byte != _COLON:
                # A label: the line's first token is a list of them.
                if not may_be_label or number >= label_limit:
                    return failed
                if number <= last:
                    labels_ascend = False
                last = number
                label_ids[labels] = number
                labels += 1
                if byte == _COMMA:
                    position += _ONE
                    byte = text[position]
                    if not _0 <= byte <= _9:
                        return failed
                    continue
                if byte not in (_SPACE, _TAB, _CR, _LF):
                    return failed
                last = np.int64(-1)
                may_be_label = False
                continue
            if labels > first_label and may_be_label:  # `1,2:3`
                return failed
            may_be_label = False
            if number >= feature_limit:
                return failed
            if number <= last:
                features_ascend = False
            last = number
            feature_ids[features] = number

            position += _ONE
            byte = text[position]
            negative = byte == _MINUS
            if negative or byte == _PLUS:
                position += _ONE
                byte = text[position]
            start = position
            mantissa = np.uint64(0)
            power = np.int64(0)
            while _0 <= byte <= _9:
                if mantissa < np.uint64(_TEN_TO_18):
                    mantissa = mantissa * np.uint64(10) + np.uint64(byte - _0)
                else:
                    power += 1
                position += _ONE
                byte = text[position]
            num_digits = np.int64(position - start)
            if byte == _POINT:
                position += _ONE
                byte = text[position]
                start = position
                while _0 <= byte <= _9:
                    if mantissa < np.uint64(_TEN_TO_18):
                        mantissa = mantissa * np.uint64(10) + np.uint64(byte - _0)
                        power -= 1
                    position += _ONE
                    byte = text[position]
                num_digits += np.int64(position - start)
            if num_digits == 0:
                return failed
            if byte in (_LOWER_E, _UPPER_E):
                position += _ONE
                byte = text[position]
                below_one = byte == _MINUS
                if below_one or byte == _PLUS:
                    position += _ONE
                    byte = text[position]
                start = position
                exponent = np.int64(0)
                while _0 <= byte <= _9:
                    exponent = min(exponent * 10 + (np.int64(byte) - _0), np.int64(10**12))
                    position += _ONE
                    byte = text[position]
                if position == start:
                    return failed
                power += -exponent if below_one else exponent
            if byte not in (_SPACE, _TAB, _CR, _LF):
                return failed
            known, value = _to_float32(mantissa, power)
            if not known:
                return failed
            values[features] = -value if negative else value
            features += 1
        position += _ONE
        num_labels[row] = labels - first_label
        num_features[row] = features - first_feature
        row += 1
    return True, labels_ascend, features_ascend, labels, features
