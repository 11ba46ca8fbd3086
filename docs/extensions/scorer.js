// Ranks the results of the search: the page whose title, headings and text say the words most comes first, and the lists of
// the reference last, unless one searches for a name as it is spelled.
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
    const query = (new URLSearchParams(window.location.search).get("q") ?? "").trim();
    if (kind === "object") {
      // A plain word is a topic more often than a name.
      const name = title.split(".").pop();
      const plain = /^[a-z]+$/.test(name) && title.split(".").length > 2;
      return [name, title].includes(query) && !plain ? 60 : score < Scorer.objNameMatch ? 0 : 3;
    }
    const stems = (text) => {
      const asking = ["how", "do", "i", "what", "can"];
      const words = splitQuery(text.toLowerCase()).filter((word) => !stopwords.has(word) && !asking.includes(word));
      return words.map((word) => new Stemmer().stemWord(word));
    };
    const wanted = stems(query);
    // From 0, where none of the words is in the text, to 1, where the text is nothing else.
    const share = (text) => {
      const has = stems(text);
      const found = wanted.filter((word) => has.includes(word)).length;
      return found && (found / wanted.length) * (0.75 + (0.25 * found) / has.length);
    };
    const { titles, docnames, alltitles } = Search._index;
    const headings = Object.entries(alltitles).filter(([, places]) => places.some(([page]) => docnames[page] === docname));
    // Of the words in the text, by Okapi's formula: more say less and less, and a long page needs more.
    const lengths = Object.values(Frequencies.lengths);
    const long = (Frequencies.lengths[docname] * lengths.length) / lengths.reduce((sum, length) => sum + length, 0);
    const said = wanted.map((word) => {
      const number = Object.hasOwn(Frequencies.words, word) ? (Frequencies.words[word][docname] ?? 0) : 0;
      return number / (number + 0.6 + 1.8 * long);
    });
    return (
      5 +
      60 * share(titles[docnames.indexOf(docname)]) +
      20 * Math.max(0, ...headings.map(([heading]) => share(heading))) +
      20 * (said.reduce((sum, part) => sum + part, 0) / Math.max(said.length, 1)) +
      (docname.startsWith("howto/") ? 10 : 0) - // pages that answer a question
      (/^(api\/|changelog$)/.test(docname) ? 40 : 0)
    );
  },
};
