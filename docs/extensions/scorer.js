// Ranks the results of the search: pages before entries of the reference, titles before headings, headings before text.
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 0, 1: 0, 2: 0 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,

  score: ([docname, title, anchor, descr, score, filename, kind]) => {
    const listing = /^(api\/|changelog$)/.test(docname);
    if (kind === "object") {
      // One searches for a name by its spelling; a plain word is more often a topic.
      const name = title.split(".").pop();
      const plain = /^[a-z]+$/.test(name) && title.split(".").length > 2;
      return score < Scorer.objNameMatch ? 0 : plain ? 15 : 45;
    }
    const stems = (text) => {
      const words = splitQuery(text.toLowerCase()).filter((word) => !stopwords.has(word));
      return words.map((word) => new Stemmer().stemWord(word));
    };
    const wanted = stems(new URLSearchParams(window.location.search).get("q") ?? "");
    // From 0, where none of the words is in the text, to 1, where the text is nothing else.
    const share = (text) => {
      const has = stems(text);
      const found = wanted.filter((word) => has.includes(word)).length;
      return found && (found / wanted.length) * (0.75 + (0.25 * found) / has.length);
    };
    const ofPage = share(Search._index.titles[Search._index.docnames.indexOf(docname)]);
    const headings = Object.entries(Search._index.alltitles)
      .filter(([, places]) => places.some(([page]) => Search._index.docnames[page] === docname))
      .map(([heading]) => share(heading));
    const ofHeadings = Math.max(0, ...headings) + 0.05 * headings.filter((part) => part).length;
    return (listing ? -40 : 0) + 5 + (60 * ofPage || 25 * ofHeadings);
  },
};
