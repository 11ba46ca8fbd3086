"""The pages as built: the reference by public address, links in prose, formulas without a network, and the search."""

import ast
import html
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("sphinx", reason="the pages need the docs extra")
pytest.importorskip("myst_parser", reason="the pages need the docs extra")

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.append(str(DOCS))

from extensions import addresses, mathml, names, reference  # noqa: E402

WIDTH = 84  # characters in a box of code


def test_every_public_name_has_one_entry():
    listed = reference.listed(DOCS)
    assert len(listed) == len(set(listed))
    public = [where for where in addresses.exported() if where.rpartition(".")[0] in addresses.NAMESPACES]
    assert len(public) > 100 and sorted(set(public) - set(listed)) == []


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("pyro_flows.distributions.made.model.MADE", "pyro_flows.MADE"),
        ("pyro_flows.flows.sphere", "pyro_flows.sphere"),  # also the name of the module
        ("pyro_flows.flows.sphere.sphere", "pyro_flows.sphere"),
        ("pyro_flows.infer.density.fit.DensityFit.sample", "pyro_flows.infer.DensityFit.sample"),
        ("pyro_flows.infer.diagnostics.walk.Walk.shift", "pyro_flows.infer.diagnostics.Walk.shift"),  # of instances
        ("pyro_flows.infer.models.latents.Latents", "pyro_flows.infer.models.latents.Latents"),  # exported nowhere
        ("pyro_flows.infer.objectives", "pyro_flows.infer.objectives"),
        ("pyro_flows.Nothing", None),
        ("torch.Tensor", None),
    ],
)
def test_shortest_address(path, where):
    assert addresses.address(path) == where


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("fit_density", "pyro_flows.fit_density"),
        ("pf.infer.fit_guide", "pyro_flows.fit_guide"),
        ("pf.Flow(pf.maf(2), base=pf.StudentT(2))", "pyro_flows.Flow"),
        ("plots.density", "pyro_flows.plots.density"),
        ("judge(found, probe)", "pyro_flows.infer.diagnostics.judge"),
        ("GuideFit.log_prob", "pyro_flows.infer.GuideFit.log_prob"),
        ("density", None),  # a plain word
        ("univariate", None),  # a parameter
        ("Kept", None),  # two classes have this name
        ("pf.nothing", None),
        ("flow.log_prob", None),
        ("maf = 3", None),
    ],
)
def test_literals_that_name_something(text, where):
    assert names.target(text, DOCS) == where


def test_the_result_of_a_fit_is_that_of_the_page():
    assert names.target("fit.nuts()", DOCS) == "pyro_flows.infer.GuideFit.nuts"
    assert names.target("fit.sample(3)", DOCS) is None
    assert names.target("fit.sample(3)", DOCS, ["fit_density"]) == "pyro_flows.infer.DensityFit.sample"


def test_entries_are_refused_without_an_object():
    with pytest.raises(ValueError, match=r"expected a name in pyro_flows.nets, got 'Nothing'"):
        reference.expand("```{entries} pyro_flows.nets\nNothing\n```\n")


def test_formulas():
    space = '<mspace width="0.1667em"/>'
    assert space in mathml.mathml(r"\log w", None, False)
    assert space not in mathml.mathml(r"\log\left(w\right)", None, False)
    assert "…" in mathml.mathml(r"1, \dots, n", None, True)


def blocks(text):
    """``(line, code)`` of the blocks of code on a page, without what they print."""
    for found in re.finditer(r"^( *)```([^\n`]*)\n(.*?)^\1```[ \t]*$", text, re.MULTILINE | re.DOTALL):
        if found[2].strip() in ("python", "pycon", "sh"):
            yield text.count("\n", 0, found.start()) + 2, [line[len(found[1]) :] for line in found[3].splitlines()]


def examples(path):
    """``(line, code)`` of the examples in docstrings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            yield node.body[0].lineno, re.findall(r"^(?:>>>|\.\.\.) .*", ast.get_docstring(node), re.MULTILINE)


@pytest.mark.full
def test_code_fits_its_box():
    pages = [ROOT / "README.md", *(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)]
    parts = [(page, *block) for page in pages for block in blocks(page.read_text())]
    parts += [(path, *block) for path in (ROOT / "pyro_flows").rglob("*.py") for block in examples(path)]
    wide = [f"{path}:{line}: {row}" for path, line, rows in parts for row in rows if len(row) > WIDTH]
    assert len(parts) > 100 and wide == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages: those of ``docs/_build/html`` if nothing is newer, else new ones."""
    built = DOCS / "_build" / "html"
    sources = [*(ROOT / "pyro_flows").rglob("*.py"), *(p for p in DOCS.rglob("*.*") if "_build" not in p.parts)]
    index = built / "searchindex.js"
    if not index.exists() or index.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        built = tmp_path_factory.mktemp("site")
        subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", DOCS, built], check=True)
    return built


@pytest.mark.full
def test_pages_stand_alone_and_are_small(site):
    """Nothing comes from a network, formulas are MathML, and each entry stands on one page with its source."""
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    remote = re.compile(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"(?:https?:)?//|<link\b[^>]*rel=\"stylesheet\"[^>]*//")
    assert [path for path, text in pages.items() if remote.search(text)] == []
    assert "<math" in pages[site / "flows" / "nsf.html"]
    entries = [path for path in pages if path.parent.name == "api"]
    assert max(path.stat().st_size for path in entries) < 600_000
    for where in reference.listed(DOCS):
        homes = [path for path in entries if f'id="{where}"' in pages[path] or f'id="module-{where}"' in pages[path]]
        assert len(homes) == 1, (where, homes)
    sources = {
        (path.parent / target).resolve()
        for path in entries
        for target in re.findall(r'href="([^"#]*_modules/[^"#]*)#', pages[path])
    }
    assert len(sources) > 50 and all(path.exists() for path in sources)


@pytest.mark.full
@pytest.mark.parametrize(
    ("page", "link"),
    [
        ("fitting.html", 'href="api/densities.html#pyro_flows.fit_density"'),
        ("pyro.html", 'href="api/guides.html#pyro_flows.AutoFlow"'),
        ("flows/maf.html", 'href="../api/densities.html#pyro_flows.infer.sparse_adjacency"'),
    ],
)
def test_names_in_prose_are_links(site, page, link):
    text = (site / page).read_text()
    assert re.search(rf"<a [^>]*{re.escape(link)}[^>]*><code", text)
    headings = re.findall(r"<h[1-6]>.*?</h[1-6]>", text, re.DOTALL)
    assert headings and not any("<code" in h and "reference internal" in h for h in headings)


@pytest.mark.full
@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("save", "howto/save.html"),
        ("GPU", "howto/gpu.html"),
        ("pandas", "howto/pandas.html"),
        ("interval", "howto/intervals.html"),
        ("fit_density", "api/densities.html#pyro_flows.fit_density"),
    ],
)
def test_search_finds_the_page_that_explains_it(site, query, page):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no headless Chromium")
    address = f"{(site / 'search.html').as_uri()}?q={quote(query)}"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=4000",
        "--dump-dom",
        address,
    ]
    document = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    first = re.search(r'<li class="kind-\w+"><a href="([^"]*)"', document)
    assert first and html.unescape(first[1]) == page
