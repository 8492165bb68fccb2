"""Build the embedded dataset `debtags` from Debian's package index: package texts -> debtags, TF-IDF numbers only.

    python scripts/build_demo_data.py [--output DIR] [--state DIR]

Needs `apt-get` and the network. The package lists, with the long descriptions that many machines leave out, go to a
private directory (`--state`); the machine's own lists stay as they are and root is not needed. The last lines printed
say what was written and from which index.

What becomes an instance: a binary package with a `Tag:` field. Its text is its name, section, and short and long
description; its labels are its debtags. The steps, each with its reason:

- Placeholders (`...::TODO`) and `special::...` are no statement about a package: dropped.
- A family is a source package without the digits of its name (gcc-11 and gcc-12 are one). A family keeps one package a
  set of tags: the others are near copies. It falls to train or test as a whole, by a hash of its name: no leaks.
- Sets of tags that thousands of packages share ({role::shared-lib}) are thinned, else they would be most of the data.
- Tags with too few training instances cannot be learned or measured: dropped; then packages without a tag.
- Vocabulary and idf are of the training texts alone. Features are numbered by falling document frequency and values
  have two significant digits: both make the files smaller.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xmc_midx.data.vocabulary import HEADER, Vocabulary

OUTPUT = Path(__file__).resolve().parent.parent / "xmc_midx" / "data" / "embedded" / "debtags"
TEST_PERCENT = 15
MAX_INSTANCES_OF_A_TAG_SET = 200
MIN_TRAIN_INSTANCES_OF_A_TAG = 5
MIN_DOCUMENT_FREQUENCY = 3
MAX_BYTES = 3_000_000
NAMES_A_CALL = 2_000  # `apt-cache show` takes names as arguments, whose length is limited.
TAG = re.compile(r"[a-z0-9-]+::[A-Za-z0-9+.:-]+")


@dataclass(frozen=True, slots=True)
class Package:
    """One instance before it is numbers."""

    name: str
    family: str
    text: str
    tags: frozenset[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--state", type=Path, help="directory for the package lists; default: one that is removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        apt = Apt(arguments.state or Path(temporary))
        packages = list(read_packages(apt))
        origin = apt.origin()
    report = write(select(packages), arguments.output)
    print(f"{len(packages):,} packages with tags in the index.")
    print(f"{report}; source: {origin}; licence: token statistics and tags only, no text; see README.md there.")


# ------------------------------------------------------------------ the index


class Apt:
    """apt with its lists in a directory of ours, the long English descriptions among them."""

    def __init__(self, state: Path) -> None:
        self.lists = (state / "lists").resolve()
        (self.lists / "partial").mkdir(parents=True, exist_ok=True)
        cache = (state / "cache").resolve()
        (cache / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        options = {
            "Acquire::Languages": "en",
            "Dir::State::lists": f"{self.lists}/",
            "Dir::Cache": f"{cache}/",
            # Container images keep the lists compressed and switch the cache off: minutes instead of seconds.
            "Acquire::GzipIndexes": "false",
            "Dir::Cache::pkgcache": "pkgcache.bin",
            "Dir::Cache::srcpkgcache": "srcpkgcache.bin",
            # apt's own user may not enter a private directory.
            "APT::Sandbox::User": "root",
        }
        self.options = [f"-o{key}={value}" for key, value in options.items()]
        subprocess.run(["apt-get", *self.options, "-qq", "update"], check=True)

    def records(self) -> Iterator[dict[str, str]]:
        """Every version of every package. `dumpavail` has the short descriptions only; `show` has the long ones too."""
        names = sorted({record["Package"] for record in self._run("dumpavail") if "Tag" in record})
        for first in range(0, len(names), NAMES_A_CALL):
            yield from self._run("show", "--all-versions", *names[first : first + NAMES_A_CALL])

    def origin(self) -> str:
        """Suite, codename, version and date of each index."""
        lines = []
        for path in sorted(self.lists.glob("*InRelease")):
            text = path.read_text(encoding="utf-8", errors="replace")
            facts = dict(re.findall(r"^(Label|Codename|Version|Date): (.+)$", text, flags=re.MULTILINE))
            lines.append(
                " ".join(facts.get(key, "?") for key in ("Label", "Codename", "Version")) + f" of {facts['Date']}"
            )
        return "; ".join(lines)

    def _run(self, *arguments: str) -> Iterator[dict[str, str]]:
        command = ["apt-cache", *self.options, *arguments]
        output = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout
        for block in output.split("\n\n"):
            if record := parse_record(block):
                yield record


def parse_record(block: str) -> dict[str, str]:
    """Field -> value of one stanza; the lines of a value are joined by newlines."""
    record: dict[str, str] = {}
    field = ""
    for line in block.splitlines():
        if line.startswith((" ", "\t")):
            record[field] += "\n" + line.strip()
        elif ":" in line:
            field, _, value = line.partition(":")
            record[field] = value.strip()
    return record


def parse_tags(value: str) -> frozenset[str]:
    """The tags of a `Tag:` field, `a::{b,c}` written out, without placeholders.

    >>> sorted(parse_tags("implemented-in::{c,c++},\\nrole::program, use::TODO, special::not-yet-tagged"))
    ['implemented-in::c', 'implemented-in::c++', 'role::program']
    """
    tags: set[str] = set()
    for part in re.split(r",\s*(?![^{]*\})", value.replace("\n", " ")):
        facet, brace, inner = part.strip().partition("{")
        tags.update(facet + name.strip() for name in inner.rstrip("}").split(",")) if brace else tags.add(facet)
    return frozenset(tag for tag in tags if TAG.fullmatch(tag) and not tag.endswith(":TODO") and tag[:9] != "special::")


def read_packages(apt: Apt) -> Iterator[Package]:
    """The packages that have a tag, each name once."""
    seen = set()
    for record in apt.records():
        name = record.get("Package", "")
        tags = parse_tags(record.get("Tag", ""))
        # The same package in the security index has no tags: the first record that has some is taken.
        if not tags or name in seen:
            continue
        seen.add(name)
        source = record.get("Source", name).split(" ")[0]
        text = " ".join((name, record["Section"], record.get("Description-en") or record.get("Description", "")))
        yield Package(name=name, family=re.sub(r"[\d.]+", "", source), text=text, tags=tags)


# ------------------------------------------------------------------ the choice


def digest(text: str) -> int:
    """A number that depends on the text alone, alike on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def in_test(family: str) -> bool:
    return digest(family) % 100 < TEST_PERCENT


def select(packages: Iterable[Package]) -> list[Package]:
    """One package a family and set of tags, frequent sets thinned, in an order that a hash gives."""
    chosen: dict[tuple[str, frozenset[str]], Package] = {}
    for package in sorted(packages, key=lambda package: (len(package.name), package.name)):
        chosen.setdefault((package.family, package.tags), package)
    of_set: dict[frozenset[str], list[Package]] = defaultdict(list)
    for package in sorted(chosen.values(), key=lambda package: digest(package.name)):
        of_set[package.tags].append(package)
    kept = [package for group in of_set.values() for package in group[:MAX_INSTANCES_OF_A_TAG_SET]]
    return sorted(kept, key=lambda package: digest(package.name))


def write(packages: list[Package], output: Path) -> str:
    """The four files; returns what they hold."""
    train = [package for package in packages if not in_test(package.family)]
    counts = Counter(tag for package in train for tag in package.tags)
    # By falling frequency, as the features: small ids, small files.
    names = sorted(
        (tag for tag, n in counts.items() if n >= MIN_TRAIN_INSTANCES_OF_A_TAG), key=lambda t: (-counts[t], t)
    )
    ids = {tag: number for number, tag in enumerate(names)}
    packages = [package for package in packages if not package.tags.isdisjoint(ids)]
    splits = {
        "train": [package for package in packages if not in_test(package.family)],
        "test": [package for package in packages if in_test(package.family)],
    }
    vocabulary = fit_vocabulary([package.text for package in splits["train"]])
    output.mkdir(parents=True, exist_ok=True)
    for split, members in splits.items():
        lines = [f"{len(members)} {vocabulary.num_features} {len(names)}", *rows(members, ids, vocabulary)]
        write_xz(output / f"{split}.txt.xz", lines)
    write_xz(output / "labels.txt.xz", [f"{name}\t{name}" for name in names])
    write_xz(
        output / "vocabulary.txt.xz",
        [HEADER, *(f"{token}\t{idf!s}" for token, idf in zip(vocabulary.tokens, vocabulary.idf, strict=True))],
    )
    sizes = {path.name: path.stat().st_size for path in sorted(output.glob("*.xz"))}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        raise SystemExit(f"{total:,} bytes are more than {MAX_BYTES:,}: raise MIN_DOCUMENT_FREQUENCY.")
    per_instance = np.mean([len(package.tags & ids.keys()) for package in packages])
    return (
        f"{total:,} bytes ({', '.join(f'{name} {size:,}' for name, size in sizes.items())}); "
        f"{len(splits['train']):,} train and {len(splits['test']):,} test instances, "
        f"{vocabulary.num_features:,} features, {len(names)} labels, {per_instance:.1f} labels an instance"
    )


def fit_vocabulary(texts: list[str]) -> Vocabulary:
    """Tokens by falling document frequency, idf of four digits."""
    fitted = Vocabulary.fit(texts, min_document_frequency=MIN_DOCUMENT_FREQUENCY)
    order = np.lexsort((np.arange(fitted.num_features), fitted.idf))
    idf = np.array([float(f"{fitted.idf[feature]:.4g}") for feature in order], dtype=np.float32)
    return Vocabulary(tokens=tuple(fitted.tokens[feature] for feature in order), idf=idf)


def rows(packages: list[Package], ids: dict[str, int], vocabulary: Vocabulary) -> Iterator[str]:
    """The lines of a split in XMC format."""
    features = vocabulary.transform(package.text for package in packages)
    for number, package in enumerate(packages):
        part = slice(features.indptr[number], features.indptr[number + 1])
        labels = ",".join(map(str, sorted(ids[tag] for tag in package.tags if tag in ids)))
        pairs = zip(features.indices[part], features.data[part], strict=True)
        yield " ".join([labels, *(f"{feature}:{value:.2g}" for feature, value in pairs)])


def write_xz(path: Path, lines: list[str]) -> None:
    path.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()
