"""Pages of the reference: lists of names become summary tables and entries.

A block such as

    ```{entries} pyro_flows.distributions
    Flow
    integers.Logistics(logits, loc, log_scale): log_mass, below, draw
    ```

documents each name with its members, or with those after the colon (``-`` for none), under the shortest address from
which it can be imported; arguments replace the signature that Python reports.  ``{summary}`` becomes a table for each
section that has entries, or with names of its own a table of these.
"""

import functools
import inspect
import itertools
import re
from pathlib import Path

from sphinx.ext.intersphinx import InventoryAdapter

from extensions import addresses

BLOCK = re.compile(
    r"^```\{(entries|summary)\} *(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
LINE = re.compile(r"(?P<name>[\w.]+)(?P<signature>\(.*\))?(?:: *(?P<members>.*))?")
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


def lines(namespace, text):
    """``(address, signature, members)`` for each line of a block."""
    for line in filter(None, map(str.strip, text.splitlines())):
        found = LINE.fullmatch(line)
        where = found and addresses.address(f"{namespace}.{found['name']}")
        if not where:
            raise ValueError(f"expected a name in {namespace}, got {line!r}")
        yield where, found["signature"] or "", found["members"]


def entry(where, signature, members):
    """One object in reStructuredText."""
    _, _, objects = addresses.find(where)
    if not objects:
        return [f".. automodule:: {where}", ""]
    if inspect.isclass(objects[-1]):
        options = [] if members == "-" else [f":members: {members or ''}".rstrip()]
        options.append(":show-inheritance:")
        return [
            f".. autoclass:: {where}{signature}",
            *(f"   {option}" for option in options),
            "",
        ]
    kind = "autofunction" if callable(objects[-1]) else "autodata"
    return [
        f".. {kind}:: {where}{signature}",
        *["   :no-value:"] * (kind == "autodata"),
        "",
    ]


def table(names):
    head = ["```{eval-rst}", ".. py:currentmodule:: None", ""]
    return [
        *head,
        ".. autosummary::",
        "   :nosignatures:",
        "",
        *(f"   ~{name}" for name in names),
        "```",
        "",
    ]


def summary(text):
    """The tables of a page's sections."""
    result = []
    starts = [found.start() for found in HEADING.finditer(text)] + [len(text)]
    for start, end in itertools.pairwise(starts):
        section = text[start:end]
        names = [
            where
            for kind, namespace, body in BLOCK.findall(section)
            if kind == "entries"
            for where, _, _ in lines(namespace, body)
            if addresses.find(where)[2]
        ]
        if names:
            result += [f"**{HEADING.match(section)[1]}**", "", *table(names)]
    return "\n".join(result)


def expand(text):
    """A page with its blocks written out."""

    def replace(found):
        kind, namespace, body = found.groups()
        if kind == "summary":
            names = (
                [where for where, _, _ in lines(namespace, body)] if body else []
            )
            return "\n".join(table(names)) if names else summary(text)
        written = [line for item in lines(namespace, body) for line in entry(*item)]
        return "\n".join(["```{eval-rst}", *written, "```"])

    return BLOCK.sub(replace, text)


@functools.cache
def listed(folder):
    """All addresses that have entries."""
    blocks = (
        block
        for page in sorted(Path(folder, "api").glob("*.md"))
        for block in BLOCK.findall(page.read_text())
    )
    return [
        item[0]
        for kind, namespace, body in blocks
        if kind == "entries"
        for item in lines(namespace, body)
    ]


def source_read(app, docname, content):
    if docname.startswith("api/"):
        content[0] = expand(content[0])


def candidates(node, objects):
    """Addresses that a reference may mean, from where it stands."""
    target = node["reftarget"]
    yield target
    module, within = node.get("py:module"), node.get("py:class")
    if module and within:
        # A name of the module that defines the class, or of the class itself.
        found = addresses.find(f"{module}.{within}")
        if found and found[2]:
            yield f"{found[2][0].__module__}.{target}"
            yield f"{module}.{within}.{target}"
    # A name that only one object has, members aside.
    same = {
        addresses.address(name) for name in objects if name.endswith(f".{target}")
    }
    same = {
        name
        for name in same
        if len(addresses.find(name)[1]) == target.count(".") + 1
    }
    if len(same) == 1:
        yield same.pop()


def documented_elsewhere(app, env, node, contnode):
    """Leads any name under which something can be imported to its entry, and an inherited member to its class."""
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    for target in candidates(node, domain.objects):
        home = addresses.address(target)
        if home is None:
            continue
        homes = [home]
        _, parts, objects = addresses.find(home)
        if len(objects) > 1 and inspect.isclass(objects[0]):
            bases = objects[0].__mro__[1:]
            homes += [
                f"{addresses.address(f'{b.__module__}.{b.__qualname__}')}.{'.'.join(parts[1:])}"
                for b in bases
            ]
        for name in homes:
            if name in domain.objects:
                kind = domain.objects[name].objtype
                role = "mod" if kind == "module" else "obj"
                return domain.resolve_xref(
                    env, node["refdoc"], app.builder, role, name, node, contnode
                )
    return contnode if node.get("optional") else None


def public_bases(app, name, obj, options, bases):
    """Leaves out the bases that neither these pages nor the inventories know."""
    inventory = InventoryAdapter(app.env).main_inventory["py:class"]

    def known(base):
        home = f"{base.__module__}.{base.__qualname__}"
        return addresses.address(home) in listed(app.srcdir) or (
            home in inventory and base is not object
        )

    bases[:] = [base for base in bases if known(base)]


def setup(app):
    app.connect("source-read", source_read)
    app.connect("missing-reference", documented_elsewhere)
    app.connect("autodoc-process-bases", public_bases)
    return {"parallel_read_safe": True}
