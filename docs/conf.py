"""Settings of Sphinx for the site; `make docs` builds it from what docs/reference.py writes."""

import restrain

project, release, author = "restrain", restrain.__version__, "the restrain authors"
project_copyright = author
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
nitpicky = True  # a reference that leads nowhere is an error
myst_heading_anchors = 3  # links such as groups.md#units-across-tensors
smartquotes = False  # docstrings quote code: how="proximal"
toc_object_entries_show_parents = "hide"
templates_path = ["_templates"]
html_static_path, html_css_files = ["_static"], ["site.css"]
html_theme = "pydata_sphinx_theme"
html_title = f"restrain {release}"
html_sidebars = {"**": ["pages.html"]}
html_show_sourcelink = html_copy_source = False
html_show_search_summary = False  # excerpts would be fetched, which browsers refuse for local files
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {
    "navbar_center": [],  # the sidebar has all pages
    "navbar_align": "left",
    "show_prev_next": False,
    "secondary_sidebar_items": {"**": ["page-toc"]},
    "footer_start": ["copyright"],
    "footer_end": [],
}
