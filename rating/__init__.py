"""The rule book: what a tri-party service costs, who pays, and what a close invoices.

Pure: no input or output, no clock, no framework, nothing else of ours.  A reader with RULES in
one hand finds section 2 in `timeline` and `book`, section 3 in `charges`, `funding` and
`rounding`, section 4 in `close`, and what is refused when read in `records` and `admission`.

Units: quantities and prices are integers of millionths (`*_micros`), so a price times a
quantity is an integer of 10**-12 pounds; exact money is counted in grains of a penny (`Exact`, see
`amounts`); rounded money is an integer of pence (`*_pence`).  Days are `date.toordinal()` integers, months
are `year * 12 + month - 1`.
"""
