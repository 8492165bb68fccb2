r"""Layer 2. The vocabulary of a dataset made of text: raw text -> TF-IDF feature rows, and a plain file that keeps it.

Before it: `files`. After it: `dataset` carries it from training to the run directory, `predictor` turns raw texts into
features with it. The weights are those of the data in shared form: a token is a run of two or more letters or digits of
the lower-cased text, its value `(1 + ln tf) * idf`, each row of Euclidean length 1.

The file, for two tokens (any of the suffixes of `files.SUFFIXES`, UTF-8)::

    # xmc-midx vocabulary 1: tokens [^\W_]{2,} of the lower-cased text; value (1 + ln tf) * idf, rows of length 1
    graph<TAB>4.513
    tool<TAB>2.07

Line 2 is feature 0, line 3 feature 1, and so on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
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

__all__ = ["HEADER", "TOKEN_PATTERN", "Vocabulary"]

TOKEN_PATTERN = r"[^\W_]{2,}"
"""Two or more letters or digits of any script. `scikit-learn`'s own default counts the underscore as a letter."""

_HEADER_PREFIX = "# xmc-midx vocabulary 1:"
HEADER = f"{_HEADER_PREFIX} tokens {TOKEN_PATTERN} of the lower-cased text; value (1 + ln tf) * idf, rows of length 1"
"""First line of a vocabulary file."""


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "idf", np.ascontiguousarray(self.idf, dtype=np.float32))
        if not self.tokens:
            raise DataError("The vocabulary has no token; expected at least one.")
        if self.idf.shape != (len(self.tokens),):
            raise DataError(f"{len(self.tokens)} tokens, but idf has the shape {self.idf.shape}.")
        seen: set[str] = set()
        for feature, (token, idf) in enumerate(zip(self.tokens, self.idf.tolist(), strict=True)):
            if fault := _fault(token, idf, seen):
                raise DataError(f"Feature {feature}: {fault}")
            seen.add(token)

    @property
    def num_features(self) -> int:
        return len(self.tokens)

    @classmethod
    def fit(cls, texts: Iterable[str], *, min_document_frequency: int = 2) -> Vocabulary:
        """The vocabulary of some texts: tokens in alphabetical order.

        Parameters
        ----------
        texts : one a document; read once.
        min_document_frequency : texts that must have a token for it to become a feature, from 1.

        Raises
        ------
        DataError : no token is in that many texts.
        UsageError : `min_document_frequency` is below 1.
        """
        if min_document_frequency < 1:
            raise UsageError(f"Minimum document frequency {min_document_frequency}: expected 1 or more.")
        texts = _listed(texts)
        if len(texts) < min_document_frequency:
            raise DataError(f"{len(texts)} texts, fewer than the minimum document frequency {min_document_frequency}.")
        vectorizer = _vectorizer(min_df=min_document_frequency)
        try:
            vectorizer.fit(texts)
        except ValueError as error:
            # scikit-learn has no class of its own for "empty vocabulary" and "no terms remain".
            raise DataError(
                f"No token is in {min_document_frequency} of the {len(texts)} texts.",
                hint="Lower the minimum document frequency, or look whether the texts are empty.",
            ) from error
        return cls(tokens=tuple(vectorizer.get_feature_names_out().tolist()), idf=vectorizer.idf_)

    def transform(self, texts: Iterable[str]) -> csr_matrix:
        """The feature rows of some texts.

        Parameters
        ----------
        texts : one an instance; tokens that are not in the vocabulary are passed over.

        Returns
        -------
        (N, F) float32 `(1 + ln tf) * idf`, rows of length 1; a text without a known token gives an empty row.
        """
        texts = _listed(texts)
        if not texts:
            return csr_matrix(np.empty((0, self.num_features), dtype=np.float32))
        return csr_matrix(self._vectorizer.transform(texts))

    @cached_property
    def _vectorizer(self) -> Any:
        vectorizer = _vectorizer(vocabulary={token: feature for feature, token in enumerate(self.tokens)})
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
        for first, chunk in LineChunks(path, raise_error):
            for number, line in enumerate(chunk[:-1].split(b"\n"), start=first):
                place = f"{path}:{number}"
                if number == 1:
                    _check_header(line, place)
                    continue
                token, idf = _parsed(line, place)
                if fault := _fault(token, idf, seen):
                    raise DataError(f"{place}: {fault}")
                seen.add(token)
                tokens.append(token)
                idfs.append(idf)
        if not tokens:
            raise DataError(f"{path}: holds no token; expected `{HEADER[:24]}...` and then a token a line.")
        return cls(tokens=tuple(tokens), idf=np.array(idfs, dtype=np.float32))

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all, compressed as its name says; equal vocabularies give equal files.

        Raises
        ------
        ResourceError : the disk is full or the directory cannot be written.
        """
        lines = [HEADER]
        # Shortest decimal that reads back to the same float32.
        lines += [f"{token}\t{idf!s}" for token, idf in zip(self.tokens, self.idf, strict=True)]
        with atomic_write(Path(path)) as stream:
            stream.write(("\n".join(lines) + "\n").encode())


def _vectorizer(**options: Any) -> Any:
    # Imported here: scikit-learn takes a second, and most commands never see text.
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        lowercase=True, token_pattern=TOKEN_PATTERN, sublinear_tf=True, norm="l2", dtype=np.float32, **options
    )


def _listed(texts: Iterable[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise UsageError("One text was given where several are expected.", hint="Put it into a list.")
    return list(texts)


def _check_header(line: bytes, place: str) -> None:
    if line.rstrip(b"\r").decode("utf-8", "replace") != HEADER:
        known = line.startswith(_HEADER_PREFIX.encode())
        raise DataError(
            f"{place}: found {excerpt(line)}, expected the line `{HEADER}`.",
            hint="It has another token rule than this version knows." if known else "Is this a vocabulary of xmc-midx?",
        )


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


_TOKEN = re.compile(TOKEN_PATTERN)


def _fault(token: str, idf: float, seen: set[str]) -> str | None:
    if not _TOKEN.fullmatch(token) or token != token.lower():
        return f"{token!r} can never occur: a token is two or more letters or digits, lower-cased."
    if token in seen:
        return f"the token {token!r} stands here for the second time."
    # As float32: 1e-60 is positive until it is stored.
    if not (math.isfinite(idf) and 0 < idf < 3e38 and np.float32(idf) > 0):
        return f"the idf of {token!r} is {idf}, expected a positive number."
    return None
