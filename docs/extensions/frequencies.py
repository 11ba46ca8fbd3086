"""How often each page says a word, for the scores of the search; Sphinx's index knows only whether it does."""

import json
from collections import Counter

from sphinx.search.en import SearchEnglish


def count(app, doctree):
    language = SearchEnglish({})
    words = map(str.lower, language.split(doctree.astext()))
    app.env.metadata[app.env.docname]["words"] = Counter(
        language.stem(w) for w in words if language.word_filter(w)
    )


def add(app, pagename, templatename, context, doctree):
    """Puts ``{word: {page: count}}``, without words said once, and the pages' numbers of words into the search page."""
    if pagename != "search":
        return
    words, lengths = {}, {}
    for page in sorted(app.env.found_docs):
        counts = app.env.metadata[page].get("words", {})
        lengths[page] = sum(counts.values())
        for word, number in counts.items():
            if number > 1:
                words.setdefault(word, {})[page] = number
    data = json.dumps(
        {"words": words, "lengths": lengths}, separators=(",", ":"), sort_keys=True
    )
    app.add_js_file(None, body=f"var Frequencies = {data};")


def setup(app):
    app.connect("doctree-read", count)
    app.connect("html-page-context", add)
    return {"parallel_read_safe": True}
