"""The part of the package's data that depends on its public address; pyproject.toml has the rest.

README links to files of the repository. On a page elsewhere these links need the repository's
address, which is `address` in `[tool.restrain]` of pyproject.toml, as in "https://host/owner/name".
While it is empty, links stay as they are and the package names no addresses.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!\w+:|#)([^)]+)\)")


def absolute(text, address):
    """Return Markdown whose relative links and pictures have the address before them."""
    if not address:
        return text

    def link(found):
        picture, words, path = found.groups()
        return f"{picture}{words}({address}/{'raw' if picture else 'blob'}/main/{path})"

    return LINK.sub(link, text)


def addresses(address):
    """Return the links beside the package's page: {title: address}."""
    names = {"Documentation": "docs/guide.md", "Changes": "CHANGELOG.md"}
    files = {title: f"{address}/blob/main/{path}" for title, path in names.items()}
    return {"Source": address, **files, "Issues": f"{address}/issues"} if address else {}


if __name__ == "__main__":
    settings = tomllib.loads((HERE / "pyproject.toml").read_text("utf-8"))["tool"]["restrain"]
    readme = (HERE / "README.md").read_text("utf-8")
    setup(
        long_description=absolute(readme, settings["address"]),
        long_description_content_type="text/markdown",
        project_urls=addresses(settings["address"]),
    )
