"""What holds of every book, whatever is in it: order, duplicates, cuts, conservation (DESIGN promises 1, 4, 5)."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rating.close import ChargeRow, derive
from rating.rounding import round_half_away
from tests.oracle.strategies import ARRIVAL, books, shuffled
from tests.replay import Replay, replay

Book = list[dict[str, Any]]
MANY = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)


def closes(book: Book) -> list[tuple[str, list[ChargeRow], list[ChargeRow]]]:
    """What the closes of a book come to."""
    return replay(book, arrival=ARRIVAL).closes


def summed(run: Replay, *, held: bool) -> Counter[tuple[str, ...]]:
    """Pounds by line, supplier, payer and month over all documents (and what the last close holds), zeros out."""
    total: Counter[tuple[str, ...]] = Counter()
    rows = [row for _, lines, _ in run.closes for row in lines]
    rows += run.closes[-1][2] if held and run.closes else []
    for row in rows:
        total[row[:6]] += Decimal(row.net)  # type: ignore[assignment]
    return Counter({key: net for key, net in total.items() if net})


@MANY
@given(st.data())
def test_usage_may_come_in_any_order_and_twice(data: st.DataObject) -> None:
    """Usage shuffled between two closes, and a part of it doubled, gives the same rows."""
    book = data.draw(books(flat_only=False))
    assert closes(data.draw(shuffled(book))) == closes(book)


@MANY
@given(st.data())
def test_keys_may_interleave_in_any_way(data: st.DataObject) -> None:
    """Between two closes only the order of records with the same key counts."""
    book = data.draw(books(flat_only=False))
    moved: Book = []
    part: Book = []
    for line in [*book, {"close": ""}]:
        if "close" not in line:
            part.append(line)
            continue
        by_key: dict[str, Book] = {}
        for each in part:
            value = each["value"]
            key = value.get("order_number") or value.get("code") or "usage" if isinstance(value, dict) else "usage"
            by_key.setdefault(str(key), []).append(each)
        while by_key:
            key = data.draw(st.sampled_from(sorted(by_key)))
            moved.append(by_key[key].pop(0))
            if not by_key[key]:
                del by_key[key]
        part = []
        moved.append(line)
    assert closes(moved[:-1]) == closes(book)


@MANY
@given(books(flat_only=False))
def test_a_close_depends_on_nothing_after_its_cut(book: Book) -> None:
    """The documents of a close are the same when the log ends at it: what is closed never changes."""
    whole = closes(book)
    cuts = [index for index, line in enumerate(book) if "close" in line]
    for count, cut in enumerate(cuts, start=1):
        assert closes(book[: cut + 1]) == whole[:count]


@MANY
@given(books(flat_only=False), st.randoms())
def test_cuts_do_not_move_money(book: Book, random: Any) -> None:
    """However many events come late, all documents up to the last close sum to the same (RULES 4.5)."""
    periods = [line for line in book if "close" in line]
    others = [line for line in book if "close" not in line]
    places = sorted(random.randrange(len(others) + 1) for _ in periods)
    late: Book = []
    for index, line in enumerate(others):
        late += [periods[each] for each, place in enumerate(places) if place == index]
        late.append(line)
    late += [periods[each] for each, place in enumerate(places) if place == len(others)]
    if not periods:
        return
    # The last close must know all there is, in both.
    late.remove(periods[-1])
    on_time, delayed = replay([*others, *periods], arrival=ARRIVAL), replay([*late, periods[-1]], arrival=ARRIVAL)
    assert summed(on_time, held=True) == summed(delayed, held=True)
    assert summed(on_time, held=False) == summed(delayed, held=False)


@MANY
@given(books(flat_only=False))
def test_payers_sum_to_the_line_and_the_line_to_its_entitlement(book: Book) -> None:
    """What payers pay up to a month is the line's exact entitlement, rounded once (RULES 3.10)."""
    run = replay(book, arrival=ARRIVAL)
    if not run.closed:
        return
    period = run.closed[-1]
    derived = derive(run.book(), period)
    pence: Counter[tuple[str, str, str]] = Counter()
    for line, amounts in [*derived.payable.items(), *derived.held.items()]:
        pence[line] += sum(amounts.values())
    for line in {key for key, _ in derived.exact}:
        exact = sum(each for (key, _), each in derived.exact.items() if key == line)
        assert pence[line] == round_half_away(exact)  # type: ignore[arg-type]
