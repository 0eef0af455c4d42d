"""Runs the examples and writes docs/gallery.md: what each shows, and what it printed or drew.

    python docs/gallery.py [name ...]

With names, only these run, and the others keep what they printed before; with the name "none" only
the texts are written anew. All take some minutes.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/gallery.md"
HEAD = """# Gallery

The scripts of `examples/`, each with what it printed where this page was written (`python
docs/gallery.py`, CPU). They run as they are, need no download, and are run by the tests.
"""


@dataclass(frozen=True)
class Example:
    """An example: its title, the arguments it runs with, the picture that it draws."""

    title: str
    arguments: tuple[str, ...] = ()
    picture: str = ""
    alt: str = ""


EXAMPLES = {
    "lightning_digits": Example("Lightning"),
    "huggingface_trainer": Example("Hugging Face's Trainer"),
    "accelerate_loop": Example("Accelerate"),
    "skorch_digits": Example("skorch"),
    "keras_layer": Example("Keras 3"),
    "sae": Example(
        "Sparse autoencoders on a language model",
        ("--quick",),
        "sae.png",
        "Error of each kind of sparse autoencoder over the mean number of active features",
    ),
    "gan_two_optimizers": Example("Two networks, two optimizers"),
    "torchrun_ddp": Example("Several processes: DDP"),
    "gpt2_fsdp": Example("A language model under FSDP2"),
}


def told(name):
    """The docstring of an example without its commands, and its commands."""
    doc = ast.get_docstring(ast.parse((ROOT / f"examples/{name}.py").read_text("utf-8")))
    blocks = doc.split("\n\n")
    commands = [block for block in blocks if block.startswith("    ")]
    return "\n\n".join(block for block in blocks if block not in commands), "\n\n".join(commands)


def printed(name, folder):
    """What an example prints, without progress bars and other people's tables."""
    example, file = EXAMPLES[name], ROOT / f"examples/{name}.py"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    words = [sys.executable, str(file), *example.arguments]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{file.name}:\n{done.stderr}")
    return cleaned(done.stdout)


def cleaned(text):
    """Lines of text that stay: a line that was overwritten, or has a frame, isn't one."""
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in text.splitlines() if "\r" not in line]
    return "\n".join(line for line in lines if line and not re.search(r"[│┃━─█┏└┡]|it/s|^Epoch ", line))


def known(text):
    """{example: its output} of a page."""
    parts = re.findall(r"^<!-- (\w+) -->\n(.*?)(?=^<!-- |\Z)", text, re.MULTILINE | re.DOTALL)
    found = {name: re.search(r"^```text\n(.*?)\n```$", part, re.MULTILINE | re.DOTALL) for name, part in parts}
    return {name: output[1] for name, output in found.items() if output}


def section(name, output):
    """The part of the page on an example."""
    example, (words, commands) = EXAMPLES[name], told(name)
    command = " ".join(["python", f"examples/{name}.py", *example.arguments])
    drawn = bool(example.picture) and (ROOT / f"docs/images/example-{name}.png").exists()
    picture = f"\n![{example.alt}](images/example-{name}.png)\n" if drawn else ""
    shown = f"\n`{command}` prints\n\n```text\n{output}\n```\n" if output else ""
    return (
        f"## {example.title}\n\n<!-- {name} -->\n{words}\n\n```\n{outdented(commands)}\n```\n{picture}{shown}\n"
        f"Source: [examples/{name}.py](../examples/{name}.py)\n"
    )


def outdented(commands):
    return "\n".join(line.removeprefix("    ") for line in commands.splitlines())


def page(outputs):
    return "\n".join([HEAD, *[section(name, outputs.get(name, "")) for name in EXAMPLES]])


def main(names):
    outputs = known(PAGE.read_text("utf-8")) if PAGE.exists() else {}
    PAGE.write_text(page(outputs), "utf-8")
    for name in () if names == ["none"] else names or EXAMPLES:
        with TemporaryDirectory() as folder:
            outputs[name] = printed(name, folder)
            picture = EXAMPLES[name].picture
            if picture:
                shutil.copy(Path(folder) / picture, ROOT / f"docs/images/example-{name}.png")
        PAGE.write_text(page(outputs), "utf-8")
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
