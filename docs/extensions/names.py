"""Literals in prose that name something public become links: ``fit_density``, ``pf.Flow(chain)``, ``fit.verdict``."""

import functools
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

from extensions import addresses, reference

NAME = re.compile(r"(?P<name>[A-Za-z]\w*(?:\.\w+)*)(?P<call>\(.*\))?", re.DOTALL)
SPACES = {space.rpartition(".")[2]: space for space in addresses.NAMESPACES}
# What pages call ``fit`` is the result of these.
RESULTS = {
    "fit_density": "pyro_flows.infer.DensityFit",
    "fit_guide": "pyro_flows.infer.GuideFit",
}


@functools.cache
def objects(folder):
    """The entries that are no modules."""
    return [where for where in reference.listed(folder) if addresses.find(where)[2]]


def is_word(name, home):
    """Whether a name is also a plain word, such as one of a parameter; those of the package itself are known well."""
    return re.fullmatch("[a-z]+", name) and home.count(".") > 1


@functools.cache
def bare(folder):
    """Names that stand for themselves, since one object has them."""
    found = {}
    for where in objects(folder):
        found.setdefault(where.rpartition(".")[2], set()).add(where)
    return {name: homes.pop() for name, homes in found.items() if len(homes) == 1}


def target(text, folder, made_by=()):
    """The address of the entry that a literal in prose means, or None.

    ``made_by`` are the functions whose result the page calls ``fit``.
    """
    found = NAME.fullmatch(text)
    if not found:
        return None
    name, called = found["name"], found["call"]
    first, _, rest = name.partition(".")
    if first == "fit" and rest:
        classes = [RESULTS[function] for function in made_by or RESULTS]
        homes = [
            f"{home}.{rest}" for home in classes if addresses.find(f"{home}.{rest}")
        ]
        return homes[0] if len(homes) == 1 else None
    if first in bare(folder):
        if not rest and not called and is_word(first, bare(folder)[first]):
            return None
        home = addresses.address(
            ".".join(filter(None, (bare(folder)[first], rest)))
        )
    elif first == "pf" and rest:
        home = addresses.address(f"pyro_flows.{rest}")
    elif first in SPACES and rest:
        home = addresses.address(f"{SPACES[first]}.{rest}")
    else:
        return None
    if home in reference.listed(folder) or (
        home and any(home.startswith(f"{e}.") for e in objects(folder))
    ):
        return home
    return None


def is_prose(literal):
    """Whether a literal stands outside of headings, links and signatures."""
    place = literal.parent
    while place is not None and not isinstance(place, nodes.document):
        if isinstance(
            place,
            nodes.title
            | nodes.reference
            | addnodes.pending_xref
            | addnodes.desc_signature,
        ):
            return False
        place = place.parent
    return "xref" not in literal["classes"]


class LinkNames(SphinxTransform):
    """Wraps literals that name something public in references."""

    default_priority = 700

    def apply(self, **kwargs):
        code = "\n".join(
            block.astext() for block in self.document.findall(nodes.literal_block)
        )
        made_by = [function for function in RESULTS if f"{function}(" in code]
        for literal in list(self.document.findall(nodes.literal)):
            home = (
                target(literal.astext(), self.env.srcdir, made_by)
                if is_prose(literal)
                else None
            )
            if not home or self.within(literal, home):
                continue
            link = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=home,
                refdoc=self.env.docname,
                refexplicit=True,
            )
            # A member that has no entry stays as it is.
            link["optional"] = home not in reference.listed(self.env.srcdir)
            literal.replace_self(link)
            literal["classes"] += ["xref", "py", "py-obj"]
            link += literal

    def within(self, literal, home):
        """Whether the literal stands in the entry that it names."""
        place = literal.parent
        while place is not None:
            if isinstance(place, addnodes.desc) and home in place[0].get("ids", ()):
                return True
            place = place.parent
        return False


def setup(app):
    app.add_transform(LinkNames)
    return {"parallel_read_safe": True}
