"""Cleaning: a list of small filters, each of which can be read, tested, switched off and counted.

    python -m data.clean FILE                                   what the filters would do to a file of yours
    python -m data.clean FILE --out clean.jsonl                 and do it
    python -m data.clean FILE --skip "hard to read" quotes      all but these two

FILE is anything that files.py reads and that holds answers or texts: of a conversation the last answer is cleaned and
judged, of ranked answers each one, and a question needs two that are left.

First come functions text -> text, which clean; then tests -> bool, which say whether a row may stay. All are pure,
their thresholds are arguments, and the defaults are those of the ELI5 and Simple Wikipedia sets that this project
rebuilds (eli5.py, simple_wikipedia.py). A word is whatever stands between blanks. Counting is in report.py.

100,000 answers of 160 words take 72 seconds on one core, and 19 MB, however many there are.
"""
import html
import itertools
import re
from pathlib import Path

from common.errors import UserError, end_politely
from data.files import stream
from data.readability import is_simple
from common.disk import writing
from data.report import PipelineReport
from data.shapes import BadRow, WrongForm, finished, parts, recognise
from data.toxicity import is_clean, load_toxicity, toxicity_of
from common.flags import Count, Number, Parser, Positive, Share, bounded


# ---- text -> text ----------------------------------------------------------------------------------------------------

# Characters that mean themselves (after a backslash, in code, in a placeholder) are moved to Unicode's private area
# while the mark-up is taken away, and back at the end.
MARKS = "\\`*_{}[]()#+-.!^~<>|"
HIDE_MARKS = {ord(mark): chr(0xE000 + ord(mark)) for mark in MARKS}
SHOW_MARKS = {0xE000 + ord(mark): mark for mark in MARKS}
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")  # soft hyphens, zero-width blanks, marks of direction
PLACEHOLDER = re.compile(r"_url_\d+_", re.IGNORECASE)
BLOCK = re.compile(r"^[ \t]*```[\w+-]*[ \t]*\n(.*?)\n?^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)(`{1,3})(?!`)([^`\n]{1,1000})\1")
TABLE = re.compile(r"^([^|\n]*\|[^\n]*)\n[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-*:?[ \t]*)+$((?:\n[^|\n]*\|[^\n]*)*)",
                   re.MULTILINE)
LINK = re.compile(r"!?\[((?:[^\[\]\n]|\[[^\[\]\n]{0,99}\]){0,500})\]"           # [words], which may hold [1]
                  r"\([^()\s]{0,2000}(?:\([^()\s]{0,200}\)[^()\s]{0,200})?"      # (address_(with_brackets)
                  r"(?:[ \t]+[\"'][^\"\n]{0,500}[\"'])?\)")                      # "title")
LINES = [  # what makes a line special, and what stays of it
    (re.compile(r"^[ \t]*([-*_])(?:[ \t]*\1){2,}[ \t]*$", re.MULTILINE), ""),                # a rule
    (re.compile(r"^[ \t]*(?:=+|-{2,})[ \t]*$", re.MULTILINE), ""),                            # a heading's underline
    (re.compile(r"^[ \t]*#{1,6}[ \t]*([^\n]*?)(?:[ \t]+#+)?[ \t]*$", re.MULTILINE), r"\1"),  # # heading #
    (re.compile(r"^[ \t]*[-*+\u2022][ \t]+", re.MULTILINE), ""),                               # - list
]
SPANS = [  # the mark, which most texts lack, so that they cost nothing; what it encloses; what stays
    ("!<", re.compile(r">!(.{1,2000}?)!<", re.DOTALL), r"\1"),                           # a spoiler
    ("^(", re.compile(r"(?<![\w)])\^+\(([^()\n]{1,500})\)"), r"\1"),                    # ^(small words)
    ("^", re.compile(r"(?<![\w)])\^+(?=\w)"), ""),                                      # ^small, but 10^6 is a number
    ("~~", re.compile(r"~~(?=\S)([^\n]{1,1000}?)(?<=\S)~~"), r"\1"),
    ("**", re.compile(r"\*\*(?=\S)([^\n]{1,1000}?)(?<=\S)\*\*(?!\*)"), r"\1"),
    ("*", re.compile(r"(?<![\d*])\*(?=[^\s*])([^*\n]{0,1000}?)(?<=\S)\*"), r"\1"),     # but 2*3*4 is a product
    ("__", re.compile(r"(?<!\w)__(?=\S)([^\n]{1,1000}?)(?<=\S)__(?!\w)"), r"\1"),
    ("_", re.compile(r"(?<!\w)_(?=[^\s_])([^\n]{0,1000}?)(?<=\S)_(?!\w)"), r"\1"),     # but snake_case is a word
]


def strip_markup(text):
    """Reddit's Markdown and HTML entities -> the words that a reader sees; invisible characters go too.

    Links, emphasis, headings, bullets, spoilers, code and tables lose their marks and keep their words; numbers of
    lists stay. Quotes ("> ...") and _url_0_ stay for the functions below.
    """
    if "&" in text:
        text = html.unescape(html.unescape(text))  # some dumps have escaped twice: &amp;#x200B;
    text = INVISIBLE.sub("", text.replace("\u00a0", " ").replace("\r\n", "\n"))
    if "`" in text:
        text = BLOCK.sub(lambda code: code[1].translate(HIDE_MARKS), text)
        text = CODE.sub(lambda code: code[2].translate(HIDE_MARKS), text)
    text = re.sub(r"\\([\\`*_{}\[\]()#+\-.!^~<>|])", lambda escape: escape[1].translate(HIDE_MARKS), text)
    text = PLACEHOLDER.sub(lambda name: name[0].translate(HIDE_MARKS), text)
    text = TABLE.sub(lambda table: table[1].replace("|", " ") + table[2].replace("|", " "), text)
    text = LINK.sub(r"\1", text)
    for pattern, words in LINES:
        text = pattern.sub(words, text)
    for mark, pattern, words in SPANS:
        text = pattern.sub(words, text) if mark in text else text
    return text.translate(SHOW_MARKS)


def strip_quotes(text):
    """Without the lines that quote somebody: those that begin with > or &gt;. A spoiler (>!...!<) is no quote."""
    return re.sub(r"^[ \t]*(?:>|&gt;)(?!!)[^\n]*(?:\n|\Z)", "", text, flags=re.MULTILINE)


ADDRESS = re.compile(r"_url_\d+_|(?:https?://|www\.)(?:\([^\s()]*\)|[^\s()<>\[\]])*"  # its (brackets) belong to it,
                     r"(?:\([^\s()]*\)|[^\s()<>\[\].,;:!?'\"])", re.IGNORECASE)      # a full stop at its end does not
GONE = "\ue000"
HOLE = re.compile(rf"[ \t]*(?:[(\[<]\s*{GONE}\s*[)\]>]|{GONE})(\w?)")


def strip_placeholders(text):
    """Without addresses, _url_0_, _url_1_, ... (what ELI5 has in place of them), and the brackets around them."""
    if not any(sign in text.lower() for sign in ("_url_", "://", "www.")):
        return text
    return HOLE.sub(lambda hole: hole[1] and " " + hole[1], ADDRESS.sub(GONE, text))


def strip_space(text):
    """One blank between words, one empty line between paragraphs, nothing around lines or text."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def first_paragraphs(text, words=300):
    """Paragraphs (what empty lines separate) until they have `words` words: the one that reaches them is the last."""
    paragraphs = re.split(r"\n[ \t]*\n\s*", text.strip())
    so_far = itertools.accumulate((len(paragraph.split()) for paragraph in paragraphs), initial=0)
    return "\n\n".join(paragraph for paragraph, count in zip(paragraphs, so_far) if count < max(1, words))


# ---- tests -----------------------------------------------------------------------------------------------------------

QUESTION_WORDS = ("what", "why", "how", "when", "where", "who", "whom", "whose", "which", "is", "are", "am", "was",
                  "were", "do", "does", "did", "can", "could", "will", "would", "should", "has", "have", "had", "may",
                  "might")
ASKS = re.compile(rf"\W*(?:eli5\W+)?(?:{'|'.join(QUESTION_WORDS)})(?:['\u2019](?:s|re)|n['\u2019]t)?\b", re.IGNORECASE)
STOP_PHRASES = ("ask anything wednesday", "ask me anything", "ask us anything", "megathread", "mega thread", "mod post",
                "weekly discussion", "weekly thread", "monthly discussion", "friday free-for-all", "tuesday trivia",
                "theory thursday", "monday methods", "saturday spotlight", "sunday digest")
STOPS = re.compile(rf"\b(?:{'|'.join(STOP_PHRASES)})\b|\[meta\]|^meta\s*:", re.IGNORECASE)
EDIT = re.compile(r"(?:^|[.!?)\]\"'\u2026][ \t]+)[^\w\n]{0,3}(?:edit(?:ed|s)?|eta)\s*\d*"
                  r"(?:\s*[:;]|\s*[-\u2013\u2014]+(?=\s)|\s+(?:for|to (?:add|include|clarify|fix|correct))\b)"
                  r"|^[^\w\n]{0,3}edit(?:ed)?[ \t]*\d*[^\w\n]{0,3}$", re.IGNORECASE | re.MULTILINE)
WIKI_SIGNS = re.compile(r"[\[\]{}|=<_]")  # without one of them there is no mark-up, and most texts have none
WIKI = re.compile(r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|^\|-|^=+[^=\n]+=+\s*$|\bthumb\||\|\s*(?:thumb|\d+px)\b"
                  r"|__(?:NO)?TOC__"
                  r"|</?(?:ref|gallery|table|tr|td|th|div|span|nowiki|br|small|sub|sup|math)\b"
                  r"|\b(?:rowspan|colspan|style|class|align)=", re.IGNORECASE | re.MULTILINE)


def enough_words(text, least=20):
    """Has the text at least `least` words?"""
    return len(text.split()) >= least


def at_most_words(text, most=500):
    """Has the text at most `most` words?"""
    return len(text.split()) <= most


def is_question(title, body=""):
    """Does a post ask something: is there a "?" outside of addresses, or does the title begin with a question word?
    Posts of the forum about itself (Ask Anything Wednesday, megathreads, [META]) do not count."""
    if STOPS.search(title):
        return False
    return bool(ASKS.match(title)) or "?" in strip_placeholders(title) or "?" in strip_placeholders(body)


def ends_in_edit(text):
    """Is the end a remark on the text itself: "Edit: typos", "EDIT 2: thanks!", "Edit - source", "Edited for spelling"?
    Only the last paragraph is looked at, and there the beginning of a line or sentence."""
    return bool(EDIT.search(re.split(r"\n\s*\n", text.strip())[-1]))


def has_wiki_markup(text):
    """Are pieces of wiki mark-up left over: [[File:...]], {| tables |}, {{templates}}, |thumb, <ref>, == titles ==?"""
    return bool(WIKI_SIGNS.search(text) and WIKI.search(text))


def fits(messages, tok, most=512):
    """Has the conversation, rendered with its special tokens, at most `most` tokens? (`most` itself still fits.)"""
    return len(tok.render(messages)[0]) <= most


def at_most_turns(messages, most=2):
    """Does the user speak at most `most` times? A question and its answer are one turn."""
    return sum(message["role"] == "user" for message in messages) <= most


def in_category(row, names):
    """Is the row's `category` (or `primary_tag`, as Magpie calls it) one of `names`, in any case?"""
    category = str(row.get("category") or row.get("primary_tag") or "").strip().casefold()
    return category in {name.casefold() for name in names}


# ---- a file of one's own ---------------------------------------------------------------------------------------------

CHANGES = {"quotes": strip_quotes, "Reddit mark-up": strip_markup, "URL placeholders": strip_placeholders,
           "white space": strip_space}  # quotes first: \> is mark-up for a > that quotes nobody
FORMS = ("ranked", "sft", "text")  # in this order: ranked answers could become a conversation too
NEEDS = "the filters need conversations, ranked answers or texts"
TESTS = {"too short": lambda text, args, scores: enough_words(text, args.least_words),
         "too long": lambda text, args, scores: at_most_words(text, args.most_words),
         "wiki mark-up": lambda text, args, scores: not has_wiki_markup(text),
         "ends in an edit": lambda text, args, scores: not ends_in_edit(text),
         "hard to read": lambda text, args, scores: is_simple(text, args.fre, args.fkg),
         "toxic": lambda text, args, scores: is_clean(scores(text), args.most_toxicity)}  # last, for it may be a model


def changed(text, report, skip=()):
    """A text through all CHANGES but those in `skip`, counted."""
    for step, change in CHANGES.items():
        text = text if step in skip else report.change(step, change, text)
    return text


def cleaned_text(text, report, args, scores):
    """One answer through all steps -> the clean text, or None where a test removes it. scores: text -> its scores."""
    text = changed(text, report, args.skip)
    for step, test in TESTS.items():
        if step not in args.skip and not report.keep(step, test(text, args, scores), text):
            return None
    return text


def cleaned_row(row, report, args, scores):
    """A row in one of the forms of shapes.py -> the row with clean answers, or None."""
    if "answers" in row:
        texts = [cleaned_text(answer["text"], report, args, scores) for answer in row["answers"]]
        answers = [{**answer, "text": text} for answer, text in zip(row["answers"], texts) if text is not None]
        enough = report.keep("fewer than two answers left", len(answers) >= 2, row["prompt"][-1]["content"])
        return {**row, "answers": answers} if enough else None
    if "text" in row:
        text = cleaned_text(row["text"], report, args, scores)
        return None if text is None else {**row, "text": text}
    *before, last = row["messages"]
    text = cleaned_text(last["content"], report, args, scores)
    return None if text is None else {**row, "messages": [*before, {**last, "content": text}]}


def rows_of(raw, wants):
    """A raw row -> rows in the first form of `wants` (shapes.py) that it has; a tree gives several. Raises BadRow."""
    for want in wants:
        try:
            shape, internal = recognise(raw, want)
        except WrongForm as error:
            wrong = error
            continue
        if "flat" in internal:
            raise BadRow("one message of a tree: give the file to data/oasst.py first")
        return [finished(part, raw, want, merge_system=False, score="score") for part in parts(internal, want)]
    raise wrong


def clean_file(path, args, report, write):
    """Streams a file through the steps; write(row) is called with every row that is left."""
    scorer = None
    if "toxic" not in args.skip:
        scorer, name = load_toxicity(args.toxicity)
        report.note(f"toxicity: the scores that a row brings along, else {name}")
    for number, made in stream(path, lambda raw: (rows_of(raw, FORMS), toxicity_of(raw)), NEEDS):
        usable = not isinstance(made, BadRow)
        if not report.keep("not usable", usable, "" if usable else f"row {number:,}: {made.reason}"):
            continue
        rows, own = made
        for row in rows:
            row = cleaned_row(row, report, args, lambda text: own or scorer([text])[0])
            if row is not None:
                write(row)


def main():
    parser = Parser("python -m data.clean",
                                     description="What the filters do to a file, counted; with --out, done.")
    parser.add_argument("file")
    parser.add_argument("--out", help="where the clean rows go (.jsonl; the report beside it); none: only the report")
    parser.add_argument("--skip", nargs="+", default=[], choices=[*CHANGES, *TESTS], metavar="STEP",
                        help="leave out: " + ", ".join([*CHANGES, *TESTS]))
    parser.add_argument("--least-words", type=bounded(Count), default=20, help="fewer are too short (default 20)")
    parser.add_argument("--most-words", type=bounded(Positive), default=500, help="more are too long (default 500)")
    parser.add_argument("--fre", type=bounded(Number), default=60, help="least reading ease (default 60)")
    parser.add_argument("--fkg", type=bounded(Number), default=9, help="the school grade has to be below this (default 9)")
    parser.add_argument("--toxicity", choices=("auto", "detoxify", "words"), default="auto", help="who judges that")
    parser.add_argument("--most-toxicity", type=bounded(Share), default=0.1, help="of six scores from 0 to 1 (default 0.1)")
    args = parser.parse_args()
    report = PipelineReport()
    if not args.out:
        clean_file(args.file, args, report, write=lambda row: None)
        print(report)
        return
    out = Path(args.out)
    if out.suffix != ".jsonl" or out.resolve() == Path(args.file).resolve():
        raise UserError(f"--out {out}: give the name of another .jsonl file")
    with writing(out.parent, [out.stem]) as writers:
        clean_file(args.file, args, report, writers[out.stem].write)
    report.save(out.with_suffix(".report.json"))
    print(report)
    print(f"{writers[out.stem].rows:7,} rows  {out}")


if __name__ == "__main__":
    end_politely()
    main()
