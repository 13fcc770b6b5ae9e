"""Who stands on a document: names, addresses, VAT numbers, self-billing agreements, COS decisions, on a day.

Party data is said in rows, each with the days that it holds; of two that hold on a day the one said later
stands, and one that repeats the first day of another of its key replaces it.  Nothing here moves money: a
party that is not described costs a document its number in the series, never a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from rating.calendar import FOREVER, add_months
from rating.records import Fields, Refused

#: The schemes of Peppol addresses that are allowed: a GLN, or the VAT number of the United Kingdom.
GLN, UK_VAT = "0088", "9932"
#: An agreement lasts at most so many months, unless it names the contract that it lasts as long as (Notice 700/62).
AGREEMENT_MONTHS = 12
_TEXT_LIMIT = 200


@dataclass(frozen=True, slots=True)
class Party:
    """A supplier, payer or practice from day `first` until before `end` (ordinals)."""

    code: str
    name: str
    address: tuple[str, ...]
    city: str
    postcode: str
    country: str
    vat_number: str
    endpoint_scheme: str
    endpoint_id: str
    first: int
    end: int

    @property
    def key(self) -> tuple[str, ...]:
        """What a later row with the same first day replaces."""
        return ("party", self.code)

    def as_json(self) -> dict[str, Any]:
        """The party as a document shows it; what is not known is left out."""
        endpoint = {"scheme": self.endpoint_scheme, "id": self.endpoint_id} if self.endpoint_id else None
        shown = {
            "code": self.code,
            "name": self.name,
            "address": list(self.address),
            "city": self.city,
            "postcode": self.postcode,
            "country": self.country,
            "vat_number": self.vat_number,
            "endpoint": endpoint,
        }
        return {name: value for name, value in shown.items() if value or name == "code"}


@dataclass(frozen=True, slots=True)
class Agreement:
    """A supplier's word that a payer may issue its invoices, given under one VAT number (SI 1995/2518 reg. 13)."""

    supplier_id: str
    payer: str
    vat_number: str
    contract: str
    first: int
    end: int

    @property
    def key(self) -> tuple[str, ...]:
        """What a later row with the same first day replaces."""
        return ("agreement", self.supplier_id, self.payer)


@dataclass(frozen=True, slots=True)
class CosDecision:
    """Whether a payer recovers the VAT of an item or an order under COS heading 14, and why."""

    payer: str
    item_id: str
    order_number: str
    recoverable: bool
    reason: str
    first: int
    end: int

    @property
    def key(self) -> tuple[str, ...]:
        """What a later row with the same first day replaces."""
        return ("cos", self.payer, self.item_id, self.order_number)


@dataclass(frozen=True, slots=True)
class Item:
    """What a catalogue item is called on documents."""

    item_id: str
    name: str
    first: int
    end: int

    @property
    def key(self) -> tuple[str, ...]:
        """What a later row with the same first day replaces."""
        return ("item", self.item_id)


PartyRow = Party | Agreement | CosDecision | Item


@dataclass(slots=True)
class Parties:
    """All that has been said of parties.  With `specimen` those who are not described are invented."""

    specimen: bool = False
    _said: dict[tuple[str, ...], dict[int, PartyRow]] = field(default_factory=dict)

    @classmethod
    def fold(cls, rows: Iterable[PartyRow], specimen: bool = False) -> Parties:
        """The rows in the order in which they were said."""
        parties = cls(specimen)
        for row in rows:
            said = parties._said.setdefault(row.key, {})
            said.pop(row.first, None)
            said[row.first] = row
        return parties

    def _at(self, key: tuple[str, ...], day: int) -> Any:
        for row in reversed(self._said.get(key, {}).values()):
            if row.first <= day < row.end:
                return row
        return None

    def party(self, code: str, day: int, supplier: bool = False) -> Party | None:
        """A party as it is on a day; None when nobody has described it."""
        found: Party | None = self._at(("party", code), day)
        return found or (invented(code, supplier) if self.specimen else None)

    def name(self, code: str, day: int) -> str:
        """What a party is called, or nothing: a name that is not known is not made up."""
        found: Party | None = self._at(("party", code), day)
        return found.name if found else ""

    def agreement(self, supplier_id: str, payer: str, day: int) -> Agreement | None:
        """The self-billing agreement in force on a day."""
        found: Agreement | None = self._at(("agreement", supplier_id, payer), day)
        if found is None and self.specimen and (party := self.party(supplier_id, day, True)):
            return Agreement(supplier_id, payer, party.vat_number, "", day, FOREVER)
        return found

    def cos(self, payer: str, item_id: str, order_number: str, day: int) -> CosDecision | None:
        """A payer's decision on a line's VAT: the order's before the item's."""
        for key in (("cos", payer, "", order_number), ("cos", payer, item_id, "")):
            if found := self._at(key, day):
                decision: CosDecision = found
                return decision
        return None

    def item_name(self, item_id: str, day: int) -> str:
        """What an item is called; its id when nobody has said."""
        found: Item | None = self._at(("item", item_id), day)
        return found.name if found else item_id


def invented(code: str, supplier: bool) -> Party:
    """A party that nobody could take for a real one, with identifiers of the right form that belong to nobody.

    VAT numbers that begin with 999 are not issued; GS1 keeps the prefix 952 for examples; the postcode area ZZ99
    stands for no place.

    >>> vat_number_holds(invented("10030", True).vat_number), gln_holds(invented("NHSE", False).endpoint_id)
    (True, True)
    """
    number = 0
    for character in code:
        number = (number * 37 + ord(character)) % 999_983
    digits = int(code) if code.isascii() and code.isdigit() else number
    vat_number = _vat_number(f"999{digits % 10_000:04d}")
    gln = f"952{number:09d}"
    return Party(
        code=code,
        name=f"SPECIMEN {'Supplier' if supplier else 'Body'} {code}",
        address=("1 Specimen Street",),
        city="Specimen",
        postcode="ZZ99 3WZ",
        country="GB",
        vat_number=vat_number,
        endpoint_scheme=UK_VAT if supplier else GLN,
        endpoint_id=vat_number if supplier else gln + _gln_digit(gln),
        first=0,
        end=FOREVER,
    )


# --- identifiers ----------------------------------------------------------------------------


def _vat_remainder(seven: str) -> int:
    return sum(int(digit) * weight for digit, weight in zip(seven, range(8, 1, -1), strict=True)) % 97


def _vat_number(seven: str) -> str:
    return f"GB{seven}{97 - _vat_remainder(seven):02d}"


def vat_number_holds(text: str) -> bool:
    """Whether the check digits of a UK VAT number hold, by either of its two rules (modulus 97 and 9755).

    >>> [vat_number_holds(text) for text in ("GB999999973", "GB999999918", "GB999999974", "999999973")]
    [True, True, False, False]
    """
    digits = text[2:]
    if not (text.startswith("GB") and digits.isascii() and digits.isdigit() and len(digits) in (9, 12)):
        return False
    return (_vat_remainder(digits[:7]) + int(digits[7:9])) % 97 in (0, 42)


def _gln_digit(twelve: str) -> str:
    return str(-sum(int(digit) * (1, 3)[index % 2] for index, digit in enumerate(twelve)) % 10)


def gln_holds(text: str) -> bool:
    """Whether a Global Location Number has thirteen digits and the right last one.

    >>> gln_holds("5790000000005"), gln_holds("5790000000006")
    (True, False)
    """
    return text.isascii() and text.isdigit() and len(text) == 13 and _gln_digit(text[:12]) == text[12]


# --- reading ---------------------------------------------------------------------------------


def read_party_row(value: object) -> PartyRow:
    """A row of a party file: `{"party": {...}}`, `{"agreement": ...}`, `{"cos": ...}` or `{"item": ...}`.

    Raises Refused with the field and the fix.
    """
    readers: dict[str, Callable[[Fields], PartyRow]] = {
        "party": _party,
        "agreement": _agreement,
        "cos": _cos,
        "item": _item,
    }
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in readers:
        raise Refused("", f"is no row of one kind; write one of {', '.join(f'{{{kind!r}: ...}}' for kind in readers)}")
    ((kind, fields),) = value.items()
    read = Fields(fields, kind)
    known = _FIELDS[kind]
    for name in read.value:
        if name not in known:
            raise Refused(read.at(str(name)[:40]), f"is not known; {kind} has {', '.join(sorted(known))}")
    row = readers[kind](read)
    if row.first >= row.end:
        raise Refused(read.at("to"), "is not after `from`; it is the first day on which the row no longer holds")
    return row


_FIELDS = {
    "party": {"code", "name", "address", "city", "postcode", "country", "vat_number", "endpoint", "from", "to"},
    "agreement": {"supplier_id", "payer", "vat_number", "contract", "from", "to"},
    "cos": {"payer", "item_id", "order_number", "recoverable", "reason", "from", "to"},
    "item": {"item_id", "name", "from", "to"},
}


def _text(fields: Fields, name: str, required: bool = True) -> str:
    """A line of text that any document can show."""
    text = fields.text(name) if required or fields.get(name) is not None else ""
    if not text.isprintable() or len(text) > _TEXT_LIMIT:
        raise Refused(fields.at(name), f"must be printable text of at most {_TEXT_LIMIT} characters on one line")
    if required and not text.strip():
        raise Refused(fields.at(name), "is empty")
    return " ".join(text.split())


def _checked_vat_number(fields: Fields, required: bool = False) -> str:
    number = _text(fields, "vat_number", required).replace(" ", "").upper()
    if number and not vat_number_holds(number):
        raise Refused(fields.at("vat_number"), "is no UK VAT number: GB and nine digits of which the last two check")
    return number


def _party(fields: Fields) -> Party:
    lines = fields.require("address")
    if not isinstance(lines, list) or not 1 <= len(lines) <= 3 or not all(isinstance(each, str) for each in lines):
        raise Refused(fields.at("address"), 'must be one to three lines, such as ["1 High Street"]')
    country = _text(fields, "country", required=False).upper() or "GB"
    if len(country) != 2 or not country.isascii() or not country.isalpha():
        raise Refused(fields.at("country"), "must be two letters (ISO 3166), such as GB")
    scheme, endpoint = _endpoint(fields)
    return Party(
        code=_text(fields, "code"),
        name=_text(fields, "name"),
        address=tuple(_text(Fields({"address": each}, fields.path), "address") for each in lines),
        city=_text(fields, "city", required=False),
        postcode=_text(fields, "postcode"),
        country=country,
        vat_number=_checked_vat_number(fields),
        endpoint_scheme=scheme,
        endpoint_id=endpoint,
        first=fields.day("from"),
        end=fields.end_day("to"),
    )


def _endpoint(fields: Fields) -> tuple[str, str]:
    if fields.get("endpoint") is None:
        return "", ""
    endpoint = Fields(fields.get("endpoint"), fields.at("endpoint"))
    scheme = endpoint.choice("scheme", (GLN, UK_VAT))
    identifier = _text(endpoint, "id").replace(" ", "").upper()
    if not (gln_holds(identifier) if scheme == GLN else vat_number_holds(identifier)):
        what = "a GLN: thirteen digits of which the last checks" if scheme == GLN else "a UK VAT number with GB"
        raise Refused(endpoint.at("id"), f"is not {what} (scheme {scheme})")
    return scheme, identifier


def _agreement(fields: Fields) -> Agreement:
    first, end = fields.day("from"), fields.day("to")
    contract = _text(fields, "contract", required=False)
    if end > add_months(first, AGREEMENT_MONTHS) and not contract:
        raise Refused(
            fields.at("to"),
            f"is more than {AGREEMENT_MONTHS} months after `from`; name the `contract` that it lasts as long as",
        )
    return Agreement(
        supplier_id=_text(fields, "supplier_id"),
        payer=_text(fields, "payer"),
        vat_number=_checked_vat_number(fields, required=True),
        contract=contract,
        first=first,
        end=end,
    )


def _cos(fields: Fields) -> CosDecision:
    item_id = _text(fields, "item_id", required=False)
    order_number = _text(fields, "order_number", required=False)
    if bool(item_id) == bool(order_number):
        raise Refused(fields.at("item_id"), "name either an item_id or an order_number")
    recoverable = fields.require("recoverable")
    if not isinstance(recoverable, bool):
        raise Refused(fields.at("recoverable"), "must be true or false")
    return CosDecision(
        payer=_text(fields, "payer"),
        item_id=item_id,
        order_number=order_number,
        recoverable=recoverable,
        reason=_text(fields, "reason"),
        first=fields.day("from"),
        end=fields.end_day("to"),
    )


def _item(fields: Fields) -> Item:
    first = fields.day("from") if fields.get("from") is not None else date.min.toordinal()
    return Item(_text(fields, "item_id"), _text(fields, "name"), first, fields.end_day("to"))
