"""Reading rows from where they lie: CSV, JSON lines, Parquet, text, class folders, the hub, scikit-learn."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sweep.study.errors import FieldError, first_line
from sweep.study.records import DataSettings
from sweep.training.locate import DIGITS, hub_problem, locate_data
from sweep.training.pictures import as_picture, class_folders, digits

# {"text", "label"} with the label as text, {"text"}, {"prompt", "completion"}, {"messages"}, or {"image",
# "label"} with the image as a Picture.
Row = dict[str, Any]
# "train", and "validation" and "test" where the settings name a split for them.
Rows = dict[str, list[Row]]
Columns = dict[str, str]  # our name: the column's


def read_rows(settings: DataSettings, task: str) -> Rows:
    """The rows of the training split, and of those that `validation` and `test` name.

    Rows of causal-lm without any text are passed over (line-based corpora are full of them); of classification they
    are an error, as is a missing label.
    Raises FieldError on the field of `data` that cannot be used.
    """
    place = locate_data(settings.source)
    columns = _columns(settings, task)
    named = {name: value for name in ("validation", "test") if isinstance(value := getattr(settings, name), str)}
    if place.hub_id is not None:
        return _hub(place.hub_id, {"train": settings.split, **named}, settings, columns)
    if settings.split != "train" or settings.config is not None:
        field, default = ("data.config", "null") if settings.config is not None else ("data.split", "train")
        raise FieldError((field, f"only a hub data set has it, and {settings.source} is local: set it to {default}"))
    if place.folder is not None or place.digits:
        if named:
            what = DIGITS if place.digits else "class folders"
            raise FieldError(*((f"data.{name}", f"{what} have no named splits: give a fraction") for name in named))
        if place.folder is None:
            if "image" not in columns:
                raise FieldError(("data.source", f"{DIGITS} holds images: use task: image-classification"))
            return {"train": digits()}
        if "image" in columns:
            return {"train": class_folders(Path(place.folder))}
        return {"train": _class_folders(Path(place.folder), columns)}
    rows: Rows = {}
    rest = list(place.files)
    for name, stem in named.items():
        files = [file for file in rest if Path(file).stem == stem]
        if not files:
            there = ", ".join(Path(file).name for file in place.files[:12])
            raise FieldError((f"data.{name}", f"no file {stem}.* in {settings.source} ({there}): or give a fraction"))
        rest = [file for file in rest if file not in files]
        rows[name] = [row for file in files for row in _file(Path(file), columns)]
    return {"train": [row for file in rest for row in _file(Path(file), columns)], **rows}


def read_text(path: Path) -> str:
    """UTF-8, or Latin-1 where the bytes are not UTF-8."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def label_text(value: Any) -> str | None:
    """A label as text, whole numbers without a decimal point; None where there is none."""
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    return (str(value).strip() or None) if value is not None else None


def _columns(settings: DataSettings, task: str) -> Columns:
    if task == "image-classification":
        return {"image": settings.image or "image", "label": settings.label}
    if task == "sequence-classification":
        for field in ("prompt", "messages"):
            if getattr(settings, field) is not None:
                raise FieldError((f"data.{field}", "is for causal-lm; classification reads data.text and data.label"))
        return {"text": settings.text, "label": settings.label}
    if settings.messages is not None:
        return {"messages": settings.messages}
    if settings.prompt is not None and settings.completion is not None:
        return {"prompt": settings.prompt, "completion": settings.completion}
    return {"text": settings.text}


def _class_folders(folder: Path, columns: Columns) -> list[Row]:
    """One row a .txt file, its folder's name the label; hidden files are passed over."""
    rows = []
    for below in sorted(p for p in folder.iterdir() if not p.name.startswith(".")):
        for path in sorted(p for p in below.iterdir() if not p.name.startswith(".")):
            if path.suffix.lower() != ".txt" or not path.is_file():
                raise FieldError(("data.source", f"{path}: a class folder may hold .txt files only"))
            rows.append({"text": read_text(path), "label": below.name})
    if "text" not in columns:
        raise FieldError((f"data.{next(iter(columns))}", f"{folder} holds text files, which have no columns"))
    return _pick(rows, {name: name for name in columns}, str(folder))


def _file(path: Path, columns: Columns) -> list[Row]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":
            return _pick(_csv(path, ","), columns, str(path))
        if suffix == ".tsv":
            return _pick(_csv(path, "\t"), columns, str(path))
        if suffix == ".parquet":
            return _pick(_parquet(path, columns), columns, str(path))
        if suffix == ".txt":
            return _lines(path, columns)
        return _pick(_json(path), columns, str(path))
    except OSError as error:
        raise FieldError(("data.source", f"{path} cannot be read: {first_line(error)}")) from None


def _lines(path: Path, columns: Columns) -> list[Row]:
    """One row a line: a paragraph of running text."""
    if list(columns) != ["text"]:
        field = "data.source" if "label" in columns else f"data.{next(iter(columns))}"
        hint = "use CSV, JSON lines, Parquet or a folder of class folders"
        raise FieldError((field, f"{path} is plain text and has no columns: {hint}"))
    return [{"text": line} for line in read_text(path).splitlines() if line.strip()]


def _csv(path: Path, delimiter: str) -> list[dict[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts over 128 KiB
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    rows = []
    try:
        for row in reader:
            if None in row:
                raise FieldError(("data.source", f"{path}:{reader.line_num}: more cells than the header has columns"))
            rows.append(row)
    except csv.Error as error:
        raise FieldError(("data.source", f"{path}:{reader.line_num}: {error}")) from None
    return rows


def _json(path: Path) -> list[dict[str, Any]]:
    """JSON lines, or one array of objects."""
    text = read_text(path)
    is_array = text.lstrip().startswith("[")
    # Not splitlines: a JSON string may hold U+2028 and its like as they are.
    parts = [text] if is_array else text.split("\n")
    rows: list[Any] = []
    for number, part in enumerate(parts, 1):
        if part.strip():
            try:
                rows.append(json.loads(part))
            except (ValueError, RecursionError) as error:
                raise FieldError(("data.source", f"{path}:{number}: not JSON: {error}")) from None
    rows = rows[0] if is_array else rows
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise FieldError(("data.source", f"{path}: row {i} is not an object with named columns"))
    return rows


def _parquet(path: Path, columns: Columns) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise FieldError(("data.source", f"{path}: Parquet needs pyarrow: `pip install pyarrow`")) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _need(columns, file.schema_arrow.names, str(path))
        return file.read(columns=list(columns.values())).to_pylist()
    except pyarrow.ArrowException as error:
        raise FieldError(("data.source", f"{path}: not Parquet: {first_line(error)}")) from None


def _hub(hub_id: str, wanted: dict[str, str], settings: DataSettings, columns: Columns) -> Rows:
    try:
        import datasets
    except ImportError:
        message = f"{hub_id}: neither a local path, nor is `datasets` installed to ask the hub: `pip install datasets`"
        raise FieldError(("data.source", message)) from None
    problem = hub_problem()
    if problem:
        datasets.config.HF_HUB_OFFLINE = True  # go to the cache at once, without a minute of retries
    rows: Rows = {}
    for name, split in wanted.items():
        try:
            with _quiet_datasets():
                table = datasets.load_dataset(hub_id, settings.config, split=split)
        except Exception as error:  # datasets raises many kinds; the message says which
            raise _hub_error(hub_id, name, problem, error) from None
        _need(columns, table.column_names, f"{hub_id} ({split})")
        if "image" in columns and isinstance(table.features[columns["image"]], datasets.Image):
            table = table.cast_column(columns["image"], datasets.Image(decode=False))  # when it is needed
        picked = table.select_columns(list(columns.values())).to_list()
        names = getattr(table.features[columns["label"]], "names", None) if "label" in columns else None
        if names:  # the column holds numbers of names; -1 means no label
            for row in picked:
                number = row[columns["label"]]
                row[columns["label"]] = names[number] if number is not None and number >= 0 else None
        rows[name] = _pick(picked, columns, f"{hub_id} ({split})")
    return rows


def _hub_error(hub_id: str, name: str, problem: str | None, error: Exception) -> FieldError:
    message = first_line(error)
    if isinstance(error, ValueError) and "split" in message.lower():
        return FieldError(("data.split" if name == "train" else f"data.{name}", f"{hub_id}: {message}"))
    if isinstance(error, ValueError) and "config" in message.lower():
        return FieldError(("data.config", f"{hub_id}: {' '.join(str(error).split())}"))
    if problem is None:
        return FieldError(("data.source", f"{hub_id}: {message}"))
    tried = f"the path {Path(hub_id).absolute()} (not there), the hub ({problem}), the hub's local cache (not in it)"
    return FieldError(("data.source", f"{hub_id}: not found. Tried: {tried}. Give a local path or package:NAME/PATH"))


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


def _need(columns: Columns, present: Sequence[str], where: str) -> None:
    missing = [
        (f"data.{name}", f"no column {column!r} in {where}; there are: {', '.join(map(str, present))}")
        for name, column in columns.items()
        if column not in present
    ]
    if missing:
        raise FieldError(*missing)


def _pick(table: list[dict[str, Any]], columns: Columns, where: str) -> list[Row]:
    """The rows under our names, each value checked."""
    rows: list[Row] = []
    lacking: list[tuple[str, int]] = []
    for number, raw in enumerate(table, 1):
        if not all(column in raw for column in columns.values()):
            _need(columns, list(raw), where if number == 1 else f"row {number} of {where}")
        row = {name: raw[column] for name, column in columns.items()}
        if "label" in row:
            row["label"] = label_text(row["label"])
        if "image" in row:
            row["image"] = as_picture(row["image"], Path(where).parent, f"row {number} of {where}")
        if "messages" in row:
            row["messages"] = _messages(row["messages"], f"row {number} of {where}")
        for name in row.keys() & {"text", "prompt", "completion"}:
            if not isinstance(row[name], str) and row[name] is not None:
                kind = type(row[name]).__name__
                raise FieldError(
                    (f"data.{name}", f"row {number} of {where} holds no text but {kind} {row[name]!r:.60}")
                )
        if list(columns) == ["text"] and not (row["text"] or "").strip():
            continue
        lacking += [(name, number) for name in ("text", "label") if name in row and not (row[name] or "").strip()]
        lacking += [(name, number) for name in ("prompt", "completion", "image") if name in row and row[name] is None]
        rows.append(row)
    problems = []
    for name in columns:
        numbers = [number for lacks, number in lacking if lacks == name]
        if numbers:
            count = f"{len(numbers)} rows have" if len(numbers) > 1 else "one row has"
            problems.append(
                (f"data.{name}", f"{where}: {count} no {name} (first: row {numbers[0]}): remove or fill in")
            )
    if problems:
        raise FieldError(*problems)
    return rows


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    """Role and content of each. Raises FieldError for what would be lost: parts that are no text, calls of tools."""
    for message in value if isinstance(value, list) else ():
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            why = "has a content that is a list of parts (text, images, …): only text can be learnt; make it one text"
            raise FieldError(("data.messages", f"{where} {why}"))
        if isinstance(message, dict) and (message.get("tool_calls") or message.get("function_call")):
            why = "has a message with tool_calls, which would be lost: write the call into the content, as text"
            raise FieldError(("data.messages", f"{where} {why}"))
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        raise FieldError(("data.messages", f"{where} is not a list of messages with a role and a content, both text"))
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
