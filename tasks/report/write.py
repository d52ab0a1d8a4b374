"""Runs become ``report.html``: one page with everything in it, or with a folder of pages beside."""

from __future__ import annotations

import tempfile
from base64 import b64encode
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

from common.files import finite, write_atomically
from tasks.report import charts, summary
from tasks.report.answers import Column, Item, columns_of, together
from tasks.report.originals import Originals
from tasks.run import Run, RunError
from tasks.run.compare import names_of
from tasks.run.place import beside

if TYPE_CHECKING:
    from tasks.measures import Table

COLOUR_MAPS = ("viridis", "cividis", "inferno", "gray", "jet")
"""What a reader may choose from; the first is the default, which the colour-blind can read."""

SIDE = 256
"""Pixels of the longer side of the pictures in a page."""

CLASSES = 8
"""How many of the strongest classes of an image have a map, besides those with a mask."""

INLINE = 12 << 20
"""Bytes of images up to which everything is in one file."""

FIRST = 2 << 20
"""Bytes of images in that file where there are more."""

PAGE = 24
"""Images a page."""

_HERE = Path(__file__).parent


@dataclass
class Gallery:
    """The images of a report, in the order of the runs; what fills pages is in a temporary file.

    Attributes:
        spool: where what pages need is written to.
        places: offset and bytes of each image in it.
        index: what filters and sorting need of each image.
    """

    spool: IO[bytes]
    places: list[tuple[int, int]] = field(default_factory=list)
    index: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, None] = field(default_factory=dict)

    def add(self, item: Item) -> None:
        """Add an image."""
        data = as_json(item.finished()).encode()
        self.places.append((self.spool.tell(), len(data)))
        self.spool.write(data)
        labels = item.record["labels"]
        self.measured |= {quality.name: None for quality in item.quality if quality}
        self.index.append(
            {
                "key": item.record["key"],
                "labels": labels,
                "shown": sorted(item.shown - set(labels)),
                "quality": [q and _rounded(q.value) for q in item.quality],
                "classes": [
                    q and [_rounded(q.classes.get(label)) for label in labels] for q in item.quality
                ],
                "score": [_rounded(score) for score in item.score],
            }
        )

    def sort(self) -> None:
        """Put the worst images first; those of which that is not known stay in their order, last."""
        worst = [next((v for v in row["quality"] if v is not None), 2.0) for row in self.index]
        order = sorted(range(len(self.index)), key=lambda i: worst[i])
        self.index = [self.index[i] for i in order]
        self.places = [self.places[i] for i in order]

    def page(self, number: int) -> str:
        """The JSON of the images that stand on a page."""
        parts = []
        for offset, size in self.places[PAGE * number : PAGE * (number + 1)]:
            self.spool.seek(offset)
            parts.append(self.spool.read(size).decode())
        return f"[{','.join(parts)}]"

    def bytes_of(self, page: int) -> int:
        """How large a page is."""
        return sum(size for _, size in self.places[PAGE * page : PAGE * (page + 1)])


def write_report(
    runs: Sequence[Run],
    output: Path | None = None,
    *,
    shards: str | None = None,
    images: int | None = None,
    side: int = SIDE,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write a page that shows runs, side by side where there are several.

    Args:
        runs: finished ones, or what there is of them.
        output: the page; by default ``report.html`` in the first run's folder. Large runs get a folder
            of that name beside, ``report_files``.
        shards: where the input of the runs is now, see `Originals`.
        images: how many images are shown at most, the first ones; all by default.
        side: pixels of the longer side of the pictures.
        progress: is told how many images are done.

    Returns:
        The page.

    Raises:
        RunError: a run is damaged, or there is nothing in it.
        InvalidSetting: matplotlib is not installed.
    """
    charts.need_matplotlib()
    output = output or beside(runs[0].folder, "report.html")
    names = names_of(runs)
    columns = columns_of(runs, names)
    with tempfile.TemporaryFile() as spool:
        gallery = Gallery(spool)
        originals = Originals(runs[0], shards)
        try:
            _gather(gallery, runs[0], columns, originals, images, side, progress)
        finally:
            originals.close()
        if not gallery.index:
            raise RunError(f"{runs[0].folder}: no shard is finished, there is nothing to show")
        gallery.sort()
        _write(output, runs, names, columns, gallery, originals)
    return output


def _gather(
    gallery: Gallery,
    run: Run,
    columns: Sequence[Column],
    originals: Originals,
    limit: int | None,
    side: int,
    progress: Callable[[int], None],
) -> None:
    info = run.info
    for shard in run.shards:
        with originals.open(shard) as find:
            for answers in together(columns, shard):
                if limit is not None and len(gallery.index) >= limit:
                    return
                key = next(image.key for image in answers if image)
                item = Item(shard, key, find(key), info, side, CLASSES)
                for column, image in zip(columns, answers, strict=True):
                    item.add(column, image)
                gallery.add(item)
                progress(len(gallery.index))


def _write(
    output: Path,
    runs: Sequence[Run],
    names: Sequence[str],
    columns: Sequence[Column],
    gallery: Gallery,
    originals: Originals,
) -> None:
    """Write the page, and the folder beside it where one is needed."""
    count = -(-len(gallery.index) // PAGE)
    sizes = [gallery.bytes_of(page) for page in range(count)]
    inline = count
    if sum(sizes) > INLINE:
        inline = max(1, next(n for n in range(count) if sum(sizes[: n + 1]) > FIRST))
    folder = output.with_name(f"{output.stem}_files")
    output.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]*.js"):
        old.unlink()
    if inline < count:
        folder.mkdir(exist_ok=True)
        for number in range(inline, count):
            page = gallery.page(number)
            write_atomically(folder / f"{number:05d}.js", f"report.receive({number},{page});\n")
    elif folder.is_dir():
        with suppress(OSError):
            folder.rmdir()
    script = Markup((_HERE / "report.js").read_text())
    info = runs[0].info
    data = {
        "columns": [column.record() for column in columns],
        "classes": list(info.classes),
        "palette": [list(colour) for colour in info.palette],
        "colourMaps": {
            name: b64encode(charts.colour_table(name).tobytes()).decode() for name in COLOUR_MAPS
        },
        "index": _columnar(gallery.index),
        "measured": list(gallery.measured),
        "page": PAGE,
        "inline": inline,
        "folder": folder.name,
    }
    head = {
        "title": " beside ".join(dict.fromkeys(run.settings["task"]["class"] for run in runs))
        + f" on {runs[0].settings['data'].get('name', '?')}",
        "runs": [
            {"name": name, "folder": str(run.folder), "facts": summary.facts_of(run)}
            for name, run in zip(names, runs, strict=True)
        ],
        "columns": columns,
        "metrics": summary.metrics_of(columns),
        "remarks": summary.remarks_of(runs, names),
        "classes": summary.classes_of(columns),
        "settings": summary.settings_of(runs),
        "names": names,
        "errors": summary.errors_of(runs, names),
        "charts": _charts(runs, names, columns, gallery),
        "unread": originals.failures.most_common(20),
        "shown": len(gallery.index),
        "found": originals.found,
        "script_hash": b64encode(sha256(script.encode()).digest()).decode(),
    }
    page = _template().render(
        **head,
        style=Markup((_HERE / "report.css").read_text()),
        script=script,
        data=Markup(as_json(data)),
        pages=[Markup(gallery.page(number)) for number in range(inline)],
    )
    write_atomically(output, page)


def _charts(
    runs: Sequence[Run],
    names: Sequence[str],
    columns: Sequence[Column],
    gallery: Gallery,
) -> dict[str, Any]:
    """Bars of the classes, how images are spread, and the figures of the tasks."""
    kind, values = summary.bars_of(columns)
    links = {name: f"#class={index}" for index, name in enumerate(runs[0].info.classes)}
    quality = [[row["quality"][i] for row in gallery.index] for i in range(len(columns))]
    figures: list[tuple[str, Markup]] = []
    tables: list[tuple[str, Table]] = []
    for run, name in zip(runs, names, strict=True):
        with suppress(RunError):  # a task of the user's own, which the project can't measure
            for what, table in run.measured()[0].tables.items():
                title = what.replace("_", " ") + (f", {name}" if len(runs) > 1 else "")
                if table.rows and table.plot:
                    figures.append((title, charts.table_figure(what, table)))
                elif table.rows:
                    tables.append((title, table))
    return {
        "classes": charts.class_bars(values, links, kind) if values else None,
        "kind": kind,
        "images": charts.histogram(quality, next(iter(gallery.measured)))
        if gallery.measured
        else None,
        "figures": figures,
        "tables": tables,
    }


def _columnar(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _rounded(value: float | None) -> float | None:
    return None if value is None or value != value else round(value, 3)


def as_json(value: Any) -> str:
    """JSON that may stand in a script element, whatever a stranger wrote into it."""
    return str(htmlsafe_json_dumps(finite(value), separators=(",", ":")))


def _number(value: float | None, percent: bool = True) -> str:
    if value is None or value != value:
        return "–"
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["breakable"] = lambda v: escape(v).replace("_", Markup("_<wbr>"))
    return environment.get_template("page.html")
