r"""Layer 2. The vocabulary of a dataset made of text: raw text -> TF-IDF feature rows, and a plain file that keeps it.

Before it: `files`; `raw` reads the texts. After it: `dataset` carries it from training to the run directory, and
`predictor` turns raw texts into features with it. A word is a run of two or more letters or digits of the lower-cased
text; a token is a word, or several in a row with a blank between them (n-grams, where they were asked for). Its value
is `(1 + ln tf) * idf`, each row of Euclidean length 1.

The file, for two tokens (any of the suffixes of `files.SUFFIXES`, UTF-8)::

    # xmc-midx vocabulary 1: tokens [^\W_]{2,} of the lower-cased text; value (1 + ln tf) * idf, rows of length 1
    graph<TAB>4.513
    tool<TAB>2.07

Line 2 is feature 0, line 3 feature 1, and so on. With n-grams the first line says `tokens 1 to 2 times [^\W_]{2,}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.data.files import LineChunks, atomic_write
from xmc_midx.data.problems import excerpt, raise_error
from xmc_midx.errors import DataError, UsageError

__all__ = ["HEADER", "MAX_NGRAM", "TOKEN_PATTERN", "Vocabulary"]

TOKEN_PATTERN = r"[^\W_]{2,}"
"""Two or more letters or digits of any script. `scikit-learn`'s own default counts the underscore as a letter."""

MAX_NGRAM = 5
"""Longest n-gram, in words."""

_HEADER_PREFIX = "# xmc-midx vocabulary 1:"


def _header(max_ngram: int) -> str:
    """First line of a vocabulary file: the token rule, for people and for `load`."""
    words = TOKEN_PATTERN if max_ngram == 1 else f"1 to {max_ngram} times {TOKEN_PATTERN}"
    return f"{_HEADER_PREFIX} tokens {words} of the lower-cased text; value (1 + ln tf) * idf, rows of length 1"


HEADER = _header(1)
"""First line of a vocabulary file whose tokens are words."""
_HEADERS = {_header(length): length for length in range(1, MAX_NGRAM + 1)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """The tokens that are features, and their inverse document frequencies.

    Raises
    ------
    DataError : there is no token, one stands twice or breaks the token rule, or an idf is not a positive number.
    """

    tokens: tuple[str, ...]
    """(F,) token of each feature."""
    idf: NDArray[np.float32]
    """(F,) float32, positive; scikit-learn's smooth form `ln((1 + N) / (1 + df)) + 1` where `fit` made it."""
    max_ngram: int = 1
    """Words in the longest token, from 1 to `MAX_NGRAM`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "idf", np.ascontiguousarray(self.idf, dtype=np.float32))
        if not self.tokens:
            raise DataError("The vocabulary has no token; expected at least one.")
        if self.idf.shape != (len(self.tokens),):
            raise DataError(f"{len(self.tokens)} tokens, but idf has the shape {self.idf.shape}.")
        if not 1 <= self.max_ngram <= MAX_NGRAM:
            raise UsageError(f"n-grams of up to {self.max_ngram} words: expected 1 to {MAX_NGRAM}.")
        seen: set[str] = set()
        rule = _token_rule(self.max_ngram)
        for feature, (token, idf) in enumerate(zip(self.tokens, self.idf.tolist(), strict=True)):
            if fault := _fault(token, idf, seen, rule):
                raise DataError(f"Feature {feature}: {fault}")
            seen.add(token)

    @property
    def num_features(self) -> int:
        return len(self.tokens)

    @classmethod
    def fit(
        cls,
        texts: Iterable[str],
        *,
        min_document_frequency: int = 2,
        max_features: int | None = None,
        max_ngram: int = 1,
    ) -> Vocabulary:
        """The vocabulary of some texts: tokens in alphabetical order. See `fit_transform`."""
        return cls.fit_transform(
            texts, min_document_frequency=min_document_frequency, max_features=max_features, max_ngram=max_ngram
        )[0]

    @classmethod
    def fit_transform(
        cls,
        texts: Iterable[str],
        *,
        min_document_frequency: int = 2,
        max_features: int | None = None,
        max_ngram: int = 1,
    ) -> tuple[Vocabulary, csr_matrix]:
        """The vocabulary of some texts and their feature rows, in one pass that keeps no text.

        Parameters
        ----------
        texts : one a document; read once.
        min_document_frequency : texts that must have a token for it to become a feature, from 1.
        max_features : keep the tokens that occur most often in all texts together; None keeps all.
        max_ngram : words in the longest token, from 1 to `MAX_NGRAM`.

        Returns
        -------
        The vocabulary, and what its `transform` gives for the texts.

        Raises
        ------
        DataError : no token is in that many texts.
        UsageError : a number is out of its range.
        """
        for what, number, most in (
            ("Minimum document frequency", min_document_frequency, None),
            ("Number of features", 1 if max_features is None else max_features, None),
            ("Words of an n-gram", max_ngram, MAX_NGRAM),
        ):
            if number < 1 or (most is not None and number > most):
                expected = "1 or more" if most is None else f"1 to {most}"
                raise UsageError(f"{what} {number}: expected {expected}.")
        if isinstance(texts, str):
            raise _one_text()
        vectorizer = _vectorizer(max_ngram, min_df=min_document_frequency, max_features=max_features)
        counted = _Counted(texts)
        try:
            features = vectorizer.fit_transform(counted)
        except ValueError as error:
            if counted.raised:
                raise
            # scikit-learn has no class of its own for "empty vocabulary", "no terms remain", "fewer than min_df texts".
            raise DataError(
                f"No token is in {min_document_frequency} of the {counted.number} texts.",
                hint="Lower the minimum document frequency, or look whether the texts are empty.",
            ) from error
        tokens = tuple(vectorizer.get_feature_names_out().tolist())
        return cls(tokens=tokens, idf=vectorizer.idf_, max_ngram=max_ngram), csr_matrix(features)

    def transform(self, texts: Iterable[str]) -> csr_matrix:
        """The feature rows of some texts.

        Parameters
        ----------
        texts : one an instance; tokens that are not in the vocabulary are passed over.

        Returns
        -------
        (N, F) float32 `(1 + ln tf) * idf`, rows of length 1; a text without a known token gives an empty row.
        """
        if isinstance(texts, str):
            raise _one_text()
        texts = list(texts)
        if not texts:
            return csr_matrix(np.empty((0, self.num_features), dtype=np.float32))
        return csr_matrix(self._vectorizer.transform(texts))

    @cached_property
    def _vectorizer(self) -> Any:
        vectorizer = _vectorizer(
            self.max_ngram, vocabulary={token: feature for feature, token in enumerate(self.tokens)}
        )
        vectorizer.idf_ = self.idf
        return vectorizer

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read what `save` writes.

        Raises
        ------
        DataError : the file is missing, damaged or not a vocabulary; the message names the line.
        """
        path = Path(path)
        tokens: list[str] = []
        idfs: list[float] = []
        seen: set[str] = set()
        max_ngram, rule = 1, _token_rule(1)
        for first, chunk in LineChunks(path, raise_error):
            for number, line in enumerate(chunk[:-1].split(b"\n"), start=first):
                place = f"{path}:{number}"
                if number == 1:
                    max_ngram = _read_header(line, place)
                    rule = _token_rule(max_ngram)
                    continue
                token, idf = _parsed(line, place)
                if fault := _fault(token, idf, seen, rule):
                    raise DataError(f"{place}: {fault}")
                seen.add(token)
                tokens.append(token)
                idfs.append(idf)
        if not tokens:
            raise DataError(f"{path}: holds no token; expected `{HEADER[:24]}...` and then a token a line.")
        return cls(tokens=tuple(tokens), idf=np.array(idfs, dtype=np.float32), max_ngram=max_ngram)

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all, compressed as its name says; equal vocabularies give equal files.

        Raises
        ------
        ResourceError : the disk is full or the directory cannot be written.
        """
        lines = [_header(self.max_ngram)]
        # Shortest decimal that reads back to the same float32.
        lines += [f"{token}\t{idf!s}" for token, idf in zip(self.tokens, self.idf, strict=True)]
        with atomic_write(Path(path)) as stream:
            stream.write(("\n".join(lines) + "\n").encode())


def _vectorizer(max_ngram: int, **options: Any) -> Any:
    # Imported here: scikit-learn takes a second, and most commands never see text.
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        lowercase=True,
        token_pattern=TOKEN_PATTERN,
        ngram_range=(1, max_ngram),
        sublinear_tf=True,
        norm="l2",
        dtype=np.float32,
        **options,
    )


class _Counted:
    """Passes texts on, counts them, and knows whether an error was theirs."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.number, self.raised = texts, 0, False

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                self.number += 1
                yield text
        except Exception:
            self.raised = True
            raise


def _one_text() -> UsageError:
    return UsageError("One text was given where several are expected.", hint="Put it into a list.")


def _read_header(line: bytes, place: str) -> int:
    """The longest n-gram that a file's first line allows."""
    max_ngram = _HEADERS.get(line.rstrip(b"\r").decode("utf-8", "replace"))
    if max_ngram is None:
        known = line.startswith(_HEADER_PREFIX.encode())
        raise DataError(
            f"{place}: found {excerpt(line)}, expected the line `{HEADER}`.",
            hint="It has another token rule than this version knows." if known else "Is this a vocabulary of xmc-midx?",
        )
    return max_ngram


def _parsed(line: bytes, place: str) -> tuple[str, float]:
    token, tab, idf = line.rstrip(b"\r").partition(b"\t")
    try:
        if tab:
            return token.decode(), float(idf)
    except UnicodeDecodeError:
        raise DataError(f"{place}: {excerpt(line)} is not UTF-8.") from None
    except ValueError:
        pass
    raise DataError(f"{place}: found {excerpt(line)}, expected a token, a tab and its idf.")


def _token_rule(max_ngram: int) -> re.Pattern[str]:
    return re.compile(f"{TOKEN_PATTERN}(?: {TOKEN_PATTERN}){{0,{max_ngram - 1}}}")


def _fault(token: str, idf: float, seen: set[str], rule: re.Pattern[str]) -> str | None:
    if not rule.fullmatch(token) or token != token.lower():
        return f"{token!r} can never occur: a token is two or more letters or digits, lower-cased."
    if token in seen:
        return f"the token {token!r} stands here for the second time."
    # As float32: 1e-60 is positive until it is stored.
    if not (math.isfinite(idf) and 0 < idf < 3e38 and np.float32(idf) > 0):
        return f"the idf of {token!r} is {idf}, expected a positive number."
    return None
