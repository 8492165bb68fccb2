"""Claims about `xmc_midx.data.vocabulary`, against scikit-learn's TfidfVectorizer and the formula by hand."""

from __future__ import annotations

import gzip
import lzma
import math
import subprocess
import sys

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from xmc_midx.data.vocabulary import HEADER, Vocabulary
from xmc_midx.errors import DataError, UsageError

TEXTS = [
    "Graph theory: a theory of graphs, with GRAPH algorithms",
    "snake_case names and x86_64 machines",
    "Über-große Größen, naïve café; graph",
    "the theory of the café",
    "a b c !?",
    "",
    "граф теория 図書館 графы теория",
]


def write(path, *lines, header=HEADER):
    path.write_bytes("\n".join([header, *lines, ""]).encode())
    return path


def test_fit_and_transform_equal_scikit_learn():
    theirs = TfidfVectorizer(token_pattern=r"(?u)[^\W_]{2,}", sublinear_tf=True)
    expected = theirs.fit_transform(TEXTS)
    ours = Vocabulary.fit(TEXTS, min_document_frequency=1)
    assert ours.tokens == tuple(theirs.get_feature_names_out())
    np.testing.assert_allclose(ours.idf, theirs.idf_, rtol=1e-6)
    rows = ours.transform(TEXTS)
    assert (rows.shape, rows.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(rows.toarray(), expected.toarray(), atol=1e-6)


@pytest.mark.parametrize("minimum", [2, 3])
def test_rare_tokens_are_left_out_and_then_passed_over(minimum):
    theirs = TfidfVectorizer(token_pattern=r"(?u)[^\W_]{2,}", sublinear_tf=True, min_df=minimum).fit(
        TEXTS * 2 + TEXTS[:1]
    )
    ours = Vocabulary.fit(TEXTS * 2 + TEXTS[:1], min_document_frequency=minimum)
    assert ours.tokens == tuple(theirs.get_feature_names_out())
    new = ["a theory never seen", "nothing known 123"]
    np.testing.assert_allclose(ours.transform(new).toarray(), theirs.transform(new).toarray(), atol=1e-6)
    assert ours.transform(new)[1].nnz == 0


def test_the_value_is_one_plus_log_tf_times_idf_with_rows_of_length_one():
    vocabulary = Vocabulary(tokens=("tool", "graph"), idf=np.array([2.0, 3.0]))
    tool, graph = (1 + math.log(3)) * 2.0, 3.0
    length = math.hypot(tool, graph)
    rows = vocabulary.transform(["Tool tool-TOOL graph, other x", "x"]).toarray()
    np.testing.assert_allclose(rows, [[tool / length, graph / length], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"max_ngram": 2}, {"min_df": 2, "ngram_range": (1, 2)}),
        ({"max_ngram": 3, "max_features": 9, "min_document_frequency": 1}, {"ngram_range": (1, 3), "max_features": 9}),
        ({"max_features": 4}, {"min_df": 2, "max_features": 4}),
    ],
)
def test_ngrams_and_a_bound_on_the_features_equal_scikit_learn(tmp_path, options, theirs):
    oracle = TfidfVectorizer(token_pattern=r"(?u)[^\W_]{2,}", sublinear_tf=True, **theirs)
    expected = oracle.fit_transform(TEXTS * 2)
    vocabulary, rows = Vocabulary.fit_transform(iter(TEXTS * 2), **options)
    assert vocabulary.tokens == tuple(oracle.get_feature_names_out())
    np.testing.assert_allclose(rows.toarray(), expected.toarray(), atol=1e-6)
    np.testing.assert_array_equal(vocabulary.transform(TEXTS * 2).toarray(), rows.toarray())
    # Also after it has been a file.
    vocabulary.save(tmp_path / "v.txt")
    again = Vocabulary.load(tmp_path / "v.txt")
    assert again.max_ngram == options.get("max_ngram", 1)
    np.testing.assert_array_equal(again.transform(TEXTS * 2).toarray(), rows.toarray())


def test_a_token_has_no_more_words_than_the_first_line_says(tmp_path):
    two = HEADER.replace("tokens ", "tokens 1 to 2 times ")
    assert Vocabulary.load(write(tmp_path / "v.txt", "graph theory\t2", header=two)).tokens == ("graph theory",)
    for header, token in ((two, "a graph theory"), (two, "graph theory tool"), (HEADER, "graph theory")):
        with pytest.raises(DataError, match=r"v\.txt:2: .* can never occur"):
            Vocabulary.load(write(tmp_path / "v.txt", f"{token}\t2", header=header))
    with pytest.raises(DataError, match="another token rule"):
        Vocabulary.load(write(tmp_path / "v.txt", "graph\t2", header=HEADER.replace("tokens ", "tokens 1 to 9 times ")))


def test_numbers_out_of_range_and_faults_of_the_texts(tmp_path):
    for options in ({"max_features": 0}, {"max_ngram": 0}, {"max_ngram": 6}, {"min_document_frequency": 0}):
        with pytest.raises(UsageError, match="expected 1"):
            Vocabulary.fit(TEXTS, **options)

    def broken():
        yield "graph"
        raise ValueError("of the reader")

    with pytest.raises(ValueError, match="of the reader"):
        Vocabulary.fit(broken())
    with pytest.raises(UsageError, match="One text"):
        Vocabulary.fit("graph")


def test_tokens_are_runs_of_letters_or_digits_and_the_underscore_separates():
    tokens = Vocabulary.fit(["snake_case x86_64 libfoo2-dev C++ a1 Ärger"], min_document_frequency=1).tokens
    assert set(tokens) == {"snake", "case", "x86", "64", "libfoo2", "dev", "a1", "ärger"}


def test_no_texts_and_generators():
    vocabulary = Vocabulary.fit((text for text in TEXTS), min_document_frequency=1)
    assert vocabulary.transform(iter(())).shape == (0, vocabulary.num_features)
    assert vocabulary.transform(text for text in TEXTS).shape == (len(TEXTS), vocabulary.num_features)
    with pytest.raises(UsageError, match="One text"):
        vocabulary.transform("graph")


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_save_and_load_are_exact(tmp_path, suffix):
    vocabulary = Vocabulary.fit(TEXTS, min_document_frequency=1)
    path = tmp_path / f"vocabulary.txt{suffix}"
    vocabulary.save(path)
    again = Vocabulary.load(path)
    assert again.tokens == vocabulary.tokens
    np.testing.assert_array_equal(again.idf, vocabulary.idf)
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


def test_the_file_is_plain_text_with_the_token_rule_first(tmp_path):
    path = tmp_path / "vocabulary.txt.xz"
    Vocabulary(tokens=("graph", "tool"), idf=np.array([4.513, 2.07])).save(path)
    lines = lzma.decompress(path.read_bytes()).decode().split("\n")
    assert lines == [HEADER, "graph\t4.513", "tool\t2.07", ""]
    assert lines[0].startswith("#") and r"[^\W_]{2,}" in lines[0]


def test_windows_line_ends_and_a_missing_last_newline_are_read(tmp_path):
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(f"{HEADER}\r\ngraph\t2\r\ntool\t3".encode())
    vocabulary = Vocabulary.load(path)
    assert vocabulary.tokens == ("graph", "tool")
    assert vocabulary.idf.tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        (["graph\t2", "tool 3"], 3, "expected a token, a tab and its idf"),
        (["graph\t2", "tool\tmany"], 3, "expected a token, a tab and its idf"),
        (["graph\t2", "", "tool\t2"], 3, "expected a token, a tab and its idf"),
        (["graph\t2", "tool\t2", "graph\t2"], 4, "'graph' stands here for the second time"),
        (["graph\tnan"], 2, "expected a positive number"),
        (["graph\tinf"], 2, "expected a positive number"),
        (["graph\t-1"], 2, "expected a positive number"),
        (["graph\t1e-60"], 2, "expected a positive number"),
        (["graph\t1e39"], 2, "expected a positive number"),
        (["Graph\t2"], 2, "can never occur"),
        (["two words\t2"], 2, "can never occur"),
        (["x\t2"], 2, "can never occur"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, line, message):
    path = write(tmp_path / "vocabulary.txt", *lines)
    with pytest.raises(DataError) as caught:
        Vocabulary.load(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)


def test_a_bad_header_a_missing_file_and_a_cut_stream_are_data_errors(tmp_path):
    path = write(tmp_path / "vocabulary.txt", "graph\t2", header="graph\t2")
    with pytest.raises(DataError, match=r"vocabulary.txt:1: .*Is this a vocabulary of xmc-midx"):
        Vocabulary.load(path)
    write(path, "graph\t2", header="# xmc-midx vocabulary 1: tokens are characters")
    with pytest.raises(DataError, match=r"vocabulary.txt:1: .*another token rule"):
        Vocabulary.load(path)
    with pytest.raises(DataError, match="holds no token"):
        Vocabulary.load(write(path))
    path.write_bytes(b"")
    with pytest.raises(DataError, match="holds no token"):
        Vocabulary.load(path)
    path.write_bytes(f"{HEADER}\ngr\xe4ph\t2\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"vocabulary.txt:2: .*not UTF-8"):
        Vocabulary.load(path)
    with pytest.raises(DataError, match=r"missing\.txt"):
        Vocabulary.load(tmp_path / "missing.txt")
    cut = tmp_path / "cut.txt.gz"
    cut.write_bytes(gzip.compress(f"{HEADER}\ngraph\t2\n".encode())[:-9])
    with pytest.raises(DataError, match="cut or damaged"):
        Vocabulary.load(cut)


def test_fit_that_finds_no_token_is_a_data_error():
    for texts, minimum in (([], 1), (["", "a b"], 1), (["graph", "tool"], 2), (["graph"], 2)):
        with pytest.raises(DataError):
            Vocabulary.fit(texts, min_document_frequency=minimum)
    with pytest.raises(UsageError, match="expected 1 or more"):
        Vocabulary.fit(["graph"], min_document_frequency=0)


def test_a_vocabulary_checks_its_parts():
    for tokens, idf in (((), []), (("graph",), [1.0, 2.0]), (("graph", "graph"), [1, 1]), (("graph",), [0.0])):
        with pytest.raises(DataError):
            Vocabulary(tokens=tokens, idf=np.array(idf))


def test_loading_does_not_import_scikit_learn(tmp_path):
    path = write(tmp_path / "vocabulary.txt", "graph\t2")
    code = (
        "import sys; from xmc_midx.data.vocabulary import Vocabulary; "
        f"Vocabulary.load({str(path)!r}); assert 'sklearn' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
