-- What has accrued at an instant, and whose it is to pay.  Nothing ticks: both are computed when asked,
-- `FROM shares_live(month = 24315, at_ms = 1777000000000)`: a month as in `accruals`, and milliseconds since
-- 1970.  Within a London day both are linear in time: the amount now and its rate say the whole day.

CREATE OR REPLACE VIEW accruals_live AS
WITH
    toDate32(fromUnixTimestamp64Milli({at_ms:Int64}, 'UTC'), 'Europe/London') AS today,
    toUnixTimestamp64Milli(toDateTime64(today, 3, 'Europe/London')) AS began_ms,
    -- 82,800, 86,400 or 90,000 seconds
    toUnixTimestamp64Milli(toDateTime64(today + 1, 3, 'Europe/London')) - began_ms AS day_ms,
    arraySum(arrayMap((low, high, each) -> each * greatest(0, toInt32(least(high, today)) - toInt32(low)),
        time_from, time_to, time_day_pence)) AS whole_days,
    arraySum(arrayMap((low, high, each) -> each * (low <= today AND today < high),
        time_from, time_to, time_day_pence)) AS of_today,
    arraySum(arrayMap((day, each) -> each * (day <= today), days, days_pence)) AS single_days
SELECT
    order_number, item_id, ods_code, supplier_id, charge_pence, groups,
    whole_days + single_days + of_today * ({at_ms:Int64} - began_ms) / day_ms AS accrued_pence,
    of_today * 1000 / day_ms AS pence_per_second
FROM accruals FINAL
-- Part of the key, so rows may be left out before the newest is picked.
PREWHERE month = {month:Int32};

-- The waterfalls (RULES 3.9), settled: what each payer has to pay of the month, and of it at the instant.
-- A payer's part grows as its line does.  Where the line is beyond its month (a later credit takes back
-- what has accrued), the excess is the last rest payer's, so a line's shares always sum to the line.
CREATE OR REPLACE VIEW shares_live AS
WITH
    -- `123/7` as a decimal.  Of very long fractions both sides lose the same number of digits.
    (text -> if(position(text, '/') > 0, substringIndex(text, '/', -1), '1')) AS lower_of,
    (text -> greatest(0, toInt32(length(lower_of(text))) - 38)) AS surplus,
    (text -> toDecimal256OrZero(left(substringIndex(text, '/', 1),
            greatest(0, toInt32(length(substringIndex(text, '/', 1))) - surplus(text))), 18)
        / toInt256(left(lower_of(text), toInt32(length(lower_of(text))) - surplus(text)))) AS pence,
    (
        SELECT mapFromArrays(groupArray(ordering_party), groupArray(coverage_decimal))
        FROM allocations_drawn FINAL WHERE month = {month:Int32}
    ) AS covered
SELECT
    order_number, item_id, ods_code, supplier_id, payer,
    amount AS share_pence,
    toDecimal256(amount * portion, 18) + if(place = length(payers), excess, 0) AS accrued_pence,
    toDecimal256(amount * portion_per_second, 18) + if(place = length(payers), excess_per_second, 0)
        AS pence_per_second
FROM (
    SELECT
        order_number, item_id, ods_code, supplier_id, portion, portion_per_second,
        pence(part.charge) AS charge,
        if(charge < 0, -1, 1) AS sign,
        arrayMap(step -> pence(step.2), part.taken) AS before,
        if(part.allocation IS NULL, toDecimal256(0, 18),
            toDecimal256(pence(part.wanted) * covered[part.party], 18)) AS drawn,
        charge - arraySum(before) - drawn AS remaining,
        -- Steps behind the allocation, up to each: the sum of their limits, or all that remains.
        arrayMap(limit -> least(limit * sign, remaining * sign) * sign,
            arrayCumSum(arrayMap(step -> pence(step.2), part.after))) AS up_to,
        arrayMap((high, low) -> high - low, up_to, arrayPopBack(arrayPushFront(up_to, toDecimal256(0, 18)))) AS behind,
        arrayConcat(arrayMap(step -> step.1, part.taken), [ifNull(part.allocation, part.rest)],
            arrayMap(step -> step.1, part.after), [part.rest]) AS payers,
        arrayConcat(before, [drawn], behind, [remaining - arraySum(behind)]) AS amounts,
        if(number >= length(parts), accrued_of_line - toDecimal256(charge_of_line * portion, 18), 0) AS excess,
        if(number >= length(parts), rate_of_line - toDecimal256(charge_of_line * portion_per_second, 18), 0)
            AS excess_per_second
    FROM (
        SELECT
            order_number, item_id, ods_code, supplier_id,
            charge_pence AS charge_of_line, accrued_pence AS accrued_of_line, pence_per_second AS rate_of_line,
            if(charge_pence = 0, toDecimal256(0, 18), accrued_pence / charge_pence) AS ratio,
            greatest(least(ratio, toDecimal256(1, 18)), toDecimal256(0, 18)) AS portion,
            if(charge_pence = 0 OR portion != ratio, toDecimal256(0, 18), pence_per_second / charge_pence)
                AS portion_per_second,
            JSONExtract(groups, 'Array(Tuple(party String, charge String, taken Array(Tuple(String, String)),
                allocation Nullable(String), wanted String, after Array(Tuple(String, String)), rest String))') AS parts
        FROM accruals_live(month = {month:Int32}, at_ms = {at_ms:Int64})
        WHERE charge_pence != 0 OR accrued_pence != 0
    )
    LEFT ARRAY JOIN parts AS part, arrayEnumerate(parts) AS number
)
ARRAY JOIN payers AS payer, amounts AS amount, arrayEnumerate(payers) AS place
