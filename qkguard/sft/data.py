"""The rows a training reads: hub data sets and local files, mapped to TRL's forms, mixed by weight."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from qkguard.errors import QKGuardError, first_line
from qkguard.training.checked import STRICT, refusal

FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SAMPLED = 256  # rows that a plan or a length check looks at
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
DATASETS = 'a list of data sets, [{"path": ..., "weight": ...}, ...]'
FORMS = {  # form -> the columns it needs, in order of preference
    "messages": ("messages_column",),
    "prompt_completion": ("prompt_column", "completion_column"),
    "problem": ("problem_column", "solution_column"),
}
DEFAULT_TEMPLATE = "{solution}\n\n{answer}"


@dataclass(config=STRICT)
class Columns:
    """Which columns of a data set mean what."""

    messages_column: str = "messages"
    """Column of chat messages ({role, content}, or ShareGPT's {from, value})."""

    prompt_column: str = "prompt"
    """Column of prompts; only completions are trained on."""

    completion_column: str = "completion"
    """Column of completions."""

    problem_column: str = "problem"
    """Column of problems, the user's turn of a chat made from columns."""

    solution_column: str = "solution"
    """Column of chains of thought, the first part of the assistant's turn."""

    answer_column: str = "answer"
    """Column of final answers; without such a column the turn is the solution."""

    completion_template: str = DEFAULT_TEMPLATE
    r"""How solution and answer make the assistant's turn, in Python's format syntax; for thinking models
    "<think>\n{solution}\n</think>\n\n{answer}" in a recipe."""


@dataclass(config=STRICT)
class Source(Columns):
    """One data set of a mixture."""

    path: str = ""
    config: str | None = None
    split: str = "train"
    weight: Annotated[float, Field(gt=0)] | None = None

    @property
    def file_type(self) -> str | None:
        """The builder that reads a local file; None for a hub id or a folder."""
        return FILES.get(Path(self.path).suffix)

    @property
    def is_saved(self) -> bool:
        """Whether it is the folder of one data set, as `save_to_disk` leaves it."""
        return os.path.isfile(os.path.join(self.path, "state.json"))


@dataclass(config=STRICT)
class DataArguments(Columns):
    """What to train on: one data set, or several mixed.

    TRL's ScriptArguments and `get_dataset` (1.16) map no columns, read no local rows by path alone, and take the first
    rows of each data set where this mixture draws from all of them.
    """

    dataset_name: str | None = None
    """Hub id, local .jsonl, .json, .parquet or .csv file, or a data set's folder."""

    dataset_config: str | None = None
    """Its configuration, where it has several."""

    dataset_train_split: str = "train"
    """Split to train on."""

    dataset_test_split: str | None = None
    """Split to evaluate on, or a file where the data set is one. Default: none."""

    datasets: list[dict[str, Any]] | str | None = None
    """Several data sets instead of dataset_name: a list of {path, config, split, weight, *_column}, on the command
    line as JSON. With weights, rows are drawn in these proportions until the first data set is used up;
    without, all rows are taken."""

    max_samples: int | None = None
    """Use only so many rows, for a trial run."""

    def sources(self) -> list[Source]:
        """The data sets to read; columns given for all apply where one does not name its own.

        Raises:
            QKGuardError: none is given, both forms are, an entry has an unknown key, or weights are missing in part.
        """
        if self.datasets is None and not self.dataset_name:
            raise QKGuardError(
                "The setting dataset_name is missing: what to train on; give a hub id, a local .jsonl or .parquet "
                "file, or several in `datasets`"
            )
        if self.datasets is not None and self.dataset_name:
            raise QKGuardError(
                "The settings dataset_name and datasets are both given; keep one (--datasets null drops the list)"
            )
        one = {"path": self.dataset_name, "config": self.dataset_config, "split": self.dataset_train_split}
        entries = [one] if self.datasets is None else _entries(self.datasets)
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(Columns)}
        sources = [_source(entry, columns) for entry in entries]
        weights = [source.weight for source in sources]
        if any(weights) and not all(weights):
            raise QKGuardError(f"Invalid datasets: weights are {weights}; give every entry one, or none of them.")
        return sources


def _entries(datasets: list[dict[str, Any]] | str) -> list[dict[str, Any]]:
    """The list of data sets, read from JSON where it was typed on a command line."""
    entries: Any = datasets
    if isinstance(datasets, str):
        try:
            entries = json.loads(datasets)
        except ValueError as error:
            raise QKGuardError(f"Invalid datasets: {datasets!r} is not JSON ({error}); expected {DATASETS}") from None
    if not isinstance(entries, list) or not entries:
        raise QKGuardError(f"Invalid datasets: expected {DATASETS}, found {datasets!r}")
    return entries


def _source(entry: Any, columns: dict[str, Any]) -> Source:
    if not isinstance(entry, dict) or not entry.get("path"):
        raise QKGuardError(f"Invalid datasets: expected {DATASETS}, found {entry!r} in it")
    try:
        return Source(**columns | entry)
    except ValidationError as error:
        raise QKGuardError(f"In datasets: {refusal(Source, error, entry)}") from None


# -- one row -----------------------------------------------------------------------------------------------------


def form_of(source: Source, columns: Sequence[str]) -> str:
    """ "messages", "prompt_completion" or "problem": what a data set's columns make of it.

    Raises:
        QKGuardError: naming the columns found; one that was mapped by hand must be there.
    """
    found = f"{source.path} has the columns {', '.join(columns)}"
    mapped = {f.name: getattr(source, f.name) for f in dataclasses.fields(Columns) if f.name.endswith("_column")}
    by_hand = [key for key, column in mapped.items() if column != getattr(Columns, key)]
    for key in by_hand:
        if mapped[key] not in columns:
            raise QKGuardError(f"{found}, and no {mapped[key]!r} ({key}); map one of these")
    complete = [form for form, keys in FORMS.items() if all(mapped[key] in columns for key in keys)]
    if not complete:
        raise QKGuardError(
            f"{found}; expected messages, prompt and completion, or problem and solution: map them with "
            f"{', '.join(mapped)}"
        )
    return next((form for form in complete if not set(by_hand).isdisjoint(FORMS[form])), complete[0])


def convert(row: dict[str, Any], source: Source, form: str, *, chat: bool, as_messages: bool) -> dict[str, Any]:
    """A row in one of TRL's forms: `messages`, or `prompt` and `completion`.

    Args:
        chat: the tokenizer has a chat template; problems become chats, else plain text.
        as_messages: chats made from problems become `messages` rows, to mix with those.
    """
    if form == "messages":
        return {"messages": [_message(m) for m in row[source.messages_column]]}
    if form == "prompt_completion":
        return {"prompt": row[source.prompt_column], "completion": row[source.completion_column]}
    problem, solution = row[source.problem_column], _text(row[source.solution_column])
    if source.answer_column in row and source.answer_column != source.solution_column:
        solution = source.completion_template.format(solution=solution, answer=_text(row[source.answer_column]))
    user, assistant = {"role": "user", "content": problem}, {"role": "assistant", "content": solution}
    if as_messages:
        return {"messages": [user, assistant]}
    if chat:
        return {"prompt": [user], "completion": [assistant]}
    return {"prompt": f"{problem}\n", "completion": solution}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """One turn with all it has: chat templates render reasoning and tool calls from keys of their own."""
    if "role" in message:
        return dict(message)
    role = SHAREGPT_ROLES.get(message["from"])
    if role is None:
        raise QKGuardError(f"A message is from {message['from']!r}; known are {', '.join(SHAREGPT_ROLES)}")
    return {"role": role, "content": message["value"]}


def _text(value: Any) -> str:
    if isinstance(value, list):  # s1K keeps several trajectories of which the first is trained on
        value = value[0] if value else ""
    return "" if value is None else str(value)


# -- reading -----------------------------------------------------------------------------------------------------


@dataclass
class Sampled:
    """A look at the training rows without reading all of them.

    Attributes:
        rows: some rows, in TRL's form.
        total: how many rows the training has; None where the hub does not say.
        form: "messages" or "prompt_completion".
    """

    rows: list[dict[str, Any]]
    total: int | None
    form: str


def look(arguments: DataArguments, *, chat: bool) -> Sampled:
    """A sample of the training rows; hub data sets are streamed, so that nothing large is downloaded.

    Raises:
        QKGuardError: a data set cannot be found, lacks a column, or does not fit the others.
    """
    sources = arguments.sources()
    opened, as_messages = _open_all(sources, streaming=True)
    rows: list[dict[str, Any]] = []
    for source, data, form in opened:
        for row in _spread(data, max(1, SAMPLED // len(sources))):
            rows.append(convert(row, source, form, chat=chat, as_messages=as_messages))
    if not rows:
        raise QKGuardError(f"{sources[0].path} has no rows")
    return Sampled(
        rows, _total(opened, arguments.max_samples), "messages" if "messages" in rows[0] else "prompt_completion"
    )


def load(arguments: DataArguments, *, chat: bool, seed: int, split: str | None = None) -> Any:
    """The rows to train on (or of `split`) as one `datasets.Dataset` in TRL's form.

    Raises:
        QKGuardError: as `look`.
    """
    import datasets

    sources = arguments.sources()
    if split is not None:
        sources = [_held_out(source, split) for source in sources]
    opened, as_messages = _open_all(sources, streaming=False)
    converted = []
    for source, data, form in opened:
        options = {"source": source, "form": form, "chat": chat, "as_messages": as_messages}
        converted.append(data.map(convert, fn_kwargs=options, remove_columns=data.column_names, desc=source.path))
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        shares = [weight / sum(weights) for weight in weights]
        mixed = datasets.interleave_datasets(converted, shares, seed=seed, stopping_strategy="first_exhausted")
    else:
        mixed = datasets.concatenate_datasets(converted)
    if arguments.max_samples and split is None:
        mixed = mixed.select(range(min(arguments.max_samples, len(mixed))))
    return mixed


def _held_out(source: Source, split: str) -> Source:
    """The rows to evaluate on: another split, or another file where the training rows are a file."""
    if source.file_type is None and not source.is_saved:
        return dataclasses.replace(source, split=split)
    kind, exists = ("a folder", os.path.isdir) if source.is_saved else ("a file", os.path.isfile)
    if not exists(split):
        raise QKGuardError(
            f"{source.path} is {kind} of rows and has no split {split!r}; "
            f"give dataset_test_split the path of {kind} too"
        )
    return dataclasses.replace(source, path=split)


def _open_all(sources: list[Source], *, streaming: bool) -> tuple[list[tuple[Source, Any, str]], bool]:
    """(source, its rows, their form) of every data set, and whether problems must become `messages`.

    They must where others have messages, so that all rows have one form. What is on this machine is never streamed.
    """
    opened = []
    for source in sources:
        local = source.file_type is not None or os.path.isdir(source.path)
        data = _open(source, streaming=streaming and not local)
        opened.append((source, data, form_of(source, data.column_names or list(next(iter(data))))))
    of_form = {form: source.path for source, _, form in reversed(opened)}
    if "messages" in of_form and "prompt_completion" in of_form:
        raise QKGuardError(
            f"{of_form['messages']} has messages and {of_form['prompt_completion']} prompts and completions: these "
            "cannot be mixed; map them to one form"
        )
    return opened, "messages" in of_form


def _open(source: Source, *, streaming: bool) -> Any:
    from datasets import load_dataset, load_from_disk

    if source.file_type and not os.path.isfile(source.path):
        raise QKGuardError(f"{source.path} does not exist; expected a file of rows, or a hub id")
    try:
        if source.file_type:
            return load_dataset(source.file_type, data_files=source.path, split="train")
        if source.is_saved:
            return load_from_disk(source.path)
        return load_dataset(source.path, source.config, split=source.split, streaming=streaming)
    except Exception as error:
        raise QKGuardError(
            f"Data set {source.path!r} could not be read ({first_line(error)}); expected a hub id, a folder, or a "
            ".jsonl, .json, .parquet or .csv file, with its config and split"
        ) from error


def _spread(data: Any, count: int) -> Iterator[dict[str, Any]]:
    """`count` rows: from everywhere of a data set on disk, the first of a streamed one."""
    if hasattr(data, "__len__"):
        return (data[i] for i in range(0, len(data), max(1, -(-len(data) // count))))
    return iter(data.take(count))


def _total(opened: list[tuple[Source, Any, str]], at_most: int | None) -> int | None:
    """Rows of the mixture; None where a streamed data set does not say how many it has."""
    sizes: list[Any] = []
    for source, data, _ in opened:
        said = (getattr(data.info, "splits", None) or {}).get(source.split)
        sizes.append(len(data) if hasattr(data, "__len__") else getattr(said, "num_examples", None))
    if None in sizes:
        return at_most
    total = sum(sizes)
    shares = [source.weight for source, _, _ in opened if source.weight is not None]
    if shares:  # until the first is used up
        total = int(min(size * sum(shares) / share for size, share in zip(sizes, shares, strict=True)))
    return min(total, at_most) if at_most else total


def token_lengths(rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[int]:
    """Tokens of every row as TRL will have them, the chat template applied."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it remarks on rows longer than the model's positions; max_length is what counts
    try:
        return [len(_ids(row, tokenizer)) for row in rows]
    finally:
        logging.set_verbosity(level)


def _ids(row: dict[str, Any], tokenizer: Any) -> Sequence[int]:
    if "messages" in row or isinstance(row["prompt"], list):
        messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    return [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
