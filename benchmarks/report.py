"""Composes docs/benchmarks.md of what the other scripts wrote: python benchmarks/report.py folder docs.

`make bench` runs it last. The page and its pictures (in docs/images) are written by it only.
"""

import json
import shutil
import sys
from pathlib import Path

from measure import markdown_table

ORDER = ("rules", "steps", "attach", "scaling", "fit", "structured", "ablations")
HEAD = """# Benchmarks

Written by `make bench`, which runs the scripts named below and replaces this page. Figures are medians, with quartiles
in brackets, of runs that take turns in one process; ratios are those of runs in the same round. Goals are the
project's own, set before the work; a goal that isn't met is marked so.
"""


def read(folder):
    """The sections of a folder, in the page's order."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    if not found:
        raise SystemExit(f"{folder} holds no results: run the scripts with --out {folder} first, or `make bench`")
    names = [*ORDER, *sorted(section["script"].removesuffix(".py") for section in found)]
    return sorted(found, key=lambda section: names.index(section["script"].removesuffix(".py")))


def about(sections):
    """The machine, the versions, the date, how long it took."""
    last = sections[-1]["machine"]
    if len({json.dumps({**s["machine"], "date": ""}, sort_keys=True) for s in sections}) > 1:
        raise SystemExit("the results are of different machines or versions: run all scripts again, by `make bench`")
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    minutes = sum(section["seconds"] for section in sections) / 60
    memory = f", {last['memory']}" if "memory" in last else ""
    card = f", {last['card']}" if "card" in last else ""
    where = f"{last['processor']}, {last['cores']} cores{memory}{card}, {last['system']}"
    return f"\n* machine: {where}\n* versions: {versions}\n* date: {last['date']}; {minutes:.0f} minutes in all\n"


def compose(sections):
    """The page."""
    parts = [HEAD, about(sections)]
    for section in sections:
        seconds = f"`benchmarks/{section['script']}`, {section['seconds']:.0f} s."
        parts += [f"\n## {section['title']}\n\n{seconds} {section['text']}\n"]
        parts += [f"\n![{text}](images/{name})\n" for name, text in section["pictures"]]
        parts += [markdown_table(table) + "\n" for table in section["tables"]]
    return "".join(parts)


def main(folder, docs):
    sections = read(folder)
    text = compose(sections)
    if any(section["quick"] for section in sections):
        print(f"tiny sizes (--quick) measure nothing: the page is in {folder}, not in {docs}")
        docs = folder
    page, images = Path(docs, "benchmarks.md"), Path(docs, "images")
    images.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for name, _ in section["pictures"]:
            shutil.copyfile(Path(folder, name), images / name)
    page.write_text(text, "utf-8")
    print(page)


if __name__ == "__main__":
    main(*sys.argv[1:])
