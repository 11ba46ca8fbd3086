"""Formulas as MathML, which browsers show themselves: no script, no font and no network is needed."""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

APPLIED = re.compile(
    r"(<mo>&ApplyFunction;</mo>)(?!\s*(?:<mrow>\s*)?<mo[^>]*>[(\[{|‖])"
)
logger = logging.getLogger(__name__)


def mathml(code, node, as_block):
    try:
        # Docutils has the two kinds of dots only, not TeX's choice between them.
        result = tex2mathml(code.replace(r"\dots", r"\ldots"), as_block=as_block)
    except MathError as error:
        logger.warning("formula not understood: %s: %s", code, error, location=node)
        return ""
    # TeX's thin space between a function's name and its argument, unless that stands in parentheses.
    return APPLIED.sub(r'\1<mspace width="0.1667em"/>', result)


def inline(self, node):
    self.body.append(mathml(node.astext(), node, False))
    raise nodes.SkipNode


def block(self, node):
    self.body.append(
        self.starttag(node, "div", CLASS="math notranslate nohighlight")
    )
    self.body.append(mathml(node.astext(), node, True))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True}
