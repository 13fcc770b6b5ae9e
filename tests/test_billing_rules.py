"""`docs/billing-rules.md` is true: its examples run through engine and oracle, its figures add up, its tests exist."""

from __future__ import annotations

import doctest
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.oracle import oracle
from tests.replay import replay

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "billing-rules.md"
HEADER = "order_number,item_id,ods_code,supplier_id,payer,for_period,kind,net"
ARRIVAL = datetime(2027, 1, 1, tzinfo=UTC)
#: The rules of RULES 2, 3 and 4 that the document must have a section on.
RULES = [
    "1.1",
    "1.2",
    *(f"2.{n}" for n in range(1, 5)),
    *(f"3.{n}" for n in range(1, 12)),
    *(f"4.{n}" for n in range(1, 6)),
]
_RULE = re.compile(r"^#+ (?:Example )?\S+|\brules? \d\.\d+")
_AMOUNT = re.compile(r"(?<![\d.,:-])\d[\d,]*\.\d{2}(?![\d.])")


@dataclass
class Example:
    """An example: its interchange lines, and what each close must give."""

    name: str
    place: int
    lines: list[dict[str, Any]] = field(default_factory=list)
    files: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    refused: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Section:
    """A rule's section: its prose, its blocks, the tests that it names."""

    rule: str
    place: int
    prose: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    worked: list[tuple[int, str]] = field(default_factory=list)
    checked_by: list[str] = field(default_factory=list)


def _read(text: str) -> tuple[list[Section], list[Example]]:
    sections: list[Section] = []
    examples: list[Example] = []
    rows = text.splitlines()
    number = 0
    while number < len(rows):
        row = rows[number]
        number += 1
        if found := re.match(r"### (\S+) ", row):
            sections.append(Section(found[1], number))
        elif found := re.match(r"#### Example (\S+): ", row):
            examples.append(Example(found[1], number))
        elif row.startswith("```"):
            end = rows.index("```", number)
            _block(row.removeprefix("```"), rows[number:end], number + 1, sections, examples)
            number = end + 1
            continue
        if sections:
            if row.startswith("Checked by:") or (sections[-1].checked_by and row):
                sections[-1].checked_by += re.findall(r"`(tests/[^`]+)`", row)
            else:
                sections[-1].prose.append(row)
    return sections, examples


def _block(kind: str, rows: list[str], place: int, sections: list[Section], examples: list[Example]) -> None:
    if sections:
        sections[-1].blocks.append("\n".join(rows))
    if kind == "pycon":
        sections[-1].worked.append((place, "\n".join(rows) + "\n"))
    elif kind == "jsonl":
        assert not examples[-1].lines, f"line {place}: a second jsonl block in example {examples[-1].name}"
        examples[-1].lines = [json.loads(row) for row in rows]
    elif kind.startswith("csv "):
        _, file, period = kind.split()
        assert file in ("lines", "held"), f"line {place}: {kind}"
        examples[-1].files[file, period] = rows
    elif kind == "text refused":
        for row in rows:
            found = re.fullmatch(r"line (\d+): (.+)", row)
            assert found, f"line {place}: {row!r}"
            examples[-1].refused.append((int(found[1]) - 1, found[2]))
    else:
        raise AssertionError(f"line {place}: what is a block of {kind!r}?")


SECTIONS, EXAMPLES = _read(DOCUMENT.read_text(encoding="utf-8"))


def test_every_rule_has_its_section_and_examples() -> None:
    """No rule is left out, no example has lost its lines, and none has another's name."""
    assert [section.rule for section in SECTIONS if not section.rule.startswith("5.")] == RULES
    names = [example.name for example in EXAMPLES]
    assert len(set(names)) == len(names)
    assert len(names) >= 40
    with_example = {name.rstrip("abcdefgh") for name in names}
    assert {rule for rule in RULES if rule not in ("3.11", "4.4")} == with_example


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example: Example) -> None:
    """Engine and oracle give the rows that stand in the document, all of them, and refuse what it says."""
    assert example.lines, "has no jsonl block"
    engine = replay(example.lines, arrival=ARRIVAL)
    truth = oracle.run(example.lines, arrival=ARRIVAL)
    _same(example, [(period, "lines", rows) for period, rows, _ in engine.closes])
    _same(example, [(period, "held", rows) for period, _, rows in engine.closes])
    _same(example, [(close.period, "lines", close.lines) for close in truth.closes])
    _same(example, [(close.period, "held", close.held) for close in truth.closes])
    assert [index for index, _ in truth.refused] == [index for index, _ in example.refused]
    assert [index for index, _ in engine.refused] == [index for index, _ in example.refused]
    for (_, reason), (_, shown) in zip(engine.refused, example.refused, strict=True):
        assert reason.startswith(shown)


def _same(example: Example, found: list[tuple[str, str, Any]]) -> None:
    file = found[0][1]
    shown = {period: rows for (kind, period), rows in example.files.items() if kind == file}
    given = {period: [HEADER, *(",".join(row) for row in rows)] for period, _, rows in found}
    if file == "held":
        # One that is empty need not be shown.
        given = {period: rows for period, rows in given.items() if period in shown or len(rows) > 1}
    assert shown == given


@pytest.mark.parametrize("section", [each for each in SECTIONS if each.worked], ids=lambda section: section.rule)
def test_worked_figures(section: Section) -> None:
    """The calculations of a section come to what is written."""
    names: dict[str, Any] = {"D": Decimal, "F": Fraction}
    runner = doctest.DocTestRunner(verbose=False)
    said: list[str] = []
    for place, text in section.worked:
        test = doctest.DocTestParser().get_doctest(text, names, f"rule {section.rule}", str(DOCUMENT), place - 1)
        runner.run(test, out=said.append, clear_globs=False)
        names = test.globs
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.rule)
def test_amounts_in_the_text(section: Section) -> None:
    """An amount in a section's text stands in one of its blocks too, where it is checked."""
    known = {Decimal(found) for block in section.blocks for found in re.findall(r"\d+(?:\.\d+)?", block)}
    for row in section.prose:
        for amount in _AMOUNT.findall(_RULE.sub("", row)):
            assert Decimal(amount.replace(",", "")) in known, f"{amount} in {row!r}"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.rule)
def test_named_tests_exist(section: Section) -> None:
    """A section of a rule says by which tests it is checked, and they are there."""
    if section.rule.startswith("5."):
        return
    assert section.checked_by
    ours = {f"tests/test_billing_rules.py::test_example[{example.name}]" for example in EXAMPLES}
    ours |= {f"tests/test_billing_rules.py::test_worked_figures[{each.rule}]" for each in SECTIONS if each.worked}
    for name in section.checked_by:
        if name not in ours:
            file, _, function = name.partition("::")
            assert re.search(rf"^def {re.escape(function)}\(", (ROOT / file).read_text(), re.MULTILINE), name
    named = {name for each in SECTIONS for name in each.checked_by}
    assert {each for each in ours if f"test_example[{section.rule}" in each and each[-2] not in "0123456789"} <= named
