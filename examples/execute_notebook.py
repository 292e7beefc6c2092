"""Makes from_run_to_choice.ipynb, outputs and all, from from_run_to_choice.py: `make notebook`.

The source is a script in cells, "# %%" before code and "# %% [markdown]" before text. It runs in an empty folder of
its own; paths in that folder and in the repository are shown relative to it, and a notebook with another path or a
host name of this machine in it is not written.
"""

import os
import re
import socket
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

SOURCE = Path(__file__).parent / "from_run_to_choice.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")
MARK = re.compile(r"^# %%(?P<text> \[markdown\])?\n", re.MULTILINE)


def to_notebook(source: str) -> NotebookNode:
    """The cells of a script as a notebook without outputs."""
    _, *pieces = MARK.split(source)  # what stands before a cell, then its kind and its lines, in turn
    cells = []
    for number, (is_text, lines) in enumerate(zip(pieces[::2], pieces[1::2], strict=True)):
        text = re.sub(r"^# ?", "", lines, flags=re.MULTILINE) if is_text else lines
        make = nbformat.v4.new_markdown_cell if is_text else nbformat.v4.new_code_cell
        cells.append(make(text.strip(), id=f"cell-{number}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run its cells in a folder; the outputs are in it then.

    Raises:
        CellExecutionError: a cell that raises, with its traceback.
    """
    client = NotebookClient(notebook, timeout=1200, record_timing=False, resources={"metadata": {"path": str(folder)}})
    client.execute()
    here = re.compile("|".join(re.escape(f"{place}/") for place in (folder.resolve(), folder, SOURCE.parents[1])))
    notebook.metadata.language_info = {"name": "python"}  # without the version, which says nothing about the text
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = merged(cell.outputs, here)
    return notebook


def merged(outputs: list[NotebookNode], here: re.Pattern[str]) -> list[NotebookNode]:
    """Outputs as a reader saw them: what a stream wrote in pieces is one, progress bars and the place are gone."""
    found: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and found and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    for output in found:
        if output.output_type == "stream":
            output.text = here.sub("", re.sub(r"^.*\r.*\n?", "", output.text, flags=re.MULTILINE))
    return [output for output in found if output.get("text", "more") != ""]


def private_names(notebook: NotebookNode, folder: Path) -> list[str]:
    """Names of this machine in printed outputs: its host, absolute paths, the folder of the run, the repository."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "\n".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    known = {str(Path.home()), str(folder), str(folder.resolve()), str(SOURCE.parents[1])}
    found = {name for name in known if len(name) > 1 and name in text}
    found |= set(re.findall(rf"(?<![\w.-]){re.escape(socket.gethostname())}(?![\w-])", text))
    return sorted(found | set(re.findall(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|opt|usr)/[^\s\"'\\]*", text)))


def main() -> int:
    # a progress bar is for people who wait, and what libraries deprecate is no part of the walk
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # a tiny model is no faster with more threads
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(to_notebook(SOURCE.read_text(encoding="utf-8")), Path(folder))
        private = private_names(notebook, Path(folder))
    if private:
        print(f"{NOTEBOOK.name} is not written: its outputs name {', '.join(private)}.", file=sys.stderr)
        return 1
    NOTEBOOK.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
