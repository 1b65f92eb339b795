"""What the documents say can be typed: commands parse, flags exist, links resolve, Python runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from benchmarks.shards import table as shards_table
from saint.training.recipe import recipe_table
from tests.support.source import MAY_IMPORT

ROOT = Path(__file__).resolve().parents[2]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
STAGES = sorted(p.stem for p in ROOT.glob("*.py") if "build_parser" in p.read_text())
OTHERS = {"--help", "--nproc_per_node", "--nnodes", "--node_rank"}  # python's and torchrun's
OTHERS |= {"--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--short"}
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)


def commands(path: Path) -> list[list[str]]:
    """Every `python …` and `torchrun …` line of the shell blocks, as words."""
    found = []
    for block in blocks(path, "bash"):
        lines = (
            shlex.split(line, comments=True) for line in block.replace("\\\n", " ").split("\n")
        )
        found += [words for words in lines if words and words[0] in ("python", "torchrun")]
    return found


@cache
def parser_of(stage: str) -> argparse.ArgumentParser:
    return importlib.import_module(stage).build_parser()


def stage_and_flags(words: list[str]) -> tuple[str, list[str]]:
    """Where the script's name is among the words, and what comes after it."""
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), -1)
    return words[at].removesuffix(".py"), words[at + 1 :]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_parses(name: str):
    for words in commands(ROOT / name):
        if words[:2] == ["python", "-m"]:
            stage, flags = f"{words[2]}.__main__", words[3:]
            assert importlib.util.find_spec(words[2]), words
        else:
            stage, flags = stage_and_flags(words)
            assert (ROOT / f"{stage}.py").exists(), words
        if stage not in STAGES and not stage.startswith("saint.report"):
            continue  # pytest, the store, a benchmark: their flags are looked for below
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                parser_of(stage).parse_args(flags)
            except SystemExit:
                pytest.fail(f"{shlex.join(words)}\n{said.getvalue()}")


def all_options(parser: argparse.ArgumentParser) -> set[str]:
    """The parser's flags, and those of its commands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {o for command in action.choices.values() for o in all_options(command)}
    return found


@cache
def known_flags() -> frozenset[str]:
    """Flags of all stages, of the store's own program and of the benchmarks (by their source)."""
    options = {o for stage in STAGES for o in all_options(parser_of(stage))}
    sources = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("saint/*/__main__.py")]
    sources += [*ROOT.glob("embedded/*.py"), *ROOT.glob("quickstart.sh"), *ROOT.glob("tests/*.py")]
    for source in sources:
        options |= set(re.findall(r"--[a-z]\w+", source.read_text(encoding="utf-8")))
    return frozenset(options | OTHERS)


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_that_is_named_exists(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    if name == "CHANGELOG.md":
        return  # it names flags that are gone
    text = re.sub(r"^.*(pip|hf) (install|download).*$", "", text, flags=re.M)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    unknown = sorted(named - known_flags())
    assert not unknown, f"{name} names flags that no parser has"


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name: str):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = path.parent / file if file else path
        assert linked.exists(), f"{name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in slugs, f"{name} links to {target}"


def test_the_readme_is_short_and_names_every_stage_and_document():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170
    for path in ROOT.glob("docs/*.md"):
        assert f"docs/{path.name}" in text
    for stage in STAGES:
        short = stage.removeprefix("interpret_top_sentences_")
        assert short in text, f"the README does not name {stage}.py"
    assert "bash quickstart.sh" in text and "bash run_tests.sh" in text


def without_comments(block: str) -> str:
    return re.sub(r"\s+#.*$", "", block, flags=re.M)


def test_both_readmes_hold_the_same_commands():
    for language in ("bash", "python"):
        ours, theirs = blocks(README, language), blocks(CHINESE, language)
        assert [without_comments(b) for b in ours] == [without_comments(b) for b in theirs]
    pattern = re.compile(r"\]\(([^)#]+)\)|`(--\w+)`")
    targets = [set(pattern.findall(p.read_text(encoding="utf-8"))) for p in (README, CHINESE)]
    assert targets[0] - {("README.zh-CN.md", "")} == targets[1] - {("README.md", "")}


def test_sizes_of_pictures():
    for picture in ROOT.glob("docs/images/*"):
        assert picture.stat().st_size < 150_000, picture


def test_the_rooms_are_those_that_the_imports_are_held_to():
    rows = re.findall(r"^\| `([^`]+)` \|[^|]*\| ([^|]*) \|$", CONTRIBUTING.read_text(), re.M)
    written = {}
    for name, others in rows:
        room = name.removesuffix("/").removesuffix(".py").replace("/", ".")
        known = {"sae", "llama_3", "nothing"}
        may = {other if other in known else f"saint.{other}" for other in others.split(", ")}
        written[room] = may - {"nothing"}
    assert written == {room: set(others.split()) for room, others in MAY_IMPORT.items()}


def test_the_recipes_table_is_the_one_that_its_fields_make():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert recipe_table() in text, f"docs/training.md should hold:\n{recipe_table()}"


def test_the_table_of_split_latents_is_the_one_that_is_counted():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert shards_table() in text, f"docs/scaling.md should hold:\n{shards_table()}"
