"""Predict, with NumPy alone, from what `xmc-midx export RUN OUT --format midx` wrote.

    python scripts/read_midx.py OUT [INPUT]

A line of INPUT, or of stdin, is `feature:value ...`, labels before it or not, or a text where OUT has a vocabulary. Its
five best labels are printed as `label:score`, z . row + bias, of those in the best cells.
"""

import fileinput
import hashlib
import json
import re
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np


class Model:
    def __init__(self, directory: Path) -> None:
        *lines, rest = (directory / "SHA256SUMS").read_bytes().decode("ascii").split("\n")
        sums = {"export.json": "", "model.safetensors": ""} | dict(line.split("  ")[::-1] for line in lines)
        for name, expected in sums.items():
            with (directory / name).open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != expected or rest:
                raise ValueError(f"{name} has another sha256 than SHA256SUMS says")
        document, self.words = json.loads((directory / "export.json").read_bytes()), {}
        if document["kind"] != "midx" or document["version"] not in (1, 2, 3, 4):
            raise ValueError("export.json is of another kind or version")
        self.facts, self.num_candidates = document["model"], document["index"]["num_candidates"]
        types = {"F32": "<f4", "I64": "<i8", "I32": "<i4"}
        data = np.memmap(directory / "model.safetensors", np.uint8, "r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        self.tensors = {
            name: data[start:][slice(*entry["data_offsets"])].view(types[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in json.loads(data[8:start].tobytes()).items()
        }
        self.table, self.bias = self.tensors["labels.weight"], self.tensors["labels.bias"]
        self.ids = self.tensors.get("labels.ids", range(len(self.bias)))
        if "vocabulary.txt" in sums:
            rule, *lines = (directory / "vocabulary.txt").read_text("utf-8").splitlines()
            self.longest = int((re.search(r"tokens 1 to (\d) times", rule) or (0, 1))[1])
            self.words = {word: (f, float(idf)) for f, (word, idf) in enumerate(line.split("\t") for line in lines)}

    def read(self, line: str) -> dict[int, float]:
        """The features of a row; of a text (1 + ln tf) * idf of the words, and words in a row, that are known."""
        if not self.words or re.fullmatch(r"[\d,]*\s*(\d+:\S+\s*)*", line):
            return {int(f): float(v) for f, colon, v in (pair.partition(":") for pair in line.split()) if colon}
        said = re.findall(r"[^\W_]{2,}", line.lower())
        grams = (" ".join(said[i : i + n]) for n in range(1, 1 + self.longest) for i in range(len(said) - n + 1))
        counts = Counter(gram for gram in grams if gram in self.words)
        return {self.words[gram][0]: (1 + np.log(n)) * self.words[gram][1] for gram, n in counts.items()}

    def encode(self, row: dict[int, float]) -> np.ndarray:
        """Features -> query (D,): an embedding bag, an activation, hidden layers."""
        ids, values = np.array([*row], int), np.array([*row.values()], np.float32)
        if "features.idf" in self.tensors:
            size = np.minimum(np.abs(values), 1) + np.log(np.maximum(np.abs(values), 1))
            values = np.sign(values) * size * self.tensors["features.idf"][ids]
        length = np.linalg.norm(values) if self.facts["normalize"] == "l2" else 1
        least = 0 if self.facts["activation"] == "relu" else -np.inf
        bag = values / (length or 1) @ self.tensors["encoder.embedding"][ids]
        z: np.ndarray = np.maximum(bag + self.tensors["encoder.bias"], least)
        for n in range(self.facts["num_hidden_layers"]):
            weight, bias = self.tensors[f"encoder.hidden.{n}.weight"], self.tensors[f"encoder.hidden.{n}.bias"]
            z = z * self.facts["residual"] + np.maximum(weight @ z + bias, least)
        return z

    def candidates(self, z: np.ndarray) -> np.ndarray:
        """The rows of the labels of the best cells, until there are `num_candidates`, rising."""
        index = {name.removeprefix("index."): tensor for name, tensor in self.tensors.items()}
        first, second = index["codewords1"] @ z, index["codewords2"] @ z
        order = np.argsort(-(first[index["cells"][:, 0]] + second[index["cells"][:, 1]] + index["cell_bias"]))
        last = np.searchsorted(np.cumsum(np.diff(index["offsets"])[order]), self.num_candidates)
        spans = [slice(*index["offsets"][cell : cell + 2]) for cell in order[: last + 1]]
        return np.sort(np.concatenate([index["postings"][span] for span in spans]))

    def predict(self, line: str, k: int = 5) -> list[tuple[int, float]]:
        z = self.encode(self.read(line))
        rows = self.candidates(z)
        scores = self.table[rows] @ z + self.bias[rows]
        return [(int(self.ids[rows[i]]), float(scores[i])) for i in np.argsort(-scores, kind="stable")[:k]]


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        sys.exit(__doc__)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    place = f"{sys.argv[1]} is no sound midx export"
    try:
        model = Model(Path(sys.argv[1]))
        with fileinput.input(sys.argv[2:], encoding="utf-8") as lines:
            for line in lines:
                place = f"{lines.filename()}:{lines.filelineno()}"
                if not lines.isfirstline() or not re.fullmatch(r"\s*\d+\s+\d+(\s+\d+)?\s*", line):
                    print(*(f"{label}:{score:.7g}" for label, score in model.predict(line.strip())))
    except (LookupError, OSError, TypeError, ValueError) as error:
        sys.exit(f"{place}: {error}")
