"""Predict with what `xmc-midx export RUN OUT --format midx` wrote, with NumPy alone: the format's reference reader.

    python scripts/read_midx.py OUT INPUT [-k 5] [--exact]

INPUT (- is stdin) has a row a line, `feature:value ...` with or without labels before it and a header, or raw text
where OUT has a vocabulary. Prints `label:score ...` for each line: of the model alone, scores z . row + bias.
"""

import argparse
import hashlib
import json
import math
import re
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np

DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}


def verified(directory: Path) -> dict[str, str]:
    """The names in SHA256SUMS, after each file has been compared with its sum."""
    *lines, end = (directory / "SHA256SUMS").read_bytes().decode("ascii").split("\n")
    sums = dict(re.fullmatch(r"([0-9a-f]{64})  (\w[\w.]*)", line).group(2, 1) for line in lines)
    for name, expected in sums.items():
        with (directory / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise ValueError(f"{name} has another sha256 than SHA256SUMS says")
    if end or not {"export.json", "model.safetensors"} <= set(sums):
        raise ValueError("SHA256SUMS is cut, or not of this format")
    return sums


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file: 8 bytes of length, a JSON header, the data; mapped, so that only what is used is read."""
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > data.size:
        raise ValueError(f"{path.name} is cut: its header alone has {start} bytes")
    header = {n: t for n, t in json.loads(data[8:start].tobytes()).items() if n != "__metadata__"}
    spans = {n: slice(start + t["data_offsets"][0], start + t["data_offsets"][1]) for n, t in header.items()}
    return {n: data[spans[n]].view(DTYPES[t["dtype"]]).reshape(t["shape"]) for n, t in header.items()}


class Model:
    def __init__(self, directory: Path) -> None:
        names, document = verified(directory), json.loads((directory / "export.json").read_bytes())
        if (document["format"], document["kind"]) != ("xmc-midx export", "midx") or document["version"] not in (1, 2):
            raise ValueError("export.json is of another format, kind or version")
        self.facts, self.num_candidates = document["model"], document["index"]["num_candidates"]
        self.tensors, self.idf, self.feature = read_tensors(directory / "model.safetensors"), {}, {}
        if "vocabulary.txt" in names:
            rule, *lines = (directory / "vocabulary.txt").read_text("utf-8").splitlines()
            self.most_words = int((re.search(r"tokens 1 to (\d) times", rule) or (0, 1))[1])
            for line in lines:
                token, idf = line.split("\t")
                self.feature[token], self.idf[token] = len(self.feature), float(idf)

    def read(self, line: str) -> dict[int, float]:
        """A line of sparse features, or a text: (1 + ln tf) * idf of the words, and words in a row, that are known."""
        if not self.idf or re.fullmatch(r"[\d,]*\s*(\d+:\S+\s*)*", line):
            return {int(f): float(v) for f, colon, v in (pair.partition(":") for pair in line.split()) if colon}
        words = re.findall(r"[^\W_]{2,}", line.lower())
        tokens = (" ".join(words[i : i + n]) for n in range(1, self.most_words + 1) for i in range(len(words) - n + 1))
        counts = Counter(token for token in tokens if token in self.idf)
        return {self.feature[token]: (1 + math.log(n)) * self.idf[token] for token, n in counts.items()}

    def encode(self, row: dict[int, float]) -> np.ndarray:
        """Features -> query (D,): an embedding bag, an activation, hidden layers."""
        activate = (lambda z: np.maximum(z, 0)) if self.facts["activation"] == "relu" else (lambda z: z)
        ids, values = np.array([*row], np.int64), np.array([*row.values()], np.float32)
        if "features.idf" in self.tensors:
            size = np.abs(values)
            size = np.minimum(size, 1) + np.log(np.maximum(size, 1))
            values = np.sign(values) * size * self.tensors["features.idf"][ids]
        if self.facts["normalize"] == "l2":
            values = values / (np.linalg.norm(values) or 1)
        z = activate(values @ self.tensors["encoder.embedding"][ids] + self.tensors["encoder.bias"])
        for n in range(self.facts["num_hidden_layers"]):
            update = self.tensors[f"encoder.hidden.{n}.weight"] @ z + self.tensors[f"encoder.hidden.{n}.bias"]
            z = z + activate(update) if self.facts["residual"] else activate(update)
        return z

    def candidates(self, z: np.ndarray) -> np.ndarray:
        """The labels of the best cells, until there are `num_candidates`, rising."""
        index = {name.removeprefix("index."): tensor for name, tensor in self.tensors.items()}
        first, second, offsets = index["codewords1"] @ z, index["codewords2"] @ z, index["offsets"]
        order = np.argsort(-(first[index["cells"][:, 0]] + second[index["cells"][:, 1]] + index["cell_bias"]))
        last = np.searchsorted(np.cumsum(np.diff(offsets)[order]), self.num_candidates)
        return np.sort(np.concatenate([index["postings"][offsets[c] : offsets[c + 1]] for c in order[: last + 1]]))

    def predict(self, line: str, k: int, exact: bool = False) -> list[tuple[int, float]]:
        z = self.encode(self.read(line))
        labels = np.arange(self.facts["num_labels"]) if exact else self.candidates(z)
        scores = self.tensors["labels.weight"][labels] @ z + self.tensors["labels.bias"][labels]
        return [(int(labels[i]), float(scores[i])) for i in np.argsort(-scores, kind="stable")[:k]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="OUT")
    parser.add_argument("input", type=argparse.FileType(encoding="utf-8"), metavar="INPUT")
    parser.add_argument("-k", type=int, default=5)
    parser.add_argument("--exact", action="store_true", help="score all labels")
    options = parser.parse_args()
    try:
        model = Model(options.directory)
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        sys.exit(f"{options.directory} is no sound midx export: {error}")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for number, text in enumerate(options.input):
        if number or not re.fullmatch(r"\s*\d+\s+\d+(\s+\d+)?\s*", text):
            best = model.predict(text.strip(), options.k, options.exact)
            print(" ".join(f"{label}:{score:.7g}" for label, score in best))
