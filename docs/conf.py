"""Sphinx configuration: python -m sphinx -W -b html docs docs/_build/html."""

import sys
from pathlib import Path

here = Path(__file__).parent
sys.path[:0] = [str(here.parent), str(here)]

import pyro_flows  # noqa: E402

project = "pyro_flows"
author = "the pyro_flows developers"
copyright = author
version = release = pyro_flows.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "extensions.frequencies",
    "extensions.mathml",
    "extensions.names",
    "extensions.reference",
]
exclude_patterns = ["_build", "extensions"]
html_math_renderer = "mathml"
html_search_scorer = str(here / "extensions" / "scorer.js")
html_theme = "furo"
html_title = f"pyro_flows {version}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]

# A reference that leads nowhere is an error.
nitpicky = True
nitpick_ignore = [
    # A vector of draws, or draws by name.
    ("py:class", "pyro_flows.infer.diagnostics.weights._Draws"),
    # The inventory lists it under another name.
    ("py:class", "pyro.poutine.trace_struct.Trace"),
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

napoleon_numpy_docstring = False
# Attributes listed in a docstring and again as members would be described twice.
napoleon_use_ivar = True

autodoc_member_order = "bysource"
# Leaves implement methods that are described once, in the base.
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
maximum_signature_line_length = 88
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# Inventories are kept here, so that the build needs no network; inventories/make.py writes them.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "inventories/python.inv"),
    "torch": ("https://docs.pytorch.org/docs/stable", "inventories/torch.inv"),
    "pyro": ("https://docs.pyro.ai/en/stable", "inventories/pyro.inv"),
}
