"""Layer 7. `xmc-midx datasets`: the registry -> a list, or what is known of one entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from xmc_midx.cli import options, render

if TYPE_CHECKING:
    from xmc_midx.data.registry import DatasetSpec

EPILOG = """\b
Examples:
  xmc-midx datasets
  xmc-midx datasets Amazon-670K"""


def datasets(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Entry to show; all are listed if absent.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """List the known datasets, or show one: sizes, licence, citation."""
    from xmc_midx.data.registry import find_spec, load_registry

    if name is not None:
        spec = find_spec(name)
        if as_json:
            render.print_json(_as_dict(spec))
        else:
            _print_entry(spec)
    elif as_json:
        render.print_json({"datasets": [_as_dict(spec) for spec in load_registry()]})
    else:
        _print_list(load_registry())


def _on_disk(spec: DatasetSpec) -> bool:
    return spec.directory.is_dir()


def _as_dict(spec: DatasetSpec) -> dict[str, Any]:
    return {**spec.model_dump(), "directory": str(spec.directory), "on_disk": _on_disk(spec)}


def _print_list(specs: tuple[DatasetSpec, ...]) -> None:
    heads = ("name", "train", "test", "features", "labels", "A", "B", "on disk")
    rows = [
        (
            spec.name,
            *(_short(n) for n in (spec.num_train, spec.num_test, spec.num_features, spec.num_labels)),
            f"{spec.propensity_a:g}",
            f"{spec.propensity_b:g}",
            "yes" if _on_disk(spec) else "",
        )
        for spec in specs
    ]
    render.print_table(heads, rows, right=range(1, 7))
    render.print_line()
    render.print_text("Licence, citation and exact sizes of one: xmc-midx datasets NAME")


def _print_entry(spec: DatasetSpec) -> None:
    sizes = {
        "training instances": spec.num_train,
        "test instances": spec.num_test,
        "features": spec.num_features,
        "labels": spec.num_labels,
        "labels per instance": spec.labels_per_instance,
        "instances per label": spec.instances_per_label,
    }
    render.print_facts(
        [
            ("name", spec.name),
            ("what", spec.description),
            *((what, render.number(value)) for what, value in sizes.items() if value is not None),
            ("propensity", f"A = {spec.propensity_a:g}, B = {spec.propensity_b:g}"),
            ("licence", spec.licence),
            ("homepage", spec.homepage),
            ("cite", spec.citation),
            *([("and its source", spec.original_citation)] if spec.original_citation else []),
            ("on disk", f"{'yes' if _on_disk(spec) else 'no'}: {spec.directory}"),
        ]
    )
    if spec.results:
        render.print_line()
        heads = ("method", *(f"{family}@{k}" for family in ("P", "PSP") for k in (1, 3, 5)))
        rows = [
            (result.method, *("" if value is None else f"{value:.2f}" for value in (*result.P, *result.PSP)))
            for result in spec.results
        ]
        render.print_table(heads, rows, title="Published by the repository, in %", right=range(1, 7))


def _short(count: int | None) -> str:
    """`1813391` -> `1.81M`: the list has to fit into 80 columns."""
    if count is None:
        return ""
    if count < 100_000:
        return f"{count:,}"
    return f"{count / 1000:.0f}k" if count < 999_500 else f"{count / 1e6:.2f}M"
