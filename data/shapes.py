"""What a row of a user's file means: the accepted shapes, and how each becomes one of four forms.

    sft      {"messages": [{"role", "content"}, ...]}                      ends with the assistant
    ranked   {"prompt": [messages], "answers": [{"text", "score"}, ...]}   two or more; larger scores are better
    prompts  {"prompt": [messages]}                                        ends with the user
    text     {"text": str}

Every row is recognised by its keys, never by the file's name. The table SHAPES below holds the accepted shapes in the
order in which they are tried; the first one that can give the wanted form wins.

Conversions: ranked -> sft takes the best answer (the first of equals), sft -> prompts drops the last answer, a
chosen/rejected pair is ranked with scores 1 and 0.

What is changed in a user's text, and nothing else: consecutive turns of one role are joined with a blank line, an
empty system prompt is left out, a question and its input are joined with a blank line, end marks behind an answer
("</s>") go, and in transcripts ("Human: ... Assistant: ...", or Alpaca's template) the markers go, with the white space
that set them off. null is the same as absent. What a user should look at is noted on the internal row.
"""
import difflib
import itertools
import math
import re
from dataclasses import dataclass


ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant"}
TOOLS = ("tool", "function", "function_call", "observation")
REPLY_KEYS = ("completion", "response", "answer", "output", "best_answer")   # beside a prompt: one answer
LIST_KEYS = ("answers", "completions", "responses")               # beside a prompt: several, scored
QUESTION_KEYS = ("prompt", "question", "instruction", "query", "input")
VERDICT_KEYS = {"label", "kto_tag", "is_correct", "correct"}      # beside one answer: whether it is a good one
CHOICE_KEYS = {"choices", "options", "endings"}                   # beside them a label says which one is right
WEIGHT_KEYS = ("loss_weight", "weight", "train")                  # in an assistant's turn: 0 or false is context only
KEPT_KEYS = ("kind", "category", "source")                        # strings that tables are grouped by
INPUT_KEYS = ("input", "context", "question_ctx", "selftext")     # beside a question: what it is about
NOTHING = ("", "[removed]", "[deleted]", "<noinput>")             # what stands there where it is about nothing
ALIASES = {  # keys that people use, by what they have to be renamed to
    "question": "q ques user human ask asked request problem inputs user_message user_input source src",
    "answer": "a ans reply bot assistant gpt target label_text outputs solution assistant_message model_output",
    "messages": "dialog dialogue chat msgs history turns_list", "text": "content body document doc article passage",
    "chosen": "accepted preferred winner better good", "rejected": "loser worse bad refused"}
MARKERS = [re.compile(mark) for mark in (                         # families: a transcript keeps to one
    r"(?:\A|\r?\n\r?\n)(?:(?P<user>Human)|(?P<assistant>Assistant)): ?",
    r"### ?(?:(?P<user>Human|User)|(?P<assistant>Assistant)): ?(?:\r?\n)?",
    r"### ?(?:(?P<user>Instruction|Input)|(?P<assistant>Response)): ?(?:\r?\n)?")]
ALPACA = "Below is an instruction that describes a task"          # its template begins so
END_MARK = re.compile(r"</s>|<eos>|<end_of_turn>|<\|\w{0,20}(?:end|eot|eos)\w{0,20}\|>|###(?:eos|EOS)\w{0,20}###")
WORDS = re.compile(r"[^\W\d_][^\w\s]?\s+[^\w\s]?[^\W\d_]")        # two of them
BAD_ANSWER = "labelled as a bad answer"
PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")


class BadRow(Exception):
    """Why one row cannot be used: `reason` is counted, `detail` is told for the first such row only."""

    def __init__(self, reason, detail=""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


# ---- turns: every spelling of a message becomes {"role", "content"} ----

def says(role, text):
    return {"role": role, "content": text}


class Reading(dict):
    """A row that remembers which of its keys were read."""

    def __init__(self, row):
        super().__init__(row)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default


def first(raw, *keys):
    """The first of these keys' values that is there, or None."""
    return next((raw[key] for key in keys if raw.get(key) is not None), None)


def as_text(value, name):
    if isinstance(value, list):  # OpenAI's and LLaMA-Factory's content parts
        parts = [first(part, "text", "value") if isinstance(part, dict) else None for part in value]
        if parts and all(isinstance(part, str) for part in parts):
            return "".join(parts)
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text", f"it is {shown(value)}")
    return value


def as_number(value):
    """A finite float, or None: files hold 5, 5.0, "5", "N/A", NaN and true."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_turn(raw):
    """{role, content} (OpenAI) or {from, value} (ShareGPT) -> {role, content[, loss_weight]}."""
    if not isinstance(raw, dict):
        raise BadRow("a message is not an object", f"it is {shown(raw)}")
    role = first(raw, "role", "from")
    if role in TOOLS:
        raise BadRow("a tool's turn", f"its role is {shown(role)}")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow("unknown role", f"it is {shown(role)}")
    message = {"role": ROLES[role.lower()], "content": as_text(first(raw, "content", "value"), "a message")}
    key = next((key for key in WEIGHT_KEYS if raw.get(key) is not None), None)
    if key and message["role"] == "assistant":
        weight = float(raw[key]) if isinstance(raw[key], bool) else as_number(raw[key])
        if weight is None or weight < 0:
            raise BadRow(f"{key} is no number from 0", f"it is {shown(raw[key])}")
        message["loss_weight"] = weight
    return message


def as_turns(value, role):
    """A string is one turn of `role`; a message or a list of messages speaks for itself."""
    if isinstance(value, str):
        return [says(role, value)]
    return [as_turn(raw) for raw in (value if isinstance(value, list) else [value])]


def alternating(strings, name):
    if not isinstance(strings, list):
        raise BadRow(f"{name} is not a list", f"it is {shown(strings)}")
    return [says(role, as_text(text, name)) for role, text in zip(itertools.cycle(("user", "assistant")), strings)]


def marks(text):
    """The speakers' marks in a transcript: those of the family that begins first, as others are somebody's words."""
    if not isinstance(text, str) or not ("###" in text or "Human:" in text):
        return []
    families = [list(family.finditer(text)) for family in MARKERS]
    return min((found for found in families if found), key=lambda found: found[0].start(), default=[])


def split_transcript(text):
    """Human: ... Assistant: ..., ### Human: ... ### Assistant: ..., or Alpaca's template -> messages. Words before are
    the system's, but for the template's own."""
    found = marks(text)
    ends = [mark.start() for mark in found[1:]] + [len(text)]
    before = text[:found[0].start()].strip() if found else ""
    messages = [says("system", before)] if before and not before.startswith(ALPACA) else []
    for mark, end in zip(found, ends):
        said = text[mark.end():end]
        said = said if mark is found[-1] else said.rstrip()
        if mark["user"] != "Input" or said.strip() not in NOTHING:
            messages.append(says(mark.lastgroup, said))
    return messages


def is_transcript(text):
    """True where the first marker is the human's and the assistant has one too."""
    speakers = [mark.lastgroup for mark in marks(text)]
    return speakers[:1] == ["user"] and "assistant" in speakers


def as_prompt(value):
    """The conversation up to the answer. A transcript stands alone or behind Alpaca's words; behind other words it ends
    with the bare "Assistant:" that asks for an answer, or else they are about it."""
    if is_transcript(value):
        before, turns = value[:marks(value)[0].start()].strip(), split_transcript(value)
        asks = turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip()
        if asks or not before or before.startswith(ALPACA):
            return turns[:-1] if asks else turns
    return as_turns(value, "user")


def with_system(row, messages):
    """A row's own system prompt stands first, where the messages bring none."""
    system = first(row, "system", "system_prompt")
    if system and messages[:1] and messages[0]["role"] != "system":
        return [says("system", as_text(system, "system"))] + messages
    return messages


def with_input(row, key):
    """The text under `key`, a blank line, and what it is about, where that is said and does not stand in it already."""
    asked = as_text(row[key], key)
    inputs = (as_text(row[other], other) for other in INPUT_KEYS if other in row and other != key)
    more = next((text for text in inputs if text.strip() not in NOTHING), "")
    return asked if more.strip() in asked else f"{asked}\n\n{more}"


def question(row, *keys):
    """The prompt of a row under the first of `keys`, after the turns of its `history`; no keys: what rows name it."""
    key = next((key for key in keys or (*QUESTION_KEYS, "conversations", "messages") if key in row), None)
    if key is None:
        raise BadRow("chosen and rejected without a prompt")
    history = first(row, "history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("history is not a list of pairs")
    before = alternating([text for pair in history for text in pair], "history")
    return with_system(row, before + as_prompt(with_input(row, key) if isinstance(row[key], str) else row[key]))


# ---- one function a family of shapes: a raw row -> an internal row ----

def from_conversation(row):
    """ShareGPT: dicts. LIMA: strings, the user first."""
    turns = as_list(row, "conversations" if "conversations" in row else "conversation")
    lima = all(isinstance(turn, str) for turn in turns)
    return {"messages": with_system(row, alternating(turns, "conversations") if lima else as_turns(turns, "user"))}


def from_pair(row):
    """chosen and rejected: the answers beside a prompt, or whole conversations that share all but their last turn."""
    explicit = has_any(row, (*QUESTION_KEYS, "conversations", "messages"))
    sides = [split_transcript(side) if not explicit and is_transcript(side) else as_turns(side, "assistant")
             for side in (row["chosen"], row["rejected"])]
    if not all(sides):
        raise BadRow("empty answer")
    if sides[0][0]["role"] == "assistant":
        prompt = question(row)
    else:
        both = itertools.takewhile(lambda turns: turns[0] == turns[1], zip(*(side[:-1] for side in sides)))
        shared = [turn for turn, _ in both]
        prompt, sides = with_system(row, shared), [side[len(shared):] for side in sides]
    if any(len(side) != 1 or side[0]["role"] != "assistant" for side in sides):
        raise BadRow("chosen and rejected differ before their last answer")
    answers = [{"text": side[0]["content"], "scores": {"score": score}} for side, score in zip(sides, (1, 0))]
    return {"prompt": prompt, "answers": answers}


def scored(row, *keys):
    """[{text, score}, ...], or {text: [...], score: [...]}, under the first of `keys` that is there
    -> [{text, scores: every score field}, ...]."""
    name = next(key for key in keys if key in row)
    answers = row[name]
    if isinstance(answers, dict):
        lists = {key: value for key, value in answers.items() if isinstance(value, list)}
        count = len(lists.get("text", []))
        answers = [{key: value[i] for key, value in lists.items() if len(value) == count} for i in range(count)]
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise BadRow(f"{name} is not a list of answers with scores", f"it is {shown(answers)}")
    out = []
    for answer in answers:
        text = first(answer, "text", "response", "answer", "completion", "content")
        notes = answer["annotations"] if isinstance(answer.get("annotations"), dict) else {}  # UltraFeedback
        ratings = {key: note.get("Rating") for key, note in notes.items() if isinstance(note, dict)}
        out.append({"text": as_text(text, "an answer"), "scores": {**ratings, **answer}})
    return out


def from_tldr(row):
    """Two summaries of a post, and which of them was chosen (Stiennon et al. 2020)."""
    info, summaries, best = row["info"], row["summaries"], row["choice"]
    lists = isinstance(info, dict) and isinstance(summaries, list) and len(summaries) == 2
    if not lists or best not in (0, 1, "0", "1"):
        raise BadRow("info, summaries or choice of the wrong type")
    fields = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post"), ("ARTICLE: ", "article")]
    lines = [head + as_text(info[key], key) for head, key in fields if info.get(key)]
    texts = [as_text(summary.get("text") if isinstance(summary, dict) else None, "a summary") for summary in summaries]
    answers = [{"text": text, "scores": {"score": int(i == int(best))}} for i, text in enumerate(texts)]
    return {"prompt": as_turns("\n\n".join(lines + ["TL;DR:"]), "user"), "answers": answers}


def from_reply(row, asked=(), said=REPLY_KEYS):
    return {"messages": question(row, *asked) + as_turns(first(row, *said), "assistant")}


def from_alpaca(row):
    return from_reply(row, ("instruction",), ("output", "response"))


def from_instances(row):
    """Self-Instruct: a task, and several inputs and outputs of it, each of which is a row."""
    instances = as_list(row, "instances")
    if not all(isinstance(instance, dict) for instance in instances):
        raise BadRow("an instance is not an object")
    return {"rows": [from_alpaca({**row, **instance}) for instance in instances]}


def verdict(row):
    """What a row says of its answer: "good", "bad", "zero" (bad, where the file's labels are no classes), "odd" where
    it is something else, None where it says nothing."""
    values = [row[key] for key in row.keys() & VERDICT_KEYS if isinstance(row[key], (str, int, float))]
    words = {str(value).strip().lower().removesuffix(".0") for value in values} - {"", "nan"}  # an empty cell
    if not words or row.keys() & CHOICE_KEYS:
        return None
    kinds = {"bad": {"false"}, "zero": {"0", "-1"}, "good": {"true", "1"}}
    return next((kind for kind, said in kinds.items() if words & said), "odd")


def from_turns(row):
    """MT-bench: the first turn is the prompt, the others are kept as `follow_ups`, right answers to them as `reference`."""
    turns = [as_text(turn, "turns") for turn in as_list(row, "turns")]
    right = [as_text(text, "reference") for text in row.get("reference") or []]
    return {"prompt": with_system(row, as_turns(turns[0], "user")), "follow_ups": turns[1:], "reference": right}


def as_list(row, key):
    if not isinstance(row[key], list) or not row[key]:
        raise BadRow(f"{key} is not a list, or empty", f"it is {shown(row[key])}")
    return row[key]


def shown(value):
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return (repr(value)[:60] + "...") if len(repr(value)) > 60 else repr(value)


# ---- OpenAssistant: trees of messages, whole or as one flat row a message ----

def best_thread(root):
    """The root and, from there on, the best-ranked reply to everything, up to the assistant's last word."""
    thread, node = [], root
    while node is not None:
        thread.append(tree_turn(node))
        node = min(replies(node), key=rank_of, default=None)
    return thread if thread[-1]["role"] == "assistant" else thread[:-1]


def tree_rows(root, want):
    """Internal rows of one tree. sft: its best thread; ranked: a row at every user's message with two or more ranked
    replies (rank 0 is best); prompts: every user's message. The prompt is the path from the root."""
    if want == "sft":
        thread = best_thread(root)
        return [{"messages": thread}] if thread else []
    rows, stack = [], [(root, [])]
    while stack:
        node, path = stack.pop()
        path = path + [tree_turn(node)]
        stack += [(reply, path) for reply in reversed(replies(node))]
        ranked = [reply for reply in replies(node) if rank_of(reply) < math.inf]
        if path[-1]["role"] == "user" and want == "prompts":
            rows.append({"prompt": path})
        elif path[-1]["role"] == "user" and len(ranked) >= 2:
            answers = [{"text": tree_turn(reply)["content"], "scores": {"rank": reply["rank"]}} for reply in ranked]
            rows.append({"prompt": path, "answers": answers})
    return rows


def rank_of(node):
    rank = as_number(node.get("rank"))
    return math.inf if rank is None else rank


def replies(node):
    found = node.get("replies", [])
    if not isinstance(found, list) or not all(isinstance(reply, dict) for reply in found):
        raise BadRow("replies is not a list of messages")
    return [reply for reply in found if not reply.get("deleted")]


def tree_turn(node):
    return as_turn({"role": node.get("role"), "content": node.get("text")})


def is_flat(row):
    return isinstance(row.get("message_id"), str) and row.get("role") in ("prompter", "assistant") and "text" in row


def from_flat(row):
    if not as_text(row["text"], "text").strip():
        raise BadRow("empty message")
    if not isinstance(row.get("parent_id", ""), str):
        raise BadRow("parent_id is not text")
    return {"flat": row}


def plant(flat):
    """[(row number, flat row), ...] -> [(root, row numbers of its tree), ...], [row numbers that hang on no root]."""
    nodes = {row["message_id"]: {**row, "replies": [], "number": number} for number, row in flat}
    for node in nodes.values():
        if node.get("parent_id") in nodes:
            nodes[node["parent_id"]]["replies"].append(node)
    trees, loose = [], {number for number, _ in flat}
    for root in nodes.values():
        if not root.get("parent_id"):
            members = [root]
            for node in members:  # grows while it is read: breadth first
                members += node["replies"]
            trees.append((root, [node["number"] for node in members]))
            loose -= {node["number"] for node in members}
    return trees, sorted(loose)


# ---- the shapes, in the order in which they are tried ----

@dataclass(frozen=True)
class Shape:
    name: str          # how a report calls it
    test: object       # row -> bool: by its keys
    convert: object    # row -> internal row, or BadRow
    gives: tuple       # the forms that can be made of it, its own first


def has(row, *keys):
    return all(key in row for key in keys)


def has_any(row, keys):
    return any(key in row for key in keys)


def talks(row, *keys):
    """One of `keys` holds the conversation, and not only the prompt of a chosen and a rejected answer beside it."""
    turns = next((row[key] for key in keys if key in row), None)
    if has(row, "chosen", "rejected") and isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        return turns[-1].get("role", turns[-1].get("from")) not in ("user", "human")
    return turns is not None


def several(row):
    return has_any(row, QUESTION_KEYS) and any(isinstance(row.get(key), (list, dict)) for key in LIST_KEYS)


SFT, RANKED = ("sft", "prompts"), ("ranked", "sft", "prompts")
SHAPES = [
    Shape("messages", lambda row: talks(row, "messages"),
          lambda row: {"messages": with_system(row, as_turns(as_list(row, "messages"), "user"))}, SFT),
    Shape("conversations", lambda row: talks(row, "conversations", "conversation"), from_conversation, SFT),
    Shape("UltraChat", lambda row: has(row, "id") and isinstance(row.get("data"), list),
          lambda row: {"messages": alternating(row["data"], "data")}, SFT),
    Shape("chosen/rejected", lambda row: has(row, "chosen", "rejected"), from_pair, RANKED),
    Shape("ELI5", lambda row: has(row, "title") and isinstance(row.get("answers"), dict) and "score" in row["answers"],
          lambda row: {"prompt": [says("user", with_input(row, "title"))], "answers": scored(row, "answers")}, RANKED),
    Shape("prompt/answers", several,
          lambda row: {"prompt": question(row), "answers": scored(row, *LIST_KEYS)}, RANKED),
    Shape("OASST tree", lambda row: isinstance(row.get("prompt"), dict) and "replies" in row["prompt"],
          lambda row: {"tree": row["prompt"]}, RANKED),
    Shape("OASST messages", is_flat, from_flat, RANKED),
    Shape("TL;DR comparison", lambda row: has(row, "info", "summaries", "choice"), from_tldr, RANKED),
    Shape("prompt/completion", lambda row: has(row, "prompt") and has_any(row, REPLY_KEYS), from_reply, SFT),
    Shape("instruction/instances", lambda row: has(row, "instruction", "instances"), from_instances, SFT),
    Shape("alpaca", lambda row: has(row, "instruction") and has_any(row, ("output", "response")), from_alpaca, SFT),
    Shape("question/answer", lambda row: has_any(row, QUESTION_KEYS) and has_any(row, REPLY_KEYS), from_reply, SFT),
    Shape("transcript", lambda row: is_transcript(row.get("text")),
          lambda row: {"messages": split_transcript(row["text"])}, SFT),
    Shape("text", lambda row: has(row, "text"), lambda row: {"text": as_text(row["text"], "text")}, ("text",)),
    Shape("turns", lambda row: has(row, "turns"), from_turns, ("prompts",)),
    Shape("prompt", lambda row: has_any(row, QUESTION_KEYS), lambda row: {"prompt": question(row)}, ("prompts",)),
]
HOLDS = {"sft": "SFT conversations", "ranked": "ranked answers", "prompts": "prompts without answers",
         "text": "plain text"}
NEEDS = {
    "sft": "supervised fine-tuning needs conversations that end with the assistant's answer: messages, "
           "or prompt and completion",
    "ranked": "training on preferences needs several answers a question: chosen and rejected, "
              "or prompt and answers with scores",
    "prompts": "this needs questions to answer: prompt, or messages",
    "text": "pretraining needs plain text: a text key in every row, or a .txt file",
}
FORMS = tuple(NEEDS)


class WrongForm(BadRow):
    """The row is sound, but of another form than the wanted one."""


def recognise(raw, want):
    """A raw row -> (its Shape, its internal row with its `label` (verdict) and `unread` text). Raises BadRow."""
    if isinstance(raw, BadRow):
        raise raw
    if not isinstance(raw, dict):
        raise BadRow("not an object with keys", f"it is {shown(raw)}")
    row = {key: value for key, value in raw.items() if value is not None}
    shape = next((shape for shape in SHAPES if want in shape.gives and shape.test(row)), None)
    other = shape or next((shape for shape in SHAPES if shape.test(row)), None)
    if other is None:
        keys = ", ".join(shown(key).strip("'") for key in list(row)[:12])
        raise BadRow("unknown keys", f"its keys are {keys or 'none'}{renamed(row, want)}")
    if shape is None:
        raise WrongForm(f"holds {HOLDS[other.gives[0]]} ({other.name})")
    reading = Reading(row)
    internal = shape.convert(reading)
    internal["label"] = verdict(row) if shape.gives[0] == "sft" else None
    internal["unread"] = {key: value for key, value in row.items()
                          if key not in reading.read and key not in KEPT_KEYS and wordy(value)}
    return shape, internal


def renamed(row, want):
    """A row of unknown keys -> ": rename q, a to question, answer", where that would make it a known one, or ""."""
    known = {key for key in (*QUESTION_KEYS, *REPLY_KEYS, *ALIASES)}
    ours = {alias: key for key, aliases in ALIASES.items() for alias in aliases.split()} | {key: key for key in known}
    names = {}
    for key in row:
        plain = str(key).strip().lower().replace(" ", "_").replace("-", "_")
        near = difflib.get_close_matches(plain, ours, 1, cutoff=0.8)
        if near and ours[near[0]] not in names.values():
            names[key] = ours[near[0]]
    tried = {names.get(key, key): value for key, value in row.items()}
    names = {key: name for key, name in names.items() if key != name}
    if not names or not any(want in shape.gives and shape.test(tried) for shape in SHAPES):
        return ""
    return f": rename {', '.join(map(str, names))} to {', '.join(names.values())}"


def wordy(value, depth=3):
    """Does a value hold words, and not only a name, a number or an address?"""
    if isinstance(value, str):
        return bool(WORDS.search(value[:200])) or not value.isascii()
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and any(wordy(part, depth - 1) for part in itertools.islice(inside, 20))


def parts(internal, want):
    """The internal rows in one: of a tree, of a task's instances, or itself. What is noted on one is noted on all."""
    rows = tree_rows(internal["tree"], want) if "tree" in internal else internal.get("rows", [internal])
    shared = {"label": internal["label"], "unread": internal["unread"], "notes": {}}
    return [{**row, **shared} for row in rows]


# ---- from an internal row to the wanted form ----

def in_order(messages, last):
    """[system], user, assistant, user, ...: joined, checked, ending with `last`. Raises BadRow."""
    out = []
    for message in messages:
        if not message["content"].strip():
            if message["role"] == "system":
                continue
            raise BadRow("empty answer" if message["role"] == "assistant" else "empty message")
        if out and out[-1]["role"] == message["role"]:
            if out[-1].get("loss_weight", 1) != message.get("loss_weight", 1):
                raise BadRow("assistant's turns to be joined have different weights")
            message = {**message, "content": out[-1]["content"] + "\n\n" + message["content"]}
            out.pop()
        out.append(message)
    talk = out[1:] if out and out[0]["role"] == "system" else out
    if not talk or talk[0]["role"] != "user":
        raise BadRow("does not begin with the user")
    if any(message["role"] == "system" for message in talk):
        raise BadRow("a system turn in the middle")
    if talk[-1]["role"] != last:
        raise BadRow(f"does not end with the {last}")
    return out


def fold_system(messages):
    """The system prompt, a blank line, the user's first turn: for models whose format knows no system role."""
    if messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{**first, "content": system["content"] + "\n\n" + first["content"]}, *rest]


def chosen_score(answer, name):
    scores = answer["scores"]
    if name == "score" and scores.get("score") is None:  # the usual other names
        name = next((key for key in ("rank", "overall_score") if scores.get(key) is not None), name)
    if as_number(scores.get(name)) is None:
        numbers = [key for key in scores if as_number(scores[key]) is not None]
        raise BadRow(f"no number under {name!r} in an answer",
                     f"numbers are under {', '.join(numbers[:9]) or 'no key'}")
    return as_number(scores[name]) * (-1 if name == "rank" else 1)  # rank 0 is the best answer


def cast(internal, want, merge_system=False, score="score"):
    """An internal row -> the wanted form, checked. Raises BadRow."""
    fold = fold_system if merge_system else list
    if want == "text":
        if not internal["text"].strip():
            raise BadRow("empty text")
        return {"text": internal["text"]}
    if "answers" in internal:
        prompt = fold(in_order(internal["prompt"], "user"))
        answers = [{"text": answer["text"], "score": chosen_score(answer, score)} for answer in internal["answers"]]
        if any(not answer["text"].strip() for answer in answers):
            raise BadRow("empty answer")
        if len(answers) < (2 if want == "ranked" else 1):
            raise BadRow("fewer than two answers" if want == "ranked" else "no answer")
        best = max(answers, key=lambda answer: answer["score"])
        return {"ranked": {"prompt": prompt, "answers": answers}, "prompts": {"prompt": prompt},
                "sft": {"messages": prompt + [says("assistant", best["text"])]}}[want]
    if want == "sft":
        if internal.get("label") in ("bad", "zero"):
            raise BadRow(BAD_ANSWER)
        messages = fold(in_order(internal["messages"], "assistant"))
        if not any(message.get("loss_weight", 1) for message in messages if message["role"] == "assistant"):
            raise BadRow("no answer to learn from: all have weight 0")
        return {"messages": messages}
    messages = internal["prompt"] if "prompt" in internal else internal["messages"]
    if "messages" in internal and messages and messages[-1]["role"] == "assistant":
        messages = in_order(messages, "assistant")[:-1]
    row = {"prompt": fold(in_order(messages, "user"))}
    return row | {key: internal[key] for key in ("follow_ups", "reference") if internal.get(key)}


def finished(internal, raw, want, merge_system, score):
    """cast, the kept keys of the raw row, and a look at every string that will be tokenized."""
    trim(internal)
    row = cast(internal, want, merge_system, score)
    row |= {key: raw[key] for key in KEPT_KEYS if isinstance(raw.get(key), str)}
    texts = [value for value in row.values() if isinstance(value, str)] + row.get("follow_ups", []) + row.get("reference", [])
    texts += [message["content"] for message in row.get("messages", row.get("prompt", []))]
    texts += [answer["text"] for answer in row.get("answers", [])]
    check_texts(texts)
    look(internal, row, texts)
    return row


def end_marks(text):
    """What models are told to end with, where it stands in a text. <s>...</s> is HTML."""
    if not (">" in text or "###" in text):  # in most texts, and much faster than the search
        return []
    return [mark for mark in END_MARK.finditer(text) if mark[0] != "</s>" or "<s>" not in text]


def trim(internal):
    """Takes the end marks off an internal row's answers, where a template left them: a renderer sets its own."""
    for turn in [*internal.get("messages", ()), *internal.get("prompt", ()), *internal.get("answers", ())]:
        key = "text" if "text" in turn else "content"
        text, found = turn[key], end_marks(turn[key]) if turn.get("role", "assistant") == "assistant" else []
        while found and not text[found[-1].end():].strip():
            internal.setdefault("notes", {})["an end mark behind an answer is taken off"] = found[-1][0]
            text = text[:found.pop().start()].rstrip()
        turn[key] = text


def look(internal, row, texts):
    """Notes on an internal row what in its text may be wrong: {what: an example}."""
    notes = internal.setdefault("notes", {})
    for text in texts:
        if "{{" in text and (found := PLACEHOLDER.search(text)):
            notes.setdefault("a placeholder that nobody filled in", found[0])
        if found := end_marks(text):
            notes.setdefault("an end mark inside a text", found[0][0])
    weights = {message.get("loss_weight", 1) for message in row.get("messages", ())} - {0, 1}
    if weights:
        notes["a weight other than 0 and 1 counts as 1"] = f"{min(weights):g}"
    for key, value in internal.get("unread", {}).items():
        if not (isinstance(value, str) and any(value.strip() in text for text in texts)):
            notes.setdefault(f"text under {shown(key)} is not used", "")


def check_texts(texts):
    """Raises BadRow where a string cannot be written or tokenized."""
    for text in texts:
        if "\0" in text:
            raise BadRow("NUL byte")
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes that are no UTF-8 arrive here as surrogates too: see open_text
            raise BadRow("not UTF-8, or half of a surrogate pair") from None
